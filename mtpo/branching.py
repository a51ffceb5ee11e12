"""Trees of trajectories: which samples share which turns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mtpo.errors import InputError


@dataclass(frozen=True, slots=True)
class Branching:
    """Trajectories that share their first turns, so that pairs differ from one turn on."""

    turn: int
    """The first turn of the model, counted from 0, that each continuation samples for itself."""
    width: int
    """Continuations of one beginning, the first included."""

    def __post_init__(self) -> None:
        if self.turn < 1 or self.width < 2:
            raise InputError(f"branching needs a turn of 1 or more and a width of 2 or more, got {self}")


@dataclass(frozen=True)
class BranchingTree:
    """How the samples of one block part, each branching within the continuations of the one before.

    Samples are numbered so that those which are together at any turn are neighbours. The first of them draws for all.
    """

    branchings: tuple[Branching, ...]

    def __post_init__(self) -> None:
        turns = [branching.turn for branching in self.branchings]
        if any(later <= earlier for earlier, later in itertools.pairwise(turns)):
            raise InputError(f"the turns of branchings must increase, got {turns}")

    @property
    def width(self) -> int:
        """Samples of one block."""
        return math.prod(branching.width for branching in self.branchings)

    def owner(self, sample: int, turn: int) -> int:
        """The sample that draws this turn for all that are still together with it."""
        num_together = math.prod(branching.width for branching in self.branchings if branching.turn > turn)
        return sample - sample % num_together

    def first_own_turns(self, sample: int) -> list[int]:
        """The turn from which on the sample draws for itself, then the earlier ones that it may fall back on."""
        turns = [0, *(branching.turn for branching in self.branchings)]
        own = next(index for index, turn in enumerate(turns) if self.owner(sample, turn) == sample)
        return turns[own::-1]

    def parting_turn(self, samples: Sequence[int]) -> int | None:
        """The first turn for which not all samples have the same owner; None for a single one."""
        turns = (branching.turn for branching in self.branchings)
        return next((turn for turn in turns if len({self.owner(s, turn) for s in samples}) > 1), None)
