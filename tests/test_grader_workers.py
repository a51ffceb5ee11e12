"""The grader as a system of processes: deadlines, killed workers, threads, asyncio, signals, nothing left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtpo.answer_text import MAX_CHARS
from mtpo.answers import extract_answer
from mtpo.grader import Grade, Grader, decide_here, grade

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")

HARD = (r"\boxed{\sqrt{50}x}", r"5\sqrt{2}x")
"""A pair that only algebra decides."""

SLOW = rf"\boxed{{\max({'x,' * 280}x)}}"
"""The parser needs many seconds of CPU for it."""

BOMBS = [
    "9^{9^{9^{9}}}",
    "(a+b+c+d+e+f)^{100000}",
    "10^{10^{10}}",
    "(10^{10})!",
    r"\sqrt{" * 800 + "2" + "}" * 800,
    "(" * 5000,
    "{" * 5000,
    "-" * 3000 + "5",
    "+".join(["1"] * 20_000),
    "7," * 20_000,
    "x" * 50_000,
    r"\frac{1}{" * 400,
    r"\sum_{k=1}^{10^{9}} k",
    r"\int_0^1 e^{x^2} dx",
    r"\begin{pmatrix}" * 300,
    "2^" * 900 + "2",
    r"\binom{10^9}{5 \cdot 10^8}",
    r"\sqrt{2}^{9999999999}",
    r"\pi^{9999}" + "^{9999}" * 3,
    "[" * 900 + "1" + "]" * 900,
    r"\pm " * 600 + "1",
    r"x^{1/2}" * 200,
    r"\text{" * 600,
    "5." + "0" * 500_000 + "1",
    ".1" * 200_000,
    "0.1234" + "5" * 1900 + "...",
    "{" * 49 + "[" * 49 + "1" + "]" * 49 + "}" * 49,
    r"\cup" * 400,
    "x<1 or " * 250 + "x<2",
    ",".join(str(n) for n in range(60)),
    ",".join(rf"\sqrt{{{n}}}" for n in range(2, 90)),
    r"\cos(10^{10^{10}})",
    r"\sin(\exp(\exp(99)))",
    r"\tan(9^{9999}) + x",
    r"e^{e^{e^{e^{e}}}}",
    r"3^{9999 \cdot 9999} + x",
    r"(9999!)^{x}",
    r"((x!)!)!",
    r"\binom{9999x}{999}",
    r"\sqrt[9999]{x}",
    r"((x^{999})^{999})^{999}",
    r"\zeta(\frac{1}{2} + 9999i)",
    "21" * 990,
    r"x \ne 1 \land " * 100 + r"x \ne 2",
    r"\mathbb{R} \setminus " * 60 + r"\{1\}",
    "x = " * 400 + "7",
    r"\approx 8" * 200,
]


def descendants(pid: int) -> list[int]:
    """The processes below a process, but for zombies."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    children = parents.get(pid, [])
    return children + [below for child in children for below in descendants(child)]


def workers_of(grader: Grader) -> list[int]:
    assert grader._pool is not None
    zygote = grader._pool._zygote._process
    return descendants(zygote.pid) if zygote else []


@pytest.fixture
def grader() -> Iterator[Grader]:
    with Grader(workers=2, timeout_s=2.0) as grader:
        yield grader


@pytest.fixture(scope="module")
def warm_grader() -> Iterator[Grader]:
    with Grader(workers=1, timeout_s=2.0) as grader:
        assert grader.grade(*HARD).verdict == "correct"
        yield grader


@pytest.mark.parametrize("bomb", BOMBS, ids=range(len(BOMBS)))
@pytest.mark.parametrize("gold", ["7", r"2\sqrt{7} + x", "(1, 7)"])
def test_a_bomb_is_never_correct_and_costs_the_caller_little(
    warm_grader: Grader, gold: str, bomb: str
) -> None:
    start = time.process_time()  # of this process alone: what a worker may take is its own deadline
    assert warm_grader.grade(rf"\boxed{{{bomb}}}", gold).verdict != "correct"
    assert time.process_time() - start < 5


