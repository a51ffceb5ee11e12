"""Replicas of any engine on a Ray cluster, behind the interface of one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtpo.cluster import Crew, LostActorError
from mtpo.errors import EngineError, InputError
from mtpo.rollout import Engine, Generation, Sampling

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""Replicas that may die over one request before it is taken for the cause."""


class EngineActor:
    """One replica, where it runs."""

    def __init__(self, make: Callable[[], Engine]) -> None:
        self._engine = make()

    async def ping(self) -> None: ...

    async def describe(self) -> tuple[int, str]:
        return self._engine.max_context, self._engine.fingerprint

    async def generate(self, prompt: list[int], sampling: Sampling, session: str) -> Generation:
        return await self._engine.generate(prompt, sampling, session=session)

    async def release(self, session: str) -> None:
        self._engine.release(session)


class ClusterEngine:
    """An `Engine` over replicas, each an actor of its own. To be used within one event loop, after `connect`.

    Turns of one session go to one replica, which has the keys and values of what came before, unless it has far more
    to do than another. What a lost replica was asked is asked elsewhere: the draws of a turn are fixed by its seed, so
    that the answer is the one that was lost.

    Args:
        make: makes the engine, on the machine where it will run.
        num_replicas: how many.
        resources: of each, in Ray's words: {"num_cpus": 2, "num_gpus": 1}.

    Raises:
        InputError: no replica comes up, or they do not serve the same weights.
    """

    def __init__(self, make: Callable[[], Engine], num_replicas: int, resources: Mapping[str, Any]) -> None:
        self._crew = Crew(EngineActor, make, num_replicas, resources)
        described = set(self._crew.ask_all("describe"))
        if len(described) > 1:
            raise InputError(f"the replicas differ in context and weights: {sorted(described)}")
        [(self.max_context, self.fingerprint)] = described

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, session: str = ""
    ) -> Generation:
        """As `Engine.generate`.

        Raises:
            EngineError: as the replica says; no replica is alive; or three died over this request.
            InputError: as the replica says.
        """
        lost: LostActorError | None = None
        for _ in range(ATTEMPTS):
            try:
                await self._crew.until_alive()
                with self._crew.lease(session) as replica:
                    return await self._crew.call(replica, "generate", list(prompt_ids), sampling, session)
            except LostActorError as error:
                lost = error
        raise EngineError(f"{ATTEMPTS} replicas were lost over one request, the last because {lost}")

    def release(self, session: str) -> None:
        home = self._crew.release(session)
        if home is not None:
            self._crew.tell(home, "release", session)

    async def aclose(self) -> None:
        await self._crew.aclose()
