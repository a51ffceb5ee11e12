"""Log-probs of a batch in any layout: the masks that keep its trajectories apart, and who takes them.

Every layout but the padded one passes the model masks of its own, so that no default of transformers decides what a
token sees. Flash attention has none: it is told where the sequences of a row begin.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mtpo.engines.attention import attention_windows
from mtpo.errors import InputError
from mtpo.layouts import Layout
from mtpo.logprobs import Actions, Watch, logps_of, read_out
from mtpo.models import attention_refusal, unwrapped

MASKED_FAMILIES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers see nothing of other tokens but through an attention mask that one may pass them."""

FLASH = "flash_attention"
"""How the names of implementations begin that take the bounds of sequences instead of a mask."""

MASKED_ATTENTION = ("eager", "sdpa", "flex_attention")


def batch_logps(
    model: nn.Module, batch: dict[str, Tensor], prefix: str = "", *, watch: Watch | None = None
) -> Tensor:
    """`action_logps` of a collated batch in any layout: (N, T).

    Args:
        prefix: of the batch's keys: "kl_" for KTO's mismatched trajectories.
        watch: shown some of the logits.
    """
    actions = batch_actions(batch, prefix, watch=watch)
    return read_out(model, logps_of(actions), **batch_inputs(model, batch, prefix))


def batch_actions(batch: dict[str, Tensor], prefix: str = "", *, watch: Watch | None = None) -> Actions:
    """The action tokens of a collated batch, to be read out of the hidden states that `batch_inputs` give."""
    names = (f"{prefix}input_ids", f"{prefix}completion_mask")
    return Actions(*(batch[name] for name in names), places=batch.get(f"{prefix}places"), watch=watch)


def batch_inputs(model: nn.Module, batch: dict[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """What the model reads of a collated batch, by the names of its backbone's parameters."""
    if f"{prefix}places" not in batch:
        return {name: batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask")}
    names = ("row_ids", "positions", "documents", "branches")
    ids, positions, documents, branches = (batch[f"{prefix}{name}"] for name in names)
    if unwrapped(model).config.get_text_config()._attn_implementation.startswith(FLASH):
        return _flash_inputs(ids, positions)
    mask = _attention_mask(model, positions, documents, branches)
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask}


def layout_refusal(
    config: Any, layout: Layout, *, device: str = "cpu", with_gradient: bool = True
) -> str | None:
    """Why a model cannot be trained exactly in this layout on this kind of device; None if it can.

    Args:
        config: of transformers, with the attention implementation that the model was loaded with.
    """
    config = config.get_text_config()
    attention = config._attn_implementation
    if reason := attention_refusal(config):
        return reason
    if attention == "flex_attention" and device == "cpu" and with_gradient:
        return "flex_attention has no backward pass on a CPU"
    if layout == "padded":
        return None
    if config.model_type not in MASKED_FAMILIES:
        return f"{config.model_type} models are not known to keep the trajectories of a row apart"
    if attention.startswith(FLASH):
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


def _flash_inputs(row_ids: Tensor, positions: Tensor) -> dict[str, Any]:
    """All rows as one, and where its sequences begin: flash attention takes these instead of a mask.

    Without them transformers would look for restarting positions, but only if there is one row, and else would let
    each trajectory see those before it.
    """
    positions = positions.reshape(1, -1)  # (1, R L)
    end = torch.tensor([positions.numel()], device=positions.device)
    bounds = torch.cat([(positions[0] == 0).nonzero().flatten(), end]).to(torch.int32)
    longest = int(positions.max()) + 1
    return {
        "input_ids": row_ids.reshape(1, -1),
        "position_ids": positions,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _attention_mask(model: nn.Module, positions: Tensor, documents: Tensor, branches: Tensor) -> Any:
    """What the backbone takes as `attention_mask`: a mask, or one for each type of its layers."""
    inner = unwrapped(model)
    config = inner.config.get_text_config()
    masks = {
        kind: _mask(config._attn_implementation, positions, documents, branches, window, inner.dtype)
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
