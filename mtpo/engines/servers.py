"""Replicas of one HTTP server, of which any may answer: fail-over, retries with growing pauses, and their return."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import httpx2

from mtpo.engines.routing import Router
from mtpo.errors import EngineError, InputError

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")
State = TypeVar("State")

CONNECT_TIMEOUT_S = 10.0
KEEP_ALIVE_S = 2.0
"""vLLM closes an idle connection after 5 s; a request that is sent at that moment is lost."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
BUSY = (408, 425, 429)
"""Status codes that, like 5xx, speak of the server and not of the request."""


class ServerFault(Exception):
    """One attempt failed for a reason that is not the request's."""


class Servers(Generic[State]):
    """Equal servers, each named by its URL. To be used within one event loop.

    Requests of one session go to one replica, unless that has far more to do than another. A replica that cannot be
    reached gets no requests until it answers again, and what it was asked is asked elsewhere.

    Args:
        urls: where they listen, as in "http://10.0.0.7:8000"; a "/v1" at the end is left out.
        probe: what `GET /v1/models` says of a replica; raises EngineError if it is not ready, InputError if it is not
            one of the servers that are meant.
        api_key: sent as bearer token.
        timeout_s: seconds that one attempt at one request may take.
        patience_s: seconds to go on trying while no attempt succeeds.

    Raises:
        InputError: there is no URL, or one is none.
    """

    def __init__(
        self,
        urls: Sequence[str],
        probe: Callable[[httpx2.Response], State],
        *,
        api_key: str | None,
        timeout_s: float,
        patience_s: float,
    ) -> None:
        if not urls:
            raise InputError("an engine needs the URL of at least one server")
        self.urls = [checked_url(url).rstrip("/").removesuffix("/v1") for url in urls]
        self.usable = set(range(len(urls)))
        self.patience_s = patience_s
        self._probe = probe
        self._options: dict[str, Any] = {
            "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
            "timeout": httpx2.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S, pool=None),
            "trust_env": False,  # a proxy to the internet is no way to a machine of one's own
        }
        self._router = Router(len(urls))
        self._revivals: dict[int, asyncio.Task[None]] = {}
        self._http = httpx2.AsyncClient(
            limits=httpx2.Limits(max_connections=None, keepalive_expiry=KEEP_ALIVE_S), **self._options
        )

    async def post(
        self,
        path: str,
        body: dict[str, Any],
        read: Callable[[httpx2.Response], Answer],
        *,
        session: str = "",
    ) -> Answer:
        """What `read` makes of the first answer that is no fault of a server: a success, or a refusal.

        Args:
            read: raises ServerFault if the answer is one after all.

        Raises:
            EngineError: there was none within the servers' patience.
        """
        give_up_at, pause_s = None, FIRST_PAUSE_S
        failed: set[int] = set()
        reason = "none can be reached"
        while give_up_at is None or time.monotonic() < give_up_at:
            self._start_revivals()
            if candidates := self.usable - failed:
                with self._router.route(session, candidates) as replica:
                    try:
                        return read(await self._attempt(replica, path, body))
                    except ServerFault as fault:
                        reason = str(fault)
                        failed.add(replica)
                        give_up_at = give_up_at or time.monotonic() + self.patience_s
            else:
                give_up_at = give_up_at or time.monotonic() + self.patience_s
                failed.clear()
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # so that requests come back apart
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        raise EngineError(f"no server gave an answer for {self.patience_s:g} s: {reason}")

    def wait(self) -> list[State]:
        """What the probe says of the replicas that answer, as soon as one does: a server starts slowly.

        Raises:
            InputError: none does within the servers' patience, or the probe refuses one.
        """
        give_up_at, pause_s = time.monotonic() + self.patience_s, FIRST_PAUSE_S
        with httpx2.Client(**self._options) as http:
            while True:
                found: dict[int, State] = {}
                reason = ""
                for replica, url in enumerate(self.urls):
                    try:
                        response = http.get(f"{url}/v1/models", timeout=CONNECT_TIMEOUT_S)
                        found[replica] = self._probe(response)
                    except (httpx2.TransportError, EngineError) as error:
                        reason = describe(url, error)
                if found:
                    self.usable = set(found)
                    return list(found.values())
                if time.monotonic() + pause_s > give_up_at:
                    raise InputError(f"no server answers for {self.patience_s:g} s: {reason}")
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def release(self, session: str) -> None:
        self._router.release(session)

    async def aclose(self) -> None:
        for revival in self._revivals.values():
            revival.cancel()
        await asyncio.gather(*self._revivals.values(), return_exceptions=True)
        await self._http.aclose()

    async def _attempt(self, replica: int, path: str, body: dict[str, Any]) -> httpx2.Response:
        url = self.urls[replica]
        try:
            response = await self._http.post(f"{url}{path}", json=body)
        except httpx2.TransportError as error:
            if replica in self.usable:
                logger.warning("%s: no requests go there until it answers again", describe(url, error))
                self.usable.discard(replica)
            raise ServerFault(describe(url, error)) from error
        if response.status_code >= 500 or response.status_code in BUSY:
            raise ServerFault(f"{url} answers {response.status_code}: {reason_of(response)}")
        return response

    def _start_revivals(self) -> None:
        for replica in set(range(len(self.urls))) - self.usable - self._revivals.keys():
            self._revivals[replica] = asyncio.create_task(self._revive(replica))

    async def _revive(self, replica: int) -> None:
        """Probe a replica until it answers."""
        url, pause_s = self.urls[replica], FIRST_PAUSE_S
        while replica not in self.usable:
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            try:
                self._probe(await self._http.get(f"{url}/v1/models", timeout=CONNECT_TIMEOUT_S))
            except (httpx2.TransportError, EngineError, InputError) as error:
                logger.debug("not back: %s", describe(url, error))
            else:
                logger.warning("%s is back", url)
                self.usable.add(replica)
        del self._revivals[replica]


def checked_url(url: str, server: str = "a server") -> str:
    """The URL as it was.

    Raises:
        InputError: it is none of `server`.
    """
    try:
        address = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise InputError(f"{url!r} is no URL of {server}: {error}") from None
    if address.scheme not in ("http", "https") or not address.host:
        raise InputError(f"{url!r} is no URL of {server}: expected http://HOST:PORT")
    return url


def check_ready(response: httpx2.Response) -> None:
    """
    Raises:
        EngineError: the server answers that it cannot at present.
    """
    if response.status_code >= 500 or response.status_code in BUSY:
        raise EngineError(f"{response.url} answers {response.status_code}: {reason_of(response)}")


def reason_of(response: httpx2.Response) -> str:
    """What the server says, in one line."""
    try:
        content = response.json()
        error = content.get("error", content)
        text = str(error.get("message", error))
    except (ValueError, AttributeError):
        text = response.text
    return " ".join(text.split())[:300] or response.reason_phrase


def describe(url: str, error: Exception) -> str:
    return f"{url}: {str(error) or type(error).__name__}"
