"""Distillation on the student's own samples (GKD, arXiv 2306.13649, algorithm 1), inside the one trainer.

Each step takes, with probability `share`, sequences that the student has sampled instead of the data's. No gradient
goes through sampling. Sequences are sampled for rounds of several steps at once, with the weights that the first step
of the round starts from, so those of its last step are as many steps old: `staleness` in the metrics.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from mtpo.batches import Mask, Row, masked_rows, row_length
from mtpo.errors import EngineError, InputError
from mtpo.trajectory import Trajectory

Sample = Callable[[PreTrainedModel, int, Sequence[int]], Sequence[Trajectory]]
"""From the student, the number of a round and those of the wanted draws to a trajectory for each draw. Asked again for
a round that it has sampled before, as a resumed run does, it must give the same ones."""


@dataclass(frozen=True)
class OnPolicy:
    """How a student comes to its own samples.

    Raises:
        InputError: `sync_steps` is below 1.
    """

    sample: Sample
    sync_steps: int = 1
    """Steps of a round, for which the weights that sample stay as they are."""

    def __post_init__(self) -> None:
        if self.sync_steps < 1:
            raise InputError(f"sync_steps must be at least 1, got {self.sync_steps}")


@dataclass
class OwnSamples:
    """Which steps the student fills itself, and with what; one process asks for its own places.

    A place is a row's place in the training order, a draw the number of a sequence among all that are sampled.
    """

    on_policy: OnPolicy
    share: float
    seed: int
    mask: Mask
    num_steps: int
    batch_size: int
    micro_batch_size: int
    process: int = 0
    num_processes: int = 1
    _rows: dict[int, Row] = field(default_factory=dict, init=False)
    """Of the current round, by place."""
    _round: int = field(default=-1, init=False)

    def is_due(self, step: int) -> bool:
        """Whether the student samples the sequences of this step, from 0."""
        return random.Random(f"{self.seed}/{step}").random() < self.share

    def staleness(self, step: int) -> int:
        """By how many steps the weights that sampled for this step are older than those that it starts from."""
        return step % self.on_policy.sync_steps

    def rows(self, model: PreTrainedModel, step: int, places: Sequence[int]) -> list[Row]:
        """The rows for places of a step that is due; sampled with `model` as it is, if the step begins a round."""
        number = step // self.on_policy.sync_steps
        if number != self._round:
            self._rows, self._round = self._sampled(model, number), number
        return [self._rows[place] for place in places]

    def _sampled(self, model: PreTrainedModel, number: int) -> dict[int, Row]:
        first = number * self.on_policy.sync_steps
        steps = range(first, min(first + self.on_policy.sync_steps, self.num_steps))
        due = [step for step in steps if self.is_due(step)]
        num_before = sum(map(self.is_due, range(first))) * self.batch_size
        places = [
            place for step in due for place in range(step * self.batch_size, (step + 1) * self.batch_size)
        ]
        draws = {place: num_before + n for n, place in enumerate(places) if self._is_mine(place)}
        rows = [
            row_of(trajectory) for trajectory in self.on_policy.sample(model, number, list(draws.values()))
        ]
        by_place = dict(zip(draws, masked_rows(rows, self.mask), strict=True))
        for step in due:  # by length within a step, so that micro-batches need little padding
            own = [place for place in by_place if place // self.batch_size == step]
            by_place |= dict(zip(own, sorted((by_place[p] for p in own), key=row_length), strict=True))
        return by_place

    def _is_mine(self, place: int) -> bool:
        """Processes take micro-batches in turn."""
        return place // self.micro_batch_size % self.num_processes == self.process


def row_of(trajectory: Trajectory) -> Row:
    """
    Raises:
        EngineError: nothing was sampled.
    """
    if not trajectory.actions:
        raise EngineError(
            f"{trajectory.problem_id} sample {trajectory.sample}: nothing was sampled ({trajectory.fault}); "
            "resume the run to try again"
        )
    return {
        "problem_id": trajectory.problem_id,
        "sample": trajectory.sample,
        "input_ids": trajectory.input_ids,
        "completion_mask": trajectory.completion_mask,
    }
