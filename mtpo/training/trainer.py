"""One trainer for all methods, on `transformers.Trainer`: its loop, wrappers, checkpoints and logging."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from mtpo.batches import PairCollator, Row, SingleCollator, row_name
from mtpo.divergences import Comparison, logps_and_divergences
from mtpo.errors import GuardError, InputError
from mtpo.logprobs import entropies, install
from mtpo.losses import LossOut, kto_baseline, masked_sum
from mtpo.models import unwrapped
from mtpo.scoring import batch_logps
from mtpo.training.callbacks import LOOK
from mtpo.training.distill import OwnSamples
from mtpo.training.methods import Scores
from mtpo.training.metrics import (
    CollapseMonitor,
    StepMetrics,
    advantage_std,
    explained_variance,
    pair_metrics,
)
from mtpo.training.optim import lr_factor, make_optimizer
from mtpo.training.settings import TrainingSettings
from mtpo.training.sharding import asked_for, compute_in_bfloat16, honour_fsdp, load_models_whole
from mtpo.training.value import ValueTraining, prompt_ends

Batch = dict[str, Tensor]

FILLER = "is_filler"
"""In rows and batches that count for nothing."""

ZERO_MARGIN = {torch.float64: 1e-9, torch.float32: 1e-6, torch.bfloat16: 0.02}
"""How far log p of one token may differ between two batches of the same weights: they differ in padding."""


class NotFinite(GuardError):
    """Log-probs or a loss are infinite or no numbers."""


class TrajectoryTrainer(Trainer):
    """Trains on rows in the order given.

    Losses are means over the global batch (of sft, over its action tokens): neither gradient accumulation nor the
    number of devices changes a result.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: list[Row],
        settings: TrainingSettings,
        args: TrainingArguments,
        tokenizer: PreTrainedTokenizerBase | None,
        callbacks: list[TrainerCallback],
        *,
        starts_at_reference: bool,
        value: ValueTraining | None = None,
        comparison: Comparison | None = None,
        own_samples: OwnSamples | None = None,
    ) -> None:
        """
        Args:
            rows: one for every draw, of the kind that the method takes, with reference log-probs and, for kto,
                mismatched rows.
            starts_at_reference: policy and reference are equal at step 0, which is then checked.
            value: the value network that dro_v trains beside the policy.
            comparison: with the model whose distributions a method wants, on this device.
            own_samples: what takes the place of `rows` in steps whose sequences the policy samples itself.
        """
        self.own_samples = own_samples
        self.comparison = comparison
        self.value = value
        if value is not None:
            callbacks = [*callbacks, value]
        self.settings = settings
        self.rows = rows
        self.num_draws = len(rows)
        self.held_out: list[Row] = []
        """Rows to `evaluate` on, as those that are trained on: with reference log-probs, for kto mismatched rows."""
        self.starts_at_reference = starts_at_reference
        self.of_samples: dict[str, float] = {}
        self.entropy: float | None = None
        """Per token, over some action tokens of the micro-batch at hand."""
        self.z0: Tensor | None = None
        self.desirable_share: Tensor | None = None
        self.metrics = StepMetrics()
        self.monitor = CollapseMonitor()
        self.last_log = time.monotonic()
        install(unwrapped(model))
        if settings.computes_in_bfloat16 and asked_for():
            compute_in_bfloat16(unwrapped(model), args.device)
        use_cache = model.config.use_cache
        pad_id = getattr(tokenizer, "pad_token_id", None) or 0
        collator = PairCollator if settings.recipe.rows == "pair" else SingleCollator
        super().__init__(
            model=model,
            args=args,
            train_dataset=_Indexed(rows, args.per_device_train_batch_size * args.world_size),  # pyright: ignore
            data_collator=_WithoutFiller(collator(pad_id, settings.layout)),  # pyright: ignore
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the global count
        model.config.use_cache = use_cache  # Trainer switches it off, and would save the model so

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        honour_fsdp(self.accelerator)
        load_models_whole()
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The micro-batches of one step, and how many examples they hold over all processes."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if self.own_samples is not None and self.rows is not self.held_out:
            batches = self._with_own_samples(batches, self.own_samples)
        count = torch.tensor(sum(self._count(batch) for batch in batches), device=device)
        if self.settings.method == "kto":
            self.z0 = self._baseline(batches, "kl_")
        total = self.accelerator.gather(count).sum()  # pyright: ignore
        if self.settings.recipe.rows == "label":
            labels = [batch["labels"] for batch in batches if FILLER not in batch]
            desirable = torch.tensor(sum(int(part.sum()) for part in labels), device=device)
            self.desirable_share = self.accelerator.gather(desirable).sum() / total  # pyright: ignore
        return batches, total

    def compute_loss(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """This micro-batch's share of the global batch's loss."""
        assert num_items_in_batch is not None
        scores = self._scores(model, inputs)
        if self.starts_at_reference and self.state.global_step == 0:
            self._check_zero_margin(scores, inputs)
        out = self.settings.recipe.loss(scores, self.settings.options)
        if not torch.isfinite(out.loss):
            raise NotFinite(f"the loss is {out.loss.item()} on {self._names(inputs)}")
        count = self._count(inputs)
        if count:
            self._record(scores, out, inputs)
        # DDP averages gradients over processes, and so does the logged loss.
        return out.loss * (count / num_items_in_batch * self.accelerator.num_processes)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last call, over all processes, to what transformers logs."""
        if "loss" in logs:
            logs = logs | self.metrics.take()
            logs |= advantage_std(logs)
            if self.value is not None:
                logs |= explained_variance(logs)
            drawn = min(self.state.global_step * self.settings.batch_size, self.num_draws)
            self.state.epoch = self.settings.epochs * drawn / self.num_draws
            now = time.monotonic()
            logs["tokens_per_s"] = logs["tokens"] / (now - self.last_log)
            if logs["tokens"]:  # a step may be skipped
                logs["action_share"] = logs["action_tokens"] / logs["tokens"]
            self.last_log = now
            self.monitor.check(self.state.global_step, logs)
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log, and return, how the policy does on what is held out; each name begins with `eval_`."""
        values = {f"{LOOK}{name}": value for name, value in self._look().items()}
        cast(nn.Module, self.model_wrapped).train()
        self.log(values)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, values)
        self.last_log = time.monotonic()  # tokens_per_s is that of training
        return values

    def _look(self) -> dict[str, float]:
        """Loss and metrics on `held_out`, as means over these rows. KTO's baseline is that of each batch."""
        training = self.rows, self.metrics, self.z0, self.desirable_share
        self.rows, self.metrics, self.of_samples = self.held_out, StepMetrics(), {}
        model, device = cast(nn.Module, self.model_wrapped), self.args.device
        model.eval()
        loss, weight = torch.zeros((), dtype=torch.float64, device=device), 0.0
        for batches in self._held_out_batches():
            batches, total = self.get_batch_samples(iter(batches), len(batches), device)
            for batch in batches:
                with self.compute_loss_context_manager():
                    share = self.compute_loss(model, self._prepare_inputs(batch), num_items_in_batch=total)
                loss += share.double() * total / self.accelerator.num_processes
            weight += total.item()
        values = {"loss": self.accelerator.gather(loss).sum().item() / weight} | self.metrics.take()  # pyright: ignore
        self.rows, self.metrics, self.z0, self.desirable_share = training
        return values

    def _held_out_batches(self) -> Iterator[list[Batch]]:
        """The micro-batches that this process takes of each batch."""
        size, processes = self.args.per_device_train_batch_size, self.args.world_size
        dataset = _Indexed(self.held_out, size * processes)
        starts = range(self.args.process_index * size, len(dataset), size * processes)
        batches = [self.data_collator([dataset[start + i] for i in range(size)]) for start in starts]
        for first in range(0, len(batches), self.args.gradient_accumulation_steps):
            yield batches[first : first + self.args.gradient_accumulation_steps]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.settings.optimizer == "muon" and asked_for():
            raise InputError(f"optimizer 'muon' needs whole matrices, which {asked_for()} cuts up: use adamw")
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model if model is None else model, self.settings)  # pyright: ignore
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            s = self.settings
            factor = lr_factor(s.lr_schedule, num_training_steps, s.warmup_steps, s.final_lr_ratio)
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)  # pyright: ignore
        return self.lr_scheduler

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # counting parameters at every step would cost a small model more than it is worth

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.value is not None:
            self.value.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.value is not None and checkpoint is not None:
            self.value.load(Path(checkpoint))

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # pyright: ignore

    def _count(self, batch: Batch) -> int:
        """What the loss is a mean over: rows, or action tokens where each token counts alike; 0 of filler."""
        if FILLER in batch:
            return 0
        if self.settings.recipe.rows == "single":
            return int(batch["completion_mask"].sum())
        return len(batch["index"])

    def _with_own_samples(self, batches: list[Batch], own: OwnSamples) -> list[Batch]:
        """The micro-batches of a step, filled with what the policy has sampled if it is the turn of that."""
        step = self.state.global_step
        if not own.is_due(step):
            self.of_samples = {"on_policy": 0.0}
            return batches
        self.of_samples = {"on_policy": 1.0, "staleness": float(own.staleness(step))}
        places = [batch["index"].tolist() for batch in batches]
        policy = self.accelerator.unwrap_model(self.model_wrapped)
        rows = own.rows(policy, step, [place for part in places for place in part])
        for place, row in zip((place for part in places for place in part), rows, strict=True):
            self.rows[place] = row
        return [self.data_collator([self.train_dataset[place] for place in part]) for part in places]  # pyright: ignore

    def _scores(self, model: nn.Module, batch: Batch) -> Scores:
        divergences = None
        if self.comparison is not None:
            scored = logps_and_divergences(model, batch, self.comparison, watch=self._note_entropy)
            logps, divergences = scored
        else:
            logps = batch_logps(model, batch, watch=self._note_entropy)
        sums = self._sums(logps, batch)
        rewards = values = None
        if self.value is not None and self.value.reward is not None:
            rewards = self.value.reward(batch["labels"])
            values = self.value.network(batch["input_ids"], prompt_ends(batch["completion_mask"])).squeeze(-1)
        return Scores(
            logps=logps,
            mask=batch["completion_mask"],
            sums=sums,
            ref_logps=batch.get("ref_logps"),
            labels=batch.get("labels"),
            z0=self.z0,
            desirable_share=self.desirable_share,
            rewards=rewards,
            values=values,
            divergences=divergences,
        )

    def _sums(self, logps: Tensor, batch: Batch, prefix: str = "") -> Tensor:
        """Of log-probs, (N, T), in float64, (N,): a float32 sum of a long trajectory loses 1e-4."""
        finite = torch.isfinite(logps).all(-1)
        if not finite.all():
            raise NotFinite(f"log-probs are not finite on {self._names(batch, ~finite)}")
        return masked_sum(logps.double(), batch[f"{prefix}completion_mask"])

    @torch.no_grad()
    def _baseline(self, batches: Sequence[Batch], prefix: str) -> Tensor:
        """KTO's z0 over all micro-batches of all processes, at the weights that the step starts from.

        Args:
            prefix: of the trajectories whose log-ratios it is the mean of.
        """
        rho = [torch.zeros(0, dtype=torch.float64, device=self.args.device)]  # a process may have none
        for batch in batches:
            batch = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                logps = batch_logps(self.model_wrapped, batch, prefix)  # pyright: ignore[reportArgumentType]
            sums = self._sums(logps, batch, prefix)
            ref_logps = masked_sum(batch[f"{prefix}ref_logps"].double(), batch[f"{prefix}completion_mask"])
            rho.append((sums - ref_logps)[:0] if FILLER in batch else sums - ref_logps)
        return kto_baseline(torch.cat(rho))

    def _check_zero_margin(self, scores: Scores, batch: Batch) -> None:
        dtype = torch.bfloat16 if self.settings.computes_in_bfloat16 else unwrapped(self.model).dtype  # pyright: ignore
        tolerance = ZERO_MARGIN[dtype] * scores.mask.sum(-1) + 1e-4
        worst = (scores.rho.abs() - tolerance).argmax()
        if scores.rho[worst].abs() > tolerance[worst]:
            raise GuardError(
                f"policy and reference are the same model, but their log-probs differ by "
                f"{scores.rho[worst].item():.3g} nats on {self._names(batch, worst[None])}: a stale cache of "
                "reference log-probs, or a model that does not repeat itself"
            )

    def _note_entropy(self, logits: Tensor) -> None:
        self.entropy = entropies(logits).mean().item() if len(logits) else None

    def _record(self, scores: Scores, out: LossOut, batch: Batch) -> None:
        values = {"tokens": float(batch["attention_mask"].sum()), "action_tokens": float(scores.mask.sum())}
        if self.entropy is not None:
            values["entropy"] = self.entropy
        if self.settings.recipe.rows == "pair":
            values |= pair_metrics(scores)
        self.metrics.add(values | self.of_samples | out.metrics, weight=self._count(batch))

    def _names(self, batch: Batch, which: Tensor | None = None) -> str:
        """The rows of a micro-batch, or those among its trajectories that `which` marks or lists."""
        index = batch["index"]
        if which is not None:
            trajectories = which.nonzero().flatten() if which.dtype == torch.bool else which
            index = index[(trajectories % len(index)).unique()]  # a pair has a chosen and a rejected half
        names = [row_name(self.rows[i]) for i in index.tolist()]
        return "; ".join(names[:8]) + (f"; and {len(names) - 8} more" if len(names) > 8 else "")


class _Indexed(torch.utils.data.Dataset[Row]):
    """Rows that know their place, so that a guard can name them, and filler up to a multiple of `share`.

    What all processes take at once is a share. Left to itself, accelerate would fill the last one with rows
    of the first, which would be trained on once more.
    """

    def __init__(self, rows: Sequence[Row], share: int) -> None:
        self.rows = rows
        self.length = math.ceil(len(rows) / share) * share

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> Row:
        if place < len(self.rows):
            return self.rows[place] | {"index": place}
        return self.rows[-1] | {"index": len(self.rows) - 1, FILLER: True}


@dataclass(frozen=True)
class _WithoutFiller:
    """Collates what is no filler, or else one row of it: every process has to take part in every forward pass."""

    collate: Callable[[Sequence[Row]], Batch]

    def __call__(self, rows: Sequence[Row]) -> Batch:
        real = [row for row in rows if FILLER not in row]
        return self.collate(real) if real else self.collate(rows[:1]) | {FILLER: torch.ones(1)}
