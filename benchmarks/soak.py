"""`recipes.generate` and `recipes.label` under fire: is every trajectory there, once, and as it ought to be?

    python -m benchmarks.soak [--trajectories 10000] [--seed 0]

A scripted model behind two servers writes code for the real sandbox. `kill -9` hits the driver, which is then started
again with --resume, the servers, and all processes of the sandbox and of the grader.
Prints one line a check; exits with 1 if one fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import gzip
import itertools
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

from benchmarks.command import at_least
from benchmarks.soak_expected import Key, differs_by_told_loss, make_undisturbed, outcomes
from benchmarks.soak_faults import Family, Plan, plan_kills
from benchmarks.soak_model import NAME, make_problems, next_turn
from benchmarks.soak_siege import Server, Siege
from benchmarks.soak_watch import Check, report
from data.problems import load_problems, write_problems
from data.trajectories import summarize
from mtpo.runs import write_json
from recipes.tiny import train_tokenizer
from sandbox.layers import Policy
from sandbox.processes import adopt_orphans

SAMPLES = 10
NUM_SERVERS = 2
TRAJECTORIES_PER_KILL = {
    "driver": 500,
    "engine server": 250,
    "fork server": 250,
    "kernel": 25,
    "grader": 500,
    "grading worker": 100,
}
"""In the mean, while such are killed."""
YOUNG = ("driver", "fork server", "grader")
LABEL_KILLS = ["grading worker", "grading worker", "grader", "grading worker", "driver"]
"""Who is killed, again and again, while trajectories are labelled, as long as that takes."""
TRAJECTORIES_PER_LABEL_KILLS = 3000
LOOKS_PER_KILL = 5
"""A pair of answers that has lost three workers is given up, so there is time between two kills."""
MAX_ROUNDS = 5
TOOL_TIMEOUT_S = 120.0
"""No cell takes as long, on whatever machine."""


def soak(folder: Path, options: argparse.Namespace) -> Iterator[Check]:
    """Make and label so many trajectories, and say what became of them."""
    started, seed = time.monotonic(), options.seed
    tokenizer = save_tokenizer(folder / "tokenizer")
    write_problems(folder / "problems.jsonl", make_problems(options.trajectories // SAMPLES, seed))
    problems = load_problems(str(folder / "problems.jsonl"))
    asyncio.run(make_undisturbed(folder / "expected", problems, SAMPLES, tokenizer, seed))
    print(f"expected trajectories made after {time.monotonic() - started:.0f} s", flush=True)
    (folder / "tmp").mkdir()
    servers = [Server(tokenizer) for _ in range(NUM_SERVERS)]
    siege = Siege(servers, folder / "tmp", random.Random(seed))
    try:
        unkilled = generate_under_fire(siege, folder, options)
        print(f"all made after {time.monotonic() - started:.0f} s: {dict(siege.counts)}", flush=True)
        label_under_fire(siege, folder, options.trajectories)
    finally:
        for server in servers:
            server.stop()
    print(f"all labelled after {time.monotonic() - started:.0f} s: {dict(siege.counts)}", flush=True)
    yield from checks(siege, folder, options.trajectories, unkilled)
    yield from siege.watch.checks()


def save_tokenizer(folder: Path) -> Path:
    """The file of a Gemma tokenizer that knows the words of the sums."""
    prompts = [problem.question for problem in make_problems(1000, seed=0)]
    train_tokenizer([*prompts, *(next_turn(prompt, seed=0) for prompt in prompts)]).save_pretrained(folder)
    return folder / "tokenizer.json"


def generate_under_fire(siege: Siege, folder: Path, options: argparse.Namespace) -> Plan:
    """Make the trajectories, and make again what an accident of the sandbox has spoilt for good.

    Returns:
        The kills that found no victim in time.
    """
    config = {
        "model": NAME,
        "tokenizer": str(folder / "tokenizer"),
        "engine": "openai",
        "urls": [f"http://127.0.0.1:{server.port}" for server in siege.servers],
        "problems": str(folder / "problems.jsonl"),
        "samples": SAMPLES,
        "preload": [],
        "kernels": options.size,
        "max_in_flight": 2 * options.size,
        "isolation": options.isolation,
        "tool_timeout_s": TOOL_TIMEOUT_S,
        "seed": options.seed,
        "out": str(folder / "killed"),
    }
    write_json(folder / "generate.json", config)
    plan = plan_kills(options.trajectories, TRAJECTORIES_PER_KILL, siege.rng, young=YOUNG)
    journal = folder / "killed" / "trajectories"
    for _ in range(MAX_ROUNDS):
        siege.run("recipes.generate", folder / "generate.json", plan, lambda _: num_written(journal))
        if not summarize(journal).faults:
            break
    return plan


def num_written(journal: Path) -> int:
    """How many trajectories a journal has, that of the moment."""
    plain = {path.name: path for path in journal.glob("0*.jsonl")}
    closed = [path for path in journal.glob("0*.gz") if path.stem not in plain]
    with contextlib.suppress(FileNotFoundError):  # its shard is being closed
        return sum(path.read_bytes().count(b"\n") for path in plain.values()) + sum(map(_num_lines, closed))
    return 0


@functools.cache
def _num_lines(closed: Path) -> int:
    with gzip.open(closed) as file:
        return sum(1 for _ in file)


def label_under_fire(siege: Siege, folder: Path, num: int) -> None:
    """Label what was expected in peace, and what was made while processes are killed."""
    victims = LABEL_KILLS * max(1, num // TRAJECTORIES_PER_LABEL_KILLS)
    plan: Plan = [(LOOKS_PER_KILL * number, part) for number, part in enumerate(victims, start=1)]
    for name, kills in (("expected", []), ("killed", plan)):
        config = folder / f"label_{name}.json"
        out = str(folder / f"{name}_labels")
        write_json(config, {"trajectories": [str(folder / name)], "kind": "binary", "out": out})
        siege.run("recipes.label", config, kills, functools.partial(_num_looks, itertools.count()))


def _num_looks(looks: Iterator[int], family: Family) -> int:
    """How often there was a grading worker to be seen; 0 while there is none, so that nobody is killed."""
    return next(looks) if family["grading worker"] else 0


def checks(siege: Siege, folder: Path, num: int, unkilled: Plan) -> Iterator[Check]:
    """Whether each promise was kept, and the figures behind it."""
    counts, expected, found = siege.counts, outcomes(folder / "expected"), outcomes(folder / "killed")
    killed = ", ".join(f"{counts[f'killed {part}']} {part}s" for part in TRAJECTORIES_PER_KILL)
    yield not unkilled, f"killed were {killed}; still planned: {unkilled or 'none'}"
    is_complete = found.keys() == expected.keys() and len(found) == num
    yield is_complete, f"each trajectory once and only once: {len(found)} of {num}"

    different = [key for key in found if found[key].digest != expected[key].digest]
    astray = [key for key in different if not differs_by_told_loss(found[key], expected[key])]
    yield (
        not astray and len(different) <= counts["killed kernel"],
        f"trajectories as in peace: {len(found) - len(different)}, and {len(different) - len(astray)} up to a loss "
        f"that the model was told of; others: {len(astray)}{examples(astray)}",
    )
    verdicts, right = (read_verdicts(folder / f"{name}_labels") for name in ("killed", "expected"))
    wrong = [key for key in found.keys() - different if verdicts.get(key) != right[key]]
    yield (
        not wrong and verdicts.keys() == found.keys(),
        f"verdicts as in peace on what is as in peace: others {len(wrong)}{examples(wrong)}",
    )
    num_faults = len(summarize(folder / "killed" / "trajectories").faults)
    yield not num_faults, f"no fault of the sandbox is left: {num_faults}"
    yield not siege.left, f"nothing left behind: {siege.left or 'nothing'}"


def read_verdicts(folder: Path) -> dict[Key, tuple[str, str]]:
    """Verdict and rule by trajectory, as `recipes.label` wrote them."""
    with (folder / "grades.jsonl").open(encoding="utf-8") as file:
        rows = map(json.loads, file)
        return {(row["problem_id"], row["sample"]): (row["verdict"], row["rule"]) for row in rows}


def examples(keys: Sequence[Key]) -> str:
    return f", such as {keys[:3]}" if keys else ""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--trajectories", type=_whole_problems, default=10_000, metavar="N", help=f"a multiple of {SAMPLES}"
    )
    parser.add_argument(
        "--size",
        type=at_least(1),
        default=16,
        metavar="N",
        help="kernels; twice as many trajectories at once",
    )
    parser.add_argument("--isolation", default="available", choices=get_args(Policy))
    parser.add_argument("--seed", type=int, default=0, help="fixes what is made, and who is killed when")
    return parser.parse_args(argv)


def _whole_problems(text: str) -> int:
    value = at_least(SAMPLES)(text)
    if value % SAMPLES:
        raise argparse.ArgumentTypeError(f"must be a multiple of {SAMPLES}, got {value}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        return report(soak(Path(name), options))


if __name__ == "__main__":
    raise SystemExit(main())
