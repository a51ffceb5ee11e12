import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from mtpo.errors import InputError, MtpoError
from mtpo.losses import paired_loss
from mtpo.tabular import (
    additive_preference,
    best_response,
    contraction_limit,
    cyclic_preference,
    decreasing_step,
    exploitability,
    fit_dpo,
    geometric_policy,
    ipo_md_step,
    mtpo_bound,
    mtpo_gap_bound,
    mtpo_step,
    nash_md_bound,
    nash_md_step,
    reference_for,
    rlhf_step,
    solve_nash,
)

RPS = np.array([[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]])
TILTED = np.array([0.37554216, 0.50147067, 0.12298717])
"""The reference for which (0.5, 0.3, 0.2) is the Nash policy of RPS at temperature 0.25."""
UNIFORM = np.full(3, 1 / 3)


def random_game(
    seed: int, num_actions: int, kind: str = "any", spread: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """A preference and a reference; a small `spread` makes a reference that hardly plays some actions."""
    rng = np.random.default_rng(seed)
    upper = rng.random((num_actions, num_actions))
    if kind == "tournament":
        upper = np.round(upper)
    elif kind == "ties":
        upper = np.round(2 * upper) / 2
    preference = np.triu(upper, 1) + np.tril(1 - upper.T, -1) + np.eye(num_actions) / 2
    return preference, rng.dirichlet(np.full(num_actions, spread)) * (1 - 1e-9) + 1e-9 / num_actions


def gap_by_the_book(pi: np.ndarray, preference: np.ndarray, mu: np.ndarray, tau: float) -> float:
    """tau logsumexp(log mu + P pi / tau) - (pi.P.pi - tau KL(pi || mu)), for policies without zeros."""
    best = tau * np.logaddexp.reduce(np.log(mu) + preference @ pi / tau)
    return best - (pi @ preference @ pi - tau * kl(pi, mu))


def kl(pi: np.ndarray, other: np.ndarray) -> float:
    return float(pi @ (np.log(pi) - np.log(other)))


def iterate(step: Callable, pi: np.ndarray, times: int, *args: Any) -> np.ndarray:
    for _ in range(times):
        pi = step(pi, *args)
    return pi


def test_one_step_is_the_one_computed_by_hand() -> None:
    pi, preference = [0.6, 0.3, 0.1], cyclic_preference(3, 5 / 9)
    mixture = geometric_policy(pi, UNIFORM, 0.1 * 5)
    assert_allclose(mixture, [0.472734, 0.334273, 0.192993], atol=1e-6)
    assert_allclose(nash_md_step(pi, preference, UNIFORM, 0.1, 5), [0.490920, 0.308820, 0.200260], atol=1e-6)
    assert_allclose(mtpo_step(pi, preference, UNIFORM, 0.1, 5), [0.499525, 0.290801, 0.209674], atol=1e-6)


@pytest.mark.parametrize("tau", [1e-3, 0.1, 1, 100])
@pytest.mark.parametrize(("num_actions", "win"), [(3, 1.0), (3, 5 / 9), (4, 0.8), (7, 1.0)])
def test_a_cycle_is_played_uniformly(num_actions: int, win: float, tau: float) -> None:
    uniform = np.full(num_actions, 1 / num_actions)
    assert_allclose(solve_nash(cyclic_preference(num_actions, win), uniform, tau), uniform, atol=1e-12)


@pytest.mark.parametrize("tau", [0.02, 0.3, 100])
def test_two_actions_have_the_odds_of_the_closed_form(tau: float) -> None:
    mu, p = np.array([0.9, 0.1]), 0.3
    pi = solve_nash([[0.5, p], [1 - p, 0.5]], mu, tau)
    assert np.log(pi[0] / pi[1]) == pytest.approx(np.log(9) + (p - 0.5) / tau, rel=1e-9)


def test_a_verifier_is_tilted_by_half_its_reward() -> None:
    right, mu, tau = np.array([1.0, 0, 0, 1, 0]), np.array([0.1, 0.3, 0.2, 0.2, 0.2]), 0.15
    target = mu * np.exp(right / (2 * tau))
    assert_allclose(solve_nash(additive_preference(right / 2), mu, tau), target / target.sum(), rtol=1e-10)


def test_the_reference_for_a_target_is_the_published_one_and_gives_the_target_back() -> None:
    assert_allclose(reference_for([0.5, 0.3, 0.2], RPS, 0.25), TILTED, atol=1e-8)
    assert_allclose(solve_nash(RPS, TILTED, 0.25), [0.5, 0.3, 0.2], atol=1e-7)
    preference, target = random_game(3, 12)
    for tau in (0.05, 1.0, 30.0):
        found = solve_nash(preference, reference_for(target, preference, tau), tau)
        assert_allclose(found, target, rtol=1e-8)


@pytest.mark.parametrize("tau", [1e-3, 1e-2, 0.3, 1e2])
@pytest.mark.parametrize("kind", ["any", "tournament", "ties"])
@pytest.mark.parametrize(("num_actions", "spread"), [(2, 1.0), (5, 0.1), (40, 1.0)])
def test_any_game_is_solved_at_any_temperature(
    num_actions: int, spread: float, kind: str, tau: float
) -> None:
    preference, mu = random_game(num_actions, num_actions, kind, spread)
    pi = solve_nash(preference, mu, tau)
    logits = np.log(mu) + preference @ pi / tau
    assert_allclose(pi, np.exp(logits - np.logaddexp.reduce(logits)), atol=1e-9)
    assert 0 <= exploitability(pi, preference, mu, tau) < 1e-12


def test_a_game_of_three_hundred_actions_is_solved() -> None:
    preference, mu = random_game(0, 300, "tournament")
    pi = solve_nash(preference, mu, 0.01)
    logits = np.log(mu) + preference @ pi / 0.01
    assert_allclose(pi, np.exp(logits - np.logaddexp.reduce(logits)), atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), num_actions=st.integers(1, 8), log_tau=st.floats(-1.5, 1.5))
