"""Interpreter pools on a Ray cluster, behind the interface of one."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Self

from mtpo.cluster import Crew
from mtpo.errors import SandboxError
from mtpo.trajectory import Execution
from sandbox.pool import InterpreterPool
from sandbox.session import Session


class PoolActor:
    """One pool, where it runs. Sessions are known by names that the other end chooses."""

    def __init__(self, make: Callable[[], InterpreterPool]) -> None:
        self._make = make
        self._opening: asyncio.Task[InterpreterPool] | None = None
        self._sessions: dict[str, Session] = {}

    async def ping(self) -> None:
        await self._pool()

    async def execute(self, name: str, code: str, timeout_s: float, is_new: bool) -> Execution:
        if is_new:
            self._sessions[name] = (await self._pool()).session()
        return await self._session(name).execute(code, timeout_s)

    async def fork(self, name: str, new_name: str) -> None:
        self._sessions[new_name] = await self._session(name).fork()

    async def close(self, name: str) -> None:
        if name in self._sessions:
            await self._sessions.pop(name).close()

    def _session(self, name: str) -> Session:
        if name not in self._sessions:
            raise SandboxError("the session was lost with its machine")
        return self._sessions[name]

    async def _pool(self) -> InterpreterPool:
        if self._opening is None:
            self._opening = asyncio.ensure_future(self._make().__aenter__())
        return await asyncio.shield(self._opening)


class ClusterInterpreter:
    """Sessions on pools, each an actor of its own; an `mtpo.rollout.Interpreter`.

    Use it as an async context manager, from one event loop, after `mtpo.cluster.connect`. A session goes to the pool
    with the fewest and stays there; with a pool all its sessions are lost, which is a fault and no doing of their code.

    Args:
        make: makes a pool, on the machine where it will run.
        num_pools: how many.
        resources: of each, in Ray's words: {"num_cpus": 2}.

    Raises:
        InputError: no pool comes up.
    """

    def __init__(
        self, make: Callable[[], InterpreterPool], num_pools: int, resources: Mapping[str, Any]
    ) -> None:
        self.crew = Crew(PoolActor, make, num_pools, resources)
        self.names = (f"session-{number}" for number in itertools.count())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.crew.aclose()

    def session(self) -> ClusterSession:
        """A new session; a pool hears of it with its first cell."""
        return ClusterSession(self)


class ClusterSession:
    """State that lives as long as one trajectory. Made by `ClusterInterpreter.session`."""

    def __init__(self, interpreter: ClusterInterpreter, pool: int | None = None) -> None:
        self.name = next(interpreter.names)
        self._interpreter = interpreter
        self._crew = interpreter.crew
        self._lease = contextlib.ExitStack()
        self._is_closed = False
        self._pool = pool
        if pool is not None:
            self._lease.enter_context(self._crew.lease("", {pool}))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def execute(self, code: str, timeout_s: float = 5.0) -> Execution:
        """As `Session.execute`.

        Raises:
            LostActorError: the pool is lost, and the session with it.
        """
        if self._is_closed:
            raise SandboxError("the session is closed")
        is_new = self._pool is None
        if is_new:
            await self._crew.until_alive()
            self._pool = self._lease.enter_context(self._crew.lease(""))
        assert self._pool is not None
        return await self._crew.call(self._pool, "execute", self.name, code, timeout_s, is_new)

    async def fork(self) -> ClusterSession:
        """As `Session.fork`."""
        if self._pool is None:
            return self._interpreter.session()
        copy = ClusterSession(self._interpreter, self._pool)
        try:
            await self._crew.call(self._pool, "fork", self.name, copy.name)
        except BaseException:
            await copy.close()
            raise
        return copy

    async def close(self) -> None:
        """End the session and everything it started. Closing twice is fine."""
        if not self._is_closed:
            self._is_closed = True
            self._lease.close()
            if self._pool in self._crew.alive:
                self._crew.tell(self._pool, "close", self.name)
