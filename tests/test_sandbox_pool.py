"""What a pool promises: its limits, its order, and that nothing outlives it."""

import asyncio
import os
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtpo.errors import InputError, SandboxError
from sandbox import InterpreterPool, Limits
from sandbox.guardian import kill_if_alive
from sandbox.pool import KernelKind
from tests.processes import is_alive, kernels_of, processes_of, wait_until_gone

ROOT = Path(__file__).resolve().parents[1]
both_kernels = pytest.mark.parametrize("kernel", ["zygote", "ipykernel"])


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory for temporary files, short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield Path(directory)


@both_kernels
async def test_each_limit_holds(kernel: KernelKind) -> None:
    limits = Limits(memory_mb=128, cpu_s=3, max_file_mb=1, max_open_files=100, scratch_mb=3, max_threads=20)
    async with InterpreterPool(limits, kernel=kernel, preload=()) as pool, pool.session() as session:
        small = (
            "open('f', 'wb').write(b'0' * 2**20)\n[open('f') for _ in range(20)]\na = bytearray(60 * 2**20)"
        )
        assert (await session.execute(small, timeout_s=30)).status == "ok"
        for code, error in (
            ("b = bytearray(160 * 2**20)", "MemoryError [the limit is 128 MiB of memory]"),
            (
                "open('f', 'wb').write(b'0' * 2**21)",
                "OSError: [Errno 27] File too large [the limit is 1 MiB a file]",
            ),
            (
                "for i in range(4): open(f'f{i}', 'wb').write(b'0' * 2**20)",
                "OSError: [Errno 28] No space left on device [the limit is 3 MiB for all files]",
            ),
            (
                "[open('f') for _ in range(100)]",
                "OSError: [Errno 24] Too many open files: 'f' [the limit is 100 open files]",
            ),
            (
                "import threading\nfor _ in range(50): threading.Thread(target=threading.Event().wait).start()",
                "RuntimeError: can't start new thread [the limit is 20 threads]",
            ),
            (
                "import os\nos.fork()",
                "PermissionError: [Errno 1] Operation not permitted [the sandbox does not allow it]",
            ),
        ):
            execution = await session.execute(code, timeout_s=30)
            assert execution.status == "error"
            assert execution.text.splitlines()[-1] == error
        assert (await session.execute("import resource as r\nr.getrlimit(r.RLIMIT_CORE)")).text == "(0, 0)"
        execution = await session.execute("while True: pass", timeout_s=60)
        assert (execution.status, execution.seconds < 20) == ("died", True)
        assert "too much CPU time" in execution.text


async def test_startup_timeout_is_a_sandbox_error() -> None:
    async with InterpreterPool(Limits(startup_timeout_s=0.001), preload=()) as pool:
        with pytest.raises(
            SandboxError, match=r"no kernel would start in 3 attempts: not ready after 0.001 s"
        ):
            await pool.session().execute("1")


@pytest.mark.parametrize(("grace_s", "fate"), [(0.1, "gone"), (5.0, "kept")])
async def test_interrupted_cell_has_the_grace_to_stop(grace_s: float, fate: str) -> None:
    cell = "import time\ntry:\n  time.sleep(60)\nexcept KeyboardInterrupt:\n  time.sleep(0.7)"
    async with InterpreterPool(Limits(interrupt_grace_s=grace_s), preload=()) as pool:
        execution = await pool.session().execute(cell, timeout_s=0.2)
    assert execution.status == "timeout"
    assert execution.text.endswith(f"variables are {fate}]")


@pytest.mark.parametrize(
    "values",
    [
        {"memory_mb": 0},
        {"memory_mb": 100.5},
        {"cpu_s": True},
        {"max_output_chars": 10},
        {"max_file_mb": -1},
        {"max_open_files": 3},
        {"startup_timeout_s": 0},
        {"startup_timeout_s": float("nan")},
        {"interrupt_grace_s": "1"},
        {"interrupt_grace_s": float("inf")},
    ],
)
def test_impossible_limits_are_refused(values: dict) -> None:
    [(name, value)] = values.items()
    with pytest.raises(InputError, match=rf"{name} must be .*, got {value!r}"):
        Limits(**values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be a positive integer, got 0"),
        ({"kernel": "julia"}, "kernel must be one of .*, got 'julia'"),
        ({"preload": ("no_such_module",)}, "there is no module 'no_such_module'"),
    ],
)
def test_impossible_pools_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        InterpreterPool(**options)


async def test_a_pool_runs_nothing_before_and_after() -> None:
    pool = InterpreterPool(preload=())
    with pytest.raises(SandboxError, match="not open"):
        await pool.session().execute("1")
    async with pool:
        assert (await pool.session().execute("1")).text == "1"
    with pytest.raises(SandboxError, match="not open"):
        await pool.session().execute("1")


