"""Geometric mixtures of two models, against what both models say without any cache."""

from __future__ import annotations

import asyncio
import copy
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mtpo.engines.cached_model import CachedModel, Feed, Weights
from mtpo.engines.mixture import CachedMixture, Mixture
from mtpo.engines.transformers import TransformersEngine
from mtpo.errors import EngineError, InputError
from mtpo.rollout import Sampling
from tests.engine_conformance import (
    PROMPTS,
    Promise,
    Subject,
    complete,
    greedy_ids_equal_those_of_generate,
    logps_are_those_of_the_trainer_over_six_turns,
    seeds_reproduce_whatever_else_is_in_the_batch,
    sixty_requests_at_once_get_their_own_answers,
    stress_model,
    the_context_ends_a_turn_as_too_long,
)
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import make_tokenizer

B = 0.3
PROMISES_OF_CACHES: list[Promise] = [
    greedy_ids_equal_those_of_generate,
    logps_are_those_of_the_trainer_over_six_turns,
    seeds_reproduce_whatever_else_is_in_the_batch,
    sixty_requests_at_once_get_their_own_answers,
    the_context_ends_a_turn_as_too_long,
]
"""Of those that the embedded engine keeps for one model, the ones that two caches could break."""


def mixture(policy: Any, reference: Any, ref_coef: float = B, tokenizers: Any = None) -> Mixture:
    return Mixture(Weights(policy), Weights(reference), ref_coef, tokenizers)


def softcapped(seed: int, cap: float, **overrides: Any) -> PreTrainedModel:
    """A Gemma 2 in float64 whose logits, without the cap, would be several times as large."""
    return tiny_model(
        "gemma2", seed=seed, std=0.5, dtype=torch.float64, final_logit_softcapping=cap, **overrides
    )


def uncached_logps(model: Any, ids: Sequence[int]) -> Tensor:
    """log p of every token after the whole of `ids`, (V,)."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits.double().log_softmax(-1)


def mixed(policy: Any, reference: Any, ids: Sequence[int], b: float = B) -> tuple[Tensor, float]:
    """Log-probs of the mixture after `ids`, by its definition, and log Z."""
    product = uncached_logps(policy, ids).exp() ** (1 - b) * uncached_logps(reference, ids).exp() ** b
    return (product / product.sum()).log(), math.log(product.sum())


# -- the distribution ----------------------------------------------------------------------------------------


async def test_every_token_over_five_turns_has_the_logp_and_normalizer_of_both_models_without_cache() -> None:
    one_layer = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    policy, reference = softcapped(1, 4.0), softcapped(2, 9.0, **one_layer)
    engine = TransformersEngine(mixture(policy, reference))
    ids, errors = list(PROMPTS[0]), []
    for turn in range(5):
        answer = await engine.generate(ids, Sampling(6, (), seed=turn), session="one")
        assert answer.logps is not None and answer.log_normalizers is not None
        for token, logp, log_z in zip(answer.ids, answer.logps, answer.log_normalizers, strict=True):
            expected, expected_log_z = mixed(policy, reference, ids)
            errors += [abs(expected[token].item() - logp), abs(expected_log_z - log_z)]
            ids.append(token)
        ids += [21 + turn, 22, 23]
    assert max(errors) < 2e-6  # the engine draws, and reports, in float32
    await engine.aclose()


def test_log_probs_of_float64_models_are_mixed_in_float64() -> None:
    policy, reference = softcapped(1, 4.0), softcapped(2, 9.0)
    ids = PROMPTS[1]
    found, log_z = CachedMixture(mixture(policy, reference), 1).feed(Feed(0, [0], [ids]))
    expected, expected_log_z = mixed(policy, reference, ids)
    assert log_z is not None
    # The attention of transformers takes its softmax in float32 even here.
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-6)
    assert log_z.item() == pytest.approx(expected_log_z, abs=1e-6)
    logits = [CachedModel(Weights(m), 1).feed(Feed(0, [0], [ids])).logits[0] for m in (policy, reference)]
    ours, theirs = (x.log_softmax(-1).exp() for x in logits)
    product = ours ** (1 - B) * theirs**B
    torch.testing.assert_close(found[0], (product / product.sum()).log(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
async def test_sampled_frequencies_are_those_of_the_mixture(temperature: float) -> None:
    """Pearson's chi-square of two-token continuations over a vocabulary of five: 24 degrees of freedom."""
    policy, reference = (tiny_model("llama", seed=s, std=0.15, vocab_size=5) for s in (5, 6))
    engine = TransformersEngine(mixture(policy, reference))
    sampling = [Sampling(2, (), temperature=temperature, seed=seed) for seed in range(3000)]
    calls = [engine.generate([2, 3, 4], s, session=str(s.seed)) for s in sampling]
    counts = Counter(generation.ids for generation in await asyncio.gather(*calls))

    def drawn_by(b: float, *prefix: int) -> Tensor:
        return (mixed(policy, reference, [2, 3, 4, *prefix], b)[0] / temperature).softmax(-1)

    def chi_square(b: float) -> float:
        first, second = drawn_by(b), [drawn_by(b, i) for i in range(5)]
        cells = itertools.product(range(5), repeat=2)
        expected = {(i, j): 3000 * (first[i] * second[i][j]).item() for i, j in cells}
        return sum((counts[cell] - n) ** 2 / n for cell, n in expected.items())

    assert chi_square(B) < 49.0  # exceeded by chance once in 500
    assert min(chi_square(b) for b in (0, 1 - B, 1)) > 100
    await engine.aclose()


