"""The files that a session sees: the system's libraries and this Python, read-only, and nothing else."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from sandbox import syscalls
from sandbox.landlock import DEVICES

ROOT = str(Path(__file__).resolve().parents[1])
SYSTEM = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/alternatives",
    "/etc/localtime",
)
SCRATCH = "/session/scratch"
MAX_SCRATCH_FILES = 16384


def readable_paths(*, with_own_code: bool) -> list[str]:
    """What Python needs to run: no path is below another.

    Args:
        with_own_code: this package too, for a kernel that imports it inside.
    """
    own = [f"{ROOT}/sandbox", f"{ROOT}/mtpo"] if with_own_code else []
    python = [sys.prefix, sys.base_prefix, *(p for p in sys.path if p != ROOT)]
    wanted = {path for name in (*SYSTEM, *python, *own) for path in (name, os.path.realpath(name))}
    paths: list[str] = []
    for path in sorted(filter(os.path.exists, wanted)):
        if not any(path.startswith(f"{above}/") for above in paths):
            paths.append(path)
    return paths


def enter(mount_point: str, paths: Iterable[str]) -> None:
    """Give this process a root directory that has `paths`, a few devices and `SCRATCH`, and nothing else.

    The process must have a mount namespace of its own.

    Args:
        mount_point: any directory; it is hidden in that namespace.

    Raises:
        OSError: the kernel refused; everything is as it was.
    """
    syscalls.mount("none", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
    syscalls.mount("tmpfs", mount_point, "tmpfs", 0, "mode=755,size=1m")
    try:
        _furnish(mount_point, paths)
        os.chdir(mount_point)
        syscalls.call("pivot_root", ".", ".")  # the old root now lies over the new one
    except OSError:
        os.chdir("/")
        syscalls.call("umount2", mount_point, syscalls.MNT_DETACH)
        raise
    syscalls.call("umount2", ".", syscalls.MNT_DETACH)
    os.chdir("/")
    flags = syscalls.MS_RDONLY | syscalls.MS_NOSUID | syscalls.MS_NODEV
    syscalls.mount("none", "/", "", syscalls.MS_REMOUNT | syscalls.MS_BIND | flags)


def _furnish(root: str, paths: Iterable[str]) -> None:
    for path in paths:
        target = root + path
        if os.path.islink(path):  # /lib is a link into /usr on most systems
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.symlink(os.readlink(path), target)
        else:
            _bind(path, target)
            syscalls.make_read_only(target)
    for device in DEVICES:
        _bind(device, root + device)
    os.makedirs(root + SCRATCH)
    if not os.path.lexists(root + "/tmp"):
        os.symlink(SCRATCH, root + "/tmp")


def mount_scratch(size_mb: int) -> None:
    """Mount an empty directory at `SCRATCH` that holds `size_mb` MiB, in a mount namespace of its own."""
    options = f"mode=700,size={size_mb}m,nr_inodes={MAX_SCRATCH_FILES}"
    syscalls.mount("tmpfs", SCRATCH, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, options)


def _bind(path: str, target: str) -> None:
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "x").close()
    syscalls.mount(path, target, "", syscalls.MS_BIND | syscalls.MS_REC)
