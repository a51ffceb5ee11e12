"""The log-prob primitive that every method shares, and the language-model head behind it.

Only positions whose next token is an action token reach the head, in tiles, forward and backward, so that
(B, T, V) logits never exist. The head is reached through the wrapped model: the causal LM gets a forward
with a `readout` keyword, a function of its last hidden states, so that the hooks of DDP, FSDP, DeepSpeed and
PEFT fire. Calling the backbone of the unwrapped model instead would leave DDP silently unsynchronised.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from mtpo.errors import InputError
from mtpo.models import unwrapped, whole

MAX_TILE = 1 << 26
"""Logits that exist at once: 256 MiB in float32; the backward pass holds about three such tiles."""

MAX_KEPT = 3 << 25
"""Logits of a forward pass that wait for its backward pass, 384 MiB in float32; the others are computed again."""

UNSUPPORTED_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""Config fields of families that scale their logits (Cohere, Granite, Falcon-H1), which this head does not."""

Watch = Callable[[Tensor], None]
"""What is shown some logits, (n, V), soft-capped, that are computed anyway."""

NUM_WATCHED = 64
"""Rows of logits that a `Watch` is shown at once."""

Readout = Callable[[Any, Tensor], Any]
"""What to make of a causal LM, unwrapped, and its last hidden states, (B, T, H): a tensor, or a tuple of them."""


