"""Runs on the same problems against each other: a test, an interval, and the problems that changed.

Every comparison is paired by problem. With one trajectory a problem on both sides the test is the exact McNemar test,
else the exact permutation test on each problem's share of correct trajectories.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from data.problems import read_problems
from eval.evaluate import Score
from eval.metrics import bootstrap_interval, holm, paired_test, permutation_test
from eval.predictions import Prediction, by_problem, read_predictions
from mtpo.errors import InputError
from mtpo.runs import read_json
from mtpo.trajectory import Problem

SHOWN_CHARS = 100


@dataclass(frozen=True)
class Run:
    """An evaluation's folder, as far as a comparison needs it."""

    name: str
    problems: Mapping[str, Problem]
    predictions: Mapping[str, Sequence[Prediction]]
    """By problem, without faults."""
    grader: Mapping[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> Run:
        """
        Raises:
            InputError: the folder holds no finished evaluation.
        """
        path = Path(folder)
        if not (path / "metrics.json").exists():
            raise InputError(f"{path}: no metrics.json; is it the --out of a finished recipes.evaluate?")
        return cls(
            str(folder),
            {problem.id: problem for problem in read_problems(path / "problems.jsonl")},
            by_problem(read_predictions(path / "predictions.jsonl")),
            read_json(path / "metrics.json").get("grader", {}),
        )


@dataclass(frozen=True)
class Change:
    """A problem on which two runs differ: the share of its trajectories that are correct, in each."""

    problem_id: str
    before: float
    after: float


@dataclass(frozen=True)
class Difference:
    """Score after less score before, with a 95 % bootstrap interval over problems."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Two runs on the same problems."""

    before: str
    after: str
    num_problems: int
    """The denominator of both scores: problems that have a trajectory that is no fault in both runs."""
    left_out: int
    """Problems of either run that are not among those: of one run only, or with nothing but faults in one."""
    is_common_only: bool
    """The runs are over different sets, and only what they share is compared."""
    before_score: Score
    after_score: Score
    difference: Difference
    test: Literal["mcnemar", "permutation"]
    improved: int
    worsened: int
    z: float
    """Sum of the differences over the root of the sum of their squares: McNemar's z for single answers."""
    p: float
    p_holm: float
    """Corrected for the number of tests (Holm)."""
    num_tests: int
    changed: list[Change]
    """What got most worse first."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        d = self.difference
        holm_note = f", {self.p_holm:.2g} for {self.num_tests} tests (Holm)" if self.num_tests > 1 else ""
        return (
            f"{self.after} against {self.before}, {self.num_problems:,} problems ({self.left_out:,} left out): "
            f"{self.before_score.value:.1%} -> {self.after_score.value:.1%}, "
            f"{d.value:+.1%} [{d.low:+.1%}, {d.high:+.1%}], {self.improved} improved, "
            f"{self.worsened} worsened, z = {self.z:.2f}, {self.test} p = {self.p:.2g}{holm_note}"
        )


def compare_runs(pairs: Sequence[tuple[Run, Run]], *, common: bool = False) -> list[Comparison]:
    """Each pair of runs, earlier one first; the pairs are the tests that `p_holm` is corrected for.

    Args:
        common: compare runs over different problem sets on the problems that they share.

    Raises:
        InputError: two runs are over different problems and `common` is not set, share none, or were graded with
            other options.
    """
    found = [_compare(before, after, common) for before, after in pairs]
    corrected = holm([comparison.p for comparison in found])
    return [
        dataclasses.replace(comparison, p_holm=p, num_tests=len(found))
        for comparison, p in zip(found, corrected, strict=True)
    ]


def comparison_page(comparisons: Sequence[Comparison], problems: Mapping[str, Problem]) -> str:
    """The comparisons as Markdown, with every problem that changed."""
    lines = ["# Comparison", ""]
    lines += [f"- {comparison}" for comparison in comparisons]
    for comparison in comparisons:
        worse = [change for change in comparison.changed if change.after < change.before]
        better = [change for change in reversed(comparison.changed) if change.after > change.before]
        for title, changes in (("Worsened", worse), ("Improved", better)):
            lines += ["", f"## {title}: {comparison.after} against {comparison.before} ({len(changes)})", ""]
            lines += [
                f"- `{c.problem_id}` {c.before:.2f} -> {c.after:.2f}: {_start(problems[c.problem_id].question)}"
                for c in changes
            ]
    return "\n".join(lines) + "\n"


def shared_problems(before: Run, after: Run, *, common: bool = False) -> list[str]:
    """The ids of the problems that two runs can be compared on.

    Raises:
        InputError: as `compare_runs`.
    """
    if before.grader != after.grader:
        options = f"{dict(before.grader)} and {dict(after.grader)}"
        raise InputError(f"{before.name} and {after.name} were graded with different options: {options}")
    theirs = {i: (problem.question, problem.answer) for i, problem in after.problems.items()}
    shared = [i for i, p in before.problems.items() if theirs.get(i) == (p.question, p.answer)]
    if not common and not len(shared) == len(before.problems) == len(after.problems):
        raise InputError(
            f"{before.name} and {after.name} are over different problems ({len(before.problems)} and "
            f"{len(after.problems)}, {len(shared)} of them the same); recipes.compare --common takes those"
        )
    return shared


def _compare(before: Run, after: Run, common: bool) -> Comparison:
    shared = shared_problems(before, after, common=common)
    both = [i for i in shared if i in before.predictions and i in after.predictions]
    if not both:
        raise InputError(f"{before.name} and {after.name} have no graded problem in common")
    old, new = ({i: run.predictions[i] for i in both} for run in (before, after))
    old_means, new_means = ({i: fmean(p.is_correct for p in run[i]) for i in both} for run in (old, new))
    is_single = all(len(run[i]) == 1 for run in (old, new) for i in both)
    p = paired_test(old_means, new_means).p if is_single else permutation_test(old_means, new_means)
    changed = [Change(i, old_means[i], new_means[i]) for i in both if old_means[i] != new_means[i]]
    differences = [new_means[i] - old_means[i] for i in both]
    return Comparison(
        before=before.name,
        after=after.name,
        num_problems=len(both),
        left_out=len(before.problems.keys() | after.problems.keys()) - len(both),
        is_common_only=not len(shared) == len(before.problems) == len(after.problems),
        before_score=Score.of(list(old_means.values()), sum(map(len, old.values()))),
        after_score=Score.of(list(new_means.values()), sum(map(len, new.values()))),
        difference=Difference(fmean(differences), *bootstrap_interval(differences)),
        test="mcnemar" if is_single else "permutation",
        improved=sum(change.after > change.before for change in changed),
        worsened=sum(change.after < change.before for change in changed),
        z=sum(differences) / (math.hypot(*differences) or 1),
        p=p,
        p_holm=p,
        num_tests=1,
        changed=sorted(changed, key=lambda change: change.after - change.before),
    )


def _start(question: str) -> str:
    text = " ".join(question.split())
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 1] + "…"
