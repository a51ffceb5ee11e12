"""A stock ipykernel behind the layers of a session. Runs in the kernel process."""

from __future__ import annotations

import json
import signal
import socket
import sys
from typing import Any

import zmq
from ipykernel.kernelapp import IPKernelApp
from jupyter_client.connect import KernelConnectionInfo
from tornado.ioloop import IOLoop

from sandbox.confine import Confinement
from sandbox.display import shape_output
from sandbox.kernel import configuration, seal
from sandbox.zygote import CHANNELS


def run() -> None:
    """Entry point of the kernel; the one argument is the descriptor of a JSON object."""
    with open(int(sys.argv[1])) as file:
        config = json.load(file)
    confinement = Confinement.from_json(config["confinement"])
    confinement.confine()
    app = StockKernelApp.instance(config=configuration())
    app.use_sockets(config["connection"], config["listening"])
    app.initialize([])
    shape_output(app.kernel, confinement.limits)
    # An interrupt is to end the wait of the event loop, or else it would not reach a cell that awaits.
    io_loop: Any = IOLoop.current()
    io_loop.asyncio_loop.add_signal_handler(signal.SIGWINCH, lambda: None)  # one is enough to watch all
    seal(confinement, socket.socket(fileno=config["line"]), config["statm"])
    app.start()


class StockKernelApp(IPKernelApp):
    """ipykernel on sockets that somebody else has opened: a sealed process may open none, nor see a path.

    With all of its threads but that of the heartbeat.
    """

    _listening: dict[int, int]

    def use_sockets(self, connection: KernelConnectionInfo, fds: list[int]) -> None:
        """Serve these channels and no other.

        Args:
            connection: what is in a Jupyter connection file.
            fds: listening sockets, in the order of `CHANNELS`.
        """
        self.load_connection_info(connection)
        ports = (getattr(self, f"{channel}_port") for channel in CHANNELS)
        self._listening = dict(zip(ports, fds, strict=True))

    def _bind_socket(self, s: zmq.Socket, port: int) -> int | None:
        if port not in self._listening:  # stdin: cells cannot ask
            s.bind(f"inproc://{port}")
            return port
        s.setsockopt(zmq.USE_FD, self._listening[port])
        return super()._bind_socket(s, port)

    def init_connection_file(self) -> None:
        """There is none: the connection is known."""

    def init_heartbeat(self) -> None:
        """The pool watches the process instead."""

    def write_connection_file(self, **kwargs: Any) -> None:
        """Nobody reads it."""
