"""The whole loop on two CPU cores: problems, demonstrations, a tiny Gemma 2 from scratch, and a better one.

    python -m recipes.quickstart --out runs/quickstart

Makes word problems and demonstrations that are wrong on purpose, trains a tokenizer and a model of 0.2 million
parameters on them, lets it use the Python interpreter on new problems, and trains it on its own right and wrong
trajectories. The gain shows that the machinery works, not that the model is good at maths.

    OUT/sft/                     the supervised model, OUT/iteration_1/ and OUT/iteration_2/ as in recipes.iterate
    OUT/test/                    evaluation of all three on the held-out problems, after the last training step
    OUT/summary.json             the table as numbers
    OUT/report.html              figures, and every trajectory down to its tokens
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.utils import logging as transformers_logging

from data.demonstrations import demonstrations
from data.generated import problems
from eval.report import write_report
from eval.stages import stages_table
from mtpo.chat import ChatFormat
from mtpo.cli import run_recipe
from mtpo.errors import InputError
from mtpo.runs import RunFolder
from mtpo.training import TrainingSettings, train
from recipes.iterate import LoopOptions, Sets, run_loop, run_tests
from recipes.sft import render_rows
from recipes.tiny import make_tiny_gemma2, train_tokenizer

NUM_DEMONSTRATIONS = 16_000
PROMPTS_START = 20_000
"""Training problems from here on are for preference learning; demonstrations use those before."""
PROMPTS_A_SEED = 10_000

SUPERVISED = TrainingSettings(
    method="sft",
    learning_rate=6e-3,
    optimizer="muon",
    batch_size=16,
    micro_batch_size=8,
    warmup_steps=100,
    final_lr_ratio=0.02,
    adam_beta2=0.98,
    weight_decay=0.01,
)
"""How a tiny model learns from demonstrations; chosen on dev problems."""

LOOPS: dict[str, dict[str, Any]] = {
    "dpo": {"learning_rate": 1e-4, "batch_size": 16, "per_problem": 2},
    "kto": {"learning_rate": 1e-4, "batch_size": 32, "per_problem": 2},
    "raft": {"learning_rate": 3e-4, "batch_size": 32, "per_problem": 2},
}
"""What each method needs; chosen on dev problems."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole loop on two CPU cores, in about five minutes."""

    out: str = field(metadata={"help": "run folder"})
    method: Literal["dpo", "kto", "raft"] = field(
        default="dpo", metadata={"help": "how the iterations train"}
    )
    mask: bool = field(
        default=True, metadata={"help": "leave tool output out of the loss; --no-mask: put it in"}
    )
    reference: Literal["updated", "fixed"] = field(
        default="updated",
        metadata={"help": "reference of iteration 2: the policy of iteration 1, or the first one"},
    )
    iterations: int = field(default=2, metadata={"help": "rounds of sampling and training"})
    prompts: int = field(default=200, metadata={"help": "new problems of one iteration"})
    samples: int = field(default=8, metadata={"help": "trajectories per problem"})
    demonstrations: int = field(default=NUM_DEMONSTRATIONS, metadata={"help": "for the supervised training"})
    dev: int = field(default=100, metadata={"help": "problems for choosing checkpoints"})
    test: int = field(default=300, metadata={"help": "held-out problems, used once"})
    seed: int = field(
        default=0, metadata={"help": "fixes demonstrations, prompts, initial weights and draws"}
    )
    resume: bool = field(
        default=False, metadata={"help": "go on with an interrupted run, or show a finished one"}
    )

    def __post_init__(self) -> None:
        for name in ("iterations", "prompts", "samples", "demonstrations", "dev", "test"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.demonstrations > PROMPTS_START:
            raise InputError(f"--demonstrations must be at most {PROMPTS_START}, got {self.demonstrations}")
        if self.iterations * self.prompts > PROMPTS_A_SEED:
            raise InputError(f"--iterations times --prompts must be at most {PROMPTS_A_SEED}")

    @property
    def loop(self) -> LoopOptions:
        return LoopOptions(
            method=self.method,
            mask="action" if self.mask else "none",
            reference="last" if self.reference == "updated" else "fixed",
            iterations=self.iterations,
            prompts=self.prompts,
            samples=self.samples,
            previous_samples=0,
            max_turns=4,
            max_turn_tokens=72,
            preload=[],
            max_in_flight=128,
            lr_schedule="linear",
            final_lr_ratio=0.1,
            warmup_steps=5,
            num_checkpoints=1,
            seed=self.seed,
            **LOOPS[self.method],
        )


def main(argv: Sequence[str] | None = None) -> int:
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(
        1
    )  # a model this small gains nothing from two, and the interpreters use the other core
    return run_recipe(Config, quickstart, "recipes.quickstart", argv)


def quickstart(config: Config) -> str:
    folder, started = RunFolder.open(config.out, config, resume=config.resume), time.monotonic()
    policy = supervised(folder.path / "sft", config.demonstrations, config.seed)
    prompts = problems(
        "train", config.iterations * config.prompts, PROMPTS_START + config.seed * PROMPTS_A_SEED
    )
    sets = Sets(prompts, problems("dev", config.dev), problems("test", config.test))
    policies = run_loop(folder.path, str(policy), sets, config.loop, name="SFT")
    stages, test = run_tests(folder.path, policies, sets.test, config.loop)
    summary = folder.summary or {
        "stages": [stage.to_json() for stage in stages],
        "paired": dataclasses.asdict(test),
        "method": config.method,
        "seed": config.seed,
        "seconds": round(time.monotonic() - started, 1),
    }
    folder.finish(summary)
    print("\n" + stages_table(stages, test) + "\n")
    report = write_report(folder.path)
    made = f"{config.method}, {config.iterations} iterations, {summary['seconds']:.0f} s"
    return f"{made}: open {report} to look at all of it"


def supervised(out: Path, num_demonstrations: int, seed: int, *, num_heads: int = 4) -> Path:
    """Train a tiny Gemma 2 from scratch on demonstrations, unless that is done; the folder of the model.

    Its tokenizer is trained on them too, so that it is the same for the same demonstrations.
    """
    if (out / "model").exists():
        return out / "model"
    shown = list(demonstrations(num_demonstrations, seed=seed))
    tokenizer = train_tokenizer(message["content"] for _, messages in shown for message in messages)
    rows = render_rows(ChatFormat.for_tokenizer(tokenizer), ((told.id, messages) for told, messages in shown))
    model = make_tiny_gemma2(tokenizer, seed, num_heads=num_heads)
    return train(model, rows, SUPERVISED, out, tokenizer=tokenizer, resume=True).model


if __name__ == "__main__":
    raise SystemExit(main())
