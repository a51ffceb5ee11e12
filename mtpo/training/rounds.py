"""Rounds of online training: sample the prompts of the next steps, judge, and turn what comes of it into plays.

ROUNDS/00012/0-of-1/trajectories/   the journal of one process: what is in it is not sampled again
ROUNDS/00012/0-of-1/round.json      preferences and figures, written when the round is complete
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from accelerate import PartialState

from mtpo.errors import InputError
from mtpo.rollout import turn_seed
from mtpo.runs import read_json, write_json
from mtpo.samplers import PolicySamplers, Sampler
from mtpo.training.online_settings import OnlineSettings
from mtpo.training.plays import Play
from mtpo.training.table import OpenTable, Rewards, together
from mtpo.trajectory import Problem, Trajectory

log = logging.getLogger(__name__)

Pairs = list[tuple[Trajectory, Trajectory | None]]


class Rounds:
    """Plays all prompts of a run, round by round, and no prompt twice that was played already.

    Every process plays its own share of every step's prompts.

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
        table: OpenTable,
        folder: Path,
    ) -> None:
        if len(settings.samplers) == 1 and not isinstance(table.judge, Rewards):
            raise InputError(
                f"method {settings.method!r} rewards single trajectories, which {type(table.judge).__name__} cannot"
            )
        self.num_prompts = len(prompts)
        self._prompts, self._settings, self._table = prompts, settings, table
        self._policies, self._folder = samplers, folder
        for sampler in settings.samplers:
            samplers.engine(sampler)  # averages begin now
        self._number = -1
        self._plays: list[list[Play]] = []
        self.metrics: dict[str, float] = {}
        """Of the samplers, in the round that was last played."""

    def close(self) -> None:
        """Stop the samplers' engines."""
        self._table.run(self._policies.aclose())

    def plays_of(self, step: int) -> list[Play]:
        """What came of this process's prompts of a step; played now if their round was not.

        Raises:
            EnvironmentFault: the judge cannot be asked, here or in another process. What was sampled is kept.
        """
        number, place = divmod(step, self._settings.sync_steps)
        if number != self._number:
            with together():
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
            self._table.run(self._complete(number, prompts, folder))
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
        with self._table.storage.open(folder / "trajectories") as journal:
            for sampler, samples, first_sample, problems in self._calls(prompts):
                await self._table.sample(
                    journal,
                    self._policies,
                    sampler,
                    problems,
                    seed=seed,
                    iteration=number,
                    samples=samples,
                    first_sample=first_sample,
                )
        metrics = {name: value for name, value in self._policies.metrics().items() if "log_z" in name}
        preferences = await self._table.judged(prompts, self._trajectories(folder, prompts))
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
        found = {(t.problem_id, t.sample): t for t in self._table.storage.read(folder / "trajectories")}
        pairs: Pairs = []
        for problem in prompts:
            place, n = seen[problem.id], counts[problem.id]
            seen[problem.id] += 1
            has_opponent = len(self._settings.samplers) > 1
            second = found[problem.id, n + place] if has_opponent else None
            pairs.append((found[problem.id, place], second))
        return pairs
