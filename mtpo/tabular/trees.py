"""Games of several turns: at each state the policy acts, a tool answers, and two final states are compared.

The answer of a tool may be random; then no game of one turn is equivalent. Both players start at the root, play
their own trajectories, and the preference between the final states decides. A policy is (S, A), a row a state.
With reward r on final states, Q(s, a) = E[r or V of what follows] and V(s) = sum_a pi Q - tau KL(pi || mu)[s].
Against an opponent with final states distributed as d, r = P d. Shani et al. 2024, https://arxiv.org/abs/2405.14655.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from mtpo.errors import InputError
from mtpo.tabular.policies import (
    SUM_TOLERANCE,
    Array,
    as_floats,
    check_policy,
    check_positive,
    check_preference,
    log_policy,
    log_tilt,
    mirror_step,
    relative_entropy,
)


@dataclass(frozen=True, eq=False)
class TreeGame:
    """A finite game with S states, at most A actions in each, and F final states; state 0 is the root.

    Raises:
        InputError: shapes do not fit, probabilities do not sum to 1, or an action leads to its own state or to an
            earlier one.
    """

    transitions: Array
    """(S, A, S + F): the probability that action a in state s leads to each state, then to each final state. A
    deterministic tool has a single 1. States are sorted: an action leads to later states only."""
    mu: Array
    """(S, A): the reference policy. An action that a state lacks has probability 0, and its transitions are ignored."""
    preference: Array
    """(F, F): P(final state i wins against j)."""

    def __post_init__(self) -> None:
        preference = check_preference(self.preference)
        mu = check_policy("mu", self.mu)
        if mu.ndim != 2:
            raise InputError(f"mu must have shape (S, A), got {mu.shape}")
        shape = (*mu.shape, len(mu) + len(preference))
        transitions = as_floats("transitions", self.transitions).copy()
        if transitions.shape != shape:
            raise InputError(f"transitions must have shape (S, A, S + F) = {shape}, got {transitions.shape}")
        transitions[mu == 0] = 0.0
        for state, action in np.argwhere(mu > 0):
            row = transitions[state, action]
            name = f"transitions[{state}, {action}]"
            if not (row >= 0).all() or abs(row.sum() - 1) > SUM_TOLERANCE:
                raise InputError(f"{name} must be probabilities that sum to 1, got a sum of {row.sum():.6g}")
            if (earlier := row[: state + 1]).any():
                raise InputError(f"{name} leads to state {earlier.argmax()}: expected later states only")
            transitions[state, action] /= row.sum()
        for name, value in (("transitions", transitions), ("mu", mu), ("preference", preference)):
            object.__setattr__(self, name, value)

    @classmethod
    def one_turn(cls, preference: ArrayLike, mu: ArrayLike) -> TreeGame:
        """The game of one turn in which action i leads to final state i."""
        matrix = check_preference(preference)
        mu = check_policy("mu", mu, matrix.shape[:1])
        transitions = np.hstack([np.zeros((len(mu), 1)), np.eye(len(mu))])
        return cls(transitions[None], mu[None], matrix)

    @property
    def num_states(self) -> int:
        return len(self.mu)


def tree_outcomes(pi: ArrayLike, game: TreeGame) -> Array:
    """(F,): the distribution of final states when pi plays from the root."""
    return node_visits(_check(pi, game), game)[game.num_states :]


def tree_action_values(pi: ArrayLike, game: TreeGame, reward: ArrayLike, tau: float) -> tuple[Array, Array]:
    """Q (S, A) and V (S,) of pi for a reward (F,) on final states, each KL to mu charged at tau.

    Q is 0 for actions that a state lacks. V of the root is the value of the game.
    """
    pi, tau = _check(pi, game), check_positive("tau", tau)
    costs = tau * relative_entropy(log_policy(pi), log_policy(game.mu))
    values = _with_reward(game, reward)
    actions = np.zeros_like(game.mu)
    for state in reversed(range(game.num_states)):
        actions[state] = game.transitions[state] @ values
        values[state] = pi[state] @ actions[state] - costs[state]
    return actions, values[: game.num_states]


def tree_soft_optimum(game: TreeGame, reward: ArrayLike, tau: float) -> Array:
    """The policy with the largest V at every state for a reward (F,): mu exp(Q / tau), by soft-Bellman recursion.

    It is what multi-turn RLHF converges to.
    """
    return np.exp(log_soft_optimum(game, _check_reward(reward, game), check_positive("tau", tau)))


def tree_best_response(pi: ArrayLike, game: TreeGame, tau: float) -> Array:
    """The best policy in the regularised game against pi."""
    return tree_soft_optimum(game, game.preference @ tree_outcomes(pi, game), tau)


def tree_exploitability(pi: ArrayLike, game: TreeGame, tau: float) -> float:
    """Root value of the best response against pi, less the value of pi itself: >= 0, and 0 only at the Nash policy.

    Computed as tau KL(pi || best response) over trajectories, which is the same without the cancellation.
    """
    pi, tau = _check(pi, game), check_positive("tau", tau)
    visits = node_visits(pi, game)
    response = log_soft_optimum(game, game.preference @ visits[game.num_states :], tau)
    return tau * float(visits[: game.num_states] @ relative_entropy(log_policy(pi), response))


def tree_divergence(pi: ArrayLike, other: ArrayLike, game: TreeGame) -> float:
    """KL between the trajectory distributions of two policies, in nats: tools cancel."""
    pi, other = _check(pi, game), _check(other, game)
    return float(
        node_visits(pi, game)[: game.num_states] @ relative_entropy(log_policy(pi), log_policy(other))
    )


def mtpo_tree_step(pi: ArrayLike, game: TreeGame, tau: float, eta: float) -> Array:
    """MTPO: at every state pi^(1 - tau eta) mu^(tau eta) exp(eta Q), Q being that of pi against pi."""
    pi = _check(pi, game)
    return rlhf_tree_step(pi, game, game.preference @ tree_outcomes(pi, game), tau, eta)


def mtpo_tau_tree_step(pi: ArrayLike, game: TreeGame, tau: float, eta: float) -> Array:
    """MTPO-tau: at every state m exp(eta Q), m = pi^(1 - tau eta) mu^(tau eta), Q being that of m against m."""
    pi, tau, eta = _check(pi, game), check_positive("tau", tau), check_positive("eta", eta)
    mixture = mirror_step(pi, game.mu, np.zeros_like(pi), tau, eta)
    values, _ = tree_action_values(mixture, game, game.preference @ tree_outcomes(mixture, game), tau)
    return mirror_step(pi, game.mu, values, tau, eta)


def rlhf_tree_step(pi: ArrayLike, game: TreeGame, reward: ArrayLike, tau: float, eta: float) -> Array:
    """Multi-turn RLHF: at every state pi^(1 - tau eta) mu^(tau eta) exp(eta Q) for a fixed reward (F,)."""
    pi = _check(pi, game)
    values, _ = tree_action_values(pi, game, reward, tau)
    return mirror_step(pi, game.mu, values, tau, check_positive("eta", eta))


def node_visits(pi: Array, game: TreeGame) -> Array:
    """(S + F,): the probability that a trajectory of pi passes through each state and final state; unchecked."""
    visits = np.zeros(game.transitions.shape[2])
    visits[0] = 1.0
    for state in range(game.num_states):
        visits += visits[state] * (pi[state] @ game.transitions[state])
    return visits


def log_soft_optimum(game: TreeGame, reward: Array, tau: float) -> Array:
    """`tree_soft_optimum` in log-probabilities, unchecked."""
    values = _with_reward(game, reward)
    log_pi = np.empty_like(game.mu)
    for state in reversed(range(game.num_states)):
        actions = game.transitions[state] @ values
        log_pi[state] = log_tilt(game.mu[state], actions, tau)
        best = log_pi[state].argmax()  # V = Q + tau log(mu / pi), the same at every action
        values[state] = actions[best] + tau * (np.log(game.mu[state, best]) - log_pi[state, best])
    return log_pi


def _with_reward(game: TreeGame, reward: ArrayLike) -> Array:
    return np.concatenate([np.zeros(game.num_states), _check_reward(reward, game)])


def _check_reward(reward: ArrayLike, game: TreeGame) -> Array:
    checked = as_floats("reward", reward)
    shape = (len(game.preference),)
    if checked.shape != shape or not np.isfinite(checked).all():
        raise InputError(f"reward must be finite and of shape {shape}, got shape {checked.shape}")
    return checked


def _check(pi: ArrayLike, game: TreeGame) -> Array:
    return check_policy("pi", pi, game.mu.shape, game.mu)
