"""From a model and rows to a trained model on disk."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from mtpo.batches import Row, masked_rows, row_length, usable_rows
from mtpo.divergences import KL_FROM_REFERENCE, Comparison
from mtpo.errors import InputError
from mtpo.models import fingerprint, require_exact_attention, unwrapped
from mtpo.scoring import require_layout
from mtpo.training.adapters import check_merge, merged, with_adapter
from mtpo.training.callbacks import LOOK, Checkpoints, HeldOut, MetricsFile, ProgressBar
from mtpo.training.card import RunFacts, file_digests, model_card
from mtpo.training.distill import OnPolicy, OwnSamples
from mtpo.training.guards import EqualGradients, check_one_bos
from mtpo.training.hub import check_hub, push
from mtpo.training.methods import teacher_divergence
from mtpo.training.mismatch import with_mismatched
from mtpo.training.precision import LostUpdates, keep_trained_weights_in_float32
from mtpo.training.reference import add_reference_logps
from mtpo.training.reporters import check_reporters
from mtpo.training.settings import TrainingSettings
from mtpo.training.sharding import WeightsAreSharded, asked_for, load_models_whole
from mtpo.training.trainer import TrajectoryTrainer
from mtpo.training.value import ValueNetwork, ValueTraining, standardized_reward
from mtpo.vocabularies import require_one_vocabulary


@dataclass(frozen=True)
class TrainResult:
    """What a run made."""

    model: Path
    """Folder of the final model, for `from_pretrained`."""
    checkpoints: tuple[Path, ...]
    """Folders of earlier models, in order of steps."""
    num_steps: int
    num_rows: int
    num_dropped: int
    """Rows that were longer than the context."""
    metrics: dict[str, float]
    """Of the last step."""
    seconds: float


def train(
    model: PreTrainedModel,
    rows: Sequence[Row],
    settings: TrainingSettings,
    out: str | Path,
    *,
    reference_model: PreTrainedModel | Callable[[], PreTrainedModel] | None = None,
    teacher: PreTrainedModel | None = None,
    on_policy: OnPolicy | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    eval_rows: Sequence[Row] = (),
    data_files: Sequence[Path] = (),
    resume: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Train `model` in place and write it to `out`.

    out/model          the final model or adapter, with its card (and tokenizer), written last and whole
    out/checkpoint-N   the model after N steps, with what is needed to go on from there
    out/metrics.jsonl  one object a step
    out/eval.jsonl     one object for each look at the held-out rows
    out/reference      log-probs of the reference, by content

    Args:
        model: the policy to start from, also when resuming: the reference is measured before its weights are
            replaced by those of the last checkpoint.
        rows: of the kind that the method takes; see `mtpo.batches`.
        reference_model: `model` as it is now, if None. Methods on single rows have none. Of a function that loads
            it, the model is let go of before training starts; pmpo with kl="full" keeps it on the device.
        eval_rows: held-out rows of the same kind, looked at every `eval_steps` and after the last step.
        data_files: where the rows are from, for the model card.
        teacher: what kd and gkd learn from. It is moved to the device, and gets no gradient.
        on_policy: how gkd's student samples. Its samples take the place of rows; the last step is left out if it
            has fewer than `batch_size`.
        resume: go on from the last checkpoint in `out`, or start if there is none.

    Raises:
        InputError: rows of the wrong kind, ids that the model does not have, nothing left to train on, a batch
            that does not divide over the devices, `out` holds checkpoints and `resume` is not set.
        GuardError: the loss or a log-prob is not finite, policy and reference are equal but score differently,
            or the attention implementation is not exact.
    """
    started, out = time.monotonic(), Path(out)
    data = file_digests(data_files)
    require_exact_attention(model)
    checkpoint = last_checkpoint(out)
    if checkpoint is not None and not resume:
        raise InputError(
            f"{out} holds {checkpoint.name} of an earlier run: resume it, or take another folder"
        )
    _check_teacher(teacher, on_policy, model, settings)
    if settings.eval_steps is not None and not eval_rows:
        raise InputError("eval_steps has no effect without held-out rows")
    kept, num_dropped = _usable_rows(rows, settings, model, teacher)
    held_out = _usable_rows(eval_rows, settings, model, teacher)[0] if eval_rows else []
    if tokenizer is not None and tokenizer.bos_token_id is not None:
        check_one_bos([*kept, *held_out], int(tokenizer.bos_token_id))  # pyright: ignore[reportArgumentType]
    if settings.method == "kto":
        kept = with_mismatched(kept, settings.seed)  # of whole trajectories, whatever the mask counts
        held_out = with_mismatched(held_out, settings.seed) if held_out else []
    reward = standardized_reward(kept) if settings.method == "dro_v" else None
    kept, held_out = masked_rows(kept, settings.mask), masked_rows(held_out, settings.mask)
    args = training_arguments(settings, out)
    place_model(model, settings, args.device)
    starts_at_reference, value_network, comparison = False, None, None
    if teacher is not None:
        comparison = Comparison(_frozen(teacher, args), teacher_divergence(settings.options))
    reference_name = ""
    if settings.recipe.needs_reference:
        disable_dropout(model)
        reference = _loaded(reference_model) or model
        reference_name = name_of(reference)
        starts_at_reference = checkpoint is None and (
            reference is model or fingerprint(reference) == fingerprint(model)
        )
        kept = _with_reference(kept, reference, args, settings, progress)
        if held_out:
            held_out = _with_reference(held_out, reference, args, settings, progress)
        if reward is not None:
            value_network = ValueNetwork(reference).to(args.device)
            if settings.computes_in_bfloat16:
                keep_trained_weights_in_float32(value_network)
        if settings.options.get("kl") == "full":
            comparison = Comparison(_kept_reference(reference, model, settings, args), KL_FROM_REFERENCE)
        del reference, reference_model
    elif reference_model is not None:
        raise InputError(f"reference_model has no effect on method {settings.method!r}")
    policy = trainable(model, settings)

    order = training_order([row_length(row) for row in kept], settings)
    if on_policy is not None:
        order = order[: len(order) - len(order) % settings.batch_size]
    num_steps = math.ceil(len(order) / settings.batch_size)
    value = None
    if reward is not None and value_network is not None:
        value = ValueTraining(value_network, reward, settings, num_steps)
    trainer = TrajectoryTrainer(
        policy,
        [kept[i] for i in order],
        settings,
        args,
        tokenizer,
        run_callbacks(out, num_steps, settings, progress),
        starts_at_reference=starts_at_reference,
        value=value,
        comparison=comparison,
        own_samples=None if on_policy is None else _own_samples(on_policy, settings, args, num_steps),
    )
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if on_policy is not None and is_sharded:
        raise InputError("on_policy needs the whole student in every process: train it unsharded")
    if settings.merge_adapter:
        check_merge(policy, is_sharded=is_sharded)
    if held_out:
        trainer.held_out = held_out
        trainer.add_callback(HeldOut(settings.eval_steps))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    policy.eval()
    facts = RunFacts(name_of(model), reference_name, len(kept), num_dropped, data)
    save_model(trainer, out / "model", merge=settings.merge_adapter, facts=facts)
    return TrainResult(
        model=out / "model",
        checkpoints=tuple(checkpoints_of(out)),
        num_steps=num_steps,
        num_rows=len(kept),
        num_dropped=num_dropped,
        metrics=last_metrics(trainer),
        seconds=time.monotonic() - started,
    )


