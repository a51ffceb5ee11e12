"""What one peer needs: rates, latencies, CPU time and memory."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.maths import MathsTrajectory, check_answers
from benchmarks.peers import Ours, Peer
from benchmarks.processes import cpu_s, private_mib, pss_mib
from sandbox.processes import descendants


@dataclass(frozen=True, slots=True)
class Figures:
    """What one peer needs. None where a figure has no meaning for it."""

    sessions_per_s: float
    executions_per_s: float
    cpu_ms_per_execution: float
    """Of the owner and all its processes."""
    first_p50_ms: float
    """From a new session to the result of its first cell, on an idle machine."""
    first_p95_ms: float
    first_sympy_p50_ms: float
    """The same where the first cell imports sympy and solves an equation."""
    warm_p50_ms: float
    """A later cell."""
    close_p50_ms: float
    private_mib_per_session: float | None
    """Private_Clean + Private_Dirty of the processes that a session adds, after all its cells."""
    base_pss_mib: float
    """Owner and servers before any session is open."""
    fork_p50_ms: float | None = None
    fork_p95_ms: float | None = None

    def better(self, other: Figures) -> Figures:
        """The better of two rounds, figure by figure: the most for rates, the least for all else."""
        best: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            here, there = getattr(self, field.name), getattr(other, field.name)
            choose = max if field.name.endswith("_per_s") else min
            best[field.name] = None if here is None else choose(here, there)
        return Figures(**best)


async def measure(peer: Peer, trajectories: Sequence[MathsTrajectory], samples: int) -> Figures:
    """All figures of one peer.

    Raises:
        WrongAnswerError: a cell did not show the known answer.
    """
    async with peer:
        first = trajectories[2:3]  # sympy: whatever is slow the first time, and only then
        check_answers(await peer.run_all(first), first)
        base = pss_mib(os.getpid()) + sum(map(pss_mib, descendants(os.getpid())))
        latency = await measure_latency(peer, trajectories, samples)
        private = await measure_memory(peer, trajectories[:samples]) if peer.keeps_processes else None
        forks = await measure_forks(peer, trajectories[0], samples) if isinstance(peer, Ours) else {}
        before_s, before_cpu_s = time.perf_counter(), cpu_s(os.getpid())
        texts = await peer.run_all(trajectories)
        seconds, cpu = time.perf_counter() - before_s, cpu_s(os.getpid()) - before_cpu_s
    check_answers(texts, trajectories)
    num_cells = sum(len(t.cells) for t in trajectories)
    return Figures(
        sessions_per_s=len(trajectories) / seconds,
        executions_per_s=num_cells / seconds,
        cpu_ms_per_execution=1e3 * cpu / num_cells,
        private_mib_per_session=private,
        base_pss_mib=base,
        **latency,
        **forks,
    )


async def measure_latency(
    peer: Peer, trajectories: Sequence[MathsTrajectory], samples: int
) -> dict[str, float]:
    """One session after the other, with nothing else to do."""
    first: dict[str, list[float]] = {"plain": [], "sympy": []}
    warm: list[float] = []
    closing: list[float] = []
    for kind, times in first.items():
        for trajectory in [t for t in trajectories if t.kind == kind][:samples]:
            session = peer.session()
            shown = []
            for number, cell in enumerate(trajectory.cells):
                started = time.perf_counter()
                shown.append(await session.run(cell.code))
                (warm if number else times).append(time.perf_counter() - started)
            check_answers([shown], [trajectory])
            started = time.perf_counter()
            await session.close()
            closing.append(time.perf_counter() - started)
    return {
        "first_p50_ms": quantile_ms(first["plain"], 0.5),
        "first_p95_ms": quantile_ms(first["plain"], 0.95),
        "first_sympy_p50_ms": quantile_ms(first["sympy"], 0.5),
        "warm_p50_ms": quantile_ms(warm, 0.5),
        "close_p50_ms": quantile_ms(closing, 0.5),
    }


async def measure_memory(peer: Peer, trajectories: Sequence[MathsTrajectory]) -> float:
    """Private MiB that an open session adds, the mean over trajectories of all kinds."""
    before = set(descendants(os.getpid()))
    sessions = [peer.session() for _ in trajectories]
    for session, trajectory in zip(sessions, trajectories, strict=True):
        for cell in trajectory.cells:
            await session.run(cell.code)
    private = sum(private_mib(pid) for pid in descendants(os.getpid()) if pid not in before)
    for session in sessions:
        await session.close()
    return private / len(sessions)


async def measure_forks(peer: Ours, trajectory: MathsTrajectory, samples: int) -> dict[str, float]:
    """fork() of a session that has run all cells but the last, which the copy must then answer."""
    times = []
    *earlier, last = trajectory.cells
    async with peer.pool.session() as session:
        for cell in earlier:
            await session.execute(cell.code)
        for _ in range(samples):
            started = time.perf_counter()
            twin = await session.fork()
            times.append(time.perf_counter() - started)
            text = (await twin.execute(last.code)).text
            check_answers([[text]], [MathsTrajectory(trajectory.kind, (last,))])
            await twin.close()
    return {"fork_p50_ms": quantile_ms(times, 0.5), "fork_p95_ms": quantile_ms(times, 0.95)}


def quantile_ms(seconds: Sequence[float], q: float) -> float:
    """The least of the values that a share `q` of them does not exceed, in milliseconds."""
    ordered = sorted(seconds)
    return 1e3 * ordered[math.ceil(q * len(ordered)) - 1]
