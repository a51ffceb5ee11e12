"""The fork server: one process that owns the kernels of a pool and makes each of them in milliseconds.

It imports what every session needs, before it has a thread or an event loop, and forks a kernel on request.
It hears of a kernel's end from its pidfd, and of its owner's end from the closed control socket.

Requests of the owner, one JSON object a packet, the first two with the descriptors of the kernel's three
listening sockets, and of its cgroup if it has one:
    {"start": id, "connection"}, {"start": id, "connection", "fork_of": id}, {"signal": number, "id": id}.
Events: {"event": "ready" | "missing" | "listening" | "failed" | "exited", "id", "reasons", "directory",
"error", "code"}.

Each kernel has a line to the fork server, a socket pair, which carries the same request for a fork and the
kernel's one answer, {"event": "listening" | "failed"}. After that answer the code of the model could write
there too, so nobody reads it any more.
"""

from __future__ import annotations

import array
import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import struct
import sys
import traceback
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from sandbox import seccomp, warmup
from sandbox.cgroup import join
from sandbox.confine import Confinement

CHANNELS = ("shell", "iopub", "control")
"""Of a kernel, in the order of their descriptors."""
MAX_PACKET_BYTES = 2**16
MAX_FDS = 8
MAX_ERROR_CHARS = 1000
ROOT = str(Path(__file__).resolve().parents[1])
PYTHON = (sys.executable, "-s", "-P", "-c")
BOOT = f"import sys; sys.path.insert(0, {ROOT!r}); from sandbox.{{0}} import {{1}}; {{1}}()"
CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: <sys/socket.h>
FORKS_PER_COPY = 3
"""Calls that a kernel makes to copy itself: two forks, so that the copy is an orphan, and a setpgid."""


def command(module: str, entry: str, *args: str) -> list[str]:
    """The command line that runs a function of a module in a fresh interpreter."""
    return [*PYTHON, BOOT.format(module, entry), *args]


