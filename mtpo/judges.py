"""Which of two trajectories is better: the preference P(first > second) of a judge, in [0, 1].

All judges are symmetrised: prefer(a, b) + prefer(b, a) is exactly 1. A judge that cannot tell gives None, which
callers drop; it counts why in `counts`, and never guesses.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Protocol

from mtpo.errors import InputError
from mtpo.grader import Grader, Verdict, shared_grader
from mtpo.trajectory import Problem, StopReason, Trajectory


class Judge(Protocol):
    """Compares two attempts at one problem."""

    @property
    def counts(self) -> Counter[str]:
        """How many pairs there were of each kind: `judged`, and why there was no label."""
        ...

    async def prefer(self, first: Trajectory, second: Trajectory, problem: Problem) -> float | None:
        """P(first > second); None if there is no label, because of a fault or because the judge could not tell.

        Raises:
            JudgeUnavailable: the judge cannot be asked at present; what it has judged is not lost.
        """
        ...


PairFunction = Callable[[Trajectory, Trajectory, Problem], Awaitable[float | None] | float | None]


class CallableJudge:
    """A `Judge` made of any function of (first, second, problem), plain or async.

    The function is asked in both orders: the preference is (f(a, b) + 1 - f(b, a)) / 2, and None if it says None in
    either order. Pairs with an environment fault are not shown to it.
    """

    def __init__(self, function: PairFunction) -> None:
        self.counts: Counter[str] = Counter()
        self._function = function

    async def prefer(self, first: Trajectory, second: Trajectory, problem: Problem) -> float | None:
        """As `Judge.prefer`.

        Raises:
            InputError: the function returned a value that is not in [0, 1].
        """
        if _has_fault(first, second):
            return self._counted(None, "environment fault")
        if _is_later(first, second):  # one order for both calls, so that their sum is exactly 1
            swapped = await self._ask_both(second, first, problem)
            return self._counted(None if swapped is None else 1 - swapped, "undecided")
        return self._counted(await self._ask_both(first, second, problem), "undecided")

    async def _ask_both(self, first: Trajectory, second: Trajectory, problem: Problem) -> float | None:
        forward = await self._ask(first, second, problem)
        backward = await self._ask(second, first, problem)
        return None if forward is None or backward is None else (forward + 1 - backward) / 2

    async def _ask(self, first: Trajectory, second: Trajectory, problem: Problem) -> float | None:
        found = self._function(first, second, problem)
        value = await found if inspect.isawaitable(found) else found
        if value is not None and not 0 <= value <= 1:
            raise InputError(f"the judge's preference on {problem.id} is {value!r}, expected one in [0, 1]")
        return value

    def _counted(self, value: float | None, reason: str) -> float | None:
        self.counts["judged" if value is not None else reason] += 1
        return value


class VerifierJudge:
    """A `Judge` by the grader: a correct trajectory beats a wrong one, equal ones tie with 1/2.

    A truncated trajectory, or one that ends without an answer, counts as wrong whatever its text says. An
    environment fault and an answer that cannot be graded give no label.

    Args:
        grader: `shared_grader()` by default.
    """

    def __init__(self, grader: Grader | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self._grader = grader or shared_grader()

    async def prefer(self, first: Trajectory, second: Trajectory, problem: Problem) -> float | None:
        return await self._by_grades(first, second, problem)

    async def _by_grades(
        self,
        first: Trajectory,
        second: Trajectory,
        problem: Problem,
        among_equals: Callable[[Trajectory, Trajectory], float] = lambda first, second: 0.5,
    ) -> float | None:
        if _has_fault(first, second):
            self.counts["environment fault"] += 1
            return None
        verdicts = await asyncio.to_thread(self._verdicts, (first, second), problem)
        if "ungraded" in verdicts:
            self.counts["ungraded"] += 1
            return None
        self.counts["judged"] += 1
        one, other = (float(verdict == "correct") for verdict in verdicts)
        return one if one != other else among_equals(first, second)

    def _verdicts(self, trajectories: tuple[Trajectory, Trajectory], problem: Problem) -> list[Verdict]:
        golds = self._grader.options.golds(problem)
        answered = [t for t in trajectories if t.stop_reason == StopReason.ANSWERED]
        grades = self._grader.grade_many((t.actions[-1].text, golds) for t in answered)
        found: dict[int, Verdict] = {id(t): grade.verdict for t, grade in zip(answered, grades, strict=True)}
        return [found.get(id(t), "wrong") for t in trajectories]


class EfficiencyJudge(VerifierJudge):
    """A `Judge` by the grader and, among equally right trajectories, by a vote of three criteria.

    Fewer turns, fewer sampled tokens and fewer failed executions have a vote each: 1, 0, or 1/2 where both are
    equal; the preference is their mean. Like every majority over several criteria it can go in circles: of three
    trajectories with (turns, tokens, failures) = (1, 300, 1), (2, 100, 2), (3, 200, 0) each beats the next with 2/3,
    and the last one the first.
    """

    async def prefer(self, first: Trajectory, second: Trajectory, problem: Problem) -> float | None:
        return await self._by_grades(first, second, problem, _vote)


def _vote(first: Trajectory, second: Trajectory) -> float:
    if _is_later(first, second):
        return 1 - _vote(second, first)
    pairs = zip(_costs(first), _costs(second), strict=True)
    return sum(0.5 if ours == theirs else float(ours < theirs) for ours, theirs in pairs) / 3


def _costs(trajectory: Trajectory) -> tuple[int, int, int]:
    failures = sum(execution.is_error for execution in trajectory.executions)
    return trajectory.num_turns, trajectory.num_action_tokens, failures


def _has_fault(*trajectories: Trajectory) -> bool:
    return any(t.stop_reason == StopReason.ENVIRONMENT_FAULT for t in trajectories)


def _is_later(first: Trajectory, second: Trajectory) -> bool:
    """Of any two different trajectories one is later."""
    return first.action_ids > second.action_ids