_PIECES = r"""
    \frac{ \sqrt{ \text{ \binom{ \boxed{ \overline{ \begin{pmatrix} \end{pmatrix} \left( \right) ^{ _{ { } ( ) [ ] \{ \}
    | \\ & = < > \le \ge \ne \in \pm \cup \setminus \approx \infty \lor ^\circ \% \$ $ . , ; : ! + - * / ** ...
    1 20 0.5 999999 x ab i e pi \pi miles cm and or base a.m. Interval( Union( Matrix([[ Point(
"""
PIECES = _PIECES.split()


@given(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=4),
    st.integers(1, 600),
    st.lists(st.sampled_from(PIECES), max_size=30),
    st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_what_the_caller_does_itself_is_bounded(
    unit: list[str], times: int, rest: list[str], is_spaced: bool
) -> None:
    glue = " " if is_spaced else ""
    text = glue.join([glue.join(unit)] * times + rest)[:MAX_CHARS]
    start = time.process_time()
    for gold, answer in (("(1, 2)", text), (text, "x^2"), (text[:300], text)):
        decide_here(answer, gold)
    extract_answer(text * 50)
    assert time.process_time() - start < 20  # the slowest that is known takes half a second


def test_a_comparison_beyond_its_deadline_is_ungraded() -> None:
    with Grader(workers=1, timeout_s=0.001) as grader:
        grade = grader.grade(*HARD)
        assert (grade.verdict, grade.answer) == ("ungraded", r"\sqrt{50}x")
        assert grade.rule in ("timeout", "wall_timeout")


def test_the_deadline_ends_a_worker_deep_in_the_parser() -> None:
    with Grader(workers=1, timeout_s=0.4) as grader:
        assert grader.grade(*HARD).verdict == "correct"
        start = time.process_time()
        slow = grader.grade(SLOW, r"\sqrt{3} + x")
        assert (slow.verdict, slow.rule) == ("ungraded", "timeout")
        assert time.process_time() - start < 0.3  # the caller only waits
        assert grader.grade(r"\boxed{\sqrt{72}x}", r"6\sqrt{2}x").verdict == "correct"


@needs_proc
def test_closing_leaves_no_process() -> None:
    before = set(descendants(os.getpid()))
    with Grader(workers=2) as grader:
        grader.grade_many([(rf"\boxed{{\sqrt{{{n * n * 2}}}x}}", rf"{n}\sqrt{{2}}x") for n in range(3, 9)])
        assert len(set(descendants(os.getpid())) - before) == 3  # the zygote and two workers
    assert set(descendants(os.getpid())) <= before


@needs_proc
def test_a_caller_that_is_killed_leaves_no_process() -> None:
    code = (
        "import os, sys; from mtpo.grader import grade;"
        r"print(grade(r'\boxed{\sqrt{50}x}', r'5\sqrt{2}x').verdict, flush=True); sys.stdin.read()"
    )
    caller = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert caller.stdout is not None
    assert caller.stdout.readline() == "correct\n"
    below = descendants(caller.pid)
    assert len(below) >= 2
    caller.kill()
    caller.communicate()
    deadline = time.monotonic() + 10
    while alive := [pid for pid in below if Path(f"/proc/{pid}/stat").exists() and not is_zombie(pid)]:
        assert time.monotonic() < deadline, alive


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@needs_proc
def test_killed_workers_lose_nothing(grader: Grader) -> None:
    killed: set[int] = set()
    first = 2
    while len(killed) < 4:  # however fast the machine is: batch after batch of pairs not seen before
        pairs = [(rf"\boxed{{\sqrt{{{n * n * 3}}}x}}", rf"{n}\sqrt{{3}}x") for n in range(first, first + 60)]
        first += len(pairs)
        grades: list[Grade] = []
        batch = threading.Thread(
            target=lambda todo, done: done.extend(grader.grade_many(todo)), args=(pairs, grades)
        )
        batch.start()
        last = len(killed) + 2  # so that no pair can lose all its attempts
        while batch.is_alive() and len(killed) < last:
            fresh = set(workers_of(grader) if grader._pool else []) - killed
            if fresh:
                killed.add(pid := fresh.pop())
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        batch.join()
        assert [grade.verdict for grade in grades] == ["correct"] * len(pairs)


