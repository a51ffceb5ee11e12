"""The pool of interpreter sessions."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import logging
import os
import tempfile
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Literal, get_args

import zmq.asyncio

from mtpo.errors import InputError, SandboxError
from mtpo.trajectory import Execution
from sandbox.client import Kernel, start_kernel
from sandbox.limits import Limits
from sandbox.provisioner import remove_tree
from sandbox.server import ForkServer
from sandbox.session import Session

logger = logging.getLogger(__name__)

KernelKind = Literal["zygote", "ipykernel"]
START_ATTEMPTS = 3
MAX_SOCKET_PATH_BYTES = 107  # sun_path of <sys/un.h>, less its final zero
LONGEST_SOCKET_NAME = "/mtpo-12345678/1000000/s-5"


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

    Raises:
        InputError: `size`, `kernel` or `preload` is not as described.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        size: int = 16,
        kernel: KernelKind = "zygote",
        preload: Sequence[str] = ("numpy", "sympy"),
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
        self._kind = kernel
        self._preload = tuple(preload) if kernel == "zygote" else ()
        self._slots = asyncio.Semaphore(size)
        # A start waits about half of its time; many more at once only make each of them late.
        self._starts = asyncio.Semaphore(min(size, 2 * (os.cpu_count() or 1)))
        self._numbers = itertools.count()
        self._sessions: set[Session] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._is_open = False

    async def __aenter__(self) -> InterpreterPool:
        self._directory = Path(tempfile.mkdtemp(prefix="mtpo-", dir=_socket_base()))
        self._context = zmq.asyncio.Context()
        self._context.setsockopt(zmq.LINGER, 0)
        # Nobody needs larger messages, and who sends one is cut off before it fills this process's memory.
        self._context.setsockopt(zmq.MAXMSGSIZE, 2**20 + 16 * self.limits.max_output_chars)
        self._server = ForkServer(self._directory, self.limits, self._kind, self._preload)
        self._server.start()
        self._is_open = True
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
        self._context.destroy(linger=0)
        await remove_tree(self._directory)

    def session(self) -> Session:
        """A new session; its kernel starts with its first cell."""
        return Session(self)

    async def acquire_slot(self, session: Session) -> None:
        """Wait for one of the `size` kernels.

        Raises:
            SandboxError: the pool is not open.
        """
        self._check_open()
        await self._slots.acquire()
        self._sessions.add(session)

    def release_slot(self, session: Session) -> None:
        self._sessions.discard(session)
        self._slots.release()

    async def start_kernel(self) -> Kernel:
        """A fresh kernel.

        Raises:
            SandboxError: none would start, also when tried again; or the pool is not open.
        """
        failure = ""
        async with self._starts:
            for attempt in range(1, START_ATTEMPTS + 1):
                self._check_open()
                directory = self._directory / str(next(self._numbers))
                try:
                    async with asyncio.timeout(self.limits.startup_timeout_s):
                        return await start_kernel(self._server, self._context, directory, self.limits)
                except TimeoutError:
                    failure = f"not ready after {self.limits.startup_timeout_s:g} s"
                except (SandboxError, OSError) as error:
                    failure = str(error)
                logger.warning("kernel start %d of %d failed: %s", attempt, START_ATTEMPTS, failure)
        raise SandboxError(f"no kernel would start in {START_ATTEMPTS} attempts: {failure}")

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


def _socket_base() -> str:
    """A temporary directory short enough for the addresses of sockets.

    Raises:
        SandboxError: there is none.
    """
    room = MAX_SOCKET_PATH_BYTES - len(LONGEST_SOCKET_NAME)
    candidates = dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"))
    for base in candidates:
        if len(os.fsencode(base)) <= room and os.access(base, os.W_OK | os.X_OK):
            return base
    raise SandboxError(f"no writable directory of at most {room} bytes for sockets among {list(candidates)}")
