"""What stands between the model's code and the machine, layer by layer, and which layers a pool wants."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from mtpo.errors import InputError, SandboxError

Policy = Literal["full", "available", "none"]
Isolation = Policy | Collection[str]


@dataclass(frozen=True, slots=True)
class Layer:
    stops: str
    mend: str
    """What to do where it is missing."""


_USER_NAMESPACES = (
    "allow user namespaces: sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone=1, "
    "kernel.apparmor_restrict_unprivileged_userns=0; in a container: --security-opt seccomp=unconfined"
)
LAYERS = {
    "namespaces": Layer(
        "seeing and signalling other processes, every network, System V IPC and message queues",
        _USER_NAMESPACES,
    ),
    "view": Layer(
        "seeing files beyond the system's libraries and this Python, writing any of them, filling the disk",
        _USER_NAMESPACES,
    ),
    "landlock": Layer(
        "opening other files, TCP, abstract sockets, signals to other processes, once more",
        "Linux 5.13 or newer with lsm=landlock (6.12 for sockets and signals)",
    ),
    "seccomp": Layer(
        "starting processes and programs, sockets, ptrace, mounts, namespaces and 100 rarer system calls",
        "Linux 4.14 or newer on x86_64 or aarch64",
    ),
    "user": Layer(
        "acting as root, where the owner is root: the code runs as nobody",
        "use a Python that every user can read, or start the pool as an ordinary user",
    ),
    "privileges": Layer(
        "using capabilities, and gaining rights through set-user-id programs",
        "Linux 3.5 or newer",
    ),
    "rlimits": Layer("using more memory, CPU time, file size, descriptors and threads than `Limits`", "none"),
    "cgroup": Layer(
        "using more memory than `Limits` through many processes or through files in memory",
        "run under a systemd user session, or delegate a cgroup v2 with the memory and pids controllers",
    ),
}
OPTIONAL = frozenset({"cgroup"})
"""Not part of `full`: few machines delegate it, and what it stops is bounded by other layers together."""


def wanted_layers(isolation: Isolation) -> frozenset[str]:
    """The layers to try.

    Raises:
        InputError: a name is not known.
    """
    if isolation == "none":
        return frozenset({"rlimits"})
    if isolation in ("full", "available"):
        return frozenset(LAYERS)
    if isinstance(isolation, str) or not set(isolation) <= set(LAYERS):
        raise InputError(
            f"isolation must be 'full', 'available', 'none' or names among {list(LAYERS)}, got {isolation!r}"
        )
    return frozenset(isolation)


def judge(isolation: Isolation, missing: Mapping[str, str]) -> str | None:
    """Decide whether a pool may run without the layers in `missing`, which maps names to reasons.

    Returns:
        What to warn of, in one line; None if nothing that was wanted is missing.

    Raises:
        SandboxError: the policy does not allow it.
    """
    lacking = {name: why for name, why in missing.items() if name not in OPTIONAL or _is_explicit(isolation)}
    if not lacking:
        return None
    if isolation == "available":
        stops = "; ".join(f"{LAYERS[name].stops} ({name}: {why})" for name, why in lacking.items())
        return f"the sandbox cannot stop code from {stops}; `python -m sandbox doctor` says how to mend it"
    details = "; ".join(f"{name}: {why} (mend: {LAYERS[name].mend})" for name, why in lacking.items())
    raise SandboxError(f"isolation={isolation!r} is not to be had on this machine: {details}")


def _is_explicit(isolation: Isolation) -> bool:
    return not isinstance(isolation, str)
