"""Where hostile code meets the sandbox: a pool with canaries around it, and what tells whether it got out."""

from __future__ import annotations

import asyncio
import os
import secrets
import string
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mtpo.errors import SandboxError
from mtpo.trajectory import Execution
from sandbox.files import remove_tree
from sandbox.hostile.attacks import Attack
from sandbox.hostile.canaries import Canaries
from sandbox.hostile.footprint import Footprint, adopting_orphans, peak_mb
from sandbox.layers import Isolation
from sandbox.limits import Limits
from sandbox.pool import InterpreterPool
from sandbox.session import Session

T = TypeVar("T")

MARKER = "ESCAPED"
LIMITS = Limits(
    memory_mb=256,
    max_output_chars=4000,
    max_open_files=128,
    startup_timeout_s=5.0,
    interrupt_grace_s=0.2,
    scratch_mb=32,
    max_processes=0,
    max_threads=64,
)
PATIENCE_S = 2.0
"""A call may come back this much after its time limit."""
FORK_PATIENCE_S = 10.0
"""A fork comes back within this time, or is refused."""
STUCK_S = 60.0
"""After this time nothing is waited for any more."""
GROWTH_MB = 128
"""How much the peak memory of this process, the owner, may grow in one attack."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one attack; `reason` says how it worked, and is empty where it did not."""

    name: str
    category: str
    held: bool
    reason: str
    seconds: float


