"""The Jupyter kernel of a session, in two makes. Runs in the kernel process."""

from __future__ import annotations

import asyncio
import json
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
from pathlib import Path
from typing import Any, NoReturn

import zmq
from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelapp import IPKernelApp
from IPython.core.profiledir import ProfileDir
from jupyter_client.connect import KernelConnectionInfo
from tornado.ioloop import IOLoop
from traitlets.config import Config
from zmq.eventloop.zmqstream import ZMQStream

from mtpo.errors import SandboxError
from sandbox.cgroup import join
from sandbox.confine import Confinement, die_with, move_home
from sandbox.display import shape_output
from sandbox.limits import Limits
from sandbox.warmup import CELLS
from sandbox.zygote import CHANNELS, MAX_FDS, MAX_PACKET_BYTES, ROOT, send


def configuration() -> Config:
    """IPython's settings: no history file, no log, and no output but that of the cells."""
    config = Config()
    config.HistoryManager.enabled = False
    config.IPKernelApp.capture_fd_output = False
    config.IPKernelApp.log_level = "CRITICAL"
    config.IPythonKernel._execute_sleep = 0.0
    return config


PORTS = [f"{channel}_port" for channel in CHANNELS]


class SandboxKernelApp(IPKernelApp):
    """ipykernel on sockets that somebody else has opened: a sealed process may open none, nor see a path."""

    _listening: dict[int, int]

    def use_sockets(self, connection: KernelConnectionInfo, fds: list[int]) -> None:
        """Serve these channels and no other.

        Args:
            connection: what is in a Jupyter connection file.
            fds: listening sockets, in the order of `CHANNELS`.
        """
        self.load_connection_info(connection)
        self.session.pid = os.getpid()  # made before a fork
        self._listening = dict(zip((getattr(self, port) for port in PORTS), fds, strict=True))

    def _bind_socket(self, s: zmq.Socket, port: int) -> int | None:
        if port not in self._listening:  # stdin: cells cannot ask
            s.bind(f"inproc://{port}")
            return port
        s.setsockopt(zmq.USE_FD, self._listening[port])
        return super()._bind_socket(s, port)


class OneThread:
    """In the place of ipykernel's thread for the shell channel: there is none, and cells run on the main one."""

    parent_thread = threading.main_thread()

    def __bool__(self) -> bool:
        return False


class ForkedKernel(IPythonKernel):
    @property
    def _supports_kernel_subshells(self) -> bool:
        return False