@dataclass(slots=True)
class Family:
    """A kernel and the copies of it: they share a filter of system calls, and a scratch file system."""

    id: int
    supervisor: int | None = None
    """Where the kernel asks whether it may start a process."""
    num_allowed: int = 0
    members: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Child:
    id: int
    family: Family
    line: socket.socket
    pid: int = 0
    """0 for a copy that has not answered yet."""
    pidfd: int = -1
    is_doomed: bool = False

    def signal(self, signum: int) -> None:
        """Send a signal to the kernel and everything in its process group."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signum)
            with contextlib.suppress(ProcessLookupError):
                if signum == signal.SIGKILL:  # also if it has left the group
                    signal.pidfd_send_signal(self.pidfd, signum)


class Zygote:
    def __init__(self, control: socket.socket, confinement: Confinement, is_stock: bool) -> None:
        self._control = control
        self._confinement = confinement
        self._kernel: Any = None
        self._is_stock = is_stock
        self._children: dict[int, Child] = {}
        self._selector = selectors.DefaultSelector()

    def prepare(self, preload: list[str]) -> None:
        """Import what the sessions share.

        Raises:
            RuntimeError: a preloaded module started a thread, so that forks would be broken.
        """
        for name in preload:
            importlib.import_module(name)
        warmup.use(preload)
        if not self._is_stock:
            from sandbox import kernel

            self._kernel = kernel.prepare(Path(self._confinement.scratch), self._confinement.limits)
        num_threads = int(self._confinement.read_proc("self/stat").rpartition(")")[2].split()[17])
        if num_threads != 1:
            raise RuntimeError(
                f"preloading {preload} started {num_threads - 1} threads: forks would be broken"
            )
        self._confinement = self._confinement.prepare()
        gc.collect()
        warmup.merge_pages(self._confinement.read_proc("self/maps"))
        gc.freeze()  # so that collections in the children do not touch, and copy, the shared pages

    def probe(self) -> dict[str, str]:
        """Try the layers of a session in a child.

        Returns:
            For each that failed, the reason.
        """
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(write_end, json.dumps(self._confinement.probe()).encode())
            os._exit(0)
        os.close(write_end)
        with open(read_end) as answer:
            missing = answer.read()
        os.waitpid(pid, 0)
        return json.loads(missing)

    def serve(self) -> None:
        """Answer requests until the pool has closed its end, or died."""
        self._send(event="ready")
        self._selector.register(self._control, selectors.EVENT_READ, self._answer)
        while self._control.fileno() >= 0:
            for key, _ in self._selector.select():
                if (
                    self._selector.get_map().get(key.fd) is key
                ):  # no event before has ended what it stands for
                    key.data()
        for child in self._children.values():
            child.signal(signal.SIGKILL)

    def _answer(self) -> None:
        try:
            packet, fds, _, _ = socket.recv_fds(self._control, MAX_PACKET_BYTES, MAX_FDS)
        except ConnectionResetError:  # the owner died with mail unread
            packet, fds = b"", []
        if not packet:
            self._selector.unregister(self._control)
            return self._control.close()
        request = json.loads(packet)
        if "fork_of" in request:
            self._copy(request, fds)
        elif "start" in request:
            self._start(request, fds)
        elif child := self._children.get(request["id"]):
            child.is_doomed = request["signal"] == signal.SIGKILL
            child.signal(request["signal"])
            if child.is_doomed and not child.pid:
                self._abandon(child, "it was not waited for")
        for fd in fds:
            os.close(fd)

    def _start(self, request: dict[str, Any], fds: list[int]) -> None:
        """Fork a kernel."""
        line, far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        zygote_pid = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:  # out of memory or processes: the kernels that run are none the worse
            line.close()
            return self._refuse(request["start"], str(error))
        if pid == 0:
            self._become_kernel(request, far_end, fds, zygote_pid)
        far_end.close()
        child = Child(request["start"], Family(request["start"]), line)
        self._adopt(child, pid)
        self._expect_answer(child)

    def _become_kernel(
        self, request: dict[str, Any], line: socket.socket, fds: list[int], zygote_pid: int
    ) -> NoReturn:
        """Run a kernel in this new process, and never come back."""
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            confinement = self._confinement.of_family(request["start"])
            directory = Path(confinement.scratch) / str(request["start"])
            fds, cgroups = fds[: len(CHANNELS)], fds[len(CHANNELS) :]
            for fd in cgroups:
                join(fd)
            statm = confinement.enter(directory, zygote_pid, keep_fds=[line.fileno(), *fds])
            if self._is_stock:
                self._exec_stock(confinement, request, line, fds, statm)
            from sandbox.kernel import run_forked

            run_forked(self._kernel, confinement, request["connection"], fds, line, statm)
        except BaseException:
            send(line, event="failed", error=traceback.format_exc()[-MAX_ERROR_CHARS:])
        finally:
            os._exit(0)

    def _copy(self, request: dict[str, Any], fds: list[int]) -> None:
        """Ask a kernel to fork itself."""
        original = self._children.get(request["fork_of"])
        if original is None or self._is_stock:
            reason = "a stock kernel cannot fork" if self._is_stock else "the original has ended"
            return self._refuse(request["start"], reason)
        line, far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        child = Child(request["start"], original.family, line)
        self._children[child.id] = child
        self._expect_answer(child)
        original.family.num_allowed = FORKS_PER_COPY
        request["parent_pid"] = os.getpid()
        with far_end, contextlib.suppress(OSError):  # dead, or tampered with: then no copy will answer
            original.line.setblocking(False)
            socket.send_fds(original.line, [json.dumps(request).encode()], [far_end.fileno(), *fds])

    def _adopt(self, child: Child, pid: int) -> None:
        child.pid, child.pidfd = pid, os.pidfd_open(pid)
        child.family.members.add(child.id)
        self._children[child.id] = child
        self._selector.register(child.pidfd, selectors.EVENT_READ, partial(self._bury, child))

    def _expect_answer(self, child: Child) -> None:
        self._selector.register(child.line, selectors.EVENT_READ, partial(self._hear, child))

    def _hear(self, child: Child) -> None:
        """Take the one answer of a kernel. That of a copy is not to be trusted: the model may have written it."""
        is_copy = child.pid == 0
        answer, pid, fds = _receive_answer(child.line)
        self._selector.unregister(child.line)
        if is_copy and answer and not child.is_doomed and self._is_new_orphan(pid):
            self._adopt(child, pid)
            child.family.num_allowed = 0
        elif is_copy:
            return self._abandon(child, answer.get("error"))
        if fds and not is_copy:
            child.family.supervisor = fds.pop()
            self._selector.register(
                child.family.supervisor, selectors.EVENT_READ, partial(self._supervise, child.family)
            )
        for fd in fds:
            os.close(fd)
        if answer.get("event") == "listening":
            directory = self._confinement.of_family(child.family.id).scratch
            self._send(event="listening", id=child.id, directory=f"{directory}/{child.id}")
        elif answer:
            self._send(event="failed", id=child.id, error=str(answer.get("error"))[:MAX_ERROR_CHARS])

    def _is_new_orphan(self, pid: int) -> bool:
        """Whether the process is a child of this one that it does not know yet."""
        if any(child.pid == pid for child in self._children.values()):
            return False
        try:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        return True

    def _refuse(self, kernel_id: int, reason: str) -> None:
        self._send(event="failed", id=kernel_id, error=reason)
        self._send(event="exited", id=kernel_id, code=1)

    def _supervise(self, family: Family) -> None:
        assert family.supervisor is not None
        family.num_allowed = seccomp.supervise(family.supervisor, family.num_allowed)

    def _bury(self, child: Child) -> None:
        """Reap a dead kernel, after killing what it left behind: until then its group id is not reused."""
        child.signal(signal.SIGKILL)
        _, status = os.waitpid(child.pid, 0)
        self._selector.unregister(child.pidfd)
        os.close(child.pidfd)
        family = child.family
        family.members.discard(child.id)
        if not family.members and family.supervisor is not None:
            self._selector.unregister(family.supervisor)
            os.close(family.supervisor)
            family.supervisor = None
        self._forget(child, os.waitstatus_to_exitcode(status))

    def _abandon(self, copy: Child, reason: Any) -> None:
        """Give up a copy that has not answered, or not as a copy does."""
        copy.family.num_allowed = 0
        self._send(event="failed", id=copy.id, error=str(reason or "no answer")[:MAX_ERROR_CHARS])
        self._forget(copy, 1)

    def _forget(self, child: Child, code: int) -> None:
        if child.line in self._selector.get_map():
            self._selector.unregister(child.line)
        child.line.close()
        del self._children[child.id]
        self._send(event="exited", id=child.id, code=code)
        self._kill_strangers()

    def _kill_strangers(self) -> None:
        """Kill processes whose parent has gone: what a kernel started ends with it, also what ran away."""
        if any(child.pid == 0 for child in self._children.values()):
            return  # one of them may be a copy that is about to answer
        outer_pids = self._confinement.read_proc("thread-self/children").split()
        if len(outer_pids) == len(self._children):
            return
        known = {child.pid for child in self._children.values()}
        for outer_pid in outer_pids:
            status = self._confinement.read_proc(f"{outer_pid}/status")
            [pid] = (int(line.split()[-1]) for line in status.splitlines() if line.startswith("NSpid:"))
            if pid not in known:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def _exec_stock(
        self,
        confinement: Confinement,
        request: dict[str, Any],
        line: socket.socket,
        fds: list[int],
        statm: int,
    ) -> NoReturn:
        """Become a fresh interpreter that runs a stock kernel."""
        read_end, write_end = os.pipe()
        kept = {"listening": fds, "line": line.fileno(), "statm": statm}
        config = {"confinement": confinement.to_json(), "connection": request["connection"], **kept}
        os.write(write_end, json.dumps(config).encode())
        for fd in (read_end, line.fileno(), statm, *fds):
            os.set_inheritable(fd, True)
        os.execv(sys.executable, command("stock", "run", str(read_end)))

    def _send(self, **event: Any) -> None:
        with contextlib.suppress(OSError):  # the owner is gone: the next recv says so
            send(self._control, **event)


def send(line: socket.socket, *fds: int, **event: Any) -> None:
    socket.send_fds(line, [json.dumps(event).encode()], fds)


def _receive_answer(line: socket.socket) -> tuple[dict[str, Any], int, list[int]]:
    """The event, empty if there is none; the process that sent it; the descriptors that came along."""
    pid, fds = 0, array.array("i")
    room = socket.CMSG_SPACE(CREDENTIALS.size) + socket.CMSG_SPACE(MAX_FDS * fds.itemsize)
    try:
        packet, ancillary, _, _ = line.recvmsg(MAX_PACKET_BYTES, room)
        event = json.loads(packet)
    except (OSError, ValueError):
        return {}, 0, []
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            pid, _, _ = CREDENTIALS.unpack(data)
        elif (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return (event if isinstance(event, dict) else {}), pid, list(fds)
