"""The multi-turn loop: a policy and an interpreter take turns until the policy answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from mtpo.trajectory import Execution


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw one turn."""

    max_tokens: int
    stop_ids: tuple[int, ...]
    """Generation ends after the first of these; the stop id itself is part of what was sampled."""
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    min_p: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """What an engine sampled for one turn."""

    ids: tuple[int, ...]
    logps: tuple[float, ...] | None
    """log p of each id at temperature 1, before any truncation of the distribution, in nats."""
    finish_reason: Literal["stop", "length"]
    """`stop`: the last id is one of the stop ids. `length`: the tokens, or the context, ran out."""


class Engine(Protocol):
    """Token ids in, sampled token ids out. Cancelling a call frees what it held."""

    @property
    def max_context(self) -> int:
        """The longest prompt plus completion, in tokens."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identifies the weights that are served."""
        ...

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, session: str = ""
    ) -> Generation:
        """Sample one turn after `prompt_ids`.

        Args:
            session: the trajectory that the turn belongs to. Turns of one session share a prefix, so an
                engine may keep its cache, or route them to one server.

        Raises:
            EngineError: nothing could be generated.
            InputError: the prompt leaves no room for a single token.
        """
        ...

    def release(self, session: str) -> None:
        """The session will not come back; forget its cache. Unknown sessions are ignored."""
        ...

    async def aclose(self) -> None: ...


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


class Interpreter(Protocol):
    """Makes sessions; `session()` is used as an async context manager."""

    def session(self) -> InterpreterSession: ...
