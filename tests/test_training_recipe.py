"""Every offline method, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mtpo.models import load_model
from mtpo.training import METHODS
from recipes import train
from tests.tiny_models import tiny_model
from tests.tiny_rows import tiny_labels, tiny_pairs, tiny_singles


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its tokenizer, and rows of every kind."""
    folder = tmp_path_factory.mktemp("start")
    tiny_model("gemma2", std=0.1).save_pretrained(folder / "model")
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(48)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0").save_pretrained(folder / "model")
    for name, rows in (("pairs", tiny_pairs(4)), ("binary", tiny_labels(2)), ("sft", tiny_singles(4))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


BASELINES = [[method, "--mask", mask] for method in ("dpo", "kto") for mask in ("none", "last_turn")]
RUNS = [[method] for method in METHODS if not METHODS[method].has_teacher] + BASELINES
RUNS += [
    ["ipo", "--normalize", "true"],
    ["dpo", "--nll_coef", "1"],
    ["dro_v", "--value_learning_rate", "1e-2"],
]
RUNS += [["pmpo", "--kl", "full"]]
RUNS += [["pmpo", "--alpha", alpha, "--beta", "2"] for alpha in ("0", "1")]


@pytest.mark.parametrize("options", RUNS, ids=["-".join(options) for options in RUNS])
def test_every_method_trains_from_the_command_line(start: Path, options: list[str], tmp_path: Path) -> None:
    argv = ["--method", *options, "--model", start / "model", "--data", start, "--out", tmp_path / "run"]
    argv += ["--learning_rate", "1e-3", "--batch_size", "4", "--epochs", "4", "--max_grad_norm", "1e9"]
    assert train.main([str(argument) for argument in argv]) == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4 and losses[-1] < losses[0]  # each step sees all rows
    trained, before = (load_model(folder / "model") for folder in (tmp_path / "run", start))
    pairs = zip(trained.parameters(), before.parameters(), strict=True)
    assert any(not torch.equal(ours, theirs) for ours, theirs in pairs)
