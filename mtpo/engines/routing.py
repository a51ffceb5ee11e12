"""Which of several equal servers takes a request: the one that knows the session's prefix, if it is not overrun."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

SLACK = 8
"""Requests that a session's own server may have in flight beyond twice those of the least loaded one.

Without an escape a few long sessions pin the load to one server, whose cache then evicts what they came for.
"""


class Router:
    """Sticky routing, least loaded first.

    Args:
        num_servers: servers are the integers below it.
    """

    def __init__(self, num_servers: int) -> None:
        self.in_flight = [0] * num_servers
        self._homes: dict[str, int] = {}

    @contextlib.contextmanager
    def route(self, session: str, usable: Collection[int]) -> Iterator[int]:
        """The server for one request, which counts as in flight until the block ends.

        Args:
            session: requests of one session go to one server where possible; "" is no session.
            usable: the servers to choose from, at least one.
        """
        server = self._choose(session, usable)
        self.in_flight[server] += 1
        try:
            yield server
        finally:
            self.in_flight[server] -= 1

    def release(self, session: str) -> int | None:
        """Forget the session; the server that it went to, if any."""
        return self._homes.pop(session, None)

    def _choose(self, session: str, usable: Collection[int]) -> int:
        least = min(usable, key=lambda server: (self.in_flight[server], server))
        home = self._homes.get(session)
        if home is not None and home in usable and self.in_flight[home] <= 2 * self.in_flight[least] + SLACK:
            return home
        if session:
            self._homes[session] = least
        return least
