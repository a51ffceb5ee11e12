"""What the trajectories of a run say about a model: scores with intervals, and where every trajectory went.

Scores count all trajectories but environment faults: one that was cut short, or that could not be graded, is not
correct. Every figure carries what it is a share of, and `eval/README.md` has all of them as they stand in
`metrics.json`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from eval.metrics import bootstrap_interval, majority_at_k, pass_at_k, wilson_interval
from eval.predictions import Graded, Prediction, by_problem, predictions_of
from mtpo.errors import InputError
from mtpo.trajectory import Problem

SCHEMA = 1
"""Version of `metrics.json` and `predictions.jsonl`."""


@dataclass(frozen=True)
class Score:
    """A figure between 0 and 1, averaged over problems, with its 95 % interval."""

    value: float
    low: float
    high: float
    interval: str
    """`wilson` where every problem has 0 or 1, else `bootstrap` over problems: samples of one problem are no
    independent evidence."""
    num_problems: int
    num_trajectories: int

    @classmethod
    def of(cls, values: Sequence[float], num_trajectories: int) -> Score:
        """The score of problems with these values, at least one."""
        if all(value in (0, 1) for value in values):
            low, high = wilson_interval(int(sum(values)), len(values))
            return cls(fmean(values), low, high, "wilson", len(values), num_trajectories)
        return cls(fmean(values), *bootstrap_interval(values), "bootstrap", len(values), num_trajectories)

    def __str__(self) -> str:
        return f"{self.value:6.1%} [{self.low:.1%}, {self.high:.1%}]"


@dataclass(frozen=True)
class Rate:
    """`count` of `of` units; the value is None if there is none."""

    value: float | None
    count: int
    of: int
    unit: str

    @classmethod
    def share(cls, flags: Sequence[bool], unit: str) -> Rate:
        return cls.count_of(sum(flags), len(flags), unit)

    @classmethod
    def count_of(cls, count: int, of: int, unit: str) -> Rate:
        return cls(count / of if of else None, count, of, unit)

    def __str__(self) -> str:
        share = "     -" if self.value is None else f"{self.value:6.1%}"
        return f"{share}  {self.count:,} of {self.of:,} {self.unit}"


@dataclass(frozen=True)
class Distribution:
    """A count or a time over trajectories."""

    mean: float
    median: float
    p95: float
    max: float
    total: float
    of: int

    @classmethod
    def of_all(cls, values: Sequence[float]) -> Distribution:
        """The distribution of at least one value."""
        median, p95 = (float(np.quantile(values, q, method="inverted_cdf")) for q in (0.5, 0.95))
        return cls(fmean(values), median, p95, max(values), sum(values), len(values))

    @classmethod
    def of_known(cls, values: Sequence[float | None]) -> Distribution | None:
        """The same of the values that are known, which are then those counted in `of`; None if none is."""
        known = [value for value in values if value is not None]
        return cls.of_all(known) if known else None

    def __str__(self) -> str:
        return f"mean {self.mean:.2f}, median {self.median:g}, 95 % within {self.p95:g}, most {self.max:g}"


@dataclass(frozen=True)
class Evaluation:
    """One policy on one problem set."""

    policies: dict[str, int]
    """Trajectories by the name of the policy that made them."""
    num_problems: int
    num_scored: int
    """Problems with at least one trajectory that is no fault: the denominator of `accuracy`."""
    num_trajectories: int
    num_faults: int
    """Environment faults: in no other denominator."""
    faults: dict[str, int]
    samples: dict[str, int]
    """The fewest (`min`) and most (`max`) trajectories of a scored problem."""
    accuracy: Score
    by_policy: dict[str, Score]
    """Empty with one policy. With several, their trajectories are the samples of the other figures together."""
    by_set: dict[str, Score]
    """By what is before the number in a problem's id: `gsm8k:test`."""
    by_level: dict[str, Score]
    by_subject: dict[str, Score]
    pass_at: dict[int, Score]
    """Unbiased pass@k for k = 1, 2, 4, ... and the most samples, over problems with k samples; empty with one."""
    majority_at: dict[int, Score]
    """Chance that the vote of k samples is correct (`majority_at_k`), for the same k and problems."""
    outcomes: dict[str, int]
    """Every trajectory but faults under exactly one outcome."""
    truncated: Rate
    ungraded: Rate
    no_answer: Rate
    """These three may overlap, `outcomes` do not."""
    tool_use: Rate
    tool_errors: Rate
    recovery: Rate
    turns: Distribution
    tool_calls: Distribution
    action_tokens: Distribution | None
    turns_histogram: dict[int, dict[str, int]]
    seconds: dict[str, Distribution | None]
    """Per trajectory, waiting for the engine (`generate`) and for the interpreter (`execute`)."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def table(self) -> str:
        """The figures as lines of text, each with its denominator."""
        return "\n".join([*self._scores(), *self._counts()])

    def _scores(self) -> list[str]:
        fewest, most = self.samples["min"], self.samples["max"]
        average = f"avg@{most}" if fewest == most else f"avg@{fewest} to {most}"
        rows = [("accuracy" if most == 1 else f"pass@1 ({average})", self.accuracy)]
        rows += [(f"  policy {name}", score) for name, score in self.by_policy.items()]
        if len(self.by_set) > 1:
            rows += [(f"  set {name}", score) for name, score in self.by_set.items()]
        rows += [(f"  level {name}", score) for name, score in self.by_level.items()]
        rows += [(f"  subject {name}", score) for name, score in self.by_subject.items()]
        rows += [(f"pass@{k}", score) for k, score in self.pass_at.items() if k > 1]
        rows += [(f"maj@{k}", score) for k, score in self.majority_at.items() if k > 1]
        return [
            f"{name:32} {score!s:24} {score.interval}, {score.num_problems:,} problems, "
            f"{score.num_trajectories:,} trajectories"
            for name, score in rows
        ]

    def _counts(self) -> list[str]:
        counted = self.num_trajectories - self.num_faults
        outcomes = ", ".join(f"{n:,} {name}" for name, n in self.outcomes.items())
        rows: list[tuple[str, object]] = [
            (
                "without a trajectory",
                f"{self.num_problems - self.num_scored:,} of {self.num_problems:,} problems, in no score",
            ),
            (
                "environment faults",
                f"{self.num_faults:,} of {self.num_trajectories:,} trajectories, in no score",
            ),
            (f"outcomes of {counted:,}", outcomes),
            ("truncated", self.truncated),
            ("ungraded", self.ungraded),
            ("no answer", self.no_answer),
            ("used the tool", self.tool_use),
            ("tool errors", self.tool_errors),
            ("correct after a tool error", self.recovery),
            ("turns", self.turns),
            ("tokens", self.action_tokens or "unknown"),
            ("seconds generating", self.seconds["generate"] or "unknown"),
            ("seconds executing", self.seconds["execute"] or "unknown"),
        ]
        return [f"{name:32} {value}" for name, value in rows]


def evaluate(graded: Graded, problems: Sequence[Problem]) -> Evaluation:
    """Summarise graded trajectories of these problems.

    Raises:
        InputError: there is no trajectory but faults, or one is of a problem that is not in the set.
    """
    return summarize(predictions_of(graded, problems), problems)


def summarize(predictions: Sequence[Prediction], problems: Sequence[Problem]) -> Evaluation:
    """The same from predictions, each of which is of a problem of the set."""
    known = {problem.id: problem for problem in problems}
    own = by_problem(predictions)
    counted = [p for predictions in own.values() for p in predictions]
    if not counted:
        raise InputError(
            f"nothing to evaluate: {len(predictions)} trajectories, all of them environment faults"
        )
    sizes = [len(predictions) for predictions in own.values()]
    ks = _ks(max(sizes)) if max(sizes) > 1 else []
    unit = "trajectories"
    return Evaluation(
        policies=dict(Counter(p.policy for p in predictions).most_common()),
        num_problems=len(problems),
        num_scored=len(own),
        num_trajectories=len(predictions),
        num_faults=len(predictions) - len(counted),
        faults=dict(Counter(p.fault for p in predictions if p.fault is not None).most_common()),
        samples={"min": min(sizes), "max": max(sizes)},
        accuracy=_accuracy(own),
        by_policy=_by_policy(counted),
        by_set=_by_set(own),
        by_level=_grouped(own, {i: known[i].level for i in own}),
        by_subject=_grouped(own, {i: known[i].subject for i in own}),
        pass_at={k: _score_at(k, own, _pass_at) for k in ks},
        majority_at={k: _score_at(k, own, _majority_at) for k in ks},
        outcomes=dict(Counter(p.outcome for p in counted).most_common()),
        truncated=Rate.share([p.is_truncated for p in counted], unit),
        ungraded=Rate.share([p.verdict == "ungraded" for p in counted], unit),
        no_answer=Rate.share([p.answer is None for p in counted], unit),
        tool_use=Rate.share([p.tool_calls > 0 for p in counted], unit),
        tool_errors=Rate.count_of(
            sum(p.tool_errors for p in counted), sum(p.tool_calls for p in counted), "code blocks"
        ),
        recovery=Rate.share(
            [p.is_correct for p in counted if p.tool_errors], "trajectories with a tool error"
        ),
        turns=Distribution.of_all([p.turns for p in counted]),
        tool_calls=Distribution.of_all([p.tool_calls for p in counted]),
        action_tokens=Distribution.of_known([p.action_tokens for p in counted]),
        turns_histogram=_histogram(counted),
        seconds={
            "generate": Distribution.of_known([p.generate_s for p in counted]),
            "execute": Distribution.of_known([p.execute_s for p in counted]),
        },
    )


def metrics(
    evaluation: Evaluation,
    *,
    grader: Mapping[str, Any],
    contamination: Mapping[str, Any],
    comparisons: Sequence[Mapping[str, Any]] = (),
    sources: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `metrics.json` holds: the evaluation, how it was graded, and what was found beside it."""
    return {
        "schema": SCHEMA,
        "grader": dict(grader),
        **evaluation.to_json(),
        "contamination": dict(contamination),
        "comparisons": list(comparisons),
        "sources": sources,
    }


