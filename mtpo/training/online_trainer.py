"""The trainer of the online methods: its rows are sampled and judged when it comes to them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from mtpo.batches import Row, SingleCollator, masked_rows
from mtpo.divergences import KL_FROM_POLICY, Comparison
from mtpo.errors import GuardError
from mtpo.logprobs import action_logps
from mtpo.losses import LossOut
from mtpo.samplers import CURRENT, PolicySamplers
from mtpo.scoring import batch_logps
from mtpo.training.callbacks import LOOK, HeldOut
from mtpo.training.guards import engine_gap
from mtpo.training.looks import Looks
from mtpo.training.methods import Scores
from mtpo.training.metrics import StepMetrics
from mtpo.training.online_methods import moments, turns_of
from mtpo.training.online_settings import OnlineSettings
from mtpo.training.plays import Play, play_metrics, rows_of, single_row
from mtpo.training.rounds import Rounds
from mtpo.training.trainer import Batch, NotFinite, TrajectoryTrainer
from mtpo.training.turns import turn_ids, turn_starts
from mtpo.training.value import ValueTraining, prompt_ends

log = logging.getLogger(__name__)

SAMPLERS_FILE = "samplers.pt"
"""In a checkpoint: averages of the policy."""
PROBED = 8
"""Trajectories of the first round whose log-probs are compared between engine and trainer."""


class OnlineTrainer(TrajectoryTrainer):
    """A `TrajectoryTrainer` whose rows come from rounds, and whose reference is in memory.

    A step whose loss is not finite, or for which no play was usable, changes no weight and is counted.
    """

    settings: OnlineSettings

    def __init__(
        self,
        model: PreTrainedModel,
        rounds: Rounds,
        samplers: PolicySamplers,
        reference: PreTrainedModel | None,
        settings: OnlineSettings,
        args: TrainingArguments,
        tokenizer: PreTrainedTokenizerBase | None,
        callbacks: list[TrainerCallback],
        *,
        max_length: int,
        starts_at_reference: bool,
        value: ValueTraining | None = None,
        looks: Looks | None = None,
    ) -> None:
        """
        Args:
            reference: the policy without its adapter, if None.
        """
        self.rounds, self.samplers, self.reference, self.looks = rounds, samplers, reference, looks
        self.max_length = max_length
        self.is_broken = False
        self.num_skipped = 0
        self.moments: tuple[float, float] | None = None
        is_explicit = settings.options.get("kl") == "explicit"
        super().__init__(
            model,
            [{}] * rounds.num_prompts,
            settings,
            args,
            tokenizer,
            [_Step(self), *callbacks, *([] if looks is None else [_Looking(self, looks.every)])],
            starts_at_reference=starts_at_reference,
            value=value,
            comparison=Comparison(reference, KL_FROM_POLICY) if is_explicit else None,
        )
        self.collate = self.data_collator
        self.data_collator = _places  # the prompts' places only: rows follow when their step has come

    # -- the rows of a step ------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        for _ in range(num_batches):
            next(epoch_iterator)
        plays, recipe = self.rounds.plays_of(self.state.global_step), self.settings.recipe
        if self.state.global_step == 0:
            self._check_engine(plays)
        usable = [play for play in plays if play.is_usable(recipe, self.max_length)]
        figures = play_metrics(plays, usable) | self.rounds.metrics
        self.metrics.add(figures | {"tokens": 0.0, "action_tokens": 0.0}, weight=len(plays))
        self.rows = masked_rows([row for play in usable for row in rows_of(play, recipe)], self.settings.mask)
        self.is_broken, self.moments = False, None
        batches = [self._batch(places) for places in _parts(len(self.rows), num_batches)]
        batches, count = super().get_batch_samples(iter(batches), num_batches, device)
        self.is_broken |= not count
        full = [batch for batch in batches if len(batch["index"])]
        if recipe.rows == "label" and count:
            self.z0 = self._baseline(full, "")  # the k1 mean on fresh trajectories of the policy
        if self.settings.options.get("normalize_advantage") and num_batches * self.args.world_size > 1:
            self.moments = self._moments(full)
        return batches, count

    def _batch(self, places: range) -> Batch:
        """Rows of this step, with the reference's log-probs."""
        if not places:
            return _idle(self.args.device)
        rows = [self.rows[place] | {"index": place} for place in places]
        batch: Any = self._prepare_inputs(self.collate(rows))
        with torch.no_grad(), self.compute_loss_context_manager():
            ref_logps = self._reference_logps(batch)
        if not torch.isfinite(ref_logps).all():
            self._break(f"the reference's log-probs are not finite on {self._names(batch)}")
            return _idle(self.args.device)
        return batch | {"ref_logps": ref_logps}

    def _reference_logps(self, batch: Batch) -> Tensor:
        if self.reference is not None:
            return batch_logps(self.reference, batch)
        policy: Any = self.model
        with policy.disable_adapter():
            return batch_logps(policy, batch)

    def _check_engine(self, plays: Sequence[Play]) -> None:
        """Before the first step the policy's engine and the trainer have the same weights, and must agree."""
        sampled = [
            trajectory
            for play in plays
            for trajectory, sampler in zip(play.sides, self.settings.samplers, strict=True)
            if sampler == CURRENT and trajectory.actions
        ][:PROBED]
        if sampled:
            gap = engine_gap(self.model, sampled)  # pyright: ignore[reportArgumentType]
            log.info("engine and trainer differ by %.2g nats a token, at most %.2g", gap.mean, gap.max)

    @torch.no_grad()
    def _moments(self, batches: Sequence[Batch]) -> tuple[float, float] | None:
        """Of the advantages of the step's turns, over all micro-batches and processes."""
        found: list[float] = []
        for batch in batches:
            try:
                with self.compute_loss_context_manager():
                    of = turns_of(self._scores(self.model_wrapped, batch), self.settings.options)  # pyright: ignore
            except NotFinite as error:
                self._break(str(error))
            else:
                found += of.advantages[of.valid].tolist()
        joint = [value for part in gather_object([found]) for value in part]
        return moments(torch.tensor(joint, dtype=torch.float64)) if joint else None

    # -- the loss of a micro-batch -----------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        if len(inputs["index"]):
            try:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            except NotFinite as error:
                self._break(str(error))
        return self._nothing(model)

    def _break(self, reason: str) -> None:
        log.warning("step %d changes nothing: %s", self.state.global_step + 1, reason)
        self.is_broken = True

    def _nothing(self, model: nn.Module) -> Tensor:
        """0, with a gradient for every parameter, which other processes may be waiting for."""
        idle = _idle(self.args.device)
        outputs = [action_logps(model, idle["input_ids"], idle["completion_mask"])]
        if self.value is not None:
            outputs.append(self.value.network(idle["input_ids"], prompt_ends(idle["completion_mask"])))
        return sum(
            (output.nan_to_num().sum() * 0 for output in outputs), torch.zeros((), device=self.args.device)
        )

    def _scores(self, model: nn.Module, batch: Batch) -> Scores:
        ids, values = turn_ids(batch["completion_mask"]), None
        if self.value is not None:
            values = self.value.network(batch["input_ids"], turn_starts(ids))
            if not torch.isfinite(values).all():
                raise NotFinite(f"values are not finite on {self._names(batch)}")
        return dataclasses.replace(
            super()._scores(model, batch),
            rewards=batch.get("rewards"),
            pref_prob=batch.get("pref_prob"),
            turn_ids=ids,
            values=values,
            advantage_moments=self.moments,
        )

    def _count(self, batch: Batch) -> int:
        if self.settings.recipe.has_values and len(batch["index"]):
            return int((turn_ids(batch["completion_mask"]).amax(-1) + 1).sum())
        return len(batch["index"])

    def _record(self, scores: Scores, out: LossOut, batch: Batch) -> None:
        """Adds the KL to the reference by k1, or, of trajectories that others sampled, the log-ratio."""
        name = "kl" if self.settings.samplers[0] == CURRENT else "logratio"
        figures = log_ratio_metrics(name, scores.rho, float(scores.num_tokens.sum()))
        super()._record(scores, LossOut(out.loss, out.per_example, out.metrics | figures), batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds how many steps old the weights were that sampled, and how many steps were skipped so far."""
        if "loss" in logs:
            staleness = (self.state.global_step - 1) % self.settings.sync_steps
            logs = logs | {"sync_steps": self.settings.sync_steps, "staleness": staleness}
            logs["skipped_steps"] = self.num_skipped
        super().log(logs, start_time)

    # -- looks at held-out prompts -----------------------------------------------------------------------------

    def _look(self) -> dict[str, float]:
        """Preferences against the reference and the policy of the look before, KL to the reference and entropy."""
        assert self.looks is not None
        look, found = self.looks.at(self.state.global_step), StepMetrics()
        found.add(look.metrics, weight=len(look.own))
        rows = [single_row(t) for t in look.own if t.actions and len(t.input_ids) <= self.max_length]
        size = self.args.per_device_train_batch_size
        for start in range(0, len(rows), size):
            batch: Any = self._prepare_inputs(SingleCollator(0)(rows[start : start + size]))
            policy: Any = self.model  # bare: other processes may have fewer batches
            with self.compute_loss_context_manager():
                logps = batch_logps(policy, batch, watch=self._note_entropy)
                log_ratios = (logps.double() - self._reference_logps(batch)) * batch["completion_mask"]
            num_tokens = float(batch["completion_mask"].sum())
            figures = log_ratio_metrics("kl", log_ratios.sum(-1), num_tokens)
            found.add(figures | {"entropy": self.entropy or 0.0}, weight=len(log_ratios))
        return found.take()

    # -- steps and checkpoints ---------------------------------------------------------------------------------

    def save_here(self) -> None:
        """A checkpoint of the last finished step, if there is one and it has none yet; whole when this returns."""
        step = self.state.global_step
        state = Path(str(self.args.output_dir)) / f"checkpoint-{step}" / "trainer_state.json"
        if step and not all(gather_object([state.exists()])):  # all processes save it, or none
            self._save_checkpoint(self.model, trial=None)  # pyright: ignore[reportArgumentType]
            self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.is_world_process_zero():
            torch.save(self.samplers.state_dict(), Path(output_dir) / SAMPLERS_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.samplers.load_state_dict(torch.load(Path(checkpoint) / SAMPLERS_FILE, weights_only=True))


class _Step(TrainerCallback):
    """Drops the gradients that must not be applied, and tells the samplers of every step that was taken."""

    def __init__(self, trainer: OnlineTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer, settings = self.trainer, self.trainer.settings
        policy: nn.Module = trainer.model  # pyright: ignore[reportAssignmentType]
        if any(gather_object([trainer.is_broken or not _are_finite(policy)])):
            policy.zero_grad(set_to_none=True)  # an optimiser leaves a parameter without gradient as it is
            if trainer.value is not None:
                trainer.value.network.zero_grad(set_to_none=True)
            trainer.num_skipped += 1
            if trainer.num_skipped > settings.max_skipped_steps:
                raise GuardError(
                    f"{trainer.num_skipped} steps had no finite gradient, or nothing to learn from: see the warnings "
                    f"and num/unjudged in metrics.jsonl, or raise max_skipped_steps ({settings.max_skipped_steps})"
                )
        elif state.global_step < settings.value_warmup_steps:
            policy.zero_grad(set_to_none=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step, settings = state.global_step, self.trainer.settings
        if step < state.max_steps and (
            "average" in settings.recipe.players or step % settings.sync_steps == 0
        ):
            self.trainer.samplers.update(step)


class _Looking(HeldOut):
    """Also looks before the first step, and makes up for a look at which a run was paused."""

    def __init__(self, trainer: OnlineTrainer, every: int | None) -> None:
        super().__init__(every)
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        looked = {
            entry["step"] for entry in state.log_history if any(name.startswith(LOOK) for name in entry)
        }
        if self.is_due(state) and state.global_step not in looked:
            self.trainer.evaluate()


def log_ratio_metrics(name: str, rho: Tensor, num_tokens: float) -> dict[str, float]:
    """Means of log-ratios, (N,), a trajectory and an action token."""
    return {
        "num/trajectory": float(len(rho)),
        f"{name}/trajectory": rho.mean().item(),
        "num/token": num_tokens,
        f"{name}/token": rho.sum().item() / num_tokens,
    }


def _are_finite(model: nn.Module) -> bool:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return bool(torch.isfinite(nn.utils.get_total_norm(gradients)))


def _idle(device: torch.device) -> Batch:
    """Stands where a process has fewer rows than micro-batches, and counts nothing."""
    return {
        "input_ids": torch.tensor([[0, 0]], device=device),
        "completion_mask": torch.tensor([[0, 1]], device=device),
        "index": torch.zeros(0, dtype=torch.int64, device=device),
        "labels": torch.zeros(0, dtype=torch.bool, device=device),
    }


def _parts(length: int, num_parts: int) -> list[range]:
    """0 to length - 1, cut into parts of nearly equal size."""
    borders = [round(length * part / num_parts) for part in range(num_parts + 1)]
    return [range(*pair) for pair in pairwise(borders)]


def _places(rows: Sequence[Row]) -> dict[str, Tensor]:
    return {"index": torch.tensor([row["index"] for row in rows])}
