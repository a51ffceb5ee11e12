"""What a judge is, and the judge that any function makes."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Protocol

from mtpo.errors import InputError
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
    either order. Two equal trajectories tie unasked, and it is shown no environment fault.
    """

    def __init__(self, function: PairFunction) -> None:
        self.counts: Counter[str] = Counter()
        self._function = function

    async def prefer(self, first: Trajectory, second: Trajectory, problem: Problem) -> float | None:
        """As `Judge.prefer`.

        Raises:
            InputError: the function returned a value that is not in [0, 1].
        """
        if has_fault(first, second):
            return self._counted(None, "environment fault")
        if is_same(first, second):
            return self._counted(0.5, "undecided")
        if is_later(first, second):  # one order for both calls, so that their sum is exactly 1
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


def has_fault(*trajectories: Trajectory) -> bool:
    return any(t.stop_reason == StopReason.ENVIRONMENT_FAULT for t in trajectories)


def is_later(first: Trajectory, second: Trajectory) -> bool:
    """Of any two that differ, one is later. What is computed for the earlier one first is the same in both orders."""
    return _order(first) > _order(second)


def is_same(first: Trajectory, second: Trajectory) -> bool:
    """Neither is later: they tie by symmetry."""
    return _order(first) == _order(second)


def _order(trajectory: Trajectory) -> tuple[list[int], str, int, int]:
    return trajectory.input_ids, trajectory.policy, trajectory.iteration, trajectory.sample
