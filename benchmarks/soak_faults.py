"""Who is killed when, and where to find them."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from sandbox.processes import generations, stat_fields

Plan = list[tuple[float, str]]
"""After how much work, in ascending order, a process of which part is killed."""

Family = dict[str, list[int]]
"""The living processes of each part."""

LAST_KILL = 0.9
"""The share of the work after which nobody is killed any more."""


def plan_kills(
    num: int, work_per_kill: Mapping[str, int], rng: random.Random, *, young: Collection[str]
) -> Plan:
    """Kills at random amounts of work up to `num`, at least one of each part.

    Args:
        work_per_kill: for each part, in the mean while its processes are killed.
        young: parts that are killed in the first half only; in the second half they grow old, to be watched.
    """
    plan: Plan = []
    for part, work in work_per_kill.items():
        until = num * (0.5 if part in young else LAST_KILL)
        plan += [(rng.uniform(0.0, until), part) for _ in range(max(1, int(until / work)))]
    return sorted(plan)


def kill_one(plan: Plan, work: float, family: Family, rng: random.Random, counts: Counter[str]) -> None:
    """Kill, with a signal that nothing can catch, the first that is due and alive, and take it out of the plan."""
    for due, part in plan:
        if due > work:
            return
        if family[part]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(family[part]), signal.SIGKILL)
                counts[f"killed {part}"] += 1
            return plan.remove((due, part))


def family_of(owner: int) -> Family:
    """The processes of each part that the owner of a sandbox and of a grader has at the moment."""
    children, grandchildren, great_grandchildren = [*generations(owner), [], [], []][:3]
    guardians = [pid for pid in children if "guardian" in _command(pid)]
    graders = [pid for pid in children if "grader_workers" in _command(pid)]
    fork_servers = _children_of(guardians, grandchildren)
    return {
        "guardian": guardians,
        "fork server": fork_servers,
        "kernel": _children_of(fork_servers, great_grandchildren),
        "grader": graders,
        "grading worker": _children_of(graders, grandchildren),
    }


def _children_of(parents: Collection[int], generation: Sequence[int]) -> list[int]:
    return [pid for pid in generation if (stat := stat_fields(pid)) and int(stat[1]) in parents]


def _command(pid: int) -> str:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""
