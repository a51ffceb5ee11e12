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
from dataclasses import dataclass, field, fields
from types import TracebackType
from typing import Literal, Self

from mtpo.answer_comparison import Decision
from mtpo.answer_equality import compare
from mtpo.answer_text import normalise
from mtpo.answers import extract_answer
from mtpo.grader_workers import WorkerPool
from mtpo.trajectory import Problem
from mtpo.value_rules import GOLD_TOO_LARGE

Verdict = Literal["correct", "wrong", "ungraded"]
WORKERS = 2
TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Grade:
    """What the grader found."""

    verdict: Verdict
    """`ungraded` says nothing about the answer: it must never become a label."""
    answer: str | None
    """The answer as it stands in the response; None if there is no box."""
    rule: str
    """What decided: `number`, `interval`, `symbolic`, ...; for `ungraded`, why there is no verdict."""


@dataclass(frozen=True, kw_only=True)
class GradingOptions:
    """Departures from strict grading, for comparing with the figures of others. Results name those that are on."""

    accept_joined: bool = field(
        default=False,
        metadata={
            "help": 'where the gold answer is the last of several boxes ("5 or 7"), accept them all too'
        },
    )
    last_sentence: bool = field(
        default=False,
        metadata={"help": "without a box, take the last value of the last sentence; for models of others"},
    )
    paper_tolerance: bool = field(
        default=False,
        metadata={
            "help": "the tolerance of arXiv 2409.02392: decimals within 1e-4, also 100 times more or less, and "
            "other constants within 1e-3"
        },
    )

    @property
    def grading(self) -> GradingOptions:
        """These options without what a subclass adds, such as the config of a recipe."""
        return GradingOptions(
            **{option.name: getattr(self, option.name) for option in fields(GradingOptions)}
        )

    @property
    def names(self) -> list[str]:
        """Those that are on, for the files of results; empty for strict grading."""
        return [option.name for option in fields(GradingOptions) if getattr(self, option.name)]

    def golds(self, problem: Problem) -> tuple[str, ...]:
        """The answers of which any is right."""
        joined = problem.joined_answer if self.accept_joined else None
        return (problem.answer,) if joined is None else (problem.answer, joined)


STRICT = GradingOptions()


class Grader:
    """Grades responses, each pair of answer and gold once.

    Args:
        workers: the most processes for what needs algebra; none is started before it is needed.
        timeout_s: CPU seconds that one comparison may take there; ten times as long by the clock.
        options: departures from strict grading.

    Any thread may use it. After a fork, the child starts its own processes.
    """

    def __init__(
        self, *, workers: int = WORKERS, timeout_s: float = TIMEOUT_S, options: GradingOptions = STRICT
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        self.workers, self.timeout_s, self.options = workers, timeout_s, options
        self.num_compared = 0
        """Pairs that were compared, rather than found among those compared before."""
        self._decisions: dict[tuple[str, str], Decision] = {}
        self._pool: WorkerPool | None = None
        self._pool_owner = os.getpid()
        self._lock = threading.Lock()

    def grade(self, response: str, gold: str | tuple[str, ...]) -> Grade:
        """Grade one response; see `grade_many`."""
        return self.grade_many([(response, gold)])[0]

    def grade_many(self, pairs: Iterable[tuple[str, str | tuple[str, ...]]]) -> list[Grade]:
        """Grade pairs of (response, gold answer), in order. Of several golds, any is right.

        A response is flat text; its answer is the box in the last assistant message. No box is a wrong answer
        (rule `no_answer`), an empty gold answer cannot be graded (rule `empty_gold`).
        """
        last_sentence = self.options.last_sentence
        answers = [
            (
                extract_answer(response, last_sentence=last_sentence),
                [gold.strip() for gold in ((golds,) if isinstance(golds, str) else golds)],
            )
            for response, golds in pairs
        ]
        self._decide(
            dict.fromkeys((answer, gold) for answer, golds in answers for gold in golds if answer and gold)
        )
        return [_best([self._grade(answer, gold) for gold in golds]) for answer, golds in answers]

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
            decision = decide_here(answer, gold, paper_tolerance=self.options.paper_tolerance)
            if decision.equal is None and decision.rule not in (_GOLD_TOO_COMPLEX, GOLD_TOO_LARGE):
                hard.append((answer, gold))
            else:
                self._decisions[answer, gold] = decision
        if hard:
            self._decisions.update(zip(hard, self._decide_in_workers(hard), strict=True))

    def _decide_in_workers(self, pairs: Sequence[tuple[str, str]]) -> list[Decision]:
        pool = self._started_pool()

        def decide(pair: tuple[str, str]) -> Decision:
            answer, gold = map(normalise, pair)
            return pool.decide(gold, answer, paper_tolerance=self.options.paper_tolerance)

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


def decide_here(answer: str, gold: str, *, paper_tolerance: bool = False) -> Decision:
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
    return compare(normal_gold, normal_answer, paper_tolerance=paper_tolerance)


def _best(grades: Sequence[Grade]) -> Grade:
    """Of the grades by several golds: correct by any; wrong only by all."""
    order: list[Verdict] = ["correct", "ungraded", "wrong"]
    return min(grades, key=lambda grade: order.index(grade.verdict))


_graders: dict[tuple[int, float, GradingOptions], Grader] = {}
_graders_lock = threading.Lock()


def shared_grader(
    *, workers: int = WORKERS, timeout_s: float = TIMEOUT_S, options: GradingOptions = STRICT
) -> Grader:
    """The one grader of this process with these settings, so that what was compared once is remembered."""
    with _graders_lock:
        grader = _graders.get(settings := (workers, timeout_s, options))
        if grader is None:
            grader = _graders[settings] = Grader(workers=workers, timeout_s=timeout_s, options=options)
            atexit.register(grader.close)
        return grader


def grade(response: str, gold: str, *, timeout_s: float = TIMEOUT_S) -> Grade:
    """Grade one response strictly, with the `shared_grader`.

    Args:
        response: flat text; its answer is the box in the last assistant message.
        gold: the gold answer alone.
        timeout_s: CPU seconds that the comparison may take; beyond it, the verdict is `ungraded`.
    """
    return shared_grader(timeout_s=timeout_s).grade(response, gold)
