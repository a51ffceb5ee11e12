"""Equal actors on a Ray cluster: which of them are alive, and who takes the next call.

Ray starts a lost actor again, on another node if it must, as soon as the cluster has room for it. Until then the others
take its calls; what becomes of a call that was lost is for the caller to decide.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from mtpo.engines.routing import Router
from mtpo.errors import EnvironmentFault, InputError

logger = logging.getLogger(__name__)

PAUSE_S = 0.5
"""Between two looks at whether somebody has come back."""
MAX_CALLS = 10_000
"""Calls that an actor may have under way: far more than anybody has in flight."""


class LostActorError(EnvironmentFault):
    """An actor or its node died, or none is left."""


def connect(address: str) -> None:
    """Join a Ray cluster, once a process.

    Args:
        address: "local" starts one on this machine, "auto" is the one that it belongs to, or HOST:PORT.

    Raises:
        InputError: Ray is not installed, or there is no cluster.
    """
    ray = _ray()
    if ray.is_initialized():
        return
    try:
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"there is no Ray cluster at {address!r}: {_first_line(error)}") from error


class Crew:
    """Equal actors, to be used within one event loop after `connect`.

    Args:
        actor_class: its instances are made by calling it with `make`, and have a method `ping`.
        make: is called where the actor runs, and makes what it serves.
        resources: of each actor, in Ray's words: {"num_cpus": 2, "num_gpus": 1}.
        patience_s: seconds to wait for the first of them, and later while none is alive.

    Raises:
        InputError: none comes up.
    """

    def __init__(
        self,
        actor_class: type,
        make: Callable[[], Any],
        num_actors: int,
        resources: Mapping[str, Any],
        *,
        patience_s: float = 300.0,
    ) -> None:
        self._ray = ray = _ray()
        if num_actors < 1:
            raise InputError(f"a crew needs at least one actor, got {num_actors}")
        remote = ray.remote(actor_class).options(
            max_restarts=-1, max_concurrency=MAX_CALLS, scheduling_strategy="SPREAD", **resources
        )
        self.actors = [remote.remote(make) for _ in range(num_actors)]
        self._patience_s = patience_s
        self._router = Router(num_actors)
        self._returning: dict[int, asyncio.Task[None]] = {}
        self.alive: set[int] = set()
        self._meet()

    def ask_all(self, method: str) -> list[Any]:
        """What each of those alive answers. Waits for it."""
        return [self._ray.get(getattr(self.actors[index], method).remote()) for index in sorted(self.alive)]

    async def until_alive(self) -> None:
        """
        Raises:
            LostActorError: none has been alive for `patience_s`.
        """
        give_up_at = time.monotonic() + self._patience_s
        for index in set(range(len(self.actors))) - self.alive - set(self._returning):
            self._returning[index] = asyncio.create_task(self._await_return(index))
        while not self.alive:
            if time.monotonic() > give_up_at:
                raise LostActorError(f"none of {len(self.actors)} actors came back in {self._patience_s:g} s")
            await asyncio.sleep(PAUSE_S)

    @contextlib.contextmanager
    def lease(self, session: str, among: Collection[int] = ()) -> Iterator[int]:
        """The actor for a call, or for a session of many, which counts as its load until the block ends.

        Args:
            session: calls of one session go to one actor where possible; "" is no session.
            among: the actors to choose from; by default those alive, of which there must be one.
        """
        with self._router.route(session, among or self.alive) as index:
            yield index

    def release(self, session: str) -> int | None:
        """Forget the session; the actor that it went to, if any and alive."""
        home = self._router.release(session)
        return home if home in self.alive else None

    async def call(self, index: int, method: str, *args: Any) -> Any:
        """What an actor's method returns, or raises.

        Raises:
            LostActorError: the actor died, or cannot be reached. It gets no calls until it is back.
        """
        reference = getattr(self.actors[index], method).remote(*args)
        try:
            return await reference
        except asyncio.CancelledError:
            self._ray.cancel(reference)
            raise
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            self.alive.discard(index)
            logger.warning("actor %d is lost: %s", index, _first_line(error))
            raise LostActorError(f"actor {index} is lost: {_first_line(error)}") from error

    def tell(self, index: int, method: str, *args: Any) -> None:
        """Call and look for no answer."""
        getattr(self.actors[index], method).remote(*args)

    async def aclose(self) -> None:
        for task in self._returning.values():
            task.cancel()
        await asyncio.gather(*self._returning.values(), return_exceptions=True)
        for actor in self.actors:
            self._ray.kill(actor)
        self.alive.clear()

    def _meet(self) -> None:
        pings = [actor.ping.remote() for actor in self.actors]
        ready, _ = self._ray.wait(pings, num_returns=len(pings), timeout=self._patience_s)
        reason = f"no answer for {self._patience_s:g} s: has the cluster room for it?"
        for index, ping in enumerate(pings):
            if ping in ready:
                try:
                    self._ray.get(ping)
                    self.alive.add(index)
                except self._ray.exceptions.RayError as error:
                    reason = str(error).strip().splitlines()[-1].strip()
        if not self.alive:
            raise InputError(f"no actor came up on the cluster: {reason}")

    async def _await_return(self, index: int) -> None:
        while True:
            try:
                await self.actors[index].ping.remote()
            except self._ray.exceptions.RayError:
                await asyncio.sleep(PAUSE_S)
            else:
                logger.warning("actor %d is back", index)
                self.alive.add(index)
                del self._returning[index]
                return


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise InputError(f"--ray needs Ray, pip install 'mtpo[ray]': {error}") from error
    return ray


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
