"""Games of one turn: each player picks one of n actions, `preference[i, j]` is P(i wins against j).

The regularised game pays a policy pi against pi' the amount pi.P.pi' - tau KL(pi || mu) + tau KL(pi' || mu). Its
Nash policy is unique: the pi with pi = best_response(pi).

All functions take (n,) probability vectors, the (n, n) preference with P + P^T = 1, a temperature tau > 0 and a
step eta > 0, and raise InputError on anything else. Steps above 1 / tau push away from pi and seldom converge.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mtpo.errors import InputError
from mtpo.tabular.policies import (
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


def best_response(pi: ArrayLike, preference: ArrayLike, mu: ArrayLike, tau: float) -> Array:
    """mu exp(P pi / tau), normalised: the best policy against pi in the regularised game."""
    pi, matrix, mu, tau = _check(pi, preference, mu, tau)
    return np.exp(log_tilt(mu, matrix @ pi, tau))


def exploitability(pi: ArrayLike, preference: ArrayLike, mu: ArrayLike, tau: float) -> float:
    """What the best response wins against pi: tau KL(pi || best response) >= 0, and 0 only at the Nash policy.

    Equal to tau logsumexp(log mu + P pi / tau) - (pi.P.pi - tau KL(pi || mu)), without its cancellation.
    """
    pi, matrix, mu, tau = _check(pi, preference, mu, tau)
    return tau * float(relative_entropy(log_policy(pi), log_tilt(mu, matrix @ pi, tau)))


def mtpo_step(pi: ArrayLike, preference: ArrayLike, mu: ArrayLike, tau: float, eta: float) -> Array:
    """MTPO of one turn, which is online mirror descent: pi^(1 - tau eta) mu^(tau eta) exp(eta P pi).

    Shani et al. 2024, https://arxiv.org/abs/2405.14655, section 4. The Nash policy is its fixed point.
    """
    pi, matrix, mu, tau = _check(pi, preference, mu, tau)
    return mirror_step(pi, mu, matrix @ pi, tau, check_positive("eta", eta))


def nash_md_step(pi: ArrayLike, preference: ArrayLike, mu: ArrayLike, tau: float, eta: float) -> Array:
    """m exp(eta P m) with the mixture m = pi^(1 - tau eta) mu^(tau eta).

    Munos et al. 2023, https://arxiv.org/abs/2312.00886, section 4. With a constant step the fixed point is not
    the Nash policy; its mixture m is the one at temperature tau / (1 - tau eta).
    """
    pi, matrix, mu, tau = _check(pi, preference, mu, tau)
    eta = check_positive("eta", eta)
    mixture = mirror_step(pi, mu, np.zeros_like(pi), tau, eta)
    return mirror_step(pi, mu, matrix @ mixture, tau, eta)


def ipo_md_step(
    pi: ArrayLike, preference: ArrayLike, mu: ArrayLike, tau: float, eta: float, ref_coef: float
) -> Array:
    """A step of IPO on pairs drawn from the mixture m = pi^(1 - ref_coef) mu^ref_coef, as a natural gradient.

    The least squares of IPO have their optimum at log(pi / mu) = P m / tau + const; the step goes a share tau eta
    of the way there. Calandriello et al. 2024, https://arxiv.org/abs/2403.08635. `ref_coef=0` is `mtpo_step`. At
    the fixed point the mixture is the Nash policy at temperature tau / (1 - ref_coef).
    """
    pi, matrix, mu, tau = _check(pi, preference, mu, tau)
    mixture = geometric_policy(pi, mu, ref_coef)
    return mirror_step(pi, mu, matrix @ mixture, tau, check_positive("eta", eta))


def rlhf_step(pi: ArrayLike, reward: ArrayLike, mu: ArrayLike, tau: float, eta: float) -> Array:
    """pi^(1 - tau eta) mu^(tau eta) exp(eta reward): the same with a fixed reward (n,), whoever the opponent is."""
    mu = check_policy("mu", mu)
    reward = as_floats("reward", reward)
    if reward.shape != mu.shape or not np.isfinite(reward).all():
        raise InputError(f"reward must be finite and of shape {mu.shape}, got shape {reward.shape}")
    pi = check_policy("pi", pi, mu.shape, mu)
    return mirror_step(pi, mu, reward, check_positive("tau", tau), check_positive("eta", eta))


def geometric_policy(pi: ArrayLike, mu: ArrayLike, ref_coef: float) -> Array:
    """pi^(1 - ref_coef) mu^ref_coef, normalised along the last axis; ref_coef in [0, 1] weighs the reference mu."""
    if not 0 <= ref_coef <= 1:
        raise InputError(f"ref_coef must be in [0, 1], got {ref_coef}")
    mu = check_policy("mu", mu)
    pi = check_policy("pi", pi, mu.shape, mu)
    return mirror_step(pi, mu, np.zeros_like(mu), 1.0, ref_coef)


def _check(
    pi: ArrayLike, preference: ArrayLike, mu: ArrayLike, tau: float
) -> tuple[Array, Array, Array, float]:
    matrix = check_preference(preference)
    mu = check_policy("mu", mu, matrix.shape[:1])
    return check_policy("pi", pi, mu.shape, mu), matrix, mu, check_positive("tau", tau)