def with_bias(model: Any, bias: float) -> Any:
    """A model that rules out, or wants, token 7."""
    values = torch.zeros(model.config.vocab_size)
    values[7] = bias
    model.lm_head.bias = torch.nn.Parameter(values)
    return model


@pytest.mark.parametrize("by_policy", [True, False])
async def test_a_token_that_one_model_rules_out_stays_ruled_out(by_policy: bool) -> None:
    excluding = with_bias(tiny_model("llama"), -math.inf)
    wanting = with_bias(tiny_model("llama", seed=1), 50.0)
    pair = (excluding, wanting) if by_policy else (wanting, excluding)
    found = CachedMixture(mixture(*pair, ref_coef=0.01), 1).feed(Feed(0, [0], [PROMPTS[0]]))
    assert found.logits[0, 7] == -math.inf
    assert found.logits.exp().sum().item() == pytest.approx(1, abs=1e-5)
    engine = TransformersEngine(mixture(*pair, ref_coef=0.01))
    answers = await complete(engine, PROMPTS, Sampling(40, (), temperature=4.0))
    assert not any(7 in answer.ids for answer in answers)
    await engine.aclose()


async def test_models_without_a_token_in_common_are_an_error_and_no_guess() -> None:
    policy, reference = (tiny_model("llama", seed=s) for s in (0, 1))
    for model, start in ((policy, 0), (reference, 24)):
        with_bias(model, 0.0).lm_head.bias.data[start : start + 24] = -math.inf  # pyright: ignore
    engine = TransformersEngine(mixture(policy, reference))
    with pytest.raises(EngineError, match="no token in common"):
        await engine.generate(PROMPTS[0], Sampling(3, ()))
    await engine.aclose()


# -- its two ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ref_coef", [0, 1])
async def test_at_either_end_the_other_model_may_be_nan(ref_coef: float) -> None:
    healthy, broken = tiny_model("gemma2", std=0.3), tiny_model("gemma2")
    torch.nn.init.constant_(broken.get_input_embeddings().weight, math.nan)  # pyright: ignore
    pair = (broken, healthy) if ref_coef else (healthy, broken)
    engine, alone = TransformersEngine(mixture(*pair, ref_coef)), TransformersEngine(healthy)
    for seed in range(3):
        sampling = Sampling(12, (), seed=seed)
        answer = await engine.generate(PROMPTS[0], sampling)
        expected = await alone.generate(PROMPTS[0], sampling)
        assert (answer.ids, answer.logps) == (expected.ids, expected.logps)
        assert answer.log_normalizers == (0.0,) * 12
    assert engine.fingerprint == alone.fingerprint
    between = TransformersEngine(mixture(*pair))
    with pytest.raises(EngineError, match="nan"):
        await between.generate(PROMPTS[0], Sampling(3, ()))
    for each in (engine, alone, between):
        await each.aclose()


