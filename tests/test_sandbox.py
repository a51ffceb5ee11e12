"""What a session promises, whichever kernel stands behind it."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from mtpo.errors import InputError, SandboxError
from mtpo.rollout import Interpreter
from sandbox import InterpreterPool, Limits, run_code
from sandbox.session import Session
from tests.processes import kernels_of, wait_until_gone

pytestmark = pytest.mark.asyncio(loop_scope="module")

KERNELS = ("zygote", "ipykernel")
IGNORE_INTERRUPTS = """
import time
while True:
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        pass
"""


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=KERNELS)
async def pool(request: pytest.FixtureRequest) -> AsyncIterator[InterpreterPool]:
    async with InterpreterPool(Limits(max_output_chars=1000), kernel=request.param, preload=()) as pool:
        yield pool


@pytest_asyncio.fixture(loop_scope="module")
async def session(pool: InterpreterPool) -> AsyncIterator[Session]:
    async with pool.session() as session:
        yield session


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shared(pool: InterpreterPool) -> AsyncIterator[Session]:
    """For cells that leave nothing behind."""
    async with pool.session() as session:
        yield session


async def start(session: Session) -> set[int]:
    """Start the session's kernel, and find its process."""
    others = set(kernels_of(session._pool))
    await session.execute("x = 1")
    return set(kernels_of(session._pool)) - others


async def texts(session: Session, *cells: str) -> list[str]:
    return [(await session.execute(cell, timeout_s=20)).text for cell in cells]


async def test_state_is_kept_from_cell_to_cell(session: Session) -> None:
    assert await texts(session, "x = 20", "x += 1", "x * 2") == ["[no output]", "[no output]", "42"]


async def test_sessions_do_not_see_each_other(pool: InterpreterPool) -> None:
    async with pool.session() as one, pool.session() as two:
        await texts(one, "x = 1")
        assert (await texts(two, "'x' in globals()"))[0] == "False"
        await texts(two, "x = 2")
        assert (await texts(one, "x"))[0] == "1"


