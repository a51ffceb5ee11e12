"""Dry runs of the shipped configs, and the memory estimate against what torch really allocates."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from eval.published import PUBLISHED as PUBLISHED_ACCURACY
from mtpo.cli import parse_config
from mtpo.errors import InputError
from mtpo.training import TrainingSettings
from mtpo.training.memory import estimate, saved_bytes
from recipes import iterate, sft, train
from recipes.architectures import PUBLISHED, architecture
from recipes.dry_run import memory_table, one_step, shrunken
from tests.tiny_models import FAMILIES, Family, tiny_config, tiny_model

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "recipes/configs").glob("*-*.yaml"))
PAPER = ROOT / "recipes/configs/paper"
PAPER_CONFIGS = sorted(PAPER.glob("*_*_*.yaml"))
SFT_CONFIGS = sorted((ROOT / "recipes/configs/sft").glob("*.yaml"))

NUM_PARAMETERS = {
    "google/gemma-1.1-7b-it": 8_537_680_896,
    "google/codegemma-1.1-7b-it": 8_537_680_896,
    "google/gemma-2-2b-it": 2_614_341_888,
    "google/gemma-2-9b-it": 9_241_705_984,
    "google/gemma-3-4b-it": 3_880_263_168,  # 4,300,079,472 with the eyes
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
}
"""As the hub counts the safetensors of each model."""


def settings(**options: Any) -> TrainingSettings:
    values: dict[str, Any] = {"method": "dpo", "batch_size": 8, "micro_batch_size": 1, "max_length": 64}
    return TrainingSettings(learning_rate=1e-3, **{**values, **options})


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_architectures_have_the_published_number_of_parameters(name: str) -> None:
    config, source = architecture(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == NUM_PARAMETERS[name]
    assert source == "the published architecture"


def dry(capsys: pytest.CaptureFixture[str], recipe: ModuleType, *argv: object) -> list[str]:
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
        assert recipe.main([str(a) for a in [*argv, "--dry_run"]]) == 0
    out, err = capsys.readouterr()
    assert not err
    return out.strip().splitlines()


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_shipped_loops_fit_eight_gpus_and_take_a_step(path: Path, capsys: Any, tmp_path: Path) -> None:
    lines = dry(capsys, iterate, "--config", path, "--out", tmp_path / "none")
    assert "the published architecture" in lines[0]
    total = next(float(line.split()[1]) for line in lines if line.startswith("  total"))
    assert 10 < total < 80  # an A100 of the paper's kind
    assert lines[-1].startswith("one step of dpo on a copy of 2 layers and hidden size 32: loss 0.69")
    assert any(line.startswith("sample current ") and "2,300 x 20" in line for line in lines)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("path", PAPER_CONFIGS, ids=[path.stem for path in PAPER_CONFIGS])
def test_the_papers_rows_are_planned_within_its_own_hours(path: Path, capsys: Any, tmp_path: Path) -> None:
    """It tells 24 to 48 hours on 8 A100 of 80 GB for all iterations, of whatever methods."""
    lines = dry(capsys, iterate, "--config", path, "--out", tmp_path / "none")
    hours, memory = (
        float(value) for value in next(line for line in lines if line.startswith("all ")).split()[2:4]
    )
    assert 24 < hours < 48 and 10 < memory < 75
    stages = {line[:16].strip(): line[16:].split() for line in lines}
    assert stages["test"][:4] == ["4", "6,319", "x", "1"]  # four policies on GSM8K and MATH, greedy
    assert stages["select on dev"][:4] == ["3", "1,000", "x", "11"]
    previous = ["2", "20,000", "x", "10"]  # the first iteration has no earlier policy unless one is given
    assert stages.get("sample previous", previous)[:4] == previous
    assert ("sample previous" in stages) == (not path.stem.endswith("raft"))
    assert "one step of " in lines[-1] and not (tmp_path / "none").exists()


@pytest.mark.parametrize("path", PAPER_CONFIGS, ids=[path.stem for path in PAPER_CONFIGS])
def test_the_papers_rows_have_the_papers_values(path: Path) -> None:
    """By section 13 of its spec: 4e-7 for the Gemma 1.1 family and 2e-7 for the others; RAFT 5e-6 or 1e-6."""
    config = parse_config(iterate.Config, "recipes.iterate", ["--config", str(path), "--out", "o"])
    model, method = path.stem.rsplit("_", 1)
    assert (config.iterations, config.prompts, config.samples + config.previous_samples) == (3, 20_000, 30)
    assert (config.max_turns, config.max_turn_tokens, config.max_length) == (6, 512, 2048)
    assert (config.batch_size, config.warmup_steps, config.lr_schedule) == (32, 40, "cosine")
    assert (config.reference, config.temperature, config.top_p, config.top_k) == ("last", 1.0, 1.0, 0)
    if method == "raft":
        expected = ("raft", "action", 1e-6, 1) if model == "mistral_7b" else ("raft", "action", 5e-6, 2)
    else:
        mask = "action" if method.startswith("m") else "none"
        rate = 4e-7 if model in ("gemma11_7b", "codegemma_7b") else 2e-7
        expected = (method.removeprefix("m"), mask, rate, 1)
        assert config.options["beta"] == 0.1
    assert (config.method, config.mask, config.learning_rate, config.epochs) == expected
    names = {
        "gemma11_7b": "Gemma 1.1 7B",
        "codegemma_7b": "CodeGemma 1.1 7B",
        "mistral_7b": "Mistral 7B v0.3",
    }
    rows = {"mdpo": "M-DPO", "mkto": "M-KTO", "dpo": "single-turn DPO", "kto": "single-turn KTO"}
    assert config.published == f"{names.get(model, 'Gemma 2 9B')}, {rows.get(method, 'RAFT')}"


def test_every_row_of_the_papers_table_has_a_config() -> None:
    assert len(PAPER_CONFIGS) == 4 * 5
    every = {
        parse_config(iterate.Config, "recipes.iterate", ["--config", str(p), "--out", "o"]).published
        for p in PAPER_CONFIGS
    }
    assert every == {name for name in PUBLISHED_ACCURACY if not name.endswith(", SFT")}


def test_values_of_the_papers_configs_name_their_sources() -> None:
    """(a) the paper's text, (b) its code, (c) the config's own; a line may stand for those right after it."""
    for path in PAPER.glob("*.yaml"):
        for line in path.read_text().splitlines():
            if ": " in line and not line.startswith(("#", " ", "base:", "published:", "ray_", "model:")):
                assert any(source in line for source in ("# (a)", "# (b)", "# (c)")), f"{path.name}: {line}"


@pytest.mark.parametrize("path", SFT_CONFIGS, ids=[path.stem for path in SFT_CONFIGS])
def test_shipped_supervised_runs_take_a_step(path: Path, capsys: Any, tmp_path: Path) -> None:
    lines = dry(capsys, sft, "--config", path, "--data", "none.jsonl", "--out", tmp_path / "none")
    assert float(lines[-1].split("loss ")[1].split(",")[0]) == pytest.approx(4.16, abs=0.1)  # ln 64


def test_every_model_has_both_configs() -> None:
    assert [p.name for p in CONFIGS] == [p.name for p in SFT_CONFIGS] and len(CONFIGS) == 6


def test_a_folder_is_dry_run_by_its_own_config(capsys: Any, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    argv = ["--method", "kto", "--model", tmp_path / "model", "--data", "none", "--out", tmp_path / "none"]
    argv += ["--learning_rate", "1e-3", "--lora_rank", "2", "--gpus", "2", "--strategy", "ddp"]
    lines = dry(capsys, train, *argv)
    assert "its config.json" in lines[0] and "GiB on each of 2 GPUs (ddp)" in lines[1]
    assert lines[-1].startswith("one step of kto")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpus", "2"], "--gpus has no effect without --dry_run"),
        (["--dry_run", "--strategy", "pipeline"], "--strategy is 'pipeline'"),
        (["--dry_run", "--gpus", "3", "--batch_size", "8"], "8 is no multiple of micro_batch_size 2 times 3"),
        (["--dry_run", "--model", "./nowhere"], "model ./nowhere: no such folder"),
    ],
)
def test_bad_dry_runs_are_refused_in_one_line(
    argv: Sequence[str], message: str, capsys: Any, tmp_path: Path
) -> None:
    known = ["--method", "dpo", "--model", "google/gemma-2-2b-it", "--data", "none", "--learning_rate", "1"]
    assert train.main([*known, "--out", str(tmp_path / "none"), *argv]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error


def params(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_weights_gradients_and_states_by_hand(family: Family) -> None:
    """float32: 4 bytes a weight, 4 a gradient, 8 of AdamW; on 4 GPUs a quarter, or with ddp all, and buckets."""
    n = params(tiny_model(family))
    sizes, alone = estimate(tiny_config(family), settings(), num_gpus=1, strategy="ddp")
    assert (sizes.num_parameters, sizes.num_trained) == (n, n)
    assert (alone.weights, alone.copies, alone.gradients, alone.optimizer) == (4 * n, 0, 4 * n, 8 * n)
    _, spread = estimate(tiny_config(family), settings(), num_gpus=4, strategy="zero3")
    assert (spread.weights, spread.gradients, spread.optimizer) == (n, n, 2 * n)
    _, copied = estimate(tiny_config(family), settings(), num_gpus=4, strategy="ddp")
    assert (copied.weights, copied.gradients, copied.optimizer) == (4 * n, 8 * n, 8 * n)
    _, pure = estimate(
        tiny_config(family), settings(dtype="bfloat16", pure_bfloat16=True), num_gpus=1, strategy="ddp"
    )
    assert (pure.weights, pure.gradients, pure.optimizer) == (2 * n, 2 * n, 4 * n)


def test_an_adapter_is_all_that_has_gradients() -> None:
    """Rank 2 on q_proj of 2 layers: A is 2 x 32, B is 32 x 2; the frozen model is bfloat16, the adapter float32."""
    n, adapter = params(tiny_model("llama")), 2 * (2 * 32 + 32 * 2)
    chosen = settings(dtype="bfloat16", lora_rank=2, lora_targets=["q_proj"])
    sizes, memory = estimate(tiny_config("llama"), chosen, num_gpus=1, strategy="ddp")
    assert (sizes.num_parameters, sizes.num_trained) == (n + adapter, adapter)
    assert (memory.weights, memory.gradients, memory.optimizer) == (
        2 * n + 4 * adapter,
        4 * adapter,
        8 * adapter,
    )


def test_quantised_layers_take_four_bits_and_their_scales() -> None:
    """Of Llama's 2 layers: 4 matrices of attention, two of them half as wide, and 3 of 32 x 64; the adapter stays."""
    linear = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    chosen = settings(dtype="bfloat16", lora_rank=2, lora_targets=["q_proj"])
    _, plain = estimate(tiny_config("llama"), chosen, num_gpus=1, strategy="ddp")
    _, small = estimate(tiny_config("llama"), chosen, num_gpus=1, strategy="ddp", in_4bit=True)
    assert plain.weights - small.weights == pytest.approx(linear * (2 - 4.127 / 8), abs=1)
    assert small.gradients == plain.gradients


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("autocast", [False, True])
def test_activations_are_what_torch_allocates(family: Family, autocast: bool) -> None:
    """Of 8 rows of 256 tokens, whose attention scores alone are 8 MiB a layer; within 10%.

    What torch's allocator still holds after a forward pass, by its profiler, less the weights that autocast has copied.
    """
    model = tiny_model(
        family, attention="eager" if family == "gemma2" else "sdpa", max_position_embeddings=512
    )
    ids, mask = torch.ones(8, 256, dtype=torch.long), torch.ones(8, 256, dtype=torch.long)
    mask[:, -3:] = 0
    gc.collect()
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof,
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        kept = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    held = sum(event.self_cpu_memory_usage for event in prof.key_averages())
    chosen = settings(
        method="sft", batch_size=8, micro_batch_size=8, max_length=256,
        dtype="bfloat16" if autocast else "float32",
    )  # fmt: skip
    _, memory = estimate(model.config, chosen, num_gpus=1, strategy="ddp")
    assert memory.activations + memory.copies == pytest.approx(held, rel=0.1)
    assert kept.requires_grad


