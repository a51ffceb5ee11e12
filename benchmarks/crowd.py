"""Many sessions open at the same time: do all answer, what do they weigh, how fast are they gone?"""

from __future__ import annotations

import asyncio
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.processes import private_mib, pss_mib, rss_mib
from sandbox import InterpreterPool
from sandbox.processes import adopt_orphans, descendants
from sandbox.session import Session

MAX_CLOSE_S = 10.0


async def open_at_once(num_sessions: int, isolation: str) -> int:
    """Open the sessions, have each answer twice, close them with the pool, and print how it went.

    Returns:
        0; 1 if a session gave a wrong answer, closing took too long, or something was left behind.
    """
    adopt_orphans()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory(prefix="open-") as directory:
        tempfile.tempdir = directory
        async with InterpreterPool(size=num_sessions, isolation=isolation) as pool:
            started = time.perf_counter()
            sessions = [pool.session() for _ in range(num_sessions)]
            num_wrong = await _num_wrong(sessions, "x = {}\nprint(x * x)", lambda i: i * i)
            opened = time.perf_counter()
            num_wrong += await _num_wrong(sessions, "print(x + {})", lambda i: 2 * i)
            answered = time.perf_counter()
            processes = descendants(os.getpid())
            private, pss = (sum(map(memory, processes)) for memory in (private_mib, pss_mib))
            owner = rss_mib(os.getpid())
            closing = time.perf_counter()
        close_s = time.perf_counter() - closing
        tempfile.tempdir = None
        left = [*descendants(os.getpid()), *Path(directory).iterdir()]
    print(f"opened {num_sessions} sessions in {opened - started:.1f} s, each with its first answer")
    print(f"all {num_sessions} answered again within {answered - opened:.1f} s; {num_wrong} wrong answers")
    print(
        f"{len(processes)} processes: {private:.0f} MiB private, {pss:.0f} MiB with their share of the rest, "
        f"{private / num_sessions:.1f} MiB private per session; owner {owner:.0f} MiB"
    )
    print(f"closed all in {close_s:.1f} s; left behind: {left or 'nothing'}")
    return int(num_wrong > 0 or close_s >= MAX_CLOSE_S or bool(left))


async def _num_wrong(sessions: list[Session], template: str, answer: Callable[[int], int]) -> int:
    """Run one cell in every session, all at once, and count the texts that are not the session's answer."""
    cells = (session.execute(template.format(i), 60) for i, session in enumerate(sessions))
    texts = [execution.text for execution in await asyncio.gather(*cells)]
    return sum(text != str(answer(i)) for i, text in enumerate(texts))
