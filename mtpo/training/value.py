"""The value network: what reward a prompt (DRO-V) or the state before a turn (MTPO) promises, learnt beside the
policy.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mtpo.batches import Row
from mtpo.errors import InputError
from mtpo.models import unwrapped
from mtpo.training.optim import adamw, lr_factor
from mtpo.training.settings import TrainingSettings
from mtpo.training.sharding import asked_for, shard

FILE = "value.pt"
"""In a checkpoint: weights, optimizer and schedule."""


Reward = Callable[[Tensor], Tensor]


def standardized_reward(rows: Sequence[Row]) -> Reward:
    """From labels, (N,) bool, to 1 and 0 shifted and scaled to mean 0 and variance 1 over `rows`, float64.

    Raises:
        InputError: all rows have the same label, so nothing tells a reward from another.
    """
    share = sum(row["label"] for row in rows) / len(rows)
    if share in (0, 1):
        raise InputError(f"dro_v needs desirable and undesirable rows; all {len(rows)} have the same label")
    return lambda labels: (labels.double() - share) / math.sqrt(share * (1 - share))


class ValueNetwork(nn.Module):
    """A copy of a language model without its head, and a scalar head that starts at 0."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        inner = unwrapped(model)
        self.backbone = copy.deepcopy(inner.base_model)
        self.head = nn.Linear(inner.config.get_text_config().hidden_size, 1, dtype=inner.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor, places: Tensor) -> Tensor:
        """V of what stands up to certain tokens, these included.

        Args:
            input_ids: (B, T); tokens after a place do not matter to it.
            places: (B, K) int64, positions.

        Returns:
            (B, K) float32, or the float64 of a float64 model.
        """
        context = input_ids[:, : int(places.max()) + 1]
        hidden = self.backbone(input_ids=context, use_cache=False).last_hidden_state  # (B, P, D)
        read = hidden.take_along_dim(places[..., None], 1)  # (B, K, D)
        values = self.head(read).squeeze(-1).clone()  # no view: FSDP2 hangs a hook on what is returned
        return values if values.dtype == torch.float64 else values.float()


def prompt_ends(completion_mask: Tensor) -> Tensor:
    """(B, 1): the position of the last prompt token, the one before the first that the mask marks."""
    return completion_mask.argmax(-1, keepdim=True) - 1


class ValueTraining(TrainerCallback):
    """Takes a step on the value network whenever the policy takes one.

    The policy's trainer adds the value loss to its own, so one backward pass fills the gradients of both. Where
    the policy is sharded, by FSDP or DeepSpeed, FSDP2 shards the network; where it is whole on every process, its
    gradients are averaged here, for it has no part in the policy's wrapper.
    """

    def __init__(
        self, network: ValueNetwork, reward: Reward | None, settings: TrainingSettings, num_steps: int
    ) -> None:
        """
        Args:
            reward: of dro_v.
        """
        self.network = network.train()
        if asked_for() and PartialState().num_processes > 1:
            shard(network, frozenset(network.backbone._no_split_modules or ()))
        self.reward = reward
        self.max_grad_norm = settings.max_grad_norm
        learning_rate = settings.value_learning_rate or 5 * settings.learning_rate
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = adamw(self.parameters, settings, learning_rate)
        factor = lr_factor(settings.lr_schedule, num_steps, settings.warmup_steps, settings.final_lr_ratio)
        self.scheduler = LambdaLR(self.optimizer, factor)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        processes = PartialState()
        if processes.num_processes > 1:
            for parameter in self.parameters:
                if parameter.grad is not None and not isinstance(parameter, DTensor):
                    torch.distributed.all_reduce(parameter.grad)
                    parameter.grad /= processes.num_processes
        nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def save(self, folder: Path) -> None:
        """Write one file of whole weights; to be called by all processes."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        network, optimizer = get_state_dict(self.network, self.optimizer, options=options)
        if PartialState().is_main_process:
            schedule = self.scheduler.state_dict()
            torch.save({"network": network, "optimizer": optimizer, "scheduler": schedule}, folder / FILE)

    def load(self, folder: Path) -> None:
        saved = torch.load(folder / FILE, map_location="cpu")
        set_state_dict(
            self.network,
            self.optimizer,
            model_state_dict=saved["network"],
            optim_state_dict=saved["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )
        self.scheduler.load_state_dict(saved["scheduler"])
