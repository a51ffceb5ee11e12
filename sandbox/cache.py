"""Executions that are remembered: the same code in the same state is answered from a file, without a kernel.

Samples of one prompt, and the policies of many runs on the same prompts, write the same code again and again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
from pathlib import Path
from typing import NamedTuple, Self

from mtpo.environment import Interpreter, InterpreterSession
from mtpo.errors import InputError, SandboxError
from mtpo.trajectory import Execution
from sandbox.session import run_again

PATIENCE_S = 60.0
"""How long a process waits for another one's write."""
REMEMBERED = ("ok", "error")
"""Not a time limit that was met, or a death: these may be the machine's doing."""


class ExecutionCache:
    """What code did, by that code, all that its session ran before, and the limits; in a SQLite file.

    Any number of processes may share the file.

    Args:
        scope: what results depend on besides the code. Other scopes remember other things.

    Raises:
        InputError: the file cannot be written, or is none of SQLite's.
    """

    def __init__(self, path: str | Path, *, scope: str = "") -> None:
        self.start = hashlib.blake2b(scope.encode(), digest_size=16).digest()
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, timeout=PATIENCE_S, isolation_level=None)
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = OFF")
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS executions (key BLOB PRIMARY KEY, value TEXT) WITHOUT ROWID"
            )
        except (sqlite3.Error, OSError) as error:
            raise InputError(f"{path}: cannot be used to remember executions: {error}") from error

    def key(self, before: bytes, code: str, timeout_s: float) -> bytes:
        """Of `code` in the state that the key `before` stands for."""
        return hashlib.blake2b(f"{timeout_s!r} {code}".encode(), key=before, digest_size=16).digest()

    def get(self, key: bytes, code: str) -> Execution | None:
        row = self._file.execute("SELECT value FROM executions WHERE key = ?", (key,)).fetchone()
        return None if row is None else Execution(code, *json.loads(row[0]))

    def put(self, key: bytes, execution: Execution) -> None:
        value = json.dumps([execution.text, execution.status, execution.seconds])
        self._file.execute("INSERT OR REPLACE INTO executions VALUES (?, ?)", (key, value))

    def forget(self, key: bytes) -> None:
        self._file.execute("DELETE FROM executions WHERE key = ?", (key,))

    def close(self) -> None:
        self._file.close()


class CachingInterpreter:
    """An interpreter whose sessions get a kernel only once they meet code that is new to the cache.

    What is remembered is one thing that the code did: where it draws random numbers or looks at the clock, all sessions
    see the same. If one of them then goes on with code that is new, its cells are run; should they do something else
    than was told, they are forgotten and `execute` raises `SandboxError`, so that the trajectory starts again.
    """

    def __init__(self, interpreter: Interpreter, cache: ExecutionCache) -> None:
        self._interpreter, self._cache = interpreter, cache

    def session(self) -> CachingSession:
        return CachingSession(self._interpreter, self._cache)


class _Told(NamedTuple):
    """A cell that no kernel of this session has run."""

    key: bytes
    execution: Execution
    timeout_s: float


class CachingSession:
    """Made by `CachingInterpreter.session`."""

    def __init__(self, interpreter: Interpreter, cache: ExecutionCache) -> None:
        self._interpreter, self._cache = interpreter, cache
        self._session: InterpreterSession | None = None
        self._told: list[_Told] = []
        self._state: bytes | None = cache.start
        """Key of what was run so far; None if it left a state that the code alone does not tell."""
        self._is_closed = False
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def execute(self, code: str, timeout_s: float = 5.0) -> Execution:
        """As the interpreter's own sessions do.

        Raises:
            SandboxError: as theirs; or what was told before turns out not to be what the code does.
        """
        async with self._lock:
            if self._is_closed:
                raise SandboxError("the session is closed")
            key = None if self._state is None else self._cache.key(self._state, code, timeout_s)
            if self._session is None:
                if key is not None and (known := self._cache.get(key, code)) is not None:
                    self._told.append(_Told(key, known, timeout_s))
                    self._state = key
                    return known
                self._session = await self._caught_up()
            execution = await self._session.execute(code, timeout_s)
            if execution.status not in REMEMBERED or execution.is_fault:
                key = None
            if key is not None:
                self._cache.put(key, execution)
            self._state = key
            return execution

    async def fork(self) -> CachingSession:
        async with self._lock:
            twin = CachingSession(self._interpreter, self._cache)
            twin._told, twin._state = list(self._told), self._state
            if self._session is not None:
                twin._session = await self._session.fork()
            return twin

    async def close(self) -> None:
        self._is_closed = True
        if self._session is not None:
            await self._session.close()

    async def _caught_up(self) -> InterpreterSession:
        """A session that has run what was only told."""
        session = self._interpreter.session()
        try:
            await run_again(session, [(told.execution, told.timeout_s) for told in self._told])
        except BaseException as error:
            await session.close()
            if isinstance(error, SandboxError):
                for told in self._told:
                    self._cache.forget(told.key)
            raise
        self._told.clear()
        return session
