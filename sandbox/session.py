"""A session of the interpreter: the state of one trajectory."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from mtpo.environment import InterpreterSession
from mtpo.errors import InputError, SandboxError
from mtpo.trajectory import Execution
from sandbox.client import CellResult, CopyError, Kernel

if TYPE_CHECKING:
    from sandbox.pool import InterpreterPool

NO_OUTPUT = "[no output]"
GONE = "all variables are gone"
REPLAY_PATIENCE = 3
"""A replayed cell may take this many times its own time limit: the machine may be busier now."""


@dataclass(frozen=True, slots=True)
class Loss:
    """What became of the state between two cells."""

    notice: str = ""
    """What the model must know of it before the output of the next cell."""
    is_fault: bool = False


class Session:
    """State that lives as long as one trajectory. Made by `InterpreterPool.session`.

    The kernel starts with the first cell. If it dies or has to be killed, the text says so and the next
    cell runs in a fresh one.
    """

    def __init__(self, pool: InterpreterPool) -> None:
        self._pool = pool
        self._kernel: Kernel | None = None
        self._ending: asyncio.Task[None] | None = None
        self._has_slot = False
        self._is_closed = False
        self._lock = asyncio.Lock()
        self._cells: list[tuple[Execution, float]] = []
        """What made the kernel's state: each cell with its time limit."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def execute(self, code: str, timeout_s: float = 5.0) -> Execution:
        """Run one cell. Calls wait for each other.

        Args:
            timeout_s: wall seconds that the cell itself may take; waiting for a kernel does not count.

        Raises:
            SandboxError: no kernel would start, or the session was closed.
            InputError: `timeout_s` is not a positive number.
        """
        if not 0 < timeout_s < math.inf:
            raise InputError(f"timeout_s must be a positive number of seconds, got {timeout_s!r}")
        async with self._lock:
            loss = self._forget_dead_kernel()
            kernel = await self._running_kernel()
            try:
                result = await kernel.run(code, timeout_s)
            except BaseException:  # the cell may still be running
                self._discard_kernel()
                raise
            if self._is_closed:
                raise SandboxError("the session was closed while a cell ran")
            execution = _as_execution(code, result, timeout_s, loss)
            if result.is_kernel_gone:
                self._discard_kernel()
            else:
                self._cells.append((execution, timeout_s))
            return execution

    async def fork(self) -> Session:
        """An independent session with the same state: variables, imports, files, random numbers to come.

        The kernel forks itself. Where it cannot (a stock kernel, threads of the model's own, no seccomp
        supervisor), the cells are run once more in a fresh one, and have to do again what they did. Two
        things stay shared, as in every fork: files that are open, and the room for files.

        Raises:
            SandboxError: neither way led to the same state; all kernels are held by sessions that wait to fork;
                or the session was closed.
            InputError: the pool has room for one kernel only, which this session holds.
        """
        if self._pool.size < 2:
            raise InputError(f"fork() needs a pool of size 2 or more, got size {self._pool.size}")
        async with self._lock:
            self._forget_dead_kernel()
            twin = self._pool.session()
            try:
                if self._kernel is not None:
                    await twin._copy(self, self._kernel, self._cells)
            except BaseException:
                await twin.close()
                raise
            return twin

    async def close(self) -> None:
        """End the session and everything it started. Closing twice is fine."""
        self._is_closed = True
        self._discard_kernel()
        if self._ending is not None:
            await asyncio.shield(self._ending)
        if self._has_slot:
            self._has_slot = False
            self._pool.release_slot(self)

    async def _copy(self, original: Session, kernel: Kernel, cells: list[tuple[Execution, float]]) -> None:
        """Get the state of the original, whose `kernel` has it from running `cells`."""
        await self._pool.acquire_slot(self, original)
        self._has_slot = True
        try:
            await self._running_kernel(original=kernel)
            self._cells = list(cells)
        except CopyError as error:
            try:
                await run_again(self, cells)
            except SandboxError as failure:
                raise SandboxError(
                    f"the session's state cannot be copied ({error}), nor made again: {failure}"
                ) from error

    async def _running_kernel(self, original: Kernel | None = None) -> Kernel:
        if self._ending is not None:
            await asyncio.shield(self._ending)
        if not self._has_slot and not self._is_closed:
            await self._pool.acquire_slot(self)
            self._has_slot = True
        if self._kernel is None and not self._is_closed:
            start = self._pool.start_kernel() if original is None else self._pool.copy_kernel(original)
            self._kernel = await start
        if self._kernel is None or self._is_closed:
            await self.close()  # again: for what has started since
            raise SandboxError("the session is closed")
        return self._kernel

    def _forget_dead_kernel(self) -> Loss:
        """Drop a kernel that died between two cells."""
        if self._kernel is None or not self._kernel.exited.done():
            return Loss()
        had_state, is_fault = bool(self._cells), self._kernel.exited.result() is None
        self._discard_kernel()
        return (
            Loss(f"[the interpreter died since the last cell; {GONE}]\n", is_fault) if had_state else Loss()
        )

    def _discard_kernel(self) -> None:
        """Kill the kernel now and clear up behind it in the background."""
        kernel, self._kernel = self._kernel, None
        self._cells.clear()
        if kernel is not None:
            kernel.kill()
            self._ending = self._pool.in_background(kernel.shutdown())


async def run_again(session: InterpreterSession, cells: Sequence[tuple[Execution, float]]) -> None:
    """Bring a new session to the state that cells, with their time limits, have left elsewhere.

    Raises:
        SandboxError: a cell does something else this time, or could not be run.
    """
    for number, (cell, timeout_s) in enumerate(cells, start=1):
        if cell.status != "timeout":
            again = await session.execute(cell.code, timeout_s * REPLAY_PATIENCE)
            if (again.status, again.text) == (cell.status, cell.text):
                continue
        raise SandboxError(f"cell {number} is not deterministic")


def _as_execution(code: str, result: CellResult, timeout_s: float, loss: Loss) -> Execution:
    """What the model reads: the output, then what became of the interpreter."""
    output = result.output.rstrip()
    if result.is_stopped:
        fate = f"the interpreter was restarted, {GONE}" if result.is_kernel_gone else "variables are kept"
        status, verdict = "timeout", f"[stopped after {timeout_s:g} s, the time limit; {fate}]"
    elif result.is_kernel_gone:
        status, verdict = "died", f"[the interpreter died ({result.death}) and was restarted; {GONE}]"
    else:
        status, verdict = ("error" if result.has_error else "ok"), ("" if output else NO_OUTPUT)
    text = loss.notice + "\n".join(part for part in (output, verdict) if part)
    return Execution(code, text, status, result.seconds, is_fault=loss.is_fault or result.is_fault)
