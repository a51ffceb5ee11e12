"""Judges that grade: what is right beats what is wrong."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from mtpo.grader import Grader, Verdict, shared_grader
from mtpo.judges.interface import has_fault, is_later
from mtpo.trajectory import Problem, StopReason, Trajectory


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

    async def reward(self, trajectory: Trajectory, problem: Problem) -> float | None:
        """1 if correct, 0 if wrong; None as in `prefer`."""
        verdicts = await self._verdicts_if_any((trajectory,), problem)
        return None if verdicts is None else float(verdicts[0] == "correct")

    async def _by_grades(
        self,
        first: Trajectory,
        second: Trajectory,
        problem: Problem,
        among_equals: Callable[[Trajectory, Trajectory], float] = lambda first, second: 0.5,
    ) -> float | None:
        verdicts = await self._verdicts_if_any((first, second), problem)
        if verdicts is None:
            return None
        one, other = (float(verdict == "correct") for verdict in verdicts)
        return one if one != other else among_equals(first, second)

    async def _verdicts_if_any(
        self, trajectories: tuple[Trajectory, ...], problem: Problem
    ) -> list[Verdict] | None:
        """None, counted, where one of them has no verdict."""
        reason = "environment fault" if has_fault(*trajectories) else None
        verdicts: list[Verdict] = []
        if reason is None:
            verdicts = await asyncio.to_thread(self._verdicts, trajectories, problem)
            reason = "ungraded" if "ungraded" in verdicts else None
        self.counts[reason or "judged"] += 1
        return None if reason else verdicts

    def _verdicts(self, trajectories: tuple[Trajectory, ...], problem: Problem) -> list[Verdict]:
        golds = self._grader.options.golds(problem)
        answered = [t for t in trajectories if t.stop_reason == StopReason.ANSWERED]
        grades = self._grader.grade_many((t.actions[-1].text, golds) for t in answered)
        found: dict[int, Verdict] = {id(t): grade.verdict for t, grade in zip(answered, grades, strict=True)}
        return [found.get(id(t), "wrong") for t in trajectories]


class EfficiencyJudge(VerifierJudge):
    """A `Judge` by the grader and, among equally right trajectories, by a vote of three criteria.

    Fewer turns, fewer sampled tokens and fewer failed executions have a vote each: 1, 0, or 1/2 where both are
    equal; the preference is their mean. Like every majority over several criteria it can go in circles: of three
    trajectories with (turns, tokens, failures) = (2, 300, 1), (3, 100, 2), (4, 200, 0) each beats the next with 2/3,
    and the last one the first.
    """

    async def prefer(self, first: Trajectory, second: Trajectory, problem: Problem) -> float | None:
        return await self._by_grades(first, second, problem, _vote)


def _vote(first: Trajectory, second: Trajectory) -> float:
    if is_later(first, second):
        return 1 - _vote(second, first)
    pairs = zip(_costs(first), _costs(second), strict=True)
    return sum(0.5 if ours == theirs else float(ours < theirs) for ours, theirs in pairs) / 3


def _costs(trajectory: Trajectory) -> tuple[int, int, int]:
    failures = sum(execution.is_error for execution in trajectory.executions)
    return trajectory.num_turns, trajectory.num_action_tokens, failures