def test_the_gap_is_what_the_best_response_wins_and_vanishes_at_the_nash_policy_only(
    seed: int, num_actions: int, log_tau: float
) -> None:
    preference, mu = random_game(seed, num_actions)
    tau, pi = 10**log_tau, np.random.default_rng(seed + 1).dirichlet(np.ones(num_actions))
    gap, nash = exploitability(pi, preference, mu, tau), solve_nash(preference, mu, tau)
    assert gap == pytest.approx(gap_by_the_book(pi, preference, mu, tau), rel=1e-9, abs=1e-11)
    response = best_response(pi, preference, mu, tau)
    assert gap == pytest.approx(tau * kl(pi, response), rel=1e-9, abs=1e-11)
    # The Nash policy itself wins tau KL(pi || Nash) against pi, so the best response wins no less.
    assert gap >= tau * kl(pi, nash) - 1e-11
    assert exploitability(nash, preference, mu, tau) < 1e-12


def test_the_best_response_beats_every_other_policy() -> None:
    preference, mu = random_game(5, 6)
    pi, tau = np.random.default_rng(0).dirichlet(np.ones(6)), 0.2

    def payoff(other: np.ndarray) -> float:
        return float(other @ preference @ pi - tau * kl(other, mu))

    best = payoff(best_response(pi, preference, mu, tau))
    others = [*np.random.default_rng(1).dirichlet(np.ones(6), 200), mu, solve_nash(preference, mu, tau)]
    assert all(payoff(other) < best for other in others)


def test_mtpo_with_a_constant_step_ends_at_the_nash_policy() -> None:
    preference, mu = random_game(11, 6)
    tau, nash = 0.2, solve_nash(preference, mu, 0.2)
    assert_allclose(mtpo_step(nash, preference, mu, tau, 0.7), nash, rtol=1e-12)
    eta = contraction_limit(nash, preference, tau) / 2
    assert_allclose(iterate(mtpo_step, mu, 300, preference, mu, tau, eta), nash, rtol=1e-9)


