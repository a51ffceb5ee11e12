"""What a process and all that it started use, seen from the outside through /proc."""

from __future__ import annotations

import os
from pathlib import Path

from sandbox.processes import descendants, stat_fields

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """CPU seconds of a process, of all that live under it, and of those that these have buried."""
    times = (stat_fields(p) for p in [pid, *descendants(pid)])
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


def num_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _memory_mib(pid: int, *names: str) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith(names)) / 1024
