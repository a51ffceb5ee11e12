"""The pool under fire for hours, or minutes: is every answer right, is every loss told, does anything leak?

    python -m benchmarks.sandbox_soak [--executions 100000] [--seed 0]

Many tasks run maths trajectories with known answers, some cells never end, and all the while kernels are killed from
outside. In the first half so are the fork server and its guardian; in the second half these grow old, to be seen.
Prints one line a check; exits with 1 if one fails.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from benchmarks.command import at_least
from benchmarks.maths import MathsTrajectory, maths_trajectories
from benchmarks.soak_faults import family_of, kill_one, plan_kills
from benchmarks.soak_watch import Check, Watch, report
from mtpo.errors import SandboxError
from mtpo.trajectory import Execution
from sandbox import InterpreterPool, Limits
from sandbox.layers import Policy
from sandbox.processes import adopt_orphans, descendants
from sandbox.session import Session

MAX_TURNS = 12
TIMEOUT_S = 30.0
SHORT_TIMEOUT_S = 0.2
ENDLESS = "while True: pass"
DEAF = "import itertools\nsum(itertools.repeat(0))"
"""A loop that does not hear the interrupt, so that the kernel must be killed."""
ENDLESS_SHARE = 0.01
EXECUTIONS_PER_KILL = {"kernel": 25, "fork server": 1000, "guardian": 2000}
"""In the mean, while such are killed."""
STOPPED = (
    f"Line 1: {ENDLESS}\nKeyboardInterrupt\n"
    f"[stopped after {SHORT_TIMEOUT_S:g} s, the time limit; variables are kept]"
)
GONE = "all variables are gone]"
MAX_REFUSED = 0.01
POLL_S = 0.02
LOOK_S = 1.0
WATCHED = ("owner", "guardian", "fork server")


@dataclass(slots=True)
class Tally:
    """What happened so far."""

    num_planned: int
    counts: Counter[str] = field(default_factory=Counter)
    """Executions by outcome, kills by victim."""
    surprises: list[str] = field(default_factory=list)
    """Wrong answers and losses that no text told of, described."""

    @property
    def num_executions(self) -> int:
        return self.counts["executions"]

    def is_done(self) -> bool:
        return self.num_executions >= self.num_planned

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


async def kill_as_planned(tally: Tally, rng: random.Random) -> None:
    """Kill after so many executions as the plan says."""
    plan = plan_kills(tally.num_planned, EXECUTIONS_PER_KILL, rng, young=("fork server", "guardian"))
    while plan:
        await asyncio.sleep(rng.uniform(0.0, 2 * POLL_S))
        if tally.num_executions >= plan[0][0]:
            kill_one(plan, tally.num_executions, family_of(os.getpid()), rng, tally.counts)


async def look_around(watch: Watch) -> None:
    """Watch the owner and the servers below it."""
    while True:
        family = family_of(os.getpid()) | {"owner": [os.getpid()]}
        watch.sample({part: family[part][0] for part in WATCHED if family[part]})
        await asyncio.sleep(LOOK_S)


async def soak(tally: Tally, watch: Watch, options: argparse.Namespace) -> None:
    """Run it all; the pool is closed when it returns."""
    seeds = random.Random(options.seed)
    limits = Limits(interrupt_grace_s=0.3)
    async with InterpreterPool(limits, size=options.size, isolation=options.isolation) as pool:
        async with pool.session() as session:
            await session.execute("1")
            print("isolation:", describe_layers(pool), flush=True)
        around = [
            asyncio.ensure_future(look_around(watch)),
            asyncio.ensure_future(kill_as_planned(tally, random.Random(seeds.random()))),
        ]
        tasks = [
            run_trajectories(pool, tally, random.Random(seeds.random())) for _ in range(2 * options.size)
        ]
        await asyncio.gather(*tasks)
        for task in around:
            task.cancel()
        await asyncio.gather(*around, return_exceptions=True)


def describe_layers(pool: InterpreterPool) -> str:
    missing = [name for name, reason in pool.layers.items() if reason is not None]
    return f"without {', '.join(missing)}" if missing else "all layers"


def checks(tally: Tally, watch: Watch, left: Sequence[object]) -> Iterator[Check]:
    """Whether each promise was kept, and the figures behind it."""
    counts = tally.counts
    killed = ", ".join(f"{counts[f'killed {victim}']} {victim}s" for victim in EXECUTIONS_PER_KILL)
    yield (
        not tally.surprises,
        f"no wrong answer, no cell run twice, no silent loss: {len(tally.surprises)} of {counts['executions']}",
    )
    yield (
        counts["losses told"] > 0 and all(counts[f"killed {victim}"] for victim in EXECUTIONS_PER_KILL),
        f"losses were told: {counts['losses told']} after {killed} were killed; {counts['timeout']} timeouts",
    )
    yield (
        counts["refused"] <= MAX_REFUSED * counts["sessions"],
        f"the pool mended itself: {counts['refused']} of {counts['sessions']} sessions were refused a kernel",
    )
    yield from watch.checks()
    yield not left, f"nothing left behind: {list(left) or 'nothing'}"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sandbox_soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--executions", type=at_least(1), default=100_000, metavar="N")
    parser.add_argument(
        "--size", type=at_least(1), default=16, metavar="N", help="kernels; twice as many tasks want one"
    )
    parser.add_argument("--isolation", default="available", choices=get_args(Policy))
    parser.add_argument("--seed", type=int, default=0, help="fixes what is run, and who is killed when")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    adopt_orphans()
    logging.getLogger("sandbox").setLevel(logging.ERROR)  # each start that a kill cut short is a warning
    tally, watch = Tally(options.executions), Watch()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        tempfile.tempdir = directory
        asyncio.run(soak(tally, watch, options))
        tempfile.tempdir = None
        left = [*descendants(os.getpid()), *Path(directory).iterdir()]
    print(f"{tally.num_executions} executions in {time.monotonic() - started:.0f} s: {dict(tally.counts)}")
    for surprise in tally.surprises[:10]:
        print(f"    {surprise}")
    return report(checks(tally, watch, left))


if __name__ == "__main__":
    raise SystemExit(main())