def place_model(model: PreTrainedModel, settings: TrainingSettings, device: torch.device) -> None:
    """Move a policy to where it is trained, in the types that the settings ask for."""
    require_layout(model, settings.layout, device)
    if getattr(model, "is_quantized", False):  # bitsandbytes has placed it
        if settings.method == "dro_v":
            raise InputError(
                "dro_v trains a copy of the model as its value network, so it cannot be quantised"
            )
    else:
        model.to(device)  # pyright: ignore[reportArgumentType]
        if settings.pure_bfloat16:
            model.to(torch.bfloat16)  # pyright: ignore[reportArgumentType]
        elif settings.computes_in_bfloat16 and settings.lora_rank is None:
            keep_trained_weights_in_float32(model)
    if settings.gradient_checkpointing:
        inner = unwrapped(model)
        newer = getattr(inner, "activation_checkpointing_enable", None)  # the older name is deprecated
        (newer or inner.gradient_checkpointing_enable)({"use_reentrant": False})


def trainable(model: PreTrainedModel, settings: TrainingSettings) -> PreTrainedModel:
    """The model, or its adapter, as it is trained."""
    policy = with_adapter(model, settings)
    if settings.computes_in_bfloat16:
        keep_trained_weights_in_float32(policy)
    return policy


def run_callbacks(
    out: Path, num_steps: int, settings: TrainingSettings, progress: bool
) -> list[TrainerCallback]:
    """What every run writes, checks and shows."""
    callbacks: list[TrainerCallback] = [
        MetricsFile(out / "metrics.jsonl"),
        Checkpoints(checkpoint_steps(num_steps, settings.num_checkpoints)),
        EqualGradients(),
        LostUpdates(settings.warmup_steps),
        WeightsAreSharded(),
    ]
    return callbacks + ([ProgressBar(settings.method)] if progress else [])


