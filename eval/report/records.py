"""From trajectories to what the page holds: a small index of all, and chunks that it unpacks when they are looked at.

A chunk is gzipped JSON. The index has one entry a trajectory in each of its columns; a text chunk and a token chunk
hold `CHUNK` consecutive trajectories each, so that browsing and searching never unpack a token.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from data.labels import Row
from eval.predictions import outcome
from mtpo.batches import sides
from mtpo.grader import Grade
from mtpo.trajectory import Problem, Segment, StopReason, Trajectory

CHUNK = 64
"""Trajectories a chunk: unpacked in a few milliseconds."""
MIN_LOGP = -1e6
"""Log-probs are kept in thousandths of a nat, and not below this."""


def pack(value: Any) -> str:
    """A JSON value as base64 of gzip: no character of it can end the element that holds it."""
    content = json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode()


@dataclass
class _Names:
    """Numbers names in the order in which they come."""

    numbers: dict[Any, int] = field(default_factory=dict)

    def __call__(self, name: Any) -> int:
        return self.numbers.setdefault(name, len(self.numbers))


class Records:
    """Collects what the page holds, one trajectory after the other."""

    COLUMNS = (
        "set",
        "problem",
        "sample",
        "outcome",
        "stop",
        "turns",
        "tokens",
        "calls",
        "errors",
        "answer",
        "rule",
    )

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {name: [] for name in self.COLUMNS}
        self.sets: list[dict[str, Any]] = []
        self.pairs: list[tuple[int, int]] = []
        self.uses: dict[int, set[str]] = {}
        """What training takes a trajectory for: `chosen`, `rejected`, `desirable`, `undesirable`, `shown`."""
        self.chunks: list[str] = []
        """Text and tokens, in turn."""
        self.policies: dict[str, None] = {}
        """Names of the samplers, in the order in which they come."""
        self.used_ids: set[int] = set()
        self.some_actions: list[tuple[Sequence[int], str]] = []
        """Some actions with their text, to try a tokenizer on."""
        self._problems, self._outcomes, self._stops, self._rules = _Names(), _Names(), _Names(), _Names()
        self._texts: list[dict[str, Any]] = []
        self._tokens: list[list[Any]] = []
        self._row_of: dict[tuple[str, bytes], int] = {}

    def begin_set(self, name: str, run: str, total: int, problems: Iterable[Problem] = ()) -> None:
        """What is added from here on is of this set, which has `total` trajectories of these problems."""
        for problem in problems:
            self._problems(problem)
        self.sets.append({"name": name, "run": run, "total": total, "first": len(self)})

    def __len__(self) -> int:
        return len(self.columns["set"])

    def add(self, trajectory: Trajectory, problem: Problem, grade: Grade) -> int:
        """Returns its number."""
        number = len(self)
        executions = trajectory.executions
        values = (
            len(self.sets) - 1, self._problems(problem), trajectory.sample,
            self._outcomes(outcome(trajectory, grade)), self._stops(trajectory.stop_reason.value),
            trajectory.num_turns, trajectory.num_action_tokens, len(executions),
            sum(e.is_error for e in executions), grade.answer, self._rules(grade.rule),
        )  # fmt: skip
        for name, value in zip(self.COLUMNS, values, strict=True):
            self.columns[name].append(value)
        self._texts.append(_text_record(trajectory))
        self._tokens.append([_token_record(s) for s in trajectory.segments])
        self.policies[trajectory.policy] = None
        self.used_ids.update(trajectory.input_ids)
        if len(self.some_actions) < 20 and not trajectory.is_from_text:
            self.some_actions += [(s.ids, s.text) for s in trajectory.actions]
        self._row_of.setdefault((trajectory.problem_id, _digest(trajectory.input_ids)), number)
        if len(self._texts) == CHUNK:
            self._close_chunk()
        return number

    def find(self, problem_id: str, input_ids: Sequence[int]) -> int | None:
        """The number of the trajectory of these ids, if it was added."""
        return self._row_of.get((problem_id, _digest(input_ids)))

    def finish(self) -> dict[str, Any]:
        """The index. Nothing may be added after it."""
        if self._texts:
            self._close_chunk()
        return {
            "sets": self.sets,
            "problems": [[p.id, p.question, p.answer, p.level, p.subject] for p in self._problems.numbers],
            "rows": self.columns,
            "outcomes": list(self._outcomes.numbers),
            "stops": list(self._stops.numbers),
            "rules": list(self._rules.numbers),
            "pairs": self.pairs,
            "uses": {str(number): sorted(uses) for number, uses in self.uses.items()},
            "chunk": CHUNK,
        }

    def _close_chunk(self) -> None:
        self.chunks += [pack(self._texts), pack(self._tokens)]
        self._texts, self._tokens = [], []


def trajectories_of_row(row: Row, tokenizer: Any | None) -> Iterator[tuple[str, Trajectory]]:
    """(side, trajectory) of each side of a training row, from its ids and mask alone.

    What follows the last action is left out: nothing is trained on it, and a trajectory ends with an action.
    """
    for side in sides(row):
        marked = zip(row[f"{side}input_ids"], row[f"{side}completion_mask"], strict=True)
        segments: list[Segment] = []
        for is_action, pairs in groupby(marked, key=lambda pair: pair[1]):
            ids = tuple(i for i, _ in pairs)
            kind = "action" if is_action else "observation" if segments else "prompt"
            text = (
                f"[{len(ids)} tokens]"
                if tokenizer is None
                else tokenizer.decode(ids, skip_special_tokens=True)
            )
            segments.append(Segment(kind, ids, None, text))
        if segments[-1].kind == "observation":
            segments.pop()
        sample = row.get(f"{side}sample", 0)
        yield side, Trajectory(row["problem_id"], sample, tuple(segments), StopReason.ANSWERED)


def use_of(row: Row, side: str) -> str:
    """What training takes this side of a row for."""
    if side:
        return side.removesuffix("_")
    if "label" in row:
        return "desirable" if row["label"] else "undesirable"
    return "shown"


def keeps(problem_id: str, share: float) -> bool:
    """Whether a problem is among a share of all: always the same ones, in every set and run."""
    draw = int.from_bytes(hashlib.blake2b(problem_id.encode(), digest_size=8).digest(), "big")
    return draw < share * 2**64


def _text_record(trajectory: Trajectory) -> dict[str, Any]:
    """All but the tokens; empty values are left out."""
    record = {
        "segments": [[s.kind[0], s.text, len(s.ids)] for s in trajectory.segments],
        "executions": [[e.status, round(e.seconds, 3), e.text] for e in trajectory.executions],
        "policy": trajectory.policy,
        "fingerprint": trajectory.fingerprint[:12],
        "iteration": trajectory.iteration,
        "seed": trajectory.seed,
        "generate_s": round(trajectory.generate_s, 2),
        "execute_s": round(trajectory.execute_s, 2),
        "fault": trajectory.fault,
        "is_from_text": trajectory.is_from_text,
        "parent": trajectory.parent,
        "branch_turn": trajectory.branch_turn,
        "metadata": {str(k): str(v) for k, v in trajectory.metadata.items()},
    }
    return {name: value for name, value in record.items() if value not in (None, "", False, {}, [])}


def _token_record(segment: Segment) -> list[Any]:
    logps = segment.logps and [round(1000 * max(logp, MIN_LOGP)) for logp in segment.logps]
    return [list(segment.ids), logps]


def _digest(ids: Iterable[int]) -> bytes:
    return hashlib.blake2b(array("q", ids).tobytes(), digest_size=8).digest()
