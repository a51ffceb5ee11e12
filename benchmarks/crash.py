"""Kill a run of 2,000 trajectories again and again: does it end with those of an undisturbed run?

    python -m benchmarks.crash [--trajectories 2000] [--kills 20] [--seed 0]

A scripted model writes code for the real sandbox, into a journal. `kill -9` hits the driver, which is then started
again, the model's server, and the sandbox's fork server, each of them `--kills` times. Prints one line a check; exits
with 1 if one fails.
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
from tests.crash_driver import VICTIMS, contents, disturbed_run, run


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crash", description=__doc__)
    parser.add_argument("--trajectories", type=int, default=2000, help="a multiple of 10")
    parser.add_argument("--kills", type=int, default=20, help="of each of the three")
    parser.add_argument("--seed", type=int, default=0, help="fixes when who is killed")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    logging.disable(logging.WARNING)
    num, kills = int(options.trajectories), int(options.kills)
    with tempfile.TemporaryDirectory() as name:
        undisturbed, killed = Path(name) / "undisturbed", Path(name) / "killed"
        started = time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()):
            asyncio.run(run(undisturbed, num))
        calm_s, started = time.monotonic() - started, time.monotonic()
        counts = disturbed_run(killed, num, options.seed, **dict.fromkeys(VICTIMS, kills))
        killed_s = time.monotonic() - started
        print(f"undisturbed {calm_s:.0f} s; killed {killed_s:.0f} s, {counts['start']} starts")
        print("kills: " + ", ".join(f"{victim} {counts[victim]}" for victim in VICTIMS))
        checks = compare(undisturbed, killed, num)
    for text, is_kept in checks.items():
        print(f"{'ok' if is_kept else 'FAILED'}: {text}")
    return 0 if all(checks.values()) else 1


def compare(undisturbed: Path, killed: Path, num: int) -> dict[str, bool]:
    """What was promised, and whether it is so."""
    expected, found = contents(undisturbed), contents(killed)
    num_lines = sum(1 for _ in read_trajectories(killed))
    different = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
    for key in different[:1]:
        print(f"for example {key}:\n  {expected.get(key)}\n  {found.get(key)}")
    num_faults = len(summarize(killed).faults)
    return {
        f"{num_lines} trajectories in the journal, {len(found)} distinct": num_lines == len(found) == num,
        f"{len(different)} differ from the undisturbed run": not different,
        f"{num_faults} are environment faults": num_faults == 0,
    }


if __name__ == "__main__":
    raise SystemExit(main())
