"""The process between a pool and its fork server: it makes the sandbox, and clears up when all is over.

It stays outside of the sandbox that it makes, so that it can still remove the pool's directory when the
pool's owner was killed. Nothing that ever ran inside outlives it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from sandbox import syscalls, view
from sandbox.cgroup import remove_cgroup
from sandbox.confine import Confinement, move_home, new_user_namespace
from sandbox.files import remove_tree
from sandbox.limits import Limits
from sandbox.processes import stat_fields
from sandbox.zygote import Zygote, send

NOBODY = 65534
FLAGS = 6
"""Of a process, among its `stat_fields`."""
PF_EXITING = 0x4  # linux/sched.h


class MissingLayersError(Exception):
    """This machine does not have some layers; `reasons` maps their names to why."""

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__(reasons)
        self.reasons = reasons


def main() -> None:
    """Entry point; the one argument is a JSON object."""
    config = json.loads(sys.argv[1])
    control = socket.socket(fileno=config["fd"])
    with _reporting(control):
        sandbox = Sandbox(config)
        sandbox.separate()
        syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
        zygote_pid = os.fork()
        if zygote_pid == 0:
            _serve(sandbox, control, config)
        control.close()  # so that the owner hears of the fork server's end
        # Two signs of one event: the control socket is closed, and if the owner has forked, so that it is
        # not, this signal.
        signal.signal(signal.SIGTERM, lambda *_: kill_if_alive(zygote_pid))
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGTERM)
        os.waitpid(zygote_pid, 0)
        _kill_the_rest()
        if _has_ended(config["parent_pid"]):  # else the owner may have plans for the directory
            remove_tree(Path(config["directory"]))
            if config["cgroup"]:
                remove_cgroup(Path(config["cgroup"]))


def kill_if_alive(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _serve(sandbox: Sandbox, control: socket.socket, config: dict[str, Any]) -> NoReturn:
    """Be the fork server. It dies with its guardian, and ends when its owner closes the control socket."""
    with _reporting(control):
        is_stock = config["kernel"] == "ipykernel"
        if not is_stock:
            importlib.import_module("sandbox.kernel")  # inside, the file is not to be seen
        confinement = sandbox.move_in()
        move_home(Path(confinement.scratch))
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)  # to be the parent of forked sessions
        zygote = Zygote(control, confinement, is_stock)
        zygote.prepare(config["preload"])
        if missing := zygote.probe():
            raise MissingLayersError(missing)
        zygote.serve()
    os._exit(0)


@contextlib.contextmanager
def _reporting(control: socket.socket) -> Iterator[None]:
    """Tell the owner why it ends here."""
    try:
        yield
    except MissingLayersError as error:
        send(control, event="missing", reasons=error.reasons)
    except Exception as error:
        send(control, event="failed", id=None, error=f"{type(error).__name__}: {error}")


def _has_ended(parent_pid: int) -> bool:
    """Whether the parent is gone, or dying: its sockets are closed some time before its children get another parent."""
    stat = stat_fields(parent_pid)
    return os.getppid() != parent_pid or not stat or int(stat[FLAGS]) & PF_EXITING != 0


def _kill_the_rest() -> None:
    """Kill what has outlived the fork server; orphans of orphans become children of this process too."""
    while True:
        for pid in map(int, Path("/proc/thread-self/children").read_text().split()):
            os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


class Sandbox:
    """The layers that are made once for all sessions of a pool.

    Its methods raise MissingLayersError; then the process has come half of the way, and has to end.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._layers = frozenset(config["layers"])
        self._limits = Limits(**config["limits"])
        self._directory = config["directory"]
        self._readable = view.readable_paths(with_own_code=config["kernel"] == "ipykernel")
        self._proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
        self._is_root = os.geteuid() == 0

    def separate(self) -> None:
        """Outside: see to it that the next child is the first in a namespace of processes."""
        own_processes = syscalls.CLONE_NEWPID if "namespaces" in self._layers else 0
        with self._making("namespaces", "view") as is_wanted:
            if is_wanted and self._is_root:
                syscalls.call("unshare", own_processes)
            elif is_wanted:
                new_user_namespace(self._proc, own_processes)

    def move_in(self) -> Confinement:
        """Inside: the other namespaces, the files, and no root.

        Returns:
            What is left to do in each session.
        """
        with self._making("namespaces") as is_wanted:
            if is_wanted:
                kinds = syscalls.CLONE_NEWNET | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS
                syscalls.call("unshare", kinds)
                socket.sethostname("sandbox")
        with self._making("view") as has_view:
            if has_view:
                syscalls.call("unshare", syscalls.CLONE_NEWNS)
                view.enter(self._directory, self._readable)
                scratch = view.SCRATCH
            else:
                scratch = f"{self._directory}/scratch"
                os.makedirs(scratch, mode=0o700, exist_ok=True)
        with self._making("user") as is_wanted:
            if is_wanted and self._is_root:
                if not has_view:
                    os.chown(scratch, NOBODY, NOBODY)
                    os.chmod(self._directory, 0o711)
                os.setgroups([])
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
                open(os.__file__).close()  # root's own Python may be closed to others
        with self._making("namespaces", "view") as is_wanted:
            if is_wanted and self._is_root:
                new_user_namespace(self._proc, syscalls.CLONE_NEWNS if has_view else 0)
        if has_view:
            view.mount_scratch(1)  # the fork server's own
        return Confinement(self._layers, self._limits, scratch, self._readable, self._proc)

    @contextlib.contextmanager
    def _making(self, *names: str) -> Iterator[bool]:
        """Whether any of the layers is wanted; and if they cannot be had, say so."""
        wanted = self._layers & set(names)
        try:
            yield bool(wanted)
        except OSError as error:
            raise MissingLayersError(dict.fromkeys(wanted, str(error))) from error