async def test_preloaded_modules_are_there_already() -> None:
    async with InterpreterPool(preload=("fractions",)) as pool:
        execution = await pool.session().execute(
            "import sys\n'fractions' in sys.modules, 'sympy' in sys.modules"
        )
    assert execution.text == "(True, False)"


async def test_preload_that_starts_a_thread_is_refused(tmp_path: Path) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
    )
    script = f"""
        import os, sys
        sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]
        from sandbox.confine import Confinement
        from sandbox.limits import Limits
        from sandbox.zygote import Zygote
        proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
        confinement = Confinement(frozenset(), Limits(), {str(tmp_path)!r}, [], proc)
        try:
            Zygote(None, confinement, is_stock=False).prepare(["threaded"])
        except RuntimeError as error:
            print(error, file=sys.__stdout__)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    run = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    assert run.stdout.startswith("preloading ['threaded'] started 1 threads")


@both_kernels
async def test_secrets_of_the_owner_stay_outside(kernel: KernelKind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    async with InterpreterPool(kernel=kernel, preload=()) as pool, pool.session() as session:
        text = (await session.execute("import os\nrepr(os.environ)")).text
        [pid] = kernels_of(pool)
        assert "secret" not in Path(f"/proc/{pid}/environ").read_text()
    assert "HOME" in text
    assert "secret" not in text


@both_kernels
async def test_files_of_the_owner_stay_outside(kernel: KernelKind, tmp_path: Path) -> None:
    with open(tmp_path / "private", "w") as file:
        os.set_inheritable(file.fileno(), True)
        async with InterpreterPool(kernel=kernel, preload=()) as pool, pool.session() as session:
            await session.execute("1")
            [pid] = kernels_of(pool)
            links = {int(fd.name): os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    assert [links.pop(fd) for fd in range(3)] == ["/dev/null"] * 3
    assert {link.partition(":")[0] for link in links.values()} <= {"socket", "anon_inode", "pipe"}


@both_kernels
async def test_more_sessions_than_kernels_wait_their_turn(kernel: KernelKind) -> None:
    order: list[int] = []
    alive = most = 0

    async def run(index: int) -> None:
        nonlocal alive, most
        async with pool.session() as session:
            await session.execute("1")
            order.append(index)
            alive += 1
            most = max(most, alive)
            await asyncio.sleep(0.05)
            alive -= 1

    async with InterpreterPool(size=2, kernel=kernel, preload=()) as pool:
        await asyncio.gather(*map(run, range(6)))
    assert most <= 2
    assert sorted(order[:2]) + sorted(order[2:4]) + sorted(order[4:]) == list(range(6))


async def test_a_session_without_code_costs_no_kernel() -> None:
    async with InterpreterPool(size=1, preload=()) as pool, pool.session(), pool.session() as session:
        assert (await session.execute("1")).text == "1"  # the only kernel is still free


async def test_64_sessions_at_once() -> None:
    async def run(index: int) -> list[str]:
        async with pool.session() as session:
            return [
                (await session.execute(c, 60)).text for c in (f"x = {index}", "x += 1", "print(x)\nx * 2")
            ]

    async with InterpreterPool(size=64, preload=()) as pool:
        results = await asyncio.gather(*map(run, range(64)))
    assert results == [["[no output]", "[no output]", f"{i + 1}\n{2 * i + 2}"] for i in range(64)]


@both_kernels
async def test_an_exception_leaves_nothing_behind(kernel: KernelKind, base: Path) -> None:
    pids: list[int] = []
    running: asyncio.Future = asyncio.get_running_loop().create_future()
    with pytest.raises(ZeroDivisionError):
        async with InterpreterPool(kernel=kernel, preload=()) as pool:
            sessions = [pool.session() for _ in range(2)]
            for session in sessions:
                await session.execute("1")
            pids += processes_of(pool)
            running = asyncio.ensure_future(sessions[0].execute("while True: pass", timeout_s=60))
            await asyncio.sleep(0.1)
            raise ZeroDivisionError
    with pytest.raises(SandboxError, match="closed"):
        await running
    assert len(pids) == 4
    await wait_until_gone(pids, base, within_s=0.1)


async def test_waiting_sessions_are_released_when_the_pool_closes() -> None:
    async with InterpreterPool(size=1, preload=()) as pool:
        await pool.session().execute("1")
        waiting = asyncio.ensure_future(pool.session().execute("2"))
        await asyncio.sleep(0.05)
    with pytest.raises(SandboxError, match="not open"):
        await asyncio.wait_for(waiting, 5)


async def test_cancelling_while_a_kernel_starts_leaves_nothing_behind(base: Path) -> None:
    async with InterpreterPool(size=1, preload=()) as pool:
        for delay_s in (0.0, 0.01, 0.02, 0.04, 0.08):
            session = pool.session()
            starting = asyncio.ensure_future(session.execute("1"))
            await asyncio.sleep(delay_s)
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await session.close()
        execution = await asyncio.wait_for(pool.session().execute("1"), 20)
        assert execution.text == "1"  # the slot was given back each time
    await wait_until_gone([], base, within_s=0.1)


@both_kernels
async def test_nothing_outlives_a_killed_owner(kernel: KernelKind, base: Path) -> None:
    script = f"""
        import asyncio, resource, socket, sys, tempfile
        sys.path.insert(0, {str(ROOT)!r})
        tempfile.tempdir = {str(base)!r}
        from sandbox import InterpreterPool
        from tests.processes import processes_of

        def sockets():  # so many that their owner is still dying when the pool hears of it
            return [socket.socketpair() for _ in range(most_files // 6)]

        most_files = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 20_000)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
        before = sockets()

        async def main():
            async with InterpreterPool(kernel={kernel!r}, preload=()) as pool:
                sessions = [pool.session(), pool.session()]
                for session in sessions:
                    await session.execute("1")
                after = sockets()
                print(*processes_of(pool), flush=True)
                await sessions[0].execute("while True: pass", timeout_s=600)

        asyncio.run(main())
    """
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(script), stdout=subprocess.PIPE
    )
    assert owner.stdout is not None
    pids = [int(pid) for pid in (await asyncio.wait_for(owner.stdout.readline(), 60)).split()]
    assert len(pids) == 4 and all(map(is_alive, pids)) and len(list(base.iterdir())) == 1
    owner.kill()
    await owner.wait()
    await wait_until_gone(pids, base)


def test_the_owners_death_may_come_after_that_of_the_fork_server() -> None:
    with subprocess.Popen(["true"]) as fork_server:
        fork_server.wait()
        kill_if_alive(fork_server.pid)


@both_kernels
@pytest.mark.parametrize("victim", [0, 1], ids=["guardian", "fork server"])
async def test_a_killed_fork_server_is_replaced(kernel: KernelKind, victim: int) -> None:
    async with InterpreterPool(kernel=kernel, preload=()) as pool, pool.session() as session:
        await session.execute("x = 1")
        pids = processes_of(pool)
        running = asyncio.ensure_future(session.execute("while True: pass", timeout_s=60))
        await asyncio.sleep(0.1)
        os.kill(pids[victim], signal.SIGKILL)
        execution = await asyncio.wait_for(running, 10)
        assert (execution.status, execution.is_fault) == ("died", True)
        await wait_until_gone(pids)
        again = await session.execute("x = 1\n'x' in globals()")
        assert (again.text, again.is_fault) == ("True", False)
        os.kill(processes_of(pool)[1], signal.SIGKILL)
        await asyncio.sleep(0.2)
        after = await session.execute("'x' in globals()")
        assert after.text == "[the interpreter died since the last cell; all variables are gone]\nFalse"
        assert after.is_fault


async def test_a_hung_fork_server_is_replaced() -> None:
    async with InterpreterPool(Limits(startup_timeout_s=1.0), preload=()) as pool:
        await pool.session().execute("1")
        os.kill(processes_of(pool)[1], signal.SIGSTOP)
        assert (await asyncio.wait_for(pool.session().execute("2"), 30)).text == "2"


async def test_a_long_temporary_directory_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("d" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    async with InterpreterPool(preload=()) as pool:
        assert (await pool.session().execute("1")).text == "1"


async def test_health_says_whether_a_session_answers() -> None:
    async with InterpreterPool(size=2, preload=()) as pool, pool.session() as one:
        await one.execute("1")
        health = await pool.health()
        assert (health.is_healthy, health.num_open, health.num_waiting, health.error) == (
            True,
            1,
            0,
            None,
        )
        async with pool.session() as two:
            await two.execute("1")
            waiting = asyncio.ensure_future(pool.session().execute("1"))
            await asyncio.sleep(0.01)
            health = await pool.health(timeout_s=0.2)
            assert (health.is_healthy, health.num_open, health.num_waiting) == (False, 2, 1)
            assert health.error == "no answer after 0.2 s"
        await waiting
    assert not (await pool.health()).is_healthy


async def test_a_large_pool_makes_room_for_its_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        async with InterpreterPool(size=100, preload=()) as pool:
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 256 + 400
            assert (await pool.session().execute("1")).text == "1"
        with pytest.raises(InputError, match=rf"open files, but the limit is {hard}: ulimit -n"):
            await InterpreterPool(size=hard, preload=()).__aenter__()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_child_that_a_cell_forgets_to_end_answers_nothing() -> None:
    async with InterpreterPool(Limits(max_processes=4), preload=()) as pool, pool.session() as session:
        cell = "import os\nn = 1\npid = os.fork()\nn += 1\nif pid:\n    os.waitpid(pid, 0)\nn"
        assert (await session.execute(cell, timeout_s=20)).text == "2"
        assert [(await session.execute("n += 1\nn")).text for _ in range(3)] == ["3", "4", "5"]
