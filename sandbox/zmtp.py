"""ZeroMQ's protocol between the pool and its kernels, without libzmq: ZMTP 3.0, https://rfc.zeromq.org/spec/23/.

libzmq would start two threads in every session. They take longer than a short cell, and a process that has
threads cannot be copied. What is here is what a kernel needs (`Channel`), and its client (`Peer`): one listens,
the other connects once, with the NULL mechanism.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
MORE, LONG, COMMAND = 1, 2, 4
LONG_HEAD = struct.Struct(">BQ")
SUBSCRIBE = b"\x01"
"""What a subscriber sends before the beginning of the messages that it wants."""
CHUNK_BYTES = 2**15
MAX_MESSAGES_AT_ONCE = CHUNK_BYTES // 128
"""In a chunk: Jupyter's take twice as many bytes, and to read so many would take all others' time."""
MAX_UNSENT_BYTES = 2**24
"""Kept for an end that does not read; what comes on top is dropped for it, as ZeroMQ does."""


def encode(frames: Sequence[bytes]) -> bytes:
    """The bytes of one message."""
    parts = []
    for number, frame in enumerate(frames, start=1):
        more, size = MORE * (number < len(frames)), len(frame)
        parts += (bytes((more, size)) if size < 256 else LONG_HEAD.pack(more | LONG, size), frame)
    return b"".join(parts)


def hello(kind: str) -> bytes:
    """All that has to be said before the first message: the greeting, and that this is a socket of type `kind`."""
    name, value = b"Socket-Type", kind.encode()
    ready = b"\x05READY" + bytes((len(name),)) + name + struct.pack(">I", len(value)) + value
    return GREETING + bytes((COMMAND, len(ready))) + ready


class Peer:
    """The other end of a connection.

    Args:
        kind: the type of socket that this end is.
        max_message_bytes: from an end that sends a larger message nothing more is read.
    """

    def __init__(self, connection: socket.socket, kind: str, max_message_bytes: int = 2**31) -> None:
        connection.setblocking(False)
        self.connection = connection
        self._max_message_bytes = max_message_bytes
        self.topics: set[bytes] = set()
        """Beginnings of the messages that it wants; of a subscriber."""
        self._received = bytearray()
        self._num_ahead = len(GREETING)
        """Bytes to skip first: the greeting, which can only be the same."""
        self._frames: list[bytes] = []
        """Of the message that is being received."""
        self._num_bytes = 0
        """Of these frames, with their heads."""
        self._unsent = bytearray()
        self._is_ready = False
        """Whether the other end has said its hello: libzmq hangs up on messages that come along with this one's."""
        with contextlib.suppress(OSError):  # it has gone: `receive` says so
            connection.send(hello(kind))

    def receive(self) -> list[list[bytes]]:
        """The messages that have come, each as its frames.

        Raises:
            OSError: the other end has gone, or sends what is no message.
        """
        with contextlib.suppress(BlockingIOError):
            chunk = self.connection.recv(CHUNK_BYTES)
            if not chunk:
                raise ConnectionResetError
            self._received += chunk
        messages = []
        while (frame := self._take_frame()) is not None:
            flags, body = frame
            if flags & COMMAND:
                self._is_ready = True
                self.flush()
            else:
                self._frames.append(body)
                self._num_bytes += 2 + len(body)
                if not flags & MORE:
                    if len(messages) == MAX_MESSAGES_AT_ONCE:
                        raise ConnectionAbortedError("a flood of messages")
                    messages.append(self._frames)
                    self._frames, self._num_bytes = [], 0
        return messages

    def _take_frame(self) -> tuple[int, bytes] | None:
        received, start = self._received, self._num_ahead
        if len(received) < start + 2:
            return None
        flags, size = received[start], received[start + 1]
        start += 2
        if flags & LONG:
            start += 7
            if len(received) < start:
                return None
            _, size = LONG_HEAD.unpack_from(received, self._num_ahead)
        if self._num_bytes + size > self._max_message_bytes:
            raise ConnectionAbortedError(f"a message of more than {self._max_message_bytes} bytes")
        if len(received) < start + size:
            return None
        body = bytes(received[start : start + size])
        del received[: start + size]
        self._num_ahead = 0
        return flags, body

    @property
    def has_unsent(self) -> bool:
        """Whether there is something that `flush` would send if the other end had room."""
        return self._is_ready and bool(self._unsent)

    def send(self, data: bytes) -> None:
        """Send a message, or as much of it as the other end has room for, and the rest with the next `flush`."""
        if len(self._unsent) <= MAX_UNSENT_BYTES:
            self._unsent += data
            self.flush()

    def flush(self) -> None:
        """Send as much as the other end has room for. If it has gone, `receive` says so."""
        if self.has_unsent:
            try:
                del self._unsent[: self.connection.send(self._unsent)]
            except BlockingIOError:
                pass
            except OSError:
                self._unsent.clear()


