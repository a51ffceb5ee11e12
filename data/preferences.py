"""Pairs by a judge that compares two trajectories, for what no grader can call right or wrong.

As in `data.labels`, only what came to its own end is compared, of trajectories with the same action ids one is kept,
the draws depend on the seed and on what is there, and everything is accounted for.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from data.labels import Fate, LabelCounts, Row, pair_row, why_unusable
from mtpo.errors import InputError
from mtpo.judges import Judge
from mtpo.trajectory import Problem, Trajectory

COMPARABLE = "comparable"
DECIDED, UNDECIDED, TOO_FEW = "with a preference", "without a preference", "fewer than two to compare"
"""Outcomes of a problem."""


async def judged_pairs(
    trajectories: Iterable[Trajectory],
    problems: Iterable[Problem],
    judge: Judge,
    *,
    per_problem: int = 1,
    seed: int = 0,
) -> tuple[list[Row], LabelCounts]:
    """Up to `per_problem` pairs of each problem of which the judge prefers one side, the preferred one chosen.

    Pairs are drawn at random and shown to the judge until there are enough. Ties, and pairs on which the judge says
    nothing, give no row; problems are judged side by side.

    Raises:
        InputError: `per_problem` is below 1, or a trajectory is of a problem that is not among `problems`.
        JudgeUnavailable: the judge cannot be asked at present.
    """
    if per_problem < 1:
        raise InputError(f"per_problem must be at least 1, got {per_problem}")
    known = {problem.id: problem for problem in problems}
    usable, fates = _comparable(trajectories)
    if unknown := sorted(usable.keys() - known.keys()):
        raise InputError(f"a trajectory is of problem {unknown[0]!r}, which is not among the problems")
    found = await asyncio.gather(
        *(_pairs_of(known[name], usable[name], judge, per_problem, seed) for name in sorted(usable))
    )
    outcomes = Counter(
        TOO_FEW if len(usable[name]) < 2 else DECIDED if rows else UNDECIDED
        for name, rows in zip(sorted(usable), found, strict=True)
    )
    rows = [row for own in found for row in own]
    return rows, LabelCounts("pair", len(rows), dict(fates.most_common()), dict(outcomes.most_common()))


def _comparable(trajectories: Iterable[Trajectory]) -> tuple[dict[str, list[Trajectory]], Counter[str]]:
    """What may be compared, by problem and in the order of the samples, and the fate of everything."""
    fates: Counter[str] = Counter()
    usable: defaultdict[str, list[Trajectory]] = defaultdict(list)
    seen: set[tuple[str, tuple[tuple[int, ...], ...]]] = set()
    for trajectory in sorted(trajectories, key=lambda t: (t.problem_id, t.sample)):
        usable[trajectory.problem_id]  # a problem without any is counted too
        key = trajectory.problem_id, trajectory.action_ids
        fate = why_unusable(trajectory) or (Fate.DUPLICATE if key in seen else None)
        fates[fate or COMPARABLE] += 1
        if fate is None:
            seen.add(key)
            usable[trajectory.problem_id].append(trajectory)
    return dict(usable), fates


async def _pairs_of(
    problem: Problem, own: Sequence[Trajectory], judge: Judge, per_problem: int, seed: int
) -> list[Row]:
    pairs = list(itertools.combinations(own, 2))
    random.Random(f"{seed}/{problem.id}").shuffle(pairs)
    rows: list[Row] = []
    for first, second in pairs:
        if len(rows) == per_problem:
            break
        preference = await judge.prefer(first, second, problem)
        if preference is not None and preference != 0.5:
            chosen, rejected = (first, second) if preference > 0.5 else (second, first)
            rows.append(pair_row(problem.id, chosen, rejected))
    return rows
