"""The embedded engine: batched decoding of any `transformers` causal language model, with a KV cache a session.

Trajectories at different turns share every decoding step. A session keeps its keys and values between its
turns, so tool output is only fed, never prefilled again together with what came before it; the samples of
one problem share the prefill of its prompt; a row that has finished leaves the batch at once.

Layout: one buffer a layer, (rows, kv heads, positions, head dim), in which the entry of a token stands at the
token's own position. Rows that are decoding come first, rows whose session waits for its tool after them.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from mtpo.engines.attention import additive_mask, attention_windows, grouped
from mtpo.engines.sampling import sample_tokens
from mtpo.errors import EngineError, InputError
from mtpo.logprobs import head_logits
from mtpo.models import fingerprint, unwrapped
from mtpo.rollout import Generation, Sampling

EXACT_ATTENTION = ("eager", "sdpa")
"""Attention implementations that take the additive masks used here."""


@dataclass(eq=False)
class _Request:
    prompt: list[int]
    sampling: Sampling
    session: str
    future: asyncio.Future[Generation]
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    uniform: random.Random = field(default_factory=random.Random)

    def result(self, finish_reason: Literal["stop", "length"]) -> Generation:
        return Generation(tuple(self.ids), tuple(self.logps), finish_reason)


@dataclass(eq=False)
class _Row:
    """One row of the cache: the ids whose keys and values it holds, and who is using it."""

    ids: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    """Ids to feed in the next step; the last one's logits give the next token."""
    session: str = ""
    request: _Request | None = None
    last_used: int = 0


