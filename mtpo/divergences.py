"""Divergences between the next-token distributions of two models: distillation, and KL terms in closed form.

Both models' logits exist for a tile of action positions at a time, forward and backward, so a second model costs its
hidden states and no (B, T, V) tensor. Each model's own head, bias and soft-cap make its logits. The model in training
is called through its wrappers, as in `mtpo.logprobs`; the other one gets no gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtpo.errors import InputError
from mtpo.logprobs import Watch, head_logits, logps_of, over_tiles, read_out
from mtpo.losses.distributions import Divergence, log_probs
from mtpo.scoring import batch_actions, batch_inputs
from mtpo.vocabularies import require_one_vocabulary

MAX_TILE = 1 << 24
"""Logits of each model that exist at once: 64 MiB in float32; the backward pass holds about ten such tiles."""

KL_FROM_POLICY = Divergence("reverse_kl")
"""KL(model || other), as KL(policy || reference) in an explicit penalty on samples of the policy."""
KL_FROM_REFERENCE = Divergence("forward_kl")
"""KL(other || model), as PMPO's KL(reference || policy) on samples of the reference."""


@dataclass(frozen=True)
class Comparison:
    """What a model in training is compared with, and how."""

    other: nn.Module | None
    """The teacher, or the reference; None for the model itself without its PEFT adapter."""
    divergence: Divergence


class Scored(NamedTuple):
    """What one forward pass says of the action tokens; both are 0 elsewhere."""

    logps: Tensor
    """(N, T), as `mtpo.scoring.batch_logps` has them."""
    divergences: Tensor
    """(N, T), in nats; entry t is between the distributions that token t was drawn from."""


def logps_and_divergences(
    model: nn.Module, batch: dict[str, Tensor], comparison: Comparison, *, watch: Watch | None = None
) -> Scored:
    """log p of the action tokens, and a divergence over the whole vocabulary at each, in one pass of either model.

    Args:
        model: the student, or the policy: a causal LM, bare or wrapped; both results carry its gradient.
        batch: of a collator, in any layout: `input_ids`, `completion_mask` and `attention_mask`, (N, T), at least.
        watch: shown some of the model's logits.

    Returns:
        float32, float64 for a float64 model.

    Raises:
        InputError: as `action_logps`; the models' vocabularies differ in size; or there is neither another model
            nor an adapter.
    """
    actions, divergence = batch_actions(batch, watch=watch), comparison.divergence
    with _other(model, comparison) as other, torch.no_grad():
        require_one_vocabulary({"model": model, "other model": other}, purpose="a divergence")
        theirs = read_out(other, lambda _, hidden: actions.states(hidden), **batch_inputs(other, batch))

    def value(logits: Tensor, tile: slice) -> Tensor:
        with _other(model, comparison) as other, torch.no_grad():
            target = log_probs(head_logits(other, theirs[tile]), divergence.temperature)
        return divergence.between(log_probs(logits, divergence.temperature), target)

    def readout(inner: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        states = actions.states(hidden)
        divergences = over_tiles(inner, states, value, max_tile=MAX_TILE)
        return logps_of(actions)(inner, hidden), actions.placed(divergences)

    return Scored(*read_out(model, readout, **batch_inputs(model, batch)))


@contextlib.contextmanager
def _other(model: nn.Module, comparison: Comparison) -> Iterator[nn.Module]:
    """The other model; without one, the model itself, its adapter switched off meanwhile."""
    if comparison.other is not None:
        yield comparison.other
        return
    adapted: Any = model
    while not hasattr(adapted, "disable_adapter"):
        adapted = getattr(adapted, "module", None) or getattr(adapted, "_orig_mod", None)
        if adapted is None:
            raise InputError("there is no other model, and the model has no adapter to leave out")
    with adapted.disable_adapter():
        yield model
