import numpy as np
import pytest
import torch

from mtpo.losses import value_loss
from recipes.random_tools import Pairs, fit_paired_loss, main, random_tools_table

SHARE = {0.1: 0.0784, 1.0: 0.4387}
"""P(risky) at each beta: the risky action is preferred with p = 0.1 sigmoid(4.5) + 0.9 sigmoid(-0.5) = 0.4387, and
DPO's margin becomes logit(p) / beta. The objective asks for 0.5."""


@pytest.mark.parametrize("beta", SHARE)
def test_paired_loss_is_biased_by_luck_and_values_in_its_margin_mend_it(beta: float) -> None:
    pairs = Pairs.enumerated()
    assert fit_paired_loss(pairs, beta)[1].item() == pytest.approx(SHARE[beta], abs=5e-5)
    mended = fit_paired_loss(pairs, beta, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert mended.tolist() == pytest.approx([0.5, 0.5], abs=1e-6)


def test_values_fitted_to_drawn_pairs_mend_what_is_fitted_to_the_same_pairs() -> None:
    pairs = Pairs.enumerated().drawn(4_000_000, np.random.default_rng(1))
    assert pairs.values().tolist() == pytest.approx([0.5, 0.5], abs=4 * 1.5 / 2000)  # four standard errors
    assert fit_paired_loss(pairs, 0.1)[1].item() == pytest.approx(SHARE[0.1], abs=0.005)
    assert fit_paired_loss(pairs, 0.1, pairs.values())[1].item() == pytest.approx(0.5, abs=0.02)


def test_values_are_where_the_value_loss_is_smallest() -> None:
    pairs = Pairs.enumerated().drawn(1000, np.random.default_rng(0))
    counts = (pairs.weights * 1000).round().long()
    actions, returns = (x.repeat_interleave(counts, dim=0).ravel() for x in (pairs.actions, pairs.utilities))
    values = pairs.values().requires_grad_()
    every = torch.ones(len(actions), 1, dtype=torch.bool)
    value_loss(values[actions][:, None], returns[:, None], every).loss.backward()
    assert values.grad is not None
    assert values.grad.abs().max() < 1e-12


def test_the_table_has_all_three_ways_and_the_same_draws_again() -> None:
    table = random_tools_table(200_000, 2, seed=3)
    assert "| beta 0.1 | 0.0784 | 0.5000 | 0.0784 | 0.5000 | 0.0" in table
    assert "| beta 1.0 | 0.4387 | 0.5000 | 0.4387 | 0.5000 | 0.4" in table
    assert table == random_tools_table(200_000, 2, seed=3) != random_tools_table(200_000, 2, seed=4)


def test_the_recipe_prints_it_and_bad_options_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--pairs", "1000", "--draws", "2"]) == 0
    assert capsys.readouterr().out.endswith("\n2 draws of 1,000 pairs for each of 2 values of beta\n")
    assert main(["--pairs", "10"]) == 1
    assert capsys.readouterr().err == "error: --pairs must be at least 1000, got 10\n"
