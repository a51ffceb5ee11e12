"""From graded trajectories to training rows: pairs, single labels, or correct ones only.

A label is given only to what the model finished by itself. Truncated, faulty and ungraded trajectories get none,
whatever their text says; a trajectory that ends without an answer is wrong. Of trajectories with the same action
ids one is kept. Every trajectory and every problem is accounted for in a `LabelCounts`.

The draws depend on the seed and on what is there, never on the order in which it comes. Rows hold token ids and
the mask of those that the model wrote, as `mtpo.batches` reads them. Trajectories may come from a generator: of
each one that may be in a row, 5 bytes a token are kept in memory.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from mtpo.errors import InputError
from mtpo.trajectory import StopReason, Trajectory

if TYPE_CHECKING:
    from mtpo.grader import Grade

Graded = Iterable[tuple[Trajectory, "Grade"]]
Row = dict[str, Any]


class Fate(StrEnum):
    """What became of a trajectory; only the first two can be in a row."""

    CORRECT = "correct"
    WRONG = "wrong"
    TRUNCATED = "truncated"
    FAULT = "environment fault"
    UNGRADED = "ungraded"
    NO_ACTION = "without action ids"
    FROM_TEXT = "read from text"
    TOO_LONG = "too long"
    IGNORED_ERROR = "ignored tool error"
    DUPLICATE = "duplicate"


BOTH = "correct and wrong"
"""The outcome of a problem that can give a pair; the others are "all correct", "all truncated" and so on."""


@dataclass
class LabelCounts:
    """Where every trajectory and every problem went."""

    kind: str
    """What a row is: `pair`, `label` or `correct trajectory`."""
    num_rows: int = 0
    trajectories: dict[str, int] = field(default_factory=dict)
    """How many met each `Fate`."""
    problems: dict[str, int] = field(default_factory=dict)
    """How many problems had each outcome, counting only trajectories that may be in a row, if there are any."""

    def table(self) -> str:
        """The counts as lines of text, with shares."""
        lines = [f"{self.kind + 's':28}{self.num_rows:9}"]
        for title, counts in (("trajectories", self.trajectories), ("problems", self.problems)):
            total = sum(counts.values())
            lines.append(f"{title:28}{total:9}")
            lines += [f"  {name:26}{n:9}{n / total:8.1%}" for name, n in counts.items()]
        return "\n".join(lines)

    def why_empty(self) -> str | None:
        """One line that says why there is no row; None if there is one."""
        if self.num_rows:
            return None
        if not self.problems:
            return f"no {self.kind}: there is no trajectory"
        total = sum(self.problems.values())
        if len(self.problems) == 1:
            return f"no {self.kind}: all {total} problems {next(iter(self.problems))}"
        parts = ", ".join(f"{n} {outcome}" for outcome, n in self.problems.items())
        return f"no {self.kind}: of {total} problems {parts}"


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What a row needs of a trajectory."""

    sample: int
    iteration: int
    policy: str
    action_digest: bytes
    """Equal exactly when the action ids are."""
    input_ids: array[int]
    completion_mask: bytes

    @classmethod
    def of(cls, trajectory: Trajectory) -> _Attempt:
        return cls(
            trajectory.sample,
            trajectory.iteration,
            trajectory.policy,
            hashlib.blake2b(repr(trajectory.action_ids).encode(), digest_size=16).digest(),
            array("i", trajectory.input_ids),
            bytes(trajectory.completion_mask),
        )

    @property
    def order(self) -> tuple[int, int, str, bytes, array[int]]:
        return self.sample, self.iteration, self.policy, self.action_digest, self.input_ids


@dataclass(frozen=True, slots=True)
class _Candidates:
    """What one problem offers, duplicates left out, in a fixed order."""

    problem_id: str
    correct: list[_Attempt]
    wrong: list[_Attempt]


