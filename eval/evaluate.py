"""What graded trajectories say about a model: accuracy with intervals, and where every trajectory went.

Accuracy counts all trajectories but environment faults: one that was cut short, or that could not be graded,
is not correct. The counts of each are part of the result, so no denominator is hidden.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from eval.metrics import bootstrap_interval, majority_vote, pass_at_k, wilson_interval
from mtpo.errors import InputError
from mtpo.grader import Grade, grade
from mtpo.trajectory import Problem, StopReason, Trajectory

Graded = Sequence[tuple[Trajectory, Grade]]


@dataclass(frozen=True)
class Accuracy:
    """A share of correct trajectories, averaged over problems."""

    value: float
    low: float
    high: float
    """95 % interval: Wilson's with one trajectory a problem, else a bootstrap over problems."""
    num_problems: int

    def __str__(self) -> str:
        return f"{self.value:6.1%} [{self.low:.1%}, {self.high:.1%}]"


@dataclass(frozen=True)
class Evaluation:
    """One model on one problem set."""

    accuracy: Accuracy
    by_subject: dict[str, Accuracy]
    by_level: dict[str, Accuracy]
    samples: int
    """The most trajectories that any problem has."""
    pass_at: dict[int, float]
    """Unbiased pass@k for k = 1, 2, 4, ... up to the samples that every problem has; empty with one."""
    majority: float | None
    """Accuracy of the most common answer, answers that are equal counting as one; None with one sample."""
    outcomes: dict[str, int]
    """Trajectories by verdict; of those that are not correct, also by stop reason or grading rule."""
    num_faults: int
    """Environment faults: in no denominator here."""
    tool_use_rate: float
    """Share of trajectories that ran code."""
    tool_error_rate: float
    """Share of code blocks that ended in an error, a timeout or a dead interpreter."""
    recovery_rate: float | None
    """Of the trajectories with such a code block, the share that is correct; None without any."""
    mean_turns: float
    mean_action_tokens: float

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def table(self) -> str:
        """The figures as lines of text."""
        lines = [f"accuracy           {self.accuracy}  of {self.accuracy.num_problems} problems"]
        groups = [("subject", self.by_subject), ("level", self.by_level)]
        for title, group in groups:
            lines += [f"  {title} {name:24} {a}  of {a.num_problems}" for name, a in group.items()]
        lines += [f"pass@{k:<13} {value:6.1%}" for k, value in self.pass_at.items()]
        if self.majority is not None:
            lines.append(f"maj@{self.samples:<14} {self.majority:6.1%}")
        lines.append("outcomes           " + ", ".join(f"{n} {name}" for name, n in self.outcomes.items()))
        lines.append(f"environment faults {self.num_faults} (in no denominator)")
        lines.append(f"used the tool      {self.tool_use_rate:6.1%} of trajectories")
        lines.append(f"tool errors        {self.tool_error_rate:6.1%} of code blocks")
        lines.append(
            f"turns, tokens      {self.mean_turns:.2f}, {self.mean_action_tokens:.1f} per trajectory"
        )
        return "\n".join(lines)


def evaluate(graded: Graded, problems: Sequence[Problem]) -> Evaluation:
    """Summarise graded trajectories of these problems.

    Raises:
        InputError: there is no trajectory but faults, or one is of a problem that is not in the set.
    """
    known = {problem.id: problem for problem in problems}
    for trajectory, _ in graded:
        if trajectory.problem_id not in known:
            raise InputError(
                f"a trajectory is of problem {trajectory.problem_id!r}, which is not in the problem set"
            )
    counted = [(t, g) for t, g in graded if t.stop_reason != StopReason.ENVIRONMENT_FAULT]
    if not counted:
        raise InputError(f"nothing to evaluate: {len(graded)} trajectories, all of them environment faults")
    correct, answers = _per_problem(counted)
    samples = max(len(c) for c in correct.values())
    fewest = min(len(c) for c in correct.values())
    executions = [e for t, _ in counted for e in t.executions]
    recovered = [g.verdict == "correct" for t, g in counted if any(e.is_error for e in t.executions)]
    return Evaluation(
        accuracy=_accuracy(list(correct.values())),
        by_subject=_grouped(correct, {i: known[i].subject for i in correct}),
        by_level=_grouped(correct, {i: known[i].level for i in correct}),
        samples=samples,
        pass_at={k: _pass_at(correct, k) for k in _powers_of_two(fewest)} if samples > 1 else {},
        majority=_majority(answers, known) / len(correct) if samples > 1 else None,
        outcomes=dict(Counter(outcome(t, g) for t, g in counted).most_common()),
        num_faults=len(graded) - len(counted),
        tool_use_rate=fmean(bool(t.executions) for t, _ in counted),
        tool_error_rate=fmean(e.is_error for e in executions) if executions else 0.0,
        recovery_rate=fmean(recovered) if recovered else None,
        mean_turns=fmean(t.num_turns for t, _ in counted),
        mean_action_tokens=fmean(t.num_action_tokens for t, _ in counted),
    )


