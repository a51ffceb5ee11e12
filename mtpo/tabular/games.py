"""Preferences whose Nash policy is known without a solver."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mtpo.errors import InputError
from mtpo.tabular.policies import Array, as_floats, check_policy, check_positive, check_preference, log_tilt


def cyclic_preference(num_actions: int = 3, win: float = 1.0) -> Array:
    """Action i wins against i + 1 (mod n) with probability `win`, and draws against all others but i - 1.

    Rock, paper, scissors for n = 3. With a uniform mu the Nash policy is uniform at every temperature.
    """
    if num_actions < 3:
        raise InputError(f"a cycle needs at least 3 actions, got {num_actions}")
    successor = np.roll(np.eye(num_actions), 1, axis=1)
    return 0.5 + (win - 0.5) * (successor - successor.T)


def additive_preference(scores: ArrayLike) -> Array:
    """P = 1/2 + s_i - s_j: transitive. The Nash policy is mu exp(s / tau); a verifier's 0 or 1 is s = u / 2."""
    s = as_floats("scores", scores)
    return 0.5 + s[:, None] - s[None, :]


def reference_for(target: ArrayLike, preference: ArrayLike, tau: float) -> Array:
    """The reference mu ~ q exp(-P q / tau) for which the policy q, positive everywhere, is the Nash policy."""
    matrix = check_preference(preference)
    q = check_policy("target", target, matrix.shape[:1])
    return np.exp(log_tilt(q, -matrix @ q, check_positive("tau", tau)))
