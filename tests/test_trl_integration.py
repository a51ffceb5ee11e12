"""TRL's trainers on our rows: the same losses, gradients and steps as our own, and nothing dropped in silence."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.kto_config import KTOConfig

from mtpo.batches import Row, prompt_ids
from mtpo.errors import GuardError, InputError
from mtpo.integrations.trl import MultiTurnDPOTrainer, MultiTurnKTOTrainer
from mtpo.runs import write_jsonl
from mtpo.training import TrainingSettings, train
from tests.tiny_models import Family, tiny_model
from tests.tiny_rows import tiny_labels, tiny_pairs

TRAINERS: dict[type, Any] = {DPOConfig: MultiTurnDPOTrainer, KTOConfig: MultiTurnKTOTrainer}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # TRL would announce itself to the hub
    monkeypatch.setenv("TQDM_DISABLE", "1")


def options(**changes: Any) -> dict[str, Any]:
    """Of TRL's configs: one batch of all rows a step, in float32."""
    return {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "num_train_epochs": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    } | changes


def trl_trainer(model: Any, rows: Any, args: Any, **more: Any) -> Any:
    more = {"processing_class": word_tokenizer()} | more
    return TRAINERS[type(args)](model, args=args, train_dataset=rows, **more)


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(48)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")


def policy_and_reference(family: Family = "gemma2") -> tuple[PreTrainedModel, PreTrainedModel]:
    return tiny_model(family, std=0.1), tiny_model(family, std=0.1, seed=1)


def watch_gradients(model: nn.Module) -> list[Tensor]:
    """Fills with the gradient of all parameters, laid end to end, at each of the steps to come."""
    steps: list[Tensor] = []
    parameters = [p for p in model.parameters() if p.requires_grad]

    def last_one_arrived(_: Tensor, place: list[int] = [0]) -> None:  # noqa: B006
        place[0] = (place[0] + 1) % len(parameters)
        if not place[0]:
            steps.append(torch.cat([p.grad.flatten().clone() for p in parameters]))  # pyright: ignore

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(last_one_arrived)
    return steps


def logged(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def our_losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_equal_steps(
    theirs: PreTrainedModel,
    args: Any,
    ours: PreTrainedModel,
    rows: Sequence[Row],
    settings: Any,
    tmp_path: Path,
) -> Any:
    """Three steps of both trainers from equal models; returns TRL's."""
    reference = tiny_model(theirs.config.model_type, std=0.1, seed=1)  # pyright: ignore
    their_gradients, our_gradients = watch_gradients(theirs), watch_gradients(ours)
    trainer = trl_trainer(theirs, rows, args, ref_model=copy.deepcopy(reference))
    trainer.train()
    train(ours, rows, settings, tmp_path / "ours", reference_model=reference, progress=False)
    losses = logged(trainer)
    their_gradients = their_gradients[
        args.gradient_accumulation_steps - 1 :: args.gradient_accumulation_steps
    ]
    assert len(losses) == len(their_gradients) == len(our_gradients) == 3
    assert our_losses(tmp_path / "ours") == pytest.approx(losses, rel=1e-5, abs=1e-6)
    for expected, actual in zip(their_gradients, our_gradients, strict=True):
        assert expected.norm() > 1e-4
        assert (actual - expected).norm() < 1e-5 * expected.norm()
        assert (actual - expected).abs().max() < 1e-5
    for expected, actual in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)
    return trainer