class Arena:
    """A pool with canaries around it, against which attacks run one after the other.

    Use it as an async context manager. After its end, `left` says what the pool left behind.

    Args:
        prelude: the cell before each attack.
        isolation: as of `InterpreterPool`.
    """

    def __init__(self, prelude: str, *, isolation: Isolation = "full", limits: Limits = LIMITS) -> None:
        self._prelude = prelude
        self._isolation = isolation
        self._limits = limits
        self._stack = AsyncExitStack()
        self._neighbour: Session | None = None
        self._evidence: list[str] = []
        self.left = ""

    async def __aenter__(self) -> Arena:
        async with AsyncExitStack() as stack:
            directory = stack.enter_context(_scratch_of_our_own())
            self._base = directory / "p"
            self._base.mkdir()
            self._base.chmod(0o755)
            stack.enter_context(adopting_orphans())
            self._canaries = await stack.enter_async_context(Canaries(directory))
            self._neighbour_secret = f"canary-neighbour-{secrets.token_hex(8)}"
            self._secrets = {**self._canaries.secrets, "neighbour": self._neighbour_secret}
            stack.enter_context(_environment("MTPO_CANARY", self._secrets["environment"]))
            stack.enter_context(_temporary_directory(self._base))
            self._before = Footprint.of(self._base)
            await self._open_pool()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._evidence = []
        try:
            await self._close_pool()
            self.left = "; ".join([*self._evidence, *await self._before.exceeded()])
        finally:
            await self._stack.aclose()

    async def run(self, attack: Attack) -> Outcome:
        """Run one attack and look for everything that it could have done."""
        started = time.monotonic()
        self._evidence = []
        await self._ensure_neighbour()
        before, peak_before = Footprint.of(self._base), peak_mb()
        try:
            await _within(STUCK_S, self._attack(attack))
        except Exception as error:  # also where a session is closed
            self._evidence.append(f"call: {type(error).__name__}: {error}")
        await self._check_pool()
        self._evidence += await before.exceeded()
        if (growth := peak_mb() - peak_before) > GROWTH_MB:
            self._evidence.append(f"left: the owner's memory grew by {growth:.0f} MiB")
        self._evidence += self._canaries.harm()
        reason = "; ".join(dict.fromkeys(self._evidence))
        return Outcome(attack.name, attack.category, not reason, reason, time.monotonic() - started)

    async def _attack(self, attack: Attack) -> None:
        names = self._canaries.names() | {
            "owner_pid": str(os.getpid()),
            "neighbour_pid": self._neighbour_pid,
            "pool_dir": str(self._base),
        }
        fill: Callable[[str], str] = lambda code: string.Template(code).substitute(names)  # noqa: E731
        async with self._pool.session() as session:
            if not await self._prepare(session):
                return
            execution = None
            for cell in attack.cells:
                execution = await self._call(session, fill(cell), attack.timeout_s)
            if attack.ends and (execution is None or execution.status not in attack.ends):
                status = "none" if execution is None else f"{execution.status} ({execution.text[-200:]})"
                self._evidence.append(f"status: {status}, expected {' or '.join(attack.ends)}")
            if attack.fork:
                await self._fork(session)
            await self._call(session, "6 * 7", attack.timeout_s)  # whatever it says, it must come back
            if attack.other:
                await self._other(fill(attack.other))
        if attack.other:
            await self._other(fill(attack.other))

    async def _fork(self, session: Session) -> None:
        """Copy the session; a refusal is fine, waiting for ever is not."""
        with suppress(SandboxError):
            async with await _within(FORK_PATIENCE_S, session.fork()) as twin:
                await self._call(twin, "6 * 7", timeout_s=2.0)

    async def _other(self, code: str) -> None:
        async with self._pool.session() as other:
            if await self._prepare(other):
                await self._call(other, code, timeout_s=2.0)

    async def _prepare(self, session: Session) -> bool:
        execution = await self._call(session, self._prelude, timeout_s=10.0)
        if execution is None or execution.status != "ok":
            self._evidence.append(f"call: the prelude did not run: {execution and execution.text}")
            return False
        return True

    async def _call(self, session: Session, code: str, timeout_s: float) -> Execution | None:
        """Run a cell and check what must hold for every one of them."""
        started = time.monotonic()
        try:
            execution = await _within(timeout_s + 20, session.execute(code, timeout_s))
        except Exception as error:  # a pool that raises on what the code did is what we look for
            self._evidence.append(f"call: execute() raised {type(error).__name__}: {error}")
            return None
        seconds = time.monotonic() - started
        text = execution.text
        if seconds > timeout_s + PATIENCE_S:
            self._evidence.append(
                f"call: came back after {seconds:.1f} s, with a time limit of {timeout_s:g} s"
            )
        if not 0 <= execution.seconds <= seconds + 1:
            self._evidence.append(f"call: took {seconds:.1f} s, and says {execution.seconds} s")
        if len(text) > self._limits.max_output_chars + 500:
            self._evidence.append(f"call: a text of {len(text)} characters")
        if text.encode(errors="replace").decode() != text:
            self._evidence.append("call: the text cannot be encoded as UTF-8")
        if MARKER in text:
            line = next(line for line in text.splitlines() if MARKER in line)
            self._evidence.append(f"marker: {line[:200]}")
        self._evidence += [
            f"secret: the text holds that of {k}" for k, v in self._secrets.items() if v in text
        ]
        return execution

    async def _check_pool(self) -> None:
        """A fresh session computes; the neighbour has its state and its file."""
        assert self._neighbour is not None
        try:
            answer = await _within(STUCK_S, self._answer_of_a_fresh_session())
            look = "canary, open('note.txt').read()"
            state = (await _within(STUCK_S, self._neighbour.execute(look, timeout_s=5.0))).text
        except Exception as error:
            self._evidence.append(f"call: the pool answers no more: {type(error).__name__}: {error}")
            await self._close_pool()
            await self._open_pool()
            return
        if answer != "42":
            self._evidence.append(f"neighbour: a later session says that 6 * 7 is {answer}")
        if state != repr((self._neighbour_secret,) * 2):
            self._evidence.append(f"neighbour: another session's state became {state}")
            await self._neighbour.close()
            self._neighbour = None

    async def _answer_of_a_fresh_session(self) -> str:
        async with self._pool.session() as fresh:
            return (await fresh.execute("6 * 7", timeout_s=5.0)).text

    async def _open_pool(self) -> None:
        pool = InterpreterPool(self._limits, size=4, preload=("numpy",), isolation=self._isolation)
        self._pool = await pool.__aenter__()
        self._neighbour = None

    async def _close_pool(self) -> None:
        try:
            await _within(STUCK_S, self._pool.__aexit__(None, None, None))
        except Exception as error:
            self._evidence.append(f"call: the pool would not close: {type(error).__name__}: {error}")

    async def _ensure_neighbour(self) -> None:
        if self._neighbour is None:
            self._neighbour = self._pool.session()
            cell = "import os\ncanary = {0!r}\n_ = open('note.txt', 'w').write({0!r})\nos.getpid()"
            execution = await self._neighbour.execute(cell.format(self._neighbour_secret), timeout_s=20.0)
            self._neighbour_pid = execution.text


async def _within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """What comes of `work`. Unlike `asyncio.timeout` it does not wait for work that cannot be cancelled.

    Raises:
        TimeoutError: nothing has, so far.
    """
    task = asyncio.ensure_future(work)
    await asyncio.wait([task], timeout=seconds)
    if not task.done():
        task.cancel()
        raise TimeoutError(f"stuck for {seconds:g} s")
    return task.result()


@contextmanager
def _scratch_of_our_own() -> Iterator[Path]:
    """A directory for the canaries and the pool, removed with whatever an attack has left in it."""
    directory = Path(tempfile.mkdtemp(prefix="mtpo-"))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        remove_tree(directory)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


@contextmanager
def _temporary_directory(directory: Path) -> Iterator[None]:
    """Have the pool make its files in `directory`."""
    before, tempfile.tempdir = tempfile.tempdir, str(directory)
    try:
        yield
    finally:
        tempfile.tempdir = before
