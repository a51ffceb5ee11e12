"""The training of an iteration: the same run, whoever starts it."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtpo.cli import parse_config
from mtpo.errors import InputError, MtpoError
from mtpo.models import load_model
from mtpo.runs import read_json, write_jsonl
from mtpo.training import TrainingSettings
from recipes import train
from recipes.training_stage import launch_command, run_stage, training_stage, write_stage
from tests.tiny_models import tiny_model
from tests.tiny_rows import tiny_pairs
from tests.tiny_tokenizers import make_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    make_tokenizer("qwen2_5").save_pretrained(folder)
    tiny_model("llama", std=0.1, vocab_size=300).save_pretrained(folder)
    return folder


def stage(folder: Path, policy: Path, **options: Any) -> train.Config:
    """Two steps of DPO with a checkpoint between them, on five pairs."""
    values: dict[str, Any] = {"method": "dpo", "learning_rate": 1e-2, "batch_size": 4, "num_checkpoints": 1}
    write_jsonl(folder / "labels" / "pairs.jsonl", tiny_pairs(5))
    return training_stage(folder, str(policy), str(policy), TrainingSettings(**values | options), None)


def assert_equal_models(one: Path, two: Path, *, rtol: float, atol: float) -> None:
    for expected, actual in zip(load_model(one).parameters(), load_model(two).parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def test_a_launched_stage_makes_what_one_in_this_process_makes(
    policy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here, apart = stage(tmp_path / "here", policy), stage(tmp_path / "apart", policy)
    run_stage(here, None)
    with caplog.at_level(logging.INFO):
        run_stage(apart, sys.executable)
    assert "-m recipes.train --config" in caplog.text
    for name in ("checkpoint-1", "model"):
        assert_equal_models(Path(here.out) / name, Path(apart.out) / name, rtol=0, atol=0)
    assert {p.name for p in Path(here.out).iterdir()} == {p.name for p in Path(apart.out).iterdir()}
    assert read_json(Path(apart.out) / "summary.json")["steps"] == 2


@pytest.mark.slow
def test_two_processes_of_torchrun_make_it_too(policy: Path, tmp_path: Path) -> None:
    here, apart = stage(tmp_path / "here", policy), stage(tmp_path / "apart", policy)
    run_stage(here, None)
    run_stage(apart, "torchrun --standalone --nproc_per_node 2")
    assert_equal_models(Path(here.out) / "model", Path(apart.out) / "model", rtol=1e-3, atol=1e-4)


def test_the_file_of_a_stage_is_read_back_as_the_stage(policy: Path, tmp_path: Path) -> None:
    asked = dataclasses.replace(
        stage(tmp_path, policy, learning_rate=2e-7, lora_rank=4, lora_targets=["q_proj"], nll_coef=0.0),
        reference="the/first",
        attention="eager",
    )
    assert parse_config(train.Config, "recipes.train", ["--config", str(write_stage(asked))]) == asked


def test_a_stage_names_its_reference_only_where_it_is_another_model(tmp_path: Path) -> None:
    pairs = TrainingSettings(method="dpo", learning_rate=1e-3)
    assert training_stage(tmp_path, "now", "first", pairs, None).reference == "first"
    assert training_stage(tmp_path, "now", "now", pairs, None).reference is None
    correct = TrainingSettings(method="raft", learning_rate=1e-3)
    assert training_stage(tmp_path, "now", "first", correct, None).reference is None


def test_a_failure_is_one_line_and_what_is_done_is_not_started(policy: Path, tmp_path: Path) -> None:
    asked = stage(tmp_path, policy)
    with pytest.raises(MtpoError, match=r"exit status 1, see above: false -m recipes\.train --config .*yaml"):
        run_stage(asked, "false")
    (tmp_path / "train" / "model").mkdir(parents=True)
    run_stage(asked, "false")


def test_a_killed_loop_leaves_no_training_behind(policy: Path, tmp_path: Path) -> None:
    """Or the run that goes on would write the same files as the one before."""
    launcher = tmp_path / "launcher.sh"
    launcher.write_text('#!/bin/sh\necho $$ > "$0.pid"\nexec sleep 600\n')
    launcher.chmod(0o755)
    asked = stage(tmp_path, policy)
    code = (
        "from recipes import train, training_stage; from mtpo.cli import parse_config; "
        f"asked = parse_config(train.Config, 'recipes.train', ['--config', {str(write_stage(asked))!r}]); "
        f"training_stage.run_stage(asked, {str(launcher)!r})"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as loop:
        started = tmp_path / "launcher.sh.pid"
        wait_for(lambda: started.exists() and started.read_text().endswith("\n"))
        launched = int(started.read_text())
        assert is_alive(launched)
        loop.kill()
    wait_for(lambda: not is_alive(launched))


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("launcher", ["no-such-launcher --x", "", "torchrun 'half"])
def test_a_launcher_that_is_none_is_refused(launcher: str) -> None:
    with pytest.raises(InputError, match="--launcher"):
        launch_command(launcher)


def test_a_launcher_beside_this_python_needs_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    python = Path(sys.executable)
    assert launch_command(f"{python.name} -I 'a b'") == [str(python), "-I", "a b"]
