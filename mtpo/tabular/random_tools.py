"""How random tools bias a loss on whole trajectories, and how adding values to its margins mends that.

The log-ratio of a trajectory cannot know whether the tool was kind. At the optimum its utility is beta rho + V + C,
where C, the luck of the tool, has mean 0; a loss that is not linear in the margin turns C into bias.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mtpo.errors import InputError, MtpoError
from mtpo.tabular.policies import Array, as_floats, check_policy, check_positive, log_tilt

GRADIENT_TOLERANCE = 1e-13
MAX_NEWTON_STEPS = 100


def fit_dpo(
    mu: ArrayLike, chances: ArrayLike, utilities: ArrayLike, beta: float, *, value_offset: bool = False
) -> Array:
    """The policy (n,) at which trajectory DPO stands still on infinitely many Bradley-Terry labels.

    Action i makes the tool answer k with probability chances[i, k], which gives utilities[i, k]. Two trajectories
    are drawn from mu, the label prefers the first with probability sigmoid(u - u'), and the loss is logistic in
    beta (rho - rho'). What J(pi) = E u - beta KL(pi || mu) asks for is mu exp(E[u | action] / beta).

    Args:
        value_offset: add (C - C') / beta to the margin, C = u - E[u | action]; then the fit is that optimum.

    Raises:
        InputError: mu (n,), chances (n, k) or utilities (n, k) do not fit, or beta is not positive.
        MtpoError: no convergence, which takes utilities that are far apart.
    """
    beta = check_positive("beta", beta)
    mu = check_policy("mu", mu)
    utility = as_floats("utilities", utilities)
    if utility.ndim != 2 or len(utility) != len(mu) or not np.isfinite(utility).all():
        raise InputError(f"utilities must be finite and of shape ({len(mu)}, k), got shape {utility.shape}")
    chance = check_policy("chances", chances, utility.shape)
    if (mu == 0).any():
        raise InputError("mu must be positive: trajectories that are never drawn teach nothing")
    luck = (utility - (chance * utility).sum(axis=1, keepdims=True)).ravel()
    action = np.repeat(np.arange(len(mu)), utility.shape[1])
    weight = (mu[:, None] * chance).ravel()  # of each trajectory, an action and an answer
    pairs = np.outer(weight, weight)
    labels = _sigmoid(np.subtract.outer(utility.ravel(), utility.ravel()))
    offset = np.subtract.outer(luck, luck) if value_offset else np.zeros_like(pairs)
    one_hot = np.eye(len(mu))[action]  # (trajectories, n)
    logits = np.zeros(len(mu))  # beta log(pi / mu), up to a constant
    for _ in range(MAX_NEWTON_STEPS):
        z = np.subtract.outer(logits[action], logits[action]) + offset
        won = _sigmoid(z)
        gradient = one_hot.T @ (pairs * (won - labels)).sum(axis=1)
        if np.abs(gradient).max() <= GRADIENT_TOLERANCE:
            return np.exp(log_tilt(mu, logits, beta))
        curvature = one_hot.T @ (pairs * won * (1 - won)) @ one_hot
        laplacian = np.diag(curvature.sum(axis=1)) - curvature
        step = np.linalg.lstsq(laplacian, gradient, rcond=None)[0]
        logits = logits - step / (1 + np.ptp(step))  # a full step may overshoot where sigmoids are flat
    raise MtpoError(
        f"trajectory DPO did not converge in {MAX_NEWTON_STEPS} steps: are utilities far beyond 10?"
    )


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(x / 2))
