"""What a fork of a session promises."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from mtpo.errors import InputError, SandboxError
from sandbox import InterpreterPool
from sandbox.session import Session
from tests.processes import kernels_of, wait_until_gone

pytestmark = pytest.mark.asyncio(loop_scope="module")
both_kernels = pytest.mark.parametrize("pool", ["zygote", "ipykernel"], indirect=True)
live = pytest.mark.parametrize("pool", ["zygote"], indirect=True)
replayed = pytest.mark.parametrize("pool", ["ipykernel"], indirect=True)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def pool(request: pytest.FixtureRequest) -> AsyncIterator[InterpreterPool]:
    async with InterpreterPool(kernel=request.param, preload=()) as pool:
        yield pool


@pytest_asyncio.fixture(loop_scope="module")
async def session(pool: InterpreterPool) -> AsyncIterator[Session]:
    async with pool.session() as session:
        yield session


async def texts(session: Session, *cells: str) -> list[str]:
    return [(await session.execute(cell, timeout_s=20)).text for cell in cells]


@both_kernels
async def test_forks_are_independent(session: Session) -> None:
    await texts(session, "x = [1]", "y = 2")
    async with await session.fork() as twin:
        await texts(session, "x.append('here')")
        await texts(twin, "x.append('there')")
        async with await twin.fork() as nested:
            await texts(nested, "x.append('nested')")
            assert await texts(session, "x, y") == ["([1, 'here'], 2)"]
            assert await texts(twin, "x, y") == ["([1, 'there'], 2)"]
            assert await texts(nested, "x, y") == ["([1, 'there', 'nested'], 2)"]


@both_kernels
async def test_fork_of_a_fresh_session_is_fresh(session: Session) -> None:
    async with await session.fork() as twin:
        assert await texts(twin, "1") == ["1"]


@both_kernels
async def test_forks_go_on_with_the_same_random_numbers(session: Session) -> None:
    await texts(session, "import random\nrandom.random()")
    async with await session.fork() as twin:
        cell = "random.random(), _"
        assert await texts(twin, cell) == await texts(session, cell)


@both_kernels
async def test_forks_have_their_own_files(session: Session) -> None:
    await texts(session, "open('f', 'w').write('before')\nimport os\nos.makedirs('a/b')")
    async with await session.fork() as twin:
        assert await texts(twin, "print(open('f').read())\nos.listdir('a')") == ["before\n['b']"]
        await texts(twin, "open('f', 'w').write('there')\nopen('g', 'w').close()")
        assert await texts(session, "print(open('f').read())\nsorted(os.listdir())") == ["before\n['a', 'f']"]
        temporary = "import tempfile\nos.path.dirname(tempfile.mkstemp()[1]) == os.getcwd()"
        assert await texts(twin, temporary) == ["True"]


@live
async def test_fork_copies_what_no_replay_could(session: Session) -> None:
    await texts(
        session,
        "import time, numpy\nstamp = time.time_ns(), numpy.random.rand()",
        "def f(n):\n    return n / 0",
    )
    await session.execute("n = 0\nwhile True: n += 1", timeout_s=0.3)
    async with await session.fork() as twin:
        assert await texts(twin, "stamp, n, numpy.random.rand()") == await texts(
            session, "stamp, n, numpy.random.rand()"
        )
        assert await texts(twin, "f(1)") == [
            "Line 2 of cell 2: return n / 0\nZeroDivisionError: division by zero"
        ]


@live
async def test_fork_outlives_its_original(pool: InterpreterPool) -> None:
    async with pool.session() as session:
        await texts(session, "x = 1")
        twin = await session.fork()
    async with twin:
        assert await texts(twin, "x") == ["1"]
        nested = await twin.fork()
        assert (await twin.execute("import os\nos._exit(1)")).status == "died"
        async with nested:
            assert await texts(nested, "x") == ["1"]


@live
async def test_fork_is_a_session_like_any_other(session: Session) -> None:
    await texts(session, "import os, time")
    twin = await session.fork()
    execution = await twin.execute("time.sleep(60)", timeout_s=0.3)
    assert (execution.status, "variables are kept" in execution.text) == ("timeout", True)
    await twin.close()
    pids = kernels_of(session._pool)
    twins = [await session.fork() for _ in range(3)]
    assert len(kernels_of(session._pool)) == len(pids) + 3
    new = set(kernels_of(session._pool)) - set(pids)
    await asyncio.gather(*(each.close() for each in twins))
    await wait_until_gone(new)
    assert kernels_of(session._pool) == pids


@live
async def test_forks_at_the_same_time(session: Session) -> None:
    await texts(session, "x = 7")
    twins = await asyncio.gather(*(session.fork() for _ in range(6)))
    values = await asyncio.gather(*(texts(twin, f"x += {i}", "x") for i, twin in enumerate(twins)))
    await asyncio.gather(*(twin.close() for twin in twins))
    assert [value[1] for value in values] == [str(7 + i) for i in range(6)]


@live
async def test_fork_with_threads_runs_the_cells_again(session: Session) -> None:
    cell = "import threading\ngo = threading.Event()\nthreading.Thread(target=go.wait, daemon=True).start()"
    await texts(session, cell, "x = 3")
    async with await session.fork() as twin:
        assert await texts(twin, "x, threading.active_count()") == ["(3, 2)"]


@live
async def test_fork_names_the_reason_why_it_failed(session: Session) -> None:
    cell = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    await texts(session, cell, "time.time_ns()")
    with pytest.raises(SandboxError, match=r"threads cannot be copied.*cell 2 is not deterministic"):
        await session.fork()


@replayed
async def test_replay_refuses_what_it_cannot_repeat(session: Session) -> None:
    await texts(session, "x = 1", "import time\ntime.time_ns()")
    with pytest.raises(SandboxError, match="cell 2 is not deterministic"):
        await session.fork()
    assert await texts(session, "x") == ["1"]


@replayed
async def test_replay_refuses_a_stopped_cell(session: Session) -> None:
    await session.execute("n = 0\nwhile True: n += 1", timeout_s=0.3)
    with pytest.raises(SandboxError, match="cell 1 is not deterministic"):
        await session.fork()


async def test_forking_needs_a_second_kernel() -> None:
    async with InterpreterPool(size=1, preload=()) as pool, pool.session() as session:
        await session.execute("1")
        with pytest.raises(InputError, match="size"):
            await session.fork()


async def test_sessions_that_all_wait_to_fork_do_not_wait_for_ever() -> None:
    async with InterpreterPool(size=2, preload=()) as pool, pool.session() as one, pool.session() as two:
        await texts(one, "1")
        await texts(two, "2")
        waiting = asyncio.ensure_future(one.fork())
        await asyncio.sleep(0.05)
        with pytest.raises(SandboxError, match="all 2 kernels are held by sessions that wait for another"):
            await two.fork()
        await two.close()
        async with await asyncio.wait_for(waiting, 20) as twin:
            assert await texts(twin, "_") == ["1"]
