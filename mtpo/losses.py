"""Pure loss functions over log-probs: no model, no sampling, no state.

Token arrays are (B, T); entry t is log p(token t | tokens before it) in nats, and a mask marks the tokens
that the policy sampled. float64 stays float64. Values off the mask, whatever they are, change nothing and
get a gradient of exactly 0. Positive log-probs are accepted. Everything raises InputError on shapes that
do not fit, on nan, and on a batch without a single action token.

S(tau) is the sum of log-probs over the action tokens of a trajectory, rho(tau) = S_policy - S_reference its
log-ratio, and the margin of a pair is D = rho(chosen) - rho(rejected). Observations cancel in rho, so a sum
over action tokens is the log-ratio of whole trajectories (Xiong et al. 2024, "Building Math Agents with
Multi-Turn Iterative Preference Learning").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtpo.errors import InputError


@dataclass(frozen=True, slots=True)
class LossOut:
    """What a loss returns."""

    loss: Tensor
    """Scalar: the mean over the batch unless the loss says otherwise."""
    per_example: Tensor | None
    """(B,), with `loss` as its mean; None where the loss is no mean over examples."""
    metrics: dict[str, float]


def token_logps(
    logits: Tensor, tokens: Tensor, softcap: float | None = None, temperature: float = 1.0
) -> Tensor:
    """log p(token t | tokens before it) from the logits at t - 1.

    Args:
        logits: (B, T, V), any float type; computed in float32, or float64 if they are float64.
        tokens: (B, T) int64.
        softcap: for raw head outputs of a model that caps them, `cap * tanh(logits / cap)`; None when the
            model's forward has done it.

    Returns:
        (B, T); entry 0, which nothing predicts, is 0.
    """
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise InputError(f"logits {tuple(logits.shape)} do not fit tokens {tuple(tokens.shape)}")
    logits = logits[:, :-1]
    if logits.dtype != torch.float64:
        logits = logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logps = (logits / temperature).log_softmax(-1)  # (B, T - 1, V)
    return F.pad(logps.gather(-1, tokens[:, 1:, None]).squeeze(-1), (1, 0))


def masked_sum(x: Tensor, mask: Tensor, normalize: bool = False) -> Tensor:
    """Sum (B, T) over the action tokens of each row; 0 for a row without any.

    Args:
        normalize: divide by the number of action tokens of the row (at least 1).
    """
    mask = _checked_mask(x, mask)
    total = _on_mask(x, mask).sum(-1)
    return total / mask.sum(-1).clamp(min=1) if normalize else total


def sampled_kl(
    lp: Tensor,
    ref_lp: Tensor,
    mask: Tensor,
    kind: Literal["k1", "k2", "k3"],
    samples_from: Literal["policy", "ref"],
    normalize: bool = False,
) -> Tensor:
    """Estimate a KL per sequence, (B,), from the sampled tokens alone (Schulman 2020, "Approximating KL").

    With d = lp - ref_lp: KL(policy || ref) on samples of the policy has k1 = d, k2 = d^2 / 2 and
    k3 = exp(-d) - 1 + d; KL(ref || policy) on samples of the reference has k1 = -d, k2 = d^2 / 2 and
    k3 = exp(d) - 1 - d. On samples of the policy none of them has the gradient of the sequence KL.
    """
    if samples_from not in ("policy", "ref"):
        raise InputError(f"samples_from is {samples_from!r}; expected 'policy' or 'ref'")
    mask = _checked_mask(lp, mask)
    _check_shapes(lp=lp, ref_lp=ref_lp)
    d = _on_mask(lp, mask) - _on_mask(ref_lp, mask)
    d = d if samples_from == "policy" else -d
    if kind == "k1":
        return masked_sum(d, mask, normalize)
    if kind == "k2":
        return masked_sum(d.square() / 2, mask, normalize)
    if kind == "k3":
        return masked_sum(torch.expm1(-d) + d, mask, normalize)
    raise InputError(f"KL estimator {kind!r}; expected 'k1', 'k2' or 'k3'")


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
    _check_vectors(rho_w=rho_w, rho_l=rho_l, pref_prob=pref_prob, nll=nll, weights=weights)
    if (kind == "ipo") != (tau is not None):
        raise InputError(f"paired_loss: tau is {tau}, but ipo and only ipo has one (kind is {kind!r})")
    if pref_prob is not None and label_smoothing:
        raise InputError("paired_loss: give label_smoothing or pref_prob, not both")
    if (nll is None) != (nll_coef == 0):
        raise InputError(f"paired_loss: nll_coef is {nll_coef}, which goes with nll and only with it")
    margin = rho_w - rho_l + offset
    if margin.shape != rho_w.shape:
        raise InputError(f"offset {tuple(torch.as_tensor(offset).shape)} does not fit {tuple(rho_w.shape)}")
    _check_no_nan(offset=margin)
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
            "rewards/chosen": reward_scale * _mean(rho_w),
            "rewards/rejected": reward_scale * _mean(rho_l),
            "margin": reward_scale * _mean(margin),
            "accuracy": _mean(margin > 0),
            "weight": _mean(slope.abs()),
            "flat": _mean(slope == 0),
        }
    return _mean_out(per_example, metrics)


def kto_baseline(rho_mismatch: Tensor, group: Any = None) -> Tensor:
    """z0 = max(0, mean log-ratio of mismatched trajectories), detached: stands for E KL(policy || ref).

    Args:
        rho_mismatch: (M,), log-ratios of trajectories whose prompt is another one's; M may be 0 on a process
            as long as some process has one.
        group: the process group to average over; every process, if torch.distributed is running, by default.
    """
    if rho_mismatch.ndim != 1:
        raise InputError(f"rho_mismatch has shape {tuple(rho_mismatch.shape)}, expected (M,)")
    _check_no_nan(rho_mismatch=rho_mismatch)
    rho = rho_mismatch.detach()
    total = torch.stack([rho.sum(), rho.new_tensor(float(len(rho)))])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total, group=group)
    if total[1] == 0:
        raise InputError("the KTO baseline needs at least one mismatched trajectory, got none")
    return (total[0] / total[1]).clamp(min=0)


def kto_loss(
    rho: Tensor,
    desirable: Tensor,
    z0: Tensor | float,
    beta: float = 0.1,
    lambda_pos: float = 1.0,
    lambda_neg: float = 1.0,
) -> LossOut:
    """Mean over all examples of lambda (1 - sigmoid(+-beta (rho - z0))), + where desirable, else -.

    beta acts once and z0 is in units of rho (Ethayarajh et al. 2024; the multi-turn paper's formula prints
    beta twice, its code does not). A batch of a single class is fine.

    Args:
        rho: (B,).
        desirable: (B,) bool.

    Returns:
        `metrics` has z0, per class num, rho and loss (absent for an empty class), and saturated: the share
        with |beta (rho - z0)| > 5, which hardly move.
    """
    _check_vectors(rho=rho, desirable=desirable)
    desirable = desirable.bool()
    z = beta * (rho - z0)
    _check_no_nan(z0=z)
    weight = torch.where(desirable, rho.new_tensor(lambda_pos), rho.new_tensor(lambda_neg))
    per_example = weight * torch.sigmoid(torch.where(desirable, -z, z))  # 1 - sigmoid(a) = sigmoid(-a)
    metrics = {"z0": float(z0), "saturated": _mean(z.detach().abs() > 5)}
    for name, members in (("desirable", desirable), ("undesirable", ~desirable)):
        metrics[f"num/{name}"] = float(members.sum())
        if members.any():
            metrics[f"rho/{name}"] = _mean(rho.detach()[members])
            metrics[f"loss/{name}"] = _mean(per_example.detach()[members])
    return _mean_out(per_example, metrics)


def sft_loss(
    lp: Tensor, mask: Tensor, reduction: Literal["token", "sequence_mean", "sequence_sum"] = "token"
) -> LossOut:
    """Negative log-likelihood of the action tokens.

    Args:
        reduction: "token" is the mean over all action tokens of the batch (`per_example` is None, because
            long rows count for more); "sequence_mean" the mean over rows of their token means;
            "sequence_sum" the mean over rows of their sums.
    """
    if reduction == "token":
        mask = _checked_mask(lp, mask)
        return LossOut(-_on_mask(lp, mask).sum() / mask.sum(), None, {})
    if reduction not in ("sequence_mean", "sequence_sum"):
        raise InputError(f"reduction {reduction!r}; expected 'token', 'sequence_mean' or 'sequence_sum'")
    return _mean_out(-masked_sum(lp, mask, normalize=reduction == "sequence_mean"), {})


def _mean_out(per_example: Tensor, metrics: dict[str, float]) -> LossOut:
    return LossOut(per_example.mean(), per_example, metrics)


def _mean(x: Tensor) -> float:
    return x.detach().double().mean().item()


def _convex(kind: str) -> Convex:
    if kind not in GPO:
        raise InputError(f"paired loss kind {kind!r}; expected one of {', '.join(GPO)}, ipo")
    return GPO[kind]


def _weighted(p: Tensor, f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """p f(z), 0 with gradient 0 where p = 0, even if f(z) is infinite there."""
    return p * f(torch.where(p > 0, z, 0.0))


def _checked_mask(x: Tensor, mask: Tensor) -> Tensor:
    if x.ndim != 2 or x.shape != mask.shape:
        raise InputError(f"values {tuple(x.shape)} and mask {tuple(mask.shape)} must both be (B, T)")
    mask = mask.bool()
    if not mask.any():
        raise InputError("the mask has no action token in the whole batch: nothing to learn from")
    return mask


def _on_mask(x: Tensor, mask: Tensor) -> Tensor:
    """x on the mask, 0 off it: `where`, because inf * 0 is nan."""
    x = torch.where(mask, x, 0.0)
    _check_no_nan(values=x)
    return x


def _check_vectors(**vectors: Tensor | None) -> None:
    given = {name: vector for name, vector in vectors.items() if vector is not None}
    _check_shapes(**given)
    name, first = next(iter(given.items()))
    if first.ndim != 1 or not len(first):
        raise InputError(f"{name} has shape {tuple(first.shape)}, expected (B,) with at least one example")
    _check_no_nan(**given)


def _check_shapes(**tensors: Tensor) -> None:
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise InputError(f"shapes differ: {shapes}")


def _check_no_nan(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if torch.isnan(tensor).any():
            raise InputError(f"{name} holds nan at index {torch.isnan(tensor).nonzero()[0].tolist()}")