def make_pairs(
    graded: Graded,
    k: int = 1,
    seed: int = 0,
    max_tokens: int | None = None,
    *,
    drop_ignored_errors: bool = True,
) -> tuple[list[Row], LabelCounts]:
    """Uniformly random (correct, wrong) pairs of each problem that has both, as in arXiv 2409.02392.

    Args:
        k: pairs per problem, all different; fewer where there are not so many.
        max_tokens: leave out longer trajectories, prompt and tool output included.
        drop_ignored_errors: leave out correct trajectories whose last tool output is an error.

    Raises:
        InputError: `k` or `max_tokens` is below 1.
    """
    _check_positive(k=k)
    counts, rows = LabelCounts("pair"), []
    for found in _candidates(graded, counts, max_tokens, drop_ignored_errors):
        rng = _rng(seed, found.problem_id)
        num_pairs = len(found.correct) * len(found.wrong)
        for index in rng.sample(range(num_pairs), min(k, num_pairs)):
            chosen = found.correct[index // len(found.wrong)]
            rejected = found.wrong[index % len(found.wrong)]
            rows.append(pair_row(found.problem_id, chosen, rejected))
    counts.num_rows = len(rows)
    return rows, counts


def make_binary(
    graded: Graded,
    per_class: int | None = None,
    seed: int = 0,
    max_tokens: int | None = None,
    *,
    only_both: bool = False,
    drop_ignored_errors: bool = True,
) -> tuple[list[Row], LabelCounts]:
    """Single trajectories with `label` true (desirable: correct) or false (undesirable: wrong).

    Args:
        per_class: at most so many, drawn at random, of each class per problem; None keeps all.
        only_both: leave out problems without both classes. With `per_class=1` the rows are then the two halves
            of `make_pairs`' kind of pair, which is what M-KTO trains on.

    The other arguments and errors are those of `make_pairs`.
    """
    _check_positive(per_class=per_class)
    counts, rows = LabelCounts("label"), []
    for found in _candidates(graded, counts, max_tokens, drop_ignored_errors):
        if only_both and not (found.correct and found.wrong):
            continue
        rng = _rng(seed, found.problem_id)
        for label, attempts in ((True, found.correct), (False, found.wrong)):
            rows += [
                single_row(found.problem_id, a) | {"label": label} for a in _draw(rng, attempts, per_class)
            ]
    counts.num_rows = len(rows)
    return rows, counts


def make_sft(
    graded: Graded,
    k: int = 1,
    seed: int = 0,
    max_tokens: int | None = None,
    *,
    drop_ignored_errors: bool = True,
) -> tuple[list[Row], LabelCounts]:
    """Up to `k` random correct trajectories per problem, without a label: RAFT's rows.

    The other arguments and errors are those of `make_pairs`.
    """
    _check_positive(k=k)
    counts, rows = LabelCounts("correct trajectory"), []
    for found in _candidates(graded, counts, max_tokens, drop_ignored_errors):
        drawn = _draw(_rng(seed, found.problem_id), found.correct, k)
        rows += [single_row(found.problem_id, a) for a in drawn]
    counts.num_rows = len(rows)
    return rows, counts


def fate_of(
    trajectory: Trajectory, grade: Grade, *, max_tokens: int | None = None, drop_ignored_errors: bool = True
) -> Fate:
    """What one trajectory is good for, duplicates aside."""
    if (reason := why_unusable(trajectory)) is not None:
        return reason
    gave_no_answer = trajectory.stop_reason == StopReason.NO_CODE
    if grade.verdict == "ungraded" and not gave_no_answer:
        return Fate.UNGRADED
    if max_tokens is not None and len(trajectory.input_ids) > max_tokens:
        return Fate.TOO_LONG
    if grade.verdict != "correct" or gave_no_answer:
        return Fate.WRONG
    executions = trajectory.executions
    if drop_ignored_errors and executions and executions[-1].is_error:
        return Fate.IGNORED_ERROR
    return Fate.CORRECT


def why_unusable(trajectory: Trajectory) -> Fate | None:
    """Why no label may be given to a trajectory, whatever a judge or grader says of it; None if one may."""
    if trajectory.stop_reason == StopReason.ENVIRONMENT_FAULT:
        return Fate.FAULT
    if trajectory.stop_reason.is_truncated:
        return Fate.TRUNCATED
    if not trajectory.num_action_tokens:
        return Fate.NO_ACTION
    return Fate.FROM_TEXT if trajectory.is_from_text else None


def pair_row(problem_id: str, chosen: Trajectory | _Attempt, rejected: Trajectory | _Attempt) -> Row:
    """A training row of two trajectories, see `mtpo.batches`."""
    row: Row = {
        "problem_id": problem_id,
        "chosen_sample": chosen.sample,
        "rejected_sample": rejected.sample,
    }
    for side, own in (("chosen", chosen), ("rejected", rejected)):
        row[f"{side}_input_ids"] = list(own.input_ids)
        row[f"{side}_completion_mask"] = list(own.completion_mask)
    return row


def _candidates(
    graded: Graded, counts: LabelCounts, max_tokens: int | None, drop_ignored_errors: bool
) -> list[_Candidates]:
    """What each problem offers, by problem id; fills in the counts."""
    _check_positive(max_tokens=max_tokens)
    fates: defaultdict[str, Counter[str]] = defaultdict(Counter)
    usable: defaultdict[str, list[tuple[Fate, _Attempt]]] = defaultdict(list)
    for trajectory, grade in graded:
        fate = fate_of(trajectory, grade, max_tokens=max_tokens, drop_ignored_errors=drop_ignored_errors)
        fates[trajectory.problem_id][fate] += 1
        if fate in (Fate.CORRECT, Fate.WRONG):
            usable[trajectory.problem_id].append((fate, _Attempt.of(trajectory)))
    found = []
    for problem_id in sorted(fates):
        candidates, seen = _Candidates(problem_id, [], []), set()
        for fate, attempt in sorted(usable[problem_id], key=lambda pair: (pair[1].order, pair[0])):
            if attempt.action_digest in seen:
                fates[problem_id].update({fate: -1, Fate.DUPLICATE: 1})
                continue
            seen.add(attempt.action_digest)
            (candidates.correct if fate == Fate.CORRECT else candidates.wrong).append(attempt)
        found.append(candidates)
    counts.trajectories = _most_common_first(sum(fates.values(), Counter[str]()))
    counts.problems = _most_common_first(Counter(_outcome(+own) for own in fates.values()))
    return found


def _outcome(fates: Counter[str]) -> str:
    classes = [fate for fate in (Fate.CORRECT, Fate.WRONG) if fate in fates] or list(fates)
    if classes == [Fate.CORRECT, Fate.WRONG]:
        return BOTH
    return f"all {classes[0]}" if len(classes) == 1 else "nothing usable"


def _most_common_first(counter: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))


def _draw(rng: random.Random, attempts: list[_Attempt], limit: int | None) -> list[_Attempt]:
    return attempts if limit is None or len(attempts) <= limit else rng.sample(attempts, limit)


def single_row(problem_id: str, attempt: Trajectory | _Attempt) -> Row:
    return {
        "problem_id": problem_id,
        "sample": attempt.sample,
        "input_ids": list(attempt.input_ids),
        "completion_mask": list(attempt.completion_mask),
    }


def _rng(seed: int, problem_id: str) -> random.Random:
    """A stream of its own for every problem, so that adding problems changes no other draw."""
    return random.Random(f"{seed}/{problem_id}")


def _check_positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
