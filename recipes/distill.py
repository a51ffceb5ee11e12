"""Train a student to predict what a teacher predicts, on given trajectories and on the student's own.

    python -m recipes.distill --teacher google/gemma-2-9b-it --model runs/sft/model --data runs/teacher-samples \\
        --problems gsm8k:train --learning_rate 1e-6 --out runs/gkd

--method gkd fills the share --on_policy of the batches with trajectories of the student as it then is, sampled on
--problems with the code interpreter; --method kd needs no problems. --data takes a folder of recipes.generate (all
its trajectories, right or wrong), a folder of recipes.label --kind sft, or a file of rows; with --on_policy 1 there
need be none. Tool output is context only. OUT/model is the student, OUT/rounds/ holds what it sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from data.problems import load_problems
from data.trajectories import read_trajectories
from mtpo.batches import Row
from mtpo.chat import ChatFormat
from mtpo.cli import run_recipe
from mtpo.errors import InputError
from mtpo.models import load_model, load_tokenizer
from mtpo.runs import RunFolder, write_json
from mtpo.training import TrainingSettings, train
from mtpo.training.distill import OnPolicy, row_of
from mtpo.training.guards import engine_gap
from mtpo.trajectory import Problem, Trajectory
from mtpo.vocabularies import require_one_vocabulary
from recipes import train as train_recipe
from recipes.engines import Sampler
from recipes.generate import SPEED_ONLY, SamplingOptions, sample_into
from recipes.train import read_data, summary

PROBED = 8
"""Trajectories of each round whose log-probs are compared between engine and trainer."""


@dataclass(frozen=True, kw_only=True)
class Config(SamplingOptions, TrainingSettings):
    """Train a student to predict what a teacher predicts."""

    method: str = field(default="gkd", metadata={"help": "gkd, or kd for given trajectories only"})
    teacher: str = field(metadata={"help": "model to learn from: name or folder; same tokenizer as --model"})
    model: str = field(metadata={"help": "student to start from: name or folder"})
    out: str = field(metadata={"help": "run folder"})
    data: str | None = field(
        default=None, metadata={"help": "folder of recipes.generate or recipes.label, or a file of rows"}
    )
    problems: str | None = field(
        default=None, metadata={"help": "what the student samples on, as in recipes.generate"}
    )
    limit: int | None = field(default=None, metadata={"help": "first problems only"})
    sync_steps: int = field(
        default=1,
        metadata={"help": "steps whose trajectories are sampled at once, by the weights before them"},
    )
    samples: int = field(default=1, metadata={"help": "always 1: every trajectory is on the next problem"})
    dtype: str = field(default="float32", metadata={"help": "float32, or bfloat16 to halve the memory"})
    attention: str | None = field(default=None, metadata={"help": "attention; by default an exact one"})
    seed: int = field(default=0, metadata={"help": "fixes the order of rows and every draw"})
    resume: bool = field(default=False, metadata={"help": "go on with an interrupted run"})

    def __post_init__(self) -> None:
        SamplingOptions.__post_init__(self)
        TrainingSettings.__post_init__(self)
        if not self.recipe.has_teacher:
            raise InputError(f"--method {self.method} has no teacher; use recipes.train")
        if self.engine != "transformers" or self.samples != 1:
            raise InputError(
                "the student samples with its own weights in this process: --engine transformers, --samples 1"
            )
        if self.share < 1 and self.data is None:
            raise InputError(f"with {1 - self.share:g} of the batches from data, --data is needed")
        if bool(self.share) != (self.problems is not None):
            raise InputError(
                f"the student samples {self.share:g} of the batches: --problems "
                f"{'is needed' if self.share else 'has no effect'}"
            )

    @property
    def share(self) -> float:
        """Of the batches that the student samples."""
        return self.options.get("on_policy", 0.0)


def main(argv: Sequence[str] | None = None) -> int:
    return run_recipe(Config, distill, "recipes.distill", argv)


def distill(config: Config) -> str:
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    chat = ChatFormat.for_tokenizer(tokenizer)
    problems = [] if config.problems is None else load_problems(config.problems, config.limit, strict=False)
    rows = _places(problems, chat, config.system) if config.data is None else _rows(config.data)
    student, teacher = (
        load_model(name, dtype=dtype, attention=config.attention)
        for name, dtype in ((config.model, config.weights_dtype), (config.teacher, config.dtype))
    )
    require_one_vocabulary(
        {"student": student, "teacher": teacher},
        (tokenizer, load_tokenizer(config.teacher)),
        purpose="distillation",
    )
    may_change = SPEED_ONLY | train_recipe.SPEED_ONLY
    folder = RunFolder.open(config.out, config, resume=config.resume, may_change=may_change)
    result = train(
        student,
        rows,
        config,
        folder.path,
        teacher=teacher,
        on_policy=_on_policy(folder.path / "rounds", chat, problems, config) if config.share else None,
        tokenizer=tokenizer,
        resume=config.resume,
    )
    folder.finish(summary(result))
    return f"{result.num_steps} steps on {result.num_rows} rows, {result.num_dropped} too long; model in {result.model}"


def _rows(data: str) -> list[Row]:
    """
    Raises:
        InputError: the folder or file holds nothing to train on.
    """
    if not (Path(data) / "trajectories").is_dir():
        return read_data(data, "sft")
    rows = [
        row_of(t) for t in read_trajectories(Path(data) / "trajectories") if t.actions and t.fault is None
    ]
    if not rows:
        raise InputError(f"--data {data}: holds no trajectory in which the model wrote anything")
    return rows


def _places(problems: Sequence[Problem], chat: ChatFormat, system: str | None) -> list[Row]:
    """A row for each problem, all of which the student's own samples replace."""
    rows = []
    for problem in problems:
        prompt = chat.prompt(problem.question, system=system).ids
        row = {"problem_id": problem.id, "sample": 0, "input_ids": [*prompt, chat.end_of_turn_id]}
        rows.append(row | {"completion_mask": [0] * len(prompt) + [1]})
    return rows


def _on_policy(folder: Path, chat: ChatFormat, problems: Sequence[Problem], config: Config) -> OnPolicy:
    """Samples through the embedded engine, on one problem after the other, into a folder for each round.

    Raises:
        InputError: there are fewer problems than trajectories in a round.
    """
    size = config.sync_steps * config.batch_size
    if len(problems) < size:
        raise InputError(
            f"--problems {config.problems}: {len(problems)} problems are fewer than the {size} trajectories of a "
            "round, --sync_steps times --batch_size"
        )

    def sample(student: PreTrainedModel, number: int, draws: Sequence[int]) -> list[Trajectory]:
        if not draws:
            return []
        part = folder / f"{number:05d}-{draws[0]}"  # each process has its own draws
        wanted = [problems[draw % len(problems)] for draw in draws]
        names: dict[str, Any] = {"name": "student", "iteration": number, "label": f"round {number}"}
        sampler = Sampler("student", chat, student, config.dtype)
        sample_into(part, sampler, wanted, config, seed=config.seed, first_sample=number, **names)
        found = {t.problem_id: t for t in read_trajectories(part / "trajectories")}
        if not (part / "engine_gap.json").exists():
            probed = [t for t in found.values() if t.actions][:PROBED]
            write_json(part / "engine_gap.json", engine_gap(student, probed)._asdict())
        return [found[problem.id] for problem in wanted]

    return OnPolicy(sample, config.sync_steps)


if __name__ == "__main__":
    raise SystemExit(main())
