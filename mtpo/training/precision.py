"""bfloat16: what may be computed in it, and what is lost if weights are kept in it.

bfloat16 has 8 significant bits, so neighbouring values are 1/256 to 1/128 of themselves apart. At the papers'
learning rates of 2e-7 to 4e-7 an AdamW step asks for far less of nearly every weight. So weights that are trained
stay in float32, and bfloat16 is what autocast computes in; keeping them in bfloat16 has to be asked for and is
watched.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

log = logging.getLogger(__name__)

MOSTLY_LOST = 0.5
"""Share of the watched weights that a step leaves as they were, from which on it is told."""
WATCHED = 1024
"""Weights of each parameter that are compared."""


def keep_trained_weights_in_float32(model: nn.Module) -> None:
    """Of bfloat16 weights, those that are trained become float32, in place: an optimiser's small steps add up."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()


class LostUpdates(TrainerCallback):
    """Warns, once, if a step at the full learning rate leaves most bfloat16 weights with a gradient as they were."""

    def __init__(self, warmup_steps: int) -> None:
        self.warmup_steps = warmup_steps
        self.has_warned = False
        self._before: list[tuple[Tensor, Tensor, Tensor]] = []
        """The parameter, which of its first weights have a gradient, and these weights."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.has_warned or state.global_step < self.warmup_steps:
            return
        for parameter in kwargs["model"].parameters():
            if parameter.dtype == torch.bfloat16 and parameter.grad is not None:
                moves = _first(parameter.grad) != 0
                self._before.append((parameter, moves, _first(parameter)[moves].clone()))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        num_watched = sum(len(weights) for _, _, weights in self._before)
        num_same = sum(int((_first(p)[moves] == weights).sum()) for p, moves, weights in self._before)
        self._before.clear()
        if num_watched and num_same / num_watched > MOSTLY_LOST:
            self.has_warned = True
            log.warning(
                "step %d left %.0f%% of the bfloat16 weights that have a gradient as they were: so small a change is "
                "rounded away; train without pure_bfloat16, or at a larger learning rate",
                state.global_step + 1,
                100 * num_same / num_watched,
            )


def _first(tensor: Tensor) -> Tensor:
    local = tensor.detach()
    local = local.to_local() if hasattr(local, "to_local") else local  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    return local.flatten()[:WATCHED]
