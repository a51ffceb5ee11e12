"""Show how the luck of a tool biases DPO on whole trajectories, and that values in the margin mend it.

    python -m recipes.random_tools

Of two actions one is safe, with utility 0.5, and one is risky: its tool answers in a tenth of the cases with utility
5, else with 0. Both are worth the same, so the best policy under a KL to the uniform reference takes each half of the
time, whatever beta is. Trajectory DPO on Bradley-Terry labels shuns the risky one, since its loss is not linear in the
margin; with (C - C') / beta added to the margin, C = u - E[u | action] the tool's luck, it does not.

Three times: solved exactly, by `mtpo.losses.paired_loss` on every pair with its probability, and by `paired_loss` on
drawn pairs with drawn labels, where E[u | action] is a value fitted to the same pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

import numpy as np
import torch
from torch import Tensor

from mtpo.cli import run_recipe
from mtpo.errors import InputError
from mtpo.losses import paired_loss
from mtpo.tabular import fit_dpo

MU = (0.5, 0.5)
CHANCES = ((1.0, 0.0), (0.1, 0.9))
"""Of each answer of the tool, a row an action: safe, risky."""
UTILITIES = ((0.5, 0.0), (5.0, 0.0))
BETAS = (0.1, 1.0)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Show how the luck of a tool biases DPO on whole trajectories, and that values in the margin mend it."""

    pairs: int = field(default=1_000_000, metadata={"help": "pairs of a draw"})
    draws: int = field(default=10, metadata={"help": "independent draws, for the spread"})
    seed: int = field(default=0, metadata={"help": "fixes the draws"})

    def __post_init__(self) -> None:
        if self.pairs < 1000:
            raise InputError(f"--pairs must be at least 1000, got {self.pairs}")
        if self.draws < 2:
            raise InputError(f"--draws must be at least 2, got {self.draws}")


@dataclass(frozen=True)
class Pairs:
    """Pairs of trajectories, each an action and an answer of its tool; those that are alike are one entry."""

    actions: Tensor
    """(P, 2), int64."""
    utilities: Tensor
    """(P, 2)."""
    pref_prob: Tensor
    """(P,), how often the first was preferred."""
    weights: Tensor
    """(P,), the share of such pairs."""

    @classmethod
    def enumerated(cls) -> Pairs:
        """Every pair with its probability and that of its label, sigmoid(u - u')."""
        weight = (np.array(MU)[:, None] * CHANCES).ravel()
        first, second = (axis.ravel() for axis in np.indices((len(weight), len(weight))))
        both = torch.tensor(np.stack([first, second], axis=1))  # (P, 2), trajectories
        utilities = torch.tensor(UTILITIES, dtype=torch.float64).ravel()[both]
        pref_prob = torch.sigmoid(utilities[:, 0] - utilities[:, 1])
        return cls(both // len(CHANCES[0]), utilities, pref_prob, torch.tensor(weight)[both].prod(dim=1))

    def drawn(self, count: int, rng: np.random.Generator) -> Pairs:
        """`count` pairs drawn by their weights, with a drawn label each."""
        counts = rng.multinomial(count, self.weights.numpy())
        wins = rng.binomial(counts, self.pref_prob.numpy())
        return Pairs(
            self.actions,
            self.utilities,
            torch.tensor(wins / np.maximum(counts, 1)),
            torch.tensor(counts / count),
        )

    def values(self) -> Tensor:
        """(n,), the mean utility of each action: what `value_loss` fits to these trajectories."""
        weights = torch.stack([self.weights, self.weights], dim=1).ravel()
        actions, size = self.actions.ravel(), len(MU)
        total = torch.zeros(size, dtype=torch.float64).index_add(0, actions, weights * self.utilities.ravel())
        return total / torch.zeros(size, dtype=torch.float64).index_add(0, actions, weights)


def main(argv: Sequence[str] | None = None) -> int:
    return run_recipe(Config, show, "recipes.random_tools", argv)


def show(config: Config) -> str:
    print(random_tools_table(config.pairs, config.draws, config.seed))
    return f"{config.draws} draws of {config.pairs:,} pairs for each of {len(BETAS)} values of beta"


def random_tools_table(num_pairs: int = 1_000_000, num_draws: int = 10, seed: int = 0) -> str:
    """A markdown table of P(risky), a row a beta; without and with values in the margin, for each way to fit."""
    lines = [
        "",
        f"| P(risky), optimum 0.5 | exact | with values | paired_loss | with values "
        f"| {num_pairs:,} drawn pairs | with fitted values |",
        "|---|---|---|---|---|---|---|",
    ]
    pairs = Pairs.enumerated()
    for beta in BETAS:
        exact = [fit_dpo(MU, CHANCES, UTILITIES, beta, value_offset=offset)[1] for offset in (False, True)]
        enumerated = [fit_paired_loss(pairs, beta, values)[1].item() for values in (None, pairs.values())]
        rng = np.random.default_rng(seed)
        draws = [pairs.drawn(num_pairs, rng) for _ in range(num_draws)]
        plain = [fit_paired_loss(draw, beta)[1].item() for draw in draws]
        mended = [fit_paired_loss(draw, beta, draw.values())[1].item() for draw in draws]
        cells = [f"{x:.4f}" for x in (*exact, *enumerated)]
        cells += [f"{fmean(found):.4f} ± {stdev(found):.4f}" for found in (plain, mended)]
        lines.append(f"| beta {beta} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def fit_paired_loss(pairs: Pairs, beta: float, values: Tensor | None = None) -> Tensor:
    """The policy (n,) with the smallest `paired_loss` on these pairs, by L-BFGS on its logits.

    Args:
        values: (n,), estimates of E[u | action]; with them the margin gets the offset (C - C') / beta.
    """
    log_mu = torch.tensor(MU, dtype=torch.float64).log()
    logits = torch.zeros_like(log_mu, requires_grad=True)
    luck = torch.zeros_like(pairs.utilities) if values is None else pairs.utilities - values[pairs.actions]
    offset = (luck[:, 0] - luck[:, 1]) / beta
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        rho = (logits.log_softmax(0) - log_mu)[pairs.actions]  # (P, 2)
        weights = pairs.weights * len(pairs.weights)  # paired_loss divides by the number of pairs
        out = paired_loss(
            rho[:, 0], rho[:, 1], "logistic", beta, pref_prob=pairs.pref_prob, offset=offset, weights=weights
        )
        out.loss.backward()
        return out.loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType] - the stub wants a float
    return logits.detach().softmax(0)


if __name__ == "__main__":
    raise SystemExit(main())
