import os
from pathlib import Path

import pytest

from sandbox import InterpreterPool, Limits
from sandbox.cgroup import Cgroups, delegated_cgroup, join, remove_cgroup
from sandbox.layers import LAYERS
from tests.processes import kernels_of


@pytest.fixture
def hierarchy(tmp_path: Path) -> Path:
    """A cgroup v2 as a systemd user session has it, made of plain files."""
    for path, enabled in (
        ("", "cpu memory pids"),
        ("user", "memory pids"),
        ("user/app", "cpu pids"),
        ("user/app/me", ""),
    ):
        directory = tmp_path / "cgroup" / path
        directory.mkdir(exist_ok=True)
        (directory / "cgroup.subtree_control").write_text(enabled)
        (directory / "cgroup.procs").write_text("")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cgroup").write_text("1:name=systemd:/other\n0::/user/app/me\n")
    (tmp_path / "proc/mountinfo").write_text(
        f"30 24 0:26 / {tmp_path}/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
        "31 24 0:27 / /elsewhere rw - cgroup cgroup rw,memory\n"
    )
    return tmp_path


def test_nearest_cgroup_with_both_controllers_is_taken(hierarchy: Path) -> None:
    assert delegated_cgroup(hierarchy / "proc") == hierarchy / "cgroup/user"


def test_a_machine_without_delegation_says_so(hierarchy: Path) -> None:
    for path in ("user", ""):
        (hierarchy / "cgroup" / path / "cgroup.subtree_control").write_text("cpu")
    with pytest.raises(OSError, match="no cgroup v2 with the memory and pids controllers is delegated"):
        delegated_cgroup(hierarchy / "proc")
    (hierarchy / "proc/mountinfo").write_text("31 24 0:27 / /elsewhere rw - cgroup cgroup rw,memory\n")
    with pytest.raises(OSError, match="no cgroup v2 is mounted"):
        delegated_cgroup(hierarchy / "proc")


def test_a_session_is_bounded_by_its_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(memory_mb=100, scratch_mb=10, max_threads=20, max_processes=2)
    cgroups = Cgroups(limits, above=tmp_path)
    assert (cgroups.path / "cgroup.subtree_control").read_text() == "+memory +pids"
    (cgroups.path / "7").mkdir()
    (cgroups.path / "7/cgroup.procs").write_text("")
    monkeypatch.setattr(Path, "mkdir", lambda path: None)
    join(cgroups.make(7))
    read = {file.name: file.read_text() for file in (cgroups.path / "7").iterdir()}
    assert read == {
        "memory.max": str((3 * (100 + 128) + 10) * 2**20),
        "memory.swap.max": "0",
        "pids.max": "30",
        "cgroup.procs": "0",
    }


def test_a_pool_leaves_no_cgroup_behind(tmp_path: Path) -> None:
    (tmp_path / "pool" / "1").mkdir(parents=True)
    remove_cgroup(tmp_path / "pool")
    assert list(tmp_path.iterdir()) == []


async def test_sessions_live_in_cgroups_of_their_own() -> None:
    try:
        delegated_cgroup()
    except OSError as error:
        pytest.skip(str(error))
    async with InterpreterPool(isolation=set(LAYERS), preload=()) as pool, pool.session() as session:
        await session.execute("1")
        async with await session.fork() as twin:
            await twin.execute("1")
            groups = {Path(f"/proc/{pid}/cgroup").read_text().splitlines()[-1] for pid in kernels_of(pool)}
            assert len(groups) == 2 and all("/mtpo-" in group for group in groups)
        path = pool._server._cgroups.path  # pyright: ignore[reportOptionalMemberAccess]
    assert not os.path.exists(path)
