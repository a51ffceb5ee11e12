"""What stands between the model's code and the machine. Runs in the kernel process.

`enter` comes first, while the process still holds what it inherited; `seal` comes last, after everything
that the kernel itself needs and before any code of the model. Whatever hardens a session belongs here.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from pathlib import Path

from sandbox.limits import Limits

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
PAGE_BYTES = resource.getpagesize()
_libc = ctypes.CDLL(None, use_errno=True)

ENVIRONMENT = {
    "HOME": ".",
    "IPYTHONDIR": ".ipython",
    "MPLBACKEND": "Agg",
    "NO_COLOR": "1",
    "OMP_NUM_THREADS": "1",  # a thread in the zygote would make forking unsafe
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",  # sets keep their order from session to session and from run to run
    "PYTHONDONTWRITEBYTECODE": "1",
    "TMPDIR": ".",
}
INHERITED = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH")
"""The only variables of the owner that a session may see: all others could hold a token."""


def scrubbed_environment(directory: Path) -> dict[str, str]:
    """The environment of a session that lives in `directory`."""
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
    own = {name: str(directory / value) if value[0] == "." else value for name, value in ENVIRONMENT.items()}
    return inherited | own


def die_with(parent_pid: int, signum: signal.Signals) -> None:
    """Have the kernel send `signum` to this process when its parent is gone; exit if it already is."""
    _libc.prctl(PR_SET_PDEATHSIG, int(signum), 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def enter(directory: Path, parent_pid: int, keep_fd: int) -> None:
    """Cut what ties this freshly forked process to its owner: session, group, descriptors, environment.

    Args:
        directory: becomes the working directory.
        keep_fd: the one descriptor that stays open besides 0, 1 and 2, which become /dev/null.
    """
    os.setsid()
    die_with(parent_pid, signal.SIGKILL)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.closerange(3, keep_fd)
    os.closerange(keep_fd + 1, os.sysconf("SC_OPEN_MAX"))
    os.chdir(directory)
    environment = scrubbed_environment(directory)
    os.environ.clear()
    os.environ.update(environment)


def seal(limits: Limits) -> None:
    """Bound what this process, its threads and its children may use from here on."""
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE_BYTES
    for kind, bound in (
        (resource.RLIMIT_AS, address_space + limits.memory_mb * 2**20),
        (resource.RLIMIT_CPU, limits.cpu_s),  # SIGXCPU, which names the reason; a second later SIGKILL
        (resource.RLIMIT_FSIZE, limits.max_file_mb * 2**20),
        (resource.RLIMIT_NOFILE, limits.max_open_files),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:
            bound = min(bound, hard)
        resource.setrlimit(kind, (bound, bound + (kind == resource.RLIMIT_CPU)))
