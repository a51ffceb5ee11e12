"""Processes that compare expressions, and that can be killed without losing anything but the one at fault.

    caller ──control socket──> zygote: imports the parser once, forks a worker on request
       └─────────one socket a worker────────> worker: reads a pair, writes the verdict, one line each

A worker sets its own deadline in the kernel before each pair: CPU time, and ten times that as wall time.
The kernel's signal ends it whatever it is doing, so the caller needs no signal, no thread and no clock, and
works the same in any thread and under asyncio. When the caller ends, however it ends, the sockets close
and the processes go.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from mtpo.answer_comparison import Decision
from mtpo.answer_equality import compare

MEMORY_LIMIT_BYTES = 4 << 30
WALL_FACTOR = 10
"""On a busy machine a pair gets so many seconds of wall time for each second of CPU time."""
MAX_ATTEMPTS = 3
"""A pair whose worker was killed by somebody else is tried again, so often in all."""

_DEADLINE_RULES: dict[int | None, str] = {signal.SIGPROF: "timeout", signal.SIGALRM: "wall_timeout"}
_log = logging.getLogger(__name__)


class WorkerDiedError(Exception):
    """The worker ended instead of answering; holds the signal that ended it, or None."""

    def __init__(self, signal_number: int | None) -> None:
        super().__init__(f"ended by signal {signal_number}")
        self.signal_number = signal_number


class WorkerPool:
    """Up to `workers` processes, started when first needed. Safe to use from many threads."""

    def __init__(self, workers: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._slots: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(workers):
            self._slots.put(None)
        self._zygote = _Zygote()

    def decide(self, gold: str, answer: str, *, paper_tolerance: bool = False) -> Decision:
        """Compare two normalised answers with the symbolic rule, waiting for a free worker.

        Returns:
            The decision; `equal` is None if there is none, with the rule `timeout`, `wall_timeout`,
            `worker_died` or `error: ...`.
        """
        for attempt in range(1, MAX_ATTEMPTS + 1):
            worker = self._slots.get()
            try:
                worker = worker or self._zygote.fork()
                return worker.decide([gold, answer, paper_tolerance, self._timeout_s])
            except WorkerDiedError as death:
                worker = None
                if death.signal_number in _DEADLINE_RULES:
                    return Decision(None, _DEADLINE_RULES[death.signal_number])
                _log.warning(
                    "a grading worker was ended by signal %s (attempt %d)", death.signal_number, attempt
                )
            finally:
                self._slots.put(worker)
        return Decision(None, "worker_died")

    def close(self) -> None:
        """End all processes. The pool starts new ones if it is used again."""
        workers = [self._slots.get() for _ in range(self._slots.qsize())]
        for worker in workers:
            if worker is not None:
                worker.close()
            self._slots.put(None)
        self._zygote.close()


class _Worker:
    """The caller's end of one worker."""

    def __init__(self, zygote: _Zygote, pid: int, connection: socket.socket) -> None:
        self._zygote, self._pid, self._connection = zygote, pid, connection
        self._stream = connection.makefile("rwb")

    def decide(self, request: list[Any]) -> Decision:
        """Send gold, answer, whether the paper's tolerance holds, and CPU seconds; receive the decision.

        Raises:
            WorkerDiedError: the worker ended before it answered.
        """
        try:
            self._stream.write(json.dumps(request).encode() + b"\n")
            self._stream.flush()
            line = self._stream.readline()
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            self.close()
            raise WorkerDiedError(self._zygote.end(self._pid))
        return Decision(*json.loads(line))

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what was still to be sent has no reader any more
            self._stream.close()
        self._connection.close()


class _Zygote:
    """The caller's end of the process that forks workers; it is their parent, so only it may end them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def fork(self) -> _Worker:
        """
        Raises:
            WorkerDiedError: the zygote ended instead; the next call starts another.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                pid = self._ask({"do": "fork"}, [theirs.fileno()])
            except ConnectionError as error:
                ours.close()
                raise WorkerDiedError(None) from error
        return _Worker(self, pid, ours)

    def end(self, pid: int) -> int | None:
        """Make sure that the worker has ended; the signal that ended it."""
        try:
            status = self._ask({"do": "end", "pid": pid})
        except ConnectionError:
            return None
        return -status if status < 0 else None

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _ask(self, request: dict[str, Any], descriptors: list[int] | None = None) -> int:
        with self._lock:
            control = self._control or self._start()
            try:
                socket.send_fds(control, [json.dumps(request).encode()], descriptors or [])
                reply = control.recv(64)
            except OSError:
                reply = b""
            if not reply:
                self._stop()
                raise ConnectionError("the process that starts grading workers has ended")
            return int(reply)

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        environment = dict(os.environ)
        root = str(Path(__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
        command = [
            sys.executable,
            "-P",
            "-c",
            f"from mtpo.grader_workers import serve; serve({theirs.fileno()})",
        ]
        with theirs:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the caller, which then closes the socket
            )
        self._control = ours
        return ours

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.wait()
        self._control = self._process = None


def serve(descriptor: int) -> None:
    """The zygote's life: fork and end workers as the caller asks, until it closes the socket."""
    from mtpo.symbolic_equality import warm_up

    warm_up()  # workers are forked with it
    control = socket.socket(fileno=descriptor)
    workers: set[int] = set()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 256, 1)
        if not message:
            break
        request = json.loads(message)
        if request["do"] == "fork":
            pid = os.fork()
            if pid == 0:
                control.close()
                _work(socket.socket(fileno=descriptors[0]))
                os._exit(0)
            os.close(descriptors[0])
            workers.add(pid)
            control.sendall(str(pid).encode())
        elif request["pid"] in workers:
            workers.remove(request["pid"])
            control.sendall(str(_end(request["pid"])).encode())
        else:  # a worker of a zygote that was killed
            control.sendall(b"0")
    for pid in workers:
        _end(pid)


def _end(pid: int) -> int:
    """Kill a child unless it has ended already, and return its exit status, negative for a signal."""
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _work(connection: socket.socket) -> None:
    """A worker's life: one line in, one line out, until the caller closes the socket."""
    from mtpo.symbolic_equality import equal_expressions

    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with connection.makefile("rwb") as stream:
        for line in stream:
            gold, answer, paper_tolerance, timeout_s = json.loads(line)
            _set_deadline(timeout_s)
            try:
                decision = compare(gold, answer, equal_expressions, paper_tolerance=paper_tolerance)
            except (
                Exception,
                RecursionError,
            ) as error:  # whatever it is, the caller reports it as no verdict
                decision = Decision(None, f"error: {type(error).__name__}")
            _set_deadline(0)
            stream.write(json.dumps(decision).encode() + b"\n")
            stream.flush()


def _set_deadline(cpu_s: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, cpu_s * WALL_FACTOR)