def test_mtpo_contracts_below_the_limit_and_orbits_above() -> None:
    tau = 0.1
    limit = contraction_limit(UNIFORM, RPS, tau)
    assert limit == pytest.approx(2 * tau / (tau**2 + 0.2887**2), rel=1e-3)  # 0.2887: the cycle's rotation
    near = np.array([0.334, 0.333, 0.333])
    below = iterate(mtpo_step, near, 400, RPS, UNIFORM, tau, 0.97 * limit)
    above = iterate(mtpo_step, near, 400, RPS, UNIFORM, tau, 1.03 * limit)
    assert kl(below, UNIFORM) < kl(near, UNIFORM) / 100
    assert kl(above, UNIFORM) > kl(near, UNIFORM) * 100
    assert contraction_limit(UNIFORM, RPS, 2.0) == 1 / 2  # larger steps are no mixture


def test_nash_md_with_a_constant_step_ends_elsewhere_and_its_mixture_at_a_higher_temperature() -> None:
    tau, eta = 0.25, 1.0
    pi = iterate(nash_md_step, TILTED, 500, RPS, TILTED, tau, eta)
    assert_allclose(nash_md_step(pi, RPS, TILTED, tau, eta), pi, atol=1e-12)
    assert exploitability(pi, RPS, TILTED, tau) > 1e-3
    mixture = geometric_policy(pi, TILTED, tau * eta)
    assert_allclose(mixture, solve_nash(RPS, TILTED, tau / (1 - tau * eta)), rtol=1e-9)


@pytest.mark.parametrize("ref_coef", [0.0, 0.125, 0.5])
def test_ipo_md_ends_where_its_mixture_is_the_nash_policy_of_a_higher_temperature(ref_coef: float) -> None:
    tau = 0.25
    pi = iterate(ipo_md_step, TILTED, 1000, RPS, TILTED, tau, 0.4, ref_coef)
    mixture = geometric_policy(pi, TILTED, ref_coef)
    assert_allclose(mixture, solve_nash(RPS, TILTED, tau / (1 - ref_coef)), rtol=1e-9)
    assert_allclose(pi, best_response(mixture, RPS, TILTED, tau), rtol=1e-9)


