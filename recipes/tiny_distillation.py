"""Distil the quickstart's final policy into a model of half its width, and measure what that gives.

    python -m recipes.tiny_distillation --teacher runs/quickstart --out runs/distillation

The student is first trained on the teacher's own demonstrations, whose mistakes preference learning has since removed
from the teacher. Then it learns twice from there: by kd from trajectories of the teacher on new problems, and by gkd,
which fills half of the batches with its own.

    OUT/sft/, OUT/kd/, OUT/gkd/  the students; OUT/teacher/ what the teacher sampled
    OUT/test/                    evaluation of students and teacher on the quickstart's held-out problems
    OUT/summary.json             the table as numbers
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from data.generated import problems
from data.problems import write_problems
from eval.stages import stages_table
from mtpo.cli import run_recipe
from mtpo.errors import InputError
from mtpo.runs import RunFolder, read_json
from recipes import distill, quickstart
from recipes.engines import Sampler
from recipes.generate import sample_into
from recipes.iterate import Policy, run_tests

UNUSED = quickstart.PROMPTS_A_SEED // 2
"""Of the quickstart's prompts of a seed, those from here on are for distillation."""

TRAINING: dict[str, Any] = {
    "learning_rate": 2e-3,
    "optimizer": "muon",
    "lr_schedule": "linear",
    "final_lr_ratio": 0.02,
    "warmup_steps": 10,
    "batch_size": 16,
    "micro_batch_size": 8,
    "epochs": 2,
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Distil the quickstart's final policy into a model of half its width."""

    teacher: str = field(metadata={"help": "finished run folder of recipes.quickstart"})
    out: str = field(metadata={"help": "run folder"})
    prompts: int = field(default=1600, metadata={"help": "new problems that teacher and student sample on"})
    sync_steps: int = field(
        default=10, metadata={"help": "gkd: steps sampled at once, by the weights before them"}
    )
    resume: bool = field(default=False, metadata={"help": "go on with an interrupted run"})

    def __post_init__(self) -> None:
        if not self.sync_steps * TRAINING["batch_size"] <= self.prompts <= UNUSED:
            least = self.sync_steps * TRAINING["batch_size"]
            raise InputError(f"--prompts must be from {least} to {UNUSED}, got {self.prompts}")


def main(argv: Sequence[str] | None = None) -> int:
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)  # models this small gain nothing from two
    return run_recipe(Config, distil_quickstart, "recipes.tiny_distillation", argv)


def distil_quickstart(config: Config) -> str:
    teacher, of_teacher = read_teacher(Path(config.teacher))
    folder = RunFolder.open(config.out, config, resume=config.resume)
    out, loop = folder.path, dataclasses.replace(of_teacher.loop, test_samples=0)
    student = quickstart.supervised(out / "sft", of_teacher.demonstrations, of_teacher.seed, num_heads=2)
    start = quickstart.PROMPTS_START + of_teacher.seed * quickstart.PROMPTS_A_SEED + UNUSED
    prompts = problems("train", config.prompts, start)
    write_problems(out / "prompts.jsonl", prompts)
    sample_into(
        out / "teacher", Sampler.load(teacher, loop, "float32"), prompts, loop, seed=loop.seed, samples=1,
        label="teacher",
    )  # fmt: skip
    policies = [Policy("sft", str(student)), Policy("teacher", teacher)]
    for method in ("kd", "gkd"):
        policies.append(Policy(method, _student(method, out, teacher, str(student), loop, config)))
    stages, test = run_tests(out, policies, problems("test", of_teacher.test), loop)
    folder.finish({"stages": [stage.to_json() for stage in stages], "paired": dataclasses.asdict(test)})
    return stages_table(stages, test)


def read_teacher(run: Path) -> tuple[str, quickstart.Config]:
    """The last policy of a quickstart, and how it was made.

    Raises:
        InputError: the folder holds no finished run of recipes.quickstart.
    """
    stages = read_json(run / "summary.json").get("stages")
    options = read_json(run / "config.json")["options"]
    if not stages or "demonstrations" not in options:
        raise InputError(f"--teacher {run} is no finished run of recipes.quickstart")
    return stages[-1]["model"], quickstart.Config(**options)


def _student(method: str, out: Path, teacher: str, student: str, loop: Any, config: Config) -> str:
    """Train by one method, unless that is done; the folder of the model."""
    if (out / method / "model").exists():
        return str(out / method / "model")
    on_policy = {}
    if method == "gkd":
        on_policy = {"problems": str(out / "prompts.jsonl"), "sync_steps": config.sync_steps}
        on_policy |= {
            name: getattr(loop, name) for name in ("max_turns", "max_turn_tokens", "preload", "max_in_flight")
        }
    run = distill.Config(
        method=method, teacher=teacher, model=student, data=str(out / "teacher"), out=str(out / method),
        seed=loop.seed, resume=(out / method / "config.json").exists(), **TRAINING, **on_policy,
    )  # fmt: skip
    distill.distill(run)
    return str(out / method / "model")


if __name__ == "__main__":
    raise SystemExit(main())
