"""What every engine promises, as functions of a `Subject`: each engine's tests run all of `PROMISES`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from mtpo.errors import InputError
from mtpo.logprobs import action_logps
from mtpo.rollout import Engine, Generation, Sampling
from tests.tiny_models import tiny_model

PROMPTS = [[2, 5, 6, 7], [2, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [2, 8]]
LONG = 24
GREEDY = Sampling(LONG, (), temperature=0)
MAX_LOGP_ERROR = 1e-3
"""Between an engine and the trainer, in float32."""


@dataclass(frozen=True)
class Subject:
    engine: Engine
    model: PreTrainedModel
    """What the engine serves, as the trainer loads it: float32, eager attention."""


Promise = Callable[[Subject], Awaitable[None]]


def stress_model(seed: int = 5, **overrides: Any) -> PreTrainedModel:
    """A random Gemma 2 that soft-caps, window (of 8 tokens) and every earlier token matter to.

    Its heads are of the smallest size that vLLM takes on a CPU. Tied embeddings alone would make it repeat the
    last token for ever, so what the layers add weighs more than what they are added to.
    """
    model = tiny_model(
        "gemma2", seed=seed, std=0.3, hidden_size=64, head_dim=32, vocab_size=64,
        query_pre_attn_scalar=32, attn_logit_softcapping=5.0, final_logit_softcapping=5.0, **overrides,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "post_" in name:
                parameter.fill_(10.0)
    return model


async def complete(
    engine: Engine, prompts: Sequence[Sequence[int]], sampling: Sampling, session: str = "s"
) -> list[Generation]:
    calls = [engine.generate(p, sampling, session=f"{session}{i}") for i, p in enumerate(prompts)]
    return await asyncio.gather(*calls)


def greedy_ids(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int) -> tuple[int, ...]:
    """What transformers' own `generate` makes of the prompt."""
    found = model.generate(  # pyright: ignore[reportCallIssue]
        torch.tensor([prompt]),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
    )
    return tuple(found[0, len(prompt) :].tolist())


async def greedy_ids_equal_those_of_generate(subject: Subject) -> None:
    generations = await complete(subject.engine, PROMPTS, GREEDY)
    for prompt, generation in zip(PROMPTS, generations, strict=True):
        assert generation.ids == greedy_ids(subject.model, prompt, LONG)


async def logps_are_those_of_the_trainer_over_six_turns(subject: Subject) -> None:
    """Whatever the temperature and the truncation; and every turn's prompt continues what came before it."""
    samplings = [
        Sampling(9, ()),
        Sampling(9, (), temperature=0),
        Sampling(9, (), temperature=0.5),
        Sampling(9, (), top_k=3),
        Sampling(9, (), top_p=0.6),
        Sampling(9, (), min_p=0.1, temperature=2.0),
    ]
    ids, mask, logps = list(PROMPTS[0]), [0] * len(PROMPTS[0]), []
    for turn, sampling in enumerate(samplings):
        answer = await subject.engine.generate(ids, replace(sampling, seed=turn), session="six turns")
        assert answer.logps is not None
        observation = [21 + turn, 22, 23]
        ids += [*answer.ids, *observation]
        mask += [1] * len(answer.ids) + [0] * len(observation)
        logps += answer.logps
    subject.engine.release("six turns")
    trained = action_logps(subject.model, torch.tensor([ids]), torch.tensor([mask]))[0]
    errors = (trained[torch.tensor(mask).bool()] - torch.tensor(logps)).abs()
    print(f"log-probs of {len(logps)} tokens: mean error {errors.mean():.1e}, max {errors.max():.1e}")
    assert errors.max() < MAX_LOGP_ERROR


async def generation_stops_on_ids_and_keeps_the_stop_id(subject: Subject) -> None:
    [free] = await complete(subject.engine, PROMPTS[:1], GREEDY)
    stop = free.ids[5]
    end = free.ids.index(stop) + 1
    [stopped] = await complete(subject.engine, PROMPTS[:1], replace(GREEDY, stop_ids=(63, stop)))
    assert (stopped.ids, stopped.finish_reason) == (free.ids[:end], "stop")
    assert stopped.logps is not None and len(stopped.logps) == end


async def stop_ids_alone_end_a_turn(subject: Subject) -> None:
    """The checkpoint's own end-of-sequence id is one token like any other."""
    eos = subject.model.config.eos_token_id
    generations = await complete(
        subject.engine, [[2, eos, eos, eos, 5 + i] for i in range(12)], Sampling(64, ())
    )
    assert {(len(g.ids), g.finish_reason) for g in generations} == {(64, "length")}


async def a_turn_may_be_its_stop_id_alone(subject: Subject) -> None:
    first = greedy_ids(subject.model, PROMPTS[1], 1)
    [empty] = await complete(subject.engine, PROMPTS[1:2], replace(GREEDY, stop_ids=first))
    assert (empty.ids, empty.finish_reason) == (first, "stop")


