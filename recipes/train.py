"""Train a policy on pairs, binary labels, or single trajectories, by any offline method.

    python -m recipes.train --method dpo --model runs/sft/model --data runs/pairs --learning_rate 4e-7 --out runs/dpo

--data is a folder of recipes.label, or a file of its rows. OUT/model is the trained model with its tokenizer,
OUT/metrics.jsonl has one line a step. Under torchrun or accelerate it trains on many devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mtpo.batches import Row, RowKind, read_rows
from mtpo.cli import run_recipe
from mtpo.errors import InputError
from mtpo.models import load_config, load_model, load_tokenizer
from mtpo.runs import RunFolder
from mtpo.training import METHODS, TrainingSettings, TrainResult, train
from recipes.dry_run import DryRunOptions, dry_run
from recipes.label import Kind

KINDS: dict[RowKind, Kind] = {"pair": "pairs", "label": "binary", "single": "sft"}
"""What recipes.label calls the rows that a method takes."""
SPEED_ONLY = frozenset({"micro_batch_size", "gradient_checkpointing", "layout"})


@dataclass(frozen=True, kw_only=True)
class RowTraining(TrainingSettings, DryRunOptions):
    """How a policy is loaded, and trained on given rows."""

    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "QLoRA: quantise the model that lora_rank leaves as it is; CUDA only"},
    )
    attention: str | None = field(default=None, metadata={"help": "attention; by default an exact one"})

    def __post_init__(self) -> None:
        TrainingSettings.__post_init__(self)
        DryRunOptions.__post_init__(self)
        if self.load_in_4bit and self.lora_rank is None:
            raise InputError(
                "--load_in_4bit needs --lora_rank: quantised weights cannot be trained themselves"
            )


@dataclass(frozen=True, kw_only=True)
class Config(RowTraining):
    """Train a policy on pairs, binary labels, or single trajectories, by any offline method."""

    model: str = field(metadata={"help": "policy to start from: model name or folder"})
    data: str = field(metadata={"help": "folder of recipes.label, or a file of rows"})
    out: str = field(metadata={"help": "run folder"})
    eval_data: str | None = field(
        default=None, metadata={"help": "held-out rows, as --data; their loss goes to OUT/eval.jsonl"}
    )
    reference: str | None = field(
        default=None, metadata={"help": "reference policy; by default --model as it starts"}
    )
    resume: bool = field(default=False, metadata={"help": "go on with an interrupted run"})


def main(argv: Sequence[str] | None = None) -> int:
    return run_recipe(Config, train_policy, "recipes.train", argv)


def train_policy(config: Config) -> str:
    if config.dry_run:
        return dry_run(config, config, config.model, in_4bit=config.load_in_4bit)
    rows = read_data(config.data, config.method)
    held_out = [] if config.eval_data is None else read_data(config.eval_data, config.method)
    tokenizer = load_tokenizer(config.model)
    model = load_model(
        config.model, dtype=config.weights_dtype, attention=config.attention, in_4bit=config.load_in_4bit
    )
    load_reference = None
    if config.reference is not None:
        load_config(config.reference)  # a wrong name is told before there is a run folder
        load_reference = partial(
            load_model, config.reference, dtype=config.weights_dtype, attention=config.attention
        )
    folder = RunFolder.open(config.out, config, resume=config.resume, may_change=SPEED_ONLY)
    result = train(
        model,
        rows,
        config,
        folder.path,
        reference_model=load_reference,
        tokenizer=tokenizer,
        eval_rows=held_out,
        data_files=[rows_file(config.data, config.method)],
        resume=config.resume,
    )
    folder.finish(summary(result))
    return f"{result.num_steps} steps on {result.num_rows} rows, {result.num_dropped} too long; model in {result.model}"


def read_data(data: str, method: str) -> list[Row]:
    """The rows in a file, or in the file of a label folder that this method takes.

    Raises:
        InputError: there is no such file, the folder holds rows of another kind, or a row is broken.
    """
    return read_rows(rows_file(data, method))


def rows_file(data: str, method: str) -> Path:
    """A file as it is, or the file of a label folder that this method takes.

    Raises:
        InputError: the folder holds rows of another kind.
    """
    path = Path(data)
    if not path.is_dir():
        return path
    kind = KINDS[METHODS[method].rows]
    if not (path / f"{kind}.jsonl").exists():
        found = [k for k in KINDS.values() if (path / f"{k}.jsonl").exists()]
        raise InputError(
            f"--data {path} has no {kind}.jsonl, which method {method} trains on; "
            f"it has {', '.join(found) or 'no rows at all'}: use recipes.label --kind {kind}"
        )
    return path / f"{kind}.jsonl"


def summary(result: TrainResult) -> dict[str, object]:
    """What a training run made, for `summary.json`."""
    return {
        "model": str(result.model),
        "steps": result.num_steps,
        "rows": result.num_rows,
        "dropped": result.num_dropped,
        "seconds": round(result.seconds, 1),
        "last_step": result.metrics,
    }


if __name__ == "__main__":
    raise SystemExit(main())
