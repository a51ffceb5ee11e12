"""The pool of interpreter sessions."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import logging
import os
import resource
import threading
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from mtpo.errors import InputError, SandboxError
from mtpo.trajectory import Execution
from sandbox.client import CopyError, Kernel, start_kernel
from sandbox.files import pool_directory, remove_tree
from sandbox.layers import Isolation, wanted_layers
from sandbox.limits import Limits
from sandbox.server import ForkServer
from sandbox.session import Session

logger = logging.getLogger(__name__)

KernelKind = Literal["zygote", "ipykernel"]
PRELOAD = ("numpy", "sympy")
START_ATTEMPTS = 3
COPY_TIMEOUT_S = 5.0
"""Hundreds of times what a copy takes."""
FILES_PER_KERNEL = 4
SPARE_FILES = 256
"""Descriptors of the owner beside those of its kernels."""


@dataclass(frozen=True, slots=True)
class Health:
    """Whether a pool answers."""

    is_healthy: bool
    seconds: float
    """How long a fresh session took to answer, the wait for a free kernel included."""
    num_open: int
    """Sessions that hold a kernel, the probe not counted."""
    num_waiting: int
    """Sessions that wait for one."""
    error: str | None = None


class InterpreterPool:
    """Sessions of a code interpreter; an `mtpo.rollout.Interpreter`.

    Use it as an async context manager, from one event loop. Sessions that are still open at its end are
    closed with it.

    Args:
        limits: bounds on each session.
        size: kernels alive at the same time. A session holds one from its first cell until it is closed;
            others wait their turn, first come first served. A task that forks holds several.
        kernel: "zygote" forks kernels from a process that is warm; "ipykernel" starts stock ones, which
            takes 10 to 20 times as long and as much memory.
        preload: modules that the zygote imports beforehand, so that importing them in a session is free.
        isolation: "full" refuses to open a pool on a machine that lacks a layer of the sandbox; "available"
            goes on with one line of warning; "none" leaves only the limits; names of `sandbox.layers.LAYERS`
            ask for just these.

    Raises:
        InputError: `size`, `kernel`, `preload` or `isolation` is not as described.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        size: int = 16,
        kernel: KernelKind = "zygote",
        preload: Sequence[str] = PRELOAD,
        isolation: Isolation = "available",
    ) -> None:
        if type(size) is not int or size < 1:
            raise InputError(f"size must be a positive integer, got {size!r}")
        if kernel not in get_args(KernelKind):
            raise InputError(f"kernel must be one of {get_args(KernelKind)}, got {kernel!r}")
        for name in preload:
            if importlib.util.find_spec(name.partition(".")[0]) is None:
                raise InputError(f"preload: there is no module {name!r}")
        self.limits = limits or Limits()
        self.size = size
        wanted_layers(isolation)
        self._isolation = isolation
        self._kind = kernel
        self._preload = tuple(preload) if kernel == "zygote" else ()
        self._slots = asyncio.Semaphore(size)
        # A start waits about half of its time; many more at once only make each of them late.
        self._starts = asyncio.Semaphore(min(size, 2 * (os.cpu_count() or 1)))
        self._numbers = itertools.count()
        self._sessions: set[Session] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._forking: set[Session] = set()
        self._num_waiting = 0
        self._is_open = False

    async def __aenter__(self) -> InterpreterPool:
        _make_room_for_files(SPARE_FILES + FILES_PER_KERNEL * self.size)
        self._directory = pool_directory()
        self._server = ForkServer(self._directory, self.limits, self._kind, self._preload, self._isolation)
        ready = self._server.start()
        self._is_open = True
        if self._isolation not in ("available", "none"):
            try:
                await asyncio.shield(ready)
            except BaseException:
                await self.__aexit__()
                raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_open = False
        try:
            await asyncio.gather(*(session.close() for session in list(self._sessions)))
            while self._background:
                await asyncio.wait(self._background)
        finally:
            await asyncio.shield(self._close())

    async def _close(self) -> None:
        await self._server.aclose()
        await asyncio.to_thread(remove_tree, self._directory)

    def session(self) -> Session:
        """A new session; its kernel starts with its first cell."""
        return Session(self)

    async def health(self, timeout_s: float = 30.0) -> Health:
        """Try a cell in a session of its own, which has to answer in time."""
        num_open, num_waiting = len(self._sessions), self._num_waiting
        started, error = time.monotonic(), None
        try:
            async with asyncio.timeout(timeout_s), self.session() as session:
                execution = await session.execute("6 * 7", timeout_s)
                if execution.text != "42":
                    error = f"6 * 7 gave {execution.text!r}"
        except TimeoutError:
            error = f"no answer after {timeout_s:g} s"
        except SandboxError as failure:
            error = str(failure)
        return Health(error is None, time.monotonic() - started, num_open, num_waiting, error)

    async def acquire_slot(self, session: Session, original: Session | None = None) -> None:
        """Wait for one of the `size` kernels.

        Args:
            original: the session that is being forked, which holds one meanwhile.

        Raises:
            SandboxError: the pool is not open; or all kernels are held by sessions that wait for another one to
                fork into, this one included, so that none would ever come.
        """
        self._check_open()
        if original is not None:
            self._forking.add(original)
        try:
            if len(self._forking) == self.size and self._slots.locked():
                raise SandboxError(
                    f"all {self.size} kernels are held by sessions that wait for another to fork into"
                )
            await self._wait_for_slot()
        finally:
            if original is not None:
                self._forking.discard(original)
        self._sessions.add(session)

    async def _wait_for_slot(self) -> None:
        self._num_waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._num_waiting -= 1

    def release_slot(self, session: Session) -> None:
        self._sessions.discard(session)
        self._slots.release()

    @property
    def layers(self) -> dict[str, str | None]:
        """For each layer of the sandbox None if it is in force, else why it is not.

        Complete once a kernel has started.
        """
        return self._server.layers

    async def start_kernel(self) -> Kernel:
        """A fresh kernel.

        Raises:
            SandboxError: none would start, also when tried again; or the pool is not open.
        """
        failure = ""
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                return await self._try_start()
            except (SandboxError, OSError) as error:
                failure = str(error)
                self._check_open()
            logger.warning("kernel start %d of %d failed: %s", attempt, START_ATTEMPTS, failure)
        raise SandboxError(f"no kernel would start in {START_ATTEMPTS} attempts: {failure}")

    async def copy_kernel(self, original: Kernel) -> Kernel:
        """A kernel with the state of `original`, which is between two cells.

        Raises:
            CopyError: it cannot be had; the message says why.
            SandboxError: the pool is not open.
        """
        try:
            return await self._try_start(original)
        except (SandboxError, OSError) as error:
            self._check_open()
            raise CopyError(str(error)) from error

    async def _try_start(self, original: Kernel | None = None) -> Kernel:
        async with self._starts:
            self._check_open()
            address = self._directory / str(next(self._numbers))
            patience_s = self.limits.startup_timeout_s
            if original is not None:  # it may have been made to keep silent
                patience_s = min(patience_s, COPY_TIMEOUT_S)
            try:
                async with asyncio.timeout(patience_s):
                    return await start_kernel(self._server, address, self.limits, original)
            except TimeoutError:
                raise SandboxError(f"not ready after {patience_s:g} s") from None

    def in_background(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run clean-up that the pool waits for at its end, whoever is cancelled meanwhile."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    def _check_open(self) -> None:
        if not self._is_open:
            raise SandboxError("the pool is not open: use it as `async with InterpreterPool() as pool`")


def run_code(code: str, *, timeout_s: float = 5.0) -> Execution:
    """Run one cell in an interpreter of its own. Also works while an event loop runs in this thread.

    Raises:
        SandboxError: the interpreter would not start.
        InputError: `timeout_s` is not a positive number.
    """

    async def run() -> Execution:
        async with InterpreterPool(size=1, preload=()) as pool, pool.session() as session:
            return await session.execute(code, timeout_s)

    result: list[Execution] = []
    error: list[BaseException] = []

    def target() -> None:
        try:
            result.append(asyncio.run(run()))
        except BaseException as caught:
            error.append(caught)

    thread = threading.Thread(target=target, name="run_code")
    thread.start()
    thread.join()
    if error:
        raise error[0]
    return result[0]


def _make_room_for_files(num_files: int) -> None:
    """Let this process, and those it starts, open so many files at a time.

    Raises:
        InputError: the system allows fewer.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < num_files:
        raise InputError(
            f"a pool of this size needs {num_files} open files, but the limit is {hard}: ulimit -n"
        )
    if soft != resource.RLIM_INFINITY and soft < num_files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (num_files, hard))
