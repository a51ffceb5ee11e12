from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from mtpo.models import load_model
from mtpo.training import TrainingSettings, train
from tests.process_pair import leave_together
from tests.tiny_models import tiny_model
from tests.tiny_rows import tiny_labels, tiny_pairs, tiny_singles

ROWS = {"sft": tiny_singles, "dpo": tiny_pairs, "kto": tiny_labels, "pmpo": tiny_labels, "dro_v": tiny_labels}


def _settings(method: str) -> TrainingSettings:
    return TrainingSettings(method=method, learning_rate=1e-2, batch_size=4, epochs=2, max_grad_norm=1e9)


def _worker(rank: int, port: int, method: str, out: str) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in environment.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    train(tiny_model("gemma2", std=0.1), ROWS[method](4), _settings(method), out, progress=False)
    leave_together(out, rank)


@pytest.mark.parametrize("method", list(ROWS))
def test_two_processes_train_to_the_weights_of_one(method: str, tmp_path: Path) -> None:
    """Global counts, KTO's baseline, shared reference pass, and metrics over all processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (port, method, str(tmp_path / "two"))
    mp.start_processes(_worker, arguments, nprocs=2, start_method="spawn")  # pyright: ignore
    train(tiny_model("gemma2", std=0.1), ROWS[method](4), _settings(method), tmp_path / "one", progress=False)
    one, two = load_model(tmp_path / "one" / "model"), load_model(tmp_path / "two" / "model")
    for expected, actual in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    one_steps, two_steps = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one_steps) == len(two_steps) >= 2
    for expected, actual in zip(one_steps[1:], two_steps[1:], strict=True):  # at step 1 margins are 0 or 1e-7
        assert actual | {"tokens_per_s": 0} == pytest.approx(
            expected | {"tokens_per_s": 0}, rel=1e-3, abs=1e-4
        )
