"""Is the answer of a response equal to the gold answer: a verdict, and the rule that decided it.

Nearly every pair is settled in the caller by exact arithmetic and by rules on structure, in well under a
millisecond and without importing sympy. What needs algebra goes to worker processes that can be killed
(`mtpo.grader_workers`); they start when the first such pair comes. Text that a model wrote is parsed,
never evaluated as code.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from mtpo.answer_equality import GOLD_TOO_LARGE, Decision, compare
from mtpo.answer_text import normalise
from mtpo.answers import extract_answer
from mtpo.grader_workers import WorkerPool

Verdict = Literal["correct", "wrong", "ungraded"]


@dataclass(frozen=True, slots=True)
class Grade:
    """What the grader found."""

    verdict: Verdict
    """`ungraded` says nothing about the answer: it must never become a label."""
    answer: str | None
    """The answer as it stands in the response; None if there is no box."""
    rule: str
    """What decided: `number`, `interval`, `symbolic`, ...; for `ungraded`, why there is no verdict."""


class Grader:
    """Grades responses, each pair of answer and gold once.

    Args:
        workers: the most processes for what needs algebra; none is started before it is needed.
        timeout_s: CPU seconds that one comparison may take there; ten times as long by the clock.

    Any thread may use it. After a fork, the child starts its own processes.
    """

    def __init__(self, *, workers: int = 2, timeout_s: float = 5.0) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        self.workers, self.timeout_s = workers, timeout_s
        self.num_compared = 0
        """Pairs that were compared, rather than found among those compared before."""
        self._decisions: dict[tuple[str, str], Decision] = {}
        self._pool: WorkerPool | None = None
        self._pool_owner = os.getpid()
        self._lock = threading.Lock()

    def grade(self, response: str, gold: str) -> Grade:
        """Grade one response; see `grade_many`."""
        return self.grade_many([(response, gold)])[0]

    def grade_many(self, pairs: Iterable[tuple[str, str]]) -> list[Grade]:
        """Grade pairs of (response, gold answer), in order.

        A response is flat text; its answer is the box in the last assistant message. No box is a wrong answer
        (rule `no_answer`), an empty gold answer cannot be graded (rule `empty_gold`).
        """
        answers = [(extract_answer(response), gold.strip()) for response, gold in pairs]
        self._decide(dict.fromkeys((answer, gold) for answer, gold in answers if answer and gold))
        return [self._grade(answer, gold) for answer, gold in answers]

    def close(self) -> None:
        """End the worker processes; the grader can still be used."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None and self._pool_owner == os.getpid():
            pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _grade(self, answer: str | None, gold: str) -> Grade:
        if not gold:
            return Grade("ungraded", answer, "empty_gold")
        if answer is None:
            return Grade("wrong", None, "no_answer")
        equal, rule = self._decisions[answer, gold]
        return Grade("ungraded" if equal is None else "correct" if equal else "wrong", answer, rule)

    def _decide(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Compare what was not compared before: here what can be, the rest in the workers."""
        hard: list[tuple[str, str]] = []
        for answer, gold in pairs:
            if (answer, gold) in self._decisions:
                continue
            self.num_compared += 1
            decision = decide_here(answer, gold)
            if decision.equal is None and decision.rule not in (_GOLD_TOO_COMPLEX, GOLD_TOO_LARGE):
                hard.append((answer, gold))
            else:
                self._decisions[answer, gold] = decision
        if hard:
            self._decisions.update(zip(hard, self._decide_in_workers(hard), strict=True))

    def _decide_in_workers(self, pairs: Sequence[tuple[str, str]]) -> list[Decision]:
        pool = self._started_pool()

        def decide(pair: tuple[str, str]) -> Decision:
            return pool.decide(normalise(pair[1]), normalise(pair[0]))

        if len(pairs) == 1:
            return [decide(pairs[0])]
        with ThreadPoolExecutor(min(self.workers, len(pairs)), "grader") as threads:
            return list(threads.map(decide, pairs))

    def _started_pool(self) -> WorkerPool:
        with self._lock:
            if self._pool is None or self._pool_owner != os.getpid():
                self._pool = WorkerPool(self.workers, self.timeout_s)
                self._pool_owner = os.getpid()
            return self._pool


_GOLD_TOO_COMPLEX = "gold_too_complex"


def decide_here(answer: str, gold: str) -> Decision:
    """Compare without algebra; `equal` is None if algebra is needed, or if the gold cannot be read."""
    if answer == gold:
        return Decision(True, "same_text")
    try:
        normal_gold = normalise(gold)
    except ValueError:
        return Decision(None, _GOLD_TOO_COMPLEX)
    try:
        normal_answer = normalise(answer)
    except ValueError:
        return Decision(False, "too_complex")
    return compare(normal_gold, normal_answer)


_graders: dict[float, Grader] = {}
_graders_lock = threading.Lock()


def grade(response: str, gold: str, *, timeout_s: float = 5.0) -> Grade:
    """Grade one response with a grader that all callers share.

    Args:
        response: flat text; its answer is the box in the last assistant message.
        gold: the gold answer alone.
        timeout_s: CPU seconds that the comparison may take; beyond it, the verdict is `ungraded`.
    """
    with _graders_lock:
        grader = _graders.get(timeout_s)
        if grader is None:
            grader = _graders[timeout_s] = Grader(timeout_s=timeout_s)
            atexit.register(grader.close)
    return grader.grade(response, gold)
