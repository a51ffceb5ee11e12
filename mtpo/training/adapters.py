"""LoRA: what is trained when the model itself stays as it is.

LoRA (arXiv 2106.09685, eq. 3) adds `alpha / rank * B A x` to what a matrix W makes of x. B starts at 0, so the policy
starts as the model, and the model without adapter is the reference: no second one is ever in memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mtpo.errors import InputError
from mtpo.models import unwrapped
from mtpo.training.settings import TrainingSettings

ALL_LINEAR = "all-linear"
"""Among `lora_targets`: every linear layer but the head."""


def with_adapter(model: Any, settings: TrainingSettings) -> Any:
    """The model with a LoRA adapter to train, all else frozen; the model itself if none is asked for.

    An adapter that the model has already is trained on. A new one is a function of the seed.

    Raises:
        InputError: peft is not installed, the model has no such layers, the model's own adapter has other options,
            or nothing would be trained.
    """
    if hasattr(model, "peft_config"):
        return _own_adapter(model, settings)
    if settings.lora_rank is None:
        if getattr(model, "is_quantized", False):
            raise InputError(
                "a quantised model cannot be trained itself, only with an adapter: set lora_rank"
            )
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError(f"lora_rank needs peft, pip install 'mtpo[peft]': {error}") from error
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_rank,
        lora_alpha=2 * settings.lora_rank if settings.lora_alpha is None else settings.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=settings.lora_dropout,
        target_modules=target_modules(model, settings.lora_targets),
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return get_peft_model(model, config)


def target_modules(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """The last parts of the names of the layers that get an adapter, sorted: `down_proj`, `q_proj`, ...

    Raises:
        InputError: a target is the name of no linear layer.
    """
    head = unwrapped(model).get_output_embeddings()
    linear = {
        name.rpartition(".")[2]: module is head
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)  # bitsandbytes' 4-bit layers are such, too
    }
    chosen: set[str] = set()
    for target in targets:
        if target == ALL_LINEAR:
            chosen |= {name for name, is_head in linear.items() if not is_head}
        elif target in linear:
            chosen.add(target)
        else:
            raise InputError(
                f"lora_targets: the model has no linear layer {target!r}; it has {', '.join(sorted(linear))}"
            )
    return sorted(chosen)


def check_merge(model: Any, *, is_sharded: bool) -> None:
    """
    Raises:
        InputError: the adapter cannot become part of the model's weights without changing what they compute, or no
            process holds all of them.
    """
    base = unwrapped(model)
    if is_sharded:
        raise InputError("merge_adapter needs the whole model in one process: train without, then merge")
    if getattr(base, "is_quantized", False):
        raise InputError("merge_adapter would round the adapter to 4 bits: save it beside the model instead")
    head = base.get_output_embeddings()
    if hasattr(head, "base_layer") and base.config.get_text_config().tie_word_embeddings:
        raise InputError(
            "merge_adapter would change the input embeddings along with the head, which are the same weights"
        )


def merged(model: Any) -> Any:
    """The model with its adapter added to its weights, in float32 or better: lower types would round it away."""
    if unwrapped(model).dtype != torch.float64:
        model = model.float()
    return model.merge_and_unload()


def _own_adapter(model: Any, settings: TrainingSettings) -> Any:
    config = model.peft_config[model.active_adapter]
    if settings.lora_rank is None:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise InputError(
                f"the model has an adapter of rank {config.r}: set lora_rank {config.r} to train it on, or take "
                "a merged model"
            )
        return model
    given = {
        "lora_rank": (settings.lora_rank, config.r),
        "lora_alpha": (settings.lora_alpha, config.lora_alpha),
    }
    for name, (asked, found) in given.items():
        if asked is not None and asked != found:
            raise InputError(
                f"{name} is {asked}, but the model's own adapter, which is trained on, has {found}"
            )
    model.set_adapter(model.active_adapter)  # switches its gradients on
    return model
