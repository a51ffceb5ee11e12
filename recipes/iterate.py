"""Iterated multi-turn preference learning: sample, grade, label, train, select, and again from the better policy.

    python -m recipes.iterate --config recipes/configs/gemma-2-2b-it.yaml --out runs/iterate

The loop of arXiv 2409.02392, Algorithm 1, with disjoint prompts and the data of one iteration at a time.

    OUT/iteration_1/current/     trajectories of the policy; previous/ holds those of the policy before it
    OUT/iteration_1/labels/      grades and training rows
    OUT/iteration_1/train/       a run of recipes.train: checkpoints and metrics.jsonl
    OUT/iteration_1/dev/NAME/    greedy evaluation of each checkpoint; selected.json names the best
    OUT/test/NAME/               evaluation of every iteration's policy, after the last training step
    OUT/report.html              figures, and trajectories down to their tokens

Every part resumes where it was: after a crash, run the same command with --resume. --launcher trains in processes
of their own, one for each GPU:

    --launcher "accelerate launch --config_file recipes/configs/accelerate/fsdp2.yaml --num_processes 8"
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from data.problems import assert_disjoint, drop_repeated, drop_shared, load_problems, num_problems
from data.trajectories import read_trajectories
from eval.evaluate import correct_by_problem
from eval.metrics import PairedTest
from eval.published import check_published
from eval.report import write_report
from eval.stages import Stage, published_table, stages_table
from mtpo.cli import run_recipe
from mtpo.errors import InputError
from mtpo.models import DTYPES, holds_model
from mtpo.runs import RunFolder, read_json, write_json
from mtpo.training import TrainingSettings
from mtpo.training.guards import engine_gap
from mtpo.training.memory import Memory, Sizes
from mtpo.trajectory import Problem
from recipes import train as train_recipe
from recipes.dry_run import dry_run
from recipes.engines import Sampler, load_policy
from recipes.evaluate import compare, evaluate_into
from recipes.generate import SPEED_ONLY, SamplingOptions, sample_into
from recipes.label import Graded, grade_trajectories, write_rows
from recipes.plan import PlanOptions, Work, plan, plan_table
from recipes.train import KINDS
from recipes.training_stage import launch_command, run_stage, training_stage

PROBED = 8
"""Trajectories of each policy whose log-probs are compared between engine and trainer."""


@dataclass(frozen=True, kw_only=True)
class LoopOptions(SamplingOptions, TrainingSettings):
    """Sampling, training, and how often both happen."""

    iterations: int = field(default=3, metadata={"help": "rounds of sampling and training"})
    prompts: int = field(
        default=20_000, metadata={"help": "training problems of one iteration, never used twice"}
    )
    samples: int = field(default=20, metadata={"help": "trajectories per problem from the current policy"})
    previous_samples: int = field(default=10, metadata={"help": "further ones from the policy before it"})
    per_problem: int = field(default=1, metadata={"help": "pairs of a problem; for kto labels of each class"})
    reference: Literal["last", "fixed"] = field(
        default="last", metadata={"help": "reference policy: that of the last iteration, or always the first"}
    )
    test_samples: int = field(
        default=1, metadata={"help": "samples per test problem at temperature 1; 0 for none"}
    )
    test_dtype: str | None = field(
        default=None, metadata={"help": "what the final evaluation computes in; by default dtype"}
    )
    launcher: str | None = field(
        default=None,
        metadata={
            "help": "command that trains in processes of their own: accelerate launch ..., torchrun ..."
        },
    )
    attention: str | None = field(default=None, metadata={"help": "attention; by default an exact one"})
    seed: int = field(default=0, metadata={"help": "fixes every draw"})

    def __post_init__(self) -> None:
        SamplingOptions.__post_init__(self)
        TrainingSettings.__post_init__(self)
        if self.test_dtype not in (None, *DTYPES):
            raise InputError(f"--test_dtype is {self.test_dtype!r}; expected one of {', '.join(DTYPES)}")
        for name, least in (("iterations", 1), ("prompts", 1), ("per_problem", 1), ("previous_samples", 0)):
            if getattr(self, name) < least:
                raise InputError(f"--{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Config(LoopOptions, PlanOptions):
    """Iterated multi-turn preference learning."""

    model: str = field(metadata={"help": "policy to start from, after supervised training"})
    problems: str = field(metadata={"help": "training problems, as in recipes.generate"})
    dev: str = field(metadata={"help": "problems for choosing checkpoints"})
    test: str = field(metadata={"help": "problems for the final evaluation, used once"})
    out: str = field(metadata={"help": "run folder"})
    previous: str | None = field(
        default=None, metadata={"help": "earlier checkpoint to sample from in iteration 1"}
    )
    dev_limit: int | None = field(default=500, metadata={"help": "dev problems to use"})
    test_limit: int | None = field(default=None, metadata={"help": "test problems to use; all by default"})
    published: str | None = field(
        default=None,
        metadata={"help": "row of arXiv 2409.02392 to report beside the results, as in eval/published.py"},
    )
    resume: bool = field(default=False, metadata={"help": "go on with an interrupted run"})

    def __post_init__(self) -> None:
        if self.published is not None:
            check_published(self.published)
        LoopOptions.__post_init__(self)
        PlanOptions.__post_init__(self)


@dataclass(frozen=True)
class Sets:
    """The three problem sets of a run; no question is in two of them."""

    train: Sequence[Problem]
    dev: Sequence[Problem]
    test: Sequence[Problem]

    def __post_init__(self) -> None:
        assert_disjoint(("train", self.train), ("dev", self.dev), ("test", self.test))

    def part(self, iteration: int, size: int) -> Sequence[Problem]:
        """The training problems of one iteration, counted from 1."""
        return self.train[(iteration - 1) * size : iteration * size]


def main(argv: Sequence[str] | None = None) -> int:
    return run_recipe(Config, iterate, "recipes.iterate", argv)


def iterate(config: Config) -> str:
    if config.dry_run:
        return dry_run(config, config, config.model, plan=partial(plan_text, config))
    if config.launcher is not None:
        launch_command(config.launcher)  # a wrong one is told now, and not after the sampling
    sets = load_sets(config)
    may_change = SPEED_ONLY | train_recipe.SPEED_ONLY | {"launcher"}
    folder = RunFolder.open(config.out, config, resume=config.resume, may_change=may_change)
    policies = run_loop(folder.path, config.model, sets, config, previous=config.previous)
    stages, test = run_tests(folder.path, policies, sets.test, config)
    print(stages_table(stages, test))
    if config.published is not None:
        print("\n" + published_table(stages, config.published))
    folder.finish({"stages": [s.to_json() for s in stages], "paired": dataclasses.asdict(test)})
    write_report(folder.path)
    return f"{config.iterations} iterations in {folder.path}; the last policy is {policies[-1].model}"


def plan_text(config: Config, sizes: Sizes, memory: Memory) -> str:
    """The stages of the loop as a table, and what its hours and bytes rest on."""
    work = Work(
        settings=config,
        iterations=config.iterations,
        prompts=config.prompts,
        samples=config.samples,
        previous_samples=config.previous_samples,
        num_previous=(config.iterations - (config.previous is None)) * bool(config.previous_samples),
        per_problem=config.per_problem,
        num_dev=config.dev_limit or num_problems(config.dev),
        num_test=config.test_limit or num_problems(config.test),
        test_samples=config.test_samples,
        dtype=config.dtype,
        test_dtype=config.test_dtype or config.dtype,
        num_engines=len(config.urls) or config.ray_engines,
        num_gpus=config.num_gpus,
    )
    assumed = config.assumptions
    return f"{plan_table(plan(work, sizes, memory, assumed))}\n{assumed}"


def load_sets(config: Config) -> Sets:
    """
    Raises:
        InputError: a set cannot be loaded, dev and test share a question, or the training problems, less those
            that are in dev or test or ask what another one asks, are too few for the iterations.
    """
    dev = load_problems(config.dev, config.dev_limit, strict=False)
    test = load_problems(config.test, config.test_limit, strict=False)
    needed = config.iterations * config.prompts
    limit = needed + len(dev) + len(test) if config.problems.startswith("generated:") else None
    problems = drop_shared(load_problems(config.problems, limit, strict=False), [*dev, *test])
    problems = drop_repeated(problems)  # else the parts of two iterations could share a question
    if len(problems) < needed:
        raise InputError(
            f"--problems {config.problems}: {config.iterations} iterations of {config.prompts} prompts need {needed} "
            f"problems that are not in dev or test, but there are {len(problems)}"
        )
    return Sets(problems[:needed], dev, test)


@dataclass(frozen=True)
class Policy:
    """A model of the loop."""

    name: str
    model: str
    """Name or folder."""
    training: dict[str, float] = field(default_factory=dict)
    """Means over the second half of the steps that made it."""


def run_loop(
    folder: Path,
    model: str,
    sets: Sets,
    options: LoopOptions,
    *,
    previous: str | None = None,
    name: str = "start",
) -> list[Policy]:
    """Run, or go on with, all iterations. Returns the first policy and that of every iteration."""
    policies = [Policy(name, model)]
    for iteration in range(1, options.iterations + 1):
        before = policies[-2].model if len(policies) > 1 else previous
        current = policies[-1].model
        reference = current if options.reference == "last" else model
        part = sets.part(iteration, options.prompts)
        policies.append(
            run_iteration(
                folder / f"iteration_{iteration}",
                iteration,
                current,
                before,
                reference,
                part,
                sets.dev,
                options,
            )
        )
    return policies


def run_iteration(
    folder: Path,
    iteration: int,
    current: str,
    previous: str | None,
    reference: str,
    prompts: Sequence[Problem],
    dev: Sequence[Problem],
    options: LoopOptions,
) -> Policy:
    """Sample from `current` (and `previous`), label, train against `reference`, and choose a checkpoint on `dev`."""
    selected = folder / "selected.json"
    if not selected.exists():
        sampled = sample_policies(folder, iteration, current, previous, prompts, options)
        write_rows(
            folder / "labels",
            sampled,
            KINDS[options.recipe.rows],
            per_problem=options.per_problem,
            seed=options.seed,
            max_tokens=options.max_length,
        )
        stage = training_stage(folder, current, reference, options, options.attention)
        run_stage(stage, options.launcher)
        accuracies = select_on(dev, folder, options)
        best = max(accuracies, key=lambda name: (accuracies[name], name == "model"))
        write_json(selected, {"model": str(folder / "train" / best), "checkpoint": best, "dev": accuracies})
    return Policy(
        f"iteration {iteration}",
        read_json(selected)["model"],
        _last_steps(folder / "train" / "metrics.jsonl"),
    )


def sample_policies(
    folder: Path,
    iteration: int,
    current: str,
    previous: str | None,
    prompts: Sequence[Problem],
    options: LoopOptions,
) -> Graded:
    """Trajectories of both policies on the same prompts, graded.

    Raises:
        GuardError: the engine's log-probs are not those that training would see; the gap is kept in
            `engine_gap.json`.
    """
    graded: Graded = []
    sources = [("current", current, options.samples, 0)]
    if previous is not None and options.previous_samples:
        sources.append(("previous", previous, options.previous_samples, options.samples))
    for name, model_name, samples, first_sample in sources:
        sampler = Sampler.load(model_name, options, options.dtype, options.attention)
        sample_into(
            folder / name,
            sampler,
            prompts,
            options,
            seed=options.seed,
            iteration=iteration,
            samples=samples,
            first_sample=first_sample,
            label=f"iteration {iteration}, {name} policy",
        )
        trajectories = list(read_trajectories(folder / name / "trajectories"))
        if probed := [t for t in trajectories if t.actions][:PROBED]:
            model = sampler.model or load_policy(model_name, options.dtype, options.attention)[0]
            write_json(folder / name / "engine_gap.json", engine_gap(model, probed)._asdict())
        graded += grade_trajectories(trajectories, prompts)
    return graded


def select_on(dev: Sequence[Problem], folder: Path, options: LoopOptions) -> dict[str, float]:
    """Greedy accuracy on dev of every checkpoint and of the final model (`model`), by folder name."""
    greedy = dataclasses.replace(options, temperature=0.0, samples=1)
    accuracies = {}
    for name in sorted(p.name for p in (folder / "train").iterdir() if holds_model(p)):
        result, _ = evaluate_into(
            folder / "dev" / name,
            Sampler.load(folder / "train" / name, options, options.dtype, options.attention),
            dev,
            greedy,
            seed=options.seed,
            name=name,
            label=f"dev, {name}",
        )
        accuracies[name] = result.accuracy.value
    return accuracies


def run_tests(
    folder: Path, policies: Sequence[Policy], problems: Sequence[Problem], options: LoopOptions
) -> tuple[list[Stage], PairedTest]:
    """Evaluate every policy on the test problems; compare the last with the first on greedy answers."""
    greedy = dataclasses.replace(options, temperature=0.0, samples=1)
    sampled = dataclasses.replace(options, temperature=1.0, samples=max(1, options.test_samples))
    stages, correct = [], []
    for policy in policies:
        sampler = Sampler.load(policy.model, options, options.test_dtype or options.dtype, options.attention)
        place = folder / "test" / policy.name.replace(" ", "_")
        names: dict[str, Any] = {
            "seed": options.seed,
            "label": f"test, {policy.name}",
        }
        own, graded = evaluate_into(place / "greedy", sampler, problems, greedy, **names)
        other = None
        if options.test_samples:
            other, _ = evaluate_into(place / "sampled", sampler, problems, sampled, **names)
        stages.append(Stage(policy.name, policy.model, own, other, policy.training))
        correct.append(correct_by_problem(graded))
    return stages, compare(correct[0], correct[-1])


def _last_steps(path: Path) -> dict[str, float]:
    """Mean of each figure over the second half of the steps in a metrics file."""
    steps = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    half = steps[len(steps) // 2 :]
    return {
        key: sum(step[key] for step in half) / len(half)
        for key, value in half[-1].items()
        if isinstance(value, float) and all(key in step for step in half)
    }


if __name__ == "__main__":
    raise SystemExit(main())
