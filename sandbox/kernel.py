"""The Jupyter kernel of a session, in two makes. Runs in the kernel process."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import zmq
from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelapp import IPKernelApp
from IPython.core.profiledir import ProfileDir
from traitlets.config import Config
from zmq.eventloop.zmqstream import ZMQStream

from sandbox.confine import seal
from sandbox.display import shape_output
from sandbox.limits import Limits

ROOT = str(Path(__file__).resolve().parents[1])


def configuration() -> Config:
    """IPython's settings: no history file, no log, and no output but that of the cells."""
    config = Config()
    config.HistoryManager.enabled = False
    config.IPKernelApp.capture_fd_output = False
    config.IPKernelApp.log_level = "CRITICAL"
    config.IPythonKernel._execute_sleep = 0.0
    return config


class ForkedKernelApp(IPKernelApp):
    """ipykernel in two halves: what `prepare` does is shared by all sessions of a zygote.

    Kernel and shell are ipykernel's own. They answer shell and control requests and publish output on the
    main thread, the only one: no heartbeat, because the pool watches the process, and no helper threads,
    which cost time in every session and would make a live one impossible to fork.
    """

    def prepare(self, directory: Path, limits: Limits) -> None:
        """Make the kernel and its shell, which need neither a socket, a thread nor an event loop for that."""
        sys.modules["debugpy"] = None  # type: ignore # nobody attaches a debugger; importing one takes 0.2 s
        self.profile_dir = ProfileDir.create_profile_dir(str(directory / "profile"))
        self.kernel = IPythonKernel.instance(
            parent=self, log=self.log, session=self.session, profile_dir=self.profile_dir
        )
        shape_output(self.kernel, limits.max_output_chars)
        assert self.kernel.shell is not None
        self.kernel.shell.run_cell("None", silent=True)  # what the first cell imports and compiles

    def connect(self, connection_file: Path) -> None:
        """Bind the sockets that the file names."""
        self.connection_file = str(connection_file)
        self.load_connection_file()
        self.session.pid = os.getpid()  # made before the fork
        context = zmq.Context()
        streams = {}
        for channel, kind in (("shell", zmq.ROUTER), ("control", zmq.ROUTER), ("iopub", zmq.XPUB)):
            socket = context.socket(kind)
            self._bind_socket(socket, getattr(self, f"{channel}_port"))
            streams[channel] = ZMQStream(socket)
        self.kernel.shell_stream = streams["shell"]
        self.kernel.control_stream = streams["control"]
        self.kernel.iopub_socket = streams["iopub"].socket
        self._iopub_stream = streams["iopub"]

    def start(self) -> None:
        self.kernel.start()
        # Only now: sending on the socket would swallow the wake-up that announces a subscriber.
        self._iopub_stream.on_recv(self._welcome)
        self.kernel.io_loop.start()

    def _welcome(self, frames: list[bytes]) -> None:
        """Tell a new subscriber that from now on it misses nothing (Jupyter enhancement proposal 65)."""
        if frames[0][:1] == b"\x01":
            content = {"subscription": frames[0][1:].decode()}
            self.session.send(self.kernel.iopub_socket, "iopub_welcome", content)


def run_forked(
    app: ForkedKernelApp, connection_file: Path, limits: Limits, report: Callable[[], None]
) -> None:
    """Turn the process, a fork of the zygote that prepared `app`, into a kernel. Returns when it ends.

    Args:
        report: called when the kernel is complete, right before it answers.
    """
    app.connect(connection_file)
    app.init_signal()
    _start(app, limits, report)


def run_stock(connection_file: Path, limits: Limits, report: Callable[[], None]) -> None:
    """Turn the process into a stock ipykernel. Returns when it ends."""
    app = IPKernelApp.instance(config=configuration())
    app.initialize(["-f", str(connection_file)])
    shape_output(app.kernel, limits.max_output_chars)
    _start(app, limits, report)


def _start(app: IPKernelApp, limits: Limits, report: Callable[[], None]) -> None:
    sys.path[:] = [entry for entry in sys.path if entry != ROOT]
    random.seed(0)  # as numpy's generator, which a fork copies, so that sessions can be replayed
    report()
    seal(limits)
    app.start()
