"""One line a trajectory: what it answered, whether that is right, and how it got there (`predictions.jsonl`)."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.problems import file_lines, parse_object
from mtpo.errors import InputError
from mtpo.grader import STRICT, Grade, GradingOptions, shared_grader
from mtpo.trajectory import Problem, StopReason, Trajectory

Graded = Sequence[tuple[Trajectory, Grade]]
FAULT = "environment fault"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One trajectory as the metrics see it; `eval/README.md` has the fields as a table."""

    problem_id: str
    sample: int
    policy: str
    gold: str
    answer: str | None
    """As the model wrote it; None without one, and for a fault."""
    verdict: str
    """`correct`, `wrong` or `ungraded`, which a fault always is."""
    rule: str
    outcome: str
    vote: int | None
    """Answers of one problem with the same number are equivalent: the correct ones, and others by the grader."""
    stop_reason: str
    fault: str | None
    turns: int
    tool_calls: int
    tool_errors: int
    action_tokens: int | None
    """None for text without its tokens."""
    generate_s: float | None
    """None where nobody measured it."""
    execute_s: float | None

    @property
    def is_correct(self) -> bool:
        return self.verdict == "correct"

    @property
    def is_fault(self) -> bool:
        return self.fault is not None

    @property
    def is_truncated(self) -> bool:
        return StopReason(self.stop_reason).is_truncated

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def is_equivalent(answer: str, other: str, options: GradingOptions = STRICT) -> bool:
    """Whether the grader takes an answer for another."""
    return shared_grader(options=options).grade(f"\\boxed{{{answer}}}", other).verdict == "correct"


def predictions_of(
    graded: Graded,
    problems: Sequence[Problem],
    equal: Callable[[str, str], bool] = is_equivalent,
) -> list[Prediction]:
    """The predictions in the order of the problems, then of the samples.

    Args:
        equal: whether two answers to one problem are equivalent. It is asked about wrong answers only: correct ones
            are all equal to the gold answer.

    Raises:
        InputError: a trajectory is of a problem that is not in the set.
    """
    own: dict[str, list[tuple[Trajectory, Grade]]] = {problem.id: [] for problem in problems}
    for trajectory, verdict in graded:
        if trajectory.problem_id not in own:
            raise InputError(
                f"a trajectory is of problem {trajectory.problem_id!r}, which is not in the problem set"
            )
        own[trajectory.problem_id].append((trajectory, verdict))
    found = []
    for problem in problems:
        pairs = sorted(own[problem.id], key=lambda pair: pair[0].sample)
        verdicts = [Grade("ungraded", None, "fault") if t.fault is not None else g for t, g in pairs]
        votes = _votes(verdicts, equal)
        found += [
            _prediction(trajectory, verdict, vote, problem.answer)
            for (trajectory, _), verdict, vote in zip(pairs, verdicts, votes, strict=True)
        ]
    return found


def outcome(trajectory: Trajectory, verdict: Grade) -> str:
    """`correct`, or in a few words why not."""
    if trajectory.fault is not None:
        return FAULT
    if verdict.verdict == "correct":
        return "correct"
    if trajectory.stop_reason.is_truncated:
        return f"truncated ({trajectory.stop_reason.value})"
    if verdict.verdict == "ungraded":
        return f"ungraded ({verdict.rule})"
    return "no answer" if verdict.answer is None else "wrong answer"


def by_problem(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    """Problem id -> its predictions that are no faults; no entry for a problem that has only faults."""
    found: defaultdict[str, list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        if not prediction.is_fault:
            found[prediction.problem_id].append(prediction)
    return dict(found)


def read_predictions(path: Path) -> list[Prediction]:
    """
    Raises:
        InputError: there is no such file, or a line is no prediction; names file and line.
    """
    found = []
    for place, line in file_lines(path):
        try:
            found.append(_from_row(parse_object(line)))
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
    return found


def _from_row(row: Mapping[str, Any]) -> Prediction:
    names = {field.name for field in dataclasses.fields(Prediction)}
    if missing := names - row.keys():
        raise InputError(
            f"no prediction: {', '.join(sorted(missing))} missing; run recipes.evaluate --resume there"
        )
    return Prediction(**{name: row[name] for name in names})


def _prediction(trajectory: Trajectory, verdict: Grade, vote: int | None, gold: str) -> Prediction:
    is_timed = trajectory.generate_s > 0  # no engine answers in no time: it was imported
    return Prediction(
        problem_id=trajectory.problem_id,
        sample=trajectory.sample,
        policy=trajectory.policy,
        gold=gold,
        answer=verdict.answer,
        verdict=verdict.verdict,
        rule=verdict.rule,
        outcome=outcome(trajectory, verdict),
        vote=vote,
        stop_reason=trajectory.stop_reason.value,
        fault=trajectory.fault,
        turns=trajectory.num_turns,
        tool_calls=len(trajectory.executions),
        tool_errors=sum(e.is_error for e in trajectory.executions),
        action_tokens=None if trajectory.is_from_text else trajectory.num_action_tokens,
        generate_s=trajectory.generate_s if is_timed else None,
        execute_s=trajectory.execute_s if is_timed else None,
    )


def _votes(verdicts: Sequence[Grade], equal: Callable[[str, str], bool]) -> list[int | None]:
    """For each verdict on samples of one problem, the number of the group of equivalent answers that it is in."""
    firsts: list[Grade] = []
    known: dict[tuple[str, bool], int] = {}
    votes: list[int | None] = []
    for verdict in verdicts:
        if verdict.answer is None:
            votes.append(None)
            continue
        is_correct = verdict.verdict == "correct"
        key = (verdict.answer, is_correct)
        if key not in known:
            known[key] = _group(verdict.answer, is_correct, firsts, equal)
            if known[key] == len(firsts):
                firsts.append(verdict)
        votes.append(known[key])
    return votes


def _group(answer: str, is_correct: bool, firsts: Sequence[Grade], equal: Callable[[str, str], bool]) -> int:
    """The index of the group that the answer belongs to; `len(firsts)` if it is none of them."""
    for index, first in enumerate(firsts):
        if is_correct != (first.verdict == "correct"):
            continue
        if is_correct or equal(answer, first.answer or ""):
            return index
    return len(firsts)
