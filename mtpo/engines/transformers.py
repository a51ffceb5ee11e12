"""The embedded engine: batched decoding of any `transformers` causal language model, with a KV cache a session.

Trajectories at different turns share every decoding step. A session keeps its keys and values between its
turns, so tool output is only fed, never prefilled again together with what came before it; the samples of
one problem share the prefill of its prompt; a row that has finished leaves the batch at once.

Rows that are decoding come first in the cache, rows whose session waits for its tool after them.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from mtpo.engines.cached_model import CachedModel, Feed, Policy, Weights
from mtpo.engines.mixture import CachedMixture, LogNormalizers, Mixture
from mtpo.engines.sampling import sample_tokens
from mtpo.errors import EngineError, InputError
from mtpo.rollout import Generation, Sampling


@dataclass(eq=False)
class _Request:
    prompt: list[int]
    sampling: Sampling
    session: str
    future: asyncio.Future[Generation]
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    log_normalizers: list[float] = field(default_factory=list)
    uniform: random.Random = field(default_factory=random.Random)

    def result(self, finish_reason: Literal["stop", "length"]) -> Generation:
        log_normalizers = tuple(self.log_normalizers) or None
        return Generation(tuple(self.ids), tuple(self.logps), finish_reason, log_normalizers=log_normalizers)


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
    """An `Engine` over a model in this process, or over the geometric mixture of two.

    A trainer may hold the same model and change its weights in place, if it says so: `weights_changed`.

    Args:
        model: a causal language model, also one wrapped by peft, loaded with eager or sdpa attention; or its
            `Weights`, whose fingerprint several engines may share; or a `Mixture`.
        max_rows: sessions whose keys and values are kept at once; more wait, or are prefilled again.
        max_context: the longest prompt plus completion; by default the model's own limit.
        prefill_tokens: bound on the padded tokens of one prefill step.

    Raises:
        InputError: the attention implementation of a model cannot take the masks used here.
    """

    def __init__(
        self,
        model: nn.Module | Weights | Mixture,
        *,
        max_rows: int = 64,
        max_context: int | None = None,
        prefill_tokens: int = 8192,
    ) -> None:
        self._policy: Policy
        if isinstance(model, Mixture):
            self._policy = CachedMixture(model, max_rows)
        else:
            self._policy = CachedModel(model if isinstance(model, Weights) else Weights(model), max_rows)
        own_limit = self._policy.max_context
        self.max_context = min(max_context or own_limit, own_limit)
        self.log_normalizers = LogNormalizers()
        """Over all tokens sampled from a mixture, until it is cleared."""
        self._max_rows = max_rows
        self._prefill_tokens = prefill_tokens
        self._rows: list[_Row] = []
        self._num_active = 0
        self._waiting: deque[_Request] = deque()
        self._clock = 0
        self._driver: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")

    @property
    def fingerprint(self) -> str:
        return self._policy.fingerprint

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

    def weights_changed(self) -> None:
        """The model's weights have changed in place: compute their fingerprint, and forget keys and values.

        Raises:
            EngineError: a request is in flight, which would be answered by two policies.
        """
        self.forget()
        self._policy.refresh()

    def forget(self) -> None:
        """Forget all keys and values, where `Weights.refresh` has seen to the fingerprint.

        Raises:
            EngineError: a request is in flight, which would be answered by two policies.
        """
        self._thread.submit(int).result()  # a step that goes on after its last request was cancelled
        requests = [*self._waiting, *(r.request for r in self._rows if r.request is not None)]
        if num_running := sum(not request.future.done() for request in requests):
            raise EngineError(f"weights cannot change while {num_running} requests are in flight")
        self._waiting.clear()
        self._rows, self._num_active = [], 0

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
                if self._waiting and not self._num_active:
                    self._policy.begin()
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
                self._policy.copy(self._rows.index(donor), self._rows.index(row), len(request.prompt) - 1)
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
            self._policy.swap(a, b, max(len(self._rows[a].ids), len(self._rows[b].ids)))
            self._rows[a], self._rows[b] = self._rows[b], self._rows[a]

    # -- one step ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _step(self, start: int, stop: int) -> None:
        """Feed the pending ids of rows start..stop and draw one token for each."""
        rows = self._rows[start:stop]
        if not rows:  # forgotten since
            return
        feed = Feed(start, [len(row.ids) for row in rows], [row.pending for row in rows])
        logits, log_normalizers = self._policy.feed(feed)  # (rows, V), (rows,)
        requests = [row.request for row in rows]
        samplings = [r.sampling for r in requests if r is not None]
        uniforms = [r.uniform.random() for r in requests if r is not None]
        tokens, logps = sample_tokens(logits, samplings, uniforms)
        if log_normalizers is not None:
            found = log_normalizers.tolist()
            self.log_normalizers.add(found)
            for request, log_normalizer in zip(requests, found, strict=True):
                assert request is not None
                request.log_normalizers.append(log_normalizer)
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


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    shortest = min(len(a), len(b))
    if a[:shortest] == b[:shortest]:
        return shortest
    return next(i for i in range(shortest) if a[i] != b[i])


def _resolve(future: asyncio.Future[Generation], result: Generation) -> None:
    if not future.done():
        future.set_result(result)
