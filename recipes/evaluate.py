"""Measure a model on a problem set: greedy by default, or with several samples a problem.

    python -m recipes.evaluate --model runs/dpo/model --problems gsm8k:test --out runs/eval --compare runs/eval-sft

OUT/metrics.json holds every figure, OUT/predictions.jsonl the answer and verdict of every trajectory. --compare
adds a paired test against earlier evaluations of the same problems.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.problems import load_problems, read_problems
from data.trajectories import read_trajectories
from eval.evaluate import Evaluation, correct_by_problem, evaluate, outcome
from eval.metrics import PairedTest, paired_test
from mtpo.cli import run_recipe
from mtpo.errors import InputError
from mtpo.runs import RunFolder, write_json, write_jsonl
from mtpo.trajectory import Problem
from recipes.engines import Sampler
from recipes.generate import SPEED_ONLY, SamplingOptions, sample_into
from recipes.label import Graded, grade_trajectories


@dataclass(frozen=True, kw_only=True)
class Config(SamplingOptions):
    """Measure a model on a problem set."""

    model: str = field(metadata={"help": "model name or folder"})
    problems: str = field(
        metadata={"help": "gsm8k:test, math:test, math500, generated:test, FILE.jsonl, HUB:SPLIT"}
    )
    out: str = field(metadata={"help": "run folder"})
    limit: int | None = field(default=None, metadata={"help": "first problems only"})
    samples: int = field(default=1, metadata={"help": "trajectories per problem"})
    temperature: float = field(default=0.0, metadata={"help": "0 takes the most likely token"})
    compare: list[str] = field(default_factory=list, metadata={"help": "evaluations to compare with"})
    dtype: str = field(default="float32", metadata={"help": "float32, or bfloat16 to halve the memory"})
    attention: str | None = field(default=None, metadata={"help": "attention; by default an exact one"})
    seed: int = field(default=0, metadata={"help": "fixes every draw"})
    resume: bool = field(default=False, metadata={"help": "go on with an interrupted run"})


def main(argv: Sequence[str] | None = None) -> int:
    return run_recipe(Config, evaluate_model, "recipes.evaluate", argv)


def evaluate_model(config: Config) -> str:
    before = {other: read_correct(Path(other)) for other in config.compare}
    problems = load_problems(config.problems, config.limit, strict=False)
    sampler = Sampler.load(config.model, config, config.dtype, config.attention)
    folder = RunFolder.open(config.out, config, resume=config.resume, may_change=SPEED_ONLY | {"compare"})
    result, graded = evaluate_into(
        folder.path, sampler, problems, config, seed=config.seed, label="evaluating"
    )
    tests = {other: compare(correct, correct_by_problem(graded)) for other, correct in before.items()}
    print(result.table())
    for other, test in tests.items():
        print(
            f"against {other}: {test.improved} improved, {test.worsened} worsened, z = {test.z:.2f}, p = {test.p:.2g}"
        )
    folder.finish(
        {"accuracy": result.accuracy.value, "paired": {k: dataclasses.asdict(t) for k, t in tests.items()}}
    )
    return f"accuracy {result.accuracy} on {len(problems)} problems; all figures in {folder.path / 'metrics.json'}"


def evaluate_into(
    folder: Path,
    sampler: Sampler,
    problems: Sequence[Problem],
    options: SamplingOptions,
    **names: Any,
) -> tuple[Evaluation, Graded]:
    """Sample what is missing, grade, and write `metrics.json` and `predictions.jsonl` into the folder.

    Returns:
        The figures, and what they were computed from.
    """
    sample_into(folder, sampler, problems, options, **names)
    graded = grade_trajectories(read_trajectories(folder / "trajectories"), problems)
    result = evaluate(graded, problems)
    write_jsonl(folder / "predictions.jsonl", _predictions(graded, problems))
    write_json(folder / "metrics.json", result.to_json())
    return result, graded


def read_correct(folder: Path) -> dict[str, bool]:
    """Problem id -> correct, of an evaluation with one trajectory a problem.

    Raises:
        InputError: the folder holds no such evaluation.
    """
    problems = read_problems(folder / "problems.jsonl")
    return correct_by_problem(grade_trajectories(read_trajectories(folder / "trajectories"), problems))


def compare(before: dict[str, bool], after: dict[str, bool]) -> PairedTest:
    """A paired test on the problems that both have; an environment fault in either leaves a problem out.

    Raises:
        InputError: they have no problem in common.
    """
    shared = sorted(before.keys() & after.keys())
    if not shared:
        raise InputError("the evaluations have no problem in common")
    return paired_test([before[i] for i in shared], [after[i] for i in shared])


def _predictions(graded: Graded, problems: Sequence[Problem]) -> list[dict[str, Any]]:
    golds = {problem.id: problem.answer for problem in problems}
    return [
        {
            "problem_id": trajectory.problem_id,
            "sample": trajectory.sample,
            "gold": golds[trajectory.problem_id],
            "answer": verdict.answer,
            "outcome": outcome(trajectory, verdict),
            "rule": verdict.rule,
            "turns": trajectory.num_turns,
            "tool_calls": len(trajectory.executions),
            "action_tokens": trajectory.num_action_tokens,
        }
        for trajectory, verdict in graded
    ]


if __name__ == "__main__":
    raise SystemExit(main())
