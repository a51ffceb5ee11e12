"""Our grader beside math-verify: right verdicts, and CPU time, on the same responses.

    python -m benchmarks.grader [--cases FILE] [--trajectories FILE] [--math FOLDER] [--gsm8k FOLDER] [--limit N]

Without a file, on the cases in tests/grading_cases.yaml. Every peer grades every set in a fresh process of its own,
with an empty cache, once warm; CPU time is that of the process and of all that it started. Exits with 1 if a bar is
missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from benchmarks.processes import cpu_s
from data.imports import read_foreign
from data.problems import file_lines, parse_object
from mtpo.answers import gold_from_gsm8k, gold_from_solution

ROOT = Path(__file__).resolve().parents[1]
OURS, MATH_VERIFY = "ours", "math-verify"
WARM_UP = (r"It is $\boxed{\sqrt{50}x}$.", r"5\sqrt{2}x")
BATCH = 256


@dataclass(frozen=True, slots=True)
class Example:
    """One response to be graded, and what the verdict should be."""

    response: str
    gold: str
    label: bool | None
    """None where nobody says; such a response counts for the time alone."""


@dataclass(frozen=True, slots=True)
class GradingFigures:
    """What one peer made of one set."""

    num: int
    num_labelled: int
    right: int
    """Labelled examples with the verdict that their label says."""
    false_positives: int
    false_negatives: int
    ungraded: int
    cpu_s: float
    wall_s: float


def read_cases(path: Path) -> list[Example]:
    """Cases as in tests/grading_cases.yaml, or one JSON object a line with `response`, `gold` and `label`."""
    if path.suffix == ".yaml":
        kinds: dict[str, list[dict[str, Any]]] = yaml.safe_load(path.read_text(encoding="utf-8"))
        return [
            Example(answer if case.get("responses") else rf"\boxed{{{answer}}}", case["gold"], label)
            for kind in kinds.values()
            for case in kind
            for label, answers in ((True, case["right"]), (False, case["wrong"]))
            for answer in answers
        ]
    rows = [parse_object(line) for _, line in file_lines(path)]
    return [Example(row["response"], str(row["gold"]), row["label"]) for row in rows]


def read_trajectories(path: Path) -> list[Example]:
    """Trajectories of others as the importer reads them, written as one text; a `label` may be null."""
    return [
        Example(
            "\n".join(
                f"```output\n{m['content']}\n```" if m["role"] == "tool" else m["content"]
                for m in foreign.messages
                if m["role"] in ("assistant", "tool")
            ),
            foreign.problem.answer,
            foreign.metadata.get("label"),
        )
        for foreign in read_foreign(path)
    ]


def read_solutions(folder: Path) -> list[Example]:
    """The worked solutions of MATH or GSM8K, each to be found equal to the gold answer that it holds."""
    rows = [
        parse_object(line) for split in ("train", "test") for _, line in file_lines(folder / f"{split}.jsonl")
    ]
    solutions: list[str] = [row["solution"] if "solution" in row else row["answer"] for row in rows]
    golds = [
        gold_from_solution(solution, joined=True) if "solution" in row else gold_from_gsm8k(solution)
        for row, solution in zip(rows, solutions, strict=True)
    ]
    return [Example(solution, gold or "", True) for solution, gold in zip(solutions, golds, strict=True)]


def grade_with_ours(examples: Sequence[Example]) -> Iterator[bool | None]:
    from mtpo.grader import Grader

    with Grader() as grader:
        grader.grade(*WARM_UP)
        yield None
        for start in range(0, len(examples), BATCH):
            for grade in grader.grade_many((e.response, e.gold) for e in examples[start : start + BATCH]):
                yield None if grade.verdict == "ungraded" else grade.verdict == "correct"


def grade_with_math_verify(examples: Sequence[Example]) -> Iterator[bool | None]:
    """As its README says: the gold as LaTeX, the whole response, five seconds for each step."""
    from math_verify import parse, verify

    logging.disable(logging.ERROR)  # it logs every timeout
    verify(parse(f"${WARM_UP[1]}$"), parse(WARM_UP[0]))
    yield None
    for example in examples:
        try:
            yield verify(parse(f"${example.gold}$"), parse(example.response))
        except Exception:  # whatever its parser raises, it has no verdict
            yield None


PEERS: dict[str, Callable[[Sequence[Example]], Iterator[bool | None]]] = {
    OURS: grade_with_ours,
    MATH_VERIFY: grade_with_math_verify,
}


def measure(peer: str, examples: Sequence[Example]) -> GradingFigures:
    """Grade all examples in this process; the clock starts when the peer is warm."""
    verdicts_of = PEERS[peer](examples)
    next(verdicts_of)
    start_cpu_s, start_s = cpu_s(os.getpid()), time.perf_counter()
    verdicts = list(islice(verdicts_of, len(examples)))
    used_cpu_s, used_s = cpu_s(os.getpid()) - start_cpu_s, time.perf_counter() - start_s
    verdicts_of.close()  # pyright: ignore[reportAttributeAccessIssue]
    return summarise(examples, verdicts, used_cpu_s, used_s)


def summarise(
    examples: Sequence[Example], verdicts: Sequence[bool | None], used_cpu_s: float, used_s: float
) -> GradingFigures:
    labelled = [(e.label, v) for e, v in zip(examples, verdicts, strict=True) if e.label is not None]
    return GradingFigures(
        num=len(examples),
        num_labelled=len(labelled),
        right=sum(label == verdict for label, verdict in labelled),
        false_positives=sum(verdict is True and not label for label, verdict in labelled),
        false_negatives=sum(verdict is False and label for label, verdict in labelled),
        ungraded=sum(verdict is None for verdict in verdicts),
        cpu_s=used_cpu_s,
        wall_s=used_s,
    )


Results = dict[str, dict[str, GradingFigures]]
"""Set, peer, figures."""


def table(results: Results) -> Iterator[str]:
    columns = ("right", "false +", "false -", "ungraded", "CPU s", "wall s", "per CPU s")
    yield f"{'':28}" + "".join(column.rjust(16 if column == "right" else 10) for column in columns)
    for name, peers in results.items():
        for peer, f in peers.items():
            right = f"{f.right:,} of {f.num_labelled:,}"
            counts = "".join(f"{n:10,}" for n in (f.false_positives, f.false_negatives, f.ungraded))
            times = f"{f.cpu_s:10.2f}{f.wall_s:10.2f}{f.num / max(f.cpu_s, 0.01):10,.0f}"
            yield f"{name + ', ' + peer:28}{right:>16}{counts}{times}"


def bars(results: Results) -> Iterator[tuple[str, float, float, bool]]:
    """What was promised: figure, value, bar, and whether it holds."""
    ratios = {
        name: peers[OURS].cpu_s / max(peers[MATH_VERIFY].cpu_s, 0.01)
        for name, peers in results.items()
        if len(peers) == len(PEERS)
    }
    for name, peers in results.items():
        ours = peers[OURS]
        share = ours.right / ours.num_labelled
        if name == "cases":
            yield "share of the cases right >=", share, 0.98, share >= 0.98
            if name in ratios:
                yield "CPU on the cases, of math-verify's <=", ratios[name], 0.3, ratios[name] <= 0.3
        elif name == "trajectories":
            yield "share of the trajectories right >=", share, 0.98, share >= 0.98
            if name in ratios:
                rate = 1 / ratios[name]
                yield "trajectories per CPU second, times math-verify's >=", rate, 10, rate >= 10
        else:
            bar = ours.num - (2 if name == "math" else 0)  # two of MATH's boxes are empty
            yield f"golds of {name} right in their own solution >=", ours.right, bar, ours.right >= bar


def sets_of(options: argparse.Namespace) -> dict[str, Path]:
    """The sets that were asked for, by name."""
    named = {name: getattr(options, name) for name in ("cases", "trajectories", "math", "gsm8k")}
    return {name: path for name, path in named.items() if path} or {
        "cases": ROOT / "tests" / "grading_cases.yaml"
    }


def read_set(name: str, path: Path, limit: int | None) -> list[Example]:
    readers = {"cases": read_cases, "trajectories": read_trajectories}
    return readers.get(name, read_solutions)(path)[:limit]


def measure_apart(peer: str, name: str, path: Path, options: argparse.Namespace) -> GradingFigures:
    """Measure one peer on one set in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.grader", "--peer", peer, f"--{name}", str(path.resolve())]
    if options.limit:
        command += ["--limit", str(options.limit)]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return GradingFigures(**json.loads(run.stdout.splitlines()[-1]))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.grader",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--cases", type=Path, metavar="FILE", help="JSON lines with response, gold and label; or .yaml"
    )
    parser.add_argument(
        "--trajectories",
        type=Path,
        metavar="FILE",
        help="a file that recipes.label reads, with a label or null",
    )
    parser.add_argument("--math", type=Path, metavar="FOLDER", help="train.jsonl and test.jsonl of MATH")
    parser.add_argument("--gsm8k", type=Path, metavar="FOLDER", help="train.jsonl and test.jsonl of GSM8K")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N of each set")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--only-ours", action="store_true", help="leave out math-verify")
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.peer:
        [(name, path)] = sets_of(options).items()
        print(json.dumps(dataclasses.asdict(measure(options.peer, read_set(name, path, options.limit)))))
        return 0
    peers = [OURS] if options.only_ours else list(PEERS)
    results: Results = {}
    for name, path in sets_of(options).items():
        results[name] = {peer: measure_apart(peer, name, path, options) for peer in peers}
    print(*table(results), sep="\n")
    held = list(bars(results))
    for name, value, bar, is_held in held:
        print(f"{'held  ' if is_held else 'MISSED'}  {name} {bar:.6g}: {value:.6g}")
    if options.json:
        figures = {
            name: {p: dataclasses.asdict(f) for p, f in peers.items()} for name, peers in results.items()
        }
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return int(not all(is_held for *_, is_held in held))


if __name__ == "__main__":
    sys.exit(main())
