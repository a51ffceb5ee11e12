"""Make training rows of others' pairs, labels or demonstrations, with the labels that they come with.

    python -m recipes.import_rows --data RLHF4MATH/Gemma-7B-1.1-it-iter1-random-pairs:train \\
        --tokenizer google/gemma-1.1-7b-it --out runs/theirs
    python -m recipes.train --method dpo --model runs/sft/model --data runs/theirs --learning_rate 4e-7 --out runs/dpo

--data takes files (.jsonl, .jsonl.gz, .parquet) and data sets of the hub in any form that data/README.md shows, the
sets published with arXiv 2409.02392 and TRL's among them. OUT/pairs.jsonl (binary.jsonl, sft.jsonl) holds the rows,
OUT/problems.jsonl the questions. A tokenizer whose template changes earlier turns is refused; conversations that it
cannot show, and pairs whose sides have different prompts or the same turns, are left out and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from data.foreign_rows import Kind, foreign_rows
from data.problems import write_problems
from mtpo.batches import Row
from mtpo.chat import ChatFormat
from mtpo.cli import run_recipe
from mtpo.errors import InputError
from mtpo.models import load_tokenizer
from mtpo.runs import RunFolder, write_jsonl
from mtpo.trajectory import Problem


@dataclass(frozen=True, kw_only=True)
class Config:
    """Make training rows of others' pairs, labels or demonstrations."""

    data: list[str] = field(metadata={"help": "files, or data sets of the hub as OWNER/NAME:SPLIT"})
    tokenizer: str = field(metadata={"help": "of the model to train: renders the messages into ids"})
    out: str = field(metadata={"help": "run folder"})
    kind: Kind = field(
        default="pairs", metadata={"help": "pairs, binary labels (of pairs too), or sft (chosen ones only)"}
    )
    resume: bool = field(default=False, metadata={"help": "write the rows of an interrupted run again"})


def main(argv: Sequence[str] | None = None) -> int:
    return run_recipe(Config, import_rows, "recipes.import_rows", argv)


def import_rows(config: Config) -> str:
    chat = ChatFormat.for_tokenizer(load_tokenizer(config.tokenizer))
    rows: list[Row] = []
    problems: dict[str, Problem] = {}
    num_refused = 0
    for source in config.data:
        found = foreign_rows(source, chat, config.kind)
        for problem in found.problems:
            if problems.setdefault(problem.id, problem) != problem:
                raise InputError(
                    f"--data {source}: problem {problem.id!r} is another one than in the files before"
                )
        rows += found.rows
        num_refused += len(found.refused)
    folder = RunFolder.open(config.out, config, resume=config.resume)
    file = folder.path / f"{config.kind}.jsonl"
    write_problems(folder.path / "problems.jsonl", list(problems.values()))
    write_jsonl(file, rows)
    folder.finish({"num_rows": len(rows), "num_problems": len(problems), "num_left_out": num_refused})
    return f"{len(rows)} rows in {file} ({num_refused} records left out)"


if __name__ == "__main__":
    raise SystemExit(main())
