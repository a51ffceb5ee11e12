"""The pool's end of the fork server: starts it, asks it for kernels, hears of their ends."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtpo.errors import SandboxError
from sandbox.cgroup import Cgroups
from sandbox.confine import scrubbed_environment
from sandbox.layers import LAYERS, Isolation, judge, wanted_layers
from sandbox.limits import Limits
from sandbox.zygote import CHANNELS, MAX_PACKET_BYTES, command

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 5.0


@dataclass(slots=True)
class KernelProcess:
    """A kernel that the fork server owns."""

    id: int
    listening: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    """Done when its sockets are bound; a SandboxError when it failed before."""
    exited: asyncio.Future[int | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    """Its exit code, as `subprocess` counts them; None if it went down with the fork server."""
    is_doomed: bool = False
    scratch: str = ""
    """Its working directory, known once it is listening."""


class ForkServer:
    """One fork server process with its guardian, restarted when it is found dead. Belongs to one event loop."""

    def __init__(
        self,
        directory: Path,
        limits: Limits,
        kernel: str = "zygote",
        preload: tuple[str, ...] = (),
        isolation: Isolation = "available",
    ) -> None:
        self._directory = directory
        self._limits = limits
        self._kernel = kernel
        self._preload = preload
        self._isolation = isolation
        self._wanted = wanted_layers(isolation)
        self._ids = itertools.count()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._ready: asyncio.Future[None] | None = None
        self._kernels: dict[int, KernelProcess] = {}
        self._cgroups: Cgroups | None = None
        self._outbox: deque[tuple[bytes, list[int]]] = deque()
        """Requests that wait until the process has read earlier ones, with descriptors that go along."""
        self.missing: dict[str, str] = {}
        """Layers that were tried and cannot be had on this machine, with the reasons."""

    @property
    def layers(self) -> dict[str, str | None]:
        """For each layer None if it is in force, else why it is not. Complete once a kernel runs."""
        return {name: None if name in self._wanted else "switched off" for name in LAYERS} | self.missing

    def start(self) -> asyncio.Future[None]:
        """Start the process unless it runs.

        Returns:
            Done when it is ready to fork; a SandboxError when it ended before.
        """
        if self._ready is None:
            self._ready = asyncio.get_running_loop().create_future()
            self._ready.add_done_callback(_retrieve)
            self._make_cgroups()
            self._spawn()
        return self._ready

    def _make_cgroups(self) -> None:
        if "cgroup" not in self._wanted or self._cgroups is not None:
            return
        try:
            self._cgroups = Cgroups(self._limits)
        except OSError as error:
            self.missing["cgroup"] = str(error)

    def _spawn(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        config = {
            "fd": theirs.fileno(),
            "parent_pid": os.getpid(),
            "directory": str(self._directory),
            "limits": dataclasses.asdict(self._limits),
            "kernel": self._kernel,
            "preload": self._preload,
            "layers": sorted(self._wanted - set(self.missing)),
            "cgroup": None if self._cgroups is None else str(self._cgroups.path),
        }
        with theirs:
            self._process = subprocess.Popen(
                command("guardian", "main", json.dumps(config)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=scrubbed_environment(self._directory),
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C in a terminal is for the owner, who then closes the pool
            )
        asyncio.get_running_loop().add_reader(self._control, self._on_readable)

    async def launch(
        self, connection: dict[str, Any], original: KernelProcess | None = None
    ) -> KernelProcess:
        """Start a kernel; `listening` says when it answers.

        Args:
            connection: what is in a Jupyter connection file; its sockets are bound here.
            original: the kernel to copy; None for a fresh one.

        Raises:
            SandboxError: the fork server itself would not start.
        """
        await asyncio.shield(self.start())
        process = KernelProcess(next(self._ids))
        process.listening.add_done_callback(_retrieve)
        self._kernels[process.id] = process
        request = {"start": process.id, "connection": connection}
        if original is not None:
            request["fork_of"] = original.id
        with contextlib.ExitStack() as sockets:
            listening = [sockets.enter_context(_listen(connection, channel)) for channel in CHANNELS]
            fds = [each.fileno() for each in listening]
            if self._cgroups is not None:
                fds.append(self._cgroups.make(process.id))
                sockets.callback(os.close, fds[-1])
            self._request(request, fds)
        return process

    def signal(self, process: KernelProcess, signum: int) -> None:
        """Signal a kernel and all that it started; one that has ended, or is being killed, is left alone."""
        if not process.exited.done() and not process.is_doomed:
            process.is_doomed = signum == signal.SIGKILL
            self._request({"id": process.id, "signal": signum})

    def kill(self) -> None:
        """Kill the fork server, and with it every kernel."""
        if self._process is not None:
            self._process.kill()

    async def aclose(self) -> None:
        """End the process, its kernels and everything in its directory."""
        process = self._process
        self._lose("the fork server was closed")
        if process is not None:
            try:
                await asyncio.to_thread(process.wait, STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                await asyncio.to_thread(process.wait)
        if self._cgroups is not None:
            self._cgroups.close()

    def _request(self, request: dict[str, object], fds: Sequence[int] = ()) -> None:
        if self._control is not None:
            self._outbox.append((json.dumps(request).encode(), [os.dup(fd) for fd in fds]))
            self._send_mail()

    def _send_mail(self) -> None:
        assert self._control is not None
        loop = asyncio.get_running_loop()
        while self._outbox:
            packet, fds = self._outbox[0]
            try:
                socket.send_fds(self._control, [packet], fds)
            except BlockingIOError:
                return loop.add_writer(self._control, self._send_mail)
            except OSError:  # it is dead, and the reader is about to hear of it
                break
            _close(self._outbox.popleft()[1])
        loop.remove_writer(self._control)

    def _on_readable(self) -> None:
        control = self._control
        assert control is not None
        with contextlib.suppress(BlockingIOError):
            while control is self._control:  # an event may end this connection
                try:
                    packet = control.recv(MAX_PACKET_BYTES)
                except ConnectionError:
                    packet = b""
                if not packet:
                    return self._lose("the fork server died")
                self._on_event(json.loads(packet))

    def _on_event(self, event: dict[str, Any]) -> None:
        match event:
            case {"event": "ready"}:
                self._accept()
            case {"event": "missing", "reasons": reasons}:
                self._do_without(reasons)
            case {"event": "failed", "id": None, "error": error}:
                self._lose(f"the fork server failed: {error}")
            case {"event": "listening", "id": int(id), "directory": directory} if id in self._kernels:
                self._kernels[id].scratch = directory
                _resolve(self._kernels[id].listening, None)
            case {"event": "failed", "id": int(id), "error": error} if id in self._kernels:
                _fail(self._kernels[id].listening, f"the kernel did not start: {error}")
            case {"event": "exited", "id": int(id), "code": code}:
                kernel = self._kernels.pop(id)
                _fail(kernel.listening, f"the kernel ended with code {code} while it started")
                _resolve(kernel.exited, code)
                if self._cgroups is not None:
                    self._cgroups.remove(id)

    def _accept(self) -> None:
        """Take the process into service, if what it lacks is not too much for the policy."""
        assert self._ready is not None
        try:
            _warn_once(judge(self._isolation, self.missing))
        except SandboxError as error:
            self._lose(str(error))
        else:
            self._ready.set_result(None)

    def _do_without(self, reasons: dict[str, str]) -> None:
        """Start again with fewer layers, if only to learn of everything that is missing."""
        self.missing |= reasons
        self._hang_up()
        self._spawn()

    def _lose(self, reason: str) -> None:
        """The process is gone, or about to be: all that it owned is gone too."""
        if self._control is None:
            return
        assert self._ready is not None
        self._hang_up()
        _fail(self._ready, reason)
        for kernel in self._kernels.values():
            _fail(kernel.listening, reason)
            _resolve(kernel.exited, None)
        self._kernels.clear()
        self._ready = None

    def _hang_up(self) -> None:
        assert self._control is not None and self._process is not None
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._control)
        loop.remove_writer(self._control)
        self._control.close()
        loop.run_in_executor(None, self._process.wait)
        while self._outbox:
            _close(self._outbox.popleft()[1])
        self._control = self._process = None


def _listen(connection: dict[str, Any], channel: str) -> socket.socket:
    """Open the socket of a channel for a kernel that may not open any."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    path = Path(f"{connection['ip']}-{connection[f'{channel}_port']}")
    path.unlink(missing_ok=True)  # of the kernel before, when this one is a restart
    listening.bind(str(path))
    listening.listen()
    return listening


@functools.cache
def _warn_once(text: str | None) -> None:
    if text is not None:
        logger.warning(text)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _resolve(future: asyncio.Future, value: object) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future, reason: str) -> None:
    if not future.done():
        future.set_exception(SandboxError(reason))


def _retrieve(future: asyncio.Future) -> None:
    """Mark an exception as seen: whether anybody still waits for it is not an error."""
    if not future.cancelled():
        future.exception()
