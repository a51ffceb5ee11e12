"""A journal of a million trajectories: how fast, how large, and does memory stay where it was?

    python -m benchmarks.journal [--trajectories 1000000] [--export]

Writes, opens, counts and reads journals of N/10 and of N trajectories of 300 tokens, 8 samples a problem, each stage in
a process of its own. Prints a row a stage; exits with 1 if a stage misses a trajectory, or if its peak memory grew by
more than 50 MiB from N/10 to N.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from data.export import export_rows, to_row
from data.trajectories import Journal, read_trajectories, summarize
from mtpo.trajectory import Execution, Segment, StopReason, Trajectory

SAMPLES = 8
NUM_TEMPLATES = 64
MAX_GROWTH_MIB = 50.0
WORDS = (
    "so",
    "the",
    "total",
    "is",
    "print",
    "(",
    "range",
    ")",
    "=",
    "+",
    "*",
    "48",
    "72",
    "clips",
    "each",
    "answer",
)


@dataclass(frozen=True, slots=True)
class Figure:
    num_trajectories: int
    seconds: float
    peak_rss_mib: float


def trajectories(num: int) -> Iterator[Trajectory]:
    """Ids and log-probs are random, and come again only where gzip, which looks back 32 KiB, has forgotten them."""
    rng = random.Random(0)
    templates = [template(rng) for _ in range(NUM_TEMPLATES)]
    for index in range(num):
        problem, sample = divmod(index, SAMPLES)
        yield replace(templates[index % NUM_TEMPLATES], problem_id=f"gsm8k:train/{problem}", sample=sample)


def template(rng: random.Random) -> Trajectory:
    def segment(kind, num: int) -> Segment:
        ids = tuple(int(rng.paretovariate(0.35)) % 256_000 for _ in range(num))
        logps = tuple(-rng.expovariate(2.0) for _ in ids) if kind == "action" else None
        return Segment(kind, ids, logps, " ".join(rng.choice(WORDS) for _ in ids))

    lengths = ("prompt", 80), ("action", 120), ("observation", 10), ("action", 90)
    segments = tuple(segment(kind, num) for kind, num in lengths)
    execution = Execution(segments[1].text, segments[2].text, "ok", rng.random())
    return Trajectory("", 0, segments, StopReason.ANSWERED, (execution,))


def write(folder: Path, num: int) -> int:
    with Journal(folder) as journal:
        for trajectory in trajectories(num):
            journal.append(trajectory)
    return num


def reopen(folder: Path) -> int:
    with Journal(folder) as journal:
        return len(journal.done())


def count(folder: Path) -> int:
    return summarize(folder).counts()["trajectories"]


def read(folder: Path) -> int:
    return sum(1 for _ in read_trajectories(folder))


def export(folder: Path) -> int:
    return export_rows(map(to_row, read_trajectories(folder)), parquet=folder / "all.parquet")


def in_own_process(stage: Callable[[], int]) -> Figure:
    """Run a stage in a fork, whose memory is its own to measure.

    Raises:
        RuntimeError: the stage failed.
    """
    read_end, write_end = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write_end, str(stage()).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(write_end)
    _, status, usage = os.wait4(pid, 0)
    seconds = time.monotonic() - started
    with open(read_end) as answer:
        if status:
            raise RuntimeError(f"the stage ended with status {status}")
        return Figure(int(answer.read()), seconds, usage.ru_maxrss / 1024)


def measure(folder: Path, num: int, *, with_export: bool) -> dict[str, Figure]:
    """Every stage on a new journal of `num` trajectories, a printed row each."""
    stages: dict[str, Callable[[], int]] = {
        "write": partial(write, folder, num),
        "open": partial(reopen, folder),
    }
    stages |= {"count": partial(count, folder), "read": partial(read, folder)}
    if with_export:
        stages["export"] = partial(export, folder)
    figures = {}
    for name, stage in stages.items():
        figures[name] = figure = in_own_process(stage)
        size = sum(path.stat().st_size for path in folder.glob("*.jsonl*"))
        print(
            f"{name:7} {figure.num_trajectories:>9,} {figure.seconds:8.1f} s {num / figure.seconds:>11,.0f} /s "
            f"{figure.peak_rss_mib:7.0f} MiB peak {size / num:8.0f} bytes each",
            flush=True,
        )
    shutil.rmtree(folder)
    return figures


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.journal", description=__doc__)
    parser.add_argument("--trajectories", type=int, default=1_000_000)
    parser.add_argument("--export", action="store_true", help="also export to Parquet")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    numbers = options.trajectories // 10, options.trajectories
    with tempfile.TemporaryDirectory() as name:
        few, many = (measure(Path(name) / "journal", num, with_export=options.export) for num in numbers)
    checks = {
        f"every stage saw all of {num:,}": {figure.num_trajectories for figure in figures.values()} == {num}
        for num, figures in zip(numbers, (few, many), strict=True)
    }
    for stage in few:
        growth = many[stage].peak_rss_mib - few[stage].peak_rss_mib
        checks[f"to {stage} 10 times as many took {growth:.0f} MiB more"] = growth <= MAX_GROWTH_MIB
    for text, is_kept in checks.items():
        print(f"{'ok' if is_kept else 'FAILED'}: {text}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
