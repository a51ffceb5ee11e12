"""What a run tells while it goes: held-out rows, and transformers' reporters."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations import integration_utils

from mtpo.batches import Row
from mtpo.errors import InputError
from mtpo.training import TrainingSettings, reporters, train
from recipes import train as train_recipe
from tests.tiny_models import tiny_model
from tests.tiny_rows import tiny_labels, tiny_pairs, tiny_singles
from tests.tiny_tokenizers import make_tokenizer

STILL = 1e-30
"""A learning rate that moves nothing."""


def settings(method: str, learning_rate: float = STILL, **options: Any) -> TrainingSettings:
    return TrainingSettings(method=method, learning_rate=learning_rate, **{"batch_size": 4, **options})


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@torch.no_grad()
def naive_sum(model: PreTrainedModel, row: Row, side: str = "") -> float:
    """log p of a row's action tokens, without padding, from all logits."""
    ids, mask = torch.tensor([row[f"{side}input_ids"]]), torch.tensor(row[f"{side}completion_mask"][1:])
    logps = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    return (logps.gather(-1, ids[0, 1:, None]).squeeze(-1) * mask).sum().item()


def test_held_out_loss_of_dpo_by_hand(tmp_path: Path) -> None:
    """Seven pairs in batches of four and micro-batches of two, the last one short."""
    policy, reference = tiny_model("llama", std=0.2), tiny_model("llama", std=0.2, seed=1)
    held_out = tiny_pairs(7, seed=5)
    margins = [
        sum(
            sign * (naive_sum(policy, row, side) - naive_sum(reference, row, side))
            for side, sign in (("chosen_", 1), ("rejected_", -1))
        )
        for row in held_out
    ]
    chosen = settings("dpo", micro_batch_size=2)
    train(
        policy, tiny_pairs(4), chosen, tmp_path, reference_model=reference, eval_rows=held_out, progress=False
    )
    (look,) = lines(tmp_path / "eval.jsonl")
    assert look["step"] == 1
    assert look["eval_loss"] == pytest.approx(
        sum(math.log1p(math.exp(-0.1 * m)) for m in margins) / 7, rel=1e-4
    )
    assert look["eval_accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 7)
    assert look["eval_action_tokens"] == sum(
        sum(row[f"{side}_completion_mask"]) for row in held_out for side in ("chosen", "rejected")
    )


def test_held_out_loss_of_sft_counts_every_token_alike(tmp_path: Path) -> None:
    model, held_out = tiny_model("gemma2", std=0.2), tiny_singles(5, seed=5)
    total = sum(naive_sum(model, row) for row in held_out)
    chosen = settings("sft", batch_size=2, micro_batch_size=1)
    train(model, tiny_singles(2), chosen, tmp_path, eval_rows=held_out, progress=False)
    (look,) = lines(tmp_path / "eval.jsonl")
    assert look["eval_loss"] == pytest.approx(
        -total / sum(sum(r["completion_mask"]) for r in held_out), rel=1e-4
    )


@pytest.mark.parametrize("method", ["dpo", "kto", "pmpo", "dro_v", "sft"])
def test_looking_at_held_out_rows_changes_nothing(method: str, tmp_path: Path) -> None:
    rows: Callable[..., list[Row]] = {"dpo": tiny_pairs, "sft": tiny_singles}.get(method, tiny_labels)
    finals, steps = {}, {}
    for every in (None, 2):
        model, out = tiny_model("llama", std=0.2), tmp_path / str(every)
        chosen = settings(method, 1e-2, eval_steps=every, epochs=2 if method in ("dpo", "sft") else 1)
        held_out = [] if every is None else rows(3, seed=5)
        train(model, rows(10), chosen, out, eval_rows=held_out, progress=False)
        finals[every] = torch.cat([p.detach().flatten() for p in model.parameters()])
        steps[every] = [
            {k: v for k, v in s.items() if k != "tokens_per_s"} for s in lines(out / "metrics.jsonl")
        ]
    assert torch.equal(finals[None], finals[2])
    assert steps[None] == steps[2] and len(steps[2]) == 5
    looks = lines(tmp_path / "2/eval.jsonl")
    assert [look["step"] for look in looks] == [2, 4, 5]
    assert looks[0]["eval_loss"] != looks[-1]["eval_loss"]  # the policy has moved
    assert not (tmp_path / "None/eval.jsonl").exists()


def test_a_step_tells_the_share_of_action_tokens(tmp_path: Path) -> None:
    rows = tiny_singles(4)
    result = train(tiny_model("llama"), rows, settings("sft"), tmp_path, progress=False)
    actions, tokens = sum(sum(r["completion_mask"]) for r in rows), sum(len(r["input_ids"]) for r in rows)
    assert result.metrics["action_share"] == pytest.approx(actions / tokens)
    assert {"learning_rate", "grad_norm", "tokens_per_s"} <= result.metrics.keys()


@torch.no_grad()
def naive_entropies(model: PreTrainedModel, row: Row) -> list[float]:
    """Of the distributions that the action tokens were drawn from, in nats."""
    probs = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].double().softmax(-1)
    each = torch.special.entr(probs).sum(-1)
    return [h.item() for h, m in zip(each, row["completion_mask"][1:], strict=True) if m]


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_a_step_tells_the_entropy_of_an_action_token(family: Any, tmp_path: Path) -> None:
    """Of all of them: a micro-batch of tiny rows has fewer than 64."""
    model, rows = tiny_model(family, std=0.3), tiny_singles(4)
    each = [h for row in rows for h in naive_entropies(model, row)]
    assert len(each) < 64 and max(each) - min(each) > 0.1
    result = train(model, rows, settings("sft", micro_batch_size=2), tmp_path, progress=False)
    assert result.metrics["entropy"] == pytest.approx(sum(each) / len(each), rel=1e-5)


