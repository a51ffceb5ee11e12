"""Do processes stay as small as they were? Their memory and descriptors, from the start of each to its end."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from benchmarks.processes import num_descriptors, rss_mib

Check = tuple[bool, str]
"""Whether a promise was kept, and the figures behind it."""

MAX_RSS_GROWTH = 1.10
MAX_DESCRIPTOR_GROWTH = 8
WARM_UP = 0.1
"""The share of a life that is left out at its start: imports, caches and pools fill up."""


class Footprint(NamedTuple):
    """What one process holds at one moment."""

    mib: float
    descriptors: int


class Watch:
    """Footprints of processes, each known by the part that it plays. A part is judged by its oldest process."""

    def __init__(self) -> None:
        self._lives: dict[str, dict[int, list[Footprint]]] = defaultdict(lambda: defaultdict(list))

    def sample(self, processes: Mapping[str, int]) -> None:
        """Look at the process of each part; one that has just ended is left out."""
        for part, pid in processes.items():
            try:
                footprint = Footprint(rss_mib(pid), num_descriptors(pid))
            except (FileNotFoundError, ProcessLookupError):
                continue
            if footprint.mib:  # the dead have none
                self._lives[part][pid].append(footprint)

    def checks(self) -> Iterator[Check]:
        """Whether the last tenth of each life is as small as the first tenth after the warm-up."""
        for part, lives in self._lives.items():
            yield judge_life(part, max(lives.values(), key=len))


def judge_life(part: str, life: Sequence[Footprint]) -> Check:
    """Whether memory grew by at most a tenth, and descriptors by at most eight."""
    warm = life[int(WARM_UP * len(life)) :]
    (first_mib, last_mib), (first_fds, last_fds) = (tenths(series) for series in zip(*warm, strict=True))
    is_flat = last_mib <= first_mib * MAX_RSS_GROWTH and last_fds <= first_fds + MAX_DESCRIPTOR_GROWTH
    return is_flat, (
        f"{part} flat: {first_mib:.1f} to {last_mib:.1f} MiB, {first_fds:.0f} to {last_fds:.0f} descriptors, "
        f"first and last tenth of {len(life)} looks"
    )


def tenths(values: Sequence[float]) -> tuple[float, float]:
    """The medians of the first and the last tenth."""
    tenth = max(1, len(values) // 10)
    return statistics.median(values[:tenth]), statistics.median(values[-tenth:])


def report(checks: Iterable[Check]) -> int:
    """Print the checks; the exit status of a command."""
    results = list(checks)
    for is_kept, line in results:
        print(f"{'held  ' if is_kept else 'FAILED'}  {line}")
    return int(not all(is_kept for is_kept, _ in results))
