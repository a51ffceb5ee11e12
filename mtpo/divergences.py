"""Divergences between the next-token distributions of two models: distillation, and KL terms in closed form.

Both models' logits exist for a tile of action positions at a time, forward and backward, so a second model costs its
hidden states and no (B, T, V) tensor. Each model's own head, bias and soft-cap make its logits. The model in training
is called through its wrappers, as in `mtpo.logprobs`; the other one gets no gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtpo.errors import InputError
from mtpo.logprobs import Actions, head_logits, logps_after, over_tiles, read_out
from mtpo.losses.distributions import Divergence, log_probs
from mtpo.models import unwrapped

MAX_TILE = 1 << 24
"""Logits of each model that exist at once: 64 MiB in float32; the backward pass holds about ten such tiles."""

KL_FROM_POLICY = Divergence("reverse_kl")
"""KL(model || other), as KL(policy || reference) in an explicit penalty on samples of the policy."""
KL_FROM_REFERENCE = Divergence("forward_kl")
"""KL(other || model), as PMPO's KL(reference || policy) on samples of the reference."""


class Scored(NamedTuple):
    """What one forward pass says of the action tokens; both are 0 elsewhere."""

    logps: Tensor
    """(B, T), as `mtpo.logprobs.action_logps` has them."""
    divergences: Tensor
    """(B, T), in nats; entry t is between the distributions that token t was drawn from."""


def logps_and_divergences(
    model: nn.Module,
    other: nn.Module | None,
    input_ids: Tensor,
    completion_mask: Tensor,
    divergence: Divergence,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Scored:
    """log p of the action tokens, and a divergence over the whole vocabulary at each, in one pass of either model.

    Args:
        model: the student, or the policy: a causal LM, bare or wrapped; both results carry its gradient.
        other: the teacher, or the reference; None for `model` without its PEFT adapter.
        input_ids, completion_mask, attention_mask, position_ids: as for `action_logps`.

    Returns:
        float32, float64 for a float64 model.

    Raises:
        InputError: as `action_logps`; the models' vocabularies differ in size; or there is neither another model
            nor an adapter.
    """
    actions = Actions(input_ids, completion_mask)
    inputs: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids}
    with _as_other(model, other) as reference, torch.no_grad():
        _check_vocabularies(model, reference)
        theirs = read_out(reference, lambda _, hidden: actions.states(hidden), input_ids, **inputs)  # (N, H')

    def value(logits: Tensor, tile: slice) -> Tensor:
        with _as_other(model, other) as reference, torch.no_grad():
            target = log_probs(head_logits(reference, theirs[tile]), divergence.temperature)
        return divergence.between(log_probs(logits, divergence.temperature), target)

    def readout(inner: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        states = actions.states(hidden)  # (N, H)
        logps = logps_after(inner, states, actions.targets)
        return actions.placed(logps), actions.placed(over_tiles(inner, states, value, max_tile=MAX_TILE))

    return Scored(*read_out(model, readout, input_ids, **inputs))


@contextlib.contextmanager
def _as_other(model: nn.Module, other: nn.Module | None) -> Iterator[nn.Module]:
    """The other model; without one, the model itself, its adapter switched off meanwhile."""
    if other is not None:
        yield other
        return
    adapted: Any = model
    while not hasattr(adapted, "disable_adapter"):
        adapted = getattr(adapted, "module", None) or getattr(adapted, "_orig_mod", None)
        if adapted is None:
            raise InputError("there is no other model, and the model has no adapter to leave out")
    with adapted.disable_adapter():
        yield model


def _check_vocabularies(model: nn.Module, other: nn.Module) -> None:
    sizes = [unwrapped(m).config.get_text_config().vocab_size for m in (model, other)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the models predict {sizes[0]} and {sizes[1]} tokens: a divergence needs one vocabulary"
        )
