"""The kernel's own sockets against libzmq's."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from sandbox.zmtp import (
    CHUNK_BYTES,
    MAX_UNSENT_BYTES,
    Channel,
    Peer,
    Poller,
    Publisher,
    Router,
    encode,
    hello,
)

SIZES = (0, 1, 255, 256, 257, 2**16 - 1, 2**16, 3 * CHUNK_BYTES + 1)


class Echo:
    """Sends every message back, from a thread of its own until it gets an empty one."""

    def __init__(self, path: Path) -> None:
        self.received: list[list[bytes]] = []
        self.router = Router(listen(path))
        self._poller = Poller()
        self._poller.serve(self.router, self._answer)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _answer(self, message: list[bytes]) -> None:
        self.received.append(message)
        self.router.send_multipart(message)

    def _run(self) -> None:
        while not self.received or self.received[-1][1:] != [b""]:
            self._poller.wait(10_000)

    def join(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()


def listen(path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()
    return listening


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    with zmq.Context() as context:
        context.setsockopt(zmq.LINGER, 0)
        context.setsockopt(zmq.RCVTIMEO, 10_000)
        yield context


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


def wait_for(poller: Poller, channel: Channel, num_peers: int) -> None:
    while len(channel.peers) != num_peers:
        assert poller.wait(10_000)


def test_messages_of_all_sizes_come_back_to_the_client_that_sent_them(
    path: Path, context: zmq.Context
) -> None:
    echo = Echo(path)
    clients = [context.socket(zmq.DEALER) for _ in range(3)]
    messages = [[os.urandom(size) for size in SIZES[: number + 1]] for number in range(len(SIZES))]
    for client in clients:
        client.connect(f"ipc://{path}")
    for message in messages:
        for number, client in enumerate(clients):
            client.send_multipart([bytes([number]), *message])
    for number, client in enumerate(clients):
        assert [client.recv_multipart() for _ in messages] == [[bytes([number]), *m] for m in messages]
    assert len({identity for identity, *_ in echo.received}) == 3
    clients[0].send(b"")
    echo.join()


def test_a_message_may_come_byte_by_byte(path: Path) -> None:
    echo = Echo(path)
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))
    for byte in hello("DEALER") + encode([b"a" * 300, b"", b"b"]) + encode([b""]):
        client.send(bytes([byte]))
    echo.join()
    assert [frames for _, *frames in echo.received] == [[b"a" * 300, b"", b"b"], [b""]]


def test_subscribers_get_what_begins_as_they_want(path: Path, context: zmq.Context) -> None:
    subscriptions: list[list[bytes]] = []
    publisher, poller = Publisher(listen(path)), Poller()
    poller.serve(publisher, subscriptions.append)
    everything, some = (context.socket(zmq.SUB) for _ in range(2))
    everything.subscribe(b"")
    some.subscribe(b"ab")
    some.subscribe(b"x")
    for client in (everything, some):
        client.connect(f"ipc://{path}")
    while len(subscriptions) < 3:
        assert poller.wait(10_000)
    assert sorted(subscriptions) == [[b""], [b"ab"], [b"x"]]
    some.unsubscribe(b"x")
    while any(b"x" in peer.topics for peer in publisher.peers.values()):
        assert poller.wait(10_000)
    sent = [[b"abc", b"1"], [b"x", b"2"], [b"a", b"3"], [b"ab", b"4"]]
    for message in sent:
        publisher.send_multipart(message)
    assert [everything.recv_multipart() for _ in sent] == sent
    assert [some.recv_multipart() for _ in range(2)] == [sent[0], sent[3]]


def test_a_client_that_does_not_read_holds_nobody_up_and_loses_only_what_is_too_much(
    path: Path, context: zmq.Context
) -> None:
    publisher, poller = Publisher(listen(path)), Poller()
    subscribed: list[list[bytes]] = []
    poller.serve(publisher, subscribed.append)
    lazy = socket.socket(socket.AF_UNIX)
    lazy.connect(str(path))
    lazy.send(hello("SUB") + encode([b"\x01"]))
    while not subscribed:
        assert poller.wait(10_000)
    messages = [
        [b"t", number.to_bytes(4, "big") + bytes(2**20)] for number in range(MAX_UNSENT_BYTES // 2**20 + 8)
    ]
    for message in messages:
        publisher.send_multipart(message)
    expected = hello("XPUB") + b"".join(map(encode, messages))
    lazy.settimeout(0.2)
    read = bytearray()
    while True:
        poller.wait(0)
        try:
            read += lazy.recv(2**20)
        except TimeoutError:
            break
    assert expected.startswith(bytes(read))
    num_whole, rest = divmod(len(read) - len(hello("XPUB")), len(encode(messages[0])))
    assert rest == 0
    assert MAX_UNSENT_BYTES // 2**20 < num_whole < len(messages)


def test_a_client_that_has_gone_is_forgotten(path: Path, context: zmq.Context) -> None:
    publisher, poller = Publisher(listen(path)), Poller()
    poller.serve(publisher, lambda _: None)
    clients = [context.socket(zmq.SUB) for _ in range(2)]
    for client in clients:
        client.subscribe(b"")
        client.connect(f"ipc://{path}")
    wait_for(poller, publisher, 2)
    while not all(peer.topics for peer in publisher.peers.values()):
        assert poller.wait(10_000)
    clients[0].close()
    wait_for(poller, publisher, 1)
    publisher.send_multipart([b"still here"])
    assert clients[1].recv() == b"still here"
    assert not poller.wait(50)


def test_an_unknown_client_is_sent_nothing(path: Path) -> None:
    Router(listen(path)).send_multipart([b"nobody", b"?"])


def test_nothing_is_kept_for_an_end_that_has_gone() -> None:
    ours, theirs = socket.socketpair()
    peer = Peer(ours, "DEALER")
    theirs.send(hello("ROUTER"))
    peer.receive()
    peer.send(bytes(2**22))
    assert peer.has_unsent
    theirs.close()
    peer.flush()
    assert not peer.has_unsent