def outcome(trajectory: Trajectory, verdict: Grade) -> str:
    """`correct`, or in a few words why not."""
    if verdict.verdict == "correct" or trajectory.stop_reason == StopReason.ENVIRONMENT_FAULT:
        return verdict.verdict if trajectory.fault is None else "environment fault"
    if trajectory.stop_reason.is_truncated:
        return f"truncated ({trajectory.stop_reason.value})"
    if verdict.verdict == "ungraded":
        return f"ungraded ({verdict.rule})"
    return "no answer" if verdict.answer is None else "wrong answer"


def correct_by_problem(graded: Graded) -> dict[str, bool]:
    """Problem id -> whether its one trajectory is correct, for a paired test; faults are left out.

    Raises:
        InputError: a problem has several trajectories.
    """
    found: dict[str, bool] = {}
    for trajectory, verdict in graded:
        if trajectory.stop_reason == StopReason.ENVIRONMENT_FAULT:
            continue
        if trajectory.problem_id in found:
            raise InputError(
                f"problem {trajectory.problem_id!r} has several trajectories; a paired test takes one each"
            )
        found[trajectory.problem_id] = verdict.verdict == "correct"
    return found


def _per_problem(counted: Graded) -> tuple[dict[str, list[bool]], dict[str, list[str]]]:
    correct: defaultdict[str, list[bool]] = defaultdict(list)
    answers: defaultdict[str, list[str]] = defaultdict(list)
    for trajectory, verdict in sorted(counted, key=lambda pair: (pair[0].problem_id, pair[0].sample)):
        correct[trajectory.problem_id].append(verdict.verdict == "correct")
        if verdict.answer is not None:
            answers[trajectory.problem_id].append(verdict.answer)
    return dict(correct), dict(answers)


def _accuracy(correct: Sequence[Sequence[bool]]) -> Accuracy:
    means = [fmean(c) for c in correct]
    if all(len(c) == 1 for c in correct):
        low, high = wilson_interval(sum(c[0] for c in correct), len(correct))
    else:
        low, high = bootstrap_interval(means)
    return Accuracy(fmean(means), low, high, len(means))


def _grouped(correct: Mapping[str, list[bool]], group_of: Mapping[str, str | None]) -> dict[str, Accuracy]:
    groups: defaultdict[str, list[list[bool]]] = defaultdict(list)
    for problem_id, own in correct.items():
        if (group := group_of[problem_id]) is not None:
            groups[group].append(own)
    return {name: _accuracy(groups[name]) for name in sorted(groups)}


def _powers_of_two(limit: int) -> list[int]:
    return [1 << i for i in range(limit.bit_length())]


def _pass_at(correct: Mapping[str, list[bool]], k: int) -> float:
    return fmean(pass_at_k(len(c), sum(c), k) for c in correct.values())


def _majority(answers: Mapping[str, list[str]], known: Mapping[str, Problem]) -> int:
    """How many problems have the right answer as their most common one."""
    votes = {problem_id: majority_vote(own, _is_equal) for problem_id, own in answers.items()}
    return sum(vote is not None and _is_equal(vote, known[i].answer) for i, vote in votes.items())


def _is_equal(answer: str, gold: str) -> bool:
    return grade(f"\\boxed{{{answer}}}", gold).verdict == "correct"
