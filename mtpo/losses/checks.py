"""What every loss returns and checks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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


def mean_out(per_example: Tensor, metrics: dict[str, float]) -> LossOut:
    return LossOut(per_example.mean(), per_example, metrics)


def mean(x: Tensor) -> float:
    return x.detach().double().mean().item()


def checked_mask(x: Tensor, mask: Tensor) -> Tensor:
    if x.ndim != 2 or x.shape != mask.shape:
        raise InputError(f"values {tuple(x.shape)} and mask {tuple(mask.shape)} must both be (B, T)")
    mask = mask.bool()
    if not mask.any():
        raise InputError("the mask has no action token in the whole batch: nothing to learn from")
    return mask


def on_mask(x: Tensor, mask: Tensor) -> Tensor:
    """x on the mask, 0 off it: `where`, because inf * 0 is nan."""
    x = torch.where(mask, x, 0.0)
    check_no_nan(values=x)
    return x


def check_vectors(**vectors: Tensor | None) -> None:
    given = {name: vector for name, vector in vectors.items() if vector is not None}
    check_shapes(**given)
    name, first = next(iter(given.items()))
    if first.ndim != 1 or not len(first):
        raise InputError(f"{name} has shape {tuple(first.shape)}, expected (B,) with at least one example")
    check_no_nan(**given)


def check_shapes(**tensors: Tensor) -> None:
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise InputError(f"shapes differ: {shapes}")


def check_no_nan(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if torch.isnan(tensor).any():
            raise InputError(f"{name} holds nan at index {torch.isnan(tensor).nonzero()[0].tolist()}")


def explained_variance(value: Tensor, target: Tensor) -> dict[str, float]:
    """The share of the target's variance that the value explains, as a metric; none if the target does not vary."""
    variance, left = (x.detach().double().var(unbiased=False).item() for x in (target, value - target))
    return {"explained_variance": 1 - left / variance} if variance else {}
