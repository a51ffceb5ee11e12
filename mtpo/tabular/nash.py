"""The Nash policy of a regularised game, to machine precision, for any preference and temperature.

With A = P - 1/2 and d(r) the final states under the soft-optimal policy for a reward r, the Nash policy is the
soft optimum for the root of r = A d(r). d is the gradient of the convex soft value of the root, so its Jacobian
H is positive semi-definite, A is antisymmetric, and I - A H is never singular: the roots of r = s A d(r) form one
smooth path from r = 0 at s = 0, where the policy is mu, to the game itself at s = 1. The solver follows that path
with Newton's method. Mirror descent would need about 1 / tau^2 steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from mtpo.errors import MtpoError
from mtpo.tabular.policies import Array, check_positive, relative_entropy
from mtpo.tabular.trees import TreeGame, log_soft_optimum, node_visits, tree_exploitability

CERTIFIED_GAP = 1e-10
"""No policy is returned whose exploitability, in units of the preference, is larger."""
PATH_KL = 1e-9
"""How close, in nats, Newton's method comes to the path before the next step along it."""
MAX_NEWTON_STEPS = 6
SMALLEST_STEP = 1e-12
"""Along the path, of length 1; below it the solver gives up."""


def solve_nash(preference: ArrayLike, mu: ArrayLike, tau: float) -> Array:
    """The Nash policy (n,) of the game of one turn: the pi with pi ~ mu exp(P pi / tau).

    Actions with mu = 0 keep probability 0.

    Raises:
        InputError: preference, mu or tau is not valid.
        MtpoError: no policy with an exploitability of at most 1e-10 was found.
    """
    return solve_tree_nash(TreeGame.one_turn(preference, mu), tau)[0]


def solve_tree_nash(game: TreeGame, tau: float) -> Array:
    """The Nash policy (S, A) of a game of several turns, whose tools may be random.

    Raises:
        InputError: tau is not positive.
        MtpoError: no policy with an exploitability of at most 1e-10 was found.
    """
    tau = check_positive("tau", tau)
    payoff = game.preference - 0.5
    point = _Point.at(game, np.zeros(len(payoff)), tau)
    strength, step = 0.0, 2 * tau / max(float(np.ptp(payoff @ point.outcomes)), tau)
    while strength < 1 and step > SMALLEST_STEP:
        ahead = min(strength + step, 1.0)
        tangent = np.linalg.solve(
            np.eye(len(payoff)) - strength * payoff @ point.jacobian, payoff @ point.outcomes
        )
        found, num_steps = _newton(game, tau, ahead * payoff, point.reward + (ahead - strength) * tangent)
        if found is None:
            step /= 4
        else:
            point, strength = found, ahead
            step *= 2 if num_steps <= MAX_NEWTON_STEPS // 2 else 1
    for _ in range(2):  # from 1e-9 to rounding: Newton squares the error
        point = point.newton_step(game, tau, payoff)
    pi = np.exp(point.log_pi)
    gap = tree_exploitability(pi, game, tau)
    if not gap <= CERTIFIED_GAP:
        raise MtpoError(
            f"no Nash policy found at tau {tau:g}: the best policy can still be exploited by {gap:.2g}, "
            f"expected at most {CERTIFIED_GAP:g}; a larger tau is easier"
        )
    return pi


@dataclass(frozen=True)
class _Point:
    """The soft-optimal policy for a reward, and how its final states change with the reward."""

    reward: Array  # (F,)
    log_pi: Array  # (S, A)
    visits: Array  # (S,)
    outcomes: Array  # (F,)
    jacobian: Array  # (F, F), d outcomes / d reward

    @classmethod
    def at(cls, game: TreeGame, reward: Array, tau: float) -> _Point:
        log_pi = log_soft_optimum(game, reward, tau)
        pi = np.exp(log_pi)
        num_states, num_finals = game.num_states, len(reward)
        from_node = np.vstack([np.zeros((num_states, num_finals)), np.eye(num_finals)])
        visits = node_visits(pi, game)
        jacobian = np.zeros((num_finals, num_finals))
        for state in reversed(range(num_states)):
            from_action = game.transitions[state] @ from_node  # (A, F): final states after each action
            from_node[state] = pi[state] @ from_action
            centred = from_action - from_node[state]
            jacobian += visits[state] / tau * (centred.T * pi[state]) @ centred
        return cls(reward, log_pi, visits[:num_states], visits[num_states:], jacobian)

    def newton_step(self, game: TreeGame, tau: float, payoff: Array) -> _Point:
        """A step towards the root of reward = payoff @ outcomes(reward)."""
        residual = self.reward - payoff @ self.outcomes
        step = np.linalg.solve(np.eye(len(payoff)) - payoff @ self.jacobian, residual)
        return _Point.at(game, self.reward - step, tau)

    def kl_to_answer(self, game: TreeGame, tau: float, payoff: Array) -> float:
        """KL from this policy to the soft optimum against it: 0 at the root only."""
        answer = log_soft_optimum(game, payoff @ self.outcomes, tau)
        return float(self.visits @ relative_entropy(self.log_pi, answer))


def _newton(game: TreeGame, tau: float, payoff: Array, reward: Array) -> tuple[_Point | None, int]:
    """The point of the path, or None if Newton's method does not go there, and the number of its steps."""
    point, before = _Point.at(game, reward, tau), np.inf
    for num_steps in range(MAX_NEWTON_STEPS + 1):
        kl = point.kl_to_answer(game, tau, payoff)
        if kl <= PATH_KL:
            return point, num_steps
        if not kl < before / 2:
            break
        point, before = point.newton_step(game, tau, payoff), kl
    return None, MAX_NEWTON_STEPS