async def seeds_reproduce_whatever_else_is_in_the_batch(subject: Subject) -> None:
    engine, seeded = subject.engine, Sampling(LONG, (), seed=2**62 + 11)
    alone = await engine.generate(PROMPTS[0], seeded, session="a")
    *_, among = await asyncio.gather(
        *(engine.generate(PROMPTS[1], Sampling(LONG, (), seed=i), session=f"x{i}") for i in range(5)),
        engine.generate(PROMPTS[0], seeded, session="b"),
    )
    other = await engine.generate(PROMPTS[0], replace(seeded, seed=12), session="c")
    assert among.ids == alone.ids != other.ids


async def truncation_and_temperature_are_those_asked_for(subject: Subject) -> None:
    """Each truncation, at its sharpest, leaves the most likely token alone; a low temperature what is close to it."""
    prompt, free = PROMPTS[0], Sampling(LONG, ())
    for changes in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        [answer] = await complete(subject.engine, [prompt], replace(free, **changes))
        assert answer.ids == greedy_ids(subject.model, prompt, LONG), changes
    [cold] = await complete(subject.engine, [prompt], replace(free, temperature=0.01))  # no engine takes less
    logits = subject.model(torch.tensor([[*prompt, *cold.ids]])).logits[0, len(prompt) - 1 : -1]
    best = logits.log_softmax(-1).amax(-1)
    assert (best - torch.tensor(cold.logps)).max() < 0.3  # 30 nats at that temperature


async def max_tokens_end_a_turn_as_too_long(subject: Subject) -> None:
    [free] = await complete(subject.engine, PROMPTS[:1], GREEDY)
    [cut] = await complete(subject.engine, PROMPTS[:1], replace(GREEDY, max_tokens=3))
    assert (cut.ids, cut.finish_reason) == (free.ids[:3], "length")


async def the_context_ends_a_turn_as_too_long(subject: Subject) -> None:
    engine = subject.engine
    fitting = [2, *([5, 6, 7] * engine.max_context)][: engine.max_context - 6]
    [cut] = await complete(engine, [fitting], GREEDY)
    assert (len(cut.ids), cut.finish_reason) == (6, "length")
    with pytest.raises(InputError, match=f"does not fit a context of {engine.max_context}"):
        await engine.generate([*fitting, *[5] * 6], GREEDY)


async def a_request_for_nothing_is_refused(subject: Subject) -> None:
    with pytest.raises(InputError, match="a prompt of 0 tokens"):
        await subject.engine.generate([], GREEDY)
    with pytest.raises(InputError, match="max_tokens must be at least 1, got 0"):
        await subject.engine.generate(PROMPTS[0], replace(GREEDY, max_tokens=0))


async def a_cancelled_call_disturbs_nobody(subject: Subject) -> None:
    long_calls = [
        asyncio.create_task(
            subject.engine.generate(PROMPTS[0], Sampling(450, (), seed=i), session=f"long{i}")
        )
        for i in range(4)
    ]
    await asyncio.sleep(0.02)
    others = asyncio.create_task(complete(subject.engine, PROMPTS, GREEDY))
    for call in long_calls[:3]:
        call.cancel()
    assert [g.ids for g in await others] == [greedy_ids(subject.model, p, LONG) for p in PROMPTS]
    assert len((await long_calls[3]).ids) == 450
    assert all(call.cancelled() for call in long_calls[:3])


async def sixty_requests_at_once_get_their_own_answers(subject: Subject) -> None:
    prompts = [[*PROMPTS[i % 3], 5 + i % 20] for i in range(60)]
    together = await complete(subject.engine, prompts, GREEDY)
    assert [g.ids for g in together[::7]] == [greedy_ids(subject.model, p, LONG) for p in prompts[::7]]
    assert [g.ids for g in together] == [g.ids for g in await complete(subject.engine, prompts, GREEDY, "t")]


async def an_unknown_session_may_be_released(subject: Subject) -> None:
    subject.engine.release("never seen")


PROMISES: list[Promise] = [
    greedy_ids_equal_those_of_generate,
    logps_are_those_of_the_trainer_over_six_turns,
    generation_stops_on_ids_and_keeps_the_stop_id,
    stop_ids_alone_end_a_turn,
    a_turn_may_be_its_stop_id_alone,
    seeds_reproduce_whatever_else_is_in_the_batch,
    truncation_and_temperature_are_those_asked_for,
    max_tokens_end_a_turn_as_too_long,
    the_context_ends_a_turn_as_too_long,
    a_request_for_nothing_is_refused,
    a_cancelled_call_disturbs_nobody,
    sixty_requests_at_once_get_their_own_answers,
    an_unknown_session_may_be_released,
]


def every_promise(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Parametrise a test with all promises, by name."""
    return pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)(test)