def _accuracy(own: Mapping[str, Sequence[Prediction]]) -> Score:
    values = [fmean(p.is_correct for p in predictions) for predictions in own.values()]
    return Score.of(values, sum(map(len, own.values())))


def _by_policy(counted: Sequence[Prediction]) -> dict[str, Score]:
    groups: defaultdict[str, list[Prediction]] = defaultdict(list)
    for prediction in counted:
        groups[prediction.policy].append(prediction)
    return {name: _accuracy(by_problem(groups[name])) for name in sorted(groups)} if len(groups) > 1 else {}


def _by_set(own: Mapping[str, Sequence[Prediction]]) -> dict[str, Score]:
    places = {problem_id: problem_id.rpartition("/") for problem_id in own}
    sets = {i: name if slash and number.isdecimal() else None for i, (name, slash, number) in places.items()}
    return _grouped(own, sets)


def _grouped(own: Mapping[str, Sequence[Prediction]], group_of: Mapping[str, str | None]) -> dict[str, Score]:
    groups: defaultdict[str, dict[str, Sequence[Prediction]]] = defaultdict(dict)
    for problem_id, predictions in own.items():
        if (group := group_of[problem_id]) is not None:
            groups[group][problem_id] = predictions
    return {name: _accuracy(groups[name]) for name in sorted(groups)}


