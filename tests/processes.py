"""Looks at the processes of a pool from outside, where their numbers are other than inside."""

import asyncio
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from sandbox import InterpreterPool
from sandbox.processes import descendants, stat_fields


def is_alive(pid: int) -> bool:
    return stat_fields(pid)[:1] not in ([], ["Z"])


def processes_of(pool: InterpreterPool) -> list[int]:
    """Guardian, fork server, kernels and what they have started."""
    process = pool._server._process
    assert process is not None
    return [process.pid, *descendants(process.pid)]


def kernels_of(pool: InterpreterPool) -> list[int]:
    """Kernels and what they have started."""
    return processes_of(pool)[2:]


async def wait_until_gone(pids: Iterable[int], directory: Path | None = None, within_s: float = 10.0) -> None:
    """Fail unless the processes end, and the directory is empty, in time."""
    pids = list(pids)
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not any(map(is_alive, pids)) and (directory is None or not list(directory.iterdir())):
            return
        await asyncio.sleep(0.02)
    alive = [pid for pid in pids if is_alive(pid)]
    pytest.fail(f"left behind: processes {alive}, files {list(directory.iterdir()) if directory else []}")
