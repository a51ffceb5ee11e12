"""Processes and what they started, seen from the outside through /proc."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

from sandbox import syscalls


def adopt_orphans(*, adopt: bool = True) -> None:
    """Stay the ancestor of all processes that this one starts, so that `descendants` misses none; or stop that."""
    syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, int(adopt))


def generations(pid: int, *, with_dead: bool = False) -> list[list[int]]:
    """The processes that `pid` started, those that these started, and so on; no generation is empty.

    Args:
        with_dead: count those that have ended, but that their parents have not waited for; of the children of the
            caller, who is to wait for them, only the living.
    """
    children: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := stat_fields(int(entry.name))):
            state, parent = stat[0], int(stat[1])
            if state != "Z" or (with_dead and parent != os.getpid()):
                children[parent].append(int(entry.name))
    found = [[pid]]
    while youngest := [child for parent in found[-1] for child in children[parent]]:
        found.append(youngest)
    return found[1:]


def descendants(pid: int, *, with_dead: bool = False) -> list[int]:
    """All processes that stem from `pid`, itself not among them; the rest as in `generations`."""
    return [process for generation in generations(pid, with_dead=with_dead) for process in generation]


def stat_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state (field 3 of proc(5)) on; empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
