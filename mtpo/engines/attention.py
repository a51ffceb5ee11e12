"""Attention of the embedded engine: its masks, and scores that read keys and values where they are cached.

The attention of transformers first copies the cache of every key-value head once for each query head that shares it,
in every layer of every step. Here those queries are the rows of one product instead: the same sums, the same
soft-cap and mask, and for a decoding step on a CPU an eighth of the time.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from mtpo.errors import InputError

GROUPED = "mtpo_grouped"
GROUPED_FAMILIES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
"""Model types whose own eager attention computes what `grouped_attention` does; others have sinks, biases, ..."""


def grouped_attention(
    module: nn.Module,
    query: Tensor,  # (B, heads, T, D)
    key: Tensor,  # (B, kv heads, L, D)
    value: Tensor,
    attention_mask: Tensor,  # (B, 1, T, L), additive
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax(softcap * tanh(q k^T * scaling / softcap) + mask) v: a transformers attention function, for inference.

    Returns:
        (B, T, heads, D); the weights are not kept.
    """
    batch, num_heads, width, dim = query.shape
    num_groups, length = key.shape[1], key.shape[2]
    query = query.reshape(batch, num_groups, -1, dim)  # heads that share keys follow each other
    scores = torch.matmul(query, key.transpose(2, 3)).mul_(scaling)  # (B, kv heads, heads / kv heads * T, L)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    scores.view(batch, num_groups, -1, width, length).add_(attention_mask[:, :, None])
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    found = torch.matmul(weights, value).view(batch, num_heads, width, dim)
    return found.transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)


def grouped(module: nn.Module, config: Any) -> nn.Module:
    """A twin of the module that attends by `grouped_attention`, if the family of its text config allows.

    Both share weights, buffers and whatever holds no config, such as an adapter's layers, so that what is changed
    there is changed for both; the module itself attends as before, also while the twin is at work in another thread.
    """
    if config.model_type not in GROUPED_FAMILIES:
        return module
    own = copy.copy(config)
    own._attn_implementation = GROUPED
    return _twin(module, config, own)


def _twin(module: nn.Module, config: Any, own: Any) -> nn.Module:
    children = {name: child and _twin(child, config, own) for name, child in module._modules.items()}
    has_config = getattr(module, "config", None) is config
    if not has_config and all(child is module._modules[name] for name, child in children.items()):
        return module
    twin = copy.copy(module)
    twin._modules = children
    if has_config:
        twin.config = own
    return twin


def attention_windows(config: Any) -> dict[str, int | None]:
    """The masks that the model's layers need: layer type -> window in tokens, None for all of the past.

    Raises:
        InputError: there are layers of another type.
    """
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        return {"full_attention": window}
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise InputError(f"this engine knows full and sliding attention, not {sorted(unknown)}")
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}


def additive_mask(positions: Tensor, length: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """(rows, 1, width, length): 0 where the key's position may be seen, else the dtype's minimum.

    Args:
        positions: (rows, width), of the queries.
    """
    keys = torch.arange(length, device=positions.device)
    visible = keys <= positions[..., None]
    if window is not None:
        visible &= keys > positions[..., None] - window
    hidden = torch.full(visible.shape, torch.finfo(dtype).min, dtype=dtype, device=positions.device)
    return hidden.masked_fill_(visible, 0)[:, None]
