"""What stands around the sandbox for hostile code to read, change, reach or kill.

Canaries live on the host, so that whether an attack worked is seen from outside. Every user of the machine
may read and write them: only the sandbox, not a file mode, stands between them and the code.
"""

from __future__ import annotations

import asyncio
import os
import resource
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

from sandbox.processes import stat_fields

SHARED_MEMORY = Path("/dev/shm")
VICTIM = """
import ctypes, os, signal, sys
secret = ctypes.create_string_buffer(os.environ["MTPO_CANARY"].encode())
os.dup2(os.open(sys.argv[1], os.O_RDONLY), 99)
print(ctypes.addressof(secret), flush=True)
signal.pause()
"""
VICTIM_FD = 99


class Canaries:
    """Secrets, files, listeners and a process that must be none the worse for any attack.

    Use it as an async context manager.

    Args:
        directory: where the files are made; short enough for the address of a socket.
    """

    def __init__(self, directory: Path) -> None:
        self.token = "mtpo" + secrets.token_hex(6)
        self.secrets = {
            name: f"canary-{name}-{secrets.token_hex(8)}" for name in ("file", "environment", "process")
        }
        self._outside = directory / "outside"
        self._link_in_shm = SHARED_MEMORY / f"{self.token}-canary"
        self._unix_path = directory / "listener"
        self._must_not_appear = {
            "new_file": self._outside / "new",
            "tmp_file": Path(tempfile.gettempdir()) / f"{self.token}-new",
            "shm_new": SHARED_MEMORY / f"{self.token}-new",
        }
        self._reached: list[str] = []
        self._listeners = AsyncExitStack()
        self._ports: dict[str, int] = {}

    async def __aenter__(self) -> Canaries:
        self._make_files()
        self._start_victim()
        await self._listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._listeners.aclose()
        self._stop_victim()
        self._remove_files()

    def names(self) -> dict[str, str]:
        """What `$name` in the code of an attack stands for."""
        paths = {
            "outside_dir": self._outside,
            "secret_file": self._outside / "secret.txt",
            "shm_file": self._link_in_shm,
            "unix_path": self._unix_path,
            **self._must_not_appear,
        }
        victim = {
            "victim_pid": self._victim.pid,
            "victim_address": self._victim_address,
            "victim_length": len(self.secrets["process"]),
            "victim_fd": VICTIM_FD,
        }
        texts = {
            "token": self.token,
            "key": int(self.token[4:], 16) % 2**31,
            "abstract_name": self.token,
            "hostname": socket.gethostname(),
        }
        return {name: str(value) for name, value in (paths | victim | self._ports | texts).items()}

    def harm(self) -> list[str]:
        """What has happened to the canaries since the last call; then makes them whole again."""
        found = [f"connection: the {name} listener was reached" for name in dict.fromkeys(self._reached)]
        self._reached.clear()
        if (state := self._files()) != self._file_state:
            paths = [
                path
                for path in {**state, **self._file_state}
                if state.get(path) != self._file_state.get(path)
            ]
            found.append(f"file: changed outside of the sandbox: {', '.join(sorted(paths))}")
            self._remove_files()
            self._make_files()
        if (state := self._victim_condition()) != self._victim_state:
            found.append(f"victim: a process of the host is {state}, and was {self._victim_state}")
            self._stop_victim()
            self._start_victim()
        return found

    def _make_files(self) -> None:
        self._outside.mkdir()
        (self._outside / "tree").mkdir()
        secret = self.secrets["file"]
        files = {
            self._outside / "secret.txt": secret,
            self._outside / "tree" / "keep.txt": "keep",
            self._outside / "canary_module.py": f"SECRET = {secret!r}",
        }
        if SHARED_MEMORY.is_dir():
            files[self._link_in_shm] = secret
        for path, text in files.items():
            path.write_text(text)
            path.chmod(0o666)
        for directory in (self._outside, self._outside / "tree"):
            directory.chmod(0o777)
        self._file_state = self._files()

    def _remove_files(self) -> None:
        shutil.rmtree(self._outside, ignore_errors=True)
        for path in (self._link_in_shm, *self._must_not_appear.values()):
            path.unlink(missing_ok=True)

    def _files(self) -> dict[str, tuple[object, ...]]:
        """Each canary file: its inode, owner, mode, links, times and content."""
        paths = [self._outside, *self._outside.rglob("*"), self._link_in_shm, *self._must_not_appear.values()]
        state: dict[str, tuple[object, ...]] = {}
        for path in paths:
            if os.path.lexists(path):
                stat = path.lstat()
                # The change time moves with mode, owner, links, attributes and content, and nobody can set it.
                state[str(path)] = (stat.st_ino, stat.st_mode, stat.st_ctime_ns, stat.st_mtime_ns)
        return state

    def _start_victim(self) -> None:
        self._victim = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", VICTIM, str(self._outside / "secret.txt")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"MTPO_CANARY": self.secrets["process"]},
        )
        assert self._victim.stdout is not None
        self._victim_address = int(self._victim.stdout.readline())
        self._victim_state = self._victim_condition()

    def _stop_victim(self) -> None:
        self._victim.kill()
        self._victim.communicate()

    def _victim_condition(self) -> str:
        pid = self._victim.pid
        if (code := self._victim.poll()) is not None:
            return f"dead (exit code {code})"
        state = stat_fields(pid)[0]
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        how = "stopped" if state in "Tt" else "alive"
        return f"{how} with nice value {os.getpriority(os.PRIO_PROCESS, pid)} and file limits {limits}"

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        self._ports["tcp_port"] = await self._serve("TCP", socket.AF_INET, ("127.0.0.1", 0))
        await self._serve("unix", socket.AF_UNIX, str(self._unix_path))
        await self._serve("abstract", socket.AF_UNIX, "\0" + self.token)
        self._unix_path.chmod(0o777)
        transport, _ = await loop.create_datagram_endpoint(
            lambda: _Datagrams(self._reached), local_addr=("127.0.0.1", 0)
        )
        self._listeners.callback(transport.close)
        self._ports["udp_port"] = transport.get_extra_info("sockname")[1]
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._ports["free_port"] = free.getsockname()[1]

    async def _serve(self, name: str, family: int, address: object) -> int:
        """Listen and note who connects.

        Returns:
            The TCP port; 0 for other families.
        """

        def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._reached.append(name)
            writer.close()

        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind(address)  # pyright: ignore[reportArgumentType]
        server = await asyncio.start_server(note, sock=listener)
        self._listeners.callback(server.close)
        return listener.getsockname()[1] if family == socket.AF_INET else 0


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, reached: list[str]) -> None:
        self._reached = reached

    def datagram_received(self, data: bytes, addr: object) -> None:
        self._reached.append("UDP")
