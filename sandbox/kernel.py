"""The Jupyter kernel of a session, forked from one that is warm. Runs in the kernel process."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import logging
import os
import random
import shutil
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Coroutine, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ipykernel.ipkernel import IPythonKernel
from IPython.core.profiledir import ProfileDir
from jupyter_client.connect import KernelConnectionInfo
from traitlets.config import Config

from mtpo.errors import SandboxError
from sandbox.cgroup import join
from sandbox.confine import Confinement, die_with, move_home
from sandbox.display import message_of, shape_output
from sandbox.limits import Limits
from sandbox.messages import LeanSession
from sandbox.warmup import CELLS
from sandbox.zmtp import SUBSCRIBE, Channel, Poller, Publisher, Router, encode, hello
from sandbox.zygote import CHANNELS, MAX_FDS, MAX_PACKET_BYTES, ROOT, send


def configuration() -> Config:
    """IPython's settings: no history file, no log, and no output but that of the cells."""
    config = Config()
    config.HistoryManager.enabled = False
    config.IPKernelApp.capture_fd_output = False
    config.IPKernelApp.log_level = "CRITICAL"
    config.IPythonKernel._execute_sleep = 0.0
    return config


class ForkedKernel(IPythonKernel):
    """ipykernel without its event loop, streams and threads, which cost more than the run of a short cell.

    Shell and answers are ipykernel's own. One plain loop on the only thread takes requests from the shell and
    the control channel, and runs cells: no heartbeat, because the pool watches the process, and no helper
    threads, which would make a live session impossible to fork. Coroutines of a cell run while a cell does.
    """

    session: LeanSession  # pyright: ignore[reportIncompatibleVariableOverride]
    _is_over = False

    def prepare(self, limits: Limits) -> None:
        """What all sessions of a fork server share."""
        self._runner = asyncio.Runner()
        self._former: list[object] = []
        """What a copy has inherited and must not use; the collector would close the descriptors."""
        shell: Any = self.shell
        shell.loop_runner = self._run_coroutine
        shell.builtin_trap.__enter__()  # for good, where IPython adds `display` and the like for each cell
        shape_output(self, limits)
        self._rehearse()

    def _rehearse(self) -> None:
        """Run some cells for clients within the process: what is imported or compiled with the first is then done."""
        listening = [socket.socket(socket.AF_UNIX) for _ in CHANNELS]
        for each in listening:
            each.bind("")  # Linux finds a name
            each.listen()
        self.open_channels(listening)
        content = {"silent": False, "stop_on_error": False}
        requests = [self.session.msg("execute_request", content | {"code": cell}) for cell in CELLS]
        for kind, server, messages in (
            ("SUB", listening[CHANNELS.index("iopub")], [[SUBSCRIBE]]),
            ("DEALER", listening[CHANNELS.index("shell")], map(self.session.serialize, requests)),
        ):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(server.getsockname())
                client.send(hello(kind) + b"".join(map(encode, messages)))
                while self._poller.wait(0):
                    pass
        for each in listening:
            each.close()
        shell: Any = self.shell
        shell.reset(new_session=True)

    def use_sockets(self, connection: KernelConnectionInfo, fds: Iterable[int]) -> None:
        """Serve these channels, in a new process.

        Args:
            connection: what is in a Jupyter connection file.
            fds: listening sockets, in the order of `CHANNELS`.
        """
        self.session.key = connection["key"].encode()  # pyright: ignore
        self.session.pid = os.getpid()
        self.open_channels([socket.socket(fileno=fd) for fd in fds])

    def open_channels(self, listening: Sequence[socket.socket]) -> None:
        self._poller = Poller()
        self._channels = {}
        for name, each in zip(CHANNELS, listening, strict=True):
            channel = self._channels[name] = (Publisher if name == "iopub" else Router)(each)
            self._poller.serve(channel, partial(self._confirm if name == "iopub" else self._answer, name))
        self.iopub_socket = self._channels["iopub"]

    def serve(self, line: socket.socket) -> None:
        """Answer until the end.

        Args:
            line: where the fork server asks for copies.
        """
        self._poller.watch(line, partial(self._copy, line))
        self._publish_status("starting", "shell")
        pid = os.getpid()
        while not self._is_over and os.getpid() == pid:  # else a cell has forked, and this is its child
            if not self._poller.wait(0 if self._aborting else None):
                self._aborting = False

    def _confirm(self, name: str, subscription: list[bytes]) -> None:
        """Tell a new subscriber that from now on it misses nothing (Jupyter enhancement proposal 65)."""
        self.session.send(self.iopub_socket, "iopub_welcome", {"subscription": subscription[0].decode()})

    def _answer(self, name: str, message: list[bytes]) -> None:
        """Answer a request. What is none is dropped."""
        try:
            identities, request = self.session.read(message)
        except (ValueError, LookupError, TypeError, RecursionError):
            return
        channel = self._channels[name]
        self.set_parent(identities, request, name)
        self._publish_status("busy", name)
        kind = request["header"]["msg_type"]
        if kind == "execute_request" and self._aborting:
            self._send_abort_reply(channel, request, identities)
        elif kind == "execute_request":
            self._execute(channel, identities, request)
        elif handler := getattr(self, f"{name}_handlers").get(kind):
            with contextlib.suppress(Exception):  # what cannot be answered is not
                _finish(handler(channel, identities, request))
        sys.stdout.flush()
        self._publish_status("idle", name)

    def _execute(self, stream: Channel, identities: list[bytes], request: dict[str, Any]) -> None:
        """Run a cell, as `IPythonKernel.execute_request` does."""
        shell: Any = self.shell
        content = request["content"]
        silent = content.get("silent", False)
        self._forward_input()  # to nobody: `input` says so
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            result = shell.run_cell(
                content["code"], store_history=content.get("store_history", not silent), silent=silent
            )
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            error = result.error_in_exec if result.error_before_exec is None else result.error_before_exec
        except (Exception, KeyboardInterrupt) as failure:  # the shell is broken; or a moment beside the cell
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            error = failure
        self._restore_input()
        reply: dict[str, Any] = {"status": "ok" if error is None else "error", "user_expressions": {}}
        if error is not None:
            reply |= {"ename": type(error).__name__, "evalue": message_of(error), "traceback": []}
        elif expressions := content.get("user_expressions"):
            reply["user_expressions"] = shell.user_expressions(expressions)
        reply["execution_count"] = shell.execution_count - 1
        reply["payload"] = shell.payload_manager.read_payload()
        shell.payload_manager.clear_payload()
        sys.stdout.flush()
        self.session.send(stream, "execute_reply", reply, request, ident=identities)
        if error is not None and not silent and content.get("stop_on_error", True):
            self._aborting = True  # what has come up to now

    def _run_coroutine(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a cell that awaits; tasks that it leaves go on with the next such cell."""
        return self._runner.run(coroutine, context=contextvars.copy_context())  # which knows the request

    async def shutdown_request(self, stream: Channel, ident: list[bytes], parent: dict[str, Any]) -> None:
        content = {"status": "ok", "restart": parent["content"]["restart"]}
        self.session.send(stream, "shutdown_reply", content, parent, ident=ident)
        self._is_over = True

    def _copy(self, line: socket.socket) -> None:
        """Copy this kernel, as it is between two cells."""
        packet, fds, _, _ = socket.recv_fds(line, MAX_PACKET_BYTES, MAX_FDS)
        if not packet:
            return self._poller.forget(line)
        request = json.loads(packet)
        answers = socket.socket(fileno=fds[0])
        random_state = random.getstate()  # the module takes another seed in a fork
        try:
            if threads := [t.name for t in threading.enumerate() if t is not threading.main_thread()]:
                raise SandboxError(f"threads cannot be copied: {', '.join(threads)}")
            is_copy = _fork_an_orphan()
        except (OSError, SandboxError) as error:
            send(answers, event="failed", error=str(error))
            is_copy = False
        if is_copy:
            random.setstate(random_state)
            self._be_copy(request, answers, fds)
        answers.close()
        for fd in fds[1:]:
            os.close(fd)

    def _be_copy(self, request: dict[str, Any], line: socket.socket, fds: list[int]) -> NoReturn:
        """Make the process, which still shares much with its original, independent, and answer to the end."""
        line_fd, *listening = fds[: 1 + len(CHANNELS)]
        try:
            _await_parent(request["parent_pid"])
            os.setpgid(0, 0)
            for fd in fds[1 + len(CHANNELS) :]:
                join(fd)
            _close_sockets_but([line_fd, *listening])
            here = Path.cwd()
            directory = here.parent / str(request["start"])
            shutil.copytree(here, directory, symlinks=True)
            move_home(directory)
            tempfile.tempdir = None
            self._former.append((self._poller, self._runner))
            self._runner = asyncio.Runner()
            self.use_sockets(request["connection"], listening)
            send(line, event="listening")
            self.serve(line)
        except BaseException as error:
            send(line, event="failed", error=f"{type(error).__name__}: {error}")
        finally:
            os._exit(0)


def prepare(directory: Path, limits: Limits) -> ForkedKernel:
    """A kernel with its shell, which need neither a socket, a thread nor an event loop for that."""
    sys.modules["debugpy"] = None  # type: ignore # nobody attaches a debugger; importing one takes 0.2 s
    config = configuration()
    kernel = ForkedKernel.instance(
        config=config,
        log=logging.getLogger("ipykernel"),
        session=LeanSession(config=config),
        profile_dir=ProfileDir.create_profile_dir(str(directory / "profile")),
    )
    kernel.prepare(limits)
    return kernel


def run_forked(
    kernel: ForkedKernel,
    confinement: Confinement,
    connection: KernelConnectionInfo,
    fds: list[int],
    line: socket.socket,
    statm: int,
) -> None:
    """Be the kernel that the fork server prepared, in a fork of it. Returns when the kernel ends."""
    confinement.confine()
    kernel.use_sockets(connection, fds)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    seal(confinement, line, statm)
    kernel.serve(line)


def seal(confinement: Confinement, line: socket.socket, statm: int) -> None:
    """Let no more happen than the model's code needs, and say that the kernel is ready."""
    sys.path[:] = [entry for entry in sys.path if entry != ROOT]
    sys.argv[:] = [""]
    random.seed(0)  # as numpy's generator, which a fork copies, so that sessions can be replayed
    supervisor = confinement.seal(statm)
    fds = [] if supervisor is None else [supervisor]
    send(line, *fds, event="listening")
    for fd in fds:
        os.close(fd)


def _finish(answer: Coroutine[Any, Any, None] | None) -> None:
    """Run a handler of ipykernel's: most are coroutines, which wait for nothing."""
    if answer is not None:
        with contextlib.suppress(StopIteration):
            answer.send(None)


def _fork_an_orphan() -> bool:
    """Fork a process that will be no child of this one, but of the zygote, which is to hear of its end.

    Returns:
        Whether this is the new process.

    Raises:
        OSError: the system refused.
    """
    if in_between := os.fork():
        _, status = os.waitpid(in_between, 0)
        if number := os.waitstatus_to_exitcode(status):
            raise OSError(number, os.strerror(number))
        return False
    try:
        pid = os.fork()
    except OSError as error:
        os._exit(error.errno or 1)
    if pid:
        os._exit(0)
    return True


def _await_parent(pid: int) -> None:
    """Wait until the process has been handed to its new parent, and die with that one."""
    while os.getppid() != pid:
        time.sleep(0.0002)
    die_with(pid, signal.SIGKILL)


def _close_sockets_but(kept: list[int]) -> None:
    """Close the connections of the original, and what belongs to its event loop; its files stay open."""
    for fd in range(3, os.sysconf("SC_OPEN_MAX")):
        try:
            mode = os.fstat(fd).st_mode
        except OSError:
            continue
        if fd not in kept and (stat.S_ISSOCK(mode) or not stat.S_IFMT(mode)):
            os.close(fd)
