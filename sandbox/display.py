"""What the model gets to see of a cell. Runs in the kernel process.

Everything that a cell shows, whether printed, displayed, returned or raised, leaves the kernel as text on
one ordered stream. So one cap holds for all of it, before it costs memory or reaches a socket.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import io
import os
import re
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Mapping
from types import MethodType, TracebackType
from typing import Any, NoReturn

from ipykernel.ipkernel import IPythonKernel
from IPython.core.display import DisplayObject

from sandbox.excerpt import Excerpt
from sandbox.limits import Limits

PUBLISH_CHARS = 2000
PUBLISH_INTERVAL_S = 0.1
MAX_SOURCE_CHARS = 200
MAY_AWAIT = re.compile("a(wait|sync)").search
"""Cheaper than to compile a cell for nothing but that."""
ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
"""Colours and the like, which a model would read as noise."""
QUIET_WARNINGS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, SyntaxWarning)
"""About the style of the code, not about its result."""


class CellOutput(io.TextIOBase):
    """Stands for both sys.stdout and sys.stderr, so that their order is kept.

    Only the main thread of the kernel process sends; other threads leave their text for it to take along,
    and forked children are ignored, because zmq sockets belong to one thread of one process.
    """

    def __init__(self, kernel: IPythonKernel, max_chars: int) -> None:
        self._kernel = kernel
        self._max_chars = max_chars
        self._lock = threading.Lock()
        self._muted: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        self.begin_cell()

    encoding = "utf-8"  # pyright: ignore[reportAssignmentType]

    def writable(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        if os.getpid() == self._owner_pid and threading.current_thread() not in self._muted:
            shown = ANSI.sub("", text)
            with self._lock:
                if shown:
                    self._is_line_open = shown[-1] != "\n"
                if ahead := self._excerpt.add(shown):
                    self._pending.append(ahead)
                    self._num_pending += len(ahead)
            if self._num_pending > PUBLISH_CHARS or time.monotonic() > self._publish_at:
                self.flush()
        return len(text)

    def write_line(self, text: str) -> None:
        """Write `text` on lines of its own."""
        self.write(("\n" if self._is_line_open else "") + text + "\n")

    def warn(self, text: str) -> None:
        """Keep a warning for the end of the cell, where it parts no output."""
        self._warnings[text] = None

    def write_warnings(self) -> None:
        for text in self._warnings:
            self.write_line(text)
        self._warnings = {}

    def flush(self) -> None:
        self._publish()

    def begin_cell(self) -> None:
        """Forget the cell before, and what its threads have printed since it ended."""
        with self._lock:
            self._owner_pid = os.getpid()
            self._excerpt = Excerpt(self._max_chars)
            self._warnings: dict[str, None] = {}
            self._pending: list[str] = []
            self._num_pending = 0
            self._is_line_open = False
            self._publish_at = time.monotonic() + PUBLISH_INTERVAL_S

    def end_cell(self) -> None:
        """Send what was held back."""
        self.write_warnings()
        num_cut, tail = self._excerpt.take_tail()
        self._publish(num_cut, tail)

    def mute_other_threads(self) -> None:
        """Drop what threads of an interrupted cell go on to print: it is no output of the next one."""
        self._muted.update(t for t in threading.enumerate() if t is not threading.main_thread())

    def _publish(self, num_cut: int = 0, tail: str = "") -> None:
        if threading.current_thread() is not threading.main_thread() or os.getpid() != self._owner_pid:
            return
        with self._lock:
            text = "".join(self._pending)
            self._pending.clear()
            self._num_pending = 0
            self._publish_at = time.monotonic() + PUBLISH_INTERVAL_S
        if text or tail:
            content = {"name": "stdout", "text": _encodable(text)}
            if tail:
                content |= {"tail": _encodable(tail), "num_cut": num_cut}
            self._kernel.send_response(self._kernel.iopub_socket, "stream", content)


def shape_output(kernel: IPythonKernel, limits: Limits) -> None:
    """Make `kernel` show its cells as the model should read them."""
    shell: Any = kernel.shell
    output = CellOutput(kernel, limits.max_output_chars)
    sys.stdout = sys.stderr = output
    shell.events.register("pre_run_cell", lambda info: output.begin_cell())
    shell.events.register("post_run_cell", lambda result: output.end_cell())

    plain = shell.display_formatter
    plain.active_types = ["text/plain"]
    text_formatter = plain.formatters["text/plain"]
    text_formatter.for_type = _without_sympy_printing(text_formatter.for_type)
    text_formatter.for_type(DisplayObject, lambda shown, printer, cycle: printer.text(str(shown.data)))
    shell.displayhook.write_format_data = lambda data, metadata=None: output.write_line(_plain_text(data))
    shell.display_pub.publish = lambda data, metadata=None, **kwargs: output.write_line(_plain_text(data))
    shell.display_pub.clear_output = lambda wait=False: None

    def show_error(shell: Any, exc_tuple: Any = None, *args: Any, **kwargs: Any) -> None:
        error_type, error, trace = shell._get_exc_info(exc_tuple)
        if isinstance(error, SystemExit) and error.code in (None, 0):
            return
        if isinstance(error, KeyboardInterrupt):
            output.mute_other_threads()
        output.write_warnings()
        summary = describe_error(error, trace, sources, shell.execution_count - 1)
        output.write_line(summary + limit_note(error, limits))
        kernel.send_response(
            kernel.iopub_socket, "error", {"ename": error_type.__name__, "evalue": "", "traceback": []}
        )

    def leave_cell() -> None:
        raise SystemExit

    def name_cell(raw_code: str, code: str, number: int) -> str:
        name = f"<cell {number}>"
        written, run = raw_code.splitlines(), code.splitlines()
        sources[name] = written if len(written) == len(run) else run  # as the model wrote it, magics and all
        return name

    def no_program(*args: Any, **kwargs: Any) -> NoReturn:
        raise OSError("programs cannot be started here, and nothing can be installed: use Python")

    sources: dict[str, list[str]] = {}

    shell.showtraceback = MethodType(show_error, shell)
    shell.showsyntaxerror = lambda *args, **kwargs: show_error(shell)
    # For a history that is not kept, IPython would copy all output into memory, where a print bomb fills it,
    # and render each error in full, which takes 20 to 300 ms.
    shell._tee = lambda channel: contextlib.nullcontext()
    shell._format_exception_for_storage = lambda *args, **kwargs: {}
    # The owner knows what it sent, and would read it back.
    kernel._publish_execute_input = lambda code, parent, execution_count: None
    transform_cell = shell.transform_cell
    shell.transform_cell = lambda code: code if _is_python(code) else transform_cell(code)
    should_run_async = shell.should_run_async
    shell.should_run_async = lambda code, **kwargs: (
        MAY_AWAIT(code) is not None and should_run_async(code, **kwargs)
    )
    shell.ask_exit = leave_cell  # exit() ends the cell, not the session
    shell.compile.get_code_name = name_cell
    if not limits.max_processes:
        shell.system = shell.getoutput = os.system = no_program

    for category in QUIET_WARNINGS:
        warnings.simplefilter("ignore", category)
    warnings.filterwarnings("ignore", message="To exit: use")
    warnings.showwarning = lambda message, category, *args: output.warn(f"{category.__name__}: {message}")


def describe_error(
    error: BaseException, trace: TracebackType | None, sources: Mapping[str, list[str]], current_cell: int
) -> str:
    """The deepest line of the model's own code on the way to the error, then the error.

    Args:
        sources: the lines of each cell, by the name of its code.
        current_cell: its number.
    """
    place = None
    for frame, line in traceback.walk_tb(trace):
        if frame.f_code.co_filename in sources:
            place = frame.f_code.co_filename, line
    if isinstance(error, SyntaxError) and error.filename and error.filename in sources:
        place = error.filename, error.lineno or 1
    message = message_of(error)
    summary = f"{type(error).__name__}: {message}" if message else type(error).__name__
    if place is None:
        return summary
    name, line = place
    lines = sources[name]
    source = lines[line - 1].strip()[:MAX_SOURCE_CHARS] if line <= len(lines) else ""
    cell = "" if name == f"<cell {current_cell}>" else f" of {name[1:-1]}"
    return f"Line {line}{cell}: {source}\n{summary}"


def limit_note(error: BaseException, limits: Limits) -> str:
    """What the model should know of its limits, if one of them is what it ran into."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError):
        note = f"the limit is {limits.memory_mb} MiB of memory"
    elif isinstance(error, RuntimeError) and str(error) == "can't start new thread":
        note = f"the limit is {limits.max_threads} threads"
    elif number == errno.EFBIG:
        note = f"the limit is {limits.max_file_mb} MiB a file"
    elif number == errno.ENOSPC:
        note = f"the limit is {limits.scratch_mb} MiB for all files"
    elif number == errno.EMFILE:
        note = f"the limit is {limits.max_open_files} open files"
    elif number == errno.EPERM:
        note = "the sandbox does not allow it"
    else:
        return ""
    return f" [{note}]"


def message_of(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return str(error.msg)
    try:
        message = str(error).strip()
    except Exception as failure:
        return f"<its message raised {type(failure).__name__}>"
    if isinstance(error, ImportError) and error.path:
        message = message.replace(f" ({error.path})", "")
    return message


def _is_python(code: str) -> bool:
    """Whether there is nothing of IPython's own in the code: no magic, no prompt, no indent of the whole."""
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return not code.startswith("In [")  # a prompt that is also an annotation


def _plain_text(data: dict[str, Any]) -> str:
    return str(data.get("text/plain", ""))


def _without_sympy_printing(for_type: Any) -> Any:
    """Let everything register a text form except `sympy.init_printing`.

    Its two-dimensional form cannot be copied back into code, and models call it by habit.
    """

    def for_other_types(kind: Any, function: Any = None) -> Any:
        if getattr(function, "__module__", "") == "sympy.interactive.printing":
            return None
        return for_type(kind, function)

    return for_other_types


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
