"""Makes kernels of the fork server ordinary kernels for jupyter_client's manager."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from pathlib import Path
from typing import Any

from jupyter_client.connect import KernelConnectionInfo, port_names
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import KernelManager
from jupyter_client.provisioning.provisioner_base import KernelProvisionerBase

from sandbox.files import remove_tree
from sandbox.server import STOP_TIMEOUT_S, ForkServer, KernelProcess


class ForkProvisioner(KernelProvisionerBase):
    """Starts one kernel through a fork server, and signals and ends it."""

    _launched: KernelProcess | None = None
    _server: ForkServer
    _address: Path
    process: KernelProcess | None = None

    def attach(self, server: ForkServer, address: Path, original: KernelProcess | None = None) -> None:
        """Say where the kernel comes from, before it starts.

        Args:
            server: the fork server.
            address: its sockets have this path, a hyphen and a number. They are removed with the kernel.
            original: the kernel to copy; None for a fresh one.
        """
        self._server = server
        self._address = address
        self._original = original

    @property
    def _manager(self) -> KernelManager:
        assert isinstance(self.parent, KernelManager)
        return self.parent

    @property
    def has_process(self) -> bool:
        return self.process is not None

    async def poll(self) -> int | None:
        if self.process is None:
            return 0
        return _exit_code(self.process) if self.process.exited.done() else None

    async def wait(self) -> int | None:
        if self.process is None:
            return 0
        await asyncio.shield(self.process.exited)
        code, self.process = _exit_code(self.process), None
        return code

    async def send_signal(self, signum: int) -> None:
        if self.process is not None:
            self._server.signal(self.process, signum)

    async def kill(self, restart: bool = False) -> None:
        if self.process is None:
            return
        self._server.signal(self.process, signal.SIGKILL)
        try:
            await asyncio.wait_for(asyncio.shield(self.process.exited), STOP_TIMEOUT_S)
        except TimeoutError:  # the fork server does not answer, and takes its kernels along
            self._server.kill()

    async def terminate(self, restart: bool = False) -> None:
        await self.send_signal(signal.SIGTERM)

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        self._manager.transport, self._manager.ip = "ipc", str(self._address)
        for number, name in enumerate(port_names, start=1):
            setattr(self._manager, name, number)
        return {"cmd": []}  # neither a command nor an environment: the fork server has its own

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Have the kernel started. Clients may connect at once; `process.listening` says when it answers.

        Raises:
            SandboxError: the fork server would not start.
        """
        connection = self._manager.get_connection_info()
        as_json = {**connection, "key": self._manager.session.key.decode()}
        self._launched = self.process = await self._server.launch(as_json, self._original)
        return connection

    async def cleanup(self, restart: bool = False) -> None:
        if restart:
            return
        for number in range(1, len(port_names) + 1):
            Path(f"{self._address}-{number}").unlink(missing_ok=True)
        scratch = Path(self._launched.scratch if self._launched else "")
        if scratch.is_relative_to(self._address.parent):
            await asyncio.to_thread(remove_tree, scratch)
            with contextlib.suppress(OSError):  # a fork of the session still lives there
                scratch.parent.rmdir()


class SandboxKernelSpecs(KernelSpecManager):
    """The one kernel that a pool knows, without anything being installed for it."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(argv=[sys.executable], display_name=kernel_name, language="python")


def _exit_code(process: KernelProcess) -> int:
    code = process.exited.result()
    return -signal.SIGKILL if code is None else code
