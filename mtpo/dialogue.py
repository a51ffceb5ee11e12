"""A dialogue as an environment: the model teaches, a simulated student answers, and a judge compares whole talks.

Every turn of the model is said to the student, whose answer is what the model reads next: an observation, so no token
of it is trained. The talk ends when either side says the closing phrase, or after `RolloutLimits.max_turns` turns of
the model: a lesson has a length, so that end is no truncation. What was said last, to nobody, is in the trajectory's
metadata with `ended_by`, and with what the student tells of itself (Shani et al. 2024, section 5: Education Dialogue).

A student is a random environment: a loss on whole trajectories is biased by its luck (`mtpo.tabular.random_tools`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

from mtpo.chat import without_thoughts
from mtpo.environment import Reply
from mtpo.trajectory import Problem, StopReason, Trajectory

CLOSING = "[end of conversation]"
"""The phrase with which either side ends the talk."""


class Student(Protocol):
    """The other side of one talk."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What a judge may want to know of the student when the talk is over: JSON values."""
        ...

    async def reply(self, message: str, *, seed: int) -> str | None:
        """Answer a message; None if no more of the talk fits into what the student can read.

        Raises:
            EnvironmentFault: the student failed through no doing of the model.
        """
        ...

    async def hear(self, message: str, *, seed: int) -> None:
        """Take in the last message of the talk, to which no answer is wanted."""
        ...

    def copy(self) -> Student:
        """A student of its own that remembers the same talk."""
        ...

    def close(self) -> None:
        """The talk is over; free what it holds."""
        ...


@dataclass(frozen=True)
class Dialogue:
    """Talks with students, one for each trajectory; an `mtpo.environment.Environment`."""

    students: Callable[[Problem], Student]

    def begin(self, problem: Problem) -> DialogueSession:
        return DialogueSession(self.students(problem))


@dataclass
class DialogueSession:
    """One talk. The student never hears what the model thinks."""

    student: Student
    ended_by: str | None = None
    """`model`, `student`, or `length`; None while it goes on, or if a limit cut it short."""
    last_words: str | None = None
    """What the student said when it ended the talk."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        found = {**self.student.metadata, "ended_by": self.ended_by, "last_words": self.last_words}
        return {name: value for name, value in found.items() if value is not None}

    async def take(self, turn: str, *, seed: int, limit: StopReason | None) -> Reply | StopReason:
        message = without_thoughts(turn).strip()
        is_closing = CLOSING in message
        if is_closing or limit == StopReason.TURN_LIMIT:
            await self.student.hear(message, seed=seed)
            self.ended_by = "model" if is_closing else "length"
            return StopReason.CLOSED
        if limit is not None:
            return limit
        answer = await self.student.reply(message, seed=seed)
        if answer is None:
            return StopReason.CONTEXT_LIMIT
        if CLOSING in answer:
            self.ended_by, self.last_words = "student", answer
            return StopReason.CLOSED
        return Reply(answer, role="user")

    async def fork(self) -> DialogueSession:
        return DialogueSession(self.student.copy())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.student.close()


def transcript(trajectory: Trajectory, model: str = "Teacher", other: str = "Student") -> str:
    """The whole talk as a judge reads it, thoughts left out and the student's last words included.

    The question is what the other side said first.
    """
    names = {"prompt": other, "observation": other, "action": model}
    lines = [f"{names[s.kind]}: {without_thoughts(s.text).strip()}" for s in trajectory.segments]
    if (last := trajectory.metadata.get("last_words")) is not None:
        lines.append(f"{other}: {last}")
    return "\n\n".join(lines)


def prefer_comprehension(first: Trajectory, second: Trajectory, problem: Problem) -> float | None:
    """1 if the student of the first talk understood more in the end, 0 if less, 1/2 if as much.

    Returns:
        None if either talk did not come to an end, or its student does not say what it understood.
    """
    scores = [
        t.metadata.get("comprehension") if t.stop_reason == StopReason.CLOSED else None
        for t in (first, second)
    ]
    if scores[0] is None or scores[1] is None:
        return None
    return 0.5 + 0.5 * ((scores[0] > scores[1]) - (scores[0] < scores[1]))
