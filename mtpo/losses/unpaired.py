"""Losses of single trajectories with a label or a reward: KTO, PMPO, DRO."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtpo.errors import InputError
from mtpo.losses.checks import LossOut, check_no_nan, check_vectors, explained_variance, mean, mean_out


def kto_baseline(rho_mismatch: Tensor, group: Any = None) -> Tensor:
    """z0 = max(0, mean log-ratio of mismatched trajectories), detached: stands for E KL(policy || ref).

    Args:
        rho_mismatch: (M,), log-ratios of trajectories whose prompt is another one's; M may be 0 on a process
            as long as some process has one.
        group: the process group to average over; every process, if torch.distributed is running, by default.
    """
    if rho_mismatch.ndim != 1:
        raise InputError(f"rho_mismatch has shape {tuple(rho_mismatch.shape)}, expected (M,)")
    check_no_nan(rho_mismatch=rho_mismatch)
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
    check_vectors(rho=rho, desirable=desirable)
    desirable = desirable.bool()
    z = beta * (rho - z0)
    check_no_nan(z0=z)
    weight = torch.where(desirable, rho.new_tensor(lambda_pos), rho.new_tensor(lambda_neg))
    per_example = weight * torch.sigmoid(torch.where(desirable, -z, z))  # 1 - sigmoid(a) = sigmoid(-a)
    metrics = {"z0": float(z0), "saturated": mean(z.detach().abs() > 5)}
    for name, members in (("desirable", desirable), ("undesirable", ~desirable)):
        metrics[f"num/{name}"] = float(members.sum())
        if members.any():
            metrics[f"rho/{name}"] = mean(rho.detach()[members])
            metrics[f"loss/{name}"] = mean(per_example.detach()[members])
    return mean_out(per_example, metrics)


def pmpo_loss(
    score: Tensor,
    accepted: Tensor,
    kl: Tensor,
    alpha: float = 0.5,
    beta: float = 0.5,
    *,
    accepted_share: Tensor | float | None = None,
) -> LossOut:
    """-alpha mean_A S + (1 - alpha) mean_R S + beta mean KL, over accepted (A) and rejected (R) trajectories.

    Preference optimisation as inference (Abdolmaleki et al. 2024). An empty set contributes 0. The likelihood of
    the rejected falls without bound where `beta` is not above 1 - alpha.

    Args:
        score: (B,), S of the policy, summed over action tokens, or their mean.
        accepted: (B,) bool.
        kl: (B,), KL(reference || policy) of each trajectory, on the scale of `score`.
        alpha: 1 learns from the accepted alone, 0 from the rejected alone.
        accepted_share: of the global batch that this one is a part of, so that the parts' losses, weighted by
            their sizes, average to the global one; by default this batch's own.

    Returns:
        `metrics` has kl and, per class, num and score (absent for an empty class).
    """
    check_vectors(score=score, accepted=accepted, kl=kl)
    if not 0 <= alpha <= 1:
        raise InputError(f"pmpo_loss: alpha must lie in [0, 1], got {alpha}")
    accepted = accepted.bool()
    share = torch.as_tensor(accepted.double().mean() if accepted_share is None else accepted_share).to(score)
    # 1 / share turns a mean over a class into one over the batch; an empty class has no member to weigh.
    weight = torch.where(accepted, -alpha / share, (1 - alpha) / (1 - share))
    metrics = {"kl": mean(kl)}
    for name, members in (("accepted", accepted), ("rejected", ~accepted)):
        metrics[f"num/{name}"] = float(members.sum())
        if members.any():
            metrics[f"score/{name}"] = mean(score[members])
    return mean_out(weight * score + beta * kl, metrics)


def dro_policy_loss(rho: Tensor, reward: Tensor, value: Tensor, tau: float = 1.0) -> LossOut:
    """Mean of (r - V - tau rho)^2 / (2 tau), V being constant here (Richemond et al. 2024, DRO-V).

    Args:
        rho, reward, value: (B,); `value` is V of each prompt.

    Returns:
        `metrics` has residual (mean of r - V - tau rho), residual_std, rho and value.
    """
    check_vectors(rho=rho, reward=reward, value=value)
    residual = reward - value.detach() - _positive(tau) * rho
    metrics = {
        "residual": mean(residual),
        "residual_std": residual.detach().double().std(unbiased=False).item(),
        "rho": mean(rho),
        "value": mean(value),
    }
    return mean_out(residual.square() / (2 * tau), metrics)


def dro_value_loss(value: Tensor, reward: Tensor, rho: Tensor, tau: float = 1.0) -> LossOut:
    """Mean of (V - (r - tau rho))^2 / 2, the target being constant here (Richemond et al. 2024, DRO-V).

    Args:
        value, reward, rho: (B,).

    Returns:
        `metrics` has explained_variance of the target by V, if the target varies.
    """
    check_vectors(value=value, reward=reward, rho=rho)
    target = (reward - _positive(tau) * rho).detach()
    return mean_out((value - target).square() / 2, explained_variance(value, target))


def _positive(tau: float) -> float:
    if not tau > 0:
        raise InputError(f"tau must be positive, got {tau}")
    return tau
