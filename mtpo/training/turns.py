"""Turns of a batch: which token belongs to which, where each starts, and what it was worth."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mtpo.losses import turn_gae, turn_sums


class TurnAdvantages(NamedTuple):
    """Of every turn of N trajectories, (N, H), without gradient; 0 where `valid` is not."""

    advantages: Tensor
    returns: Tensor
    valid: Tensor
    """bool: the turns that there are."""


def turn_ids(completion_mask: Tensor) -> Tensor:
    """(N, T): 0, 1, ... on the action tokens of each turn, a run of ones in the mask; -1 elsewhere."""
    is_action = completion_mask.bool()
    starts = is_action & ~torch.nn.functional.pad(is_action, (1, 0))[:, :-1]
    return torch.where(is_action, starts.cumsum(-1) - 1, -1)


def turn_starts(ids: Tensor) -> Tensor:
    """(N, H), H being the most turns of a row: the position of the token before each turn, where the state is that
    the turn is taken in; 0 for turns that a row lacks.

    Args:
        ids: (N, T), of `turn_ids`.
    """
    num_turns = int(ids.max()) + 1
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    is_turn = ids[:, None] == torch.arange(num_turns, device=ids.device)[:, None]  # (N, H, T)
    first = torch.where(is_turn, positions[:, None], ids.shape[1]).amin(-1)
    return torch.where(first < ids.shape[1], first - 1, 0)


def turn_advantages(
    log_ratios: Tensor, ids: Tensor, rewards: Tensor, values: Tensor, alpha: float, lam: float
) -> TurnAdvantages:
    """What every turn was worth, its KL to the reference charged once, in the reward (arXiv 2405.14655, section 4).

    The reward of turn h is -alpha times the sum of its tokens' log-ratios, and of the last turn also `rewards`.

    Args:
        log_ratios: (N, T), log p of the policy minus that of the reference.
        ids: (N, T), of `turn_ids`.
        rewards: (N,), of whole trajectories.
        values: (N, H), V where each turn starts.
        lam: lambda of the generalised advantage estimate.
    """
    num_turns = values.shape[1]
    last = ids.amax(-1)  # (N,)
    turn = torch.arange(num_turns, device=ids.device)
    of_turns = -alpha * turn_sums(log_ratios.detach(), ids, num_turns)
    of_turns = of_turns + torch.where(turn == last[:, None], rewards[:, None].to(of_turns), 0.0)
    valid = turn <= last[:, None]
    return TurnAdvantages(*turn_gae(of_turns, values.to(of_turns), valid, lam), valid)