@pytest.mark.parametrize(
    ("family", "method", "ours", "theirs"),
    [
        ("gemma2", "dpo", {}, {"loss_type": "sigmoid"}),
        ("llama", "dpo", {"beta": 0.3}, {"loss_type": "sigmoid", "beta": 0.3}),
        ("gemma2", "slic", {}, {"loss_type": "hinge"}),
        ("llama", "ipo", {"tau": 0.5, "normalize": True}, {"loss_type": "ipo", "beta": 0.5}),
        # TRL's loss that smooths labels sorts the pairs of a batch, which one pair survives
        (
            "gemma2",
            "cdpo",
            {"label_smoothing": 0.2},
            {
                "loss_type": "aot",
                "label_smoothing": 0.2,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 4,
            },
        ),
    ],
)
def test_three_steps_on_pairs_equal_our_own(
    family: Family, method: str, ours: dict[str, Any], theirs: dict[str, Any], tmp_path: Path
) -> None:
    settings = our_settings(method, batch_size=4, **ours)
    args = DPOConfig(str(tmp_path / "trl"), **options(**theirs))
    model = tiny_model(family, std=0.1)
    trainer = assert_equal_steps(model, args, tiny_model(family, std=0.1), tiny_pairs(4), settings, tmp_path)
    assert logged(trainer)[2] < logged(trainer)[0]


@pytest.mark.parametrize(("family", "seed"), [("gemma2", 4), ("llama", 1)])
def test_three_steps_on_labels_equal_our_own(family: Family, seed: int, tmp_path: Path) -> None:
    settings = our_settings("kto", batch_size=8, lambda_neg=1.5, seed=42)
    args = KTOConfig(str(tmp_path / "trl"), undesirable_weight=1.5, seed=42, **options())
    model = tiny_model(family, std=0.1)
    rows = tiny_labels(4, seed=seed)
    trainer = assert_equal_steps(model, args, tiny_model(family, std=0.1), rows, settings, tmp_path)
    assert logged(trainer)[2] < logged(trainer)[0]
    assert max(logged(trainer, "kl")) > 0.1  # the baseline has its part in this