async def test_execution_says_what_ran_and_how_it_went(session: Session) -> None:
    execution = await session.execute("import time; time.sleep(0.2)\n1 / 0", timeout_s=10)
    assert (execution.code, execution.status) == ("import time; time.sleep(0.2)\n1 / 0", "error")
    assert 0.2 <= execution.seconds < 5
    assert (await session.execute("1")).status == "ok"


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("'a'", "'a'"),
        ("x = 1", "[no output]"),
        ("", "[no output]"),
        ("print()", "[no output]"),
        ("1;", "[no output]"),
        ("import sys\nprint('a')\nprint('b', file=sys.stderr)\nprint('c', end='')\n'd'", "a\nb\nc\n'd'"),
        ("from IPython.display import display\ndisplay([1], 'two')\n3", "[1]\n'two'\n3"),
        ("{'a': [1, 2]}", "{'a': [1, 2]}"),
        ("print('\\ud800')", "?"),
        ("print('\\x1b[1;31mred\\x1b[0m')", "red"),
        ("from IPython.display import Math\nMath('x^2')", "x^2"),
        ("import sys\nsys.argv", "['']"),
        ("print('\ud800')", "?"),
        ("import warnings\nwarnings.warn('careful')", "UserWarning: careful"),
        (
            "print('a')\nfor _ in 'ab': warnings.warn('careful')\nprint('b')\n3",
            "a\nb\n3\nUserWarning: careful",
        ),
        ("eval('1 is 1')", "True"),
        ("print('a')\nexit()\nprint('b')", "a"),
        ("import os\nos.getcwd()", "'.'"),
        ("import threading\nt = threading.Thread(target=print, args=('a',))\nt.start(); t.join()", "a"),
    ],
)
async def test_cell_reads_as(shared: Session, code: str, text: str) -> None:
    execution = await shared.execute(code, timeout_s=20)
    assert (execution.text, execution.status) == (text, "ok")


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("a = 1\nb = a / 0", "Line 2: b = a / 0\nZeroDivisionError: division by zero"),
        ("def f():\n    return 1 / 0\n\nf()", "Line 2: return 1 / 0\nZeroDivisionError: division by zero"),
        ("import json\njson.loads('')", "Line 2: json.loads('')\nJSONDecodeError: Expecting value: line 1 column 1 (char 0)"),  # noqa: E501
        ("print(1)\nx = = 2", "Line 2: x = = 2\nSyntaxError: invalid syntax"),
        ("if True:\nx = 1", "Line 2: x = 1\nIndentationError: expected an indented block after 'if' statement on line 1"),  # noqa: E501
        ("exec('y = (')", "Line 1: exec('y = (')\nSyntaxError: '(' was never closed"),
        ("raise ValueError", "Line 1: raise ValueError\nValueError"),
        ("x = 1\n!pip install sympy", "Line 2: !pip install sympy\nOSError: programs cannot be started here, and nothing can be installed: use Python"),  # noqa: E501
        ("import os\nos.system('ls')", "Line 2: os.system('ls')\nOSError: programs cannot be started here, and nothing can be installed: use Python"),  # noqa: E501
        ("import warnings\nwarnings.warn('w')\nprint(1)\n1 / 0", "1\nUserWarning: w\nLine 4: 1 / 0\nZeroDivisionError: division by zero"),  # noqa: E501
        ("x = bytearray(2**34)", "Line 1: x = bytearray(2**34)\nMemoryError [the limit is 1024 MiB of memory]"),
        ("open('f', 'wb').write(bytes(17 * 2**20))", "Line 1: open('f', 'wb').write(bytes(17 * 2**20))\nOSError: [Errno 27] File too large [the limit is 16 MiB a file]"),  # noqa: E501
        ("{}['k']", "Line 1: {}['k']\nKeyError: 'k'"),
        ("from json import nothing", "Line 1: from json import nothing\nImportError: cannot import name 'nothing' from 'json'"),  # noqa: E501
        ("import sys\nsys.exit('no')", "Line 2: sys.exit('no')\nSystemExit: no"),
        ("class E(Exception):\n  def __str__(self): return 1 / 0\nraise E", "Line 3: raise E\nE: <its message raised ZeroDivisionError>"),  # noqa: E501
        ("class R:\n  def __repr__(self): return 1 / 0\nR()", "Line 2: def __repr__(self): return 1 / 0\nZeroDivisionError: division by zero"),  # noqa: E501
    ],
)  # fmt: skip
async def test_error_names_the_last_own_line(shared: Session, code: str, text: str) -> None:
    execution = await shared.execute(code, timeout_s=20)
    assert (execution.text, execution.status) == (text, "error")


async def test_error_in_an_earlier_cell_names_that_cell(session: Session) -> None:
    assert (await texts(session, "def f():\n    return nothing", "f()"))[1] == (
        "Line 2 of cell 1: return nothing\nNameError: name 'nothing' is not defined"
    )


async def test_input_fails_at_once(session: Session) -> None:
    execution = await session.execute("input('how many? ')", timeout_s=20)
    assert execution.status == "error"
    assert execution.text.startswith("Line 1: input('how many? ')\nStdinNotImplementedError")
    assert execution.seconds < 2


async def test_sympy_prints_what_can_be_copied_back(session: Session) -> None:
    cell = "from sympy import *\ninit_printing()\nx = symbols('x')\nprint(x**2)\nsqrt(x)/2"
    assert await texts(session, cell, "[x**2, Rational(1, 3)]") == ["x**2\nsqrt(x)/2", "[x**2, 1/3]"]


async def test_long_output_keeps_head_and_tail_and_counts_the_rest(session: Session) -> None:
    text = (await session.execute("print('a' * 3000)\n'b' * 3000", timeout_s=20)).text
    head, marker, tail = text.split("\n")
    num_cut = int(marker.removeprefix("[... ").removesuffix(" characters cut ...]"))
    assert head == "a" * 500
    assert tail == "b" * (len(tail) - 1) + "'"
    assert len(text) <= 1000
    assert len(head) + num_cut + len(tail) == len("a" * 3000 + "\n" + repr("b" * 3000))


