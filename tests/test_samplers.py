import asyncio
import copy
from typing import Any

import pytest
import torch

from mtpo.engines import cached_model
from mtpo.engines.transformers import TransformersEngine
from mtpo.errors import EngineError, InputError
from mtpo.models import fingerprint
from mtpo.rollout import Sampling
from mtpo.samplers import CURRENT, REFERENCE, PolicySamplers, Sampler, ema, geo_mix, previous
from tests.tiny_models import Family, tiny_model

PROMPT = [2, 5, 6, 7]
ALL = (CURRENT, REFERENCE, previous(1), previous(2), ema(0.9), geo_mix(0.25))


def policy_and_reference() -> tuple[Any, Any]:
    return tiny_model("llama", std=0.3), tiny_model("llama", std=0.3, seed=1)


@torch.no_grad()
def train(model: Any, step: int) -> None:
    """An optimiser step that changes every weight, in place."""
    for index, parameter in enumerate(model.parameters()):
        parameter.add_(
            0.03 * (index + 1) * torch.cos(torch.arange(parameter.numel()) + step).view_as(parameter)
        )


async def logps_of(samplers: PolicySamplers, sampler: Sampler) -> tuple[float, ...]:
    answer = await samplers.engine(sampler).generate(PROMPT, Sampling(4, (), seed=3), session="s")
    assert answer.logps is not None
    return answer.logps


async def logps_of_model(model: Any) -> tuple[float, ...]:
    engine = TransformersEngine(model)
    answer = await engine.generate(PROMPT, Sampling(4, (), seed=3))
    await engine.aclose()
    assert answer.logps is not None
    return answer.logps


async def test_each_sampler_follows_the_policy_as_its_name_says() -> None:
    policy, reference = policy_and_reference()
    samplers = PolicySamplers(policy, reference)
    versions = [copy.deepcopy(policy)]
    for sampler in ALL:
        samplers.engine(sampler)
    average = copy.deepcopy(policy)
    for step in range(1, 5):
        train(policy, step)
        samplers.update(step)
        versions.append(copy.deepcopy(policy))
        with torch.no_grad():
            for kept, new in zip(average.parameters(), policy.parameters(), strict=True):
                kept.copy_(0.9 * kept + 0.1 * new)
        assert await logps_of(samplers, CURRENT) == await logps_of_model(versions[-1])
        assert await logps_of(samplers, REFERENCE) == await logps_of_model(reference)
        assert await logps_of(samplers, previous(1)) == await logps_of_model(versions[-2])
        assert await logps_of(samplers, previous(2)) == await logps_of_model(versions[max(0, step - 2)])
        expected = await logps_of_model(average)
        assert await logps_of(samplers, ema(0.9)) == pytest.approx(expected, abs=1e-5)
        assert expected != pytest.approx(await logps_of_model(versions[-1]), abs=1e-2)
        assert samplers.engine(CURRENT).fingerprint == fingerprint(versions[-1])
        assert samplers.engine(previous(1)).fingerprint == fingerprint(versions[-2])
    await samplers.aclose()


async def test_the_mixture_follows_the_policy_and_tells_log_z() -> None:
    policy, reference = policy_and_reference()
    samplers = PolicySamplers(policy, reference)
    await logps_of(samplers, geo_mix(0.25))
    before = samplers.engine(geo_mix(0.25)).fingerprint
    samplers.metrics()
    train(policy, 1)
    samplers.update(1)
    engine = samplers.engine(geo_mix(0.25))
    answer = await engine.generate(PROMPT, Sampling(4, (), seed=3), session="s")
    fresh = PolicySamplers(policy, reference).engine(geo_mix(0.25))
    expected = await fresh.generate(PROMPT, Sampling(4, (), seed=3))
    assert (answer.ids, answer.logps) == (expected.ids, expected.logps)
    assert engine.fingerprint == fresh.fingerprint != before
    found = answer.log_normalizers
    assert found is not None
    assert samplers.metrics() == {
        "staleness": 0,
        "geo_mix(0.25)/log_z_mean": pytest.approx(sum(found) / 4),
        "geo_mix(0.25)/log_z_min": min(found),
    }
    assert samplers.metrics() == {"staleness": 0}  # nothing was sampled since
    await samplers.aclose()


async def test_weights_are_pushed_every_k_steps_and_staleness_says_how_old_they_are() -> None:
    policy, reference = policy_and_reference()
    samplers = PolicySamplers(policy, reference, push_every=3)
    served = fingerprint(policy)
    for sampler in ALL:
        samplers.engine(sampler)
    staleness = []
    for step in range(1, 8):
        train(policy, step)
        samplers.update(step)
        staleness.append(samplers.staleness)
        if step % 3 == 0:
            served = fingerprint(policy)
        assert samplers.engine(CURRENT).fingerprint == served
    assert staleness == [1, 2, 0, 1, 2, 0, 1]
    assert samplers.metrics()["staleness"] == 1
    await samplers.aclose()


async def test_the_trainer_may_step_while_engines_of_their_own_weights_are_sampling() -> None:
    policy, _ = policy_and_reference()
    expected = await logps_of_model(copy.deepcopy(policy))
    samplers = PolicySamplers(policy, push_every=2)
    call = asyncio.create_task(logps_of(samplers, CURRENT))
    await asyncio.sleep(0)
    train(policy, 1)
    samplers.update(1)
    assert await call == expected
    await samplers.aclose()


