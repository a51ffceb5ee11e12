"""One running kernel and the connection to it."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import sysconfig
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import zmq
import zmq.asyncio
from jupyter_client.manager import AsyncKernelManager

from mtpo.errors import SandboxError
from sandbox.excerpt import Excerpt
from sandbox.limits import Limits
from sandbox.provisioner import ForkProvisioner, SandboxKernelSpecs
from sandbox.server import ForkServer, KernelProcess

logger = logging.getLogger(__name__)
logger.setLevel(logging.CRITICAL)  # jupyter_client's words; what goes wrong is raised, and said by the pool
SPECS = SandboxKernelSpecs()
PYTHON_PATHS = {
    sysconfig.get_path("purelib"): "site-packages",
    sysconfig.get_path("stdlib"): "python",
    sys.prefix: "python",
    sys.base_prefix: "python",
}
LAST_WORDS_S = 0.02
"""How long to go on reading what a kernel sent before it died."""
MAX_LATE_TURNS = 100
"""Of the event loop, to take in the messages that have come: several times those of an ordinary cell."""
NOT_A_MESSAGE = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)
"""What jupyter_client, and reading its messages, raise for frames that are none, or not signed."""


class FilelessManager(AsyncKernelManager):
    """A manager whose kernel is told its connection directly, and whose clients it makes itself."""

    def write_connection_file(self, **kwargs: object) -> None:
        """Nobody would read it, and it holds a key."""

    def _connect_control_socket(self) -> None:
        """Kernels are signalled and killed, not asked."""


class CopyError(SandboxError):
    """A kernel cannot be copied as it is; another way to its state may exist."""


@dataclass(frozen=True, slots=True)
class CellResult:
    """What became of one cell."""

    output: str
    seconds: float
    has_error: bool = False
    is_stopped: bool = False
    """The time limit was reached."""
    is_kernel_gone: bool = False
    death: str = ""
    """How the kernel ended, if not by our hand."""
    is_fault: bool = False
    """It ended because its fork server did."""


class Kernel:
    """A kernel that is ready for cells. Made by `start_kernel`."""

    def __init__(
        self,
        manager: AsyncKernelManager,
        process: KernelProcess,
        server: ForkServer,
        limits: Limits,
    ) -> None:
        self._manager = manager
        self._server = server
        self.process = process
        self._limits = limits
        self._client = manager.client(context=manager.context)

    @property
    def exited(self) -> asyncio.Future[int | None]:
        """Done when the process has ended."""
        return self.process.exited

    async def connect(self) -> None:
        """Connect while the kernel starts, and wait until no output can be missed.

        Raises:
            SandboxError: the kernel did not start, or died first.
        """
        self._client.start_channels(stdin=False, hb=False, control=False)
        await asyncio.shield(self.process.listening)
        welcome = asyncio.ensure_future(self._client.get_iopub_msg())
        try:
            await asyncio.wait([welcome, self.exited], return_when="FIRST_COMPLETED")
            if not welcome.done():
                raise SandboxError(f"the kernel died while it started ({_death(self.exited.result())})")
        finally:
            welcome.cancel()

    async def run(self, code: str, timeout_s: float) -> CellResult:
        """Run one cell to its end, its deadline, or the end of the kernel."""
        excerpt = Excerpt(self._limits.max_output_chars)
        started = time.monotonic()
        try:
            message_id = self._client.execute(_encodable(code), allow_stdin=False, stop_on_error=False)
        except zmq.Again:  # the code of an earlier cell has broken the connection
            return CellResult("", 0.0, is_kernel_gone=True, death="it could not be reached any more")
        cell = asyncio.ensure_future(self._follow(message_id, excerpt))
        is_stopped = False
        try:
            if not await self._settles(cell, timeout_s) and not await _settles_late(cell):
                is_stopped = True
                self._server.signal(self.process, signal.SIGINT)
                if not await self._settles(cell, self._limits.interrupt_grace_s):
                    self.kill()
            if not cell.done():
                await asyncio.wait([cell], timeout=LAST_WORDS_S)
        finally:
            cell.cancel()
        seconds = time.monotonic() - started
        output = self._without_host_paths(excerpt.text())
        if cell.done() and not cell.cancelled():
            has_error, own_seconds = cell.result()
            return CellResult(output, min(max(own_seconds, 0.0), seconds), has_error, is_stopped)
        is_lost = self.exited.done() and self.exited.result() is None
        if is_stopped:
            return CellResult(output, seconds, is_stopped=True, is_kernel_gone=True, is_fault=is_lost)
        exit_code = self.exited.result()
        return CellResult(output, seconds, is_kernel_gone=True, death=_death(exit_code), is_fault=is_lost)

    def kill(self) -> None:
        """Kill the kernel and all that it started, without waiting for their end."""
        self._server.signal(self.process, signal.SIGKILL)

    async def shutdown(self) -> None:
        """End the kernel if it lives, and remove its files."""
        await self._manager.shutdown_kernel(now=True)
        self._client.shell_channel.stop()
        self._client.iopub_channel.stop()

    async def _settles(self, cell: asyncio.Future, timeout_s: float) -> bool:
        """Whether the cell, or the kernel, ends within the time."""
        done, _ = await asyncio.wait([cell, self.exited], timeout=timeout_s, return_when="FIRST_COMPLETED")
        return bool(done)

    async def _follow(self, message_id: str, excerpt: Excerpt) -> tuple[bool, float]:
        """Collect the output of a cell until the kernel is idle again.

        What does not follow the protocol is dropped: the code of the model can send whatever it likes.

        Returns:
            Whether the cell raised, and how many seconds it took, both as the kernel says.
        """
        has_error, began = False, datetime.max.replace(tzinfo=UTC)
        while True:
            await asyncio.sleep(0)  # a flood of messages would leave no turn to the others of this event loop
            try:
                message = await self._client.get_iopub_msg()
                if message["parent_header"].get("msg_id") != message_id:
                    continue  # late words of a cell that is over
                content, date = message["content"], message["header"]["date"]
                match message["msg_type"]:
                    case "stream":
                        excerpt.add(_text(content["text"]))
                        excerpt.skip(max(0, int(content.get("num_cut", 0))))
                        excerpt.add(_text(content.get("tail", "")))
                    case "error":
                        has_error = True
                    case "status" if content["execution_state"] == "busy":
                        began = date
                    case "status" if content["execution_state"] == "idle":
                        return has_error, (date - began).total_seconds()
            except NOT_A_MESSAGE:
                continue

    def _without_host_paths(self, text: str) -> str:
        """Say `.` for the session's directory, and the same names for Python's on every machine."""
        for path, name in {self.process.scratch: ".", **PYTHON_PATHS}.items():
            text = text.replace(path, name)
        return text


async def start_kernel(
    server: ForkServer,
    context: zmq.asyncio.Context,
    address: Path,
    limits: Limits,
    original: Kernel | None = None,
) -> Kernel:
    """Start a kernel, or copy the `original`, and connect to it.

    Args:
        address: the beginning of the path of its sockets.

    Raises:
        SandboxError: it did not start.
    """
    manager = FilelessManager(
        context=context,
        kernel_spec_manager=SPECS,
        kernel_name="mtpo",
        connection_file=f"{address}.json",
        log=logger,
    )
    manager.provisioner = provisioner = ForkProvisioner(parent=manager)
    provisioner.attach(server, address, None if original is None else original.process)
    kernel = None
    try:
        await manager.start_kernel()
        assert provisioner.process is not None
        kernel = Kernel(manager, provisioner.process, server, limits)
        await kernel.connect()
    except BaseException:
        await asyncio.shield(manager.shutdown_kernel(now=True) if kernel is None else kernel.shutdown())
        raise
    return kernel


async def _settles_late(cell: asyncio.Future) -> bool:
    """Whether a cell has ended of which this event loop, busy with other things, has not heard yet."""
    for _ in range(MAX_LATE_TURNS):
        if cell.done():
            return True
        await asyncio.sleep(0)
    return False


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"not a text: {type(value).__name__}")
    return value


def _encodable(code: str) -> str:
    return code.encode("utf-8", "replace").decode()


def _death(code: int | None) -> str:
    """How a kernel ended, in words for the model."""
    if code is None:
        return "killed from outside"
    if code >= 0:
        return f"exit code {code}"
    if code == -signal.SIGXCPU:
        return "too much CPU time"
    return f"signal {signal.Signals(-code).name}"