async def test_print_bomb_fills_neither_memory_nor_client(session: Session) -> None:
    execution = await session.execute("while True: print('x' * 10**6)", timeout_s=1)
    assert execution.status == "timeout"
    assert "variables are kept" in execution.text
    assert len(execution.text) < 1200
    peak_kb = "import resource\nresource.getrusage(resource.RUSAGE_SELF).ru_maxrss"
    assert int((await texts(session, peak_kb))[0]) < 200_000


async def test_timeout_interrupts_and_keeps_the_state(session: Session) -> None:
    await session.execute("x = 1")
    execution = await session.execute("print('start')\nwhile True: pass", timeout_s=0.5)
    assert execution.status == "timeout"
    assert execution.text == (
        "start\nLine 2: while True: pass\nKeyboardInterrupt\n"
        "[stopped after 0.5 s, the time limit; variables are kept]"
    )
    assert await texts(session, "x") == ["1"]


@pytest.mark.parametrize("code", [IGNORE_INTERRUPTS, "import itertools\nsum(itertools.repeat(0))"])
async def test_cell_that_ignores_the_interrupt_is_killed(session: Session, code: str) -> None:
    pids = await start(session)
    execution = await session.execute(code, timeout_s=0.5)
    assert execution.status == "timeout"
    assert execution.text == (
        "[stopped after 0.5 s, the time limit; the interpreter was restarted, all variables are gone]"
    )
    assert 1.0 <= execution.seconds < 3
    assert len(pids) == 1
    await wait_until_gone(pids)
    assert await texts(session, "'x' in globals()") == ["False"]


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("import os\nos._exit(3)", "exit code 3"),
        ("import os\nos.kill(os.getpid(), 9)", "signal SIGKILL"),
        ("import ctypes\nctypes.string_at(0)", "signal SIGSEGV"),
    ],
)
async def test_death_is_reported_at_once(session: Session, code: str, how: str) -> None:
    await session.execute("x = 1")
    execution = await session.execute(code, timeout_s=60)
    assert execution.status == "died"
    assert execution.text == f"[the interpreter died ({how}) and was restarted; all variables are gone]"
    assert execution.seconds < 5
    assert await texts(session, "'x' in globals()") == ["False"]


async def test_death_between_cells_is_told_with_the_next_one(session: Session) -> None:
    await session.execute("import threading, os\nthreading.Timer(0.1, os._exit, [1]).start()")
    assert session._kernel is not None
    await asyncio.wait_for(asyncio.shield(session._kernel.exited), 10)
    assert await texts(session, "1", "2") == [
        "[the interpreter died since the last cell; all variables are gone]\n1",
        "2",
    ]


async def test_cells_may_await(session: Session) -> None:
    cells = ("import asyncio\nx = await asyncio.sleep(0.01, 5)\nx", "x + 1")
    assert await texts(session, *cells) == ["5", "6"]
    execution = await session.execute("while True: await asyncio.sleep(60)", timeout_s=0.3)
    assert (execution.status, execution.text) == (
        "timeout",
        "Line 1: while True: await asyncio.sleep(60)\nCancelledError\n"
        "[stopped after 0.3 s, the time limit; variables are kept]",
    )
    assert await texts(session, "x") == ["5"]


async def test_cells_may_run_event_loops(pool: InterpreterPool) -> None:
    if pool._kind == "ipykernel":
        pytest.skip("a stock kernel runs cells in an event loop of its own")
    async with pool.session() as session:
        cells = (
            "import asyncio\nasync def f(x):\n    await asyncio.sleep(0.01)\n    return x\nasyncio.run(f(1))",
            "task = asyncio.ensure_future(f(2))\nawait f(3)",
            "await task",
        )
        assert await texts(session, *cells) == ["1", "3", "2"]
        twin = await session.fork()
        assert await texts(twin, "await f(4)") == ["4"]
        await twin.close()


async def test_what_parses_as_python_is_left_alone(session: Session) -> None:
    assert await texts(session, "t = '''\n>>> a\n!b\n'''\nt", "%%capture\n1", "!ls is_no_program") == [
        repr("\n>>> a\n!b\n"),
        "[no output]",
        "Line 1: !ls is_no_program\nOSError: programs cannot be started here, and nothing can be installed: use Python",
    ]


