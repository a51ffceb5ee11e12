"""What a trajectory is: the exact token ids, and who wrote each of them.

Ids are the truth. They are the ids that the engine sampled and the ids that were inserted around them,
never the result of decoding and encoding again; text is a view of them. Whatever needs a mask, a log-prob
or a pair reads these ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, Literal

from mtpo.errors import InputError

SegmentKind = Literal["prompt", "action", "observation"]
ExecutionStatus = Literal["ok", "error", "timeout", "died"]


class StopReason(StrEnum):
    """Why a rollout ended."""

    ANSWERED = "answered"
    """The last turn holds a final answer."""
    NO_CODE = "no_code"
    """The model ended a turn with neither code nor an answer: finished, and wrong."""
    CLOSED = "closed"
    """One side ended the dialogue, or it has had as many turns as it may have, which is how a lesson ends."""
    TURN_LIMIT = "turn_limit"
    """All turns were used and the last one still wanted to run code: truncated."""
    TOKEN_LIMIT = "token_limit"
    """A turn, or the trajectory, ran out of new tokens: truncated."""
    CONTEXT_LIMIT = "context_limit"
    """The next turn would not have fitted into the model's context: truncated."""
    TIME_LIMIT = "time_limit"
    """The trajectory ran out of wall time: truncated, by the machine as much as by the model."""
    ENVIRONMENT_FAULT = "environment_fault"
    """Engine or environment failed, also after retries: says nothing about the model."""

    @property
    def is_finished(self) -> bool:
        """The trajectory came to its own end, so that being right or wrong is the model's doing."""
        return self in (StopReason.ANSWERED, StopReason.NO_CODE, StopReason.CLOSED)

    @property
    def is_truncated(self) -> bool:
        """A limit ended the trajectory: unfinished, which is not the same as wrong."""
        return self in (
            StopReason.TURN_LIMIT,
            StopReason.TOKEN_LIMIT,
            StopReason.CONTEXT_LIMIT,
            StopReason.TIME_LIMIT,
        )


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its gold answer."""

    id: str
    """Unique in its set, stable between runs, for example `gsm8k:test/17`."""
    question: str
    answer: str
    """The gold answer alone, without working, for example `18` or `\\frac{3}{4}`."""
    level: str | None = None
    subject: str | None = None
    joined_answer: str | None = None
    """All values of several boxes, such as `5, 7`, where `answer` is the last one alone; None otherwise."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Problem:
        return cls(**row)


