"""Optimisers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from mtpo.errors import InputError
from mtpo.models import unwrapped
from mtpo.training.settings import Schedule, TrainingSettings


def make_optimizer(model: nn.Module, settings: TrainingSettings) -> Optimizer:
    """AdamW for everything, or Muon for the hidden matrices and AdamW for embeddings, head, norms and biases.

    Raises:
        InputError: Muon is asked for and this torch does not have it (it came with 2.9).
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if settings.optimizer == "adamw":
        return adamw(trainable, settings, settings.learning_rate)
    if not hasattr(torch.optim, "Muon"):
        raise InputError(f"optimizer 'muon' needs torch 2.9 or newer, this is {torch.__version__}")
    inner = unwrapped(model)
    ends = [module for module in (inner.get_input_embeddings(), inner.get_output_embeddings()) if module]
    end_parameters = {id(parameter) for module in ends for parameter in module.parameters()}
    hidden = [p for p in trainable if p.ndim == 2 and id(p) not in end_parameters]
    muon = torch.optim.Muon(
        hidden,
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adjust_lr_fn="match_rms_adamw",  # so that both halves share one learning rate
    )
    chosen = {id(parameter) for parameter in hidden}
    others = [p for p in trainable if id(p) not in chosen]
    return JointOptimizer(muon, adamw(others, settings, settings.learning_rate))


def adamw(parameters: Iterable[nn.Parameter], settings: TrainingSettings, learning_rate: float) -> AdamW:
    """AdamW with weight decay on matrices only."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        fused=True,
    )


class JointOptimizer(Optimizer):
    """Several optimisers over disjoint parameters, as one: for schedulers, gradient clipping, checkpoints."""

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        # Loading replaces the dicts that a scheduler writes the learning rate into.
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def lr_factor(
    schedule: Schedule, num_steps: int, warmup_steps: int, final_ratio: float
) -> Callable[[int], float]:
    """From the number of finished steps to the factor on the learning rate of the next one.

    Linear warm-up from 1 / warmup_steps to 1, then cosine or linear to `final_ratio` at the last step, or 1.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps))
        falling = (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress
        return final_ratio + (1 - final_ratio) * falling

    return factor
