"""What every tabular method does with policies: check them, take their logarithms, tilt them.

A policy is an array of float64 whose last axis holds probabilities: (n,) for a game of one turn, (S, A) with
a row a state for a tree. Actions to which the reference `mu` gives probability 0 do not exist: every policy
must give them 0 too, and nothing here ever gives them more.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mtpo.errors import InputError

Array = NDArray[np.float64]

SUM_TOLERANCE = 1e-6
"""How far sums of probabilities given by a caller may be from 1; float32 arrays pass."""
TINY = float(np.finfo(np.float64).smallest_subnormal)


def log_policy(pi: Array) -> Array:
    """log pi, -inf where pi is 0."""
    return np.log(pi, out=np.full_like(pi, -np.inf), where=pi > 0)


def log_normalise(logits: Array) -> Array:
    """log softmax along the last axis; -inf stays -inf."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def log_tilt(mu: Array, values: Array, tau: float) -> Array:
    """log of mu exp(values / tau), normalised: the soft-greedy policy for `values`."""
    return log_normalise(log_policy(mu) + values / tau)


def mirror_step(pi: Array, mu: Array, values: Array, tau: float, eta: float) -> Array:
    """pi^(1 - tau eta) mu^(tau eta) exp(eta values), normalised: one step of regularised mirror ascent.

    A probability that underflowed to 0 counts as the smallest float, so that it can come back.
    """
    log_pi, log_mu = (np.log(np.maximum(p, TINY)) for p in (pi, mu))
    logits = (1 - tau * eta) * log_pi + tau * eta * log_mu + eta * values
    return np.exp(log_normalise(np.where(mu > 0, logits, -np.inf)))


def relative_entropy(log_pi: Array, log_other: Array) -> Array:
    """KL(pi || other) along the last axis, in nats, from normalised log-probabilities.

    Summed as pi (d + exp(-d) - 1), d = log pi - log other: no term is negative, so that KLs far below the
    rounding of a log-probability are still right.
    """
    pi, other = np.exp(log_pi), np.exp(log_other)
    d = np.subtract(log_pi, log_other, out=np.zeros_like(pi), where=pi > 0)
    near = np.abs(d) < 1  # elsewhere exp(-d) may overflow, and nothing cancels
    terms = np.where(near, pi * (d + np.expm1(-np.where(near, d, 0.0))), pi * d - pi + other)
    return np.where(pi > 0, terms, other).sum(axis=-1)


def check_positive(name: str, value: float) -> float:
    value = float(value)
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{name} must be positive and finite, got {value}")
    return value


def as_floats(name: str, values: ArrayLike) -> Array:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{name} is no array of numbers, with rows of equal length") from None


def check_preference(preference: ArrayLike) -> Array:
    """A square matrix with preference[i, j] = P(i wins against j), so that P + P^T = 1.

    Entries beyond [0, 1], as differences of scores may give, are taken: no theorem here needs them inside.
    """
    matrix = as_floats("preference", preference)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise InputError(f"preference must be a square matrix, got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise InputError("preference holds a value that is not finite")
    error = np.abs(matrix + matrix.T - 1)
    if error.max() > SUM_TOLERANCE:
        i, j = (int(k) for k in np.unravel_index(error.argmax(), error.shape))
        raise InputError(
            f"preference[{i}, {j}] + preference[{j}, {i}] is {matrix[i, j] + matrix[j, i]:.6g}, expected 1"
        )
    return matrix


def check_policy(
    name: str, policy: ArrayLike, shape: tuple[int, ...] | None = None, mu: Array | None = None
) -> Array:
    """The policy as float64, its last axis normalised, of a given shape, if any, and within the support of `mu`."""
    checked = as_floats(name, policy)
    if shape is not None and checked.shape != shape:
        raise InputError(f"{name} must have shape {shape}, got {checked.shape}")
    if not checked.size:
        raise InputError(f"{name} is empty")
    wrong = ~(checked >= 0)  # nan too
    if wrong.any():
        where = tuple(int(k) for k in np.argwhere(wrong)[0])
        raise InputError(f"{name}{list(where)} is {checked[where]}, expected a probability")
    sums = np.atleast_1d(checked).sum(axis=-1, keepdims=True)
    worst = sums.flat[np.abs(sums - 1).argmax()]
    if not abs(worst - 1) <= SUM_TOLERANCE:
        raise InputError(f"{name} sums to {worst:.6g}, expected 1")
    if mu is not None and (checked[mu == 0] > 0).any():
        where = tuple(int(k) for k in np.argwhere((mu == 0) & (checked > 0))[0])
        raise InputError(f"{name}{list(where)} is {checked[where]:.6g}, but mu is 0 there: expected 0")
    return checked / sums