class ForkedKernelApp(SandboxKernelApp):
    """ipykernel in two halves: what `prepare` does is shared by all sessions of a zygote.

    Kernel and shell are ipykernel's own. They answer shell and control requests and publish output on the
    main thread, the only one: no heartbeat, because the pool watches the process, and no helper threads,
    which cost time in every session and would make a live one impossible to fork.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._streams: dict[str, ZMQStream] = {}
        self._former: list[object] = []
        """What a copy has inherited and must not use; the collector would close the descriptors."""

    def prepare(self, directory: Path, limits: Limits) -> None:
        """Make the kernel and its shell, which need neither a socket, a thread nor an event loop for that."""
        sys.modules["debugpy"] = None  # type: ignore # nobody attaches a debugger; importing one takes 0.2 s
        self.profile_dir = ProfileDir.create_profile_dir(str(directory / "profile"))
        self.kernel = ForkedKernel.instance(
            parent=self,
            log=self.log,
            session=self.session,
            profile_dir=self.profile_dir,
            shell_channel_thread=OneThread(),
        )
        shape_output(self.kernel, limits)
        self._rehearse()

    def _rehearse(self) -> None:
        """Run some cells over sockets within the process, for all that is imported or compiled with the first."""
        self._listening = {}
        for number, port in enumerate(PORTS, start=1):
            setattr(self, port, number)
        self.connect()
        self.kernel.start()
        client = ZMQStream(self._context.socket(zmq.DEALER), self._io_loop)
        client.socket.connect(f"inproc://{self.shell_port}")
        client.on_recv(lambda frames: self._io_loop.stop())
        for cell in CELLS:
            self.session.send(
                client, "execute_request", {"code": cell, "silent": False, "stop_on_error": False}
            )
            self._io_loop.start()
        for stream in (client, *self._streams.values()):
            stream.close(linger=0)
        self._context.term()
        self._io_loop.close()
        asyncio.set_event_loop(None)
        self._streams = {}
        shell: Any = self.kernel.shell
        shell.reset(new_session=True)

    def connect(self) -> None:
        """Open the channels, with an event loop of their own."""
        self._former.append(self._streams)
        asyncio._set_running_loop(None)
        asyncio.set_event_loop(asyncio.new_event_loop())
        self._io_loop = IOLoop.current()
        wake_on_signals(self._io_loop)
        self._context = zmq.Context()
        kinds = {"shell": zmq.ROUTER, "control": zmq.ROUTER, "iopub": zmq.XPUB}
        sockets = {channel: self._context.socket(kind) for channel, kind in kinds.items()}
        for channel, zmq_socket in sockets.items():
            self._bind_socket(zmq_socket, getattr(self, f"{channel}_port"))
        self._streams = {channel: ZMQStream(each, self._io_loop) for channel, each in sockets.items()}
        self.kernel.shell_stream = self._streams["shell"]
        self.kernel.control_stream = self._streams["control"]
        self.kernel.iopub_socket = sockets["iopub"]

    def run(self, line: socket.socket) -> None:
        """Answer until the end."""
        self._line = line
        self._io_loop.add_handler(line.fileno(), self._on_request, IOLoop.READ)
        self.kernel.start()
        # Only now: sending on the socket would swallow the wake-up that announces a subscriber.
        self._streams["iopub"].on_recv(self._welcome)
        self._io_loop.start()

    def _welcome(self, frames: list[bytes]) -> None:
        """Tell a new subscriber that from now on it misses nothing (Jupyter enhancement proposal 65)."""
        if frames[0][:1] == b"\x01":
            content = {"subscription": frames[0][1:].decode()}
            self.session.send(self.kernel.iopub_socket, "iopub_welcome", content)

    def _on_request(self, fd: int, events: int) -> None:
        """Copy this kernel, as it is between two cells."""
        packet, fds, _, _ = socket.recv_fds(self._line, MAX_PACKET_BYTES, MAX_FDS)
        if not packet:
            return self._io_loop.remove_handler(fd)
        request = json.loads(packet)
        line = socket.socket(fileno=fds[0])
        random_state = random.getstate()  # the module takes another seed in a fork
        try:
            if threads := [t.name for t in threading.enumerate() if t is not threading.main_thread()]:
                raise SandboxError(f"threads cannot be copied: {', '.join(threads)}")
            is_copy = _fork_an_orphan()
        except (OSError, SandboxError) as error:
            send(line, event="failed", error=str(error))
            is_copy = False
        if is_copy:
            random.setstate(random_state)
            self._be_copy(request, line, fds)
        line.close()
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
            self.use_sockets(request["connection"], listening)
            self.connect()
            send(line, event="listening")
            self.run(line)
        except BaseException as error:
            send(line, event="failed", error=f"{type(error).__name__}: {error}")
        finally:
            os._exit(0)


def run_forked(
    app: ForkedKernelApp,
    confinement: Confinement,
    connection: KernelConnectionInfo,
    fds: list[int],
    line: socket.socket,
    statm: int,
) -> None:
    """Turn the process, a fork of the zygote that prepared `app`, into a kernel. Returns when it ends."""
    confinement.confine()
    app.use_sockets(connection, fds)
    app.connect()
    app.init_signal()
    _seal(confinement, line, statm)
    app.run(line)


def run_stock() -> None:
    """Entry point of a stock kernel; the one argument is the descriptor of a JSON object."""
    with open(int(sys.argv[1])) as file:
        config = json.load(file)
    confinement = Confinement.from_json(config["confinement"])
    confinement.confine()
    app = StockKernelApp.instance(config=configuration())
    app.use_sockets(config["connection"], config["listening"])
    app.initialize([])
    shape_output(app.kernel, confinement.limits)
    wake_on_signals(IOLoop.current())
    _seal(confinement, socket.socket(fileno=config["line"]), config["statm"])
    app.start()


class StockKernelApp(SandboxKernelApp):
    """A stock ipykernel, with all of its threads but that of the heartbeat."""

    def init_connection_file(self) -> None:
        """There is none: the connection is known."""

    def init_heartbeat(self) -> None:
        """The pool watches the process instead."""

    def write_connection_file(self, **kwargs: Any) -> None:
        """Nobody reads it."""


def wake_on_signals(io_loop: Any) -> None:
    """Have an interrupt end the wait of the event loop, or else it would not reach a cell that awaits."""
    io_loop.asyncio_loop.add_signal_handler(signal.SIGWINCH, lambda: None)  # one is enough to watch all


def _seal(confinement: Confinement, line: socket.socket, statm: int) -> None:
    """Let no more happen than the model's code needs, and say that the kernel is ready."""
    sys.path[:] = [entry for entry in sys.path if entry != ROOT]
    sys.argv[:] = [""]
    random.seed(0)  # as numpy's generator, which a fork copies, so that sessions can be replayed
    supervisor = confinement.seal(statm)
    fds = [] if supervisor is None else [supervisor]
    send(line, *fds, event="listening")
    for fd in fds:
        os.close(fd)


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
