"""The shipped configs of accelerate, as a user launches them, on two CPU processes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mtpo.models import load_model
from recipes import train
from tests.child_processes import CONFIGS, launcher_environment
from tests.tiny_models import tiny_model
from tests.tiny_rows import tiny_pairs, tiny_singles
from tests.tiny_tokenizers import make_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights for token 47 are not finite, a sound one, and rows for both."""
    folder = tmp_path_factory.mktemp("start")
    model = tiny_model("llama", std=0.1, vocab_size=300)
    make_tokenizer("qwen2_5").save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    with torch.no_grad():
        model.get_input_embeddings().weight[47] = torch.nan  # pyright: ignore
    make_tokenizer("qwen2_5").save_pretrained(folder / "broken")
    model.save_pretrained(folder / "broken")
    rows = [row for row in tiny_singles(40) if 47 not in row["input_ids"]][:3]
    rows.append(next(row for row in tiny_singles(40) if 47 in row["input_ids"]))
    for name, some in (("pairs", tiny_pairs(5)), ("sft", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


def options(start: Path, out: Path, *more: str, model: str = "model") -> list[str]:
    options = ["--model", start / model, "--data", start, "--out", out, "--learning_rate", "1e-2", *more]
    return [*map(str, options), "--batch_size", "4", "--max_grad_norm", "1e9"]


def launch(config: str, argv: list[str]) -> Any:
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        CONFIGS / f"{config}.yaml",
    ]
    command += ["--num_processes", "2", "--main_process_port", "0", "-m", "recipes.train", *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_the_fsdp2_config_trains_sharded_to_the_model_of_one_process(start: Path, tmp_path: Path) -> None:
    """That the weights are DTensors is checked by the run itself."""
    ended = launch("fsdp2", options(start, tmp_path / "two", "--method", "dpo"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("2 steps on 5 rows") == 1
    assert train.main(options(start, tmp_path / "one", "--method", "dpo")) == 0
    one, two = (load_model(tmp_path / name / "model") for name in ("one", "two"))
    for expected, actual in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    steps = [json.loads(line)["step"] for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


@pytest.mark.slow
def test_a_failure_of_one_process_ends_all_and_is_told_once(start: Path, tmp_path: Path) -> None:
    """The other one is in the middle of a step then, waiting for its gradients."""
    ended = launch("ddp", options(start, tmp_path / "run", "--method", "sft", model="broken"))
    assert ended.returncode != 0
    assert ended.stderr.count("error: log-probs are not finite on tiny/") == 1, ended.stderr
    assert "]: Traceback" not in ended.stderr  # after [rank0, as torch marks what a process of a group writes


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("ddp", {"ACCELERATE_MIXED_PRECISION": "no"}),
        (
            "fsdp2",
            {
                "ACCELERATE_USE_FSDP": "true",
                "ACCELERATE_MIXED_PRECISION": "no",
                "FSDP_VERSION": "2",
                "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
                "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
                "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
                "FSDP_OFFLOAD_PARAMS": "false",
            },
        ),
        (
            "zero3",
            {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_MIXED_PRECISION": "no",
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
                "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
            },
        ),
    ],
)
def test_accelerate_reads_every_key_of_a_config(config: str, expected: dict[str, str]) -> None:
    environment = launcher_environment(config)
    assert {name: environment[name] for name in expected} == expected
    assert (config == "fsdp2") == ("ACCELERATE_USE_FSDP" in environment)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed_accepts_the_zero3_config(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils import DeepSpeedPlugin

    for name, value in launcher_environment("zero3").items():
        monkeypatch.setenv(name, value)
    config = DeepSpeedPlugin().deepspeed_config
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert config["gradient_accumulation_steps"] == config["gradient_clipping"] == "auto"


def test_every_config_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {"ddp", "fsdp2", "zero3"}
    for path in CONFIGS.glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["num_processes"] == 8
