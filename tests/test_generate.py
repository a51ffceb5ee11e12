"""Options of recipes.generate, and what they do to a whole run."""

from pathlib import Path
from typing import cast

import pytest

from data.trajectories import read_trajectories
from mtpo.branching import Branching
from mtpo.errors import InputError
from recipes import generate
from recipes.engines import Sampler
from tests.scripted import gemma_chat
from tests.test_branching import PROBLEMS, SEED, DigitEngine


def options(**values: object) -> generate.SamplingOptions:
    return generate.SamplingOptions(**{"samples": 12, **values})  # pyright: ignore[reportArgumentType]


def test_branch_options_make_a_tree() -> None:
    assert options().branching == ()
    assert options(branch_turn=[1]).branching == (Branching(1, 2),)
    assert options(branch_turn=[1, 3]).branching == (Branching(1, 2), Branching(3, 2))
    assert options(branch_turn=[1, 3], branch_width=[2, 3]).branching == (Branching(1, 2), Branching(3, 3))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"branch_turn": [3, 1]}, r"the turns of branchings must increase, got \[3, 1\]"),
        ({"branch_turn": [0]}, "branching needs a turn of 1 or more"),
        ({"branch_turn": 1}, r"--branch_turn must be a list, as \[1\], got 1"),
        ({"branch_turn": [1], "branch_width": [2, 3]}, "one number, or one for each --branch_turn, got"),
        ({"branch_turn": [1, 2], "branch_width": [2, 4]}, r"\(12\) must be a multiple of .* \(2 x 4\)"),
    ],
)
def test_branch_options_that_make_no_tree_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        options(**values)


class DigitSampler:
    """Instead of a model."""

    name = "digits"
    chat = gemma_chat()

    def engine(self, *_: object) -> DigitEngine:
        return DigitEngine()


def test_a_run_takes_a_tree_and_a_system_text(tmp_path: Path) -> None:
    chosen = options(samples=4, branch_turn=[1, 3], system="Add digits.", preload=[], kernels=4)
    sampler = cast(Sampler, DigitSampler())
    assert generate.sample_into(tmp_path, sampler, PROBLEMS, chosen, seed=SEED)["trajectories"] == 8
    for t in read_trajectories(tmp_path / "trajectories"):
        assert (t.parent, t.branch_turn) == [(None, None), (0, 3), (0, 1), (2, 3)][t.sample]
        assert t.segments[0] == sampler.chat.prompt(PROBLEMS[0].question, system="Add digits.")
