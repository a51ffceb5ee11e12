"""Looks at held-out prompts in online training: the policy against its reference, and against itself before.

LOOKS/00040/0-of-1/trajectories/     what the policy of step 40 did, one trajectory a prompt
LOOKS/reference/0-of-1/trajectories/ what the reference did, drawn once for the whole run
LOOKS/00040/0-of-1/look.json         preferences, written when the look is complete
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState

from mtpo.errors import InputError
from mtpo.rollout import turn_seed
from mtpo.runs import read_json, write_json
from mtpo.samplers import CURRENT, REFERENCE, PolicySamplers
from mtpo.training.plays import Play, judgement_metrics, trajectory_metrics
from mtpo.training.table import OpenTable, together
from mtpo.trajectory import Problem, Trajectory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Look:
    """What came of this process's share of the held-out prompts."""

    own: tuple[Trajectory, ...]
    """Of the policy."""
    plays: Mapping[str, Sequence[Play]]
    """The same trajectories against those of `reference` and, after the first look, of `previous`."""

    @property
    def metrics(self) -> dict[str, float]:
        """Mean P and share of ties against each opponent; lengths and truncations of the policy."""
        every = [play for plays in self.plays.values() for play in plays]
        metrics = {"num/unjudged": float(sum(play.preference is None for play in every))}
        metrics |= trajectory_metrics(self.own) | {"num/played": float(len(self.own))}
        for opponent, plays in self.plays.items():
            metrics |= judgement_metrics(plays, opponent)
        return metrics


class Looks:
    """Holds looks, before the first step, every so many steps and after the last, and none twice.

    Args:
        problems: the held-out prompts; every process takes its share.
        every: steps between two looks; None for those at both ends only.
        samplers: makes engines for the policy and the reference as they are now.
        folder: where looks are kept.

    Raises:
        InputError: two problems have one id, or there are fewer than processes.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        every: int | None,
        seed: int,
        samplers: Callable[[], PolicySamplers],
        table: OpenTable,
        folder: Path,
    ) -> None:
        seen: set[str] = set()
        for problem in problems:
            if problem.id in seen:
                raise InputError(f"held-out problems: two have the id {problem.id!r}, expected one each")
            seen.add(problem.id)
        state = PartialState()
        if len(problems) < state.num_processes:
            raise InputError(
                f"{len(problems)} held-out problems do not give each of {state.num_processes} processes one"
            )
        self.every = every
        self._problems = problems[state.process_index :: state.num_processes]
        self._share = f"{state.process_index}-of-{state.num_processes}"
        self._seed, self._samplers, self._table, self._folder = seed, samplers, table, folder

    def at(self, step: int) -> Look:
        """The look at the policy as it is now, after `step` steps.

        Raises:
            EnvironmentFault: the judge cannot be asked, here or in another process. What was sampled is kept.
        """
        record = self._folder / f"{step:05d}" / self._share / "look.json"
        with together():
            if not record.exists():
                log.info("look after step %d: %d held-out prompts", step, len(self._problems))
                self._table.run(self._complete(step, record))
        plays = {
            opponent: [
                Play(problem, *pair, preference)
                for problem, pair, preference in zip(
                    self._problems, self._pairs(step, opponent), preferences, strict=True
                )
            ]
            for opponent, preferences in read_json(record).items()
        }
        return Look(tuple(play.first for play in plays["reference"]), plays)

    async def _complete(self, step: int, record: Path) -> None:
        """Sample and judge what is missing of a look."""
        samplers = self._samplers()
        try:
            # Draws are independent of each other, and of who makes them: other processes would draw the same.
            for name, sampler in (("reference", REFERENCE), (f"{step:05d}", CURRENT)):
                seed = turn_seed(self._seed, f"look {name}", 0, 0)
                with self._table.storage.open(self._folder / name / self._share / "trajectories") as journal:
                    await self._table.sample(
                        journal, samplers, sampler, self._problems, seed=seed, iteration=step
                    )
        finally:
            await samplers.aclose()
        opponents = ("reference", "previous") if step else ("reference",)
        found = {
            opponent: await self._table.judged(self._problems, self._pairs(step, opponent))
            for opponent in opponents
        }
        write_json(record, found)

    def _pairs(self, step: int, opponent: str) -> list[tuple[Trajectory, Trajectory]]:
        shares = [self._folder / "reference" / self._share]
        if opponent == "previous":
            before = 0 if self.every is None else (step - 1) // self.every * self.every
            # Whoever completed them: a run may be resumed with more or fewer processes.
            shares = [record.parent for record in (self._folder / f"{before:05d}").glob("*/look.json")]
        own = self._of_problem([self._folder / f"{step:05d}" / self._share])
        others = self._of_problem(shares)
        return [(own[problem.id], others[problem.id]) for problem in self._problems]

    def _of_problem(self, shares: Sequence[Path]) -> dict[str, Trajectory]:
        read = self._table.storage.read
        return {t.problem_id: t for share in shares for t in read(share / "trajectories")}
