"""The pool under fire for hours, or minutes: is every answer right, is every loss told, does anything leak?

    python -m benchmarks.sandbox_soak [--executions 20000] [--seed 0]

Many tasks run maths trajectories with known answers, some cells never end, and all the while kernels and the
fork server are killed from outside. Prints one line a check; exits with 1 if one fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from benchmarks.maths import MathsTrajectory, maths_trajectories
from benchmarks.processes import num_descriptors, rss_mib
from mtpo.errors import SandboxError
from mtpo.trajectory import Execution
from sandbox import InterpreterPool, Limits
from sandbox.processes import adopt_orphans, descendants, generations
from sandbox.session import Session

MAX_TURNS = 12
TIMEOUT_S = 30.0
SHORT_TIMEOUT_S = 0.2
ENDLESS = "while True: pass"
DEAF = "import itertools\nsum(itertools.repeat(0))"
"""A loop that does not hear the interrupt, so that the kernel must be killed."""
ENDLESS_SHARE = 0.01
SERVER_SHARE = 1 / 30
STOPPED = (
    f"Line 1: {ENDLESS}\nKeyboardInterrupt\n"
    f"[stopped after {SHORT_TIMEOUT_S:g} s, the time limit; variables are kept]"
)
GONE = "all variables are gone]"
MAX_REFUSED = 0.01
MAX_RSS_GROWTH = 1.10
MAX_DESCRIPTOR_GROWTH = 8
SAMPLE_S = 0.2
WARM_UP = 1 / 20
"""The share of the executions after which the owner is watched: by then all kernels have started."""


@dataclass(slots=True)
class Tally:
    """What happened so far."""

    num_planned: int
    counts: Counter[str] = field(default_factory=Counter)
    """Executions by outcome, kills by victim."""
    surprises: list[str] = field(default_factory=list)
    """Wrong answers and losses that no text told of, described."""
    samples: list[tuple[float, int]] = field(default_factory=list)
    """(MiB, descriptors) of the owner, at equal distances in time."""

    @property
    def num_executions(self) -> int:
        return self.counts["executions"]

    def is_done(self) -> bool:
        return self.num_executions >= self.num_planned

    def sample(self) -> None:
        self.samples.append((rss_mib(os.getpid()), num_descriptors()))

    def note(self, execution: Execution, expected: str) -> bool:
        """Book one execution.

        Returns:
            Whether the state that it needed, and left, is the known one.
        """
        self.counts["executions"] += 1
        self.counts[execution.status] += 1
        if GONE in execution.text:
            self.counts["losses told"] += 1
            return False
        if execution.text != expected:
            self.surprises.append(f"{execution.code!r} showed {execution.text!r}, not {expected!r}")
            return False
        return True


async def run_trajectories(pool: InterpreterPool, tally: Tally, rng: random.Random) -> None:
    """Run trajectory after trajectory until enough cells have run."""
    while not tally.is_done():
        one_of_each_kind = maths_trajectories(3, rng.randint(1, MAX_TURNS), rng.getrandbits(32))
        trajectory = rng.choice(one_of_each_kind)
        tally.counts["sessions"] += 1
        async with pool.session() as session:
            try:
                await run_trajectory(session, trajectory, tally, rng)
            except SandboxError:  # each attempt to start a kernel was killed; the owner is told, and goes on
                tally.counts["refused"] += 1


async def run_trajectory(
    session: Session, trajectory: MathsTrajectory, tally: Tally, rng: random.Random
) -> None:
    """Run the cells in order, from the first again when the text says that the state is gone."""
    turn = 0
    while turn < len(trajectory.cells) and not tally.is_done():
        cell = trajectory.cells[turn]
        execution = await session.execute(cell.code, TIMEOUT_S)
        turn = turn + 1 if tally.note(execution, cell.text) else 0
        if rng.random() < ENDLESS_SHARE:
            execution = await session.execute(rng.choice([ENDLESS, DEAF]), SHORT_TIMEOUT_S)
            if not tally.note(execution, STOPPED):
                turn = 0


async def kill_at_random(tally: Tally, rng: random.Random, kills_per_s: float) -> None:
    """Kill kernels, and now and then one of the servers above them, with a signal that nothing can catch."""
    depth = 0
    while True:
        await asyncio.sleep(rng.expovariate(kills_per_s))
        *above, youngest = generations(os.getpid()) or [[]]
        depth = max(depth, len(above))
        if rng.random() < SERVER_SHARE:
            victims, name = list(chain(*above)), "killed servers"
        else:  # after the death of a server there are no kernels for a while
            victims, name = youngest if len(above) == depth else [], "killed kernels"
        if victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(victims), signal.SIGKILL)
                tally.counts[name] += 1


async def watch(tally: Tally) -> None:
    """Sample the owner."""
    while True:
        await asyncio.sleep(SAMPLE_S)
        if tally.num_executions > WARM_UP * tally.num_planned:
            tally.sample()


async def soak(options: argparse.Namespace) -> Tally:
    """Run it all; the pool is closed when it returns."""
    tally = Tally(options.executions)
    seeds = random.Random(options.seed)
    limits = Limits(interrupt_grace_s=0.3)
    async with InterpreterPool(limits, size=options.size, isolation=options.isolation) as pool:
        async with pool.session() as session:
            await session.execute("1")
            print("isolation:", describe_layers(pool))
        around = [
            asyncio.ensure_future(watch(tally)),
            asyncio.ensure_future(kill_at_random(tally, random.Random(seeds.random()), options.kills)),
        ]
        tasks = [
            run_trajectories(pool, tally, random.Random(seeds.random())) for _ in range(2 * options.size)
        ]
        await asyncio.gather(*tasks)
        tally.sample()
        for task in around:
            task.cancel()
        await asyncio.gather(*around, return_exceptions=True)
    return tally


def describe_layers(pool: InterpreterPool) -> str:
    missing = [name for name, reason in pool.layers.items() if reason is not None]
    return f"without {', '.join(missing)}" if missing else "all layers"


def checks(tally: Tally, left: Sequence[object]) -> Iterator[tuple[bool, str]]:
    """Whether each promise was kept, and the figures behind it."""
    counts = tally.counts
    yield (
        not tally.surprises,
        f"no wrong answer and no silent loss: {len(tally.surprises)} of {counts['executions']}",
    )
    yield (
        counts["losses told"] > 0 and counts["killed kernels"] > 0,
        f"losses were told: {counts['losses told']} after {counts['killed kernels']} kernels and "
        f"{counts['killed servers']} fork servers were killed; {counts['timeout']} timeouts",
    )
    yield (
        counts["refused"] <= MAX_REFUSED * counts["sessions"],
        f"the pool mended itself: {counts['refused']} of {counts['sessions']} sessions were refused a kernel",
    )
    for unit, index, is_flat in (
        ("MiB", 0, lambda first, last: last <= first * MAX_RSS_GROWTH),
        ("descriptors", 1, lambda first, last: last <= first + MAX_DESCRIPTOR_GROWTH),
    ):
        first, last = quarters([sample[index] for sample in tally.samples])
        yield (
            is_flat(first, last),
            f"{unit} of the owner flat: {first:.0f} in the first quarter, {last:.0f} in the last",
        )
    yield not left, f"nothing left behind: {list(left) or 'nothing'}"


def quarters(values: Sequence[float]) -> tuple[float, float]:
    """The medians of the first and the last quarter."""
    quarter = max(1, len(values) // 4)
    return statistics.median(values[:quarter]), statistics.median(values[-quarter:])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sandbox_soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--executions", type=int, default=20_000, metavar="N")
    parser.add_argument(
        "--size", type=int, default=16, metavar="N", help="kernels; twice as many tasks want one"
    )
    parser.add_argument("--kills", type=float, default=4.0, metavar="N", help="processes killed a second")
    parser.add_argument("--isolation", default="available", choices=("full", "available", "none"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    adopt_orphans()
    logging.getLogger("sandbox").setLevel(logging.ERROR)  # each start that a kill cut short is a warning
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        tempfile.tempdir = directory
        tally = asyncio.run(soak(options))
        tempfile.tempdir = None
        left = [*descendants(os.getpid()), *Path(directory).iterdir()]
    print(f"{tally.num_executions} executions in {time.monotonic() - started:.0f} s: {dict(tally.counts)}")
    for surprise in tally.surprises[:10]:
        print(f"    {surprise}")
    results = list(checks(tally, left))
    for is_kept, line in results:
        print(f"{'ok    ' if is_kept else 'FAILED'}  {line}")
    return int(not all(is_kept for is_kept, _ in results))


if __name__ == "__main__":
    sys.exit(main())
