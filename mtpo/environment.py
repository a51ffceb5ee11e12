"""What the model's turns act on, and what a turn means there.

A code interpreter runs the code block of a turn, and a boxed answer ends the trajectory (`CodeEnvironment`). In a
dialogue (`mtpo.dialogue`) every turn is said to somebody, who answers. `mtpo.rollout` knows neither: it hands over each
turn, and either shows the model what comes back or ends the trajectory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, runtime_checkable

from mtpo.chat import answer_of, code_to_run
from mtpo.errors import SandboxError
from mtpo.trajectory import Execution, Problem, StopReason


class InterpreterSession(Protocol):
    """State that lives as long as one trajectory."""

    async def execute(self, code: str, timeout_s: float = 5.0) -> Execution:
        """Run one code block. What the code does wrong is in the result.

        Raises:
            SandboxError: the interpreter itself failed.
        """
        ...

    async def fork(self) -> InterpreterSession:
        """An independent session with the same state."""
        ...

    async def close(self) -> None:
        """End the session and everything it started. Closing twice is fine."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exception: object) -> None: ...


class Interpreter(Protocol):
    """Makes sessions, each an async context manager that closes itself."""

    def session(self) -> InterpreterSession: ...


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model reads after a turn."""

    text: str
    role: Literal["tool", "user"] = "tool"
    """Whether a tool says it or somebody who talks to the model: `ChatFormat.observation` writes them differently."""
    execution: Execution | None = None
    """The run of code that it comes from."""


class EnvironmentSession(Protocol):
    """The environment of one trajectory; an async context manager that closes itself."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the trajectory keeps of the session when it ends: JSON values."""
        ...

    async def take(self, turn: str, *, seed: int, limit: StopReason | None) -> Reply | StopReason:
        """Act on one turn of the model.

        Args:
            turn: what the model wrote.
            seed: fixes what the environment draws for this turn.
            limit: the limit that this turn has used up, so that the model will not read a reply; None if it will.

        Returns:
            What the model reads next, always so if `limit` is None and the trajectory goes on; or why it ends.

        Raises:
            EnvironmentFault: the environment failed through no doing of the model.
        """
        ...

    async def fork(self) -> EnvironmentSession:
        """An independent session with the same state."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exception: object) -> None: ...


@runtime_checkable
class Environment(Protocol):
    """Makes a session for each trajectory."""

    def begin(self, problem: Problem) -> EnvironmentSession: ...


@dataclass(frozen=True)
class CodeEnvironment:
    """The last code block of a turn is run; a boxed answer, or a turn with neither, ends the trajectory."""

    interpreter: Interpreter
    timeout_s: float
    """Seconds that one code block may run."""

    def begin(self, problem: Problem) -> CodeSession:
        return CodeSession(self.interpreter.session(), self.timeout_s)


@dataclass(frozen=True)
class CodeSession:
    session: InterpreterSession
    timeout_s: float

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {}

    async def take(self, turn: str, *, seed: int, limit: StopReason | None) -> Reply | StopReason:
        if answer_of(turn) is not None:
            return StopReason.ANSWERED
        code = code_to_run(turn)
        if code is None:
            return StopReason.NO_CODE
        if limit is not None:
            return limit
        execution = await self.session.execute(code, timeout_s=self.timeout_s)
        if execution.is_fault:
            raise SandboxError("the interpreter was lost through no doing of the code")
        return Reply(execution.text, execution=execution)

    async def fork(self) -> CodeSession:
        return CodeSession(await self.session.fork(), self.timeout_s)

    async def __aenter__(self) -> Self:
        await self.session.__aenter__()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.session.__aexit__(*exception)