async def test_of_equal_models_log_z_is_0_and_of_others_it_is_tallied() -> None:
    model = stress_model()
    engine = TransformersEngine(mixture(model, copy.deepcopy(model), 0.5))
    [equal] = await complete(engine, PROMPTS[:1], Sampling(20, ()))
    assert equal.log_normalizers == pytest.approx([0.0] * 20, abs=1e-5)
    await engine.aclose()
    engine = TransformersEngine(mixture(model, stress_model(6), 0.5))
    answers = await complete(engine, PROMPTS, Sampling(20, ()))
    found = [z for answer in answers for z in answer.log_normalizers or ()]
    assert max(found) < -0.01
    tally = engine.log_normalizers
    assert (tally.count, tally.minimum) == (60, min(found))
    assert tally.mean == pytest.approx(sum(found) / 60)
    await engine.aclose()


# -- an engine like any other --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stressed() -> PreTrainedModel:
    return stress_model()


@pytest.mark.parametrize("promise", PROMISES_OF_CACHES, ids=lambda promise: promise.__name__)
async def test_a_mixture_of_equal_models_keeps_an_engines_promises(
    promise: Promise, stressed: PreTrainedModel
) -> None:
    engine = TransformersEngine(mixture(stressed, copy.deepcopy(stressed), 0.5))
    await promise(Subject(engine, stressed))
    await engine.aclose()


async def test_sessions_that_are_evicted_lose_nothing_in_either_cache() -> None:
    policy, reference = (tiny_model("gemma2", seed=s, std=0.3) for s in (1, 2))

    async def play(max_rows: int) -> list[tuple[int, ...]]:
        engine = TransformersEngine(mixture(policy, reference), max_rows=max_rows)
        prompts = [[2, 5 + i, 6, 7] for i in range(5)]
        found = []
        for turn in range(3):
            turns = await complete(engine, prompts, Sampling(6, (), seed=turn))
            prompts = [[*p, *t.ids, 30 + turn] for p, t in zip(prompts, turns, strict=True)]
            found += [t.ids for t in turns]
        await engine.aclose()
        return found

    assert await play(max_rows=2) == await play(max_rows=16)


# -- what cannot be mixed ------------------------------------------------------------------------------------


def test_what_does_not_share_a_vocabulary_is_refused_in_one_line() -> None:
    model = tiny_model("llama")
    gemma, mistral = make_tokenizer("gemma"), make_tokenizer("mistral")
    refusals = {
        "the policy has 48 tokens and the reference 64": (tiny_model("llama", vocab_size=64), None),
        "eos_token_id is 1 to the policy and 3 to the reference": (tiny_model("llama", eos_token_id=3), None),
        "those of policy and reference differ in": (tiny_model("llama", seed=1), (gemma, mistral)),
    }
    for reason, (reference, tokenizers) in refusals.items():
        with pytest.raises(InputError, match=reason) as raised:
            mixture(model, reference, tokenizers=tokenizers)
        assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match=r"ref_coef must lie in \[0, 1\], got 1.5"):
        mixture(model, model, 1.5)
    mixture(model, tiny_model("llama", seed=1), tokenizers=(gemma, make_tokenizer("gemma")))
    mixture(model, tiny_model("llama", eos_token_id=[1, 7]))  # an instruction-tuned model ends turns, too


def test_vllm_refuses_a_mixture_with_the_reason() -> None:
    from mtpo.engines.vllm import VLLMEngine

    with pytest.raises(InputError, match=r"vLLM cannot sample from a mixture: .* use the embedded engine"):
        VLLMEngine(mixture(tiny_model("llama"), tiny_model("llama", seed=1)))


def test_the_shorter_context_of_both_models_holds() -> None:
    short, long = tiny_model("llama", max_position_embeddings=20), tiny_model("llama", seed=1)
    assert TransformersEngine(mixture(long, short)).max_context == 20
