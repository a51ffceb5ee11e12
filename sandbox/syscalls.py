"""System calls that Python has no function for. Each raises OSError, with the name of the call."""

from __future__ import annotations

import ctypes
import os
import platform
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)

NUMBERS = {"mount_setattr": 442, "landlock_create_ruleset": 444, "landlock_add_rule": 445,
           "landlock_restrict_self": 446}  # fmt: skip
"""Of the calls that libc has no function for; the same on every machine (<asm-generic/unistd.h>)."""
if number := {"x86_64": 317, "aarch64": 277}.get(platform.machine()):
    NUMBERS["seccomp"] = number

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000  # <linux/sched.h>
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000

PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4  # <linux/prctl.h>
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 36, 38, 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
CAPABILITY_VERSION_3 = 0x20080522  # <linux/capability.h>

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT = 1, 2, 4, 32  # <linux/mount.h>
MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 4096, 16384, 1 << 18, 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
AT_FDCWD, AT_RECURSIVE = -100, 0x8000


def call(name: str, *args: int | str | ctypes.Array[Any] | ctypes.Structure) -> int:
    """Do a system call.

    Args:
        args: numbers; paths; structures and arrays, which are passed by address.

    Raises:
        OSError: the kernel refused, or has no such call on this kind of machine.
    """
    ctypes.set_errno(0)
    values = [_as_c(arg) for arg in args]
    if name in NUMBERS:
        result = _libc.syscall(ctypes.c_long(NUMBERS[name]), *values)
    elif hasattr(_libc, name):
        result = getattr(_libc, name)(*values)
    else:
        raise OSError(f"{name}: not known on {platform.machine()}")
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def _as_c(value: Any) -> Any:
    if isinstance(value, int):
        return ctypes.c_long(value)
    return os.fsencode(value) if isinstance(value, str) else ctypes.byref(value)


def prctl(option: int, value: int) -> None:
    call("prctl", option, value, 0, 0, 0)


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    call("mount", source, target, kind, flags, options)


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns_fd")]


def make_read_only(path: str) -> None:
    """Make the mounts at `path` and below read-only, without devices and set-user-id programs."""
    wanted = _MountAttributes(set=MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV)
    call("mount_setattr", AT_FDCWD, path, AT_RECURSIVE, wanted, ctypes.sizeof(wanted))


class _CapabilityHeader(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


def drop_capabilities() -> None:
    """Give up every capability of this thread: with no_new_privs, for good."""
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    call("capset", _CapabilityHeader(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)())
