"""What the stages of recipes.iterate amount to, before any of them runs: sizes, GPU memory, hours, disk.

Sizes follow from the options, and from what arXiv 2409.02392 tells of its own runs. Hours are tokens over the rates in
`Assumptions`: as good as these, and without starting engines, loading models and writing checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from mtpo.errors import InputError
from mtpo.models import DTYPES
from mtpo.training import TrainingSettings
from mtpo.training.memory import Memory, Sizes
from recipes.dry_run import GIB, DryRunOptions


@dataclass(frozen=True)
class Assumptions:
    """What no config says; the first two are options."""

    engine_tokens_per_s: float = 1250.0
    """Sampled by one engine that is full."""
    gpu_tflops: float = 125.0
    """Of training on one GPU: 40 % of what an A100 can do in bfloat16."""
    turns: float = 3.5
    turn_tokens: float = 150.0
    """Sampled in a turn; as many, and as many turns, as in `benchmarks.scaling`."""
    read_tokens: float = 225.0
    """Of question and tool output, in a trajectory."""
    usable: float = 0.875
    """Prompts with a correct and a wrong trajectory: 15,000 to 20,000 of 20,000 in the paper."""
    solved: float = 0.925
    """Prompts with a correct trajectory: the paper's, of 30 samples."""
    gradings_per_s: float = 4200.0
    """On one core; measured: `benchmarks.grader`."""
    bytes_per_token: float = 3048 / 300
    """Of the journal for each sampled token; measured: `benchmarks.journal`."""

    @property
    def sampled_tokens(self) -> float:
        """Of a trajectory."""
        return self.turns * self.turn_tokens

    @property
    def row_tokens(self) -> float:
        """Of a trajectory that is trained on, question and tool output included."""
        return self.sampled_tokens + self.read_tokens

    def __str__(self) -> str:
        return (
            f"Assumed: {self.engine_tokens_per_s:,.0f} sampled tokens a second for each engine, "
            f"{self.gpu_tflops:g} TFLOP/s of training on each GPU, {self.turns:g} turns of {self.turn_tokens:g} "
            f"sampled tokens and {self.read_tokens:g} read ones a trajectory; pairs for {self.usable:.1%} of the "
            f"prompts, a correct trajectory for {self.solved:.1%}. Measured: {self.gradings_per_s:,.0f} gradings a "
            f"second, {self.bytes_per_token:.1f} bytes of journal a sampled token."
        )


