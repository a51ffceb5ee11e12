"""Where the trajectories of online training come about, are kept and are judged."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Container, Coroutine, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from accelerate.utils import gather_object

from mtpo.chat import ChatFormat
from mtpo.environment import Environment, Interpreter
from mtpo.errors import EnvironmentFault
from mtpo.judges import Judge, LLMJudge
from mtpo.rollout import Decoding, RolloutLimits, rollout
from mtpo.samplers import PolicySamplers, Sampler
from mtpo.trajectory import Problem, Trajectory

T = TypeVar("T")

MAX_JUDGEMENTS = 64
"""Judgements under way at once."""


class Journal(Protocol):
    """Where finished trajectories are safe: `data.trajectories.Journal`."""

    def append(self, trajectory: Trajectory) -> None: ...

    def done(self) -> Container[tuple[str, int]]: ...


@dataclass(frozen=True)
class Storage:
    """How a folder is opened for writing trajectories, and how they are read from it."""

    open: Callable[[Path], AbstractContextManager[Journal]]
    read: Callable[[Path], Iterable[Trajectory]]


@runtime_checkable
class Rewards(Protocol):
    """A judge of single trajectories."""

    async def reward(self, trajectory: Trajectory, problem: Problem) -> float | None: ...


@dataclass(frozen=True)
class Table:
    """All that sampling and judging need beside the policies."""

    chat: ChatFormat
    environment: Callable[[], AbstractAsyncContextManager[Environment | Interpreter]]
    """Opened once, for the whole run."""
    judge: Judge
    decoding: Decoding = field(default_factory=Decoding)
    limits: RolloutLimits = field(default_factory=RolloutLimits)
    system: str | None = None
    max_in_flight: int = 64

    @property
    def max_rows(self) -> int:
        """Sessions for which an engine had better keep keys and values: some more than are in flight."""
        return self.max_in_flight + self.max_in_flight // 2


class OpenTable:
    """A table whose environment is open: a context manager, and the event loop in which all of a run is sampled."""

    def __init__(self, table: Table, storage: Storage) -> None:
        self.judge, self.storage, self._table = table.judge, storage, table

    def __enter__(self) -> OpenTable:
        self._runner, self._open = asyncio.Runner(), AsyncExitStack()
        self._environment = self._runner.run(self._open.enter_async_context(self._table.environment()))
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._runner.run(self._close())
        finally:
            self._runner.close()

    async def _close(self) -> None:
        await self._open.aclose()
        if isinstance(self.judge, LLMJudge):
            await self.judge.aclose()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    async def sample(
        self,
        journal: Journal,
        samplers: PolicySamplers,
        sampler: Sampler,
        problems: Sequence[Problem],
        *,
        seed: int,
        iteration: int,
        samples: int = 1,
        first_sample: int = 0,
    ) -> None:
        """Let a sampler add what the journal lacks."""
        table = self._table
        trajectories = rollout(
            samplers.engine(sampler),
            self._environment,
            table.chat,
            problems,
            samples=samples,
            first_sample=first_sample,
            decoding=table.decoding,
            limits=table.limits,
            seed=seed,
            system=table.system,
            policy=sampler.name,
            iteration=iteration,
            skip=journal.done(),
            max_in_flight=table.max_in_flight,
        )
        async with contextlib.aclosing(trajectories):
            async for trajectory in trajectories:
                journal.append(trajectory)

    async def judged(
        self, problems: Sequence[Problem], pairs: Sequence[tuple[Trajectory, Trajectory | None]]
    ) -> list[float | None]:
        """P(first > second) of every pair, or the reward of a first one alone; None where there is no telling.

        Raises:
            EnvironmentFault: the judge cannot be asked.
        """
        room = asyncio.Semaphore(MAX_JUDGEMENTS)

        async def judge(problem: Problem, first: Trajectory, second: Trajectory | None) -> float | None:
            if not first.actions or (second is not None and not second.actions):
                return None
            async with room:
                if second is None:
                    assert isinstance(self.judge, Rewards)
                    return await self.judge.reward(first, problem)
                return await self.judge.prefer(first, second, problem)

        tasks = [
            asyncio.create_task(judge(problem, *pair)) for problem, pair in zip(problems, pairs, strict=True)
        ]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Where one process meets a fault, end so in all of them: the others would wait for it for ever."""
    own: EnvironmentFault | None = None
    try:
        yield
    except EnvironmentFault as error:
        own = error
    if faults := [fault for fault in gather_object([None if own is None else str(own)]) if fault is not None]:
        raise EnvironmentFault(faults[0]) from own
