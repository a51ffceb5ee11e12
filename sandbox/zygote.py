"""The fork server: one process that owns the kernels of a pool and makes each of them in milliseconds.

It imports what every session needs, before it has a thread, a socket or an event loop, and forks a kernel
on request. It learns of a kernel's end from its pidfd and of its owner's end from the closed control
socket; then it kills what is left and removes the pool's directory. Nothing outlives it either: kernels
ask to be killed with their parent.

One JSON object a packet. Requests: {"start": id, "directory": path}, {"signal": number, "id": id}.
Events: {"event": "ready" | "listening" | "failed" | "exited", "id", "error", "code"}.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import json
import os
import selectors
import shutil
import signal
import socket
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from sandbox.confine import die_with, enter
from sandbox.limits import Limits

MAX_PACKET_BYTES = 2**16
ROOT = str(Path(__file__).resolve().parents[1])
PYTHON = (sys.executable, "-s", "-P", "-c")
BOOT = f"import sys; sys.path.insert(0, {ROOT!r}); from sandbox.zygote import {{}}; {{}}()"


def command(entry: str, *args: str) -> list[str]:
    """The command line that runs function `entry` of this module in a fresh interpreter."""
    return [*PYTHON, BOOT.format(entry, entry), *args]


@dataclass(frozen=True, slots=True)
class Child:
    id: int
    pid: int
    pidfd: int

    def signal(self, signum: int) -> None:
        """Send a signal to the kernel and everything in its process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signum)


class Zygote:
    def __init__(self, control: socket.socket, limits: Limits, is_stock: bool) -> None:
        self._control = control
        self._limits = limits
        self._app: Any = None
        self._is_stock = is_stock
        self._children: dict[int, Child] = {}
        self._selector = selectors.DefaultSelector()

    def prepare(self, directory: Path, preload: list[str]) -> None:
        """Import what the sessions share.

        Raises:
            RuntimeError: a preloaded module started a thread, so that forks would be broken.
        """
        for name in preload:
            importlib.import_module(name)
        if not self._is_stock:
            from sandbox.kernel import ForkedKernelApp, configuration

            self._app = ForkedKernelApp.instance(config=configuration())
            self._app.prepare(directory, self._limits)
        num_threads = len(os.listdir("/proc/self/task"))
        if num_threads != 1:
            raise RuntimeError(
                f"preloading {preload} started {num_threads - 1} threads: forks would be broken"
            )
        gc.collect()
        gc.freeze()  # so that collections in the children do not touch, and copy, the shared pages

    def serve(self) -> None:
        """Answer requests until the pool has closed its end, or died."""
        self._send(event="ready")
        self._selector.register(self._control, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.data is not None:
                    self._bury(key.data)
                elif packet := self._receive():
                    self._answer(json.loads(packet))
                else:
                    return

    def kill_all(self) -> None:
        for child in self._children.values():
            child.signal(signal.SIGKILL)
            os.waitpid(child.pid, 0)

    def _answer(self, request: dict[str, Any]) -> None:
        if "start" in request:
            self._fork(request["start"], Path(request["directory"]))
        elif child := self._children.get(request["id"]):
            child.signal(request["signal"])

    def _fork(self, child_id: int, directory: Path) -> None:
        parent_pid = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:  # out of memory or processes: the kernels that run are none the worse
            self._send(event="failed", id=child_id, error=str(error))
            return self._send(event="exited", id=child_id, code=1)
        if pid == 0:
            self._become_kernel(child_id, directory, parent_pid)
        child = Child(child_id, pid, os.pidfd_open(pid))
        self._children[child_id] = child
        self._selector.register(child.pidfd, selectors.EVENT_READ, child)

    def _become_kernel(self, child_id: int, directory: Path, parent_pid: int) -> NoReturn:
        """Run a kernel in this new process, and never come back."""
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            fd = self._control.fileno()
            enter(directory / "work", parent_pid, keep_fd=fd)
            if self._is_stock:
                os.set_inheritable(fd, True)
                config = {
                    "id": child_id,
                    "fd": fd,
                    "directory": str(directory),
                    "limits": dataclasses.asdict(self._limits),
                }
                os.execv(sys.executable, command("run_stock", json.dumps(config)))
            from sandbox.kernel import run_forked

            run_forked(
                self._app, directory / "connection.json", self._limits, reporter(self._control, child_id)
            )
        except BaseException:
            send(self._control, event="failed", id=child_id, error=traceback.format_exc()[-1000:])
        finally:
            os._exit(0)

    def _bury(self, child: Child) -> None:
        """Reap a dead kernel, after killing what it left behind: until then its group id is not reused."""
        child.signal(signal.SIGKILL)
        _, status = os.waitpid(child.pid, 0)
        self._selector.unregister(child.pidfd)
        os.close(child.pidfd)
        del self._children[child.id]
        self._send(event="exited", id=child.id, code=os.waitstatus_to_exitcode(status))

    def _receive(self) -> bytes:
        try:
            return self._control.recv(MAX_PACKET_BYTES)
        except ConnectionResetError:  # the owner died with mail unread
            return b""

    def _send(self, **event: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # the owner is gone: the next recv says so
            send(self._control, **event)


def send(control: socket.socket, **event: Any) -> None:
    control.send(json.dumps(event).encode())


def reporter(control: socket.socket, child_id: int) -> Any:
    """A function that says once that the kernel listens, and then gives up the line to the pool."""

    def report() -> None:
        send(control, event="listening", id=child_id)
        control.close()

    return report


def run_stock() -> None:
    """Entry point of a stock kernel."""
    from sandbox import kernel

    config = json.loads(sys.argv[1])
    control = socket.socket(fileno=config["fd"])
    os.set_inheritable(config["fd"], False)
    connection_file = Path(config["directory"]) / "connection.json"
    kernel.run_stock(connection_file, Limits(**config["limits"]), reporter(control, config["id"]))


def main() -> None:
    """Entry point of the fork server; its one argument is a JSON object."""
    config = json.loads(sys.argv[1])
    control = socket.socket(fileno=config["fd"])
    # Two signs of one event: the socket is closed, and if the owner has forked, so that it is not, the signal.
    signal.signal(signal.SIGTERM, lambda *_: control.shutdown(socket.SHUT_RD))
    die_with(config["parent_pid"], signal.SIGTERM)
    limits, directory = Limits(**config["limits"]), Path(config["directory"])
    zygote = Zygote(control, limits, is_stock=config["kernel"] == "ipykernel")
    try:
        zygote.prepare(directory, config["preload"])
        zygote.serve()
        zygote.kill_all()
        shutil.rmtree(directory, ignore_errors=True)
    except Exception as error:
        zygote.kill_all()
        send(control, event="failed", id=None, error=f"{type(error).__name__}: {error}")
