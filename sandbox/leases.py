"""Sessions held for clients at the far end of a connection that may break.

What a client asks of its session is numbered, so that asking again after a lost answer runs nothing twice. A
session that nobody asks for any more is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Generic, TypeVar

from mtpo.errors import InputError
from mtpo.trajectory import Execution
from sandbox.pool import InterpreterPool
from sandbox.session import Session

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

NUM_ENDED_REMEMBERED = 10_000
"""Sessions of which it is still known how they ended."""
NEVER_THERE = "there was never such a session here"


class NoSuchSession(Exception):
    """The session was never there, or is not any more; the message says which."""


class OutOfTurn(Exception):
    """The number of a call is neither the next one nor that of the last call."""


class NumberedCalls(Generic[Result]):
    """Calls numbered from 1, one after the other, each of which runs once however often it is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._number = 0
        self._request: object = None
        self._task: asyncio.Task[Result] | None = None

    @property
    def is_running(self) -> bool:
        return self._task is not None and not self._task.done()

    def call(
        self, number: int, request: object, start: Callable[[], Coroutine[Any, Any, Result]]
    ) -> asyncio.Task[Result]:
        """Start call `number`, or find it if it has been started. Cancelling who waits does not stop it.

        A call that raises `InputError` has done nothing, and leaves its number to another.

        Args:
            request: equal for two calls of one number that ask for the same thing.

        Raises:
            OutOfTurn: it is not the turn of this number, or the number was used for another request.
        """
        if self._task is not None and number == self._number:
            if request != self._request:
                raise OutOfTurn(f"{self._name} {number} was already used for another request")
            return self._task
        if number != self._number + 1:
            again = f", or {self._number} again" if self._number else ""
            raise OutOfTurn(f"expected {self._name} {self._number + 1}{again}, got {number}")
        if self.is_running:
            raise OutOfTurn(f"{self._name} {self._number} has not ended yet")
        self._number, self._request = number, request
        self._task = asyncio.get_running_loop().create_task(start())
        self._task.add_done_callback(self._settle)
        return self._task

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _settle(self, task: asyncio.Task[Result]) -> None:
        # Reading the exception also tells asyncio that it is not lost when the client never comes back for it.
        if not task.cancelled() and isinstance(task.exception(), InputError):
            self._number, self._task = self._number - 1, None


class Lease:
    """A session, its calls, and when its client was last heard of. Made by `Leases`."""

    def __init__(self, session: Session) -> None:
        self.id = secrets.token_urlsafe(24)
        self.session = session
        self.cells: NumberedCalls[Execution] = NumberedCalls("cell_number")
        self.forks: NumberedCalls[str] = NumberedCalls("fork_number")
        self.num_requests = 0
        self._last_busy = time.monotonic()

    def idle_s(self) -> float:
        """Seconds since a request was open or a call was running."""
        if self.num_requests or self.cells.is_running or self.forks.is_running:
            self._last_busy = time.monotonic()
        return time.monotonic() - self._last_busy

    def touch(self) -> None:
        self._last_busy = time.monotonic()

    async def end(self) -> None:
        """Stop what runs and close the session."""
        self.cells.cancel()
        self.forks.cancel()
        await self.session.close()


class Leases:
    """The sessions that a service holds for its clients.

    Args:
        idle_timeout_s: seconds without a request after which a session is closed; while one of its cells
            waits for a kernel, or runs, it is not idle.
    """

    def __init__(self, pool: InterpreterPool, idle_timeout_s: float) -> None:
        self.pool = pool
        self.idle_timeout_s = idle_timeout_s
        self._open: dict[str, Lease] = {}
        self._ended: OrderedDict[str, str] = OrderedDict()
        self._endings: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._open)

    def open(self, session: Session | None = None) -> Lease:
        """Hold a new session, or one that was forked. Its kernel starts with its first cell."""
        lease = Lease(session or self.pool.session())
        self._open[lease.id] = lease
        return lease

    @contextlib.contextmanager
    def use(self, session_id: str) -> Iterator[Lease]:
        """The session, which is not idle meanwhile.

        Raises:
            NoSuchSession: it was never there, or has ended; also if it ends meanwhile.
        """
        lease = self._open.get(session_id)
        if lease is None:
            raise NoSuchSession(self._ended.get(session_id, NEVER_THERE))
        lease.num_requests += 1
        try:
            yield lease
        except asyncio.CancelledError:
            if session_id in self._ended:  # the call was cancelled, not who waited for it
                raise NoSuchSession(self._ended[session_id]) from None
            raise
        finally:
            lease.num_requests -= 1
            lease.touch()

    def execute(self, lease: Lease, number: int, code: str, timeout_s: float) -> asyncio.Task[Execution]:
        """Run a cell once. See `NumberedCalls.call`."""
        return lease.cells.call(number, code, lambda: lease.session.execute(code, timeout_s))

    def fork(self, lease: Lease, number: int) -> asyncio.Task[str]:
        """Copy the session once; the result is the id of the copy. See `NumberedCalls.call`."""

        async def fork() -> str:
            return self.open(await lease.session.fork()).id

        return lease.forks.call(number, None, fork)

    async def close(self, session_id: str) -> None:
        """End a session and everything it started. Closing twice is fine.

        Raises:
            NoSuchSession: it was never there.
        """
        if session_id not in self._open and session_id not in self._ended:
            raise NoSuchSession(NEVER_THERE)
        await self._end(session_id, "the session was closed")

    async def close_all(self) -> None:
        """End every session; wait also for those whose end has begun already."""
        await asyncio.gather(*(self._end(i, "the service has stopped") for i in list(self._open)))
        await asyncio.gather(*self._endings)

    async def close_idle(self) -> None:
        """Close sessions as they become idle for too long, until cancelled."""
        while True:
            await asyncio.sleep(min(self.idle_timeout_s / 4, 5.0))
            idle = [i for i, lease in self._open.items() if lease.idle_s() > self.idle_timeout_s]
            reason = f"the session expired after {self.idle_timeout_s:g} s without a request"
            for failure in await asyncio.gather(
                *(self._end(i, reason) for i in idle), return_exceptions=True
            ):
                if failure is not None:
                    logger.warning("an idle session was not closed: %s", failure)

    async def _end(self, session_id: str, reason: str) -> None:
        lease = self._open.pop(session_id, None)
        if lease is None:
            return
        self._ended[session_id] = reason
        if len(self._ended) > NUM_ENDED_REMEMBERED:
            self._ended.popitem(last=False)
        ending = asyncio.get_running_loop().create_task(lease.end())
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)
        await asyncio.shield(ending)  # a session that is half closed would keep its kernel for ever
