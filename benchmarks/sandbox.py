"""Our interpreter beside its peers: speed, latency and size on the same maths trajectories.

    python -m benchmarks.sandbox [--trajectories 200] [--turns 3] [--concurrency 16] [--json FILE]
    python -m benchmarks.sandbox --open 1000

The first line compares: every peer runs the same trajectories in a fresh process of its own, in turn, for two
rounds, and keeps the better of its two figures; all must give the known answers. The second opens many
sessions at once. Both exit with 1 if an answer is wrong or a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.command import at_least, describe_machine
from benchmarks.crowd import open_at_once
from benchmarks.figures import Figures, measure
from benchmarks.maths import maths_trajectories
from benchmarks.peers import PEERS
from sandbox.processes import adopt_orphans

ROUNDS = 2
OURS, UNISOLATED, PAPER, STOCK, _ = PEERS
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def run_peer(name: str, options: argparse.Namespace) -> Figures | str:
    """Measure one peer in a process of its own.

    Returns:
        The last line of its error if it failed.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        environment = os.environ | ONE_THREAD | {"IPYTHONDIR": f"{directory}/ipython"}
        command = [sys.executable, "-m", "benchmarks.sandbox", "--peer", name]
        for option in ("trajectories", "turns", "concurrency", "samples", "seed"):
            command += [f"--{option}", str(getattr(options, option))]
        root = Path(__file__).resolve().parents[1]
        run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    if run.returncode:
        return (run.stderr.strip() or f"exit code {run.returncode}").splitlines()[-1]
    return Figures(**json.loads(run.stdout.splitlines()[-1]))


def compare(options: argparse.Namespace) -> dict[str, Figures | str]:
    """Every peer, round after round, so that a busy minute of the machine does not hit one alone."""
    best: dict[str, Figures | str] = {}
    for number in range(1, options.rounds + 1):
        for name in options.peers or PEERS:
            figures = run_peer(name, options)
            line = figures if isinstance(figures, str) else f"{figures.sessions_per_s:.1f} sessions/s"
            print(f"round {number} of {options.rounds}: {name}: {line}", file=sys.stderr, flush=True)
            before = best.get(name)
            if isinstance(figures, Figures) and isinstance(before, Figures):
                figures = figures.better(before)
            if not isinstance(before, str):
                best[name] = figures
    return best


def table(best: dict[str, Figures | str]) -> Iterator[str]:
    """One line a figure, one column a peer."""
    measured = {name: figures for name, figures in best.items() if isinstance(figures, Figures)}
    rows = [["", *measured]]
    for field in dataclasses.fields(Figures):
        values = [getattr(figures, field.name) for figures in measured.values()]
        label = field.name.replace("_per_", "/").replace("_", " ").replace("mib", "MiB")
        rows.append([label, *("-" if v is None else f"{v:.1f}" for v in values)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for head, *cells in rows:
        line = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        yield f"{head.ljust(widths[0])}  {line}"
    for name, failure in best.items():
        if isinstance(failure, str):
            yield f"{name}: not measured: {failure}"


def bars(best: dict[str, Figures | str]) -> Iterator[tuple[str, float, float, bool]]:
    """What was promised of the isolated pool: figure, value, bar, and whether it holds."""
    ours, stock, paper = (best.get(name) for name in (OURS, STOCK, PAPER))
    if not isinstance(ours, Figures):
        return
    if isinstance(stock, Figures):
        ratio = ours.sessions_per_s / stock.sessions_per_s
        yield "sessions/s, times stock ipykernel's >=", ratio, 9, ratio >= 9
        share = ours.first_p50_ms / stock.first_p50_ms
        yield "first result p50, of stock ipykernel's <=", share, 1 / 15, share <= 1 / 15
    if isinstance(paper, Figures):
        ratio = ours.sessions_per_s / paper.sessions_per_s
        yield "sessions/s, times the paper's executor's >=", ratio, 1.4, ratio >= 1.4
    for name, value, bar in (
        ("private MiB per session", ours.private_mib_per_session, 15),
        ("fork p50 ms", ours.fork_p50_ms, 30),
    ):
        assert value is not None  # ours has every figure
        yield f"{name} <=", value, bar, value <= bar


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sandbox",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--trajectories", type=at_least(3), default=200, metavar="N")
    parser.add_argument("--turns", type=at_least(2), default=3, metavar="N", help="cells of a trajectory")
    parser.add_argument(
        "--concurrency", type=at_least(1), default=16, metavar="N", help="sessions side by side"
    )
    parser.add_argument(
        "--samples", type=at_least(1), default=30, metavar="N", help="sessions timed one by one"
    )
    parser.add_argument("--rounds", type=at_least(1), default=ROUNDS, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peers", nargs="+", choices=PEERS, metavar="NAME", help=f"of {list(PEERS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--open", type=at_least(1), metavar="N", help="open N sessions at once instead")
    parser.add_argument(
        "--isolation", default="full", choices=("full", "available", "none"), help="of --open"
    )
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.open:
        return asyncio.run(open_at_once(options.open, options.isolation))
    if options.peer:
        adopt_orphans()
        trajectories = maths_trajectories(options.trajectories, options.turns, options.seed)
        peer = PEERS[options.peer](options.concurrency)
        figures = asyncio.run(measure(peer, trajectories, options.samples))
        print(json.dumps(dataclasses.asdict(figures)))
        return 0
    machine = describe_machine()
    best = compare(options)
    print(
        f"{options.trajectories} trajectories of {options.turns} cells, best of {options.rounds}; {machine}"
    )
    print(*table(best), sep="\n")
    results = list(bars(best))
    for name, value, bar, is_held in results:
        print(f"{'held  ' if is_held else 'MISSED'}  {name} {bar:.4g}: {value:.3g}")
    if options.json:
        figures = {name: f if isinstance(f, str) else dataclasses.asdict(f) for name, f in best.items()}
        options.json.write_text(json.dumps({"machine": machine, "figures": figures}, indent=2) + "\n")
    failed = any(isinstance(figures, str) for figures in best.values())
    return int(failed or not all(is_held for *_, is_held in results))


if __name__ == "__main__":
    sys.exit(main())
