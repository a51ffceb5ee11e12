"""What is remembered of code, in which state, and when it is run after all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from data.trajectories import read_trajectories
from mtpo.errors import InputError, SandboxError
from recipes import generate
from sandbox import InterpreterPool
from sandbox.cache import CachingInterpreter, ExecutionCache
from sandbox.session import Session
from tests.coin import SHORT, write_problems_file

with_pool = pytest.mark.asyncio(loop_scope="module")


class CountingInterpreter:
    """The pool, and the code that reached it."""

    def __init__(self, pool: InterpreterPool) -> None:
        self.pool = pool
        self.ran: list[str] = []

    def session(self) -> Session:
        session, execute = self.pool.session(), Session.execute

        async def counted(code: str, timeout_s: float = 5.0):
            self.ran.append(code)
            return await execute(session, code, timeout_s)

        session.execute = counted
        return session


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def pool() -> AsyncIterator[InterpreterPool]:
    async with InterpreterPool(preload=()) as pool:
        yield pool


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ExecutionCache]:
    cache = ExecutionCache(tmp_path / "executions.sqlite")
    yield cache
    cache.close()


async def play(interpreter: CachingInterpreter, *cells: str) -> list[str]:
    async with interpreter.session() as session:
        return [(await session.execute(code)).text for code in cells]


@with_pool
async def test_code_runs_once_in_each_state(pool: InterpreterPool, cache: ExecutionCache) -> None:
    inner = CountingInterpreter(pool)
    interpreter = CachingInterpreter(inner, cache)
    assert await play(interpreter, "x = 2", "x + 1") == ["[no output]", "3"]
    assert await play(interpreter, "x = 2", "x + 1") == ["[no output]", "3"]
    assert inner.ran == ["x = 2", "x + 1"]
    assert await play(interpreter, "x = 5", "x + 1") == ["[no output]", "6"]
    [error] = await play(interpreter, "x + 1")
    assert error.endswith("NameError: name 'x' is not defined")
    assert [error] == await play(interpreter, "x + 1")
    assert len(inner.ran) == 5


@with_pool
async def test_new_code_after_what_was_told_finds_the_state(
    pool: InterpreterPool, cache: ExecutionCache
) -> None:
    inner = CountingInterpreter(pool)
    interpreter = CachingInterpreter(inner, cache)
    await play(interpreter, "x = 2", "y = x + 1")
    assert await play(interpreter, "x = 2", "y = x + 1", "x * y", "x - y") == ["[no output]"] * 2 + [
        "6",
        "-1",
    ]
    assert inner.ran == ["x = 2", "y = x + 1"] * 2 + ["x * y", "x - y"]
    assert await play(interpreter, "x = 2", "y = x + 1", "x * y", "x - y") == ["[no output]"] * 2 + [
        "6",
        "-1",
    ]
    assert len(inner.ran) == 6


@with_pool
async def test_a_fork_knows_what_its_original_was_told_or_ran(
    pool: InterpreterPool, cache: ExecutionCache
) -> None:
    interpreter = CachingInterpreter(pool, cache)
    await play(interpreter, "x = 2")
    for code in ("x = 2", "x = 3"):  # told; run
        async with interpreter.session() as session:
            await session.execute(code)
            async with await session.fork() as twin:
                await twin.execute("x += 1")
                doubled = [(await one.execute("2 * x")).text for one in (session, twin)]
            assert doubled == [str(2 * int(code[-1])), str(2 * int(code[-1]) + 2)]


@with_pool
async def test_what_depends_on_the_machine_is_not_remembered(
    pool: InterpreterPool, cache: ExecutionCache
) -> None:
    inner = CountingInterpreter(pool)
    interpreter = CachingInterpreter(inner, cache)
    for _ in range(2):
        async with interpreter.session() as session:
            assert (await session.execute("import time; time.sleep(60)", 0.2)).status == "timeout"
            assert (await session.execute("'after'")).text == "'after'"  # in a state that nobody knows
        async with interpreter.session() as session:
            assert (await session.execute("import os; os._exit(3)")).status == "died"
    assert len(inner.ran) == 6


@with_pool
async def test_code_that_does_something_else_than_was_told_is_forgotten(
    pool: InterpreterPool, cache: ExecutionCache
) -> None:
    interpreter = CachingInterpreter(pool, cache)
    draw = "import os; secret = os.urandom(8).hex(); print(secret)"
    [told] = await play(interpreter, draw)
    assert await play(interpreter, draw) == [told]
    async with interpreter.session() as session:
        await session.execute(draw)
        with pytest.raises(SandboxError, match="cell 1 is not deterministic"):
            await session.execute("secret")
    drawn, kept = await play(interpreter, draw, "secret")
    assert drawn != told and kept == repr(drawn)


@with_pool
async def test_other_limits_remember_other_things(pool: InterpreterPool, tmp_path: Path) -> None:
    inner = CountingInterpreter(pool)
    for scope in ("1024 MiB", "2048 MiB"):
        cache = ExecutionCache(tmp_path / "executions.sqlite", scope=scope)
        await play(CachingInterpreter(inner, cache), "1 + 1")
        cache.close()
    async with CachingInterpreter(
        inner, cache := ExecutionCache(tmp_path / "executions.sqlite")
    ).session() as session:
        await session.execute("1 + 1", 3.0)
        await session.execute("1 + 1", 4.0)
    cache.close()
    assert len(inner.ran) == 4


WRITER = """
import sys
from mtpo.trajectory import Execution
from sandbox.cache import ExecutionCache
cache = ExecutionCache(sys.argv[1])
for number in range(200):
    key = cache.key(cache.start, f"{number}", 5.0)
    if cache.get(key, f"{number}") is None:
        cache.put(key, Execution(f"{number}", f"{number} by {sys.argv[2]}", "ok", 0.1))
"""


def test_processes_share_the_file(tmp_path: Path) -> None:
    path = tmp_path / "executions.sqlite"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, path, name], cwd=Path(__file__).parents[1])
        for name in ("one", "two")
    ]
    assert [writer.wait() for writer in writers] == [0, 0]
    cache = ExecutionCache(path)
    found = [cache.get(cache.key(cache.start, f"{n}", 5.0), f"{n}") for n in range(200)]
    cache.close()
    assert all(
        execution is not None and execution.text.startswith(f"{n} by ") for n, execution in enumerate(found)
    )


def test_a_run_with_a_cache_samples_what_one_without_does(coin: Path, tmp_path: Path) -> None:
    problems = write_problems_file(tmp_path / "problems.jsonl", "train", 6)
    sampled = []
    for name, cache in (
        ("plain", []),
        ("first", ["--execution_cache", "c"]),
        ("second", ["--execution_cache", "c"]),
    ):
        cache = [str(tmp_path / word) if word == "c" else word for word in cache]
        argv = [
            "--model",
            coin,
            "--problems",
            problems,
            "--samples",
            2,
            "--out",
            tmp_path / name,
            *SHORT,
            *cache,
        ]
        assert generate.main([str(a) for a in argv]) == 0
        found = list(read_trajectories(tmp_path / name / "trajectories"))
        sampled.append(
            {(t.problem_id, t.sample): (t.input_ids, [e.text for e in t.executions]) for t in found}
        )
    assert sampled[0] == sampled[1] == sampled[2] and any(texts for _, texts in sampled[0].values())


def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing of SQLite's\n" * 100)
    with pytest.raises(InputError, match=r"notes\.txt: cannot be used to remember executions"):
        ExecutionCache(tmp_path / "notes.txt")
