"""Losses of pairs: DPO, IPO, SLiC and the rest of generalised preference optimisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtpo.errors import InputError
from mtpo.losses.checks import LossOut, check_no_nan, check_vectors, mean, mean_out


class Convex(NamedTuple):
    """f and its derivative, of the scaled margin z."""

    f: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


GPO: dict[str, Convex] = {
    "logistic": Convex(lambda z: -F.logsigmoid(z), lambda z: -torch.sigmoid(-z)),
    "hinge": Convex(lambda z: torch.relu(1 - z), lambda z: -(z < 1).to(z.dtype)),
    "squared": Convex(lambda z: (z - 1).square(), lambda z: 2 * (z - 1)),
    "exponential": Convex(lambda z: torch.exp(-z), lambda z: -torch.exp(-z)),
    "truncated_quadratic": Convex(lambda z: torch.relu(1 - z).square(), lambda z: -2 * torch.relu(1 - z)),
    "savage": Convex(
        lambda z: torch.sigmoid(-z).square(),
        lambda z: -2 * torch.sigmoid(-z).square() * torch.sigmoid(z),
    ),
}
"""The f of generalised preference optimisation (Tang et al. 2024); savage alone is not convex."""


def gpo_f(z: Tensor, kind: str) -> Tensor:
    """f(z), elementwise. The function does not clamp: exponential overflows below z = -88 in float32."""
    return _convex(kind).f(z)


def paired_loss(
    rho_w: Tensor,
    rho_l: Tensor,
    kind: str,
    beta: float = 0.1,
    tau: float | None = None,
    label_smoothing: float = 0.0,
    pref_prob: Tensor | None = None,
    offset: Tensor | float = 0.0,
    nll: Tensor | None = None,
    nll_coef: float = 0.0,
    weights: Tensor | None = None,
) -> LossOut:
    """Mean over pairs of p f(beta D) + (1 - p) f(-beta D) + nll_coef * nll.

    `logistic` is multi-turn DPO, `hinge` is SLiC on the reference-normalised margin. `ipo` is
    p (D - 1 / (2 tau))^2 + (1 - p) (D + 1 / (2 tau))^2, which equals `squared` at beta = 2 tau, divided by
    4 tau^2 (Azar et al. 2023, eq. 17).

    Args:
        rho_w, rho_l: (B,), log-ratios of the chosen and rejected trajectories.
        kind: a key of `GPO`, or "ipo".
        tau: the temperature of `ipo`, and only there.
        label_smoothing: p = 1 - label_smoothing, for all pairs (cDPO).
        pref_prob: (B,), p of each pair, instead of `label_smoothing`.
        offset: scalar or (B,), added to D: a value network's correction where tools are random.
        nll: (B,), negative log-likelihood per token of each chosen trajectory.
        weights: (B,), multiply the loss of each pair; the denominator stays the number of pairs.

    Returns:
        `metrics` has rewards/chosen, rewards/rejected and margin (beta, for ipo tau, times the mean),
        accuracy (share of D > 0), weight (mean |f'|) and flat (share of pairs without a pull).
    """
    check_vectors(rho_w=rho_w, rho_l=rho_l, pref_prob=pref_prob, nll=nll, weights=weights)
    if (kind == "ipo") != (tau is not None):
        raise InputError(f"paired_loss: tau is {tau}, but ipo and only ipo has one (kind is {kind!r})")
    if pref_prob is not None and label_smoothing:
        raise InputError("paired_loss: give label_smoothing or pref_prob, not both")
    if (nll is None) != (nll_coef == 0):
        raise InputError(f"paired_loss: nll_coef is {nll_coef}, which goes with nll and only with it")
    margin = rho_w - rho_l + offset
    if margin.shape != rho_w.shape:
        raise InputError(f"offset {tuple(torch.as_tensor(offset).shape)} does not fit {tuple(rho_w.shape)}")
    check_no_nan(offset=margin)
    p = torch.full_like(margin, 1 - label_smoothing) if pref_prob is None else pref_prob.to(margin.dtype)
    if ((p < 0) | (p > 1)).any():
        raise InputError(f"preference probabilities must lie in [0, 1], got {p.min():.4g} to {p.max():.4g}")

    scale = beta if tau is None else 2 * tau
    convex, z = _convex("squared" if kind == "ipo" else kind), scale * margin
    per_example = _weighted(p, convex.f, z) + _weighted(1 - p, convex.f, -z)
    if tau is not None:
        per_example = per_example / (4 * tau**2)
    if nll is not None:
        per_example = per_example + nll_coef * nll
    if weights is not None:
        per_example = per_example * weights
    with torch.no_grad():
        slope = _weighted(p, convex.slope, z) - _weighted(1 - p, convex.slope, -z)
        reward_scale = beta if tau is None else tau
        metrics = {
            "rewards/chosen": reward_scale * mean(rho_w),
            "rewards/rejected": reward_scale * mean(rho_l),
            "margin": reward_scale * mean(margin),
            "accuracy": mean(margin > 0),
            "weight": mean(slope.abs()),
            "flat": mean(slope == 0),
        }
    return mean_out(per_example, metrics)


def _convex(kind: str) -> Convex:
    if kind not in GPO:
        raise InputError(f"paired loss kind {kind!r}; expected one of {', '.join(GPO)}, ipo")
    return GPO[kind]


def _weighted(p: Tensor, f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """p f(z), 0 with gradient 0 where p = 0, even if f(z) is infinite there."""
    return p * f(torch.where(p > 0, z, 0.0))
