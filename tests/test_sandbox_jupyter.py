"""The sandbox behind jupyter_client's own manager and client, as any Jupyter application starts it."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning.factory import KernelProvisionerFactory

from mtpo.errors import InputError
from sandbox.jupyter import SandboxProvisioner
from sandbox.processes import descendants
from tests.processes import wait_until_gone

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def specs(tmp_path: Path) -> KernelSpecManager:
    (tmp_path / "mtpo-sandbox").symlink_to(ROOT / "sandbox/kernelspec")
    return KernelSpecManager(kernel_dirs=[str(tmp_path)])


@pytest_asyncio.fixture
async def manager(specs: KernelSpecManager) -> AsyncIterator[AsyncKernelManager]:
    manager = AsyncKernelManager(kernel_name="mtpo-sandbox", kernel_spec_manager=specs)
    yield manager
    if manager.has_kernel:
        await manager.shutdown_kernel(now=True)


async def connected(manager: AsyncKernelManager) -> AsyncKernelClient:
    client: Any = manager.client()
    client.start_channels(hb=False)
    await client.wait_for_ready(timeout=30)
    return client


async def run(client: AsyncKernelClient, code: str) -> str:
    texts: list[str] = []

    def take(message: dict[str, Any]) -> None:
        if message["msg_type"] == "stream":
            texts.append(message["content"]["text"])

    await client._async_execute_interactive(code, output_hook=take, timeout=30)
    return "".join(texts).strip()


def test_the_entry_point_is_registered() -> None:
    factory = KernelProvisionerFactory()
    assert factory.get_provisioner_entries()["mtpo-sandbox"] == "sandbox.jupyter:SandboxProvisioner"


async def test_a_stock_manager_gets_a_sandboxed_kernel(manager: AsyncKernelManager) -> None:
    await manager.start_kernel()
    assert isinstance(manager.provisioner, SandboxProvisioner)
    client = await connected(manager)
    assert await run(client, "x = 6\nx * 7") == "42"
    assert "Error" in await run(client, f"open({__file__!r})")
    await manager.interrupt_kernel()
    await manager.restart_kernel(now=True)
    client.stop_channels()
    client = await connected(manager)
    assert await run(client, "'x' in globals()") == "False"
    client.stop_channels()


async def test_kernels_share_a_fork_server_that_goes_with_the_last(specs: KernelSpecManager) -> None:
    managers = [AsyncKernelManager(kernel_name="mtpo-sandbox", kernel_spec_manager=specs) for _ in range(2)]
    for each in managers:
        await each.start_kernel()
    [shared] = SandboxProvisioner._shared.values()
    assert shared.server._process is not None
    pids = [shared.server._process.pid, *descendants(shared.server._process.pid)]
    assert len(pids) == 4  # guardian, fork server, two kernels
    await managers[0].shutdown_kernel(now=True)
    await wait_until_gone(pids[2:3])
    client = await connected(managers[1])
    assert await run(client, "1 + 1") == "2"
    client.stop_channels()
    await managers[1].shutdown_kernel(now=True)
    await wait_until_gone(pids)
    assert not shared.directory.exists()


async def test_a_wrong_configuration_is_named(specs: KernelSpecManager) -> None:
    spec = specs.get_kernel_spec("mtpo-sandbox")
    for config, message in (
        ({"limits": {"memory": 5}}, r"there are no limits \['memory'\]; choose from"),
        ({"isolation": "some"}, "isolation must be 'full', 'available', 'none'"),
    ):
        spec.metadata["kernel_provisioner"]["config"] = config
        manager = AsyncKernelManager(kernel_name="mtpo-sandbox")
        manager._kernel_spec = spec
        with pytest.raises(InputError, match=message):
            await manager.start_kernel()
