from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from mtpo.errors import InputError
from mtpo.logprobs import action_logps
from mtpo.models import load_model
from mtpo.training import TrainingSettings, train
from tests.tiny_models import tiny_model
from tests.tiny_rows import tiny_pairs

PAPER = 4e-7
"""The learning rate of M-DPO for Gemma 1.1."""


def settings(learning_rate: float = PAPER, **options: Any) -> TrainingSettings:
    values: dict[str, Any] = {"method": "dpo", "batch_size": 4, "dtype": "bfloat16", **options}
    return TrainingSettings(learning_rate=learning_rate, lr_schedule="constant", **values)


def moved_share(before: PreTrainedModel, after: PreTrainedModel) -> float:
    """Of the weights in matrices."""
    pairs = [(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True) if p.ndim == 2]
    return sum((p != q).sum().item() for p, q in pairs) / sum(p.numel() for p, _ in pairs)


def start() -> PreTrainedModel:
    """Weights that bfloat16 can hold, in float32."""
    return tiny_model("gemma2", std=0.1, dtype=torch.bfloat16).float()  # pyright: ignore[reportReturnType]


def steps(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_small_steps_move_float32_weights_and_are_lost_on_bfloat16_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """AdamW's first steps change a weight by the learning rate: 4e-7 of weights near 0.1, whose half ulp is 1e-4."""
    moved, warnings = {}, {}
    for pure in (False, True):
        model, before = start(), start()
        with caplog.at_level(logging.WARNING, "mtpo.training.precision"):
            caplog.clear()
            train(model, tiny_pairs(12), settings(pure_bfloat16=pure), tmp_path / str(pure), progress=False)
        moved[pure], warnings[pure] = moved_share(before, model), caplog.messages
        assert next(model.parameters()).dtype == (torch.bfloat16 if pure else torch.float32)
    assert moved[False] > 0.9 and moved[True] < 0.05
    assert warnings[False] == [] and len(warnings[True]) == 1
    assert "step 1 left 9" in warnings[True][0] or "step 1 left 100" in warnings[True][0]


def test_large_steps_on_bfloat16_weights_are_not_complained_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(start(), tiny_pairs(8), settings(1e-2, pure_bfloat16=True), tmp_path, progress=False)
    assert not [record for record in caplog.records if record.name == "mtpo.training.precision"]


def test_computing_in_bfloat16_rounds_and_keeps_what_was_learned(tmp_path: Path) -> None:
    finals = {}
    for dtype in ("float32", "bfloat16"):
        chosen = settings(1e-3, dtype=dtype, epochs=6)
        result = train(start(), tiny_pairs(4), chosen, tmp_path / dtype, progress=False)
        finals[dtype] = result.metrics["margin"]
    assert finals["bfloat16"] != finals["float32"]
    assert finals["bfloat16"] == pytest.approx(finals["float32"], rel=0.1)
    saved = load_model(tmp_path / "bfloat16/model")
    rounded = copy.deepcopy(saved).to(torch.bfloat16).float()  # pyright: ignore[reportArgumentType]
    assert moved_share(rounded, saved) > 0.9


def test_policy_and_reference_are_computed_alike(tmp_path: Path) -> None:
    """The same padded batch gives the same log-probs, and what another arithmetic cached is not taken."""
    for dtype in ("float32", "bfloat16"):
        train(start(), tiny_pairs(1), settings(dtype=dtype, batch_size=1), tmp_path, progress=False)
        assert abs(steps(tmp_path)[0]["margin"]) < (1e-6 if dtype == "float32" else 0.05)
        assert len(steps(tmp_path)) == 1
    caches = sorted(path.name.split("-", 1)[1] for path in (tmp_path / "reference").iterdir())
    assert caches == ["float32-bfloat16-tokens-0.jsonl", "float32-tokens-0.jsonl"]


def test_the_head_multiplies_by_what_autocast_would_and_sums_in_float32() -> None:
    model = tiny_model("gemma2", std=0.1)
    ids, mask = torch.arange(3, 13)[None], torch.tensor([[0, 0, *[1] * 8]])
    with torch.autocast("cpu", torch.bfloat16):
        logps = action_logps(model, ids, mask)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # pyright: ignore
    head = model.get_output_embeddings().weight  # pyright: ignore
    by_hand = {}
    for name, weight in (("rounded", head.bfloat16().float()), ("exact", head)):
        logits = 30 * torch.tanh(hidden.float() @ weight.T / 30)  # pyright: ignore
        of_ids = logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
        by_hand[name] = of_ids[1:]
    torch.testing.assert_close(logps[0, 2:], by_hand["rounded"], rtol=1e-5, atol=1e-5)
    assert (logps[0, 2:] - by_hand["exact"]).abs().max() > 1e-4
    logps.sum().backward()
    assert head.grad is not None and head.grad.dtype == torch.float32  # pyright: ignore


def test_an_adapter_on_a_bfloat16_model_is_float32(tmp_path: Path) -> None:
    model = tiny_model("gemma2", std=0.1, dtype=torch.bfloat16)
    frozen = copy.deepcopy(model)
    train(model, tiny_pairs(4), settings(lora_rank=2, epochs=2), tmp_path, progress=False)
    kinds = {name.split(".")[-2]: p.dtype for name, p in model.named_parameters()}
    assert kinds["embed_tokens"] == torch.bfloat16
    assert kinds["default"] == torch.float32  # of lora_A.default.weight
    assert torch.equal(model.get_input_embeddings().weight, frozen.get_input_embeddings().weight)  # pyright: ignore


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float32", "pure_bfloat16": True}, "pure_bfloat16 has no effect with dtype float32"),
        ({"dtype": "float16"}, "dtype is 'float16'; expected one of float32, bfloat16, float64"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings(**options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "float32"),
        ({"lora_rank": 2}, "bfloat16"),
        ({"pure_bfloat16": True}, "bfloat16"),
        ({"dtype": "float32"}, "float32"),
        ({"dtype": "float32", "lora_rank": 2}, "float32"),
    ],
)
def test_weights_are_loaded_in_bfloat16_where_they_stay_as_they_are(
    options: dict[str, Any], expected: str
) -> None:
    assert settings(**options).weights_dtype == expected