@needs_proc
def test_a_killed_zygote_is_replaced(grader: Grader) -> None:
    assert grader.grade(*HARD).verdict == "correct"
    assert grader._pool is not None
    zygote = grader._pool._zygote._process
    assert zygote is not None
    for pid in [*descendants(zygote.pid), zygote.pid]:
        os.kill(pid, signal.SIGKILL)
    assert grader.grade(r"\boxed{\sqrt{98}x}", r"7\sqrt{2}x").verdict == "correct"


def test_grading_in_threads(grader: Grader) -> None:
    verdicts: dict[int, str] = {}

    def work(n: int) -> None:
        verdicts[n] = grader.grade(rf"\boxed{{\sqrt{{{n * n * 5}}}x}}", rf"{n}\sqrt{{5}}x").verdict

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == dict.fromkeys(range(2, 10), "correct")


async def test_grading_under_asyncio() -> None:
    assert grade(*HARD).verdict == "correct"  # in the loop's own thread
    grades = await asyncio.gather(*(asyncio.to_thread(grade, *HARD) for _ in range(4)))
    assert {grade.verdict for grade in grades} == {"correct"}


def test_the_callers_alarm_still_fires(grader: Grader) -> None:
    fired: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: fired.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        assert grader.grade(*HARD).verdict == "correct"
        while not fired and signal.getitimer(signal.ITIMER_REAL)[0] > 0:
            pass
        assert fired == [signal.SIGALRM]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_equal_pairs_are_compared_once(grader: Grader) -> None:
    pairs = [HARD, (r"\boxed{2}", "2"), (r"So it is $\boxed{2}$.", "2")] * 3_334
    grades = grader.grade_many(pairs)
    assert len(grades) == 10_002
    assert {grade.verdict for grade in grades} == {"correct"}
    assert grader.num_compared == 2
    grader.grade_many(pairs)
    assert grader.num_compared == 2


def test_grades_come_in_order(grader: Grader) -> None:
    grades = grader.grade_many([(r"\boxed{1}", "1"), HARD, ("nothing", "1"), (r"\boxed{\sqrt 2}", "2")])
    assert [grade.verdict for grade in grades] == ["correct", "correct", "wrong", "wrong"]


INJECTIONS = [
    "open('{path}','w')",
    "__import__('os').system('touch {path}')",
    "eval(\"open('{path}','w')\")",
    "exec('import os; os.mknod(\"{path}\")')",
    "().__class__.__base__.__subclasses__()",
    r"\sqrt{{open('{path}','w')}}",
    "[open('{path}','w') for x in [1]]",
    "lambda: open('{path}','w')",
    'S(\'open("{path}","w")\')',
    "x.__init__.__globals__",
    "\\input{{{path}}}",
    "\\write18{{touch {path}}}",
    "f(open('{path}','w'))",
]


@pytest.mark.parametrize("text", INJECTIONS)
@pytest.mark.parametrize("gold", ["4", r"\sqrt{5}+x", "(1,2)"])
def test_an_injection_runs_nothing(warm_grader: Grader, tmp_path: Path, text: str, gold: str) -> None:
    path = tmp_path / "created"
    answer = text.format(path=path)
    assert warm_grader.grade(rf"\boxed{{{answer}}}", gold).verdict == "wrong"
    assert not path.exists()


def test_python_that_computes_the_gold_is_no_answer(warm_grader: Grader) -> None:
    assert warm_grader.grade(r'\boxed{eval("2+2")}', "4").verdict == "wrong"


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        Grader(workers=0)
    with pytest.raises(ValueError, match="timeout_s must be positive, got -1"):
        Grader(timeout_s=-1)
