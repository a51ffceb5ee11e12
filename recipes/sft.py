"""Supervised training on demonstrations: the loss is on what the model is to write, tool output is only read.

    python -m recipes.sft --model google/gemma-2-2b --data demonstrations.jsonl --learning_rate 5e-6 --out runs/sft

--data takes files of others (.jsonl, .jsonl.gz: message lists, or flat text with ```python and ```output fences),
rendered by the model's own chat template, or the rows of recipes.label --kind sft.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from data.imports import read_foreign
from mtpo.batches import Row, read_rows
from mtpo.chat import ChatFormat, Message
from mtpo.cli import run_recipe
from mtpo.errors import InputError
from mtpo.models import load_model, load_tokenizer
from mtpo.runs import RunFolder
from mtpo.training import train
from recipes.dry_run import dry_run
from recipes.train import SPEED_ONLY, RowTraining, summary

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config(RowTraining):
    """Supervised training on demonstrations."""

    method: str = field(default="sft", metadata={"help": "sft, or raft for the same under that name"})
    model: str = field(metadata={"help": "model to start from: name or folder"})
    data: list[str] = field(metadata={"help": "files of demonstrations, or of rows"})
    out: str = field(metadata={"help": "run folder"})
    eval_data: str | None = field(
        default=None, metadata={"help": "held-out file, as --data; its loss goes to OUT/eval.jsonl"}
    )
    limit: int | None = field(default=None, metadata={"help": "first demonstrations of each file only"})
    tokenizer: str | None = field(
        default=None, metadata={"help": "with the chat template; by default --model's"}
    )
    resume: bool = field(default=False, metadata={"help": "go on with an interrupted run"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recipe.rows != "single":
            raise InputError(f"--method {self.method} is no supervised method; use recipes.train")


def main(argv: Sequence[str] | None = None) -> int:
    return run_recipe(Config, train_supervised, "recipes.sft", argv)


def train_supervised(config: Config) -> str:
    if config.dry_run:
        return dry_run(config, config, config.model, in_4bit=config.load_in_4bit)
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    rows = [row for path in config.data for row in read_demonstrations(Path(path), tokenizer, config.limit)]
    held_out = [] if config.eval_data is None else read_demonstrations(Path(config.eval_data), tokenizer)
    model = load_model(
        config.model, dtype=config.weights_dtype, attention=config.attention, in_4bit=config.load_in_4bit
    )
    folder = RunFolder.open(config.out, config, resume=config.resume, may_change=SPEED_ONLY)
    result = train(
        model,
        rows,
        config,
        folder.path,
        tokenizer=tokenizer,
        eval_rows=held_out,
        data_files=[Path(path) for path in config.data],
        resume=config.resume,
    )
    folder.finish(summary(result))
    return f"{result.num_steps} steps on {result.num_rows} rows, {result.num_dropped} too long; model in {result.model}"


def read_demonstrations(path: Path, tokenizer: object, limit: int | None = None) -> list[Row]:
    """The rows of a file of rows, or of a file of others' conversations.

    Raises:
        InputError: a row is broken, or no conversation can be rendered.
    """
    if _holds_rows(path):
        return read_rows(path)[:limit]
    chat = ChatFormat.for_tokenizer(tokenizer)
    conversations = ((f.problem.id, f.messages) for f in islice(read_foreign(path), limit))
    rows = render_rows(chat, conversations)
    if not rows:
        raise InputError(f"{path}: holds no conversation that could be rendered")
    return rows


def render_rows(chat: ChatFormat, conversations: Iterable[tuple[str, Sequence[Message]]]) -> list[Row]:
    """Training rows of (problem id, messages); a conversation that cannot be rendered is left out with a warning."""
    rows: list[Row] = []
    for problem_id, messages in tqdm(conversations, desc="rendering", unit="row", delay=2):
        try:
            segments = chat.import_messages(messages)
        except InputError as error:
            logger.warning("left out a demonstration of %s: %s", problem_id, error)
            continue
        rows.append(
            {
                "problem_id": problem_id,
                "sample": len(rows),
                "input_ids": [i for s in segments for i in s.ids],
                "completion_mask": [int(s.kind == "action") for s in segments for _ in s.ids],
            }
        )
    return rows


def _holds_rows(path: Path) -> bool:
    if path.suffix != ".jsonl" or not path.exists():
        return False
    with path.open(encoding="utf-8") as file:
        return '"completion_mask"' in file.readline()


if __name__ == "__main__":
    raise SystemExit(main())
