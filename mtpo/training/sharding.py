"""Weights that are spread over processes: FSDP2's DTensors, and DeepSpeed's ZeRO-3."""

from __future__ import annotations

from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from mtpo.errors import GuardError


def asked_for() -> Literal["FSDP", "DeepSpeed"] | None:
    """What accelerate's launcher was told to spread the weights with."""
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return "FSDP"
    return "DeepSpeed" if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") else None


def honour_fsdp(accelerator: Accelerator) -> None:
    """Make accelerate shard where its launcher was told to, and leave the types of numbers to autocast.

    accelerate reads the settings of FSDP on accelerators only: on CPUs it would train whole copies in silence.
    Its policy for bfloat16 would round what the model returns, log-probs, and sum gradients in bfloat16.
    """
    if asked_for() != "FSDP":
        return
    state = accelerator.state
    if state.distributed_type is DistributedType.MULTI_CPU:
        state.fsdp_plugin = FullyShardedDataParallelPlugin()  # from what the launcher left in the environment
        for shared in (PartialState(), state):  # the one is copied into the other now and then
            shared.distributed_type = DistributedType.FSDP
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 2:
        plugin.mixed_precision_policy = None


def compute_in_bfloat16(model: Any, device: torch.device) -> None:
    """Put a causal LM's forward under autocast, as accelerate does for DDP and as the reference is scored.

    FSDP2's and DeepSpeed's own ways round all that the layers hand on to bfloat16, which is other maths. autocast's
    cache would hold on to weights that were gathered for one layer only.
    """
    model.forward = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)(model.forward)


def load_models_whole() -> None:
    """Undo that DeepSpeed's config, once read, has transformers cut up every model that it loads or makes.

    Models are scored, copied and patched before the trainer, which cuts up the policy alone.
    """
    if asked_for() == "DeepSpeed":
        unset_hf_deepspeed_config()


def shard(module: nn.Module, layer_classes: frozenset[str]) -> None:
    """Spread the weights over all processes, gathered layer by layer; FSDP2 also averages the gradients."""
    for layer in module.modules():
        if type(layer).__name__ in layer_classes:
            fully_shard(layer)
    fully_shard(module)


class WeightsAreSharded(TrainerCallback):
    """Before the first step, checks that the weights are spread over the processes if that was asked for."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        model = kwargs["model"]
        assert isinstance(model, nn.Module)
        require_sharded(model)


def require_sharded(model: nn.Module) -> None:
    """
    Raises:
        GuardError: accelerate's launcher was told to spread the weights, but this process holds them whole.
    """
    method, found = asked_for(), PartialState().distributed_type
    if method == "DeepSpeed" and found is not DistributedType.DEEPSPEED:
        raise GuardError(
            f"accelerate was launched with DeepSpeed, but runs {found.value}: DeepSpeed needs an accelerator"
        )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    shards = sum(isinstance(parameter, DTensor) for parameter in trainable)
    if method == "FSDP" and shards < len(trainable):
        raise GuardError(
            f"accelerate was launched with FSDP, but only {shards} of {len(trainable)} parameters are sharded "
            "(DTensors): set fsdp_version: 2 in its config, and launch more than one process"
        )