class TransformersEngine:
    """An `Engine` over a model in this process.

    Args:
        model: a causal language model, also one wrapped by peft, loaded with eager or sdpa attention.
        max_rows: sessions whose keys and values are kept at once; more wait, or are prefilled again.
        max_context: the longest prompt plus completion; by default the model's own limit.
        prefill_tokens: bound on the padded tokens of one prefill step.

    Raises:
        InputError: the model's attention implementation cannot take the masks used here.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_rows: int = 64,
        max_context: int | None = None,
        prefill_tokens: int = 8192,
    ) -> None:
        self._model: PreTrainedModel = unwrapped(model)
        config = self._model.config.get_text_config()
        if config._attn_implementation not in EXACT_ATTENTION:
            raise InputError(
                f"the model was loaded with attn_implementation={config._attn_implementation!r}; "
                f"this engine needs one of {', '.join(EXACT_ATTENTION)}"
            )
        self._model.eval()
        self.max_context = min(max_context or config.max_position_embeddings, config.max_position_embeddings)
        self.fingerprint = fingerprint(self._model)
        self._max_rows = max_rows
        self._prefill_tokens = prefill_tokens
        self._cache = _RowCache(self._model.device, max_rows)
        self._windows = attention_windows(config)
        self._backbone = grouped(self._model.base_model, config)
        self._rows: list[_Row] = []
        self._num_active = 0
        self._waiting: deque[_Request] = deque()
        self._clock = 0
        self._driver: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, session: str = ""
    ) -> Generation:
        prompt = list(prompt_ids)
        if not prompt or len(prompt) >= self.max_context:
            raise InputError(f"a prompt of {len(prompt)} tokens does not fit a context of {self.max_context}")
        if sampling.max_tokens < 1:
            raise InputError(f"max_tokens must be at least 1, got {sampling.max_tokens}")
        future: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        request = _Request(prompt, sampling, session, future, uniform=random.Random(sampling.seed))
        self._waiting.append(request)
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive())
        return await future

    def release(self, session: str) -> None:
        for row in self._rows:
            if row.session == session:
                row.session = ""

    async def aclose(self) -> None:
        if self._driver is not None:
            self._driver.cancel()
            await asyncio.gather(self._driver, return_exceptions=True)
        self._thread.shutdown()
        self._rows, self._num_active = [], 0

    # -- scheduling ----------------------------------------------------------------------------------------

    async def _drive(self) -> None:
        """Step until nobody waits. The forward passes run in a thread, so that tools go on meanwhile."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                self._drop_cancelled()
                first_new = self._num_active
                self._admit()
                if not self._num_active:
                    return
                for start, stop in self._prefill_slices(first_new):
                    await loop.run_in_executor(self._thread, self._step, start, stop)
                self._park_finished()
                if self._num_active:
                    await loop.run_in_executor(self._thread, self._step, 0, self._num_active)
                    self._park_finished()
        except Exception as error:
            self._fail(EngineError(f"generation failed: {type(error).__name__}: {error}"))

    def _fail(self, error: EngineError) -> None:
        requests = [*self._waiting, *(r.request for r in self._rows if r.request is not None)]
        self._waiting.clear()
        self._rows, self._num_active = [], 0
        for request in requests:
            if not request.future.done():
                request.future.set_exception(error)

    def _drop_cancelled(self) -> None:
        self._waiting = deque(r for r in self._waiting if not r.future.cancelled())
        for row in self._rows[: self._num_active]:
            if row.request is not None and row.request.future.cancelled():
                row.request, row.pending = None, []
        self._park_finished()

    def _admit(self) -> None:
        """Give waiting requests a row each, reusing the keys and values of a prefix that some row holds."""
        prefilling: set[tuple[int, ...]] = set()
        later: deque[_Request] = deque()
        while self._waiting:
            request = self._waiting.popleft()
            prompt = tuple(request.prompt)
            own = self._parked_row_of(request.session)
            donor = None if own else self._row_holding(request.prompt)
            if prompt in prefilling and own is None:
                later.append(request)  # the next round copies the prefill that this round makes
                continue
            row = own or self._free_row(keep=donor)
            if row is None:
                later.append(request)
                break
            if donor is not None and donor is not row:
                self._cache.copy(self._rows.index(donor), self._rows.index(row), len(request.prompt) - 1)
                row.ids = donor.ids[: len(request.prompt) - 1]
            shared = min(_common_prefix(row.ids, request.prompt), len(request.prompt) - 1)
            row.ids, row.pending = row.ids[:shared], request.prompt[shared:]
            row.session, row.request = request.session, request
            if len(row.pending) > 1:
                prefilling.add(prompt)
            self._swap(self._rows.index(row), self._num_active)
            self._num_active += 1
        self._waiting = later + self._waiting

    def _parked_row_of(self, session: str) -> _Row | None:
        if not session:
            return None
        return next((r for r in self._rows[self._num_active :] if r.session == session), None)

    def _row_holding(self, prompt: list[int]) -> _Row | None:
        """A row with keys and values of all of the prompt but its last id."""
        wanted = prompt[:-1]
        return next((r for r in self._rows if r.ids[: len(wanted)] == wanted), None)

    def _free_row(self, keep: _Row | None) -> _Row | None:
        """A new row, or the parked one that is least likely to be missed."""
        if len(self._rows) < self._max_rows:
            self._rows.append(_Row())
            return self._rows[-1]
        parked = self._rows[self._num_active :]
        return min(parked, key=lambda r: (bool(r.session), r is keep, r.last_used), default=None)

    def _prefill_slices(self, first_new: int) -> list[tuple[int, int]]:
        """Cut the newly admitted rows that feed more than one id into steps of bounded size."""
        long_rows = sorted(self._rows[first_new : self._num_active], key=lambda r: len(r.pending))
        for offset, row in enumerate(long_rows):
            self._swap(first_new + offset, self._rows.index(row))
        slices, start = [], first_new
        for index in range(first_new, self._num_active):
            if len(self._rows[index].pending) == 1:
                start = index + 1
                continue
            width = len(self._rows[index].pending)
            if index > start and (index + 1 - start) * width > self._prefill_tokens:
                slices.append((start, index))
                start = index
        return [*slices, (start, self._num_active)] if start < self._num_active else slices

    def _park_finished(self) -> None:
        for index in reversed(range(self._num_active)):
            if self._rows[index].request is None:
                self._clock += 1
                self._rows[index].last_used = self._clock
                self._num_active -= 1
                self._swap(index, self._num_active)

    def _swap(self, a: int, b: int) -> None:
        if a != b:
            self._cache.swap(a, b, max(len(self._rows[a].ids), len(self._rows[b].ids)))
            self._rows[a], self._rows[b] = self._rows[b], self._rows[a]

    # -- one step ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _step(self, start: int, stop: int) -> None:
        """Feed the pending ids of rows start..stop and draw one token for each."""
        rows = self._rows[start:stop]
        hidden = self._forward(rows, start)
        logits = head_logits(self._model, hidden)  # (rows, V)
        requests = [row.request for row in rows]
        samplings = [r.sampling for r in requests if r is not None]
        uniforms = [r.uniform.random() for r in requests if r is not None]
        tokens, logps = sample_tokens(logits, samplings, uniforms)
        for row, request, token, logp in zip(rows, requests, tokens, logps, strict=True):
            assert request is not None
            row.ids += row.pending
            row.pending = [token]
            request.ids.append(token)
            request.logps.append(logp)
            if token in request.sampling.stop_ids:
                self._finish(row, request, "stop")
            elif len(request.ids) >= request.sampling.max_tokens or len(row.ids) + 1 >= self.max_context:
                self._finish(row, request, "length")

    def _finish(self, row: _Row, request: _Request, reason: Literal["stop", "length"]) -> None:
        row.request, row.pending = None, []
        request.future.get_loop().call_soon_threadsafe(_resolve, request.future, request.result(reason))

    def _forward(self, rows: list[_Row], start: int) -> Tensor:
        """Hidden states after each row's last pending id, (rows, hidden)."""
        device = self._model.device
        width = max(len(row.pending) for row in rows)
        input_ids = torch.tensor(
            [row.pending + [0] * (width - len(row.pending)) for row in rows], device=device
        )
        offsets = torch.tensor([len(row.ids) for row in rows], device=device)
        positions = offsets[:, None] + torch.arange(width, device=device)  # (rows, width)
        length = int(max(len(row.ids) + len(row.pending) for row in rows))
        self._cache.aim(start, positions, length)
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
        last = torch.tensor([len(row.pending) - 1 for row in rows], device=device)
        return output.last_hidden_state[torch.arange(len(rows), device=device), last]


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


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    shortest = min(len(a), len(b))
    if a[:shortest] == b[:shortest]:
        return shortest
    return next(i for i in range(shortest) if a[i] != b[i])


def _resolve(future: asyncio.Future[Generation], result: Generation) -> None:
    if not future.done():
        future.set_result(result)
