"""One running kernel and the connection to it."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jupyter_client.manager import AsyncKernelManager

from mtpo.errors import SandboxError
from sandbox.excerpt import Excerpt
from sandbox.limits import Limits
from sandbox.messages import LeanSession
from sandbox.provisioner import ForkProvisioner, SandboxKernelSpecs
from sandbox.server import ForkServer, KernelProcess
from sandbox.zmtp import SUBSCRIBE, Peer, encode

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
MAX_LATE_READS = 8
"""Of what a kernel has published by the deadline of a cell."""
LATEST = datetime.max.replace(tzinfo=UTC)
NOT_A_MESSAGE = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)
"""What jupyter_client, and reading its messages, raise for frames that are none, or not signed."""


class PoolManager(AsyncKernelManager):
    """A manager whose kernel is told its connection directly, and is signalled and killed, not asked.

    Starts and ends at once: each time jupyter_client's own waits 10 ms, for its tests.
    """

    def write_connection_file(self, **kwargs: object) -> None:
        """Nobody would read it, and it holds a key."""

    def _connect_control_socket(self) -> None:
        """Nobody would use it."""

    async def start_kernel(self, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        command, kwargs = await self._async_pre_start_kernel(**kwargs)
        await self._async_launch_kernel(command, **kwargs)
        await self._async_post_start_kernel(**kwargs)

    async def shutdown_kernel(self) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        await self._async_kill_kernel()
        await self._async_cleanup_resources()


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


@dataclass(slots=True)
class Cell:
    """A cell that runs."""

    message_id: str
    excerpt: Excerpt
    ended: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Done when the kernel is idle again, or gone."""
    has_error: bool = False
    began: datetime = LATEST
    seconds: float | None = None
    """What it took, as the kernel says; None before it is idle again."""

    def take(self, kind: str, content: dict[str, Any], date: str) -> None:
        """Take in what the kernel publishes of it. What is of another kind is dropped."""
        match kind:
            case "stream":
                self.excerpt.add(_text(content["text"]))
                self.excerpt.skip(max(0, int(content.get("num_cut", 0))))
                self.excerpt.add(_text(content.get("tail", "")))
            case "error":
                self.has_error = True
            case "iopub_welcome":
                self.end()
            case "status" if content["execution_state"] == "busy":
                self.began = datetime.fromisoformat(date)
            case "status" if content["execution_state"] == "idle":
                self.seconds = (datetime.fromisoformat(date) - self.began).total_seconds()
                self.end()

    def end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


