"""TRL's DPO and KTO trainers for rows with masks: the loss is on what the model sampled, tool output is only read.

    trainer = MultiTurnDPOTrainer("runs/sft/model", args=DPOConfig("runs/dpo"), train_dataset="runs/pairs/pairs.jsonl")
    trainer.train()

TRL's own trainers render text again and count everything after the prompt, tool output and turn headers too. These
subclasses replace their rows and nothing else: losses, reference, adapters, metrics and checkpoints are TRL's. So
`ipo` divides log-ratios by the number of action tokens (here that is `normalize`), KTO estimates its baseline from
each micro-batch rather than from the whole step, and takes rows in their order: shuffle them first.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from mtpo.batches import COLUMNS, PairCollator, Row, RowKind, SingleCollator, read_rows, usable_rows
from mtpo.errors import GuardError, InputError
from mtpo.models import exact_attention, load_config, require_exact_attention
from mtpo.training.guards import check_one_bos
from mtpo.training.mismatch import with_mismatched
from mtpo.training.trainer import ZERO_MARGIN

Rows = Sequence[Row] | Dataset | str | Path
"""Rows of `mtpo.batches`: as they are, as a data set, or as the file that holds them."""

SMOOTHED_LOSSES = frozenset({"robust", "exo_pair", "aot", "aot_unpaired"})
TEXT_COLUMNS = frozenset(
    {"prompt", "chosen", "rejected", "completion", "messages", "tools", "chat_template_kwargs"}
)
"""What TRL would render."""
KL_COLUMNS = ("KL_input_ids", "KL_completion_mask")


@dataclass(frozen=True)
class _TrlPairCollator:
    """`PairCollator`, with TRL's precomputed sums of the reference."""

    more_columns: ClassVar = ("ref_chosen_logps", "ref_rejected_logps")
    pad_id: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        return PairCollator(self.pad_id)(rows) | _numbers(rows, self.more_columns)


@dataclass(frozen=True)
class _TrlLabelCollator:
    """`SingleCollator` under TRL's names, with its precomputed sums of the reference."""

    more_columns: ClassVar = (*KL_COLUMNS, "ref_logps", "ref_KL_logps")
    pad_id: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        collator = SingleCollator(self.pad_id)
        batch = collator([{name: row[name] for name in ("input_ids", "completion_mask")} for row in rows])
        if KL_COLUMNS[0] in rows[0]:
            mismatched = [{name.removeprefix("KL_"): row[name] for name in KL_COLUMNS} for row in rows]
            batch |= {f"KL_{name}": tensor for name, tensor in collator(mismatched).items()}
        return batch | _numbers(rows, ("label", "ref_logps", "ref_KL_logps"))


def _numbers(rows: Sequence[Row], names: Sequence[str]) -> dict[str, Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in names if name in rows[0]}


class _TrainsOnIds:
    """What both trainers change of TRL's."""

    kind: ClassVar[RowKind]
    collator: ClassVar[type[_TrlPairCollator | _TrlLabelCollator]]

    def __init__(
        self,
        model: str | PreTrainedModel,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | KTOConfig | None = None,
        *,
        train_dataset: Rows,
        eval_dataset: Rows | Mapping[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ) -> None:
        _check_options(args, options)
        if isinstance(model, str) and args is not None:
            args = copy.copy(args)
            args.model_init_kwargs = _with_exact_attention(model, dict(args.model_init_kwargs or {}))  # pyright: ignore
        self.vocab_size = _vocab_size(model)
        self.starts_at_reference = _starts_at_reference(ref_model, options)
        super().__init__(
            model,  # pyright: ignore[reportCallIssue]
            ref_model,
            args,
            self.collator(getattr(processing_class, "pad_token_id", None) or 0),  # padding is seen by nothing
            _dataset(train_dataset),
            eval_dataset,
            processing_class,
            **options,
        )
        for loaded in (self.model, self.ref_model):  # pyright: ignore[reportAttributeAccessIssue]
            if loaded is not None:
                require_exact_attention(loaded)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Dataset:
        return _prepared(self._usable(_dataset(dataset), processing_class, args), args)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*COLUMNS[self.kind], *self.collator.more_columns]

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **options: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **options)  # pyright: ignore[reportAttributeAccessIssue]
        _check_zero_margin(self, inputs)
        return loss

    def _usable(self, dataset: Dataset, tokenizer: Any, args: Any) -> list[Row]:
        """The rows that may be trained on, and of each what training needs."""
        name = type(self).__name__
        if text := sorted(TEXT_COLUMNS & set(dataset.column_names)):
            raise InputError(
                f"{name} trains on token ids, but these rows hold {', '.join(text)}: render them with "
                "recipes.import_rows first"
            )
        kept = usable_rows(
            dataset.to_list(),
            self.kind,
            trainer=name,
            vocab_size=self.vocab_size or len(tokenizer),
            max_length=args.max_length or sys.maxsize,
        )
        if tokenizer.bos_token_id is not None:
            check_one_bos(kept, tokenizer.bos_token_id)
        return [{column: row[column] for column in COLUMNS[self.kind]} for row in kept]


class MultiTurnDPOTrainer(_TrainsOnIds, DPOTrainer):
    """TRL's DPOTrainer for pairs.

    Rows longer than `args.max_length` are dropped whole, with a warning that counts them.

    Args:
        train_dataset, eval_dataset: `Rows`; for evaluation also a dict of them. `evaluate` takes the same, a file as
            a Path.
        ref_model: if None, the policy as it starts: TRL switches the adapter off, or loads the folder or name that
            `model` came from.
        options: TRL's other arguments, such as `peft_config`.

    Raises:
        InputError: a row is broken or of another kind, no row fits, or an option would have no effect.
        GuardError: the reference is to be the policy as it starts, but scores otherwise; or the attention
            implementation drops the model's soft-cap.
    """

    kind = "pair"
    collator = _TrlPairCollator


