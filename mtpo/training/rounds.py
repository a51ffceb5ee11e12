"""Rounds of online training: sample the prompts of the next steps, judge, and turn what comes of it into rows.

ROUNDS/00012/0-of-1/trajectories/   the journal of one process: what is in it is not sampled again
ROUNDS/00012/0-of-1/round.json      preferences and figures, written when the round is complete
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from accelerate import PartialState
from accelerate.utils import gather_object

from mtpo.chat import ChatFormat
from mtpo.environment import Environment, Interpreter
from mtpo.errors import EnvironmentFault, InputError
from mtpo.judges import Judge, LLMJudge
from mtpo.rollout import Decoding, RolloutLimits, rollout, turn_seed
from mtpo.runs import read_json, write_json
from mtpo.samplers import PolicySamplers, Sampler
from mtpo.training.online_settings import OnlineSettings
from mtpo.training.plays import Play
from mtpo.trajectory import Problem, Trajectory

log = logging.getLogger(__name__)

Pairs = list[tuple[Trajectory, Trajectory | None]]

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
    """Where trajectories come about: all that sampling needs beside the policies."""

    chat: ChatFormat
    environment: Callable[[], AbstractAsyncContextManager[Environment | Interpreter]]
    """Opened once, for the whole run."""
    judge: Judge
    decoding: Decoding = field(default_factory=Decoding)
    limits: RolloutLimits = field(default_factory=RolloutLimits)
    system: str | None = None
    max_in_flight: int = 64


class Rounds:
    """Plays all prompts of a run, round by round, and no prompt twice that was played already.

    A context manager: the environment is open inside. Every process plays its own share of every step's prompts.

    Args:
        prompts: a problem for every prompt of the run, in order; a whole number of steps.
        folder: where rounds are kept.

    Raises:
        InputError: the method has no opponent, and the judge can only compare.
    """

    def __init__(
        self,
        prompts: Sequence[Problem],
        settings: OnlineSettings,
        samplers: PolicySamplers,
        table: Table,
        folder: Path,
        storage: Storage,
    ) -> None:
        if len(settings.samplers) == 1 and not isinstance(table.judge, Rewards):
            raise InputError(
                f"method {settings.method!r} rewards single trajectories, which {type(table.judge).__name__} cannot"
            )
        self.num_prompts = len(prompts)
        self._prompts, self._settings, self._table = prompts, settings, table
        self._policies, self._folder, self._storage = samplers, folder, storage
        self._engines = {sampler: samplers.engine(sampler) for sampler in settings.samplers}
        self._number = -1
        self._plays: list[list[Play]] = []
        self.metrics: dict[str, float] = {}
        """Of the samplers, in the round that was last played."""

    def __enter__(self) -> Rounds:
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
        await self._policies.aclose()
        if isinstance(self._table.judge, LLMJudge):
            await self._table.judge.aclose()

    def plays_of(self, step: int) -> list[Play]:
        """What came of this process's prompts of a step; played now if their round was not.

        Raises:
            EnvironmentFault: the judge cannot be asked, here or in another process. What was sampled is kept.
        """
        number, place = divmod(step, self._settings.sync_steps)
        if number != self._number:
            with _together():
                self._plays = self._play(number)
            self._number = number
        return self._plays[place]

    def _play(self, number: int) -> list[list[Play]]:
        state = PartialState()
        k, size = self._settings.sync_steps, self._settings.batch_size
        mine = [
            self._prompts[step * size : (step + 1) * size][state.process_index :: state.num_processes]
            for step in range(number * k, min((number + 1) * k, self.num_prompts // size))
        ]
        folder = self._folder / f"{number:05d}" / f"{state.process_index}-of-{state.num_processes}"
        prompts = [problem for step in mine for problem in step]
        if not (folder / "round.json").exists():
            log.info("round %d: %d prompts", number, len(prompts))
            self._runner.run(self._complete(number, prompts, folder))
        found = read_json(folder / "round.json")
        self.metrics = found["metrics"]
        trajectories = self._trajectories(folder, prompts)
        plays = iter(
            Play(problem, *sides, preference)
            for problem, sides, preference in zip(prompts, trajectories, found["preferences"], strict=True)
        )
        return [[next(plays) for _ in step] for step in mine]

    async def _complete(self, number: int, prompts: Sequence[Problem], folder: Path) -> None:
        """Sample and judge what is missing of a round."""
        # A problem may come again, in another round or another process, and shall be another draw.
        seed = turn_seed(self._settings.seed, "round", number, PartialState().process_index)
        with self._storage.open(folder / "trajectories") as journal:
            for sampler, samples, first_sample, problems in self._calls(prompts):
                trajectories = rollout(
                    self._engines[sampler],
                    self._environment,
                    self._table.chat,
                    problems,
                    samples=samples,
                    first_sample=first_sample,
                    decoding=self._table.decoding,
                    limits=self._table.limits,
                    seed=seed,
                    system=self._table.system,
                    policy=sampler.name,
                    iteration=number,
                    skip=journal.done(),
                    max_in_flight=self._table.max_in_flight,
                )
                async with contextlib.aclosing(trajectories):
                    async for trajectory in trajectories:
                        journal.append(trajectory)
        metrics = {name: value for name, value in self._policies.metrics().items() if "log_z" in name}
        pairs = self._trajectories(folder, prompts)
        preferences = await self._judged(prompts, pairs)
        write_json(folder / "round.json", {"preferences": preferences, "metrics": metrics})

    def _calls(self, prompts: Sequence[Problem]) -> Iterator[tuple[Sampler, int, int, list[Problem]]]:
        """(sampler, samples, first sample, problems): a problem that n prompts have gives n samples to each side."""
        counts = Counter(problem.id for problem in prompts)
        of_id = {problem.id: problem for problem in prompts}
        samplers = self._settings.samplers
        for n in sorted(set(counts.values())):
            problems = [of_id[name] for name, count in counts.items() if count == n]
            if len(set(samplers)) == 1:
                yield samplers[0], n * len(samplers), 0, problems
            else:
                yield from ((sampler, n, side * n, problems) for side, sampler in enumerate(samplers))

    def _trajectories(self, folder: Path, prompts: Sequence[Problem]) -> Pairs:
        """Trajectory and opponent, or None, of every prompt."""
        counts, seen = Counter(problem.id for problem in prompts), Counter[str]()
        found = {(t.problem_id, t.sample): t for t in self._storage.read(folder / "trajectories")}
        pairs: Pairs = []
        for problem in prompts:
            place, n = seen[problem.id], counts[problem.id]
            seen[problem.id] += 1
            has_opponent = len(self._settings.samplers) > 1
            second = found[problem.id, n + place] if has_opponent else None
            pairs.append((found[problem.id, place], second))
        return pairs

    async def _judged(self, prompts: Sequence[Problem], pairs: Pairs) -> list[float | None]:
        room = asyncio.Semaphore(MAX_JUDGEMENTS)

        async def judge(problem: Problem, first: Trajectory, second: Trajectory | None) -> float | None:
            if not first.actions or (second is not None and not second.actions):
                return None
            async with room:
                if second is None:
                    assert isinstance(self._table.judge, Rewards)
                    return await self._table.judge.reward(first, problem)
                return await self._table.judge.prefer(first, second, problem)

        tasks = [
            asyncio.create_task(judge(problem, *pair)) for problem, pair in zip(prompts, pairs, strict=True)
        ]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Where one process meets a fault, end so in all of them: the others would wait for it for ever."""
    own: EnvironmentFault | None = None
    try:
        yield
    except EnvironmentFault as error:
        own = error
    if faults := [fault for fault in gather_object([None if own is None else str(own)]) if fault is not None]:
        raise EnvironmentFault(faults[0]) from own