class Kernel:
    """A kernel that is ready for cells. Made by `start_kernel`."""

    def __init__(
        self,
        manager: PoolManager,
        process: KernelProcess,
        server: ForkServer,
        limits: Limits,
    ) -> None:
        self._manager = manager
        self._session = manager.session
        self._server = server
        self.process = process
        self._limits = limits
        self._shell, self._news = (
            self._connect(manager.shell_port, "DEALER"),
            self._connect(manager.iopub_port, "SUB"),
        )
        self._news.send(encode([SUBSCRIBE]))
        self._cell = Cell("", Excerpt(0))  # no one's, whose first news is that all will be heard from now on
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._news.connection, self._take_news)
        self._loop.add_reader(self._shell.connection, self._drop_replies)
        self._is_reachable = True
        process.exited.add_done_callback(lambda _: self._loop.call_later(LAST_WORDS_S, self._cell.end))

    def _connect(self, port: int, kind: str) -> Peer:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(f"{self._manager.ip}-{port}")
        # Nobody needs larger messages: who sends them may not fill this process's memory.
        return Peer(connection, kind, max_message_bytes=2**16 + 16 * self._limits.max_output_chars)

    @property
    def exited(self) -> asyncio.Future[int | None]:
        """Done when the process has ended."""
        return self.process.exited

    async def connect(self) -> None:
        """Wait until the kernel has started, and no output can be missed.

        Raises:
            SandboxError: the kernel did not start, or died first.
        """
        await self._cell.ended
        if self.exited.done():
            raise SandboxError(f"the kernel died while it started ({_death(self.exited.result())})")

    async def run(self, code: str, timeout_s: float) -> CellResult:
        """Run one cell to its end, its deadline, or the end of the kernel."""
        started = time.monotonic()
        request = self._session.msg(
            "execute_request",
            {"code": _encodable(code), "silent": False, "store_history": True, "stop_on_error": False},
        )
        cell = self._cell = Cell(request["msg_id"], Excerpt(self._limits.max_output_chars))
        if not self._is_reachable:  # the code of an earlier cell has broken the connection
            return CellResult("", 0.0, is_kernel_gone=True, death="it could not be reached any more")
        self._shell.send(encode(self._session.serialize(request)))
        if self._shell.has_unsent:  # a very long cell
            self._loop.add_writer(self._shell.connection, self._send_rest)
        is_stopped = False
        if not await self._ends(timeout_s):
            is_stopped = True
            self._server.signal(self.process, signal.SIGINT)
            if not await self._ends(self._limits.interrupt_grace_s):
                self.kill()
                await self._ends(LAST_WORDS_S)
        seconds = time.monotonic() - started
        output = self._without_host_paths(cell.excerpt.text())
        if cell.seconds is not None:
            return CellResult(output, min(max(cell.seconds, 0.0), seconds), cell.has_error, is_stopped)
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
        self._loop.remove_reader(self._news.connection)
        self._loop.remove_reader(self._shell.connection)
        self._loop.remove_writer(self._shell.connection)
        self._shell.connection.close()
        self._news.connection.close()
        await self._manager.shutdown_kernel()

    async def _ends(self, timeout_s: float) -> bool:
        """Whether the cell, or the kernel, ends within the time."""
        ended = self._cell.ended
        await asyncio.wait([ended], timeout=timeout_s)
        for _ in range(MAX_LATE_READS):
            if not ended.done():
                self._take_news()  # this event loop may have been busy with other things
        return ended.done()

    def _send_rest(self) -> None:
        self._shell.flush()
        if not self._shell.has_unsent:
            self._loop.remove_writer(self._shell.connection)

    def _take_news(self) -> None:
        """Take in some of what the kernel has published.

        What does not follow the protocol, or belongs to a cell that is over, is dropped: the code of the model can
        send whatever it likes.
        """
        if self._news.connection.fileno() < 0:  # shut down, while a cell ran
            return
        try:
            messages = self._news.receive()
        except OSError:  # and so its process will soon be, or its time is up
            self._is_reachable = False
            self._loop.remove_reader(self._news.connection)
            return
        for frames in messages:
            try:
                _, news = self._session.read(frames)
                if news["parent_header"].get("msg_id", "") == self._cell.message_id:
                    self._cell.take(news["msg_type"], news["content"], news["header"]["date"])
            except NOT_A_MESSAGE:
                continue

    def _drop_replies(self) -> None:
        """Make room for more: they say nothing that was not in the news."""
        try:
            self._shell.receive()
        except OSError:
            self._is_reachable = False
            self._loop.remove_reader(self._shell.connection)

    def _without_host_paths(self, text: str) -> str:
        """Say `.` for the session's directory, and the same names for Python's on every machine."""
        for path, name in {self.process.scratch: ".", **PYTHON_PATHS}.items():
            text = text.replace(path, name)
        return text


async def start_kernel(
    server: ForkServer,
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
    manager = PoolManager(
        session=LeanSession(),
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
        await asyncio.shield(provisioner.process.listening)  # which tells why, if it never will
        kernel = Kernel(manager, provisioner.process, server, limits)
        await kernel.connect()
    except BaseException:
        await asyncio.shield(manager.shutdown_kernel() if kernel is None else kernel.shutdown())
        raise
    return kernel


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
