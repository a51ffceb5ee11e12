from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from mtpo.batches import SingleCollator
from mtpo.errors import InputError
from mtpo.training import TrainingSettings, train
from mtpo.training.value import ValueNetwork, ValueTraining, prompt_ends, standardized_reward
from tests.tiny_models import tiny_model
from tests.tiny_rows import tiny_labels


def settings(learning_rate: float = 1e-3, **options: Any) -> TrainingSettings:
    return TrainingSettings(
        method="dro_v", learning_rate=learning_rate, **{"batch_size": 4, "max_grad_norm": 1e9} | options
    )


@torch.no_grad()
def rho(policy: Any, reference: Any, row: dict[str, Any]) -> float:
    ids, mask = torch.tensor([row["input_ids"]]), torch.tensor(row["completion_mask"][1:])
    each = [
        m(input_ids=ids).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
        for m in (policy, reference)
    ]
    return ((each[0] - each[1]) * mask).sum().item()


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_loss_of_the_first_step_by_hand(tau: float, tmp_path: Path) -> None:
    """Three of five are desirable: mean 0.6, standard deviation sqrt(0.24). V starts at 0."""
    policy, reference = tiny_model("llama", std=0.1), tiny_model("llama", std=0.1, seed=1)
    rows = tiny_labels(3)[:5]
    residuals = [(row["label"] - 0.6) / math.sqrt(0.24) - tau * rho(policy, reference, row) for row in rows]
    squares = sum(r**2 for r in residuals) / 5
    chosen = settings(1e-30, batch_size=5, micro_batch_size=1, tau=tau)
    result = train(policy, rows, chosen, tmp_path, reference_model=reference, progress=False)
    assert result.metrics["loss"] == pytest.approx(squares / (2 * tau) + squares / 2, rel=1e-4)
    assert result.metrics["loss/value"] == pytest.approx(squares / 2, rel=1e-4)
    assert result.metrics["residual"] == pytest.approx(sum(residuals) / 5, rel=1e-4)


def test_values_are_read_at_the_last_prompt_token() -> None:
    """Neither padding, nor what follows the prompt, nor another row's longer prompt matters."""
    model = tiny_model("gemma2", std=0.3)
    network = ValueNetwork(model)
    with torch.no_grad():
        network.head.weight.normal_()
        network.head.bias.fill_(0.5)
    rows = [
        {"input_ids": [2, 7, 9, 11, 12], "completion_mask": [0, 0, 0, 1, 1]},
        {"input_ids": [2, 8, 13], "completion_mask": [0, 0, 1]},
    ]
    batch = SingleCollator(pad_id=0)(rows)
    expected = []
    for prompt in ([2, 7, 9], [2, 8]):
        hidden = model.base_model(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1]
        expected.append((network.head.weight[0] @ hidden).item() + 0.5)
    found = network(batch["input_ids"], prompt_ends(batch["completion_mask"])).squeeze(-1)
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_the_value_network_learns_what_a_prompt_promises(tmp_path: Path) -> None:
    """One prompt's rows are desirable, another's are not: that is in V, and the policy need not move."""
    rows = [row | {"label": row["problem_id"] == "tiny/0"} for row in tiny_labels(2)]
    model = tiny_model("gemma2", std=0.1)
    chosen = settings(1e-9, value_learning_rate=1e-2, epochs=40)
    result = train(model, rows, chosen, tmp_path, progress=False)
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps[0]["loss/value"] == pytest.approx(0.5)  # V = 0, rewards are +1 and -1
    assert result.metrics["loss/value"] < 0.05
    assert result.metrics["loss/policy"] < 0.05
    assert steps[0]["explained_variance"] == pytest.approx(0)
    assert result.metrics["explained_variance"] > 0.9


def test_each_step_of_the_value_network_is_one_of_adamw_on_the_clipped_gradient() -> None:
    chosen = settings(1e-2, value_learning_rate=4e-2, lr_schedule="linear", max_grad_norm=0.1)
    ours, plain = (ValueNetwork(tiny_model("llama", std=0.1)) for _ in range(2))
    training = ValueTraining(ours, standardized_reward(tiny_labels(2)), chosen, num_steps=4)
    optimizer = torch.optim.AdamW(plain.parameters(), weight_decay=0.0)
    batch = SingleCollator(pad_id=0)(tiny_labels(2))
    ids, places = batch["input_ids"], prompt_ends(batch["completion_mask"])
    for target, learning_rate in ((1.0, 4e-2), (-3.0, 4e-2 * 2 / 3), (0.5, 4e-2 / 3)):
        (ours(ids, places) - target).square().mean().backward()
        training.on_pre_optimizer_step(TrainingArguments(), TrainerState(), TrainerControl())
        optimizer.zero_grad()
        (plain(ids, places) - target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.step()
        torch.testing.assert_close(ours(ids, places), plain(ids, places), rtol=1e-4, atol=1e-6)


def test_the_value_learning_rate_is_five_times_the_policys_unless_given(tmp_path: Path) -> None:
    losses = {}
    for name, rate in (("default", None), ("same", 5e-3), ("other", 5e-4)):
        chosen = settings(1e-3, value_learning_rate=rate, epochs=3)
        train(tiny_model("llama", std=0.1), tiny_labels(2), chosen, tmp_path / name, progress=False)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = json.loads(lines[-1])["loss"]
    assert losses["default"] == losses["same"] != pytest.approx(losses["other"], rel=1e-3)


def test_a_resumed_run_goes_on_with_its_value_network(tmp_path: Path) -> None:
    chosen = settings(1e-2, num_checkpoints=1, epochs=8)
    straight = tiny_model("llama", std=0.1)
    train(straight, tiny_labels(2), chosen, tmp_path, progress=False)
    resumed = tiny_model("llama", std=0.1)
    train(resumed, tiny_labels(2), chosen, tmp_path, resume=True, progress=False)
    for expected, actual in zip(straight.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


def test_rows_of_one_label_are_refused(tmp_path: Path) -> None:
    rows = [row for row in tiny_labels(4) if row["label"]]
    with pytest.raises(InputError, match="all 4 have the same label"):
        train(tiny_model("llama"), rows, settings(), tmp_path, progress=False)
    assert not (tmp_path / "reference").exists()  # found before the long pass over the reference
