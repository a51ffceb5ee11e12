"""The interpreter of another machine: a client of `python -m sandbox serve`."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import Any

import httpx2

from mtpo.engines.servers import checked_url
from mtpo.errors import InputError, SandboxError
from mtpo.trajectory import Execution

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 45.0
"""The service answers well within this, if only to say that the call has not ended yet."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 5.0


class RemoteInterpreter:
    """Sessions on a sandbox service; an `mtpo.rollout.Interpreter`.

    Use it as an async context manager; sessions that are still open at its end are closed with it.

    When the connection breaks, a call is sent again, with the number that it already had, so that the service
    knows a cell that it has run, or runs, and answers with its one result.

    Args:
        url: where the service listens, as in "http://10.0.0.7:8765".
        token: the one that the service was started with.
        timeout_s: seconds to go on trying while the service cannot be reached. Waiting for one of its kernels
            is not bounded.

    Raises:
        InputError: `url` or `timeout_s` is not as described.
    """

    def __init__(self, url: str, token: str, *, timeout_s: float = 30.0) -> None:
        if not 0 < timeout_s < float("inf"):
            raise InputError(f"timeout_s must be a positive number of seconds, got {timeout_s!r}")
        self.url = checked_url(url, "a sandbox service")
        self.open_sessions: set[RemoteSession] = set()
        self._timeout_s = timeout_s
        self._http = httpx2.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=httpx2.Timeout(ANSWER_TIMEOUT_S, connect=10.0, pool=None),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=256),
            trust_env=False,  # a proxy to the internet is no way to a machine of one's own
        )

    async def __aenter__(self) -> RemoteInterpreter:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(session.close() for session in list(self.open_sessions)))
        await self._http.aclose()

    def session(self) -> RemoteSession:
        """A new session; the service hears of it with its first cell."""
        return RemoteSession(self)

    async def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx2.Response:
        """Ask until there is an answer, whatever it says, other than that the call has not ended yet.

        Raises:
            SandboxError: the service cannot be reached, or the interpreter is closed.
        """
        if self._http.is_closed:
            raise SandboxError("the remote interpreter is closed")
        give_up_at, pause_s = None, FIRST_PAUSE_S
        while True:
            try:
                response = await self._http.request(method, path, json=body)
            except httpx2.TransportError as error:
                now = time.monotonic()
                give_up_at = give_up_at or now + self._timeout_s
                if now + pause_s > give_up_at:
                    reason = str(error) or type(error).__name__
                    raise SandboxError(
                        f"{self.url} gave no answer for {self._timeout_s:g} s: {reason}"
                    ) from error
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # so that clients come back apart
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                if response.status_code != 202:
                    return response
                give_up_at, pause_s = None, FIRST_PAUSE_S


class RemoteSession:
    """State that lives as long as one trajectory. Made by `RemoteInterpreter.session`.

    A call that is cancelled, or gets no answer, ends the session: what became of its state is not known.
    """

    def __init__(self, interpreter: RemoteInterpreter, session_id: str | None = None) -> None:
        self._interpreter = interpreter
        self._id = session_id
        self._numbers = {"cell_number": 1, "fork_number": 1}
        self._end: str | None = None
        self._lock = asyncio.Lock()
        interpreter.open_sessions.add(self)

    async def __aenter__(self) -> RemoteSession:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def execute(self, code: str, timeout_s: float = 5.0) -> Execution:
        """Run one cell. Calls wait for each other.

        Args:
            timeout_s: wall seconds that the cell itself may take; waiting for a kernel does not count.

        Raises:
            SandboxError: the service reports a fault or cannot be reached, or the session is lost or closed.
            InputError: the service refuses the token, or a value.
        """
        text = code.encode("utf-8", "replace").decode()  # JSON holds no lone surrogates
        reply = await self._call("execute", "cell_number", {"code": text, "timeout_s": timeout_s})
        return Execution(code, reply["text"], reply["status"], reply["seconds"], reply["is_fault"])

    async def fork(self) -> RemoteSession:
        """An independent session with the same state.

        Raises:
            SandboxError: the state cannot be copied; or as in `execute`.
            InputError: the service has room for one kernel only; or as in `execute`.
        """
        return RemoteSession(self._interpreter, (await self._call("fork", "fork_number", {}))["id"])

    async def close(self) -> None:
        """End the session and everything it started. Closing twice is fine.

        A service that cannot be reached closes the session by itself, when it has been idle for long.
        """
        self._end = "the session is closed"
        self._interpreter.open_sessions.discard(self)
        session_id, self._id = self._id, None
        if session_id is not None:
            try:
                await self._interpreter.request("DELETE", f"/sessions/{session_id}")
            except SandboxError as error:
                logger.warning("a session was not closed: %s", error)

    async def _call(self, name: str, counter: str, values: dict[str, Any]) -> dict[str, Any]:
        async with self._lock:
            if self._id is None and self._end is None:
                self._id = _content(await self._interpreter.request("POST", "/sessions"))["id"]
                if self._end is not None:  # closed meanwhile
                    await self.close()
            if self._end is not None:
                raise SandboxError(self._end)
            body = {counter: self._numbers[counter], **values}
            try:
                response = await self._interpreter.request("POST", f"/sessions/{self._id}/{name}", body)
            except BaseException:
                self._end = self._end or "an earlier call got no answer, so the session's state is not known"
                raise
            if response.is_success or response.status_code == 503:  # the service has used the number up
                self._numbers[counter] += 1
            return _content(response)


def _content(response: httpx2.Response) -> dict[str, Any]:
    """
    Raises:
        SandboxError: the service reports a fault, or the session is lost.
        InputError: the service refuses the token, or a value.
    """
    try:
        content = response.json()
        if response.is_success:
            return content
        reason = content["detail"]
    except (ValueError, TypeError, KeyError):  # another program listens at this address
        reason = (
            f"{response.url} answered {response.status_code} {response.reason_phrase}, which it never does"
        )
    match response.status_code:
        case 401 | 413 | 422:
            raise InputError(f"the sandbox service refuses: {reason}")
        case 404 | 409:
            raise SandboxError(f"the session is lost: {reason}")
        case _:
            raise SandboxError(f"the sandbox service: {reason}")
