import asyncio
import itertools

import pytest
import torch

from mtpo.engines.cached_model import CachedModel, Feed, NextLogits
from mtpo.engines.transformers import TransformersEngine
from mtpo.errors import EngineError, InputError
from mtpo.logprobs import action_logps
from mtpo.rollout import Sampling
from tests.engine_conformance import (
    GREEDY,
    LONG,
    PROMPTS,
    Promise,
    Subject,
    complete,
    every_promise,
    greedy_ids,
    stress_model,
)
from tests.tiny_models import FAMILIES, Family, tiny_model

NO_STOP = ()


def model_of(family: Family):
    return tiny_model(family, std=0.3)  # sharp enough that a wrong mask, position or soft-cap changes tokens


@every_promise
async def test_engine_keeps_its_promises(promise: Promise) -> None:
    model = stress_model()
    engine = TransformersEngine(model)
    await promise(Subject(engine, model))
    await engine.aclose()


@pytest.mark.parametrize("family", FAMILIES)
async def test_greedy_ids_equal_those_of_generate(family: Family) -> None:
    model = model_of(family)
    engine = TransformersEngine(model)
    generations = await complete(engine, PROMPTS, GREEDY)
    assert [g.ids for g in generations] == [greedy_ids(model, p, LONG) for p in PROMPTS]
    await engine.aclose()


@pytest.mark.parametrize("family", FAMILIES)
async def test_logps_are_those_of_the_trainer_over_six_turns(family: Family) -> None:
    model = model_of(family)
    engine = TransformersEngine(model)
    ids, mask, logps = list(PROMPTS[0]), [0] * len(PROMPTS[0]), []
    for turn in range(6):
        turn_ = await engine.generate(ids, Sampling(5, NO_STOP, seed=turn), session="one")
        observation = [21 + turn, 22, 23]
        ids += [*turn_.ids, *observation]
        mask += [1] * 5 + [0] * 3
        logps += list(turn_.logps or ())
    trained = action_logps(model, torch.tensor([ids]), torch.tensor([mask]))
    assert torch.allclose(trained[0][torch.tensor(mask).bool()], torch.tensor(logps), atol=1e-4)
    await engine.aclose()


async def test_turns_of_a_session_feed_only_what_is_new() -> None:
    engine = TransformersEngine(model_of("gemma2"))
    fed = count_fed_tokens(engine)
    first = await engine.generate(PROMPTS[1], Sampling(4, NO_STOP), session="one")
    assert fed() == len(PROMPTS[1]) + 3
    observation = [30, 31]
    await engine.generate([*PROMPTS[1], *first.ids, *observation], Sampling(4, NO_STOP), session="one")
    assert fed() == 1 + len(observation) + 3  # the last sampled id was never fed
    await engine.aclose()


async def test_samples_of_one_problem_share_its_prefill() -> None:
    engine = TransformersEngine(model_of("gemma2"))
    fed = count_fed_tokens(engine)
    await complete(engine, [PROMPTS[1]] * 8, Sampling(1, NO_STOP))
    assert fed() == len(PROMPTS[1]) + 7
    await engine.aclose()


async def test_shared_prefill_changes_no_token() -> None:
    model = model_of("gemma3")
    together = await complete(TransformersEngine(model), [PROMPTS[1]] * 4, Sampling(LONG, NO_STOP, seed=3))
    alone = await complete(TransformersEngine(model), [PROMPTS[1]], Sampling(LONG, NO_STOP, seed=3))
    assert {g.ids for g in together} == {alone[0].ids}


async def test_sessions_beyond_the_rows_are_evicted_or_wait_and_lose_nothing() -> None:
    model = model_of("gemma2")

    async def play(max_rows: int) -> list[tuple[int, ...]]:
        engine = TransformersEngine(model, max_rows=max_rows)
        prompts = [[2, 5 + i, 6, 7] for i in range(7)]
        found = []
        for turn in range(3):
            turns = await complete(engine, prompts, Sampling(6, NO_STOP, seed=turn))
            prompts = [[*p, *t.ids, 30 + turn] for p, t in zip(prompts, turns, strict=True)]
            found += [t.ids for t in turns]
        await engine.aclose()
        return found

    assert await play(max_rows=2) == await play(max_rows=16)


async def test_context_ends_a_turn_as_too_long() -> None:
    engine = TransformersEngine(model_of("llama"), max_context=10)
    generation = await engine.generate(PROMPTS[0], Sampling(LONG, NO_STOP), session="a")
    assert (len(generation.ids), generation.finish_reason) == (6, "length")
    with pytest.raises(InputError, match="does not fit a context of 10"):
        await engine.generate(list(range(10)), Sampling(1, NO_STOP))
    await engine.aclose()


