"""What a pool holds on the host: processes, descriptors, files, memory."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sandbox.processes import adopt_orphans, descendants

SETTLE_S = 4.0
"""What a closed session left must be gone after this time."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """A moment's state of this process and of the directory that its pool lives in."""

    directory: Path
    processes: frozenset[int]
    counts: dict[str, int]

    @classmethod
    def of(cls, directory: Path) -> Footprint:
        processes = frozenset(descendants(os.getpid(), with_dead=True))
        counts = {
            "processes": len(processes),
            "descriptors": len(os.listdir("/proc/self/fd")),
            # A pool's files lie two levels deep at most; a tree of an attacker's may be too deep to walk.
            "files": sum(1 for depth in (1, 2, 3) for _ in directory.glob("/".join("*" * depth))),
        }
        return cls(directory, processes, counts)

    async def exceeded(self) -> list[str]:
        """Wait until there is no more than at this footprint. Processes that stay are killed in the end.

        Returns:
            What stays, one line a kind.
        """
        deadline = time.monotonic() + SETTLE_S
        while more := (now := Footprint.of(self.directory))._more_than(self):
            if time.monotonic() > deadline:
                for pid in now.processes - self.processes:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                break
            await asyncio.sleep(0.01)
        return more

    def _more_than(self, before: Footprint) -> list[str]:
        rise = {name: count - before.counts[name] for name, count in self.counts.items()}
        return [f"left: {number} {name} more" for name, number in rise.items() if number > 0]


def peak_mb() -> float:
    """The most memory that this process has ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextmanager
def adopting_orphans() -> Iterator[None]:
    """Make processes whose parents end children of this one, so that no daemon gets out of sight."""
    adopt_orphans()
    try:
        yield
    finally:
        adopt_orphans(adopt=False)
