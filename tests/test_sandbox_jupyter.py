"""The sandbox behind jupyter_client's own manager and client, as any Jupyter application starts it."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.jsonutil import json_default
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning.factory import KernelProvisionerFactory
from jupyter_client.session import Session

from mtpo.errors import InputError
from sandbox.client import NOT_A_MESSAGE
from sandbox.jupyter import SandboxProvisioner
from sandbox.messages import LeanSession
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


async def test_the_kernel_answers_what_editors_ask(manager: AsyncKernelManager) -> None:
    await manager.start_kernel()
    client: Any = await connected(manager)
    await run(client, "def double(x):\n    'Twice as much.'\n    return 2 * x")

    async def ask(request: str, **content: Any) -> dict[str, Any]:
        message_id = getattr(client, request)(**content)
        while (reply := await client.get_shell_msg(timeout=10))["parent_header"]["msg_id"] != message_id:
            pass
        return reply["content"]

    assert "double" in (await ask("complete", code="dou", cursor_pos=3))["matches"]
    assert "Twice as much." in (await ask("inspect", code="double"))["data"]["text/plain"]
    assert (await ask("is_complete", code="for x in y:"))["status"] == "incomplete"
    assert (await ask("kernel_info"))["language_info"]["name"] == "python"
    reply = await ask("execute", code="y = double(21)", user_expressions={"y": "y", "z": "1 / 0"})
    assert (reply["status"], reply["execution_count"]) == ("ok", 2)
    assert reply["user_expressions"]["y"]["data"] == {"text/plain": "42"}
    assert reply["user_expressions"]["z"]["status"] == "error"
    reply = await ask("execute", code="1 / 0")
    assert (reply["status"], reply["ename"], reply["evalue"]) == (
        "error",
        "ZeroDivisionError",
        "division by zero",
    )
    client.stop_channels()


async def test_cells_behind_one_that_fails_are_not_run(manager: AsyncKernelManager) -> None:
    await manager.start_kernel()
    client: Any = await connected(manager)
    cells = ("import time\nn = 0\ntime.sleep(0.5)\n1 / 0", "n += 1", "n += 10")
    message_ids = [client.execute(cell) for cell in cells]
    replies = {}
    while len(replies) < len(cells):
        reply = await client.get_shell_msg(timeout=10)
        replies[reply["parent_header"]["msg_id"]] = reply["content"]["status"]
    assert [replies[each] for each in message_ids] == ["error", "aborted", "aborted"]
    assert await run(client, "n") == "0"
    client.stop_channels()


async def test_two_clients_see_the_same_kernel(manager: AsyncKernelManager) -> None:
    await manager.start_kernel()
    clients = [await connected(manager) for _ in range(2)]
    clients[1].session.session = "another"  # or else both number their requests alike
    assert await run(clients[0], "x = 5\nx") == "5"
    clients[0].stop_channels()
    assert await run(clients[1], "x + 1") == "6"
    clients[1].stop_channels()


async def test_a_kernel_that_is_asked_to_end_does(manager: AsyncKernelManager) -> None:
    await manager.start_kernel()
    assert isinstance(manager.provisioner, SandboxProvisioner) and manager.provisioner.process is not None
    exited = manager.provisioner.process.exited
    await manager.shutdown_kernel()
    assert exited.result() == 0  # it was not killed


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


def as_read(message: dict[str, Any]) -> dict[str, Any]:
    """With dates as text."""
    buffers = message.pop("buffers")
    return json.loads(json.dumps(message, default=json_default)) | {"buffers": buffers}


def test_what_the_kernel_sends_is_what_jupyter_would_send() -> None:
    sent: list[list[bytes]] = []

    class Stream:
        def send_multipart(self, frames: list[bytes], copy: bool = True) -> None:
            sent.append(frames)

    ours, theirs = LeanSession(key=b"k", session="s"), Session(key=b"k", session="s")
    request = theirs.msg("execute_request", {"code": "1"})
    stream: Any = Stream()
    calls: list[tuple[Any, ...]] = [
        ("status", {"execution_state": "busy"}, request, b"topic"),
        ("stream", {"text": "\u00e9\U0001f600", "name": "stdout"}, request),
        ("status", {"execution_state": "idle"}, {}, [b"one", b"two"]),
        ("execute_reply", None, None, None),
        ("comm_msg", {"data": {}}, request, b"", [b"buffer"]),
        ("comm_msg", {"data": {}}, request, b"", None, False, None, {"more": 1}),
    ]
    for arguments in calls:
        for session in (ours, theirs):
            session.send(stream, *arguments)
    for own, other in zip(sent[::2], sent[1::2], strict=True):
        identities, frames = theirs.feed_identities(own)
        assert ours.read(own) == (identities, as_read(theirs.deserialize(frames)))
        (own_identities, own), (other_identities, other) = map(ours.read, (own, other))
        for message in (own, other):
            assert message["header"].pop("msg_id") == message.pop("msg_id")
            message["header"].pop("date")
        assert (own_identities, own) == (other_identities, other)


@pytest.mark.parametrize("spoil", ["signature", "content", "cut", "no json", "no delimiter", "deep"])
def test_what_is_no_message_is_refused(spoil: str) -> None:
    session = LeanSession(key=b"k")
    frames = session.serialize(session.msg("status", {"execution_state": "busy"}), b"topic")
    match spoil:
        case "signature":
            frames[2] = frames[2][::-1]
        case "content":
            frames[-1] = b"{}"
        case "cut":
            del frames[4:]
        case "no delimiter":
            del frames[1]
        case "no json" | "deep":
            frames[-1] = b"{" if spoil == "no json" else b"[" * 100_000
            frames[2] = session.sign(frames[3:])
    with pytest.raises(NOT_A_MESSAGE):
        session.read(frames)


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