def test_checkpointing_keeps_a_layer_and_the_inputs_of_all() -> None:
    config = tiny_config("llama", num_hidden_layers=6, max_position_embeddings=512)
    sizes = {}
    for layers in (1, 2):
        model = tiny_model("llama", num_hidden_layers=layers, max_position_embeddings=512, attention="sdpa")
        sizes[layers] = saved_bytes(model, (8, 256), autocast=False)
    chosen = {"method": "sft", "batch_size": 8, "micro_batch_size": 8, "max_length": 256}
    _, whole = estimate(config, settings(**chosen), num_gpus=1, strategy="ddp")
    _, fewer = estimate(config, settings(**chosen, gradient_checkpointing=True), num_gpus=1, strategy="ddp")
    assert whole.activations == sizes[1] + 5 * (sizes[2] - sizes[1])
    assert fewer.activations == sizes[1] + 6 * 8 * 256 * 32 * 4


def test_the_table_ends_in_the_sum() -> None:
    _, memory = estimate(tiny_config("llama"), settings(method="dro_v"), num_gpus=1, strategy="ddp")
    lines = memory_table(memory)
    assert lines[-1].split() == ["total", f"{memory.total / 2**30:.2f}"]
    assert memory.total == memory.weights + memory.copies + memory.gradients + memory.optimizer + (
        memory.value_network + memory.activations + memory.head
    )
    assert memory.value_network == 16 * (params(tiny_model("llama")) - 48 * 32)  # no head


@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "pmpo", "dro_v"])
def test_a_step_on_the_shrunken_copy_is_the_methods_own(method: str) -> None:
    config, _ = architecture("google/gemma-2-2b-it")
    small = shrunken(config)
    assert small.layer_types == ["sliding_attention", "full_attention"]
    assert (small.attn_logit_softcapping, small.final_logit_softcapping) == (50.0, 30.0)
    assert (small.num_attention_heads, small.num_key_value_heads) == (4, 2)
    result = one_step(small, settings(method=method, max_length=8192))
    assert result.num_steps == 1 and result.num_rows == 4 and result.metrics["grad_norm"] > 0


def test_unknown_models_are_refused() -> None:
    with pytest.raises(InputError, match=r"model \./nowhere: no such folder"):
        architecture("./nowhere")