def test_an_ipo_md_step_of_one_over_tau_solves_the_regression_of_ipo() -> None:
    preference, mu = random_game(2, 5)
    pi, tau, ref_coef = np.random.default_rng(0).dirichlet(np.ones(5)), 0.3, 0.4
    mixture = pi ** (1 - ref_coef) * mu**ref_coef
    weights = np.outer(mixture, mixture).ravel() / mixture.sum() ** 2
    rows = (np.eye(5)[:, None] - np.eye(5)[None, :]).reshape(25, 5)  # the margin of pair (i, j)
    targets = (2 * preference.ravel() - 1) / (2 * tau)
    root = np.sqrt(weights)
    log_ratio = np.linalg.lstsq(rows * root[:, None], targets * root, rcond=None)[0]
    fitted = mu * np.exp(log_ratio)
    assert_allclose(ipo_md_step(pi, preference, mu, tau, 1 / tau, ref_coef), fitted / fitted.sum(), rtol=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_decreasing_steps_lead_to_the_nash_policy_below_the_bounds(seed: int, tau: float) -> None:
    preference, mu = random_game(seed, 5)
    nash = solve_nash(preference, mu, tau)
    mtpo = nash_md = mu
    for t in range(400):
        assert decreasing_step(t, tau) == pytest.approx(2 / (tau * (t + 2)))
        mtpo = mtpo_step(mtpo, preference, mu, tau, 2 / (tau * (t + 2)))
        nash_md = nash_md_step(nash_md, preference, mu, tau, 2 / (tau * (t + 2)))
        assert kl(nash, mtpo) <= 32 / (tau**2 * (t + 2)) == pytest.approx(mtpo_bound(t + 1, tau))
        assert kl(nash, nash_md) <= 8 / (tau**2 * (t + 2)) == pytest.approx(nash_md_bound(t + 1, tau))
        assert exploitability(mtpo, preference, mu, tau) <= mtpo_gap_bound(t + 1, tau)
    assert exploitability(mtpo, preference, mu, tau) < 1e-5
    assert exploitability(nash_md, preference, mu, tau) < 1e-3


def test_rlhf_ends_at_the_tilt_of_its_reward() -> None:
    reward, tau = np.array([1.0, 0.2, 0.0]), 0.5
    pi = iterate(rlhf_step, UNIFORM, 200, reward, TILTED, tau, 0.5)
    target = TILTED * np.exp(reward / tau)
    assert_allclose(pi, target / target.sum(), rtol=1e-10)


def test_actions_that_the_reference_never_plays_do_not_exist() -> None:
    preference, mu = random_game(4, 4)
    wide = np.full((5, 5), 0.5)
    wide[:4, :4] = preference
    wide[4, :4], wide[:4, 4] = 1.0, 0.0  # it would always win
    nash = solve_nash(wide, [*mu, 0.0], 0.1)
    assert_allclose(nash, [*solve_nash(preference, mu, 0.1), 0.0], atol=1e-12)
    for step in (mtpo_step, nash_md_step):
        assert_allclose(step([*mu, 0.0], wide, [*mu, 0.0], 0.1, 1.0)[:4], step(mu, preference, mu, 0.1, 1.0))
    with pytest.raises(InputError, match=r"^pi\[4\] is 1, but mu is 0 there: expected 0$"):
        exploitability([0, 0, 0, 0, 1], wide, [*mu, 0.0], 0.1)


def test_a_probability_that_underflowed_comes_back() -> None:
    pi = iterate(mtpo_step, np.array([1.0, 0, 0]), 400, RPS, TILTED, 0.25, 1.0)
    assert_allclose(pi, [0.5, 0.3, 0.2], atol=1e-6)
    assert exploitability([1.0, 0, 0], RPS, TILTED, 0.25) == pytest.approx(
        0.25 * np.log(TILTED @ np.exp(RPS[:, 0] / 0.25)) - (0.5 + 0.25 * np.log(TILTED[0]))
    )


def test_the_gap_of_a_policy_that_hardly_plays_the_best_action_is_finite() -> None:
    always = exploitability([1.0, 0, 0], RPS, TILTED, 0.25)
    assert exploitability([1.0, 1e-320, 1e-320], RPS, TILTED, 0.25) == pytest.approx(always, rel=1e-12)


def test_policies_in_float32_count_as_if_they_summed_to_one() -> None:
    pi = np.array([0.6, 0.3, 0.1])
    exact = exploitability(pi, RPS, TILTED, 0.25)
    assert exploitability(pi * (1 + 5e-7), RPS, TILTED, 0.25) == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize(
    ("preference", "mu", "tau", "complaint"),
    [
        ([[0.5, 0.2, 0.1]], [1.0], 0.1, r"preference must be a square matrix, got shape \(1, 3\)"),
        ([[0.5, 0.5], [0.5]], [1.0], 0.1, "preference is no array of numbers"),
        ([[0.5, 0.9], [0.2, 0.5]], [0.5, 0.5], 0.1, r"preference\[0, 1\] \+ preference\[1, 0\] is 1.1, expe"),
        ([[0.6]], [1.0], 0.1, r"preference\[0, 0\] \+ preference\[0, 0\] is 1.2, expected 1"),
        ([[np.nan]], [1.0], 0.1, "preference holds a value that is not finite"),
        (RPS, [0.5, 0.5], 0.1, r"mu must have shape \(3,\), got \(2,\)"),
        (RPS, [0.5, 0.6, -0.1], 0.1, r"mu\[2\] is -0.1, expected a probability"),
        (RPS, [0.5, 0.6, np.nan], 0.1, r"mu\[2\] is nan, expected a probability"),
        (RPS, [0.5, 0.3, 0.3], 0.1, "mu sums to 1.1, expected 1"),
        (RPS, UNIFORM, 0.0, "tau must be positive and finite, got 0.0"),
        (RPS, UNIFORM, -1.0, "tau must be positive and finite, got -1.0"),
        (RPS, UNIFORM, float("nan"), "tau must be positive and finite, got nan"),
    ],
)
def test_what_is_no_game_is_refused(preference: list, mu: list, tau: float, complaint: str) -> None:
    with pytest.raises(InputError, match=r"^" + complaint) as solved:
        solve_nash(preference, mu, tau)
    assert "\n" not in str(solved.value)
    for function in (best_response, exploitability):
        with pytest.raises(InputError, match=r"^" + complaint):
            function(mu, preference, mu, tau)
    for step in (mtpo_step, nash_md_step):
        with pytest.raises(InputError, match=r"^" + complaint):
            step(mu, preference, mu, tau, 0.1)


def test_a_temperature_too_small_for_float64_is_an_error_and_no_policy() -> None:
    preference, mu = random_game(0, 10)
    with pytest.raises(
        MtpoError, match=r"^no Nash policy found at tau 1e-13: the best policy can still be exp"
    ):
        solve_nash(preference, mu, 1e-13)


def test_policies_and_steps_that_are_none_are_refused() -> None:
    with pytest.raises(InputError, match=r"^pi sums to 0.9, expected 1"):
        mtpo_step([0.5, 0.2, 0.2], RPS, UNIFORM, 0.1, 0.1)
    with pytest.raises(InputError, match=r"^eta must be positive and finite, got 0.0"):
        nash_md_step(UNIFORM, RPS, UNIFORM, 0.1, 0)
    with pytest.raises(InputError, match=r"^ref_coef must be in \[0, 1\], got 1.5"):
        ipo_md_step(UNIFORM, RPS, UNIFORM, 0.1, 0.1, 1.5)
    with pytest.raises(InputError, match=r"^a cycle needs at least 3 actions, got 2"):
        cyclic_preference(2)


SAFE_OR_RISKY = {"chances": [[1, 0], [0.1, 0.9]], "utilities": [[0.5, 0.0], [5.0, 0.0]]}


@pytest.mark.parametrize(("beta", "risky"), [(0.1, 0.0784), (1.0, 0.4387)])
def test_random_tools_bias_trajectory_dpo_and_values_in_the_margin_mend_it(beta: float, risky: float) -> None:
    """Both actions have the mean utility 0.5, so the optimum is the uniform reference."""
    assert fit_dpo([0.5, 0.5], **SAFE_OR_RISKY, beta=beta)[1] == pytest.approx(risky, abs=5e-5)
    mended = fit_dpo([0.5, 0.5], **SAFE_OR_RISKY, beta=beta, value_offset=True)
    assert_allclose(mended, [0.5, 0.5], atol=1e-10)


@pytest.mark.parametrize("value_offset", [False, True])
def test_the_fit_is_where_the_gradient_of_the_training_loss_vanishes(value_offset: bool) -> None:
    rng, beta = np.random.default_rng(0), 0.7
    mu, chances = rng.dirichlet(np.ones(4)), rng.dirichlet(np.ones(3), 4)
    utilities = rng.normal(size=(4, 3))
    pi = fit_dpo(mu, chances, utilities, beta, value_offset=value_offset)
    log_ratio = torch.tensor(np.log(pi / mu), requires_grad=True)
    action, answer = (torch.tensor(a.ravel()) for a in np.indices((4, 3)))
    first, second = torch.cartesian_prod(torch.arange(12), torch.arange(12)).T
    weight = torch.tensor((mu[:, None] * chances).ravel())
    utility = torch.tensor(utilities)[action, answer]
    luck = utility - torch.tensor((chances * utilities).sum(1))[action]
    out = paired_loss(
        log_ratio[action[first]],
        log_ratio[action[second]],
        "logistic",
        beta=beta,
        pref_prob=torch.sigmoid(utility[first] - utility[second]),
        offset=(luck[first] - luck[second]) / beta if value_offset else 0.0,
        weights=144 * weight[first] * weight[second],
    )
    out.loss.backward()
    assert log_ratio.grad is not None and log_ratio.grad.abs().max() < 1e-10
    optimum = mu * np.exp((chances * utilities).sum(1) / beta)
    assert np.allclose(pi, optimum / optimum.sum(), atol=1e-8) == value_offset


@pytest.mark.parametrize("seed", [2, 3, 4, 9])
def test_values_in_the_margin_mend_large_utilities_too(seed: int) -> None:
    rng = np.random.default_rng(seed)
    chances = rng.dirichlet(np.ones(3), 4)
    utilities = 10 * (rng.normal(size=(4, 3)) + rng.normal(size=(4, 1)))
    optimum = np.exp((chances * utilities).sum(axis=1))
    fitted = fit_dpo(np.full(4, 0.25), chances, utilities, 1.0, value_offset=True)
    assert_allclose(fitted, optimum / optimum.sum(), atol=1e-6)


def test_the_tables_need_no_torch() -> None:
    code = "import sys, mtpo.tabular; print('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert run.stdout.strip() == "False"
