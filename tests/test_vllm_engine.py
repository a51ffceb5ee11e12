"""`VLLMEngine` against the real vLLM, on the device that it was built for. `make test-vllm` runs this on a CPU."""

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mtpo.engines.vllm import VLLMEngine
from mtpo.errors import EngineError, InputError
from mtpo.logprobs import action_logps
from mtpo.models import load_model
from mtpo.rollout import Sampling
from recipes.quickstart import supervised
from tests.engine_conformance import (
    GREEDY,
    LONG,
    MAX_LOGP_ERROR,
    PROMPTS,
    Promise,
    Subject,
    complete,
    every_promise,
    greedy_ids,
    stress_model,
)

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
pytestmark = pytest.mark.vllm
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB

SMALL: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 64}
SMALL |= {"gpu_memory_utilization": 0.2}
BLOCK = 32


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints of one architecture."""
    folders = [tmp_path_factory.mktemp("models") / name for name in ("first", "second")]
    for seed, folder in zip((5, 1), folders, strict=True):
        stress_model(seed).save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def subject(folders: list[Path]) -> Iterator[Subject]:
    started = time.monotonic()
    engine = VLLMEngine(folders[0], **SMALL)
    print(f"vLLM started in {time.monotonic() - started:.0f} s")
    yield Subject(engine, load_model(folders[0]))
    asyncio.run(engine.aclose())


@every_promise
async def test_engine_keeps_its_promises(promise: Promise, subject: Subject) -> None:
    await promise(subject)


async def test_turns_and_samples_share_what_is_computed(subject: Subject) -> None:
    """Also in layers with a window, where vLLM by default forgets what it sampled."""
    cached = count_cached_tokens(subject.engine)
    ids = [2, *range(5, 60)]
    for turn in range(4):
        answer = await subject.engine.generate(ids, Sampling(40, (), seed=turn), session="one")
        assert len(ids) - cached.pop() < 2 * BLOCK or turn == 0
        ids += [*answer.ids, 21, 22, 23]
    await complete(subject.engine, [ids] * 8, Sampling(4, ()))
    assert min(cached) > len(ids) - 2 * BLOCK


async def test_more_seeded_prompts_than_fit_one_step_are_answered(subject: Subject) -> None:
    prompts = [[2, *((5 + i * j) % 58 + 5 for j in range(300))] for i in range(40)]
    found = await complete(subject.engine, prompts, Sampling(3, (), seed=1))
    assert [len(g.ids) for g in found] == [3] * 40
    assert subject.engine._num_starts == 1  # pyright: ignore[reportAttributeAccessIssue]


async def test_an_id_outside_the_vocabulary_is_refused(subject: Subject) -> None:
    for wrong in (-1, 64):
        with pytest.raises(InputError, match="the model knows 0 to 63"):
            await subject.engine.generate([2, wrong, 5], GREEDY)
    assert len((await subject.engine.generate([2, 63, 5], GREEDY)).ids) == LONG


async def test_weights_change_without_a_restart(subject: Subject, folders: list[Path]) -> None:
    engine = subject.engine
    assert isinstance(engine, VLLMEngine)
    first, second = (load_model(folder) for folder in folders)
    prompt = PROMPTS[1] * 6  # long enough to be in the prefix cache
    before = engine.fingerprint
    started = time.monotonic()
    await engine.update_weights(folders[1])
    print(f"weights changed in {time.monotonic() - started:.2f} s")
    [answer] = await complete(engine, [prompt], GREEDY)
    assert answer.ids == greedy_ids(second, prompt, LONG) != greedy_ids(first, prompt, LONG)
    assert engine.fingerprint != before
    await engine.update_weights(folders[0])
    [answer] = await complete(engine, [prompt], GREEDY)
    assert answer.ids == greedy_ids(first, prompt, LONG)
    assert engine.fingerprint == before


async def test_weights_do_not_change_under_a_request(subject: Subject, folders: list[Path]) -> None:
    engine = subject.engine
    assert isinstance(engine, VLLMEngine)
    call = asyncio.create_task(engine.generate(PROMPTS[0], Sampling(400, ())))
    await asyncio.sleep(0.05)
    with pytest.raises(EngineError, match="while 1 requests are in flight"):
        await engine.update_weights(folders[1])
    assert len((await call).ids) == 400


async def test_a_folder_without_a_model_changes_nothing(subject: Subject, tmp_path: Path) -> None:
    engine = subject.engine
    assert isinstance(engine, VLLMEngine)
    with pytest.raises(InputError, match=r"expected config\.json or adapter_config\.json"):
        await engine.update_weights(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"r": 4}')
    with pytest.raises(InputError, match="this engine was made without one"):
        await engine.update_weights(tmp_path)


async def test_weights_that_cannot_be_used_leave_the_old_ones(
    subject: Subject, folders: list[Path], tmp_path: Path
) -> None:
    engine = subject.engine
    assert isinstance(engine, VLLMEngine)
    before = engine.fingerprint
    shutil.copytree(folders[1], tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(InputError, match=r"model\.safetensors: expected weights"):
        await engine.update_weights(tmp_path)
    weights.unlink()  # which only vLLM finds, when it starts
    with pytest.raises(EngineError, match="vLLM did not start"):
        await engine.update_weights(tmp_path)
    [answer] = await complete(engine, PROMPTS[:1], GREEDY)
    assert answer.ids == greedy_ids(subject.model, PROMPTS[0], LONG)
    assert engine.fingerprint == before


async def test_requests_survive_the_death_of_vllm(subject: Subject) -> None:
    engine = subject.engine
    assert isinstance(engine, VLLMEngine)
    calls = [
        asyncio.create_task(subject.engine.generate(p, Sampling(400, (), seed=3), session=str(i)))
        for i, p in enumerate(PROMPTS)
    ]
    await asyncio.sleep(0.1)
    for process in engine._llm.engine_core.resources.engine_manager.processes:
        os.kill(process.pid, signal.SIGKILL)
    interrupted = await asyncio.gather(*calls)
    again = await complete(subject.engine, PROMPTS, Sampling(400, (), seed=3))
    assert [g.ids for g in interrupted] == [g.ids for g in again]


async def test_a_prefix_cache_that_stays_is_thrown_away_with_the_process(
    subject: Subject, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = subject.engine
    assert isinstance(engine, VLLMEngine)
    prompt = PROMPTS[1] * 6
    await complete(engine, [prompt], GREEDY)

    async def refuse() -> bool:
        return False

    monkeypatch.setattr(engine._llm, "reset_prefix_cache", refuse)
    await engine.update_weights(folders[1])
    [answer] = await complete(engine, [prompt], GREEDY)
    assert answer.ids == greedy_ids(load_model(folders[1]), prompt, LONG)


async def test_weights_of_another_shape_start_vllm_again(subject: Subject, tmp_path: Path) -> None:
    engine = subject.engine
    assert isinstance(engine, VLLMEngine)
    deeper = stress_model(
        num_hidden_layers=3, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    )
    deeper.save_pretrained(tmp_path / "deeper")
    started = time.monotonic()
    await engine.update_weights(tmp_path / "deeper")
    print(f"vLLM started again in {time.monotonic() - started:.0f} s")
    [answer] = await complete(engine, PROMPTS[:1], GREEDY)
    assert answer.ids == greedy_ids(deeper, PROMPTS[0], LONG)


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    from peft import LoraConfig, get_peft_model

    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
        folders.append(tmp_path / f"adapter {seed}")
        get_peft_model(stress_model(), config).save_pretrained(folders[-1])
    return folders


async def test_adapters_are_served_and_swapped(folders: list[Path], adapters: list[Path]) -> None:
    from peft import PeftModel

    engine = VLLMEngine(folders[0], adapter=adapters[0], **SMALL)
    seen = set()
    for adapter in adapters:
        await engine.update_weights(adapter)
        seen.add(engine.fingerprint)
        model = PeftModel.from_pretrained(stress_model(), adapter)
        prompt = PROMPTS[1] * 6
        answer = await engine.generate(prompt, Sampling(LONG, ()))
        ids = torch.tensor([[*prompt, *answer.ids]])
        trained = action_logps(model, ids, torch.arange(ids.shape[1])[None] >= len(prompt))[0, len(prompt) :]
        bare = action_logps(stress_model(), ids, torch.arange(ids.shape[1])[None] >= len(prompt))
        assert (trained - torch.tensor(answer.logps)).abs().max() < MAX_LOGP_ERROR
        assert (trained - bare[0, len(prompt) :]).abs().max() > 0.1
    assert len(seen) == 2
    await engine.aclose()
    with pytest.raises(EngineError, match="the engine is closed"):
        await engine.generate(PROMPTS[0], GREEDY)


@pytest.fixture(scope="module")
def quickstart_subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    """The quickstart's first checkpoint, after 25 of its 1,000 steps."""
    out = tmp_path_factory.mktemp("quickstart") / "sft"
    folder = supervised(out, num_demonstrations=400, seed=0)
    engine = VLLMEngine(folder, **SMALL)
    yield Subject(engine, load_model(folder))
    asyncio.run(engine.aclose())


@every_promise
async def test_quickstart_checkpoint_keeps_an_engines_promises(
    promise: Promise, quickstart_subject: Subject
) -> None:
    await promise(quickstart_subject)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"model": "./no/such/folder"}, "no/such/folder"),
        ({"logprobs_mode": "processed_logprobs"}, "logprobs_mode: log-probs and ids are only right"),
        ({"no_such_option": 1}, "no_such_option"),
        ({"adapter": "./no/such/adapter"}, "expected an adapter of rank up to 512"),
    ],
)
def test_what_vllm_refuses_is_said_in_one_line(options: dict[str, Any], complaint: str, folders) -> None:
    with pytest.raises(InputError, match=complaint) as raised:
        VLLMEngine(**{"model": folders[0], **options})
    assert "\n" not in str(raised.value)


def count_cached_tokens(engine: Any) -> list[int]:
    """A list that grows by what each answer from now on had in the prefix cache."""
    found: list[int] = []
    generate = engine._llm.generate

    async def counting(*args: Any, **kwargs: Any):
        async for answer in generate(*args, **kwargs):
            found.append(answer.num_cached_tokens)
            yield answer

    engine._llm.generate = counting
    return found