class Channel:
    """A listening socket with its clients."""

    kind: ClassVar[str]

    def __init__(self, listening: socket.socket) -> None:
        self.listening = listening
        self.peers: dict[bytes, Peer] = {}
        """By the identities that they are given here."""
        self._num_accepted = 0

    def accept(self) -> bytes:
        """Take the next client that waits.

        Returns:
            Its identity.
        """
        connection, _ = self.listening.accept()
        self._num_accepted += 1
        identity = self._num_accepted.to_bytes(5, "big")
        self.peers[identity] = Peer(connection, self.kind)
        return identity

    def receive(self, identity: bytes) -> list[list[bytes]]:
        """What a client has sent.

        Raises:
            OSError: it has gone.
        """
        raise NotImplementedError

    def send_multipart(self, frames: Sequence[bytes], copy: bool = True) -> None:
        """What jupyter_client's `Session.send` calls."""
        raise NotImplementedError


class Router(Channel):
    """Of each message, sent or received, the first frame names the client."""

    kind = "ROUTER"

    def receive(self, identity: bytes) -> list[list[bytes]]:
        return [[identity, *frames] for frames in self.peers[identity].receive()]

    def send_multipart(self, frames: Sequence[bytes], copy: bool = True) -> None:
        if peer := self.peers.get(frames[0]):
            peer.send(encode(frames[1:]))


class Publisher(Channel):
    """Sends each message to the clients that have subscribed to its beginning; receives their new subscriptions."""

    kind = "XPUB"

    def receive(self, identity: bytes) -> list[list[bytes]]:
        peer, subscriptions = self.peers[identity], []
        for [wish, *_] in peer.receive():
            if wish[:1] == SUBSCRIBE:
                peer.topics.add(wish[1:])
                subscriptions.append([wish[1:]])
            else:
                peer.topics.discard(wish[1:])
        return subscriptions

    def send_multipart(self, frames: Sequence[bytes], copy: bool = True) -> None:
        data = encode(frames)
        for peer in self.peers.values():
            if any(map(frames[0].startswith, peer.topics)):
                peer.send(data)


class Poller:
    """One wait for all clients, their messages, and what else is watched."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[], object]] = {}
        self._channels: list[Channel] = []

    def watch(self, watched: socket.socket, handler: Callable[[], object]) -> None:
        """Call `handler` whenever there is something to read."""
        self._handlers[watched.fileno()] = handler
        self._poll.register(watched, select.POLLIN)

    def forget(self, watched: socket.socket) -> None:
        del self._handlers[watched.fileno()]
        self._poll.unregister(watched)

    def serve(self, channel: Channel, handler: Callable[[list[bytes]], object]) -> None:
        """Take clients, and call `handler` with each message that one of them sends."""
        self._channels.append(channel)
        self.watch(channel.listening, partial(self._accept, channel, handler))

    def wait(self, timeout_ms: int | None = None) -> bool:
        """Handle what there is to handle.

        Args:
            timeout_ms: how long to wait for it; None is for ever.

        Returns:
            Whether there was something.
        """
        for channel in self._channels:
            for peer in channel.peers.values():
                self._poll.modify(peer.connection, select.POLLIN | select.POLLOUT * peer.has_unsent)
        ready = self._poll.poll(timeout_ms)
        for fd, _ in ready:
            self._handlers[fd]()
        return bool(ready)

    def _accept(self, channel: Channel, handler: Callable[[list[bytes]], object]) -> None:
        identity = channel.accept()
        self.watch(channel.peers[identity].connection, partial(self._hear, channel, identity, handler))

    def _hear(self, channel: Channel, identity: bytes, handler: Callable[[list[bytes]], object]) -> None:
        peer = channel.peers[identity]
        peer.flush()
        try:
            messages = channel.receive(identity)
        except OSError:
            self.forget(peer.connection)
            return channel.peers.pop(identity).connection.close()
        for message in messages:
            handler(message)
