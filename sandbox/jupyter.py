"""Sandboxed kernels for any Jupyter application, not only for `InterpreterPool`.

    jupyter kernelspec install --sys-prefix --name mtpo-sandbox sandbox/kernelspec

makes the kernel "Python (mtpo sandbox)", whose provisioner this is. `config` in its kernel.json sets the
policy and the `Limits`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from jupyter_client.connect import KernelConnectionInfo
from traitlets import Dict, Unicode

from sandbox.files import pool_directory, remove_tree
from sandbox.layers import wanted_layers
from sandbox.limits import Limits
from sandbox.pool import PRELOAD
from sandbox.provisioner import ForkProvisioner
from sandbox.server import ForkServer


@dataclass(slots=True)
class SharedServer:
    """A fork server that lives as long as any of its kernels."""

    server: ForkServer
    directory: Path
    num_kernels: int = 0
    numbers: Iterator[int] = field(default_factory=itertools.count)


class SandboxProvisioner(ForkProvisioner):
    """The entry point `mtpo-sandbox`: kernels of one event loop and one configuration share a fork server."""

    isolation = Unicode("available", help="full, available or none", config=True)
    limits = Dict(help="fields of sandbox.Limits", config=True)

    _shared: ClassVar[dict[tuple[object, str, str], SharedServer]] = {}
    _holds_server = False

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        if not self._holds_server:  # else it is a restart
            shared = self._take_server()
            self.attach(shared.server, shared.directory / str(next(shared.numbers)))
        arguments = await super().pre_launch(**kwargs)
        self._manager.write_connection_file()  # for others to connect
        return arguments

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        connection = await super().launch_kernel(cmd, **kwargs)
        assert self.process is not None
        await self.process.listening
        return connection

    async def cleanup(self, restart: bool = False) -> None:
        await super().cleanup(restart)
        if self._holds_server and not restart:
            await self._give_server_back()

    def _key(self) -> tuple[object, str, str]:
        return asyncio.get_running_loop(), str(self.isolation), json.dumps(self.limits, sort_keys=True)

    def _take_server(self) -> SharedServer:
        """Join the other kernels of this kind, or be the first.

        Raises:
            InputError: the configuration names no policy, or limits that do not exist.
        """
        key = self._key()
        if key not in self._shared:
            limits = Limits.from_values(self.limits)
            wanted_layers(str(self.isolation))
            directory = pool_directory()
            server = ForkServer(directory, limits, "zygote", PRELOAD, str(self.isolation))
            self._shared[key] = SharedServer(server, directory)
        self._shared[key].num_kernels += 1
        self._holds_server = True
        return self._shared[key]

    async def _give_server_back(self) -> None:
        shared = self._shared[self._key()]
        shared.num_kernels -= 1
        self._holds_server = False
        if not shared.num_kernels:
            del self._shared[self._key()]
            await shared.server.aclose()
            await asyncio.to_thread(remove_tree, shared.directory)
