from __future__ import annotations

import copy
import json
import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from mtpo.errors import InputError
from mtpo.training import METHODS, TrainingSettings
from mtpo.training.callbacks import MetricsFile
from mtpo.training.metrics import CollapseMonitor, StepMetrics
from mtpo.training.mismatch import mismatched_partners, with_mismatched
from mtpo.training.optim import JointOptimizer, lr_factor, make_optimizer
from mtpo.training.reference import reference_logps
from mtpo.training.run import checkpoint_steps, training_order
from tests.tiny_models import tiny_model
from tests.tiny_rows import tiny_labels


def settings(method: str = "sft", **options: Any) -> TrainingSettings:
    return TrainingSettings(method=method, **{"learning_rate": 1e-3, **options})


BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"method": "dpo", "lambda_pos": 1.0}, "lambda_pos has no effect on method 'dpo', which uses beta"),
    ({"method": "dpo", "tau": 0.1}, "tau has no effect"),
    ({"method": "sft", "beta": 0.1}, "beta has no effect on method 'sft', which uses none of these options"),
    ({"method": "kto", "label_smoothing": 0.1}, "label_smoothing has no effect"),
    ({"method": "ipo", "beta": 0.1}, "beta has no effect on method 'ipo', which uses tau"),
    ({"method": "raft", "nll_coef": 1.0}, "nll_coef has no effect"),
    ({"method": "dpo", "value_learning_rate": 1.0}, "value_learning_rate has no effect on method 'dpo'"),
    ({"method": "dro_v", "value_learning_rate": 0.0}, "value_learning_rate is 0.0, expected a positive"),
    ({"method": "ppo"}, "method is 'ppo'; expected one of sft, raft, dpo"),
    ({"method": "dpo", "beta": 0.0}, "beta is 0.0"),
    ({"method": "dpo", "beta": math.nan}, "beta is nan"),
    ({"method": "pmpo", "alpha": 1.5}, "alpha is 1.5, expected a number from 0 to 1"),
    ({"method": "kto", "alpha": 0.5}, "alpha has no effect on method 'kto'"),
    ({"method": "cdpo", "label_smoothing": 0.6}, "label_smoothing is 0.6, expected a number from 0 to 0.5"),
    ({"mask": "turns"}, "mask is 'turns'; expected one of action, none"),
    ({"optimizer": "sgd"}, "optimizer is 'sgd'"),
    ({"lr_schedule": "step"}, "lr_schedule is 'step'"),
    ({"lr_schedule": "constant", "final_lr_ratio": 0.1}, "final_lr_ratio has no effect"),
    ({"final_lr_ratio": 1.5}, "final_lr_ratio is 1.5"),
    ({"adam_beta2": 1.0}, "adam_beta2 is 1.0, expected at least 0 and less than 1"),
    ({"learning_rate": 0.0}, "learning_rate is 0.0"),
    ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
    ({"epochs": 0}, "epochs is 0"),
    ({"warmup_steps": -1}, "warmup_steps is -1, expected at least 0"),
]


