"""The online losses on games whose answer is known: sampled pairs, softmax logits, no network."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from mtpo.losses import (
    geometric_mixture,
    paired_loss,
    policy_gradient_loss,
    reward_to_go,
    turn_gae,
    value_loss,
)
from mtpo.tabular import cyclic_preference, exploitability

TAU = 0.25
REF_COEF = 0.25
TILTED = [0.37554216, 0.50147067, 0.12298717]
"""With this reference (0.5, 0.3, 0.2) is the Nash policy of the cycle at TAU; with the uniform one, uniform is."""
GAMES = {"uniform": [1 / 3, 1 / 3, 1 / 3], "tilted": TILTED}
BATCH = 512
STEPS = 200
ALL = torch.ones(BATCH, 1, dtype=torch.bool)


class Game:
    """A policy to train, and batches of single-token answers with the probability that the first one wins."""

    def __init__(self, mu: list[float]) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.preference = torch.tensor(cyclic_preference())
        self.log_mu = torch.tensor(mu, dtype=torch.float64).log()
        self.logits = torch.tensor([1.5, -1.0, 0.0], dtype=torch.float64, requires_grad=True)
        self.value = torch.zeros(1, dtype=torch.float64, requires_grad=True)

    def mixture(self, ref_coef: float) -> Tensor:
        return geometric_mixture(self.logits.detach(), self.log_mu, ref_coef)[0]

    def draw(self, logps: Tensor) -> Tensor:
        return torch.multinomial(logps.exp(), BATCH, replacement=True, generator=self.generator)

    def logps(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits.log_softmax(0)[actions], self.log_mu[actions]


def online_ipo(game: Game, ref_coef: float = 0.0) -> Tensor:
    """Both answers from the policy (7.1), or from its mixture with the reference (IPO-MD, 7.2)."""
    first, second = (game.draw(game.mixture(ref_coef)) for _ in range(2))
    rhos = [policy - reference for policy, reference in map(game.logps, (first, second))]
    wins = game.preference[first, second]
    # The gradient of IPO is 4 / tau times that of the game; the factor gives all methods one learning rate.
    return paired_loss(rhos[0], rhos[1], "ipo", tau=TAU, pref_prob=wins).loss * TAU / 4


def ipo_md(game: Game) -> Tensor:
    return online_ipo(game, REF_COEF)


def nash_md_pg(game: Game) -> Tensor:
    """One answer from the policy, its opponent from the mixture (7.3)."""
    first, second = game.draw(game.mixture(0.0)), game.draw(game.mixture(REF_COEF))
    policy, reference = (x[:, None] for x in game.logps(first))
    penalty = TAU * reward_to_go((policy - reference).detach(), ALL)
    weight = game.preference[first, second][:, None] - 0.5 - penalty
    return policy_gradient_loss(policy, ALL, weight, BATCH).loss


def mtpo(game: Game) -> Tensor:
    """Both answers from the policy, each the other's opponent, against a learned value (7.4)."""
    first, second = (game.draw(game.mixture(0.0)) for _ in range(2))
    total = torch.zeros((), dtype=torch.float64)
    for own, other in ((first, second), (second, first)):
        policy, reference = (x[:, None] for x in game.logps(own))
        rewards = game.preference[own, other][:, None] - TAU * (policy - reference).detach()
        values = game.value.expand(BATCH)[:, None]
        advantages, returns = turn_gae(rewards, values, ALL, lam=0.95)
        total = total + policy_gradient_loss(policy, ALL, advantages, 2 * BATCH).loss
        total = total + value_loss(values, returns, ALL).loss / 4
    return total


def train(game: Game, loss: Callable[[Game], Tensor]) -> np.ndarray:
    optimizer = torch.optim.SGD([game.logits, game.value], lr=1.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(game).backward()
        optimizer.step()
        schedule.step()
    return game.logits.detach().softmax(0).numpy()


@pytest.mark.parametrize("mu", GAMES)
@pytest.mark.parametrize("loss", [online_ipo, mtpo])
def test_sampled_gradients_of_self_play_reach_the_nash_policy(
    loss: Callable[[Game], Tensor], mu: str
) -> None:
    game = Game(GAMES[mu])
    start = game.logits.detach().softmax(0).numpy()
    assert exploitability(start, cyclic_preference(), GAMES[mu], TAU) > 0.1
    assert exploitability(train(game, loss), cyclic_preference(), GAMES[mu], TAU) < 5e-4


@pytest.mark.parametrize("mu", GAMES)
@pytest.mark.parametrize("loss", [ipo_md, nash_md_pg])
def test_sampled_gradients_against_the_mixture_reach_its_fixed_point(
    loss: Callable[[Game], Tensor], mu: str
) -> None:
    """Where the mixture of policy and reference is the Nash policy at temperature tau / (1 - ref_coef)."""
    game = Game(GAMES[mu])
    train(game, loss)
    mixture = game.mixture(REF_COEF).exp().numpy()
    assert exploitability(mixture, cyclic_preference(), GAMES[mu], TAU / (1 - REF_COEF)) < 2e-4
