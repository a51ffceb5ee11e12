from collections.abc import Callable

import numpy as np
import pytest
from numpy.testing import assert_allclose

from mtpo.errors import InputError
from mtpo.tabular import (
    TreeGame,
    decreasing_step,
    exploitability,
    mtpo_bound,
    mtpo_step,
    mtpo_tau_tree_step,
    mtpo_tree_step,
    nash_md_step,
    rlhf_step,
    rlhf_tree_step,
    solve_nash,
    solve_tree_nash,
    tree_action_values,
    tree_best_response,
    tree_divergence,
    tree_exploitability,
    tree_outcomes,
    tree_soft_optimum,
)


def random_preference(rng: np.random.Generator, size: int) -> np.ndarray:
    upper = rng.random((size, size))
    return np.triu(upper, 1) + np.tril(1 - upper.T, -1) + np.eye(size) / 2


def branching_tree(seed: int) -> tuple[TreeGame, np.ndarray]:
    """Deterministic tools: two first actions, then three answers each; and mu of the six final states."""
    rng = np.random.default_rng(seed)
    first, second = rng.dirichlet(np.ones(2)), rng.dirichlet(np.ones(3), 2)
    mu = np.array([[*first, 0.0], *second])
    transitions = np.zeros((3, 3, 3 + 6))
    transitions[0, 0, 1] = transitions[0, 1, 2] = 1
    for final in range(6):
        transitions[1 + final // 3, final % 3, 3 + final] = 1
    return TreeGame(transitions, mu, random_preference(rng, 6)), (first[:, None] * second).ravel()


def random_tree(seed: int) -> TreeGame:
    """Random tools: four states up to three turns deep, ragged actions, five final states."""
    rng = np.random.default_rng(seed)
    mu, transitions = rng.dirichlet(np.ones(3), 4), np.zeros((4, 3, 9))
    mu[1] = [0.3, 0.7, 0.0]
    for state, later in enumerate(([1, 2], [3], [], [])):
        targets = [*later, *range(4, 9)]
        transitions[state][:, targets] = rng.dirichlet(np.full(len(targets), 0.4), 3)
    return TreeGame(transitions, mu, random_preference(rng, 5))


def random_policy(game: TreeGame, seed: int) -> np.ndarray:
    weights = np.random.default_rng(seed).random(game.mu.shape) * (game.mu > 0)
    return weights / weights.sum(axis=1, keepdims=True)


def trajectories(pi: np.ndarray, game: TreeGame) -> list[tuple[float, float, int]]:
    """(probability, log pi / mu, final state) of every path from the root, by walking all of them."""
    done, open_paths = [], [(1.0, 0.0, 0)]
    while open_paths:
        probability, log_ratio, node = open_paths.pop()
        if node >= game.num_states:
            done.append((probability, log_ratio, node - game.num_states))
            continue
        for action in np.flatnonzero(game.mu[node] > 0):
            for target in np.flatnonzero(game.transitions[node, action]):
                chance = pi[node, action] * game.transitions[node, action, target]
                ratio = log_ratio + np.log(pi[node, action] / game.mu[node, action])
                open_paths.append((probability * chance, ratio, int(target)))
    return done


def value_by_walking(pi: np.ndarray, game: TreeGame, reward: np.ndarray, tau: float) -> float:
    return sum(p * (reward[final] - tau * ratio) for p, ratio, final in trajectories(pi, game))


def soft_bellman(game: TreeGame, reward: np.ndarray, tau: float, node: int = 0) -> float:
    """tau log E_mu exp(Q / tau), recursively: the root value of the best response to a reward."""
    if node >= game.num_states:
        return float(reward[node - game.num_states])
    q = [
        sum(p * soft_bellman(game, reward, tau, target) for target, p in enumerate(row) if p)
        for row in game.transitions[node]
    ]
    return float(tau * np.log(game.mu[node] @ np.exp(np.array(q) / tau)))


def test_one_turn_is_the_flat_game() -> None:
    rng = np.random.default_rng(0)
    preference, mu, pi = random_preference(rng, 6), rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    game, tau, eta, reward = TreeGame.one_turn(preference, mu), 0.2, 1.3, rng.random(6)
    assert_allclose(mtpo_tree_step(pi[None], game, tau, eta)[0], mtpo_step(pi, preference, mu, tau, eta))
    assert_allclose(
        mtpo_tau_tree_step(pi[None], game, tau, eta)[0], nash_md_step(pi, preference, mu, tau, eta)
    )
    assert_allclose(rlhf_tree_step(pi[None], game, reward, tau, eta)[0], rlhf_step(pi, reward, mu, tau, eta))
    gap = exploitability(pi, preference, mu, tau)
    assert tree_exploitability(pi[None], game, tau) == pytest.approx(gap, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tau", [0.02, 0.3, 5.0])
def test_with_deterministic_tools_the_tree_is_the_flat_game_on_its_final_states(
    seed: int, tau: float
) -> None:
    game, mu = branching_tree(seed)
    flat = solve_nash(game.preference, mu, tau)
    pi = solve_tree_nash(game, tau)
    assert_allclose(tree_outcomes(pi, game), flat, atol=1e-10)
    joint = flat.reshape(2, 3)
    assert_allclose(pi[0], [*joint.sum(axis=1), 0.0], atol=1e-10)
    assert_allclose(pi[1:], joint / joint.sum(axis=1, keepdims=True), atol=1e-8)
    other = random_policy(game, seed)
    gap = exploitability(tree_outcomes(other, game), game.preference, mu, tau)
    assert tree_exploitability(other, game, tau) == pytest.approx(gap, rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tau", [0.05, 0.5, 20.0])
def test_with_random_tools_the_gap_is_the_soft_bellman_value_less_that_of_the_policy(
    seed: int, tau: float
) -> None:
    game = random_tree(seed)
    pi = random_policy(game, seed + 100)
    outcomes = np.zeros(5)
    for probability, _, final in trajectories(pi, game):
        outcomes[final] += probability
    reward = game.preference @ outcomes
    gap = soft_bellman(game, reward, tau) - value_by_walking(pi, game, reward, tau)
    assert gap > 0
    assert tree_exploitability(pi, game, tau) == pytest.approx(gap, rel=1e-8, abs=1e-12)
    best = value_by_walking(tree_best_response(pi, game, tau), game, reward, tau)
    assert best == pytest.approx(soft_bellman(game, reward, tau), rel=1e-10)


def test_values_and_divergences_are_sums_over_trajectories() -> None:
    game, tau = random_tree(7), 0.3
    pi, other, reward = random_policy(game, 1), random_policy(game, 2), np.random.default_rng(3).random(5)
    values, states = tree_action_values(pi, game, reward, tau)
    assert states[0] == pytest.approx(value_by_walking(pi, game, reward, tau), rel=1e-12)
    assert values[0] @ pi[0] - states[0] == pytest.approx(tau * pi[0] @ np.log(pi[0] / game.mu[0]))
    paths, others = trajectories(pi, game), trajectories(other, game)
    expected = sum(p * np.log(p / q) for (p, _, _), (q, _, _) in zip(paths, others, strict=True))
    assert tree_divergence(pi, other, game) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tau", [1e-3, 0.05, 1.0, 100.0])
def test_the_nash_policy_of_a_tree_cannot_be_exploited(seed: int, tau: float) -> None:
    game = random_tree(seed)
    pi = solve_tree_nash(game, tau)
    assert 0 <= tree_exploitability(pi, game, tau) < 1e-12
    assert_allclose(tree_best_response(pi, game, tau), pi, atol=1e-7)
    assert (pi[game.mu == 0] == 0).all()
    assert tree_exploitability(random_policy(game, seed), game, tau) > 1e-5


@pytest.mark.parametrize("step", [mtpo_tree_step, mtpo_tau_tree_step])
@pytest.mark.parametrize("seed", range(3))
def test_mtpo_and_mtpo_tau_go_to_the_nash_policy_whatever_the_tools(step: Callable, seed: int) -> None:
    tau = 0.3
    for game in (branching_tree(seed)[0], random_tree(seed)):
        nash, pi, largest = solve_tree_nash(game, tau), game.mu, 0.0
        for t in range(300):
            reward = game.preference @ tree_outcomes(pi, game)
            largest = max(largest, float(np.abs(tree_action_values(pi, game, reward, tau)[0]).max()))
            pi = step(pi, game, tau, decreasing_step(t, tau))
            bound = 32 * 3 * largest**2 / (tau**2 * (t + 2))
            assert (
                tree_divergence(nash, pi, game) <= bound == pytest.approx(mtpo_bound(t + 1, tau, 3, largest))
            )
        assert tree_exploitability(pi, game, tau) < 1e-4


def test_mtpo_tau_tilts_the_mixture_by_the_values_of_the_mixture_against_itself() -> None:
    game, tau, eta = random_tree(2), 0.4, 1.5
    pi = random_policy(game, 8)
    mixture = pi ** (1 - tau * eta) * game.mu ** (tau * eta)
    mixture /= mixture.sum(axis=1, keepdims=True)
    outcomes = np.zeros(5)
    for probability, _, final in trajectories(mixture, game):
        outcomes[final] += probability
    values, _ = tree_action_values(mixture, game, game.preference @ outcomes, tau)
    expected = mixture * np.exp(eta * values)
    expected /= expected.sum(axis=1, keepdims=True)
    assert_allclose(mtpo_tau_tree_step(pi, game, tau, eta), expected, rtol=1e-12)


def test_where_actions_that_do_not_exist_lead_is_ignored() -> None:
    game = random_tree(1)
    transitions = game.transitions.copy()
    transitions[1, 2] = np.nan  # mu is 0 there
    same = TreeGame(transitions, game.mu, game.preference)
    assert_allclose(solve_tree_nash(same, 0.2), solve_tree_nash(game, 0.2), rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_nash_policy_is_the_fixed_point_of_mtpo(seed: int) -> None:
    game, tau = random_tree(seed), 0.4
    nash = solve_tree_nash(game, tau)
    assert_allclose(mtpo_tree_step(nash, game, tau, 1.0), nash, rtol=1e-9)
    pi = game.mu
    for _ in range(200):
        pi = mtpo_tree_step(pi, game, tau, 1.0)
    assert_allclose(pi, nash, atol=1e-10)


def test_multi_turn_rlhf_goes_to_the_soft_optimum_of_its_reward() -> None:
    game, tau, reward = random_tree(5), 0.2, np.random.default_rng(0).random(5)
    pi = game.mu
    for _ in range(300):
        pi = rlhf_tree_step(pi, game, reward, tau, 2.0)
    assert_allclose(pi, tree_soft_optimum(game, reward, tau), rtol=1e-8)
    assert value_by_walking(pi, game, reward, tau) == pytest.approx(soft_bellman(game, reward, tau))


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_policy_gradients_are_not_biased_by_random_tools(tau: float) -> None:
    """Safe has utility 0.5, risky 5 with probability 0.1: the same mean, so pi stays at the reference."""
    transitions = np.array([[[0, 1, 0, 0], [0, 0, 0.1, 0.9]]])
    game = TreeGame(transitions, np.array([[0.5, 0.5]]), np.full((3, 3), 0.5))
    pi = np.array([[0.9, 0.1]])
    for _ in range(100):
        pi = rlhf_tree_step(pi, game, [0.5, 5.0, 0.0], tau, 0.5 / tau)
    assert_allclose(pi, [[0.5, 0.5]], atol=1e-10)


def test_a_state_that_several_paths_share_is_solved_too() -> None:
    transitions = np.zeros((2, 2, 4))
    transitions[0, :, 1] = [0.5, 1.0]
    transitions[0, 0, 2] = 0.5
    transitions[1, 0, 2] = transitions[1, 1, 3] = 1.0
    game = TreeGame(transitions, np.full((2, 2), 0.5), np.array([[0.5, 0.9], [0.1, 0.5]]))
    pi = solve_tree_nash(game, 0.1)
    # The first final state wins by 0.4 more, whoever the opponent is: Q = 0.4 / tau there, worked out by hand.
    second = np.exp([4.0, 0.0]) / (1 + np.exp(4))
    later = 0.1 * np.log((np.exp(4) + 1) / 2)
    first = np.exp(np.array([0.5 * 0.4 + 0.5 * later, later]) / 0.1)
    assert_allclose(pi, [first / first.sum(), second], rtol=1e-9)


GAME = branching_tree(0)[0]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"transitions": np.zeros((3, 3, 4))}, r"transitions must have shape \(S, A, S \+ F\) = \(3, 3, 9\)"),
        ({"transitions": 0.5 * GAME.transitions}, r"transitions\[0, 0\] must be probabilities that sum to 1"),
        ({"transitions": [[1], [1, 2]]}, "transitions is no array of numbers, with rows of equal length"),
        (
            {"transitions": GAME.transitions[[0, 0, 2]]},
            r"transitions\[1, 0\] leads to state 1: expected later states",
        ),
        ({"mu": np.full((3, 3), 0.5)}, "mu sums to 1.5, expected 1"),
        ({"mu": np.ones(3) / 3}, r"mu must have shape \(S, A\), got \(3,\)"),
        ({"mu": np.ones((0, 3))}, "mu is empty"),
        ({"preference": np.ones((6, 6))}, r"preference\[0, 0\] \+ preference\[0, 0\] is 2, expected 1"),
    ],
)
def test_what_is_no_tree_is_refused(change: dict, complaint: str) -> None:
    fields = {"transitions": GAME.transitions, "mu": GAME.mu, "preference": GAME.preference} | change
    with pytest.raises(InputError, match="^" + complaint):
        TreeGame(**fields)


def test_policies_and_rewards_that_do_not_fit_a_tree_are_refused() -> None:
    with pytest.raises(InputError, match=r"^pi must have shape \(3, 3\), got \(3,\)"):
        mtpo_tree_step(np.ones(3) / 3, GAME, 0.1, 0.1)
    with pytest.raises(InputError, match=r"^pi\[0, 2\] is 0.333333, but mu is 0 there: expected 0"):
        tree_exploitability(np.full((3, 3), 1 / 3), GAME, 0.1)
    with pytest.raises(InputError, match=r"^reward must be finite and of shape \(6,\), got shape \(5,\)"):
        rlhf_tree_step(GAME.mu, GAME, np.ones(5), 0.1, 0.1)
    with pytest.raises(InputError, match=r"^tau must be positive and finite, got -1.0"):
        solve_tree_nash(GAME, -1)
