"""A model of this process as the embedded engine sees it: rows of ids go in, logits of the next token come out.

Keys and values stand in one buffer a layer, (rows, kv heads, positions, head dim), in which the entry of a token
stands at the token's own position. Which row holds what is the engine's to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from mtpo.engines.attention import additive_mask, attention_windows, grouped
from mtpo.errors import InputError
from mtpo.logprobs import head_logits
from mtpo.models import fingerprint, unwrapped

EXACT_ATTENTION = ("eager", "sdpa")
"""Attention implementations that take the additive masks used here."""


@dataclass(frozen=True, slots=True)
class Feed:
    """What consecutive rows of the cache are to read before they are asked for the next token."""

    start: int
    """The first of the rows."""
    num_cached: Sequence[int]
    """Ids whose keys and values each row holds."""
    pending: Sequence[Sequence[int]]
    """The ids after them, at least one a row."""


class NextLogits(NamedTuple):
    """Of the token after each row's last pending id."""

    logits: Tensor
    """(rows, V), after the soft-cap."""
    log_normalizers: Tensor | None = None
    """(rows,): log Z of a geometric mixture, whose logits are its log-probs; None otherwise."""


class Policy(Protocol):
    """What the embedded engine samples from, with a cache of its own by row."""

    @property
    def max_context(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def begin(self) -> None:
        """Be ready for inference: a trainer that holds the same modules may have left them in training mode.

        Called whenever no row is being decoded.
        """
        ...

    def refresh(self) -> None:
        """Take note of weights that have changed in place."""
        ...

    def feed(self, feed: Feed) -> NextLogits: ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Give row `target` the first `length` entries of row `source`."""
        ...

    def swap(self, a: int, b: int, length: int) -> None:
        """Exchange the first `length` entries of two rows."""
        ...


class Weights:
    """A model and the fingerprint of its weights, for all engines that serve it.

    Args:
        model: a causal language model, also one wrapped by peft, loaded with eager or sdpa attention.

    Raises:
        InputError: the model's attention implementation cannot take the masks of the embedded engine.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: PreTrainedModel = unwrapped(model)
        self.config = self.model.config.get_text_config()
        if self.config._attn_implementation not in EXACT_ATTENTION:
            raise InputError(
                f"the model was loaded with attn_implementation={self.config._attn_implementation!r}; "
                f"this engine needs one of {', '.join(EXACT_ATTENTION)}"
            )
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """Computed when it is asked for, and when sampling begins, so that steps without sampling cost nothing."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.model)
        return self._fingerprint

    def refresh(self) -> None:
        """The weights have changed in place: the fingerprint is another one."""
        self._fingerprint = None


class CachedModel:
    """A `Policy` that is one model.

    Raises:
        InputError: the model has layers of a type that this engine does not know.
    """

    def __init__(self, weights: Weights, max_rows: int) -> None:
        self._weights, self._model, config = weights, weights.model, weights.config
        self._windows = attention_windows(config)
        self._backbone = grouped(self._model.base_model, config)
        self._cache = _RowCache(self._model.device, max_rows)

    @property
    def max_context(self) -> int:
        return self._weights.config.max_position_embeddings

    @property
    def fingerprint(self) -> str:
        return self._weights.fingerprint

    def begin(self) -> None:
        self._model.eval()
        self._backbone.eval()  # a twin, where it is one, has flags of its own
        self._cache.move_to(self._model.device)  # a trainer may have moved the model
        _ = self.fingerprint  # of the weights that are about to sample, whatever happens to them later

    def refresh(self) -> None:
        self._weights.refresh()

    def copy(self, source: int, target: int, length: int) -> None:
        self._cache.copy(source, target, length)

    def swap(self, a: int, b: int, length: int) -> None:
        self._cache.swap(a, b, length)

    def feed(self, feed: Feed) -> NextLogits:
        return NextLogits(head_logits(self._model, self._hidden(feed)))

    def _hidden(self, feed: Feed) -> Tensor:
        """Hidden states after each row's last pending id, (rows, hidden)."""
        device = self._model.device
        width = max(len(ids) for ids in feed.pending)
        input_ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in feed.pending], device=device)
        offsets = torch.tensor(feed.num_cached, device=device)
        positions = offsets[:, None] + torch.arange(width, device=device)  # (rows, width)
        length = max(n + len(ids) for n, ids in zip(feed.num_cached, feed.pending, strict=True))
        self._cache.aim(feed.start, positions, length)
        masks = {
            kind: additive_mask(positions, length, window, self._model.dtype)
            for kind, window in self._windows.items()
        }
        only_mask = masks.get("full_attention") if len(masks) == 1 else None
        output = self._backbone(
            input_ids=input_ids,
            attention_mask=masks if only_mask is None else only_mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        last = torch.tensor([len(ids) - 1 for ids in feed.pending], device=device)
        return output.last_hidden_state[torch.arange(len(last), device=device), last]


class _RowCache(Cache):
    """Keys and values by (layer, row, position). `aim` says which rows the next forward pass writes."""

    def __init__(self, device: torch.device, max_rows: int) -> None:
        super().__init__(layers=[])
        self._device = device
        self._max_rows = max_rows
        self._buffers: list[list[Tensor]] = []
        self._start = 0
        self._length = 0
        self._positions = torch.zeros(0)

    def move_to(self, device: torch.device) -> None:
        if device != self._device:
            self._device = device
            self._buffers = [[buffer.to(device) for buffer in buffers] for buffers in self._buffers]

    def aim(self, start: int, positions: Tensor, length: int) -> None:
        self._start, self._positions, self._length = start, positions, length

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Write (rows, heads, width, dim) at the rows' positions; return all they hold up to the length."""
        if layer_idx == len(self._buffers):
            self._buffers.append([self._empty(states, 0, 0) for states in (key_states, value_states)])
        stop = self._start + len(key_states)
        rows = torch.arange(self._start, stop, device=self._device)[:, None]
        found = []
        for index, states in enumerate((key_states, value_states)):
            buffer = self._with_room(layer_idx, index, stop, self._length + states.shape[2])
            buffer[rows, :, self._positions] = states.transpose(1, 2)
            found.append(buffer[self._start : stop, :, : self._length])
        return tuple(found)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def copy(self, source: int, target: int, length: int) -> None:
        for buffer in self._all_with(max(source, target)):
            buffer[target, :, :length] = buffer[source, :, :length]

    def swap(self, a: int, b: int, length: int) -> None:
        if length:
            for buffer in self._all_with(max(a, b)):
                buffer[[a, b], :, :length] = buffer[[b, a], :, :length]

    def _all_with(self, row: int) -> list[Tensor]:
        for layer, buffers in enumerate(self._buffers):
            for index, buffer in enumerate(buffers):
                self._with_room(layer, index, row + 1, buffer.shape[2])
        return [buffer for buffers in self._buffers for buffer in buffers]

    def _with_room(self, layer: int, index: int, rows: int, length: int) -> Tensor:
        """The buffer, grown by doubling where it is too small, so that memory follows what is used."""
        buffer = self._buffers[layer][index]
        if rows > buffer.shape[0] or length > buffer.shape[2]:
            more_rows = min(self._max_rows, max(rows, 2 * buffer.shape[0])) if rows > buffer.shape[0] else 0
            more_length = max(length, 2 * buffer.shape[2], 64) if length > buffer.shape[2] else 0
            grown = self._empty(buffer, more_rows or buffer.shape[0], more_length or buffer.shape[2])
            grown[: buffer.shape[0], :, : buffer.shape[2]] = buffer
            self._buffers[layer][index] = buffer = grown
        return buffer

    def _empty(self, like: Tensor, rows: int, length: int) -> Tensor:
        return torch.zeros(rows, like.shape[1], length, like.shape[3], dtype=like.dtype, device=self._device)