@pytest.mark.parametrize(("options", "message"), BAD_SETTINGS)
def test_settings_refuse_what_is_wrong_or_without_effect(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        settings(**options)
    assert message in str(caught.value)


def test_every_method_runs_on_its_defaults() -> None:
    of_pairs = {"label_smoothing": 0.0, "nll_coef": 0.0, "normalize": False}
    assert settings("dpo").options == {"beta": 0.1} | of_pairs
    assert settings("ipo", normalize=True).options == {"tau": 0.1} | of_pairs | {"normalize": True}
    assert settings("cdpo").options["label_smoothing"] == 0.1
    assert settings("kto", lambda_neg=2.0).options == {"beta": 0.1, "lambda_pos": 1.0, "lambda_neg": 2.0}
    assert {name for name, method in METHODS.items() if not method.needs_reference} == {
        *("sft", "raft"),
        *("kd", "gkd"),  # they have a teacher
    }


@given(st.lists(st.integers(0, 6), min_size=2, max_size=40), st.integers(0, 3))
def test_no_row_keeps_its_own_prompt(prompts: list[int], seed: int) -> None:
    """Also where all rows of a prompt stand side by side; refused only where it cannot be done."""
    if 2 * max(Counter(prompts).values()) > len(prompts):
        with pytest.raises(InputError, match="at most half may"):
            mismatched_partners(prompts, seed)
        return
    partners = mismatched_partners(prompts, seed)
    assert sorted(partners) == list(range(len(prompts)))
    assert all(prompts[row] != prompts[partner] for row, partner in enumerate(partners))


def test_partners_depend_on_the_seed() -> None:
    prompts = [row // 4 for row in range(24)]
    assert mismatched_partners(prompts, 0) == mismatched_partners(prompts, 0)
    assert mismatched_partners(prompts, 0) != mismatched_partners(prompts, 1)


def test_a_mismatched_row_is_one_prompt_and_anothers_turns() -> None:
    rows = tiny_labels(2)
    for row in with_mismatched(rows, seed=0):
        joined = row["mismatched"]
        assert joined["input_ids"][:3] == row["input_ids"][:3]
        turns = joined["input_ids"][3:], joined["completion_mask"][3:]
        others = [r for r in rows if r["problem_id"] != row["problem_id"]]
        assert turns in [(r["input_ids"][3:], r["completion_mask"][3:]) for r in others]
        assert joined["completion_mask"][:3] == [0, 0, 0]


def test_schedules_by_hand() -> None:
    cosine = lr_factor("cosine", num_steps=9, warmup_steps=4, final_ratio=0.2)
    assert [cosine(step) for step in range(9)] == pytest.approx(
        [
            0.25,
            0.5,
            0.75,
            1.0,
            1.0,
            0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2,
            0.6,
            0.2 + 0.8 * (1 - math.sqrt(0.5)) / 2,
            0.2,
        ]
    )
    linear = lr_factor("linear", num_steps=5, warmup_steps=0, final_ratio=0.0)
    assert [linear(step) for step in range(5)] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    constant = lr_factor("constant", num_steps=3, warmup_steps=2, final_ratio=0.0)
    assert [constant(step) for step in range(3)] == [0.5, 1.0, 1.0]
    assert lr_factor("cosine", num_steps=1, warmup_steps=0, final_ratio=0.0)(0) == 1.0


def test_muon_takes_hidden_matrices_and_adamw_the_rest() -> None:
    model = tiny_model("gemma2", tie_word_embeddings=False)
    optimizer = make_optimizer(model, settings(optimizer="muon", weight_decay=0.1, adam_beta1=0.8))
    assert isinstance(optimizer, JointOptimizer)
    muon, adamw = ({id(p) for g in part.param_groups for p in g["params"]} for part in optimizer.parts)
    for name, parameter in model.named_parameters():
        is_hidden = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        assert (id(parameter) in muon, id(parameter) in adamw) == (is_hidden, not is_hidden), name
    assert optimizer.parts[1].defaults["betas"] == (0.8, 0.999)
    norms = [g for g in optimizer.param_groups if any(p.ndim < 2 for p in g["params"])]
    assert [g["weight_decay"] for g in norms] == [0.0]


def _loss(model: nn.Module) -> torch.Tensor:
    return sum((p.square().sum() for p in model.parameters()), torch.zeros(()))


def test_joint_optimizer_restores_both_halves_and_obeys_its_learning_rate() -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        _loss(model).backward()
        optimizer.step()

    first = tiny_model("llama", std=0.1)
    optimizer = make_optimizer(first, settings(optimizer="muon"))
    step(first, optimizer)
    second = tiny_model("llama", std=0.1)
    second.load_state_dict(first.state_dict())
    restored = make_optimizer(second, settings(optimizer="muon"))
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(first, optimizer)
    step(second, restored)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    for group in restored.param_groups:
        group["lr"] = 0.0
    step(second, restored)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_order_draws_every_row_once_an_epoch() -> None:
    lengths = [(37 * i) % 100 for i in range(203)]
    for method in ("sft", "dpo"):
        order = training_order(lengths, settings(method, batch_size=8, epochs=2, seed=1))
        assert Counter(order) == dict.fromkeys(range(203), 2)
        assert order == training_order(lengths, settings(method, batch_size=8, epochs=2, seed=1))
        assert order != training_order(lengths, settings(method, batch_size=8, epochs=2, seed=2))
    pairs = training_order(lengths, settings("dpo", batch_size=8, epochs=2))
    assert set(pairs[:203]) == set(range(203))


def test_length_decides_the_order_within_a_batch_and_never_which_rows_make_one() -> None:
    lengths = [(37 * i) % 100 for i in range(400)]
    order = training_order(lengths, settings(batch_size=8))
    unsorted = training_order(lengths, settings("dpo", batch_size=8))
    for start in range(0, 400, 8):
        batch = order[start : start + 8]
        assert set(batch) == set(unsorted[start : start + 8])
        assert [lengths[i] for i in batch] == sorted(lengths[i] for i in batch)


def test_checkpoints_cut_the_run_into_equal_parts() -> None:
    assert checkpoint_steps(100, 3) == [25, 50, 75]
    assert checkpoint_steps(3, 5) == [1, 2]
    assert checkpoint_steps(10, 0) == []


TRAJECTORIES = [(row["input_ids"], row["completion_mask"]) for row in tiny_labels(3)]


def test_reference_logps_equal_those_of_full_logits(tmp_path: Path) -> None:
    model = tiny_model("gemma2", std=0.3)
    found = reference_logps(model, TRAJECTORIES, tmp_path, batch_size=4, progress=False)
    expected = []
    for ids, mask in TRAJECTORIES:
        logps = model(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        expected.append([logps[t, ids[t + 1]].item() for t in range(len(ids) - 1) if mask[t + 1]])
    for ours, by_hand in zip(sorted(v.tolist() for v in found.values()), sorted(expected), strict=True):
        assert ours == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_logps_come_back_from_disk_as_they_were_computed(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_model("gemma2", std=0.3).to(dtype)  # pyright: ignore[reportArgumentType]
    computed = reference_logps(model, TRAJECTORIES, tmp_path, batch_size=4, progress=False)
    read = reference_logps(model, TRAJECTORIES, tmp_path, batch_size=4, progress=False)
    assert read.keys() == computed.keys()
    assert all(read[key].dtype == dtype and torch.equal(read[key], computed[key]) for key in read)
    only_one = reference_logps(model, TRAJECTORIES[:1], tmp_path, batch_size=4, progress=False)
    assert len(only_one) == 1  # what nobody asks for takes no memory


def test_cached_logps_of_another_number_of_tokens_are_computed_again(tmp_path: Path) -> None:
    model = tiny_model("llama", std=0.3)
    computed = reference_logps(model, TRAJECTORIES, tmp_path, batch_size=4, progress=False)
    (cache,) = tmp_path.glob("*.jsonl")
    lines = [json.loads(line) for line in cache.read_text().splitlines()]
    lines[0]["logps"] = sum(lines[0]["logps"])  # sums, as an older cache held
    lines[1]["logps"] = lines[1]["logps"][1:]
    cache.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = reference_logps(model, TRAJECTORIES, tmp_path, batch_size=4, progress=False)
    assert all(torch.allclose(again[key], computed[key]) for key in computed)


def test_reference_logps_are_computed_once_per_content_and_weights(tmp_path: Path) -> None:
    model, calls = tiny_model("llama", std=0.3), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))

    def measure(trajectories: list[Any]) -> int:
        calls.clear()
        reference_logps(model, trajectories, tmp_path, batch_size=1, progress=False)
        return len(calls)

    assert measure(TRAJECTORIES[:4]) == 4
    assert measure(list(reversed(TRAJECTORIES))) == 2  # order, and what else is asked for, do not matter
    assert measure(TRAJECTORIES) == 0
    ids = TRAJECTORIES[0][0]
    assert measure([(ids, [0] * 3 + [1] * (len(ids) - 3))]) == 1  # another mask
    (cache,) = tmp_path.glob("*.jsonl")
    cache.write_text(cache.read_text()[:-20])  # a crash tears the last line
    assert measure([*TRAJECTORIES, (ids, [0] * 3 + [1] * (len(ids) - 3))]) == 1
    with torch.no_grad():
        next(model.parameters())[3, 0] += 0.1
    assert measure(TRAJECTORIES) == 6


def test_step_metrics_weigh_micro_batches_and_classes() -> None:
    metrics = StepMetrics()
    metrics.add({"tokens": 10, "margin": 1.0, "num/desirable": 3, "rho/desirable": 2.0}, weight=4)
    metrics.add({"tokens": 5, "margin": 4.0, "num/desirable": 0}, weight=2)
    metrics.add({"tokens": 5, "margin": 4.0, "num/desirable": 1, "rho/desirable": 6.0}, weight=2)
    assert metrics.take() == {"tokens": 20, "margin": 2.5, "num/desirable": 4, "rho/desirable": 3.0}
    assert metrics.take() == {}


def test_collapse_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    monitor = CollapseMonitor()
    with caplog.at_level(logging.WARNING):
        monitor.check(1, {"logratio/chosen": -0.9, "logratio/rejected": -4.9})
        assert not caplog.records
        monitor.check(2, {"logratio/chosen": -1.1, "logratio/rejected": -3.0})
        monitor.check(3, {"logratio/chosen": -2.0, "logratio/rejected": -4.0})
        assert [record.getMessage() for record in caplog.records] == [
            "step 2: logratio/chosen is -1.10: good trajectories become unlikely"
        ]
        monitor.check(4, {"rho/desirable": 0.0, "rho/undesirable": -5.5})
    assert "step 4: rho/undesirable is -5.50: the policy is far" in caplog.records[-1].getMessage()
    with caplog.at_level(logging.WARNING):
        monitor.check(5, {"drift/rejected": -0.9})
        assert len(caplog.records) == 2
        monitor.check(6, {"drift/rejected": -1.2})
    assert "step 6: drift/rejected is -1.20 nats a token" in caplog.records[-1].getMessage()


def test_a_resumed_metrics_file_drops_the_steps_to_come(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "label"}\n{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    state = TrainerState(global_step=2, is_world_process_zero=True)
    MetricsFile(path).on_train_begin(TrainingArguments(), state, TrainerControl())
    assert path.read_text() == '{"stage": "label"}\n{"step": 1}\n{"step": 2}\n'
