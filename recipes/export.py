"""Give trajectories or training rows to others: as a Parquet file, as a data set on the hub, or as conversations.

    python -m recipes.export --trajectories runs/train --out train.parquet
    python -m recipes.export --trajectories runs/a runs/b --push_to_hub me/my-trajectories --private
    python -m recipes.export --trajectories runs/train --rows runs/pairs --out pairs.jsonl

A row of Parquet is a trajectory with its messages, its exact token ids, the mask and log-probs of those that the model
wrote, what its code printed, and why it ended; with --no_grade left out, also with the gold answer, its own and the
verdict. A trajectory that several runs share is written once; runs that differ in one are refused.

With --rows, pairs become {"prompt", "chosen", "rejected"} and labels {"prompt", "completion", "label"}, lists of
messages as TRL's trainers take them. Those do not know who wrote a token and train tool output too: what keeps the
mask is mtpo.integrations.trl, which takes the rows as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.conversations import conversation_rows
from data.export import GRADE_COLUMNS, Merge, Row, export_rows, to_row
from data.problems import read_problems
from data.trajectories import read_trajectories
from mtpo.batches import read_rows, row_kind
from mtpo.chat import ChatFormat
from mtpo.cli import run_recipe
from mtpo.errors import InputError
from mtpo.models import load_tokenizer
from mtpo.runs import read_json, write_jsonl
from mtpo.trajectory import Problem, Trajectory
from recipes.label import BATCH, grade_trajectories
from recipes.train import KINDS


@dataclass(frozen=True, kw_only=True)
class Config:
    """Give trajectories or training rows to others: Parquet, a data set on the hub, or conversations."""

    trajectories: list[str] = field(metadata={"help": "folders of recipes.generate"})
    out: str | None = field(
        default=None, metadata={"help": "FILE.parquet, with --rows FILE.jsonl, which must not exist"}
    )
    push_to_hub: str | None = field(default=None, metadata={"help": "OWNER/NAME of the data set"})
    rows: str | None = field(
        default=None,
        metadata={"help": "folder of recipes.label, or a file of rows, to write as conversations"},
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "for --rows: whose template shows tool output; by default the run's model"},
    )
    private: bool = field(default=False, metadata={"help": "make a new data set on the hub private"})
    grade: bool = field(default=True, metadata={"help": "add gold answers and verdicts"})
    workers: int = field(default=2, metadata={"help": "processes for the answers that need algebra"})

    def __post_init__(self) -> None:
        if self.out is None and self.push_to_hub is None:
            raise InputError("nothing to do: expected --out FILE, --push_to_hub OWNER/NAME, or both")
        suffix = ".parquet" if self.rows is None else ".jsonl"
        if self.out is not None and not self.out.endswith(suffix):
            raise InputError(f"--out must end in {suffix}, got {self.out!r}")
        if self.rows is None and self.tokenizer is not None:
            raise InputError("--tokenizer has no effect without --rows")
        if self.rows is not None and (self.push_to_hub is not None or not self.grade):
            raise InputError(
                "--rows are written to --out, without grades: --push_to_hub and --no_grade have no effect"
            )
        if self.private and self.push_to_hub is None:
            raise InputError("--private has no effect without --push_to_hub")


def main(argv: Sequence[str] | None = None) -> int:
    return run_recipe(Config, export, "recipes.export", argv)


def export(config: Config) -> str:
    parquet = None if config.out is None else Path(config.out)
    if parquet is not None and parquet.exists():
        raise InputError(f"--out {parquet} exists: take another name")
    runs = [Path(run) for run in config.trajectories]
    if config.rows is not None and parquet is not None:
        return export_conversations(Path(config.rows), runs, config.tokenizer, parquet)
    problems = read_all_problems(runs) if config.grade else {}
    merge = Merge([run / "trajectories" for run in runs])
    if parquet is not None:
        parquet.parent.mkdir(parents=True, exist_ok=True)
    num_rows = export_rows(
        graded_rows(merge, problems, config.workers),
        parquet=parquet,
        hub_name=config.push_to_hub,
        is_private=config.private,
    )
    places = [str(parquet)] * (parquet is not None)
    places += [f"https://huggingface.co/datasets/{config.push_to_hub}"] * (config.push_to_hub is not None)
    return (
        f"{num_rows} trajectories in {' and '.join(places)} ({merge.num_duplicates} duplicates and "
        f"{merge.num_replaced_faults} replaced faults left out)"
    )


def export_conversations(source: Path, runs: Sequence[Path], tokenizer: str | None, out: Path) -> str:
    """Write the rows of `source` as text, which is that of the runs' trajectories.

    Raises:
        InputError: there are no rows, a trajectory of theirs is in none of the runs, or nothing names a tokenizer.
    """
    rows = read_rows(rows_file(source))
    model = tokenizer or read_json(runs[0] / "config.json")["options"].get("model")
    if model is None:
        raise InputError(f"{runs[0]} does not say which model it sampled from: expected --tokenizer")
    chat = ChatFormat.for_tokenizer(load_tokenizer(model))
    trajectories = (t for run in runs for t in read_trajectories(run / "trajectories"))
    write_jsonl(out, conversation_rows(rows, trajectories, chat))
    return f"{len(rows)} {row_kind(rows[0])} rows as conversations in {out}"


def rows_file(source: Path) -> Path:
    """The file itself, or the one file of rows in a folder of recipes.label.

    Raises:
        InputError: the folder has none, or several.
    """
    if not source.is_dir():
        return source
    found = [file for kind in KINDS.values() if (file := source / f"{kind}.jsonl").exists()]
    if len(found) != 1:
        raise InputError(
            f"--rows {source} holds {len(found)} files of rows; expected one of recipes.label, or the file itself"
        )
    return found[0]


def read_all_problems(runs: Sequence[Path]) -> dict[str, Problem]:
    """The problems of all runs by their ids.

    Raises:
        InputError: two runs mean different problems by one id, or a run has no problems.
    """
    problems: dict[str, Problem] = {}
    for run in runs:
        for problem in read_problems(run / "problems.jsonl"):
            if problems.setdefault(problem.id, problem) != problem:
                raise InputError(
                    f"{run / 'problems.jsonl'}: problem {problem.id!r} is another one than in the runs before"
                )
    return problems


def graded_rows(
    trajectories: Iterable[Trajectory], problems: Mapping[str, Problem], workers: int
) -> Iterator[Row]:
    """A row a trajectory; with its grade, unless there are no problems."""
    source = iter(trajectories)
    while batch := list(itertools.islice(source, BATCH)):
        if not problems:
            yield from map(to_row, batch)
            continue
        for trajectory, verdict in grade_trajectories(batch, problems.values(), workers=workers):
            gold = problems[trajectory.problem_id].answer
            grade = zip(GRADE_COLUMNS, (gold, verdict.answer, verdict.verdict), strict=True)
            yield to_row(trajectory) | dict(grade)


if __name__ == "__main__":
    raise SystemExit(main())