def training_order(lengths: Sequence[int], settings: TrainingSettings) -> list[int]:
    """Which row is drawn when, for all epochs: each epoch shuffled, a function of the seed alone.

    Single rows are then sorted by length within every batch, so that micro-batches need little padding. Which
    rows make a batch stays random: the loss of a batch is a mean over its tokens, so the tokens of a batch of
    short rows would count for more than others.
    """
    rng, order = random.Random(settings.seed), []
    for _ in range(settings.epochs):
        epoch = list(range(len(lengths)))
        rng.shuffle(epoch)
        order += epoch
    if settings.recipe.rows != "single":
        return order
    size = settings.batch_size
    batches = (order[start : start + size] for start in range(0, len(order), size))
    return [i for batch in batches for i in sorted(batch, key=lambda i: lengths[i])]


def checkpoint_steps(num_steps: int, num_checkpoints: int) -> list[int]:
    """`num_checkpoints` steps that cut the run into equal parts; fewer if the run is shorter."""
    steps = {round(num_steps * i / (num_checkpoints + 1)) for i in range(1, num_checkpoints + 1)}
    return sorted(steps - {0, num_steps})


def last_checkpoint(out: Path) -> Path | None:
    """The newest complete checkpoint: trainer_state.json is the last file to be written."""
    return next((path for path in reversed(checkpoints_of(out)) if _is_complete(path)), None)


def checkpoints_of(out: Path) -> list[Path]:
    found = [path for path in out.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=_checkpoint_step)


def _checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _usable_rows(
    rows: Sequence[Row], settings: TrainingSettings, model: PreTrainedModel, teacher: PreTrainedModel | None
) -> tuple[list[Row], int]:
    context = min(map(_context, (model, teacher or model)))
    kept = usable_rows(
        rows,
        settings.recipe.rows,
        trainer=f"method {settings.method!r}",
        vocab_size=unwrapped(model).get_input_embeddings().num_embeddings,
        max_length=min(settings.max_length or context, context),
    )
    return kept, len(rows) - len(kept)


