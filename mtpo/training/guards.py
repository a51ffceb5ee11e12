"""Checks at run time that training would be silently wrong; each answers a bug that other trainers have had."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mtpo.batches import Row, SingleCollator, row_name, sides
from mtpo.errors import GuardError, InputError
from mtpo.logprobs import action_logps
from mtpo.models import unwrapped
from mtpo.trajectory import Trajectory

LARGEST_MEAN_GAP = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.02}
"""Mean |log p of the engine - log p of the trainer| per token, in nats, that rounding explains."""


class LogpGap(NamedTuple):
    """How far the engine's log-probs are from the trainer's, over the tokens of some trajectories."""

    mean: float
    max: float
    num_tokens: int


def check_one_bos(rows: Sequence[Row], bos_id: int) -> None:
    """
    Raises:
        InputError: the inserted ids of a row hold the BOS twice, or not at all although other rows have one.
    """
    found = [
        (
            row,
            sum(
                i == bos_id and not m
                for i, m in zip(row[f"{s}input_ids"], row[f"{s}completion_mask"], strict=True)
            ),
        )
        for row in rows
        for s in sides(row)
    ]
    expected = int(any(count for _, count in found))
    for row, count in found:
        if count != expected:
            raise InputError(
                f"{row_name(row)}: the BOS id {bos_id} stands {count} times among its inserted ids, expected {expected}"
            )


@torch.no_grad()
def engine_gap(model: nn.Module, trajectories: Sequence[Trajectory]) -> LogpGap:
    """Compare the log-probs that came with sampled trajectories with those that training would see.

    Args:
        model: the weights that sampled them.
        trajectories: any whose actions carry log-probs.

    Raises:
        InputError: none does.
        GuardError: the mean gap is more than rounding: sampler and trainer do not run the same model.
    """
    gaps: list[torch.Tensor] = []
    device = next(model.parameters()).device
    for trajectory in trajectories:
        if not trajectory.actions or any(a.logps is None for a in trajectory.actions):
            continue
        row = {"input_ids": trajectory.input_ids, "completion_mask": trajectory.completion_mask}
        batch: dict[str, Any] = {name: t.to(device) for name, t in SingleCollator(0)([row]).items()}
        scored = action_logps(model, **batch)[batch["completion_mask"].bool()]
        sampled = torch.tensor([p for a in trajectory.actions for p in a.logps or ()], device=device)
        gaps.append((scored - sampled).abs().double())
    if not gaps:
        raise InputError("no trajectory carries the engine's log-probs: there is nothing to compare")
    every = torch.cat(gaps)
    gap = LogpGap(every.mean().item(), every.max().item(), len(every))
    if not gap.mean <= LARGEST_MEAN_GAP[unwrapped(model).dtype]:
        raise GuardError(
            f"engine and trainer disagree on log-probs by {gap.mean:.2g} nats a token on average, at most "
            f"{gap.max:.2g}: other weights, another attention, or a dropped soft-cap"
        )
    return gap


class EqualGradients(TrainerCallback):
    """Before the first update, checks that all processes hold the same gradients, shards of them apart."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step or PartialState().num_processes == 1:
            return
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
        check_equal_norms(gather_object([sum(g.double().square().sum().item() for g in whole) ** 0.5]))


def check_equal_norms(norms: Sequence[float]) -> None:
    """
    Raises:
        GuardError: the norms, one a process, differ by more than the order of a sum explains.
    """
    if max(norms) - min(norms) > 1e-6 * max(norms):
        raise GuardError(
            f"gradient norms differ between processes ({norms}): their gradients are not synchronised"
        )