def test_the_loss_of_an_evaluation_is_that_of_plain_log_probs(tmp_path: Path) -> None:
    policy, reference = policy_and_reference()
    margins = []
    for row in tiny_pairs(3, seed=5):
        rho = {
            side: plain_logp(policy, row, side) - plain_logp(reference, row, side)
            for side in ("chosen_", "rejected_")
        }
        margins.append(rho["chosen_"] - rho["rejected_"])
    expected = sum(math.log1p(math.exp(-0.1 * margin)) for margin in margins) / 3
    file = tmp_path / "held_out.jsonl"
    write_jsonl(file, tiny_pairs(3, seed=5))
    held_out = {"list": tiny_pairs(3, seed=5), "data": datasets.Dataset.from_list(tiny_pairs(3, seed=5))}
    args = DPOConfig(str(tmp_path / "trl"), **options())
    trainer = trl_trainer(policy, tiny_pairs(4), args, ref_model=reference, eval_dataset=held_out)
    metrics = trainer.evaluate()
    assert metrics["eval_list_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_data_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.evaluate(file)["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("config", [DPOConfig, KTOConfig])
def test_a_reference_scored_beforehand_trains_alike(config: Any, tmp_path: Path) -> None:
    rows = tiny_pairs(4) if config is DPOConfig else tiny_labels(4)
    losses = []
    for name, is_precomputed in (("each step", False), ("once", True)):
        args = config(
            str(tmp_path / name), precompute_ref_log_probs=is_precomputed, eval_strategy="epoch", **options()
        )
        policy, reference = policy_and_reference()
        trainer = trl_trainer(policy, rows, args, ref_model=reference, eval_dataset=rows)
        trainer.train()
        losses.append(
            [*logged(trainer), trainer.evaluate()["eval_loss"], trainer.evaluate(rows)["eval_loss"]]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] == losses[0][-2] != losses[0][0]
    assert list((tmp_path / "once").rglob("cache-*.arrow"))  # where all processes find them


def test_with_an_adapter_the_reference_is_the_model_without_it(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    base, losses = tiny_model("gemma2", std=0.1), []
    for name, reference in (("off", None), ("copy", copy.deepcopy(base))):
        args = DPOConfig(str(tmp_path / name), **options(learning_rate=1e-2))
        trainer = trl_trainer(copy.deepcopy(base), tiny_pairs(4), args, ref_model=reference, peft_config=lora)
        trainer.train()
        losses.append(logged(trainer))
        trained = dict(trainer.model.get_base_model().named_parameters())
        for key, weight in base.named_parameters():
            kept = trained.get(key, trained.get(key.replace(".weight", ".base_layer.weight")))
            assert torch.equal(kept, weight), key  # pyright: ignore
    assert losses[0][0] == pytest.approx(math.log(2), rel=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0][2] < losses[0][0] - 0.01


def test_mismatched_trajectories_are_of_another_prompt_and_keep_their_masks(tmp_path: Path) -> None:
    rows = tiny_labels(4)  # the two rows of a prompt stand side by side
    args = KTOConfig(str(tmp_path), **options())
    policy, reference = policy_and_reference()
    trainer = trl_trainer(policy, rows, args, ref_model=reference)
    turns = {tuple(row["input_ids"][3:]): row for row in rows}
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    for row, ids, mask in zip(rows, batch["KL_input_ids"], batch["KL_completion_mask"], strict=True):
        length = int(mask.nonzero().max()) + 1
        partner = turns[tuple(ids[3:length].tolist())]
        assert ids[:3].tolist() == prompt_ids(row) != prompt_ids(partner)
        assert mask[:length].tolist() == partner["completion_mask"]


def test_rows_may_come_from_a_file_and_the_model_from_a_folder(tmp_path: Path) -> None:
    tiny_model("gemma2", std=0.1).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "pairs.jsonl", tiny_pairs(4))
    args = DPOConfig(str(tmp_path / "trl"), model_init_kwargs={"dtype": "float32"}, **options())
    trainer = MultiTurnDPOTrainer(str(tmp_path / "model"), args=args, train_dataset=tmp_path / "pairs.jsonl")
    trainer.train()
    losses = logged(trainer)
    assert losses[0] == pytest.approx(math.log(2), rel=1e-6) and losses[2] < losses[0]
    undesirable = datasets.Dataset.from_list([row for row in tiny_labels(4) if not row["label"]])
    args = KTOConfig(str(tmp_path / "kto"), model_init_kwargs={"dtype": "float32"}, **options())
    trainer = MultiTurnKTOTrainer(str(tmp_path / "model"), args=args, train_dataset=undesirable)
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(1 / 2, rel=1e-6) and logged(trainer)[2] < 1 / 2


def test_a_run_with_trls_own_defaults_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """Autocast to bfloat16, gradient checkpointing, and the reference loaded from the folder."""
    tiny_model("gemma2", std=0.1).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    defaults = {"bf16": True, "gradient_checkpointing": True, "save_strategy": "epoch"}
    args = DPOConfig(str(tmp_path / "trl"), **options(**defaults))
    runs = [
        MultiTurnDPOTrainer(str(tmp_path / "model"), args=args, train_dataset=tiny_pairs(4)) for _ in range(2)
    ]
    runs[0].train()
    runs[1].train(resume_from_checkpoint=str(tmp_path / "trl" / "checkpoint-1"))
    assert logged(runs[0])[0] == pytest.approx(math.log(2), rel=1e-6)
    assert logged(runs[1])[1:] == pytest.approx(logged(runs[0])[1:], rel=1e-6)
    expected_weights, weights = (run.model.parameters() for run in runs)  # pyright: ignore
    for expected, actual in zip(expected_weights, weights, strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_reference_that_is_not_the_policy_as_it_starts_is_noticed(tmp_path: Path) -> None:
    tiny_model("llama", std=0.1, seed=1).save_pretrained(tmp_path / "model")
    policy = type(tiny_model("llama")).from_pretrained(tmp_path / "model")
    policy.load_state_dict(tiny_model("llama", std=0.1).state_dict())  # TRL will load the folder again
    trainer = trl_trainer(policy, tiny_pairs(4), DPOConfig(str(tmp_path / "trl"), **options()))
    with pytest.raises(GuardError, match=r"rewards/chosen is .* before the first step: pass the reference"):
        trainer.train()


def test_attention_that_drops_the_soft_cap_is_refused(tmp_path: Path) -> None:
    policy, reference = policy_and_reference()
    reference.config._attn_implementation = "sdpa"
    with pytest.raises(GuardError, match="'sdpa' drops the soft-cap"):
        trl_trainer(policy, tiny_pairs(4), DPOConfig(str(tmp_path), **options()), ref_model=reference)


def test_rows_that_are_too_long_are_dropped_whole_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = tiny_pairs(6)
    lengths = [max(len(row["chosen_input_ids"]), len(row["rejected_input_ids"])) for row in rows]
    limit = sorted(lengths)[3]
    expected = [row for row, length in zip(rows, lengths, strict=True) if length <= limit]
    policy, reference = policy_and_reference()
    with caplog.at_level(logging.WARNING, "mtpo"):
        args = DPOConfig(str(tmp_path), **options(max_length=limit))
        trainer = trl_trainer(policy, rows, args, ref_model=reference)
    assert trainer.train_dataset.to_list() == expected and len(expected) < 6
    assert f"dropped {6 - len(expected)} of 6 rows: longer than {limit} tokens" in caplog.text


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (DPOConfig, {"padding_free": True}, "padding_free=True would have no effect: TRL ignores it"),
        (DPOConfig, {"truncation_mode": "keep_end"}, "rows are never cut"),
        (DPOConfig, {"train_sampling_strategy": "group_by_length"}, "pairs have two lengths"),
        (DPOConfig, {"label_smoothing": 0.1}, r"TRL ignores it with \['sigmoid'\]; expected one of \['aot'"),
        (DPOConfig, {"pad_token": "w3"}, "pad_token='w3' would have no effect"),
        (DPOConfig, {"max_length": 4}, "none of 4 rows fits into 4 tokens"),
        (KTOConfig, {"pad_to_multiple_of": 8}, "pad_to_multiple_of=8 would have no effect"),
        (KTOConfig, {"dataset_num_proc": 2}, "dataset_num_proc=2 would have no effect: nothing is tokenised"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(
    config: Any, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    rows = tiny_pairs(4) if config is DPOConfig else tiny_labels(4)
    args = config(str(tmp_path), **options(**changes))
    with pytest.raises(InputError, match=message):
        trl_trainer(tiny_model("llama"), rows, args)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there are no rows"),
        (iter(tiny_pairs(2)), "given as a list_iterator; expected a list of rows"),
        (tiny_labels(2), "MultiTurnDPOTrainer trains on pair rows, but row 1 is a label row"),
        ([{"prompt": "q", "chosen": "a", "rejected": "b"}], "these rows hold chosen, prompt, rejected: render them"),
        ([tiny_pairs(1)[0] | {"tools": "[]"}], "these rows hold tools"),
        ("nowhere.jsonl", "nowhere.jsonl: no such file"),
        ([tiny_pairs(1)[0] | {"chosen_input_ids": [2, 3, 5, 48], "chosen_completion_mask": [0, 0, 0, 1]}],
         "holds token id 48, but the model knows 48"),
    ],
)  # fmt: skip
def test_what_are_no_pairs_is_refused(rows: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        trl_trainer(tiny_model("llama"), rows, DPOConfig(str(tmp_path), **options()))


def test_a_collator_of_ones_own_is_refused(tmp_path: Path) -> None:
    args = DPOConfig(str(tmp_path), **options())
    with pytest.raises(InputError, match="data_collator: the rows come with their own"):
        trl_trainer(tiny_model("llama"), tiny_pairs(2), args, data_collator=list)


def our_settings(method: str, **changes: Any) -> TrainingSettings:
    return TrainingSettings(
        method=method, **({"learning_rate": 1e-3, "lr_schedule": "constant", "epochs": 3} | changes)
    )


@torch.no_grad()
def plain_logp(model: PreTrainedModel, row: Row, side: str) -> float:
    """Of the action tokens, from full logits of one unpadded row."""
    ids = torch.tensor(row[f"{side}input_ids"])
    logps = model(ids[None]).logits[0].double().log_softmax(-1)
    return sum(logps[t - 1, ids[t]].item() for t in range(len(ids)) if row[f"{side}completion_mask"][t])
