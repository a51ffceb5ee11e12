"""Kill a run of 2,000 trajectories again and again: does it end with those of an undisturbed run?

    python -m benchmarks.crash [--trajectories 2000] [--drivers 20] [--servers 40] [--seed 0]

A scripted model writes code for the real sandbox, into a journal. `kill -9` hits the driver, which is then started
again, and the sandbox's fork server, which the pool replaces. Prints one line a check; exits with 1 if one fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from data.trajectories import read_trajectories, summarize
from tests.crash_driver import contents, disturbed_run, run


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crash", description=__doc__)
    parser.add_argument("--trajectories", type=int, default=2000, help="a multiple of 10")
    parser.add_argument("--drivers", type=int, default=20, help="kills of the driver")
    parser.add_argument("--servers", type=int, default=40, help="kills of the fork server")
    parser.add_argument("--seed", type=int, default=0, help="fixes when who is killed")
    options = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        undisturbed, killed = Path(name) / "undisturbed", Path(name) / "killed"
        started = time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()):
            asyncio.run(run(undisturbed, options.trajectories))
        calm_s, started = time.monotonic() - started, time.monotonic()
        counts = disturbed_run(
            killed, options.trajectories, options.seed, drivers=options.drivers, servers=options.servers
        )
        killed_s = time.monotonic() - started
        print(f"undisturbed {calm_s:.0f} s; killed {killed_s:.0f} s, {counts['start']} starts")
        print(f"kills: {counts['driver']} of the driver, {counts['fork server']} of the fork server")
        expected, found = contents(undisturbed), contents(killed)
        num_different = sum(found.get(key) != content for key, content in expected.items())
        num_lines = sum(1 for _ in read_trajectories(killed))
        checks = {
            f"{num_lines} trajectories in the journal, {len(found)} distinct": num_lines
            == len(found)
            == options.trajectories,
            f"{num_different} differ from the undisturbed run": num_different == 0
            and len(found) == len(expected),
            f"{len(summarize(killed).faults)} are environment faults": not summarize(killed).faults,
        }
    for text, is_kept in checks.items():
        print(f"{'ok' if is_kept else 'FAILED'}: {text}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