def _context(model: PreTrainedModel) -> int:
    """The longest row that the model can read."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def training_arguments(settings: TrainingSettings, out: Path) -> TrainingArguments:
    if settings.hub_model_id is not None:
        check_hub(settings.hub_model_id)
    check_reporters(settings.report_to)
    args = TrainingArguments(
        output_dir=str(out),
        num_train_epochs=1,  # the rows come in the order of all epochs
        learning_rate=settings.learning_rate,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",  # a callback asks for checkpoints
        report_to=settings.report_to or "none",
        run_name=settings.run_name,
        project="mtpo",
        disable_tqdm=True,  # a callback shows the progress
        remove_unused_columns=False,
        bf16=settings.computes_in_bfloat16 and asked_for() != "DeepSpeed",  # its way is not autocast
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    args.trackio_static_space_id = False  # nothing is published that was not asked for
    micro_batch_size = settings.micro_batch_size or max(1, settings.batch_size // args.world_size)
    accumulation, rest = divmod(settings.batch_size, micro_batch_size * args.world_size)
    if rest:
        raise InputError(
            f"batch_size {settings.batch_size} is no multiple of micro_batch_size {micro_batch_size} "
            f"times {args.world_size} processes"
        )
    args.per_device_train_batch_size = micro_batch_size
    args.gradient_accumulation_steps = accumulation
    load_models_whole()
    return args


def _with_reference(
    rows: Sequence[Row],
    reference: PreTrainedModel,
    args: TrainingArguments,
    settings: TrainingSettings,
    progress: bool,
) -> list[Row]:
    require_exact_attention(reference)
    device, cache = next(reference.parameters()).device, Path(str(args.output_dir)) / "reference"
    disable_dropout(reference.to(args.device))  # pyright: ignore[reportArgumentType]
    size = args.per_device_train_batch_size
    with torch.autocast(args.device.type, torch.bfloat16, enabled=settings.computes_in_bfloat16):
        rows = add_reference_logps(rows, reference, cache, batch_size=size, progress=progress)
    reference.to(device)  # pyright: ignore[reportArgumentType]
    return rows


def _loaded(model: PreTrainedModel | Callable[[], PreTrainedModel] | None) -> PreTrainedModel | None:
    if model is None or isinstance(model, nn.Module):  # PEFT's wrappers are no PreTrainedModel
        return model  # pyright: ignore[reportReturnType]
    return model()


def _check_teacher(
    teacher: PreTrainedModel | None,
    on_policy: OnPolicy | None,
    model: PreTrainedModel,
    settings: TrainingSettings,
) -> None:
    """
    Raises:
        InputError: a distilling method has no teacher or no way to sample, another method has one, or the teacher's
            vocabulary is another one.
    """
    method, share = settings.method, settings.options.get("on_policy", 0)
    if settings.recipe.has_teacher and teacher is None:
        raise InputError(f"method {method!r} needs a teacher: recipes.distill trains it")
    if teacher is not None and not settings.recipe.has_teacher:
        raise InputError(f"teacher has no effect on method {method!r}")
    if bool(share) != (on_policy is not None):
        raise InputError(f"on_policy is {share}, so that the student must {'' if share else 'not '}sample")
    if teacher is not None:
        require_exact_attention(teacher)
        require_one_vocabulary({"student": model, "teacher": teacher}, purpose="distillation")


def _own_samples(
    on_policy: OnPolicy, settings: TrainingSettings, args: TrainingArguments, num_steps: int
) -> OwnSamples:
    return OwnSamples(
        on_policy,
        share=settings.options["on_policy"],
        seed=settings.seed,
        mask=settings.mask,
        num_steps=num_steps,
        batch_size=settings.batch_size,
        micro_batch_size=args.per_device_train_batch_size,
        process=args.process_index,
        num_processes=args.world_size,
    )


def _kept_reference(
    reference: PreTrainedModel, model: PreTrainedModel, settings: TrainingSettings, args: TrainingArguments
) -> nn.Module | None:
    """The reference as it is now, to be kept while the policy changes; None for the policy without its new adapter."""
    if reference is not model:
        return _frozen(reference, args)
    if settings.lora_rank is not None and not hasattr(model, "peft_config"):
        return None
    return _frozen(copy.deepcopy(model), args)


def _frozen(model: PreTrainedModel, args: TrainingArguments) -> nn.Module:
    return model.to(args.device).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]


def disable_dropout(model: nn.Module) -> None:
    """A log-ratio compares two distributions, not two draws of a dropout mask."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]


def name_of(model: Any) -> str:
    """The name or folder that a model was loaded from; empty if it was made here."""
    return str(getattr(unwrapped(model), "name_or_path", ""))


def last_metrics(trainer: TrajectoryTrainer, begin: str = "loss") -> dict[str, float]:
    """The last that were logged with one of a name that begins so among them, if any."""
    history = reversed(trainer.state.log_history)
    return next((entry for entry in history if any(name.startswith(begin) for name in entry)), {})


def save_model(
    trainer: TrajectoryTrainer, folder: Path, *, merge: bool, facts: RunFacts | None = None
) -> None:
    """Write the model, its tokenizer and its card, and push them where the settings say.

    Under another name first: a folder of this name is whole, whatever interrupts us.
    """
    partial, settings = folder.with_name(f".{folder.name}"), trainer.settings
    if merge:
        trainer.model = merged(trainer.accelerator.unwrap_model(trainer.model))
    trainer.save_model(str(partial))
    if trainer.is_world_process_zero():
        (partial / "training_args.bin").unlink(missing_ok=True)
        card = model_card(
            settings,
            facts or RunFacts(name_of(trainer.model)),
            last_metrics(trainer) | last_metrics(trainer, LOOK),
            family=unwrapped(trainer.model).config.model_type,  # pyright: ignore[reportArgumentType]
            is_adapter=(partial / "adapter_config.json").exists(),
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        if settings.hub_model_id is not None:
            push(folder, settings.hub_model_id, private=not settings.hub_public)
    trainer.accelerator.wait_for_everyone()
