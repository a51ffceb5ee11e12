"""Servers that speak the OpenAI completions protocol with token ids, as vLLM's and SGLang's do: one or many."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from typing import Any

import httpx2

from mtpo.engines.checks import checked_generation, tokens_to_sample
from mtpo.engines.routing import Router
from mtpo.errors import EngineError, InputError
from mtpo.rollout import Generation, Sampling

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
KEEP_ALIVE_S = 2.0
"""vLLM closes an idle connection after 5 s; a request that is sent at that moment is lost."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
BUSY = (408, 425, 429)
"""Status codes that, like 5xx, speak of the server and not of the request."""


class OpenAIEngine:
    """An `Engine` over replicas of one server, each named by its URL. To be used within one event loop.

    Prompts are sent as token ids to `/v1/completions`, and the sampled ids and their log-probs come back
    (vLLM's `return_token_ids`). Turns of one session go to one replica, whose prefix cache holds what came before,
    unless that replica has far more to do than another. A replica that cannot be reached gets no requests until it
    answers again, and what it was asked is asked elsewhere. With `vllm serve`, say `--generation-config vllm`,
    so that no file of the checkpoint changes how is sampled; for a model with windows
    `--prefix-cache-retention-interval`, a multiple of `--block-size`, so that the prefix cache keeps sampled ids;
    on a CPU `--no-enable-chunked-prefill`, because vLLM 0.32 dies there of a seeded prompt that it cuts.

    Args:
        urls: where the replicas listen, as in "http://10.0.0.7:8000".
        model: the name under which they serve it.
        max_context: the longest prompt plus completion; by default what the servers report.
        fingerprint: identifies the weights. Servers do not tell; by default it is the name that they serve.
        text_tokenizer: allows servers that return text alone, for evaluation. The ids of such a generation are
            what this tokenizer makes of the text and not what was sampled, so it is marked `is_from_text`.
        api_key: sent as bearer token.
        timeout_s: seconds that one attempt at one turn may take.
        patience_s: seconds to go on trying while no attempt succeeds, also when the engine is made.

    Raises:
        InputError: a URL is none; a server does not serve the model, or does not say how long its context is;
            no server can be reached.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str,
        *,
        max_context: int | None = None,
        fingerprint: str | None = None,
        text_tokenizer: Any = None,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        patience_s: float = 300.0,
    ) -> None:
        if not urls:
            raise InputError("an engine needs the URL of at least one server")
        self._urls = [_base_url(url) for url in urls]
        self._model = model
        self._tokenizer = text_tokenizer
        self._takes_ids: bool | None = None  # a server of text alone may take no ids either
        self._patience_s = patience_s
        self._options: dict[str, Any] = {
            "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
            "timeout": httpx2.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S, pool=None),
            "trust_env": False,  # a proxy to the internet is no way to a machine of one's own
        }
        contexts = self._wait_for_servers()
        known = [found for found in contexts.values() if found is not None]
        if max_context is None and not known:
            raise InputError(f"{self._urls[0]} does not say how long its context is: give max_context")
        self.max_context: int = min([*known, *([max_context] if max_context else [])])
        self.fingerprint = fingerprint or f"served as {model}"
        self._router = Router(len(urls))
        self._usable = set(contexts)
        self._revivals: dict[int, asyncio.Task[None]] = {}
        self._http = httpx2.AsyncClient(
            limits=httpx2.Limits(max_connections=None, keepalive_expiry=KEEP_ALIVE_S), **self._options
        )

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, session: str = ""
    ) -> Generation:
        """As `Engine.generate`.

        Raises:
            EngineError: no replica gave a usable answer within the engine's patience.
            InputError: a server refuses the request, changes the prompt, or returns no token ids.
        """
        prompt = list(prompt_ids)
        num_asked = tokens_to_sample(prompt, sampling, self.max_context)
        sends_ids = self._takes_ids is not False
        response = await self._ask(self._body(prompt, sampling, num_asked, sends_ids), session)
        if response.status_code in (400, 422) and self._takes_ids is None and self._tokenizer is not None:
            sends_ids = False
            response = await self._ask(self._body(prompt, sampling, num_asked, sends_ids), session)
        if not response.is_success:
            raise InputError(f"{response.url} refuses: {_reason(response)}")
        self._takes_ids = sends_ids
        return self._generation(response, prompt, sampling, num_asked)

    def release(self, session: str) -> None:
        self._router.release(session)

    async def aclose(self) -> None:
        for revival in self._revivals.values():
            revival.cancel()
        await asyncio.gather(*self._revivals.values(), return_exceptions=True)
        await self._http.aclose()

    # -- what is said ----------------------------------------------------------------------------------------

    def _body(self, prompt: list[int], sampling: Sampling, num_asked: int, sends_ids: bool) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": prompt if sends_ids else self._text_of(prompt),
            "max_tokens": num_asked,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
        }
        if self._tokenizer is not None:
            body["stop"] = [self._tokenizer.decode([i]) for i in sampling.stop_ids]
        if not sends_ids:
            return body
        return body | {
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "stop_token_ids": list(sampling.stop_ids),
            "ignore_eos": True,  # the stop ids say where a turn ends, not the checkpoint
            "skip_special_tokens": False,
            "logprobs": 0,  # of the sampled token alone
            "return_token_ids": True,
        }

    def _text_of(self, prompt: list[int]) -> str:
        """The prompt without its BOS, which servers put before every text."""
        has_bos = prompt[0] == self._tokenizer.bos_token_id
        return self._tokenizer.decode(prompt[has_bos:], skip_special_tokens=False)

    def _generation(
        self, response: httpx2.Response, prompt: list[int], sampling: Sampling, num_asked: int
    ) -> Generation:
        try:
            [choice] = response.json()["choices"]
            ids, text = choice.get("token_ids"), choice.get("text")
            logps = (choice.get("logprobs") or {}).get("token_logprobs")
            echo = choice.get("prompt_token_ids")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise EngineError(f"{response.url} gave no completion: {response.text[:200]!r}") from error
        if ids is None:
            if self._tokenizer is None:
                raise InputError(
                    f"{response.url} returns no token ids (return_token_ids, vLLM 0.10.2 and later), so what it "
                    "sampled is not known exactly: it can serve an evaluation as text, but make nothing to train on"
                )
            return self._from_text(text or "", choice.get("finish_reason"), sampling)
        if echo is not None and echo != prompt:
            raise InputError(f"{response.url} changed the prompt of {len(prompt)} ids to {len(echo)} ids")
        return checked_generation(ids, logps, sampling.stop_ids, num_asked)

    def _from_text(self, text: str, finish_reason: str | None, sampling: Sampling) -> Generation:
        ids = tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if finish_reason == "stop" and not (ids and ids[-1] in sampling.stop_ids):
            ids = (*ids, sampling.stop_ids[0])
        if not ids:
            raise EngineError("the engine returned no token")
        reason = "stop" if finish_reason == "stop" else "length"
        return Generation(ids, None, reason, is_from_text=True)

    # -- who is asked ----------------------------------------------------------------------------------------

    async def _ask(self, body: dict[str, Any], session: str) -> httpx2.Response:
        """The first answer that is no fault of a server: a success, or a refusal."""
        give_up_at, pause_s = None, FIRST_PAUSE_S
        failed: set[int] = set()
        reason = "none can be reached"
        while give_up_at is None or time.monotonic() < give_up_at:
            self._start_revivals()
            if candidates := self._usable - failed:
                with self._router.route(session, candidates) as replica:
                    try:
                        return await self._attempt(replica, body)
                    except _ServerFault as fault:
                        reason = str(fault)
                        failed.add(replica)
                        give_up_at = give_up_at or time.monotonic() + self._patience_s
            else:
                give_up_at = give_up_at or time.monotonic() + self._patience_s
                failed.clear()
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # so that requests come back apart
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        raise EngineError(f"no server gave an answer for {self._patience_s:g} s: {reason}")

    async def _attempt(self, replica: int, body: dict[str, Any]) -> httpx2.Response:
        url = self._urls[replica]
        try:
            response = await self._http.post(f"{url}/v1/completions", json=body)
        except httpx2.TransportError as error:
            if replica in self._usable:
                logger.warning("%s: no requests go there until it answers again", _describe(url, error))
                self._usable.discard(replica)
            raise _ServerFault(_describe(url, error)) from error
        if response.status_code >= 500 or response.status_code in BUSY:
            raise _ServerFault(f"{url} answers {response.status_code}: {_reason(response)}")
        return response

    def _start_revivals(self) -> None:
        for replica in set(range(len(self._urls))) - self._usable - self._revivals.keys():
            self._revivals[replica] = asyncio.create_task(self._revive(replica))

    async def _revive(self, replica: int) -> None:
        """Probe a replica until it answers."""
        url, pause_s = self._urls[replica], FIRST_PAUSE_S
        while replica not in self._usable:
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            try:
                _context(await self._http.get(f"{url}/v1/models", timeout=CONNECT_TIMEOUT_S), self._model)
            except (httpx2.TransportError, EngineError, InputError) as error:
                logger.debug("not back: %s", _describe(url, error))
            else:
                logger.warning("%s is back", url)
                self._usable.add(replica)
        del self._revivals[replica]

    def _wait_for_servers(self) -> dict[int, int | None]:
        """The context lengths of the replicas that answer, as soon as one does: a server starts slowly."""
        give_up_at, pause_s = time.monotonic() + self._patience_s, FIRST_PAUSE_S
        with httpx2.Client(**self._options) as http:
            while True:
                found: dict[int, int | None] = {}
                reason = ""
                for replica, url in enumerate(self._urls):
                    try:
                        response = http.get(f"{url}/v1/models", timeout=CONNECT_TIMEOUT_S)
                        found[replica] = _context(response, self._model)
                    except (httpx2.TransportError, EngineError) as error:
                        reason = _describe(url, error)
                if found:
                    return found
                if time.monotonic() + pause_s > give_up_at:
                    raise InputError(f"no server answers for {self._patience_s:g} s: {reason}")
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


class _ServerFault(Exception):
    """One attempt failed for a reason that is not the request's."""


