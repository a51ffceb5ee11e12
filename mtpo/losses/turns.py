"""Credit for tokens and turns, and the losses of a policy gradient and of a value network."""

from __future__ import annotations

import torch
from torch import Tensor

from mtpo.errors import InputError
from mtpo.losses.checks import (
    LossOut,
    check_no_nan,
    check_shapes,
    checked_mask,
    explained_variance,
    mean,
    on_mask,
)


def reward_to_go(x: Tensor, mask: Tensor) -> Tensor:
    """At each action token the sum of x over it and the action tokens after it; 0 off the mask. (B, T)."""
    mask = checked_mask(x, mask)
    return on_mask(on_mask(x, mask).flip(-1).cumsum(-1).flip(-1), mask)


def turn_sums(x: Tensor, turn_id: Tensor, n_turns: int) -> Tensor:
    """Sum the tokens of each turn.

    Args:
        x: (B, T).
        turn_id: (B, T) int, 0 to n_turns - 1 on action tokens and -1 off them.

    Returns:
        (B, n_turns); 0 for turns without a token.
    """
    check_shapes(x=x, turn_id=turn_id)
    if x.ndim != 2 or turn_id.max() >= n_turns or turn_id.min() < -1:
        raise InputError(
            f"turn_id must be (B, T) from -1 to {n_turns - 1}, got {tuple(turn_id.shape)} from "
            f"{turn_id.min()} to {turn_id.max()}"
        )
    is_action = turn_id >= 0
    sums = x.new_zeros(len(x), n_turns)
    return sums.scatter_add(1, turn_id.clamp(min=0), on_mask(x, is_action))


def turn_gae(rewards: Tensor, values: Tensor, valid: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates over turns, without discount (Schulman et al. 2015, eq. 16, gamma = 1).

    delta_h = r_h + V_{h+1} - V_h with V = 0 after the last turn, and A_h = delta_h + lam A_{h+1}.

    Args:
        rewards, values: (B, H); `values` is V where the turn starts.
        valid: (B, H) bool, the turns that there are, without a gap from the first on; the others change nothing.

    Returns:
        Advantages and returns A + V, both (B, H), without gradient, 0 where not valid.
    """
    check_shapes(rewards=rewards, values=values, valid=valid)
    valid = checked_mask(rewards, valid)
    if (valid[:, 1:] & ~valid[:, :-1]).any():
        raise InputError("the valid turns of a row must be its first ones, without a gap")
    rewards, values = on_mask(rewards.detach(), valid), on_mask(values.detach(), valid)
    advantages = torch.zeros_like(rewards)
    later_value = later_advantage = rewards.new_zeros(len(rewards))
    for turn in reversed(range(rewards.shape[1])):
        delta = rewards[:, turn] + later_value - values[:, turn]
        later_advantage = on_mask(delta + lam * later_advantage, valid[:, turn])
        later_value = values[:, turn]
        advantages[:, turn] = later_advantage
    return advantages, advantages + values


def policy_gradient_loss(lp: Tensor, mask: Tensor, weight: Tensor, denom: Tensor | float) -> LossOut:
    """-sum over action tokens of weight * lp, divided by `denom`; its gradient is that of the score function.

    Args:
        lp: (B, T), log-probs of the policy; only they carry gradient.
        weight: (B, T), what each token is worth: an advantage or a reward to go.
        denom: what the sum is divided by: the trajectories or turns of the global batch.

    Returns:
        `per_example` is scaled so that `loss` is its mean.
    """
    mask = checked_mask(lp, mask)
    check_shapes(lp=lp, weight=weight)
    per_row = -(on_mask(weight.detach(), mask) * on_mask(lp, mask)).sum(-1)
    return LossOut(per_row.sum() / denom, per_row * len(lp) / denom, {})


def value_loss(values: Tensor, returns: Tensor, valid: Tensor) -> LossOut:
    """Mean over the valid turns of (V - return)^2; the returns carry no gradient.

    Args:
        values, returns: (B, H).
        valid: (B, H) bool.

    Returns:
        `per_example` is None, because long rows count for more. `metrics` has explained_variance, if the returns
        vary, and value.
    """
    check_shapes(values=values, returns=returns, valid=valid)
    valid = checked_mask(values, valid)
    value, target = values[valid], returns.detach()[valid]
    check_no_nan(values=value, returns=target)
    metrics = {"value": mean(value)} | explained_variance(value, target)
    return LossOut((value - target).square().mean(), None, metrics)
