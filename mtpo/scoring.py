"""Log-probs of a batch in any layout: the masks that keep its trajectories apart, and who takes them.

Every layout but the padded one passes the model masks of its own, so that no default of transformers decides what a
token sees. Only flash attention has none: it finds the sequences of a row where positions begin again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mtpo.engines.attention import attention_windows
from mtpo.errors import InputError
from mtpo.layouts import Layout
from mtpo.logprobs import Actions, logps_of, read_out
from mtpo.models import unwrapped

MASKED_FAMILIES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers see nothing of other tokens but through an attention mask that one may pass them."""

MASKED_ATTENTION = ("eager", "sdpa", "flex_attention")


def batch_logps(model: nn.Module, batch: dict[str, Tensor], prefix: str = "") -> Tensor:
    """`action_logps` of a collated batch in any layout: (N, T).

    Args:
        prefix: of the batch's keys: "kl_" for KTO's mismatched trajectories.
    """
    return read_out(model, logps_of(batch_actions(batch, prefix)), **batch_inputs(model, batch, prefix))


def batch_actions(batch: dict[str, Tensor], prefix: str = "") -> Actions:
    """The action tokens of a collated batch, to be read out of the hidden states that `batch_inputs` give."""
    return Actions(
        batch[f"{prefix}input_ids"], batch[f"{prefix}completion_mask"], batch.get(f"{prefix}places")
    )


def batch_inputs(model: nn.Module, batch: dict[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """What the model reads of a collated batch: `input_ids`, `attention_mask`, and `position_ids` if need be."""
    if f"{prefix}places" not in batch:
        return {name: batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask")}
    positions = batch[f"{prefix}positions"]
    mask = _attention(model, positions, batch[f"{prefix}documents"], batch[f"{prefix}branches"])
    return {"input_ids": batch[f"{prefix}row_ids"], "position_ids": positions, "attention_mask": mask}


def layout_refusal(
    config: Any, layout: Layout, *, device: str = "cpu", with_gradient: bool = True
) -> str | None:
    """Why a model cannot be trained exactly in this layout on this kind of device; None if it can.

    Args:
        config: of transformers, with the attention implementation that the model was loaded with.
    """
    config = config.get_text_config()
    attention = config._attn_implementation
    if attention == "flex_attention" and device == "cpu" and with_gradient:
        return "flex_attention has no backward pass on a CPU"
    if layout == "padded":
        return None
    if config.model_type not in MASKED_FAMILIES:
        return f"{config.model_type} models are not known to keep the trajectories of a row apart"
    if attention.startswith("flash_attention"):
        return None if layout == "packed" else f"{attention} takes no mask that has branches"
    if attention not in MASKED_ATTENTION:
        return f"attention implementation {attention!r} is not known to take a mask of our own"
    try:
        attention_windows(config)
    except InputError as error:
        return str(error)
    return None


def require_layout(model: nn.Module, layout: Layout, device: torch.device) -> None:
    """
    Raises:
        InputError: `layout_refusal` has a reason.
    """
    if reason := layout_refusal(unwrapped(model).config, layout, device=device.type):
        raise InputError(f"layout {layout!r}: {reason}")


def _attention(model: nn.Module, positions: Tensor, documents: Tensor, branches: Tensor) -> Any:
    """What the backbone takes as `attention_mask`, by the type of a layer where it has several.

    None for flash attention, which finds the sequences of a row where positions begin again.
    """
    inner = unwrapped(model)
    config = inner.config.get_text_config()
    implementation = config._attn_implementation
    if implementation.startswith("flash_attention"):
        return None
    masks = {
        kind: _mask(implementation, positions, documents, branches, window, inner.dtype)
        for kind, window in attention_windows(config).items()
    }
    return masks if getattr(config, "layer_types", None) else masks["full_attention"]


def _mask(
    implementation: str,
    positions: Tensor,
    documents: Tensor,
    branches: Tensor,
    window: int | None,
    dtype: torch.dtype,
) -> Any:
    """(R, 1, L, L), as the implementation wants it."""

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        past = positions[row, query] - positions[row, key]
        near = past >= 0 if window is None else (past >= 0) & (past < window)
        branch = branches[row, key]
        same = documents[row, query] == documents[row, key]
        return near & same & ((branch == 0) | (branch == branches[row, query]))

    num_rows, length = positions.shape
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(sees, num_rows, None, length, length, device=positions.device)
    row = torch.arange(num_rows, device=positions.device)[:, None, None, None]
    column = torch.arange(length, device=positions.device)
    visible = sees(row, row, column[:, None], column)
    if implementation == "sdpa":
        return visible
    hidden = torch.full(visible.shape, torch.finfo(dtype).min, dtype=dtype, device=positions.device)
    return hidden.masked_fill_(visible, 0)