@dataclass(frozen=True, kw_only=True)
class PlanOptions(DryRunOptions):
    """The rates behind the hours of a dry run."""

    engine_tokens_per_s: float | None = field(
        default=None,
        metadata={
            "help": "of a dry run: tokens that a full engine samples a second; "
            f"{Assumptions.engine_tokens_per_s:g} by default"
        },
    )
    gpu_tflops: float | None = field(
        default=None,
        metadata={
            "help": f"of a dry run: TFLOP/s of training on one GPU; {Assumptions.gpu_tflops:g} by default"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("engine_tokens_per_s", "gpu_tflops"):
            value = getattr(self, name)
            if value is not None and not self.dry_run:
                raise InputError(f"--{name} has no effect without --dry_run")
            if value is not None and not value > 0:
                raise InputError(f"--{name} must be positive, got {value}")

    @property
    def assumptions(self) -> Assumptions:
        names = ("engine_tokens_per_s", "gpu_tflops")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(Assumptions(), **given)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a loop is to do, and with what."""

    settings: TrainingSettings
    iterations: int
    prompts: int
    """Of one iteration."""
    samples: int
    previous_samples: int
    num_previous: int
    """Iterations that sample from an earlier policy, too."""
    per_problem: int
    num_dev: int
    num_test: int
    test_samples: int
    dtype: str
    """What is sampled in."""
    test_dtype: str
    num_engines: int
    num_gpus: int
    """For training."""


@dataclass(frozen=True)
class PlannedStage:
    """One stage, as often as the loop has it; the figures are those of one time."""

    name: str
    times: int
    size: str
    tokens: float
    hours: float
    gpu_bytes: int = 0
    """On each GPU: of an engine the weights alone."""
    disk_bytes: float = 0.0


def plan(work: Work, sizes: Sizes, memory: Memory, assumed: Assumptions) -> list[PlannedStage]:
    """The stages in their order.

    Args:
        memory: of training, as `mtpo.training.memory.estimate` has it.
    """
    settings, num_parameters = work.settings, sizes.num_parameters
    rows, row_name = _rows(work, assumed)
    row_tokens = rows * assumed.row_tokens * (2 if settings.recipe.rows == "pair" else 1)
    flops_per_s = 1e12 * assumed.gpu_tflops * work.num_gpus

    def sampling(name: str, times: int, problems: int, samples: int, dtype: str) -> PlannedStage:
        tokens = problems * samples * assumed.sampled_tokens
        hours = tokens / (assumed.engine_tokens_per_s * work.num_engines) / 3600
        weights = num_parameters * DTYPES[dtype].itemsize
        size = f"{problems:,} x {samples}"
        return PlannedStage(name, times, size, tokens, hours, weights, tokens * assumed.bytes_per_token)

    def computing(name: str, flops: float, gpu_bytes: int, disk_bytes: float = 0.0) -> PlannedStage:
        hours = row_tokens * flops / flops_per_s / 3600
        size = f"{rows:,} {row_name}"
        return PlannedStage(name, work.iterations, size, row_tokens, hours, gpu_bytes, disk_bytes)

    sampled = work.prompts * (work.samples + work.previous_samples * bool(work.num_previous))
    stages = [sampling("sample current", work.iterations, work.prompts, work.samples, work.dtype)]
    if work.num_previous:
        stages.append(
            sampling("sample previous", work.num_previous, work.prompts, work.previous_samples, work.dtype)
        )
    grading_hours = sampled / assumed.gradings_per_s / 3600
    stages.append(PlannedStage("grade and label", work.iterations, f"{sampled:,}", 0, grading_hours))
    if settings.recipe.needs_reference:
        weights = num_parameters * DTYPES[settings.weights_dtype].itemsize
        stages.append(computing("score reference", 2 * num_parameters, weights))
    flops = training_flops(sizes, checkpointed=settings.gradient_checkpointing) * settings.epochs
    stages.append(computing("train", flops, memory.total, saved_bytes(settings, sizes)))
    candidates = settings.num_checkpoints + 1
    stages.append(sampling("select on dev", work.iterations, work.num_dev, candidates, work.dtype))
    tests = 1 + work.test_samples
    stages.append(sampling("test", work.iterations + 1, work.num_test, tests, work.test_dtype))
    return stages


def training_flops(sizes: Sizes, *, checkpointed: bool) -> float:
    """For a token: 2 a weight forward, 2 back to the activations, 2 to what is trained; 2 more to run forward again.

    That is 6 a weight (arXiv 2001.08361, section 2.1), attention scores not counted.
    """
    return (6 if checkpointed else 4) * sizes.num_parameters + 2 * sizes.num_trained


def saved_bytes(settings: TrainingSettings, sizes: Sizes) -> int:
    """Of the final model of an iteration and its checkpoints, each with the two states of AdamW."""
    weights = sizes.num_trained * (2 if settings.pure_bfloat16 else 4)
    return weights + settings.num_checkpoints * 3 * weights


def plan_table(stages: Sequence[PlannedStage]) -> str:
    """A line for each stage, and the sums over all times."""
    lines = [f"{'stage':<16}{'times':>6}{'size':>22}{'tokens':>10}{'hours':>8}{'GiB/GPU':>9}{'GB disk':>9}"]
    for stage in stages:
        lines.append(
            f"{stage.name:<16}{stage.times:>6}{stage.size:>22}{stage.tokens / 1e6:>9.1f}M{stage.hours:>8.2f}"
            f"{stage.gpu_bytes / GIB:>9.1f}{stage.disk_bytes / 1e9:>9.1f}"
        )
    tokens, hours, disk = (
        sum(stage.times * value for stage, value in zip(stages, values, strict=True))
        for values in ([s.tokens for s in stages], [s.hours for s in stages], [s.disk_bytes for s in stages])
    )
    most = max(stage.gpu_bytes for stage in stages)
    total = f"{'all':<16}{'':>28}{tokens / 1e6:>9.1f}M{hours:>8.2f}{most / GIB:>9.1f}{disk / 1e9:>9.1f}"
    return "\n".join([*lines, total])


def _rows(work: Work, assumed: Assumptions) -> tuple[int, str]:
    """Training rows of an iteration, and what they are."""
    kind, most = work.settings.recipe.rows, work.prompts * work.per_problem
    if kind == "single":
        return round(most * assumed.solved), "trajectories"
    pairs = round(most * assumed.usable)
    return (pairs, "pairs") if kind == "pair" else (2 * pairs, "labels")