async def test_a_kernel_that_breaks_its_connection_stops_only_itself(session: Session) -> None:
    cell = (
        "import os, socket\nfor fd in range(3, 64):\n    try: socket.socket(fileno=os.dup(fd)).send(b'{}' * 50)\n"
        "    except OSError: pass"
    )
    first = await session.execute(cell, timeout_s=0.5)
    second = await session.execute("1", timeout_s=0.5)
    assert {first.status, second.status} & {"timeout", "died"}
    assert await texts(session, "2") == ["2"]


async def test_late_output_of_a_stopped_cell_never_shows(session: Session) -> None:
    cell = (
        "import threading, time\n"
        "def talk():\n    while True:\n        print('late')\n        time.sleep(0.001)\n"
        "t = threading.Thread(target=talk, daemon=True)\nt.start()\nt.join()"
    )
    assert "late" in (await session.execute(cell, timeout_s=0.5)).text
    assert await texts(session, "time.sleep(0.2)\n'on time'") == ["'on time'"]


async def test_messages_of_an_earlier_cell_are_not_taken_for_this_one(session: Session) -> None:
    send = (
        "kernel = get_ipython().kernel\nfor state in ('busy', 'idle'):\n"
        "    kernel.session.send(kernel.iopub_socket, 'status', {'execution_state': state}, parent=earlier)\n"
        "kernel.session.send(kernel.iopub_socket, 'stream', {'name': 'stdout', 'text': 'late'}, parent=earlier)\n"
        "'on time'"
    )
    assert await texts(session, "earlier = get_ipython().get_parent()", send) == ["[no output]", "'on time'"]


async def test_a_busy_event_loop_is_no_timeout(session: Session) -> None:
    await session.execute("1")
    running = asyncio.ensure_future(session.execute("'done'", timeout_s=0.2))
    for _ in range(5):
        await asyncio.sleep(0)
    time.sleep(0.5)  # the owner computes; the kernel has long finished
    assert (await running).status == "ok"


async def test_cells_of_one_session_wait_for_each_other(session: Session) -> None:
    cells = [session.execute(f"x = {i}\nimport time\ntime.sleep(0.1)\nx", timeout_s=20) for i in range(3)]
    assert [e.text for e in await asyncio.gather(*cells)] == ["0", "1", "2"]


async def test_scratch_directory_goes_with_the_session(pool: InterpreterPool) -> None:
    async with pool.session() as session:
        assert await texts(session, "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').write('1')") == ["1"]
    assert list(pool._directory.glob("**/a")) == []
    async with pool.session() as session:
        assert await texts(session, "import os\nos.listdir()") == ["[]"]


async def test_cancelling_kills_the_cell(session: Session) -> None:
    pids = await start(session)
    running = asyncio.ensure_future(session.execute("while True: pass", timeout_s=60))
    await asyncio.sleep(0.1)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert len(pids) == 1
    await wait_until_gone(pids)
    assert await texts(session, "1") == ["1"]


async def test_closed_session_runs_nothing(pool: InterpreterPool) -> None:
    session = pool.session()
    await texts(session, "1")
    await session.close()
    await session.close()
    with pytest.raises(SandboxError, match="closed"):
        await session.execute("1")


async def test_closing_ends_a_running_cell(pool: InterpreterPool) -> None:
    session = pool.session()
    pids = await start(session)
    running = asyncio.ensure_future(session.execute("while True: pass", timeout_s=60))
    await asyncio.sleep(0.1)
    await session.close()
    with pytest.raises(SandboxError, match="closed"):
        await running
    assert len(pids) == 1
    await wait_until_gone(pids)


async def test_pool_is_an_interpreter(pool: InterpreterPool) -> None:
    interpreter: Interpreter = pool
    assert (await interpreter.session().execute("1")).text == "1"


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf")])
async def test_impossible_timeouts_are_refused(session: Session, timeout_s: float) -> None:
    with pytest.raises(InputError, match="timeout_s must be a positive number"):
        await session.execute("1", timeout_s=timeout_s)


async def test_run_code_works_inside_a_running_loop() -> None:
    execution = run_code("x = 6\nx * 7")
    assert (execution.text, execution.status) == ("42", "ok")