async def test_only_weights_that_sample_are_read_for_their_fingerprint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy, reference = policy_and_reference()
    samplers, read = PolicySamplers(policy, reference), []
    monkeypatch.setattr(cached_model, "fingerprint", lambda model: read.append(model) or fingerprint(model))
    for sampler in (CURRENT, REFERENCE, geo_mix(0.5)):
        samplers.engine(sampler)
    for step in range(1, 6):
        train(policy, step)
        samplers.update(step)
    assert not read
    await logps_of(samplers, CURRENT)
    sampled = fingerprint(policy)
    train(policy, 6)  # before the samplers are told
    assert samplers.engine(CURRENT).fingerprint == sampled
    await logps_of(samplers, geo_mix(0.5))
    assert read == [policy, reference]
    await samplers.aclose()


async def test_a_push_under_a_request_is_refused_and_changes_nothing() -> None:
    policy, reference = policy_and_reference()
    samplers = PolicySamplers(policy, reference)
    samplers.engine(ema(0.5))
    old = samplers.engine(previous(1)).fingerprint
    call = asyncio.create_task(logps_of(samplers, CURRENT))
    await asyncio.sleep(0)
    train(policy, 1)
    with pytest.raises(EngineError, match="1 requests are in flight"):
        samplers.update(1)
    assert samplers.engine(ema(0.5)).fingerprint == samplers.engine(previous(1)).fingerprint == old
    await call
    samplers.update(1)
    assert samplers.engine(CURRENT).fingerprint == fingerprint(policy)
    await samplers.aclose()


def test_averages_are_in_float32_and_keep_steps_that_bfloat16_loses() -> None:
    policy = tiny_model("llama", dtype=torch.bfloat16)
    start = [parameter.float() for parameter in policy.parameters()]
    samplers = PolicySamplers(policy)
    samplers.engine(ema(0.999))
    train(policy, 1)
    samplers.update(1)
    [average] = samplers.state_dict()["copies"].values()
    for first, latest, found in zip(start, policy.parameters(), average.values(), strict=True):
        torch.testing.assert_close(found, first + (latest.float() - first) / 1000, rtol=1e-5, atol=1e-7)
    resumed = PolicySamplers(copy.deepcopy(policy))
    resumed.load_state_dict(samplers.state_dict())
    assert resumed.engine(ema(0.999)).fingerprint == samplers.engine(ema(0.999)).fingerprint


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
async def test_the_reference_of_an_adapter_is_the_model_below_it_with_no_second_copy(family: Family) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model(family, std=0.3)
    base = copy.deepcopy(model)
    config = peft.LoraConfig(
        target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.5
    )
    policy = peft.get_peft_model(model, config).train()
    samplers = PolicySamplers(policy)
    assert await logps_of(samplers, REFERENCE) == await logps_of_model(base)
    assert samplers.engine(REFERENCE).fingerprint == fingerprint(base)
    assert await logps_of(samplers, CURRENT) == await logps_of_model(policy)
    assert await logps_of(samplers, CURRENT) != await logps_of(samplers, REFERENCE)
    mixed = await logps_of(samplers, geo_mix(0.5))
    assert mixed == await logps_of(PolicySamplers(policy, base), geo_mix(0.5))
    shared = {p.data_ptr() for p in policy.parameters()}
    assert all(p.data_ptr() in shared for p in samplers._weights[REFERENCE].model.parameters())
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.5)
    samplers.update(1)
    assert await logps_of(samplers, CURRENT) == await logps_of_model(policy)
    assert await logps_of(samplers, REFERENCE) == await logps_of_model(base)
    await samplers.aclose()


@pytest.mark.parametrize("push_every", [1, 3])
async def test_a_resumed_run_samples_as_the_one_that_went_on(push_every: int, tmp_path: Any) -> None:
    policy, reference = policy_and_reference()
    going_on = PolicySamplers(policy, reference, push_every=push_every)
    for sampler in ALL:
        going_on.engine(sampler)
    for step in range(1, 5):
        train(policy, step)
        going_on.update(step)
    torch.save(going_on.state_dict(), tmp_path / "samplers.pt")
    restored = copy.deepcopy(policy)
    resumed = PolicySamplers(restored, reference, push_every=push_every)
    resumed.engine(ALL[2])  # some engines are made before, some after
    resumed.load_state_dict(torch.load(tmp_path / "samplers.pt", weights_only=True))
    for step in range(4, 8):
        for sampler in ALL:
            assert await logps_of(resumed, sampler) == await logps_of(going_on, sampler), (step, sampler.name)
            assert resumed.engine(sampler).fingerprint == going_on.engine(sampler).fingerprint
        assert resumed.staleness == going_on.staleness
        for model, samplers in ((policy, going_on), (restored, resumed)):
            train(model, step + 1)
            samplers.update(step + 1)
    await going_on.aclose()
    await resumed.aclose()


def test_names_say_which_sampler_it_was() -> None:
    assert [s.name for s in ALL] == [
        "current",
        "reference",
        "previous(1)",
        "previous(2)",
        "ema(0.9)",
        "geo_mix(0.25)",
    ]


def test_what_cannot_be_sampled_is_refused() -> None:
    policy, reference = policy_and_reference()
    for make, value in ((previous, 0), (ema, 1.0), (ema, -0.1), (geo_mix, 1.01), (geo_mix, -0.01)):
        with pytest.raises(InputError, match=str(value)):
            make(value)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"the sampler geo_mix\(0.25\) needs a reference model"):
        PolicySamplers(policy).engine(geo_mix(0.25))
    with pytest.raises(InputError, match="the sampler reference needs a reference model"):
        PolicySamplers(policy).engine(REFERENCE)
    with pytest.raises(InputError, match="push_every must be at least 1, got 0"):
        PolicySamplers(policy, reference, push_every=0)
    with pytest.raises(InputError, match="the policy has 48 tokens and the reference 64"):
        PolicySamplers(policy, tiny_model("llama", vocab_size=64)).engine(geo_mix(0.25))