def test_a_command_takes_held_out_rows_and_puts_them_on_the_card(tmp_path: Path) -> None:
    tiny_model("llama", vocab_size=600).save_pretrained(tmp_path / "model")
    make_tokenizer("gemma").save_pretrained(tmp_path / "model")
    for name, seed in (("train", 0), ("held_out", 5)):
        text = "".join(json.dumps(row) + "\n" for row in tiny_pairs(4, seed=seed))
        (tmp_path / f"{name}.jsonl").write_text(text)
    argv = ["--method", "ipo", "--model", tmp_path / "model", "--data", tmp_path / "train.jsonl"]
    argv += ["--eval_data", tmp_path / "held_out.jsonl", "--out", tmp_path / "run", "--learning_rate", "1e-3"]
    assert train_recipe.main([str(a) for a in argv]) == 0
    (look,) = lines(tmp_path / "run/eval.jsonl")
    assert f"| eval_loss | {look['eval_loss']:.4g} |" in (tmp_path / "run/model/README.md").read_text()


class FakeReporter(TrainerCallback):
    """Takes the place of a reporter that transformers starts by name."""

    def __init__(self) -> None:
        SEEN.clear()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        SEEN.append((state.global_step, args.run_name, integration_utils.rewrite_logs(logs)))


SEEN: list[tuple[int, str, dict[str, float]]] = []


def test_a_reporter_hears_of_every_step_and_every_look(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", FakeReporter)
    monkeypatch.setattr(reporters, "find_spec", lambda name: object())
    chosen = settings("dpo", report_to=["trackio"], run_name="first", eval_steps=1)
    train(
        tiny_model("llama"), tiny_pairs(8), chosen, tmp_path, eval_rows=tiny_pairs(2, seed=5), progress=False
    )
    heard = [(step, sorted(name for name in logs if name.endswith("/loss"))) for step, _, logs in SEEN[:4]]
    assert heard == [(1, ["train/loss"]), (1, ["eval/loss"]), (2, ["train/loss"]), (2, ["eval/loss"])]
    assert {name for _, name, _ in SEEN} == {"first"}
    assert SEEN[0][2]["train/margin"] == pytest.approx(0, abs=1e-5)


def test_tensorboard_gets_the_steps_in_the_run_folder(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    chosen = settings("sft", report_to=["tensorboard"])
    train(tiny_model("llama"), tiny_singles(8), chosen, tmp_path, progress=False)
    (folder,) = (tmp_path / "runs").iterdir()
    events = accumulator.EventAccumulator(str(folder)).Reload().Scalars("train/loss")
    expected = [(step["step"], step["loss"]) for step in lines(tmp_path / "metrics.jsonl")]
    assert [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events] == expected


def test_reporters_are_off_unless_asked_for(monkeypatch: Any, tmp_path: Path) -> None:
    for name in integration_utils.INTEGRATION_TO_CALLBACK:
        monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, name, FakeReporter)
    SEEN.clear()
    train(tiny_model("llama"), tiny_singles(4), settings("sft"), tmp_path, progress=False)
    assert SEEN == []


def test_a_reporter_that_is_not_installed_is_told_before_training(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(reporters, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="report_to wandb: it is not installed, pip install wandb"):
        train(
            tiny_model("llama"),
            tiny_singles(4),
            settings("sft", report_to=["wandb"]),
            tmp_path,
            progress=False,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"report_to": ["tensorboard", "mlflow"]},
            "report_to is 'mlflow'; expected some of tensorboard, trackio",
        ),
        ({"run_name": "x"}, "run_name has no effect"),
        ({"run_name": "x", "report_to": ["tensorboard"]}, "run_name has no effect"),
        ({"eval_steps": 0}, "eval_steps is 0, expected at least 1"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings("sft", **options)


def test_eval_steps_need_held_out_rows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="eval_steps has no effect without held-out rows"):
        train(tiny_model("llama"), tiny_singles(4), settings("sft", eval_steps=1), tmp_path, progress=False)
