"""Makes kernels of the fork server ordinary kernels for jupyter_client's manager."""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning.provisioner_base import KernelProvisionerBase

from sandbox.server import STOP_TIMEOUT_S, ForkServer, KernelProcess


class ForkProvisioner(KernelProvisionerBase):
    """Starts one kernel through a fork server, and signals and ends it.

    Args:
        server: the fork server.
        directory: of this kernel alone: its sockets, its connection file, its working directory. Removed
            with the kernel.
        manager: the manager that it works for.
    """

    def __init__(self, server: ForkServer, directory: Path, manager: AsyncKernelManager) -> None:
        super().__init__(parent=manager)
        self._manager = manager
        self._server = server
        self._directory = directory
        self.process: KernelProcess | None = None

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
        self._manager.write_connection_file()
        return {"cmd": []}  # neither a command nor an environment: the fork server has its own

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Start the kernel.

        Raises:
            SandboxError: it did not start.
        """
        self.process = await self._server.launch(self._directory)
        await self.process.listening
        return self._manager.get_connection_info()

    async def cleanup(self, restart: bool = False) -> None:
        if not restart:
            await remove_tree(self._directory)


class SandboxKernelSpecs(KernelSpecManager):
    """The one kernel that a pool knows, without anything being installed for it."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(argv=[sys.executable], display_name=kernel_name, language="python")


def _exit_code(process: KernelProcess) -> int:
    code = process.exited.result()
    return -signal.SIGKILL if code is None else code


async def remove_tree(directory: Path) -> None:
    """Remove a directory, however much the model has put into it, without holding up the event loop."""
    await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
