"""What a process and all that it started use, seen from the outside through /proc."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

from sandbox import syscalls

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def adopt_orphans() -> None:
    """Stay the ancestor of all processes that this one starts, so that `descendants` misses none."""
    syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)


def generations(pid: int) -> list[list[int]]:
    """The living processes that `pid` started, those that these started, and so on; none of them empty."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))) and stat[0] != "Z":
            children[int(stat[1])].append(int(entry.name))
    found = [[pid]]
    while youngest := [child for parent in found[-1] for child in children[parent]]:
        found.append(youngest)
    return found[1:]


def descendants(pid: int) -> list[int]:
    """All living processes that stem from `pid`, itself not among them."""
    return [descendant for generation in generations(pid) for descendant in generation]


def cpu_s(pid: int) -> float:
    """CPU seconds of a process, of all that live under it, and of those that these have buried."""
    times = (_stat(p) for p in [pid, *descendants(pid)])
    return sum(sum(map(int, stat[11:15])) for stat in times if stat) / TICKS_PER_S


def private_mib(pid: int) -> float:
    """Memory that is this process's alone, MiB: what the machine gets back when it ends."""
    return _memory_mib(pid, "Private_Clean:", "Private_Dirty:")


def pss_mib(pid: int) -> float:
    """This process's memory, MiB, of what it shares only its share."""
    return _memory_mib(pid, "Pss:")


def rss_mib(pid: int) -> float:
    """This process's memory, MiB, with all that it shares."""
    return _memory_mib(pid, "Rss:")


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state (field 3 of proc(5)) on; empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _memory_mib(pid: int, *names: str) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith(names)) / 1024