def action_logps(
    model: nn.Module,
    input_ids: Tensor,
    completion_mask: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """log p(token t | tokens before it), in nats, on the tokens that the model wrote.

    Args:
        model: a causal LM of transformers, bare or wrapped (PEFT, DDP, FSDP, DeepSpeed).
        input_ids: (B, T), padded on the right.
        completion_mask: (B, T); 1 where the model wrote the token, 0 on prompt, tool output and padding.
        attention_mask: (B, T); 0 on padding. Right padding cannot be seen by earlier tokens, so without a mask
            the result is the same.

    Returns:
        (B, T) float32, float64 for a float64 model; 0 off the mask.

    Raises:
        InputError: the shapes differ, the mask marks token 0, which nothing predicts, or the model is of a
            family whose head this module does not know.
    """
    readout = logps_of(Actions(input_ids, completion_mask))
    return read_out(model, readout, input_ids, attention_mask=attention_mask, position_ids=position_ids)


@dataclass(frozen=True)
class Actions:
    """The action tokens of a batch, and the hidden states that predict them; N of them without `places`.

    Raises:
        InputError: the shapes differ, or the mask marks token 0, which nothing predicts.
    """

    input_ids: Tensor
    """(B, T), the trajectories."""
    completion_mask: Tensor
    """(B, T)."""
    places: Tensor | None = None
    """(B, T); where each token lies among the flattened last hidden states, if these are of other rows than
    `input_ids`. What trajectories share there is predicted once, which leaves fewer than N tokens."""
    watch: Watch | None = None
    """Shown some of the logits that predict the tokens, whenever log-probs are read out."""

    def __post_init__(self) -> None:
        if self.input_ids.ndim != 2 or self.input_ids.shape != self.completion_mask.shape:
            raise InputError(
                f"input_ids {tuple(self.input_ids.shape)} and completion_mask "
                f"{tuple(self.completion_mask.shape)} must both be (B, T)"
            )
        if self.completion_mask[:, 0].any():
            raise InputError("completion_mask marks token 0, which nothing predicts: is the prompt empty?")

    @property
    def targets(self) -> Tensor:
        """(N,), the tokens."""
        if self.places is None:
            return self.input_ids[self.completion_mask.bool()]
        (_, targets), _ = self._distinct
        return targets

    def states(self, hidden: Tensor) -> Tensor:
        """(N, H) of the last hidden states, (B, T, H): each from the position before its token."""
        if self.places is None:
            return hidden[:, :-1][self.completion_mask[:, 1:].bool()]
        (sources, _), _ = self._distinct
        return hidden.flatten(0, 1)[sources]

    def placed(self, values: Tensor) -> Tensor:
        """(B, T) with the values, (N,), where the tokens stand, and 0 elsewhere."""
        if self.places is not None:
            _, copies = self._distinct
            values = values[copies]
        return values.new_zeros(self.input_ids.shape).masked_scatter(self.completion_mask.bool(), values)

    @functools.cached_property
    def _distinct(self) -> tuple[Tensor, Tensor]:
        """Source and target of what is to be predicted, (2, S), and which of these each action token is, (N,)."""
        assert self.places is not None
        is_action = self.completion_mask[:, 1:].bool()
        pairs = torch.stack([self.places[:, :-1][is_action], self.input_ids[:, 1:][is_action]])
        return pairs.unique(dim=1, return_inverse=True)  # pyright: ignore[reportReturnType]


def read_out(model: nn.Module, readout: Readout, input_ids: Tensor, **inputs: Any) -> Any:
    """What `readout` makes of the last hidden states, inside the forward pass of the model and its wrappers.

    Args:
        model: a causal LM of transformers, bare or wrapped (PEFT, DDP, FSDP, DeepSpeed).
        input_ids: (B, T).
        inputs: what else the model's backbone takes: `attention_mask`, `position_ids`.
    """
    install(unwrapped(model))
    return model(input_ids=input_ids, readout=readout, **inputs)


def head_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """The model's logits, (..., V), for its last hidden states, (..., H): bias and soft-cap included.

    float32, float64 for a float64 model. The one place that knows how a family ends.
    """
    head, softcap = unwrapped(model).get_output_embeddings(), final_softcap(model)
    with torch.autocast(hidden.device.type, enabled=False):
        if _is_plain(head):
            return _capped(_project(hidden, head.weight, head.bias), softcap)
        return _capped(_at_least_float32(head(hidden)), softcap)


def final_softcap(model: nn.Module) -> float | None:
    """cap of `cap * tanh(logits / cap)`, or None.

    Raises:
        InputError: the family scales its logits in a way that this module does not know.
    """
    config = unwrapped(model).config.get_text_config()
    for name in UNSUPPORTED_SCALES:
        if getattr(config, name, None) not in (None, 1.0):
            raise InputError(
                f"{config.model_type} models scale their logits ({name}), which is not supported"
            )
    return getattr(config, "final_logit_softcapping", None)


def install(model: Any) -> None:
    """Give a causal LM the `readout` keyword; without it, its forward is what it was. Idempotent."""
    if getattr(model, "_has_readout", False):
        return
    original = type(model).forward  # the class's own: a copy.deepcopy of the model must not call this one

    @functools.wraps(original)  # generate() reads the signature
    def forward(self: Any, *args: Any, readout: Readout | None = None, **kwargs: Any) -> Any:
        if readout is None:
            return original(self, *args, **kwargs)
        return readout(self, self.base_model(*args, use_cache=False, **kwargs).last_hidden_state)

    model.forward = types.MethodType(forward, model)
    model._has_readout = True


def logps_of(actions: Actions) -> Readout:
    """Reads log p of the tokens, (B, T), out of the last hidden states, as `action_logps` does."""

    def readout(model: Any, hidden: Tensor) -> Tensor:
        logps = logps_after(model, actions.states(hidden), actions.targets, watch=actions.watch)
        return actions.placed(logps)

    return readout


def entropies(logits: Tensor) -> Tensor:
    """Of the distributions that logits, (..., V), stand for: (...), in nats."""
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


def logps_after(model: Any, hidden: Tensor, targets: Tensor, *, watch: Watch | None = None) -> Tensor:
    """log p of each target, (N,), after its hidden state, (N, H); `model` is unwrapped.

    On every device this is our own: TRL's fused kernel rounds the logits of a bfloat16 model to bfloat16, which near
    Gemma 2's cap of 30 costs 0.015 nats a token.

    Args:
        watch: shown the logits of up to `NUM_WATCHED` hidden states of the first tile.
    """
    normalizers = torch.empty(len(hidden), dtype=_wide(hidden.dtype), device=hidden.device)

    def value(logits: Tensor, tile: slice) -> Tensor:
        if watch is not None and tile.start == 0:
            watch(logits.detach()[:: math.ceil(len(logits) / NUM_WATCHED) or 1])
        picked = logits.gather(-1, targets[tile, None]).squeeze(-1)
        normalizer = _log_sum_exp(logits)
        normalizers[tile] = normalizer.detach()
        return picked - normalizer

    def gradient(logits: Tensor, tile: slice, upstream: Tensor) -> Tensor:
        # d logp / d logits = one_hot(target) - softmax
        delta = (logits - normalizers[tile, None]).exp_().mul_(-upstream[:, None])
        return delta.scatter_add_(-1, targets[tile, None], upstream[:, None])

    return over_tiles(model, hidden, value, gradient)


def over_tiles(
    model: Any,
    hidden: Tensor,
    value: Callable[[Tensor, slice], Tensor],
    gradient: Callable[[Tensor, slice, Tensor], Tensor] | None = None,
    *,
    max_tile: int | None = None,
) -> Tensor:
    """One number for each hidden state, from the model's logits there, a tile of them at a time.

    The backward pass computes the logits again, but for the first `MAX_KEPT`. Sums over rows and over the vocabulary
    run in float32, also for half-precision weights.

    Args:
        model: a causal LM of transformers, unwrapped.
        hidden: (N, H).
        value: from the logits (n, V) of the hidden states that a slice picks, soft-capped, to (n,). Where autograd
            does not record, it may overwrite them.
        gradient: from the same and the gradient of the result, (n,), to that of the logits, (n, V), in a tensor of
            its own; by default what autograd makes of `value`, which holds a few more tiles.
        max_tile: logits that exist at once; `MAX_TILE` by default.

    Returns:
        (N,) float32, float64 for a float64 model.
    """
    head, softcap = model.get_output_embeddings(), final_softcap(model)
    rows = max(1, (max_tile or MAX_TILE) // model.config.get_text_config().vocab_size)
    if _is_plain(head):
        gradient = gradient or _by_autograd(value)
        weight = _as_autocast(whole(head.weight))
        num_kept = MAX_KEPT // len(weight) if torch.is_grad_enabled() else 0
        return _Tiled.apply(hidden, weight, whole(head.bias), value, gradient, softcap, rows, num_kept)

    def tile_value(hidden: Tensor, tile: slice) -> Tensor:
        return value(head_logits(model, hidden), tile)

    # LoRA on the head, say: whatever the module computes, recomputed in the backward pass.
    tiles = _tiles(len(hidden), rows) or [slice(0, 0)]
    return torch.cat([checkpoint(tile_value, hidden[tile], tile, use_reentrant=False) for tile in tiles])  # pyright: ignore


def _by_autograd(value: Callable[[Tensor, slice], Tensor]) -> Callable[[Tensor, slice, Tensor], Tensor]:
    def gradient(logits: Tensor, tile: slice, upstream: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            return torch.autograd.grad(value(leaf, tile), leaf, upstream)[0]

    return gradient


class _Tiled(torch.autograd.Function):
    """value(cap(hidden @ weight.T + bias)), computing most tiles of logits again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        value: Callable[[Tensor, slice], Tensor],
        gradient: Callable[[Tensor, slice, Tensor], Tensor],
        softcap: float | None,
        rows: int,
        num_kept: int,
    ) -> Tensor:
        values = torch.empty(len(hidden), dtype=_wide(hidden.dtype), device=hidden.device)
        buffer = _tile_buffer(hidden, weight, rows)
        kept = {}
        with torch.autocast(hidden.device.type, enabled=False):
            for tile in _tiles(len(hidden), rows, num_kept):
                logits = _tile_logits(hidden[tile], weight, bias, softcap, buffer)
                if tile.start < num_kept:
                    kept[tile.start] = logits.clone()  # `value` may overwrite the others
                values[tile] = value(logits, tile)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.gradient, ctx.softcap, ctx.rows, ctx.num_kept, ctx.kept = gradient, softcap, rows, num_kept, kept
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, bias = ctx.saved_tensors
        (of_values,) = upstream
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=of_values.dtype) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=of_values.dtype) if wants_bias else None
        buffer = _tile_buffer(hidden, weight, ctx.rows)
        for tile in _tiles(len(hidden), ctx.rows, ctx.num_kept):
            logits = ctx.kept.pop(tile.start, None)
            if logits is None:
                logits = _tile_logits(hidden[tile], weight, bias, ctx.softcap, buffer)
            delta = ctx.gradient(logits, tile, of_values[tile])
            if ctx.softcap is not None:
                delta.mul_(logits.div_(ctx.softcap).square_().neg_().add_(1))  # 1 - tanh^2, through the cap
            if grad_hidden is not None:
                grad_hidden[tile] = _matmul(delta, weight).to(hidden.dtype)
            if grad_weight is not None:
                _add_matmul(grad_weight, delta.T, hidden[tile])
            if grad_bias is not None:
                grad_bias += delta.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *[None] * 5,
        )


def _tiles(length: int, rows: int, border: int = 0) -> list[slice]:
    """Of at most `rows`, none of them across the border."""
    border = min(border, length)
    spans = ((0, border), (border, length))
    return [slice(start, min(start + rows, end)) for first, end in spans for start in range(first, end, rows)]


def _tile_buffer(hidden: Tensor, weight: Tensor, rows: int) -> Tensor | None:
    """Memory for a tile of logits: on a CPU, fresh pages for each tile would cost as much as a product."""
    if hidden.is_cuda:
        return None
    dtype = _wide(torch.promote_types(hidden.dtype, weight.dtype))
    return torch.empty(min(rows, len(hidden)), len(weight), dtype=dtype, device=hidden.device)


def _tile_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, buffer: Tensor | None
) -> Tensor:
    """`_capped` of `_project`, in place."""
    logits = _matmul(hidden, weight.T, out=None if buffer is None else buffer[: len(hidden)])
    if bias is not None:
        logits += bias
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _log_sum_exp(logits: Tensor) -> Tensor:
    """Over the last dimension; where autograd does not record, in place."""
    if torch.is_grad_enabled():
        return logits.logsumexp(-1)
    largest = logits.amax(-1, keepdim=True)
    return logits.sub_(largest).exp_().sum(-1).log_() + largest.squeeze(-1)


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = _matmul(hidden, weight.T)
    return logits if bias is None else logits + bias.to(logits.dtype)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in float32 (float64 if either is), rounding nothing to half precision on the way out."""
    if _multiplies_narrow(b) and a.ndim == 2 and not torch.is_grad_enabled():
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    dtype = _wide(torch.promote_types(a.dtype, b.dtype))
    return torch.matmul(a.to(dtype), b.to(dtype), out=out)


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, rounded like `_matmul` and without another tensor of that size."""
    if _multiplies_narrow(b):
        torch.addmm(total, a.to(b.dtype), b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _multiplies_narrow(b: Tensor) -> bool:
    """A product with it can take half precision in and give float32 out."""
    return b.is_cuda and b.dtype in (torch.bfloat16, torch.float16)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(_wide(x.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _is_plain(head: nn.Module) -> bool:
    """The head is its weight and bias: no LoRA, no quantisation, no other module in disguise."""
    return isinstance(head, nn.Linear) and head.weight.is_floating_point()


def _as_autocast(weight: Tensor) -> Tensor:
    """What autocast multiplies by: on a GPU, products of float32 would take longer than the rest of the model."""
    device = weight.device.type
    if weight.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return weight.to(torch.get_autocast_dtype(device))
    return weight