async def test_cancelled_call_frees_its_row_and_disturbs_nobody() -> None:
    engine = TransformersEngine(model_of("gemma2"), max_rows=1)
    long_call = asyncio.create_task(engine.generate(PROMPTS[0], Sampling(400, NO_STOP), session="a"))
    waiting = asyncio.create_task(engine.generate(PROMPTS[1], Sampling(3, NO_STOP), session="b"))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    long_call.cancel()
    assert len((await waiting).ids) == 3
    assert long_call.cancelled()
    await engine.aclose()


async def test_failure_of_the_model_reaches_every_caller_and_the_next_call_works() -> None:
    engine = TransformersEngine(model_of("llama"))
    working = engine._policy.feed

    def broken(feed: Feed) -> NextLogits:
        raise RuntimeError("out of memory")

    engine._policy.feed = broken
    calls = [engine.generate(p, Sampling(3, NO_STOP), session=str(i)) for i, p in enumerate(PROMPTS)]
    for error in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(error, EngineError) and "out of memory" in str(error)
    engine._policy.feed = working
    assert len((await engine.generate(PROMPTS[0], Sampling(3, NO_STOP))).ids) == 3
    await engine.aclose()


async def test_long_prefills_are_cut_into_bounded_steps() -> None:
    model = model_of("gemma2")
    prompts = [[2, *range(5, 5 + n)] for n in (30, 3, 25, 12)]
    bounded = await complete(
        TransformersEngine(model, prefill_tokens=32), prompts, Sampling(8, NO_STOP, temperature=0)
    )
    free = await complete(TransformersEngine(model), prompts, Sampling(8, NO_STOP, temperature=0))
    assert [g.ids for g in bounded] == [g.ids for g in free]


async def test_weights_that_change_in_place_are_served_from_then_on() -> None:
    model, sampling = model_of("gemma2"), Sampling(8, NO_STOP, temperature=0)
    engine = TransformersEngine(model)
    before = await engine.generate(PROMPTS[1], sampling, session="one")
    old = engine.fingerprint
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flip(0))
    engine.weights_changed()
    again = await engine.generate(PROMPTS[1], sampling, session="one")
    fresh = TransformersEngine(model)
    expected = await fresh.generate(PROMPTS[1], sampling)
    assert (again.ids, again.logps) == (expected.ids, expected.logps)
    assert again.logps != before.logps
    assert engine.fingerprint == fresh.fingerprint != old
    await engine.aclose()
    await fresh.aclose()


async def test_weights_do_not_change_under_a_request_but_may_after_it_is_cancelled() -> None:
    engine = TransformersEngine(model_of("llama"))
    call = asyncio.create_task(engine.generate(PROMPTS[0], Sampling(400, NO_STOP)))
    await asyncio.sleep(0)
    with pytest.raises(EngineError, match="weights cannot change while 1 requests are in flight"):
        engine.weights_changed()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    engine.weights_changed()
    assert len((await engine.generate(PROMPTS[0], Sampling(3, NO_STOP))).ids) == 3
    await engine.aclose()


async def test_a_model_that_its_trainer_left_in_training_mode_samples_without_dropout() -> None:
    model = model_of("llama")
    mlp = model.get_submodule("model.layers.0.mlp")
    mlp.register_module("act_fn", torch.nn.Sequential(mlp.get_submodule("act_fn"), torch.nn.Dropout(0.9)))
    engine = TransformersEngine(model)
    expected = await engine.generate(PROMPTS[0], Sampling(8, NO_STOP))
    model.train()
    engine.weights_changed()
    assert (await engine.generate(PROMPTS[0], Sampling(8, NO_STOP))).logps == expected.logps
    await engine.aclose()


async def test_a_model_that_is_moved_after_the_engine_was_made_is_cached_where_it_is() -> None:
    model, sampling = model_of("gemma2"), Sampling(8, NO_STOP)
    engine = TransformersEngine(model)
    policy = engine._policy
    assert isinstance(policy, CachedModel)
    policy._cache._device = torch.device("meta")  # where the model would have been
    moved = await engine.generate(PROMPTS[1], sampling)
    assert moved == await TransformersEngine(model).generate(PROMPTS[1], sampling)
    await engine.aclose()


def test_attention_that_ignores_the_mask_is_refused() -> None:
    with pytest.raises(InputError, match="attn_implementation='flex_attention'"):
        TransformersEngine(tiny_model("llama", attention="flex_attention"))


def count_fed_tokens(engine: TransformersEngine):
    """A function that tells how many tokens went through the model since it was last asked."""
    fed = itertools.count()
    last = 0
    working = engine._policy.feed

    def counting(feed: Feed) -> NextLogits:
        for _ in range(sum(len(ids) for ids in feed.pending)):
            next(fed)
        return working(feed)

    engine._policy.feed = counting

    def since() -> int:
        nonlocal last
        now = next(fed)
        found, last = now - last, now + 1
        return found

    return since
