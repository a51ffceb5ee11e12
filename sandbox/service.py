"""Where the HTTP service listens, and how it starts and stops."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from mtpo.errors import InputError
from sandbox.leases import Leases

STOP_GRACE_S = 10
"""Whole seconds that cells have left when the service is told to stop."""


def listen(host: str, port: int, *, is_token_given: bool) -> socket.socket:
    """A listening socket; port 0 takes any free one.

    Raises:
        InputError: the address cannot be had; or other machines could reach it, and nobody chose a token.
    """
    if not (is_token_given or _is_loopback(host)):
        raise InputError(
            f"--host {host} can be reached from other machines: give a token of your own, with --token-file or "
            "MTPO_SANDBOX_TOKEN"
        )
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--host {host} --port {port}: {reason}") from None
    # Accepted sockets inherit this. asyncio itself sets it only where a socket names its protocol, and without it
    # the body of every answer waits 40 ms for the client to acknowledge the headers.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Service(uvicorn.Server):
    """Serves until SIGINT or SIGTERM, and then returns, so that the pool can still be closed."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="on",
                timeout_graceful_shutdown=2 * STOP_GRACE_S,
                timeout_keep_alive=65,  # longer than clients keep idle connections, so that theirs are alive
            )
        )
        self._leases: Leases = app.state.leases

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let requests end; those that take too long hear that their session has ended."""
        ending = asyncio.create_task(self._end_sessions())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_sessions(self) -> None:
        await asyncio.sleep(STOP_GRACE_S)
        await self._leases.close_all()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop, signals = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)