@dataclass(frozen=True, slots=True)
class Execution:
    """One run of one code block in the interpreter."""

    code: str
    text: str
    """What the model reads: output, value or error, already capped."""
    status: ExecutionStatus
    seconds: float
    is_fault: bool = False
    """The interpreter was lost through no doing of the code. Such a run is no part of a trajectory."""

    @property
    def is_error(self) -> bool:
        return self.status != "ok"


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive token ids of one author."""

    kind: SegmentKind
    ids: tuple[int, ...]
    logps: tuple[float, ...] | None = None
    """The engine's own log-probs (nats, temperature 1) of an action's ids; None elsewhere or if unknown."""
    text: str = ""
    """The content without template tokens: the user message, what the model wrote, the tool output."""


@dataclass(frozen=True)
class Trajectory:
    """One attempt at one problem, from the question to the last turn.

    Raises:
        InputError: an invariant does not hold. Checked whenever one is made or read: the first segment is
            the only prompt; actions and observations alternate, beginning and ending with an action; no
            segment is empty; log-probs stand on actions only, one an id; the inserted ids hold the BOS
            exactly once, as the first id, where the family has one. So the ids of turn k are a prefix
            of those of turn k + 1.
    """

    problem_id: str
    sample: int
    """Index among the trajectories of this problem in this run, from 0."""
    segments: tuple[Segment, ...]
    stop_reason: StopReason
    executions: tuple[Execution, ...] = ()
    bos_id: int | None = None
    policy: str = ""
    """Name of the sampler that made it."""
    fingerprint: str = ""
    """What the engine served: changes whenever the weights do."""
    iteration: int = 0
    seed: int = 0
    generate_s: float = 0.0
    """Seconds spent waiting for the engine."""
    execute_s: float = 0.0
    """Seconds spent waiting for the environment."""
    fault: str | None = None
    """What failed, when the stop reason is `environment_fault`."""
    is_from_text: bool = False
    """A server returned text alone: the action ids are not what was sampled, and nothing may be trained on them."""
    parent: int | None = None
    """The sample of the same problem that this one branched off; None for one that began at the beginning."""
    branch_turn: int | None = None
    """The model's turn, counted from 0, that is the first of its own; None without a parent."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What an environment says of its session (`mtpo.dialogue`), and the origin of imported trajectories."""

    def __post_init__(self) -> None:
        if problem := self._broken_invariant():
            raise InputError(f"trajectory {self.problem_id!r} sample {self.sample}: {problem}")

    def _broken_invariant(self) -> str | None:
        if not self.segments or self.segments[0].kind != "prompt":
            return "the first segment must be the prompt"
        for index, segment in enumerate(self.segments):
            if not segment.ids:
                return f"segment {index} ({segment.kind}) is empty"
            if index and segment.kind != ("action" if index % 2 else "observation"):
                return (
                    f"segment {index} is {segment.kind!r}: after the prompt, action and observation alternate"
                )
            if segment.logps is not None:
                if segment.kind != "action":
                    return f"segment {index} ({segment.kind}) has log-probs, but only actions are sampled"
                if len(segment.logps) != len(segment.ids):
                    return f"segment {index} has {len(segment.ids)} ids but {len(segment.logps)} log-probs"
        if self.segments[-1].kind == "observation":
            return "the last segment is tool output that no action answers"
        if self.bos_id is not None:
            inserted = [i for s in self.segments if s.kind != "action" for i in s.ids]
            if inserted[0] != self.bos_id or inserted.count(self.bos_id) != 1:
                return (
                    f"the inserted ids must hold the BOS id {self.bos_id} once, at the start, "
                    f"but hold it {inserted.count(self.bos_id)} times and start with {inserted[0]}"
                )
        if (self.parent is None) != (self.branch_turn is None):
            return f"parent {self.parent!r} does not go with branch turn {self.branch_turn!r}"
        if (self.stop_reason == StopReason.ENVIRONMENT_FAULT) != (self.fault is not None):
            return f"stop reason {self.stop_reason.value!r} does not go with fault {self.fault!r}"
        return None

    @cached_property
    def input_ids(self) -> list[int]:
        """All ids in order."""
        return [i for segment in self.segments for i in segment.ids]

    @cached_property
    def completion_mask(self) -> list[int]:
        """1 on the ids that the model sampled, 0 on prompt and tool output; same length as `input_ids`."""
        return [int(segment.kind == "action") for segment in self.segments for _ in segment.ids]

    @property
    def actions(self) -> tuple[Segment, ...]:
        return tuple(s for s in self.segments if s.kind == "action")

    @property
    def action_ids(self) -> tuple[tuple[int, ...], ...]:
        """The sampled ids turn by turn: equal exactly when two trajectories made the same choices."""
        return tuple(s.ids for s in self.actions)

    @property
    def messages(self) -> list[dict[str, str]]:
        """Text view with the roles user, assistant and tool."""
        roles = {"prompt": "user", "action": "assistant", "observation": "tool"}
        return [{"role": roles[s.kind], "content": s.text} for s in self.segments]

    @property
    def num_turns(self) -> int:
        """Turns that the model took."""
        return len(self.actions)

    @property
    def num_action_tokens(self) -> int:
        return sum(len(s.ids) for s in self.actions)

    def to_json(self) -> dict[str, Any]:
        row = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # asdict copies id by id
        row["stop_reason"] = self.stop_reason.value
        row["segments"] = [
            {"kind": s.kind, "ids": list(s.ids), "logps": s.logps and list(s.logps), "text": s.text}
            for s in self.segments
        ]
        row["executions"] = [
            {"code": e.code, "text": e.text, "status": e.status, "seconds": e.seconds}
            for e in self.executions
        ]
        row["metadata"] = dict(self.metadata)
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Trajectory:
        """The inverse of `to_json`.

        Raises:
            InputError: a field is missing, unknown or of the wrong type, or an invariant does not hold.
        """
        try:
            fields = dict(row)
            fields["segments"] = tuple(
                Segment(
                    kind=s["kind"],
                    ids=tuple(s["ids"]),
                    logps=None if s["logps"] is None else tuple(s["logps"]),
                    text=s["text"],
                )
                for s in row["segments"]
            )
            fields["executions"] = tuple(Execution(**e) for e in row["executions"])
            fields["stop_reason"] = StopReason(row["stop_reason"])
            return cls(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"not a trajectory: {type(error).__name__}: {error}") from error
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"not a trajectory: {error}") from error