def _ks(most: int) -> list[int]:
    """1, 2, 4, ... below the most samples, and these."""
    return [*(1 << i for i in range((most - 1).bit_length())), most]


def _score_at(
    k: int,
    own: Mapping[str, Sequence[Prediction]],
    value: Callable[[Sequence[Prediction], int], float],
) -> Score:
    """A figure about k samples, over the problems that have so many."""
    enough = [predictions for predictions in own.values() if len(predictions) >= k]
    return Score.of([value(predictions, k) for predictions in enough], sum(map(len, enough)))


def _pass_at(predictions: Sequence[Prediction], k: int) -> float:
    return pass_at_k(len(predictions), sum(p.is_correct for p in predictions), k)


def _majority_at(predictions: Sequence[Prediction], k: int) -> float:
    wrong = Counter(p.vote for p in predictions if p.vote is not None and not p.is_correct)
    correct = sum(p.is_correct for p in predictions)
    return majority_at_k(len(predictions), correct, sorted(wrong.values()), k)


def _histogram(counted: Sequence[Prediction]) -> dict[int, dict[str, int]]:
    """Turns taken -> how many trajectories took so many, and how many of these are correct."""
    found: defaultdict[int, dict[str, int]] = defaultdict(lambda: {"trajectories": 0, "correct": 0})
    for prediction in counted:
        found[prediction.turns]["trajectories"] += 1
        found[prediction.turns]["correct"] += prediction.is_correct
    return dict(sorted(found.items()))


def correct_by_problem(graded: Graded) -> dict[str, bool]:
    """Problem id -> whether its one trajectory is correct, for a paired test; faults are left out.

    Raises:
        InputError: a problem has several trajectories.
    """
    found: dict[str, bool] = {}
    for trajectory, verdict in graded:
        if trajectory.fault is not None:
            continue
        if trajectory.problem_id in found:
            raise InputError(
                f"problem {trajectory.problem_id!r} has several trajectories; a paired test takes one each"
            )
        found[trajectory.problem_id] = verdict.verdict == "correct"
    return found