def _base_url(url: str) -> str:
    """The URL without a slash, and without the /v1 that other clients want at its end."""
    try:
        address = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise InputError(f"{url!r} is no URL of a server: {error}") from None
    if address.scheme not in ("http", "https") or not address.host:
        raise InputError(f"{url!r} is no URL of a server: expected http://HOST:PORT")
    return url.rstrip("/").removesuffix("/v1")


def _context(response: httpx2.Response, model: str) -> int | None:
    """The context length that a server's list of models says, if it says one.

    Raises:
        EngineError: the server is not ready.
        InputError: it does not serve the model, or is no such server.
    """
    if response.status_code >= 500 or response.status_code in BUSY:
        raise EngineError(f"{response.url} answers {response.status_code}: {_reason(response)}")
    try:
        served = {card["id"]: card for card in response.json()["data"]}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{response.url} answers {response.status_code}, not a list of models: {_reason(response)}"
        ) from error
    if model not in served:
        raise InputError(f"{response.url} serves {', '.join(sorted(served))}, not {model}")
    return served[model].get("max_model_len")


def _reason(response: httpx2.Response) -> str:
    """What the server says, in one line."""
    try:
        content = response.json()
        error = content.get("error", content)
        text = str(error.get("message", error))
    except (ValueError, AttributeError):
        text = response.text
    return " ".join(text.split())[:300] or response.reason_phrase


def _describe(url: str, error: Exception) -> str:
    return f"{url}: {str(error) or type(error).__name__}"
