"""Which plots a run gets, from its sets, its trajectories and its training logs."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from eval.evaluate import Score
from eval.report import plots
from eval.report.plots import Curve, Spread
from eval.report.sources import Run
from eval.report.tally import Tally

logger = logging.getLogger(__name__)

MISSING_PLOTS = "Plots need matplotlib: pip install -e '.[report]', then write the report again."
MOST = 6
"""Sets side by side in one plot, as many as there are colours."""
ENDS = {
    "correct": ("good", 0.9),
    "wrong answer": ("bad", 0.75),
    "no answer": ("bad", 0.4),
    "ungraded": ("open", 0.8),
    "turn_limit": ("cut", 0.95),
    "token_limit": ("cut", 0.65),
    "context_limit": ("cut", 0.4),
    "time_limit": ("cut", 0.2),
    "environment fault": ("muted", 0.6),
}
"""Kinds of ends in the order of the bars, each with its colour and how opaque it is."""


class Figure(NamedTuple):
    title: str
    note: str
    """What is shown, and of what."""
    svg: str
    is_wide: bool = False


def figures(run: Run, tallies: Sequence[Tally], index: dict[str, Any]) -> list[Figure]:
    """All that there is data for; none where matplotlib is missing."""
    if not plots.is_available():
        logger.warning(MISSING_PLOTS)
        return []
    main = _main_sets(tallies)
    found = [_curve(tallies), *_groups(main), *_ends(index), *_shapes(main, index)]
    for log in run.logs:
        drawing, is_wide = plots.training(log)
        note = f"{len(log.steps):,} steps; thick: a running mean over a twentieth of them."
        found.append(Figure(f"Training: {log.name}", note, drawing, is_wide))
    return [figure for figure in found if figure is not None]


def policy_of(set_name: str) -> tuple[str, str] | None:
    """(what it measures, policy) of a set of an iterated run; None for a set of anything else.

    Trajectories for training in iteration k come from the policy of iteration k - 1.
    """
    if found := re.fullmatch(r"test/(?:(.+)/)?(greedy|sampled)", set_name):
        return f"test, {found[2]}", (found[1] or "").replace("_", " ")
    if found := re.fullmatch(r"iteration_(\d+)/current", set_name):
        before = int(found[1]) - 1
        return "new problems, sampled", f"iteration {before}" if before else ""
    if found := re.fullmatch(r"iteration_(\d+)/dev/model", set_name):
        return "dev, greedy", f"iteration {found[1]}"
    return None


def _main_sets(tallies: Sequence[Tally]) -> list[Tally]:
    """Those to compare first: greedy answers on the test problems, or else what the runs themselves hold."""
    usable = [s for s in tallies if s.accuracy is not None]
    tests = [s for s in usable if re.fullmatch(r"test/(.+/)?greedy", s.name)]
    whole = [s for s in usable if s.name == s.run]
    return (tests or whole or usable)[:MOST]


def _label(tally: Tally, among: Sequence[Tally]) -> str:
    found = policy_of(tally.name)
    own = found[1] if found and found[1] else tally.name
    is_alone = len({s.run for s in among}) == 1
    return own if is_alone or own == tally.run else f"{tally.run}: {own}"


def _curve(tallies: Sequence[Tally]) -> Figure | None:
    points: dict[str, list[tuple[str, Score]]] = {}
    runs = {s.run for s in tallies}
    for tally in tallies:
        found = policy_of(tally.name)
        if found is None or tally.accuracy is None or tally.run != next(iter(tallies)).run:
            continue
        points.setdefault(found[0], []).append((found[1], tally.accuracy))
    named = dict.fromkeys(policy for own in points.values() for policy, _ in own if policy)
    iterations = sorted((p for p in named if p.startswith("iteration ")), key=lambda p: int(p.split()[1]))
    first = next((p for p in named if not p.startswith("iteration ")), "start")
    policies = [first, *iterations]
    curves = [
        Curve(name, sorted(((p or first, s) for p, s in own), key=lambda point: policies.index(point[0])))
        for name, own in points.items()
    ]
    if not any(len(curve.points) > 1 for curve in curves):
        return None
    note = "Accuracy of each policy with its 95 % interval." + (" Of the first run." if len(runs) > 1 else "")
    return Figure("Learning curve", note, plots.learning_curve(curves, policies))


def _groups(main: Sequence[Tally]) -> list[Figure]:
    found = []
    for key, title in (("subject", "Accuracy by subject or kind"), ("level", "Accuracy by level")):
        by_set = {_label(s, main): shares for s in main if (shares := s.by(key))}
        if by_set:
            found.append(Figure(title, "With 95 % intervals.", plots.accuracy_by_group(by_set)))
    return found


def _ends(index: dict[str, Any]) -> list[Figure]:
    rows, stops = index["rows"], index["stops"]
    is_several = len({s["run"] for s in index["sets"]}) > 1
    by_set: dict[int, Counter[str]] = {}
    for number, outcome, stop in zip(rows["set"], rows["outcome"], rows["stop"], strict=True):
        by_set.setdefault(number, Counter())[_end(index["outcomes"][outcome], stops[stop])] += 1
    if not by_set:
        return []
    named = {_set_name(index["sets"][number], is_several): counts for number, counts in by_set.items()}
    used = {kind: paint for kind, paint in ENDS.items() if any(kind in c for c in named.values())}
    note = "Cut short by a limit is not wrong; a fault of the environment says nothing about the model."
    return [Figure("Where trajectories end", note, plots.ends(named, used))]


def _shapes(main: Sequence[Tally], index: dict[str, Any]) -> list[Figure]:
    wanted = {(s.run, s.name): _label(s, main) for s in main}
    numbers = {
        n: wanted[s["run"], s["name"]] for n, s in enumerate(index["sets"]) if (s["run"], s["name"]) in wanted
    }
    if not numbers:
        numbers = {n: s["name"] for n, s in enumerate(index["sets"][:MOST])}
    rows, is_correct = index["rows"], [name == "correct" for name in index["outcomes"]]
    panels: dict[str, list[Spread]] = {}
    for column, label in (("tokens", "tokens the model wrote"), ("turns", "turns it took")):
        kept: dict[int, tuple[list[float], list[float]]] = {n: ([], []) for n in numbers}
        for number, outcome, value in zip(rows["set"], rows["outcome"], rows[column], strict=True):
            if number in kept:
                kept[number][0 if is_correct[outcome] else 1].append(value)
        panels[label] = [Spread(numbers[n], *values) for n, values in kept.items() if any(values)]
    if not all(panels.values()):
        return []
    note = "Dot: median. Thick: quartiles. Thin: the middle 80 % of trajectories."
    return [Figure("Lengths and turns", note, plots.spreads(panels))]


def _end(outcome: str, stop: str) -> str:
    if outcome.startswith("truncated"):
        return stop
    return "ungraded" if outcome.startswith("ungraded") else outcome


def _set_name(entry: dict[str, Any], is_several: bool) -> str:
    is_whole = entry["name"] == entry["run"]
    return entry["name"] if is_whole or not is_several else f"{entry['run']}: {entry['name']}"
