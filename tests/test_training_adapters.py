from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from mtpo import models
from mtpo.errors import InputError
from mtpo.models import load_config, load_model
from mtpo.training import TrainingSettings, train
from mtpo.training.adapters import check_merge, target_modules, with_adapter
from recipes import train as train_recipe
from recipes.engines import load_policy
from tests.tiny_models import Family, tiny_model
from tests.tiny_rows import tiny_labels, tiny_pairs, tiny_singles
from tests.tiny_tokenizers import make_tokenizer

pytest.importorskip("peft")

IDS = torch.arange(3, 23)[None]


def settings(method: str = "dpo", learning_rate: float = 1e-2, **options: Any) -> TrainingSettings:
    values: dict[str, Any] = {"batch_size": 4, "lora_rank": 4, **options}
    return TrainingSettings(method=method, learning_rate=learning_rate, **values)


def steps(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "model"
    tiny_model("gemma2", std=0.1, vocab_size=600).save_pretrained(folder)
    make_tokenizer("gemma").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter, trained for six steps."""
    out = tmp_path_factory.mktemp("run")
    train(load_model(start), tiny_pairs(4), settings(epochs=6), out, progress=False)
    return out


def test_the_policy_starts_at_the_model_without_adapter_and_moves_away(start: Path, run: Path) -> None:
    assert steps(run)[0]["margin"] == pytest.approx(0, abs=1e-6)
    assert steps(run)[-1]["margin"] > 0.05
    trained = load_model(run / "model")
    assert (logits(trained) - logits(load_model(start))).abs().max() > 0.01
    with trained.disable_adapter():  # pyright: ignore[reportCallIssue]
        torch.testing.assert_close(logits(trained), logits(load_model(start)), rtol=0, atol=0)


def test_an_adapter_is_small_and_says_what_it_is_for(start: Path, run: Path) -> None:
    names = {path.name for path in (run / "model").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    options = json.loads((run / "model/adapter_config.json").read_text())
    assert (options["base_model_name_or_path"], options["r"], options["lora_alpha"]) == (str(start), 4, 8)
    assert load_config(run / "model").model_type == "gemma2"


def test_training_goes_on_with_the_models_own_adapter(run: Path, tmp_path: Path) -> None:
    """Its reference is the policy as it starts, adapter included."""
    model = load_model(run / "model")
    before = logits(model)
    result = train(model, tiny_pairs(4), settings(epochs=4), tmp_path, progress=False)
    assert steps(tmp_path)[0]["margin"] == pytest.approx(0, abs=1e-6)
    assert not torch.equal(logits(model), before)
    torch.testing.assert_close(logits(load_model(result.model)), logits(model))


def test_a_merged_model_computes_what_the_adapter_does(start: Path, tmp_path: Path) -> None:
    both = []
    for merge in (False, True):
        chosen = settings(epochs=6, merge_adapter=merge, num_checkpoints=1)
        both.append(train(load_model(start), tiny_pairs(4), chosen, tmp_path / str(merge), progress=False))
    adapted, merged = (load_model(result.model) for result in both)
    assert not (both[1].model / "adapter_config.json").exists() and not hasattr(merged, "peft_config")
    torch.testing.assert_close(logits(merged), logits(adapted))
    assert (logits(merged) - logits(load_model(start))).abs().max() > 0.01


class Interrupted(Exception):
    pass


def test_an_interrupted_adapter_resumes_to_the_same_weights(start: Path, tmp_path: Path) -> None:
    chosen = settings("sft", num_checkpoints=2, epochs=3, lora_dropout=0.3, warmup_steps=2)
    straight = train(load_model(start), tiny_singles(12), chosen, tmp_path / "straight", progress=False)
    model, calls = load_model(start), 0

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise Interrupted

    model.register_forward_pre_hook(interrupt)
    with pytest.raises(Interrupted):
        train(model, tiny_singles(12), chosen, tmp_path / "killed", progress=False)
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] != []
    resumed = train(
        load_model(start), tiny_singles(12), chosen, tmp_path / "killed", resume=True, progress=False
    )
    torch.testing.assert_close(
        logits(load_model(resumed.model)), logits(load_model(straight.model)), rtol=0, atol=0
    )
    assert [step["step"] for step in steps(tmp_path / "killed")] == list(range(1, 10))


def test_a_reference_that_is_loaded_by_a_function_is_gone_when_training_starts(
    start: Path, tmp_path: Path
) -> None:
    made: list[weakref.ref[PreTrainedModel]] = []
    alive: list[bool] = []

    def load() -> PreTrainedModel:
        reference = tiny_model("gemma2", seed=1, std=0.1, vocab_size=600)
        made.append(weakref.ref(reference))
        return reference

    model = load_model(start)
    model.register_forward_pre_hook(lambda *_: alive.append(made[0]() is not None))
    train(model, tiny_pairs(4), settings(), tmp_path, reference_model=load, progress=False)
    assert alive == [False] and abs(steps(tmp_path)[0]["margin"]) > 1e-3  # it was another model


TARGETS: list[tuple[Family, list[str], list[str]]] = [
    (
        "gemma2",
        ["all-linear"],
        ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    ),
    ("llama", ["q_proj", "lm_head"], ["lm_head", "q_proj"]),
    ("qwen2", ["v_proj", "q_proj", "v_proj"], ["q_proj", "v_proj"]),
]


@pytest.mark.parametrize(("family", "targets", "expected"), TARGETS)
def test_targets_are_layers_by_name(family: Family, targets: list[str], expected: list[str]) -> None:
    assert target_modules(tiny_model(family), targets) == expected
    adapted = with_adapter(tiny_model(family), settings(lora_targets=targets))
    trained = {name.split(".")[-4] for name, p in adapted.named_parameters() if p.requires_grad}
    assert sorted(trained) == expected


def test_an_adapter_on_a_tied_head_is_trained_and_loaded(start: Path, tmp_path: Path) -> None:
    model = load_model(start)
    chosen = settings(lora_targets=["lm_head"], epochs=3)
    result = train(model, tiny_pairs(4), chosen, tmp_path, progress=False)
    assert (logits(model) - logits(load_model(start))).abs().max() > 0.01
    torch.testing.assert_close(logits(load_model(result.model)), logits(model))


def test_an_adapter_starts_from_the_seed(start: Path) -> None:
    torch.manual_seed(7)
    first, again, other = (
        {
            n: p
            for n, p in with_adapter(load_model(start), settings(seed=seed)).named_parameters()
            if "lora_A" in n
        }
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(p, again[name]) for name, p in first.items())
    assert not any(torch.equal(p, other[name]) for name, p in first.items())


BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"lora_rank": None, "merge_adapter": True}, "merge_adapter has no effect without lora_rank"),
    ({"lora_rank": None, "lora_targets": ["q_proj"]}, "lora_targets has no effect without lora_rank"),
    ({"lora_rank": 0}, "lora_rank 0"),
    ({"lora_alpha": 0.0}, r"lora_alpha 0\.0"),
    ({"lora_dropout": 0.1}, "method 'dpo' compares policy and reference"),
    ({"method": "sft", "lora_dropout": 1.0}, r"lora_dropout is 1\.0"),
]


@pytest.mark.parametrize(("options", "message"), BAD_SETTINGS)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings(**options)


BAD_RUNS: list[tuple[Callable[[], PreTrainedModel], dict[str, Any], str]] = [
    (lambda: tiny_model("llama"), {"lora_targets": ["query"]}, "no linear layer 'query'; it has down_proj, "),
    (
        lambda: tiny_model("gemma2"),
        {"lora_targets": ["all-linear", "lm_head"], "merge_adapter": True},
        "would change the input embeddings",
    ),
]


@pytest.mark.parametrize(("model", "options", "message"), BAD_RUNS)
def test_bad_runs_are_refused(
    model: Callable[[], PreTrainedModel], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        train(model(), tiny_pairs(4), settings(**options), tmp_path, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": None}, "adapter of rank 4: set lora_rank 4"),
        ({"lora_rank": 8}, "lora_rank is 8, but .* has 4"),
        ({"lora_alpha": 4.0}, "lora_alpha is 4.0, but .* has 8"),
    ],
)
def test_an_adapter_is_not_trained_on_under_other_options(
    run: Path, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        train(load_model(run / "model"), tiny_pairs(4), settings(**options), tmp_path, progress=False)


def test_an_adapter_without_its_model_is_one_line(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    folder.mkdir()
    options = json.loads((run / "model/adapter_config.json").read_text())
    for base, message in (("/nowhere/model", "/nowhere/model: no such folder"), (None, "names no model")):
        (folder / "adapter_config.json").write_text(json.dumps(options | {"base_model_name_or_path": base}))
        with pytest.raises(InputError, match=message):
            load_model(folder)


QLORA = ["--load_in_4bit", "--lora_rank", "4"]


def dpo_command(start: Path, folder: Path) -> list[Any]:
    """Flags of recipes.train for four pairs, which it writes into the folder."""
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_pairs(4)))
    places = ["--model", start, "--data", folder / "pairs.jsonl", "--out", folder / "run"]
    return ["--method", "dpo", *places]


@pytest.mark.parametrize(
    ("options", "has_cuda", "package", "message"),
    [
        (["--load_in_4bit"], True, object(), "--load_in_4bit needs --lora_rank"),
        (QLORA, False, object(), "4-bit weights need a CUDA device and bitsandbytes"),
        (QLORA, True, None, "4-bit weights need a CUDA device and bitsandbytes"),
    ],
)
def test_4_bits_are_refused_in_one_line_where_they_cannot_be(
    start: Path, options: list[str], has_cuda: bool, package: Any, message: str, capsys: Any, monkeypatch: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(models, "find_spec", lambda name: package)
    argv = dpo_command(start, tmp_path)
    assert train_recipe.main([str(a) for a in [*argv, "--learning_rate", "1e-2", *options]]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_4_bits_are_asked_of_transformers_as_qlora_has_them(start: Path, monkeypatch: Any) -> None:
    """What is asked of a GPU that is not here: NF4, quantised scales, the model whole on this process's device."""
    asked: dict[str, Any] = {}

    def from_pretrained(name: str, **options: Any) -> Any:
        asked.update(options)
        return tiny_model("gemma2"), {"missing_keys": []}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(models, "find_spec", lambda name: object())
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    load_model(start, dtype="bfloat16", in_4bit=True)
    config = asked["quantization_config"]
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (
        True,
        "nf4",
        True,
    )
    assert config.bnb_4bit_compute_dtype == torch.bfloat16 and asked["device_map"] == {"": 3}


QUANTISED: list[tuple[dict[str, Any], str]] = [
    ({"lora_rank": None}, "a quantised model cannot be trained itself"),
    ({"merge_adapter": True}, "merge_adapter would round the adapter to 4 bits"),
]


def test_a_quantised_value_network_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.is_quantized = True  # pyright: ignore
    with pytest.raises(InputError, match="dro_v trains a copy of the model as its value network"):
        train(model, tiny_labels(4), settings("dro_v"), tmp_path, progress=False)


@pytest.mark.parametrize(("options", "message"), QUANTISED)
def test_what_a_quantised_model_cannot_do_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    model.is_quantized = True  # pyright: ignore
    with pytest.raises(InputError, match=message):
        if settings(**options).lora_rank is None:
            with_adapter(model, settings(**options))
        else:
            check_merge(with_adapter(model, settings(**options)), is_sharded=False)


def test_an_adapter_trains_from_the_command_line_and_can_be_sampled_from(start: Path, tmp_path: Path) -> None:
    argv = dpo_command(start, tmp_path)
    argv += ["--learning_rate", "1e-2", "--batch_size", "4", "--epochs", "3", "--lora_rank", "2"]
    argv += ["--lora_targets", "all-linear", "lm_head"]
    assert train_recipe.main([str(argument) for argument in argv]) == 0
    policy, chat = load_policy(tmp_path / "run/model")
    assert (logits(policy) - logits(load_model(start))).abs().max() > 0.01
    assert chat.family == "gemma"
