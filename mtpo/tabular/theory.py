"""What is proved about the last iterate: the decreasing steps, the bounds, and the largest constant step."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mtpo.tabular.policies import check_policy, check_positive, check_preference


def decreasing_step(t: int, tau: float) -> float:
    """The step 2 / (tau (t + 2)) that follows t = 0, 1, ... earlier ones; started at mu, it gives the bounds below."""
    return 2 / (check_positive("tau", tau) * (t + 2))


def mtpo_bound(t: int, tau: float, num_turns: int = 1, max_value: float = 1.0) -> float:
    """Of KL(Nash || pi) over trajectories after t steps of MTPO: 32 H Q^2 / (tau^2 (t + 1)).

    Shani et al. 2024, https://arxiv.org/abs/2405.14655, section 4. `max_value` is Q, the largest |Q(s, a)|: 1 in
    one turn, and at most max(1, tau (H - 1) log(1 / smallest mu)) in H turns.
    """
    return 32 * num_turns * max_value**2 / (check_positive("tau", tau) ** 2 * (t + 1))


def nash_md_bound(t: int, tau: float) -> float:
    """Of KL(Nash || pi) after t steps of Nash-MD: 8 / (tau^2 (t + 1)).

    Munos et al. 2023, https://arxiv.org/abs/2312.00886, section 4.
    """
    return 8 / (check_positive("tau", tau) ** 2 * (t + 1))


def mtpo_gap_bound(t: int, tau: float) -> float:
    """Of the exploitability after t >= 1 steps of MTPO in one turn: 24 / (tau^3 (t + 1)), from `mtpo_bound`.

    With the decreasing steps, log(pi_t / mu) is P times the mean of the earlier policies with weights
    2 (j + 1) / (t (t + 1)), over tau. So log(pi_t / Nash) has a span of at most D / tau, D the l1 distance of that
    mean from the Nash policy, and tau KL(pi_t || Nash) <= D^2 / (8 tau). The gap exceeds this by at most
    |pi_t - Nash|^2 / (8 tau), because tau logsumexp has curvature 1 / tau and P - 1/2 is antisymmetric. Pinsker
    and mtpo_bound give D^2 <= 4 C / (t + 1) and |pi_t - Nash|^2 <= 2 C / (t + 1) with C = 32 / tau^2.
    """
    return 24 / (check_positive("tau", tau) ** 3 * (t + 1))


def contraction_limit(nash: ArrayLike, preference: ArrayLike, tau: float) -> float:
    """The constant step below which MTPO of one turn contracts near the Nash policy: 2 tau / (tau^2 + L^2).

    L is the largest |eigenvalue| of (P - 1/2) (diag pi - pi pi^T), at most 1/2. Larger steps orbit. Never more
    than 1 / tau, beyond which a step is no mixture of pi and mu.
    """
    matrix, tau = check_preference(preference), check_positive("tau", tau)
    pi = check_policy("nash", nash, matrix.shape[:1])
    rotation = np.abs(np.linalg.eigvals((matrix - 0.5) @ (np.diag(pi) - np.outer(pi, pi)))).max()
    return float(min(2 * tau / (tau**2 + rotation**2), 1 / tau))
