from __future__ import annotations

import copy
import json
import math
import os
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mtpo.batches import Row, sides
from mtpo.errors import GuardError, InputError
from mtpo.models import load_model, load_tokenizer
from mtpo.training import TrainingSettings, train
from mtpo.training.mismatch import with_mismatched
from tests.child_processes import start
from tests.tiny_models import tiny_model
from tests.tiny_rows import tiny_labels, tiny_pairs, tiny_singles

ROWS: dict[str, Callable[[int], list[Row]]] = {
    "sft": tiny_singles,
    "dpo": tiny_pairs,
    "kto": tiny_labels,
    "pmpo": tiny_labels,
    "dro_v": tiny_labels,
}
STILL = 1e-30
"""A learning rate that moves nothing."""


def settings(method: str, learning_rate: float = 1e-3, **options: Any) -> TrainingSettings:
    return TrainingSettings(method=method, learning_rate=learning_rate, **{"batch_size": 4, **options})


def steps(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(model: PreTrainedModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@torch.no_grad()
def naive_logps(model: PreTrainedModel, row: Row, side: str = "") -> torch.Tensor:
    """log p of every token but the first, without padding, from all logits."""
    ids = torch.tensor([row[f"{side}input_ids"]])
    logps = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    return logps.gather(-1, ids[0, 1:, None]).squeeze(-1)


def naive_sum(model: PreTrainedModel, row: Row, side: str = "", mask: Sequence[int] | None = None) -> float:
    """log p of a row's action tokens."""
    each = naive_logps(model, row, side)
    return (each * torch.tensor((mask or row[f"{side}completion_mask"])[1:])).sum().item()


def log_ratios(policy: PreTrainedModel, reference: PreTrainedModel, row: Row) -> list[float]:
    return [naive_sum(policy, row, side) - naive_sum(reference, row, side) for side in sides(row)]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


PAIRED: list[tuple[str, dict[str, Any], Callable[[float, float], float]]] = [
    ("dpo", {}, lambda d, nll: softplus(-0.1 * d)),
    ("dpo", {"beta": 0.7}, lambda d, nll: softplus(-0.7 * d)),
    ("dpo", {"label_smoothing": 0.2}, lambda d, nll: 0.8 * softplus(-0.1 * d) + 0.2 * softplus(0.1 * d)),
    ("dpo", {"nll_coef": 0.5}, lambda d, nll: softplus(-0.1 * d) + 0.5 * nll),
    ("cdpo", {}, lambda d, nll: 0.9 * softplus(-0.1 * d) + 0.1 * softplus(0.1 * d)),
    ("ipo", {}, lambda d, nll: (d - 5) ** 2),
    ("ipo", {"tau": 0.5}, lambda d, nll: (d - 1) ** 2),
    ("ipo", {"tau": 0.5, "normalize": True}, lambda d, nll: (d - 1) ** 2),
    ("slic", {}, lambda d, nll: max(0.0, 1 - 0.1 * d)),
    ("squared", {}, lambda d, nll: (0.1 * d - 1) ** 2),
    ("exponential", {}, lambda d, nll: math.exp(-0.1 * d)),
    ("truncated_quadratic", {"beta": 0.3}, lambda d, nll: max(0.0, 1 - 0.3 * d) ** 2),
    ("savage", {}, lambda d, nll: sigmoid(-0.1 * d) ** 2),
]


@pytest.mark.parametrize(
    ("method", "options", "by_hand"), PAIRED, ids=[f"{m}-{''.join(o) or 'default'}" for m, o, _ in PAIRED]
)
def test_paired_loss_of_the_first_step_by_hand(
    method: str, options: dict[str, Any], by_hand: Callable[[float, float], float], tmp_path: Path
) -> None:
    policy, reference, rows = (
        tiny_model("llama", std=0.2),
        tiny_model("llama", std=0.2, seed=1),
        tiny_pairs(3),
    )
    expected, margins = 0.0, []
    for row in rows:
        rho_w, rho_l = log_ratios(policy, reference, row)
        if options.get("normalize"):
            rho_w /= sum(row["chosen_completion_mask"])
            rho_l /= sum(row["rejected_completion_mask"])
        nll = -naive_sum(policy, row, "chosen_") / sum(row["chosen_completion_mask"])
        expected += by_hand(rho_w - rho_l, nll) / 3
        margins.append(rho_w - rho_l)
    assert max(map(abs, margins)) > (
        0.1 if options.get("normalize") else 1
    )  # otherwise every loss would be f(0)
    result = train(
        policy, rows, settings(method, STILL, **options), tmp_path, reference_model=reference, progress=False
    )
    assert steps(tmp_path)[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert result.metrics["accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 3)
    assert result.metrics["logps/chosen"] == pytest.approx(
        sum(naive_sum(policy, row, "chosen_") for row in rows) / 3, rel=1e-5
    )


@pytest.mark.parametrize("options", [{}, {"beta": 0.5}, {"lambda_pos": 2.0}, {"lambda_neg": 3.0}])
def test_kto_loss_and_baseline_of_the_first_step_by_hand(options: dict[str, float], tmp_path: Path) -> None:
    policy, reference, rows = (
        tiny_model("llama", std=0.2),
        tiny_model("llama", std=0.2, seed=1),
        tiny_labels(2),
    )
    mismatched = [row["mismatched"] for row in with_mismatched(rows, seed=0)]
    z0 = max(0.0, sum(log_ratios(policy, reference, row)[0] for row in mismatched) / 4)
    beta, expected = options.get("beta", 0.1), 0.0
    for row in rows:
        u = beta * (log_ratios(policy, reference, row)[0] - z0)
        name, sign = ("lambda_pos", -1) if row["label"] else ("lambda_neg", 1)
        expected += options.get(name, 1.0) * sigmoid(sign * u) / 4
    result = train(
        policy, rows, settings("kto", STILL, **options), tmp_path, reference_model=reference, progress=False
    )
    assert result.metrics["z0"] == pytest.approx(z0, rel=1e-4, abs=1e-5)
    assert result.metrics["loss"] == pytest.approx(expected, rel=1e-4)
    assert result.metrics["num/desirable"] == 2


PMPO: list[tuple[dict[str, float], int]] = [
    ({}, 5),
    ({"alpha": 1.0, "beta": 0.1}, 5),
    ({"alpha": 0.0, "beta": 2.0}, 5),
    ({"alpha": 1.0}, 0),
    ({"normalize": True}, 5),
]


@pytest.mark.parametrize(("options", "num_labels"), PMPO)
def test_pmpo_loss_of_the_first_step_by_hand(
    options: dict[str, float], num_labels: int, tmp_path: Path
) -> None:
    """Three accepted and two rejected, or accepted ones alone; micro-batches hold one each."""
    policy, reference = tiny_model("llama", std=0.1), tiny_model("llama", std=0.1, seed=1)
    rows = tiny_labels(3)[:num_labels] or tiny_labels(3)[::2]
    sizes = Counter(row["label"] for row in rows)
    alpha, expected = options.get("alpha", 0.5), 0.0
    for row in rows:
        mask = torch.tensor(row["completion_mask"][1:])
        logps = naive_logps(policy, row)
        gap = logps - naive_logps(reference, row)
        per = int(mask.sum()) if options.get("normalize") else 1
        weight = (-alpha if row["label"] else 1 - alpha) / sizes[row["label"]]
        expected += weight * (logps * mask).sum().item() / per
        kl = ((gap.exp() - 1 - gap) * mask).sum().item() / per
        expected += options.get("beta", 0.5) * kl / len(rows)
    chosen = settings("pmpo", STILL, batch_size=len(rows), micro_batch_size=1, **options)
    result = train(policy, rows, chosen, tmp_path, reference_model=reference, progress=False)
    assert result.metrics["loss"] == pytest.approx(expected, rel=1e-4)
    assert result.metrics["num/accepted"] == sizes[True] == 3


@pytest.mark.parametrize("label", [True, False])
def test_pmpo_takes_rows_of_one_class_and_moves_them(label: bool, tmp_path: Path) -> None:
    model, rows = tiny_model("gemma2", std=0.1), [r for r in tiny_labels(4) if r["label"] is label]
    before, alpha = copy.deepcopy(model), float(label)
    chosen = settings("pmpo", epochs=5, alpha=alpha, beta=1.1)
    train(model, rows, chosen, tmp_path, progress=False)
    moved = [log_ratios(model, before, row)[0] for row in rows]
    assert all(m > 0 for m in moved) if label else all(m < 0 for m in moved)


def other_mask(row: Row, mask: str, side: str = "") -> list[int]:
    """Of the two turns of a tiny row with tool output between them: all after the prompt, or the second turn."""
    action = row[f"{side}completion_mask"]
    turn_starts = [i for i in range(1, len(action)) if action[i] > action[i - 1]]
    first = {"action": 0, "none": turn_starts[0], "last_turn": turn_starts[1]}[mask]
    return [int(i >= first and (bool(action[i]) or mask == "none")) for i in range(len(action))]


MASKS = ["action", "none", "last_turn"]


@pytest.mark.parametrize("mask", MASKS)
def test_sft_loss_of_the_first_step_by_hand(mask: Any, tmp_path: Path) -> None:
    """Without the mask, tool output and the headers around it are trained as well."""
    model, rows = tiny_model("gemma2", std=0.2), tiny_singles(4)
    masks = [other_mask(row, mask) for row in rows]
    total = sum(naive_sum(model, row, mask=m) for row, m in zip(rows, masks, strict=True))
    expected = -total / sum(map(sum, masks))
    result = train(model, rows, settings("sft", STILL, mask=mask), tmp_path, progress=False)
    assert result.metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert result.metrics["action_tokens"] == sum(map(sum, masks))
    assert result.metrics["tokens"] == sum(len(row["input_ids"]) for row in rows)


@pytest.mark.parametrize("mask", ["none", "last_turn"])
def test_policy_and_reference_of_the_baselines_count_the_same_tokens(mask: Any, tmp_path: Path) -> None:
    """Single-turn DPO and KTO, by hand; KTO's baseline mismatches whole trajectories, and counts as the rest does."""
    policy, reference = tiny_model("llama", std=0.2, seed=1), tiny_model("llama", std=0.2)

    def rho(row: Row, side: str = "") -> float:
        counted = other_mask(row, mask, side)
        return naive_sum(policy, row, side, counted) - naive_sum(reference, row, side, counted)

    pairs, labels = tiny_pairs(3), tiny_labels(2)
    dpo = sum(softplus(-0.1 * (rho(row, "chosen_") - rho(row, "rejected_"))) for row in pairs) / 3
    mismatched = [row["mismatched"] for row in with_mismatched(labels, seed=0)]
    z0 = sum(map(rho, mismatched)) / 4
    assert z0 > 0.1  # otherwise it would be clamped to 0
    kto = sum(sigmoid((-0.1 if row["label"] else 0.1) * (rho(row) - z0)) for row in labels) / 4
    for method, rows, expected in (("dpo", pairs, dpo), ("kto", labels, kto)):
        chosen = settings(method, STILL, mask=mask)
        result = train(policy, rows, chosen, tmp_path / method, reference_model=reference, progress=False)
        assert result.metrics["loss"] == pytest.approx(expected, rel=1e-4)
        assert result.metrics.get("z0", z0) == pytest.approx(z0, rel=1e-4)


@pytest.mark.parametrize(
    "method", ["dpo", "ipo", "slic", "squared", "exponential", "truncated_quadratic", "savage"]
)
def test_a_few_steps_on_one_pair_raise_its_margin(method: str, tmp_path: Path) -> None:
    model, rows = tiny_model("gemma2", std=0.1), tiny_pairs(1)
    before = copy.deepcopy(model)
    train(model, rows, settings(method, 1e-3, batch_size=1, epochs=5), tmp_path, progress=False)
    rho_w, rho_l = log_ratios(model, before, rows[0])
    assert rho_w - rho_l > 0.5
    assert steps(tmp_path)[0]["margin"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("label", [True, False])
def test_kto_takes_rows_of_one_class_and_moves_them(label: bool, tmp_path: Path) -> None:
    model, rows = tiny_model("gemma2", std=0.1), [r for r in tiny_labels(4) if r["label"] is label]
    before = copy.deepcopy(model)
    train(model, rows, settings("kto", epochs=5), tmp_path, progress=False)
    moved = [log_ratios(model, before, row)[0] for row in rows]
    assert all(m > 0 for m in moved) if label else all(m < 0 for m in moved)


@pytest.mark.parametrize("method", list(ROWS))
def test_gradient_accumulation_changes_nothing(method: str, tmp_path: Path) -> None:
    """Micro-batches hold different numbers of action tokens, and KTO's baseline is that of the whole batch."""
    finals, losses = [], []
    for micro_batch_size in (4, 2, 1):
        model, out = tiny_model("gemma2", std=0.1), tmp_path / str(micro_batch_size)
        chosen = settings(method, 1e-2, micro_batch_size=micro_batch_size, epochs=2, max_grad_norm=1e9)
        train(model, ROWS[method](5), chosen, out, progress=False)
        finals.append(weights(model))
        losses.append([step["loss"] for step in steps(out)])
    assert max(losses[0]) - min(losses[0]) > 0.01  # it does learn
    for other in (1, 2):
        assert losses[other] == pytest.approx(losses[0], rel=1e-4)
        torch.testing.assert_close(finals[other], finals[0], rtol=1e-3, atol=1e-4)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {f"w{i}": i for i in range(48)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocab, unk_token="w0")), pad_token="w0"
    )


def test_final_and_intermediate_models_load(tmp_path: Path) -> None:
    model = tiny_model("gemma2", std=0.1)
    chosen = settings("sft", num_checkpoints=2)
    result = train(model, tiny_singles(24), chosen, tmp_path, tokenizer=tiny_tokenizer(), progress=False)
    assert result.num_steps == 6
    assert [path.name for path in result.checkpoints] == ["checkpoint-2", "checkpoint-4"]
    final, halfway = load_model(result.model), load_model(result.checkpoints[0])
    assert torch.equal(weights(final), weights(model))
    assert not torch.equal(weights(halfway), weights(model))
    assert final.config.use_cache is True
    assert load_tokenizer(result.model).get_vocab() == tiny_tokenizer().get_vocab()
    assert [step["step"] for step in steps(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert steps(tmp_path)[2]["epoch"] == pytest.approx(0.5)


def _train_until_killed(out: str, method: str) -> None:
    model, calls = tiny_model("gemma2", std=0.1), 0

    def kill(*_: Any) -> None:
        nonlocal calls
        calls += model.training
        if calls == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    model.register_forward_pre_hook(kill)
    train(model, ROWS[method](12), resumable(method), out, progress=False)


def resumable(method: str) -> TrainingSettings:
    return settings(method, 1e-2, optimizer="muon", num_checkpoints=1, epochs=2, warmup_steps=2, mask="none")


def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    """With Muon, a learning-rate schedule, and a reference that must stay the policy of the first start."""
    straight = tiny_model("gemma2", std=0.1)
    train(straight, tiny_pairs(12), resumable("dpo"), tmp_path / "straight", progress=False)
    process = start(_train_until_killed, str(tmp_path / "killed"), "dpo")
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [step["step"] for step in steps(tmp_path / "killed")] == [1, 2, 3, 4]
    resumed, out = tiny_model("gemma2", std=0.1), tmp_path / "killed"
    with pytest.raises(InputError, match="holds checkpoint-3 of an earlier run"):
        train(resumed, tiny_pairs(12), resumable("dpo"), out, progress=False)
    train(resumed, tiny_pairs(12), resumable("dpo"), out, resume=True, progress=False)
    torch.testing.assert_close(weights(resumed), weights(straight), rtol=0, atol=0)
    assert [step["step"] for step in steps(out)] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_cut_short_by_a_crash_is_not_resumed_from(tmp_path: Path) -> None:
    train(tiny_model("llama"), tiny_singles(12), settings("sft", num_checkpoints=2), tmp_path, progress=False)
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text('{"global_st')
    model = tiny_model("llama")
    train(model, tiny_singles(12), settings("sft", num_checkpoints=2), tmp_path, resume=True, progress=False)
    torch.testing.assert_close(weights(model), weights(load_model(tmp_path / "model")), rtol=0, atol=0)
    assert [step["step"] for step in steps(tmp_path)] == [1, 2, 3]


def test_lora_starts_at_the_reference_and_moves_away(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = tiny_model("gemma2", std=0.1)
    before = weights(base)
    targets = ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.5, init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    result = train(model, tiny_pairs(4), settings("dpo", 1e-2, epochs=6), tmp_path, progress=False)
    assert steps(tmp_path)[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert result.metrics["margin"] > 0.05
    model.unload()
    assert torch.equal(weights(base), before)
    assert (result.model / "adapter_config.json").exists()


def test_dropout_is_off_where_log_ratios_are_compared(tmp_path: Path) -> None:
    model = tiny_model("llama", std=0.2, attention_dropout=0.5)
    train(model, tiny_pairs(4), settings("dpo"), tmp_path, progress=False)
    assert steps(tmp_path)[0]["margin"] == pytest.approx(0, abs=1e-5)


def test_gradient_checkpointing_runs_every_layer_twice(tmp_path: Path) -> None:
    calls = {}
    for enabled in (False, True):
        model, seen = tiny_model("llama"), []
        model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))  # pyright: ignore
        chosen = settings("sft", gradient_checkpointing=enabled)
        train(model, tiny_singles(4), chosen, tmp_path / str(enabled), progress=False)
        calls[enabled] = len(seen)
    assert calls == {False: 1, True: 2}


def test_a_stale_reference_cache_is_found_at_step_0(tmp_path: Path) -> None:
    train(tiny_model("llama"), tiny_pairs(4), settings("dpo", STILL), tmp_path, progress=False)
    (cache,) = (tmp_path / "reference").glob("*.jsonl")
    lines = [json.loads(line) for line in cache.read_text().splitlines()]
    lines[3]["logps"][1] += 0.01
    cache.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(GuardError, match=r"differ by -0.01 nats on tiny/\d sample 0 over 1"):
        train(tiny_model("llama"), tiny_pairs(4), settings("dpo", STILL), tmp_path, progress=False)


def test_a_broken_model_is_stopped_with_the_rows_named(tmp_path: Path) -> None:
    model, rows = tiny_model("llama"), tiny_singles(4)
    for row in rows:
        row["input_ids"] = [i if i != 47 else 46 for i in row["input_ids"]]
    rows[2]["input_ids"][1] = 47
    with torch.no_grad():
        model.get_input_embeddings().weight[47] = math.inf  # pyright: ignore
    with pytest.raises(GuardError, match=r"not finite on tiny/2 sample 0$"):
        train(model, rows, settings("sft"), tmp_path, progress=False)


def test_an_overflowing_loss_is_stopped(tmp_path: Path) -> None:
    policy, reference = tiny_model("llama", std=0.2), tiny_model("llama", std=0.2, seed=1)
    with pytest.raises(GuardError, match="the loss is inf on tiny/"):
        train(
            policy,
            tiny_pairs(4),
            settings("exponential", beta=1e6),
            tmp_path,
            reference_model=reference,
            progress=False,
        )


def test_rows_longer_than_the_context_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = tiny_singles(8)
    longest = max(len(row["input_ids"]) for row in rows)
    num_longest = sum(len(row["input_ids"]) == longest for row in rows)
    result = train(
        tiny_model("llama"), rows, settings("sft", max_length=longest - 1), tmp_path, progress=False
    )
    assert (result.num_rows, result.num_dropped) == (8 - num_longest, num_longest)


BAD_RUNS: dict[str, tuple[Callable[[], list[Row]], dict[str, Any], str]] = {
    "kind": (lambda: tiny_pairs(2), {"method": "sft"}, "trains on single rows, but row 1 is a pair row"),
    "labels": (lambda: tiny_labels(2), {"method": "raft"}, "trains on single rows, but row 1 is a label row"),
    "none": (lambda: [], {"method": "dpo"}, "no rows"),
    "vocabulary": (
        lambda: [tiny_singles(1)[0] | {"input_ids": [2, 48], "completion_mask": [0, 1]}],
        {"method": "sft"},
        r"row 1 \(tiny/0 sample 0\) holds token id 48, but the model knows 48",
    ),
    "row": (lambda: [tiny_singles(1)[0] | {"input_ids": [2]}], {"method": "sft"}, "row 1: 1 input_ids but"),
    "batch": (lambda: tiny_pairs(2), {"method": "dpo", "micro_batch_size": 3}, "no multiple"),
    "one prompt": (lambda: tiny_labels(1), {"method": "kto"}, "2 of 2 rows have the same prompt"),
}


@pytest.mark.parametrize(("rows", "options", "message"), list(BAD_RUNS.values()), ids=list(BAD_RUNS))
def test_bad_runs_are_refused(
    rows: Callable[[], list[Row]], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        train(tiny_model("llama"), rows(), settings(**options), tmp_path, progress=False)


def test_sft_refuses_a_reference(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match="reference_model has no effect"):
        train(model, tiny_singles(2), settings("sft"), tmp_path, reference_model=model, progress=False)
