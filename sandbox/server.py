"""The pool's end of the fork server: starts it, asks it for kernels, hears of their ends."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from mtpo.errors import SandboxError
from sandbox.confine import scrubbed_environment
from sandbox.limits import Limits
from sandbox.zygote import MAX_PACKET_BYTES, command

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


class ForkServer:
    """One fork server process, restarted when it is found dead. Belongs to one event loop."""

    def __init__(self, directory: Path, limits: Limits, kernel: str, preload: tuple[str, ...]) -> None:
        self._directory = directory
        self._limits = limits
        self._kernel = kernel
        self._preload = preload
        self._ids = itertools.count()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._ready: asyncio.Future[None] | None = None
        self._kernels: dict[int, KernelProcess] = {}

    def start(self) -> asyncio.Future[None]:
        """Start the process unless it runs.

        Returns:
            Done when it is ready to fork; a SandboxError when it ended before.
        """
        if self._ready is not None:
            return self._ready
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        config = {
            "fd": theirs.fileno(),
            "parent_pid": os.getpid(),
            "directory": str(self._directory),
            "limits": dataclasses.asdict(self._limits),
            "kernel": self._kernel,
            "preload": self._preload,
        }
        with theirs:
            self._process = subprocess.Popen(
                command("main", json.dumps(config)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=scrubbed_environment(self._directory),
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C in a terminal is for the owner, who then closes the pool
            )
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        self._ready.add_done_callback(_retrieve)
        loop.add_reader(self._control, self._on_readable)
        return self._ready

    async def launch(self, directory: Path) -> KernelProcess:
        """Start a kernel whose sockets `directory/connection.json` names; `listening` says when they work.

        Raises:
            SandboxError: the fork server itself would not start.
        """
        await asyncio.shield(self.start())
        process = KernelProcess(next(self._ids))
        process.listening.add_done_callback(_retrieve)
        self._kernels[process.id] = process
        self._request({"start": process.id, "directory": str(directory)})
        return process

    def signal(self, process: KernelProcess, signum: int) -> None:
        """Signal a kernel and all that it started; one that has ended is left alone."""
        if not process.exited.done():
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

    def _request(self, request: dict[str, object]) -> None:
        if self._control is None:
            return
        try:
            self._control.send(json.dumps(request).encode())
        except OSError:  # dead, or too stuck to read its mail: either way the reader hears of its end
            self.kill()

    def _on_readable(self) -> None:
        assert self._control is not None
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    packet = self._control.recv(MAX_PACKET_BYTES)
                except ConnectionError:
                    packet = b""
                if not packet:
                    return self._lose("the fork server died")
                self._on_event(json.loads(packet))

    def _on_event(self, event: dict[str, object]) -> None:
        match event:
            case {"event": "ready"}:
                assert self._ready is not None
                self._ready.set_result(None)
            case {"event": "failed", "id": None, "error": error}:
                self._lose(f"the fork server failed: {error}")
            case {"event": "listening", "id": int(id)} if id in self._kernels:
                _resolve(self._kernels[id].listening, None)
            case {"event": "failed", "id": int(id), "error": error} if id in self._kernels:
                _fail(self._kernels[id].listening, f"the kernel did not start: {error}")
            case {"event": "exited", "id": int(id), "code": code}:
                kernel = self._kernels.pop(id)
                _fail(kernel.listening, f"the kernel ended with code {code} while it started")
                _resolve(kernel.exited, code)

    def _lose(self, reason: str) -> None:
        """The process is gone, or about to be: all that it owned is gone too."""
        if self._control is None:
            return
        assert self._ready is not None and self._process is not None
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._control)
        self._control.close()
        loop.run_in_executor(None, self._process.wait)
        _fail(self._ready, reason)
        for kernel in self._kernels.values():
            _fail(kernel.listening, reason)
            _resolve(kernel.exited, None)
        self._kernels.clear()
        self._control = self._ready = self._process = None


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
