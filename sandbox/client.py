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
        """Wait until no output can be missed.

        Raises:
            SandboxError: the kernel died first.
        """
        self._client.start_channels(stdin=False, hb=False, control=False)
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
        message_id = self._client.execute(_encodable(code), allow_stdin=False, stop_on_error=False)
        cell = asyncio.ensure_future(self._follow(message_id, excerpt))
        stopped_at = None
        try:
            if not await self._settles(cell, timeout_s):
                stopped_at = datetime.now(UTC)
                self._server.signal(self.process, signal.SIGINT)
                if not await self._settles(cell, self._limits.interrupt_grace_s):
                    self.kill()
            if not cell.done():
                await asyncio.wait([cell], timeout=LAST_WORDS_S)
        finally:
            cell.cancel()
        seconds = time.monotonic() - started
        output = self._without_host_paths(excerpt.text())
        if not cell.done() or cell.cancelled():
            if stopped_at is not None:
                return CellResult(output, seconds, is_stopped=True, is_kernel_gone=True)
            code = self.exited.result()
            return CellResult(output, seconds, is_kernel_gone=True, death=_death(code), is_fault=code is None)
        has_error, began, ended = cell.result()
        # A cell that ended in time is no timeout just because this event loop was late to notice.
        is_stopped = stopped_at is not None and ended >= stopped_at
        return CellResult(output, (ended - began).total_seconds(), has_error, is_stopped)

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

    async def _follow(self, message_id: str, excerpt: Excerpt) -> tuple[bool, datetime, datetime]:
        """Collect the output of a cell until the kernel is idle again.

        Returns:
            Whether the cell raised, when it began and when it ended.
        """
        has_error, began = False, datetime.max
        while True:
            message = await self._client.get_iopub_msg()
            if message["parent_header"].get("msg_id") != message_id:
                continue  # late words of a cell that is over
            content, date = message["content"], message["header"]["date"]
            match message["msg_type"]:
                case "stream":
                    excerpt.add(content["text"])
                    excerpt.skip(content.get("num_cut", 0))
                    excerpt.add(content.get("tail", ""))
                case "error":
                    has_error = True
                case "status" if content["execution_state"] == "busy":
                    began = date
                case "status" if content["execution_state"] == "idle":
                    return has_error, began, date

    def _without_host_paths(self, text: str) -> str:
        """Say `.` for the session's directory, and the same names for Python's on every machine."""
        for path, name in {self.process.scratch: ".", **PYTHON_PATHS}.items():
            text = text.replace(path, name)
        return text


async def start_kernel(
    server: ForkServer,
    context: zmq.asyncio.Context,
    directory: Path,
    limits: Limits,
    original: Kernel | None = None,
) -> Kernel:
    """Start a kernel, or copy the `original`, and connect to it.

    Args:
        directory: made for it, for its sockets.

    Raises:
        SandboxError: it did not start.
    """
    directory.mkdir(mode=0o700)
    manager = AsyncKernelManager(
        context=context,
        transport="ipc",
        ip=str(directory / "s"),
        connection_file=str(directory / "connection.json"),
        kernel_spec_manager=SPECS,
        kernel_name="mtpo",
        log=logger,
    )
    manager.provisioner = provisioner = ForkProvisioner(parent=manager)
    provisioner.attach(server, directory, None if original is None else original.process)
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
