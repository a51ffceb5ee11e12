"""Puts a session behind its layers. Runs in the kernel process, in three steps.

`enter` comes first, while the process still holds what it inherited from the fork server. `confine` comes
before the process has a second thread, since Landlock and capabilities belong to threads. `seal` comes
last, after everything that the kernel itself needs and before any code of the model.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sandbox import landlock, seccomp, syscalls, view
from sandbox.limits import Limits

INNER_ID = 1000
"""User and group that a session sees itself as, whoever it is outside."""
KERNEL_THREADS = 8
"""Of the kernel itself, and room for the moment of a fork."""

ENVIRONMENT = {
    "MPLBACKEND": "Agg",
    "NO_COLOR": "1",
    "OMP_NUM_THREADS": "1",  # a thread in the zygote would make forking unsafe
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",  # sets keep their order from session to session and from run to run
    "PYTHONDONTWRITEBYTECODE": "1",
}
INHERITED = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH")
"""The only variables of the owner that a session may see: all others could hold a token."""


def scrubbed_environment(directory: Path) -> dict[str, str]:
    """The environment of a session that lives in `directory`."""
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
    return inherited | ENVIRONMENT | _home_variables(directory)


def _home_variables(directory: Path) -> dict[str, str]:
    return {"HOME": str(directory), "TMPDIR": str(directory), "IPYTHONDIR": str(directory.parent / "ipython")}


def move_home(directory: Path) -> None:
    """Make `directory` the working directory, and that for temporary files."""
    os.chdir(directory)
    os.environ.update(_home_variables(directory))


def die_with(parent_pid: int, signum: signal.Signals) -> None:
    """Have the kernel send `signum` to this process when its parent is gone; exit if it already is.

    To be said again whenever the process gets other rights: then Linux forgets it.
    """
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, int(signum))
    if os.getppid() != parent_pid:
        os._exit(1)


@dataclass(frozen=True, slots=True)
class Confinement:
    """The layers of a pool's sessions."""

    layers: frozenset[str]
    limits: Limits
    scratch: str
    """The directory that holds those of a session and its forks."""
    readable: Collection[str]
    proc: int
    """Descriptor of /proc, which a session has no path to; -1 in a session."""
    ruleset: int = -1
    """Descriptor of Landlock's rules, if they are the same for all sessions."""

    def has(self, *names: str) -> bool:
        return not self.layers.isdisjoint(names)

    def of_family(self, family_id: int) -> Confinement:
        """That of a session and its forks, which share what they may write."""
        if self.has("view"):  # each family has a file system of its own there
            return self
        return replace(self, scratch=f"{self.scratch}/{family_id}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"layers": sorted(self.layers), "proc": -1, "ruleset": -1}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Confinement:
        limits = Limits(**values["limits"])
        return cls(**values | {"layers": frozenset(values["layers"]), "limits": limits})

    def read_proc(self, path: str) -> str:
        with open(os.open(path, os.O_RDONLY, dir_fd=self.proc)) as file:
            return file.read()

    def prepare(self) -> Confinement:
        """Do once, in the fork server, what does not differ from session to session."""
        environment = scrubbed_environment(Path(self.scratch))
        os.environ.clear()
        os.environ.update(environment)
        ruleset = -1
        with contextlib.suppress(OSError):  # `probe` says why
            if self.has("seccomp"):
                seccomp.program(self.limits.max_processes)
            if self.has("landlock") and self.has("view"):
                ruleset = self._make_ruleset()
        return replace(self, ruleset=ruleset)

    def _make_ruleset(self) -> int:
        # Landlock asks for the directories above a mount, not for the one that lies under it.
        writable = os.path.dirname(self.scratch) if self.has("view") else self.scratch
        return landlock.make_ruleset(self.readable, [writable], may_execute=self.limits.max_processes > 0)

    def enter(self, directory: Path, parent_pid: int, keep_fds: Collection[int]) -> int:
        """Cut what ties this freshly forked process to its owner: group, descriptors, namespaces, files.

        Args:
            directory: becomes the working directory, and is made if it is not there.
            keep_fds: descriptors that stay open besides 0, 1 and 2, which become /dev/null.

        Returns:
            A descriptor for `seal`, which closes it.
        """
        os.setsid()
        self._own_namespaces()
        die_with(parent_pid, signal.SIGKILL)
        statm = self._open_statm()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        close_all_but([*keep_fds, statm, *([self.ruleset] if self.ruleset >= 0 else [])])
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        move_home(directory)
        return statm

    def confine(self) -> None:
        """Give up rights. The process must have one thread."""
        if self.has("privileges", "landlock", "seccomp"):
            syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        if self.has("privileges"):
            syscalls.drop_capabilities()
        if self.has("landlock"):
            ruleset = self._make_ruleset() if self.ruleset < 0 else self.ruleset
            landlock.enforce(ruleset)
            os.close(ruleset)

    def seal(self, statm: int) -> int | None:
        """Bound what this process, its threads and its children may use and ask of the system.

        Args:
            statm: from `enter`.

        Returns:
            The descriptor at which a supervisor answers for new processes, if there is one.
        """
        num_pages = int(os.read(statm, 100).split()[0])
        os.close(statm)
        if self.has("rlimits"):
            self._set_rlimits(num_pages * resource.getpagesize())
        return seccomp.install(max_processes=self.limits.max_processes) if self.has("seccomp") else None

    def probe(self) -> dict[str, str]:
        """Try what a session does, in a process that is made for it and given up.

        Returns:
            For each layer that failed, the reason.
        """
        missing: dict[str, str] = {}

        def attempt(names: set[str], step: Callable[[], object]) -> None:
            try:
                step()
            except OSError as error:
                missing.update(dict.fromkeys(names & self.layers, str(error)))

        attempt({"namespaces", "view"}, self._own_namespaces)
        statms = [self._open_statm() for _ in range(2)]
        for name in ("privileges", "landlock"):
            attempt({name}, self._only(name).confine)
        for name, statm in zip(("rlimits", "seccomp"), statms, strict=True):
            attempt({name}, partial(self._only(name).seal, statm))
        return missing

    def _only(self, name: str) -> Confinement:
        return replace(self, layers=self.layers & {name})

    def _own_namespaces(self) -> None:
        """A user namespace, in which threads are counted for this session alone; its own scratch directory."""
        if not self.has("namespaces", "view"):
            return
        flags = syscalls.CLONE_NEWIPC * self.has("namespaces") | syscalls.CLONE_NEWNS * self.has("view")
        new_user_namespace(self.proc, flags)
        if self.has("view"):
            view.mount_scratch(self.limits.scratch_mb)

    def _open_statm(self) -> int:
        return os.open("self/statm", os.O_RDONLY, dir_fd=self.proc)

    def _set_rlimits(self, address_space: int) -> None:
        limits = self.limits
        bounds = {
            resource.RLIMIT_AS: address_space + limits.memory_mb * 2**20,
            resource.RLIMIT_CPU: limits.cpu_s,  # SIGXCPU, which names the reason; a second later SIGKILL
            resource.RLIMIT_FSIZE: limits.max_file_mb * 2**20,
            resource.RLIMIT_NOFILE: limits.max_open_files,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_MEMLOCK: 0,
            resource.RLIMIT_MSGQUEUE: 0,
        }
        if self.has("namespaces", "view"):  # elsewhere it would count all processes of the user
            bounds[resource.RLIMIT_NPROC] = KERNEL_THREADS + limits.max_threads + limits.max_processes
        for kind, bound in bounds.items():
            _, hard = resource.getrlimit(kind)
            if hard != resource.RLIM_INFINITY:
                bound = min(bound, hard)
            resource.setrlimit(kind, (bound, bound + (kind == resource.RLIMIT_CPU)))


def new_user_namespace(proc: int, flags: int) -> None:
    """Enter a new user namespace, with every right in it, together with the namespaces in `flags`."""
    ids = {"uid_map": os.geteuid(), "gid_map": os.getegid()}
    syscalls.call("unshare", syscalls.CLONE_NEWUSER | flags)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)  # or else its own files in /proc are out of its reach
    for name, text in {
        "setgroups": "deny",  # without which an ordinary user may not map groups
        **{name: f"{INNER_ID} {outer} 1" for name, outer in ids.items()},
    }.items():
        fd = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
        os.write(fd, text.encode())
        os.close(fd)


def close_all_but(keep_fds: Collection[int]) -> None:
    """Close every descriptor above 2 that is not in `keep_fds`."""
    last = 2
    for fd in sorted(keep_fds):
        os.closerange(last + 1, fd)
        last = fd
    os.closerange(last + 1, os.sysconf("SC_OPEN_MAX"))
