"""How long a report of ten thousand trajectories takes to open, in a headless Chromium.

    python -m benchmarks.report [--trajectories 10000] [--opens 5]

Writes a journal of trajectories of 300 tokens with their log-probs, 8 samples a problem, and its report; then opens the
list from the file, each time in a new browser, and on the way looks for a word in the text of all. Prints the medians;
exits with 1 if the list takes longer than 2 seconds to be on the screen. Needs Chromium on the PATH.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.journal import SAMPLES, trajectories
from data.problems import write_problems
from data.trajectories import Journal
from eval.report import write_report
from mtpo.trajectory import Problem, Trajectory
from tests.chromium import EXECUTABLE, chromium_tab

MAX_OPEN_S = 2.0
READY_S = "performance.getEntriesByName('ready')[0].startTime / 1000"
SEARCH_S = """(async () => {
  const box = document.getElementById("search"), count = document.getElementById("count");
  const started = performance.now();
  box.value = "clips nowhere";
  box.dispatchEvent(new Event("input"));
  while (!/^0 of/.test(count.textContent) || /searching/.test(count.textContent))
    await new Promise(requestAnimationFrame);
  return (performance.now() - started) / 1000;
})()"""


def answered(num: int) -> Iterator[Trajectory]:
    """Trajectories that end with an answer, every third one wrong."""
    for number, trajectory in enumerate(trajectories(num)):
        *before, last = trajectory.segments
        answer = number // SAMPLES + (number % 3 == 0)
        yield replace(trajectory, segments=(*before, replace(last, text=f"{last.text} \\boxed{{{answer}}}")))


def write_run(folder: Path, num: int) -> None:
    problems = [
        Problem(f"gsm8k:train/{n}", f"Question {n}: how many clips does she sell, all in all?", str(n), str(n % 5 + 1))
        for n in range((num + SAMPLES - 1) // SAMPLES)
    ]  # fmt: skip
    write_problems(folder / "problems.jsonl", problems)
    with Journal(folder / "trajectories") as journal:
        for trajectory in answered(num):
            journal.append(trajectory)


async def open_once(report: Path) -> tuple[float, float]:
    """Seconds until the list is on the screen, and seconds of a search through the text of all."""
    async with chromium_tab() as tab:
        await tab.resize(1280, 860)
        await tab.open(report.as_uri() + "#trajectories")
        return await tab.evaluate(READY_S), await tab.evaluate(SEARCH_S)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--trajectories", type=int, default=10_000)
    parser.add_argument("--opens", type=int, default=5)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if EXECUTABLE is None:
        print("error: no chromium, chromium-browser or google-chrome on the PATH", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        write_run(run, options.trajectories)
        started = time.monotonic()
        report = write_report(run, limit=options.trajectories)
        print(
            f"written in {time.monotonic() - started:.1f} s, {report.stat().st_size / 1e6:.1f} MB", flush=True
        )
        opened = [asyncio.run(open_once(report)) for _ in range(options.opens)]
    opens, searches = ([figures[place] for figures in opened] for place in (0, 1))
    print(
        f"{options.trajectories:,} trajectories on the screen in {_summary(opens)}; searched in {_summary(searches)}"
    )
    return 0 if statistics.median(opens) <= MAX_OPEN_S else 1


def _summary(seconds: Sequence[float]) -> str:
    return (
        f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f}, {len(seconds)} times)"
    )


if __name__ == "__main__":
    sys.exit(main())
