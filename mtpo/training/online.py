"""Online training: sample trajectories, judge them, learn from them, and again from the better policy."""

from __future__ import annotations

import copy
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mtpo.errors import EnvironmentFault, InputError
from mtpo.models import fingerprint, require_exact_attention
from mtpo.samplers import PolicySamplers
from mtpo.training.adapters import check_merge
from mtpo.training.callbacks import ProgressBar
from mtpo.training.card import RunFacts
from mtpo.training.looks import Looks
from mtpo.training.online_settings import OnlineSettings
from mtpo.training.online_trainer import OnlineTrainer
from mtpo.training.precision import keep_trained_weights_in_float32
from mtpo.training.rounds import Rounds
from mtpo.training.run import (
    TrainResult,
    checkpoints_of,
    disable_dropout,
    last_checkpoint,
    last_metrics,
    name_of,
    place_model,
    run_callbacks,
    save_model,
    trainable,
    training_arguments,
    training_order,
)
from mtpo.training.sharding import asked_for
from mtpo.training.table import OpenTable, Storage, Table
from mtpo.training.value import ValueNetwork, ValueTraining
from mtpo.trajectory import Problem

log = logging.getLogger(__name__)


class Paused(EnvironmentFault):
    """The judge cannot be asked: all that was sampled, judged and learnt is kept, to be resumed."""


def train_online(
    model: PreTrainedModel,
    problems: Sequence[Problem],
    settings: OnlineSettings,
    table: Table,
    storage: Storage,
    out: str | Path,
    *,
    eval_problems: Sequence[Problem] = (),
    reference_model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    resume: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Train `model` in place on trajectories of its own and its opponents', and write it to `out`.

    out/rounds         every trajectory and judgement: see `mtpo.training.rounds`
    out/looks, out/eval.jsonl   those on held-out prompts, and one object for each look: see `mtpo.training.looks`
    out/model, out/checkpoint-N, out/metrics.jsonl   as of `mtpo.training.train`

    A run that was killed goes on from its last checkpoint; rounds that were played since are not played again, so
    that it ends with the weights that it would have had.

    Args:
        model: the policy to start from, also when resuming.
        problems: the prompts; each is drawn `epochs` times. Those that do not fill a last step are left out.
        eval_problems: held-out prompts, played once by the policy and compared with the reference and with the policy
            of the look before: before the first step, every `eval_steps` and after the last.
        reference_model: `model` as it is now, if None. It stays in memory, unless an adapter is trained without
            whose the policy is the reference.

    Raises:
        InputError: too few problems for a step, a batch that does not divide over the devices, a sharded model or one
            that cannot be mixed with its reference, a judge that the method cannot use, `eval_steps` without
            `eval_problems`, or `out` holds checkpoints and `resume` is not set.
        GuardError: too many steps were skipped, or engine and trainer do not agree on log-probs.
        Paused: the judge cannot be asked. A checkpoint was written; resuming loses nothing.
    """
    started, out = time.monotonic(), Path(out)
    if asked_for():
        raise InputError(
            f"online methods sample from whole weights, which {asked_for()} cuts up: launch with DDP"
        )
    if settings.eval_steps is not None and not eval_problems:
        raise InputError("eval_steps has no effect without held-out problems")
    require_exact_attention(model)
    checkpoint = last_checkpoint(out)
    if checkpoint is not None and not resume:
        raise InputError(
            f"{out} holds {checkpoint.name} of an earlier run: resume it, or take another folder"
        )
    prompts = prompt_order(problems, settings)
    num_steps = len(prompts) // settings.batch_size
    args = training_arguments(settings, out)
    # Processes differ in how often they score, and must not exchange buffers, which are constants, each time. The
    # option has another name in the newest torch, which transformers does not know.
    args.ddp_broadcast_buffers = False
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    place_model(model, settings, args.device)
    disable_dropout(model)
    reference = _reference(model, reference_model, settings)
    value = None
    if settings.recipe.has_values:
        network = ValueNetwork(reference or model).to(args.device)
        if settings.computes_in_bfloat16:
            keep_trained_weights_in_float32(network)
        value = ValueTraining(network, None, settings, num_steps)
    starts_at_reference = checkpoint is None and (
        reference is None or fingerprint(reference) == fingerprint(model)
    )
    if reference is not None:
        reference.to(args.device).eval()  # pyright: ignore[reportArgumentType]
    policy = trainable(model, settings)
    samplers = PolicySamplers(
        policy,
        reference,
        # Rounds are sampled at their start, so that one copy of the policy will do; an average moves every step.
        push_every=settings.sync_steps if "average" in settings.recipe.players else 1,
        max_rows=table.max_rows,
    )
    callbacks = run_callbacks(out, num_steps, settings, progress)
    with (
        OpenTable(table, storage) as opened,
        closing(Rounds(prompts, settings, samplers, opened, out / "rounds")) as rounds,
    ):
        looks = None
        if eval_problems:
            now = partial(PolicySamplers, policy, reference, max_rows=table.max_rows)
            looks = Looks(eval_problems, settings.eval_steps, settings.seed, now, opened, out / "looks")
        trainer = OnlineTrainer(
            policy,
            rounds,
            samplers,
            reference,
            settings,
            args,
            tokenizer,
            callbacks,
            max_length=min(settings.max_length or sys.maxsize, _context(model)),
            starts_at_reference=starts_at_reference,
            value=value,
            looks=looks,
        )
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise InputError(
                "online training samples in the trainer's process, and needs the whole policy there"
            )
        if settings.merge_adapter:
            check_merge(policy, is_sharded=False)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except EnvironmentFault as error:
            trainer.save_here()
            for bar in callbacks:
                if isinstance(bar, ProgressBar):
                    bar.close()
            step = trainer.state.global_step
            raise Paused(
                f"paused after step {step} of {num_steps}, nothing is lost: {error}; go on with --resume"
            ) from error
    policy.eval()
    facts = RunFacts(name_of(model), name_of(reference or model), len(prompts))
    save_model(trainer, out / "model", merge=settings.merge_adapter, facts=facts)
    return TrainResult(
        model=out / "model",
        checkpoints=tuple(checkpoints_of(out)),
        num_steps=num_steps,
        num_rows=len(prompts),
        num_dropped=0,
        metrics=last_metrics(trainer),
        seconds=time.monotonic() - started,
    )


def prompt_order(problems: Sequence[Problem], settings: OnlineSettings) -> list[Problem]:
    """The problem of every prompt of the run: each epoch shuffled, a function of the seed alone.

    Raises:
        InputError: they do not fill a single step.
    """
    order = [problems[i] for i in training_order([0] * len(problems), settings)]
    num_steps = len(order) // settings.batch_size
    if not num_steps:
        raise InputError(
            f"{len(problems)} problems in {settings.epochs} epochs do not fill one batch of {settings.batch_size}"
        )
    return order[: num_steps * settings.batch_size]


def _reference(
    model: PreTrainedModel, given: PreTrainedModel | None, settings: OnlineSettings
) -> PreTrainedModel | None:
    """The reference in memory; None where it is the policy without the adapter that is about to be made."""
    if given is not None:
        require_exact_attention(given)
        disable_dropout(given)
        return given.requires_grad_(False)
    is_new_adapter = settings.lora_rank is not None and not hasattr(model, "peft_config")
    if is_new_adapter and "mixture" not in settings.recipe.players:
        return None
    return copy.deepcopy(model).requires_grad_(False)


def _context(model: Any) -> int:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
