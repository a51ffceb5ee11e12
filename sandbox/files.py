"""Where a pool keeps its files, and how it gets rid of them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from mtpo.errors import SandboxError

MAX_SOCKET_PATH_BYTES = 107  # sun_path of <sys/un.h>, less its final zero
LONGEST_SOCKET_NAME = "/mtpo-12345678/1000000-5"


def pool_directory() -> Path:
    """A new directory, with a path that is short enough for the addresses of sockets.

    Raises:
        SandboxError: there is no place for it.
    """
    room = MAX_SOCKET_PATH_BYTES - len(LONGEST_SOCKET_NAME)
    candidates = dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"))
    for base in candidates:
        if len(os.fsencode(base)) <= room and os.access(base, os.W_OK | os.X_OK):
            return Path(tempfile.mkdtemp(prefix="mtpo-", dir=base))
    raise SandboxError(f"no writable directory of at most {room} bytes for sockets among {list(candidates)}")


def remove_tree(directory: Path) -> None:
    """Remove a directory, whatever the model has put into it. Links are removed, not followed."""
    with contextlib.suppress(RecursionError):
        shutil.rmtree(directory, ignore_errors=True)
    if directory.exists():  # closed directories, or ten thousand in each other
        for command in (["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
            subprocess.run([*command, directory], stderr=subprocess.DEVNULL, check=False)
