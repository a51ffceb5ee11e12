"""One cgroup a session, where a cgroup v2 has been delegated: bounds on all of its processes together."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from sandbox.limits import Limits

CONTROLLERS = {"memory", "pids"}
KERNEL_MB = 128
"""Room for the kernel itself, which `Limits.memory_mb` does not count."""
KERNEL_TASKS = 8


class Cgroups:
    """A cgroup for each session of a pool, below one of the pool's own.

    Raises:
        OSError: none has been delegated to this process, with the reason.
    """

    def __init__(self, limits: Limits, above: Path | None = None) -> None:
        self._limits = limits
        self.path = (above or delegated_cgroup()) / f"mtpo-{secrets.token_hex(4)}"
        self.path.mkdir()
        enabled = " ".join(f"+{name}" for name in sorted(CONTROLLERS))
        (self.path / "cgroup.subtree_control").write_text(enabled)

    def make(self, session_id: int) -> int:
        """Make the cgroup of a session.

        Returns:
            The descriptor through which a process joins it, see `join`.
        """
        path = self.path / str(session_id)
        path.mkdir()
        limits = self._limits
        megabytes = (limits.memory_mb + KERNEL_MB) * (1 + limits.max_processes) + limits.scratch_mb
        (path / "memory.max").write_text(str(megabytes * 2**20))
        with contextlib.suppress(FileNotFoundError):  # a kernel without swap
            (path / "memory.swap.max").write_text("0")
        (path / "pids.max").write_text(str(limits.max_threads + limits.max_processes + KERNEL_TASKS))
        return os.open(path / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

    def remove(self, session_id: int) -> None:
        with contextlib.suppress(OSError):
            (self.path / str(session_id)).rmdir()

    def close(self) -> None:
        remove_cgroup(self.path)


def join(fd: int) -> None:
    """Put this process into the cgroup that `Cgroups.make` made."""
    os.write(fd, b"0")
    os.close(fd)


def remove_cgroup(path: Path) -> None:
    """Remove the cgroup of a pool whose processes have ended."""
    for each in (*path.glob("*/"), path):
        with contextlib.suppress(OSError):
            each.rmdir()


def delegated_cgroup(proc: Path = Path("/proc/self")) -> Path:
    """The nearest cgroup above this process in which it may make others.

    Raises:
        OSError: there is none.
    """
    own = [line[3:] for line in (proc / "cgroup").read_text().splitlines() if line.startswith("0::")]
    mounts = [line.split() for line in (proc / "mountinfo").read_text().splitlines()]
    roots = [Path(words[4]) for words in mounts if words[words.index("-") + 1] == "cgroup2"]
    if not own or not roots:
        raise OSError("no cgroup v2 is mounted")
    start = roots[0] / own[0].lstrip("/")
    for path in (start, *start.parents):
        if not path.is_relative_to(roots[0]):
            break
        try:
            enabled = (path / "cgroup.subtree_control").read_text().split()
        except OSError:
            continue
        if (
            set(enabled) >= CONTROLLERS
            and os.access(path, os.W_OK)
            and os.access(path / "cgroup.procs", os.W_OK)
        ):
            return path
    raise OSError("no cgroup v2 with the memory and pids controllers is delegated to this process")