class MultiTurnKTOTrainer(_TrainsOnIds, KTOTrainer):
    """TRL's KTOTrainer for rows with labels; arguments and errors are those of `MultiTurnDPOTrainer`.

    The mismatched trajectories of the baseline are drawn once, each from another prompt, with their own masks. TRL
    would take the neighbour in the batch, whose prompt is the same where the samples of a problem stand together.
    """

    kind = "label"
    collator = _TrlLabelCollator

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Dataset:
        rows = self._usable(_dataset(dataset), processing_class, args)
        if self.calculate_KL:
            rows = [_with_kl_columns(row) for row in with_mismatched(rows, args.seed)]
        return _prepared(rows, args)


def _dataset(rows: Rows) -> Dataset:
    """What TRL's constructors accept: it looks at the first row before it lets us prepare any."""
    if isinstance(rows, str | Path):
        rows = read_rows(rows)
    if not isinstance(rows, Dataset | list | tuple):
        raise InputError(
            f"rows are given as a {type(rows).__name__}; expected a list of rows, a datasets.Dataset or a file"
        )
    if not len(rows):
        raise InputError("there are no rows to train on")
    return rows if isinstance(rows, Dataset) else Dataset.from_list(list(rows))


def _prepared(rows: list[Row], args: Any) -> Dataset:
    """In memory; where TRL is to keep log-probs beside them, in a file, which all processes find."""
    table = Dataset.from_list(rows)
    if not args.precompute_ref_log_probs:
        return table
    folder = str(Path(args.output_dir) / "rows")
    return Dataset.from_generator(  # pyright: ignore[reportReturnType]
        _each, features=table.features, cache_dir=folder, gen_kwargs={"table": table}
    )


def _each(table: Dataset) -> Iterator[Row]:
    yield from table  # pyright: ignore[reportReturnType]


def _with_kl_columns(row: Row) -> Row:
    mismatched = row.pop("mismatched")
    return row | {name: mismatched[name.removeprefix("KL_")] for name in KL_COLUMNS}


def _check_options(args: DPOConfig | KTOConfig | None, options: Mapping[str, Any]) -> None:
    if "data_collator" in options:
        raise InputError("data_collator: the rows come with their own; another one would lose the masks")
    losses = getattr(args, "loss_type", None) or []
    wrong = {
        "padding_free": (getattr(args, "padding_free", False), "TRL ignores it"),
        "truncation_mode": (
            getattr(args, "truncation_mode", "keep_start") != "keep_start",
            "rows are never cut: those longer than max_length are dropped",
        ),
        "train_sampling_strategy": (
            getattr(args, "train_sampling_strategy", None) == "group_by_length",
            "pairs have two lengths; expected 'random' or 'sequential'",
        ),
        "dataset_num_proc": (getattr(args, "dataset_num_proc", None), "nothing is tokenised"),
        "pad_to_multiple_of": (getattr(args, "pad_to_multiple_of", None), "batches are as long as their longest row"),
        "pad_token": (getattr(args, "pad_token", None), "set the tokenizer's own"),
        "label_smoothing": (
            getattr(args, "label_smoothing", 0) and not SMOOTHED_LOSSES & set(losses),
            f"TRL ignores it with {losses}; expected one of {sorted(SMOOTHED_LOSSES)}, or mtpo.training's cdpo",
        ),
    }  # fmt: skip
    for name, (is_wrong, reason) in wrong.items():
        if is_wrong:
            raise InputError(f"{name}={getattr(args, name)!r} would have no effect: {reason}")


def _with_exact_attention(model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What to load it with: transformers before 5.21 would choose an attention without Gemma 2's soft-cap."""
    return {"attn_implementation": exact_attention(load_config(model)), **options}


def _vocab_size(model: str | PreTrainedModel) -> int | None:
    """How many ids the model knows; None if it is yet to be loaded."""
    return None if isinstance(model, str) else model.get_input_embeddings().num_embeddings  # pyright: ignore


def _starts_at_reference(ref_model: Any, options: Mapping[str, Any]) -> bool:
    """Not with virtual tokens: they change the policy at once."""
    return ref_model is None and not getattr(options.get("peft_config"), "is_prompt_learning", False)


def _check_zero_margin(trainer: Any, batch: Mapping[str, Tensor]) -> None:
    """
    Raises:
        GuardError: before the first step, the mean log-ratio of the batch is more than rounding.
    """
    if trainer.state.global_step or not (trainer.starts_at_reference and trainer.model.training):
        return
    dtype = torch.bfloat16 if trainer.args.bf16 or trainer.args.fp16 else trainer.model.dtype
    longest = batch["completion_mask"].sum(-1).max().item()
    tolerance = trainer.beta * (ZERO_MARGIN.get(dtype, ZERO_MARGIN[torch.bfloat16]) * longest + 1e-4)
    for name in ("rewards/chosen", "rewards/rejected"):
        rewards = trainer._metrics["train"].get(name)  # none of a batch without that class
        if rewards and abs(rewards[-1]) > tolerance:
            raise GuardError(
                f"the reference is to be the policy as it starts, but {name} is {rewards[-1]:.3g} before the first "
                "step: pass the reference as ref_model, or the folder that the policy was saved in as model"
            )
