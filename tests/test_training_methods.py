"""Every option of every method, against the equations in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import pytest
import torch

from mtpo.errors import InputError
from mtpo.training import METHODS, TrainingSettings
from mtpo.training.methods import Scores

ELSEWHERE = {
    "alpha": 0.8,
    "beta": 0.7,
    "tau": 0.5,
    "label_smoothing": 0.2,
    "nll_coef": 0.5,
    "normalize": True,
    "lambda_pos": 2.0,
    "lambda_neg": 3.0,
}
"""A value of each option that no method has by default."""
LOGPS = ([-1.0, -2.0, -0.5], [-0.25, -3.0], [-1.5], [-0.75, -1.25, -0.5, -2.0])
REFERENCE = ([-2.5, -2.5, -1.0], [-0.5, -1.0], [-4.0], [-0.25, -1.0, -0.25, -0.5])
LABELS = (True, True, False, False)
Z0 = 0.3
REWARDS = (1.5, 1.5, -0.5, -0.5)
VALUES = (0.2, -0.1, 0.4, 0.0)


class Trajectory(NamedTuple):
    """What the equations are about."""

    logps: list[float]
    reference: list[float]

    @property
    def score(self) -> float:
        return sum(self.logps)

    @property
    def rho(self) -> float:
        return sum(self.logps) - sum(self.reference)

    @property
    def length(self) -> int:
        return len(self.logps)


TRAJECTORIES = [Trajectory(*both) for both in zip(LOGPS, REFERENCE, strict=True)]
Options = Mapping[str, float]


def sft(_: Options) -> float:
    return -sum(t.score for t in TRAJECTORIES) / sum(t.length for t in TRAJECTORIES)


def paired(options: Options, f: Callable[[float], float]) -> float:
    """The first two are chosen over the last two."""
    total = 0.0
    for chosen, rejected in zip(TRAJECTORIES[:2], TRAJECTORIES[2:], strict=True):
        per = [t.length if options["normalize"] else 1 for t in (chosen, rejected)]
        margin = chosen.rho / per[0] - rejected.rho / per[1]
        z, wrong = options.get("beta", 1.0) * margin, options["label_smoothing"]
        total += (1 - wrong) * f(z) + wrong * f(-z)
        total += options["nll_coef"] * -chosen.score / chosen.length
    return total / 2


def ipo(options: Options) -> float:
    return paired(options, lambda margin: (margin - 1 / (2 * options["tau"])) ** 2)


def kto(options: Options) -> float:
    total = 0.0
    for t, label in zip(TRAJECTORIES, LABELS, strict=True):
        value = options["beta"] * (t.rho - Z0)
        sign, weight = (1, options["lambda_pos"]) if label else (-1, options["lambda_neg"])
        total += weight * (1 - sigmoid(sign * value))
    return total / 4


def pmpo(options: Options) -> float:
    """Two are accepted, two rejected; the KL is that of samples of the reference."""
    total = 0.0
    for t, label in zip(TRAJECTORIES, LABELS, strict=True):
        per = t.length if options["normalize"] else 1
        gaps = [p - r for p, r in zip(t.logps, t.reference, strict=True)]
        kl = sum(math.exp(gap) - 1 - gap for gap in gaps) / per
        weight = -options["alpha"] if label else 1 - options["alpha"]
        total += weight * t.score / per / 2 + options["beta"] * kl / 4
    return total


def dro_v(options: Options) -> float:
    tau, total = options["tau"], 0.0
    for t, reward, value in zip(TRAJECTORIES, REWARDS, VALUES, strict=True):
        residual = reward - value - tau * t.rho
        total += residual**2 / (2 * tau) + residual**2 / 2
    return total / 4


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


BY_HAND: dict[str, Callable[[Options], float]] = {
    "sft": sft,
    "raft": sft,
    "dpo": lambda o: paired(o, lambda z: math.log1p(math.exp(-z))),
    "cdpo": lambda o: paired(o, lambda z: math.log1p(math.exp(-z))),
    "ipo": ipo,
    "slic": lambda o: paired(o, lambda z: max(0.0, 1 - z)),
    "exponential": lambda o: paired(o, lambda z: math.exp(-z)),
    "truncated_quadratic": lambda o: paired(o, lambda z: max(0.0, 1 - z) ** 2),
    "squared": lambda o: paired(o, lambda z: (z - 1) ** 2),
    "savage": lambda o: paired(o, lambda z: sigmoid(-z) ** 2),
    "kto": kto,
    "pmpo": pmpo,
    "dro_v": dro_v,
}

CASES = [(method, option) for method in BY_HAND for option in (None, *METHODS[method].defaults)]
CASES = [(method, option) for method, option in CASES if option not in METHODS[method].choices]


@pytest.mark.parametrize(("method", "option"), CASES)
def test_every_option_moves_the_loss_to_its_value_by_hand(method: str, option: str | None) -> None:
    given = {} if option is None else {option: ELSEWHERE[option]}
    settings = TrainingSettings(method=method, learning_rate=1.0, **given)  # pyright: ignore[reportArgumentType]
    loss = METHODS[method].loss(scores(), settings.options).loss.item()
    assert loss == pytest.approx(BY_HAND[method](settings.options), rel=1e-9)
    default = METHODS[method].loss(scores(), METHODS[method].defaults).loss.item()
    assert (loss == pytest.approx(default, rel=1e-3)) is (option is None)


def test_only_methods_that_compare_two_models_are_left_to_tests_of_their_own() -> None:
    """Those of `tests/test_distill.py`, where the word options are, too."""
    assert METHODS.keys() - BY_HAND.keys() == {name for name in METHODS if METHODS[name].has_teacher}


def test_an_option_takes_values_of_its_own_type_only() -> None:
    with pytest.raises(InputError, match=r"normalize is 0\.5, expected bool"):
        TrainingSettings(method="ipo", learning_rate=1.0, normalize=0.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="beta is True, expected float"):
        TrainingSettings(method="dpo", learning_rate=1.0, beta=True)


def scores() -> Scores:
    """Prompt and tool output hold absurd values."""
    longest = max(map(len, LOGPS))
    mask = torch.tensor([[0] + [1] * len(logps) + [0] * (longest - len(logps)) for logps in LOGPS])
    logps, reference = (
        torch.full(mask.shape, 77.0, dtype=torch.float64).masked_scatter(
            mask.bool(), torch.tensor([value for row in values for value in row], dtype=torch.float64)
        )
        for values in (LOGPS, REFERENCE)
    )
    return Scores(
        logps=logps,
        mask=mask,
        sums=(logps * mask).sum(-1),
        ref_logps=reference,
        labels=torch.tensor(LABELS),
        z0=torch.tensor(Z0, dtype=torch.float64),
        desirable_share=torch.tensor(0.5),
        rewards=torch.tensor(REWARDS, dtype=torch.float64),
        values=torch.tensor(VALUES, dtype=torch.float64),
    )
