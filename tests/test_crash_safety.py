"""Whatever is killed, and whenever: nothing is lost, nothing comes twice, nothing else is different."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from tests.crash_driver import contents, disturbed_run, run

NUM = 150


@pytest.mark.slow
def test_a_run_killed_at_random_moments_gives_the_trajectories_of_an_undisturbed_one(tmp_path: Path) -> None:
    assert asyncio.run(run(tmp_path / "undisturbed", NUM)) == 0
    expected = contents(tmp_path / "undisturbed")
    assert len(expected) == NUM
    reasons = Counter(reason for _, _, reason, _ in expected.values())
    statuses = Counter(status for _, executions, _, _ in expected.values() for _, _, status in executions)
    assert {"answered", "no_code", "turn_limit"} == set(reasons) and {"ok", "error", "died"} == set(statuses)
    kills = {"driver": 3, "engine_server": 3, "fork_server": 4}
    counts = disturbed_run(tmp_path / "killed", NUM, seed=0, **kills)
    assert kills.items() <= counts.items() and counts["start"] >= 4
    assert contents(tmp_path / "killed") == expected
