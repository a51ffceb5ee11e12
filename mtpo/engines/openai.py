"""Servers that speak the OpenAI completions protocol with token ids, as vLLM's and SGLang's do: one or many."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import httpx2

from mtpo.engines.checks import checked_generation, tokens_to_sample
from mtpo.engines.servers import Servers, check_ready, reason_of
from mtpo.errors import EngineError, InputError
from mtpo.rollout import Generation, Sampling


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
        self._model = model
        self._tokenizer = text_tokenizer
        self._takes_ids: bool | None = None  # a server of text alone may take no ids either
        self._servers = Servers(
            urls, partial(_context, model=model), api_key=api_key, timeout_s=timeout_s, patience_s=patience_s
        )
        known = [found for found in self._servers.wait() if found is not None]
        if max_context is None and not known:
            raise InputError(
                f"{self._servers.urls[0]} does not say how long its context is: give max_context"
            )
        self.max_context: int = min([*known, *([max_context] if max_context else [])])
        self.fingerprint = fingerprint or f"served as {model}"

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
            raise InputError(f"{response.url} refuses: {reason_of(response)}")
        self._takes_ids = sends_ids
        return self._generation(response, prompt, sampling, num_asked)

    def release(self, session: str) -> None:
        self._servers.release(session)

    async def aclose(self) -> None:
        await self._servers.aclose()

    async def _ask(self, body: dict[str, Any], session: str) -> httpx2.Response:
        """The first answer that is no fault of a server: a success, or a refusal."""
        return await self._servers.post("/v1/completions", body, lambda response: response, session=session)

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


def _context(response: httpx2.Response, model: str) -> int | None:
    """The context length that a server's list of models says, if it says one.

    Raises:
        EngineError: the server is not ready.
        InputError: it does not serve the model, or is no such server.
    """
    check_ready(response)
    try:
        served = {card["id"]: card for card in response.json()["data"]}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{response.url} answers {response.status_code}, not a list of models: {reason_of(response)}"
        ) from error
    if model not in served:
        raise InputError(f"{response.url} serves {', '.join(sorted(served))}, not {model}")
    return served[model].get("max_model_len")
