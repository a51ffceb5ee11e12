"""Landlock: what a session may open, connect to and signal, also where there are no namespaces."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

from sandbox import syscalls

GET_ABI = 1  # <linux/landlock.h>
PATH_BENEATH = 1
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE, IOCTL_DEV = 1, 2, 4, 8, 1 << 14, 1 << 15
RIGHTS_OF_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
TCP_BIND_AND_CONNECT, ABI_WITH_TCP = 3, 4
ABSTRACT_SOCKETS_AND_SIGNALS, ABI_WITH_SCOPES = 3, 6
OF_A_FILE = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


class _Ruleset(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("files", "net", "scoped")]


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [("rights", ctypes.c_uint64), ("fd", ctypes.c_int32)]


def abi() -> int:
    """The version that the kernel offers.

    Raises:
        OSError: it has none.
    """
    return syscalls.call("landlock_create_ruleset", 0, 0, GET_ABI)


def make_ruleset(readable: Iterable[str], writable: Iterable[str], *, may_execute: bool) -> int:
    """What `enforce` needs.

    Args:
        readable: files and directories, with all that is below; those that do not exist are skipped.
        writable: the same; reading is included, running programs is not.

    Returns:
        A descriptor.

    Raises:
        OSError: the kernel has no Landlock.
    """
    version = abi()
    everything = RIGHTS_OF_ABI[min(version, max(RIGHTS_OF_ABI))]
    ruleset = _Ruleset(
        everything,
        TCP_BIND_AND_CONNECT if version >= ABI_WITH_TCP else 0,
        ABSTRACT_SOCKETS_AND_SIGNALS if version >= ABI_WITH_SCOPES else 0,
    )
    fd = syscalls.call("landlock_create_ruleset", ruleset, ctypes.sizeof(ruleset), 0)
    reading = READ_FILE | READ_DIR | (EXECUTE if may_execute else 0)
    for path in readable:
        _allow(fd, path, reading)
    for path in (*writable, *DEVICES):
        _allow(fd, path, everything & ~EXECUTE)
    return fd


def enforce(ruleset: int) -> None:
    """Confine this thread, and what it will start, for good. Needs no_new_privs."""
    syscalls.call("landlock_restrict_self", ruleset, 0)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH)
    except OSError:
        return
    try:
        if not os.path.isdir(path):
            rights &= OF_A_FILE
        syscalls.call("landlock_add_rule", ruleset, PATH_BENEATH, _PathBeneath(rights, fd), 0)
    finally:
        os.close(fd)
