"""TRL's own DPO trainer, fed with masks that have holes, must go the way that ours goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mtpo.batches import PairCollator
from mtpo.training import TrainingSettings, train
from tests.tiny_models import tiny_model
from tests.tiny_rows import tiny_pairs

trl = pytest.importorskip("trl")


class TokenizedDPOTrainer(trl.DPOTrainer):
    """Takes rows that hold ids: TRL would tokenise text, and has no mask for tool output."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


@pytest.mark.parametrize(("method", "loss_type"), [("dpo", "sigmoid"), ("slic", "hinge")])
def test_three_steps_of_dpo_equal_those_of_trl(
    method: str, loss_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # TRL would announce itself to the hub
    rows, theirs, ours = tiny_pairs(4), tiny_model("gemma2", std=0.1), tiny_model("gemma2", std=0.1)
    config = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"),
        loss_type=[loss_type],
        per_device_train_batch_size=4,
        num_train_epochs=3,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = TokenizedDPOTrainer(
        model=theirs,
        ref_model=tiny_model("gemma2", std=0.1, seed=1),
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=_tokenizer(),
        data_collator=PairCollator(pad_id=0),  # pyright: ignore[reportArgumentType]
    )
    trainer.train()
    settings = TrainingSettings(
        method=method, learning_rate=1e-3, lr_schedule="constant", batch_size=4, epochs=3
    )
    reference = tiny_model("gemma2", std=0.1, seed=1)
    train(ours, rows, settings, tmp_path / "ours", reference_model=reference, progress=False)

    their_losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    our_steps = [json.loads(line) for line in (tmp_path / "ours" / "metrics.jsonl").read_text().splitlines()]
    assert [step["loss"] for step in our_steps] == pytest.approx(their_losses, rel=1e-5)
    assert len(their_losses) == 3 and their_losses[2] < their_losses[0]
    for expected, actual in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(48)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
