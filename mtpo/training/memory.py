"""How much GPU memory a training run needs, from the model's config and the settings alone.

The model is built on the meta device and run forward on fake tensors, which have a shape and a type but no storage:
parameters are exact, and activations are what autograd saves, with the attention, autocast and padding of a real
run. Not counted are the CUDA context, fragmentation, and what a kernel needs while it runs: leave a tenth of the GPU.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from mtpo.errors import InputError
from mtpo.logprobs import MAX_KEPT, MAX_TILE
from mtpo.models import DTYPES, exact_attention, unwrapped
from mtpo.training.adapters import with_adapter
from mtpo.training.optim import JointOptimizer, make_optimizer
from mtpo.training.precision import keep_trained_weights_in_float32
from mtpo.training.settings import TrainingSettings

Strategy = Literal["ddp", "fsdp", "zero3"]
"""ddp: every GPU has everything; fsdp, zero3: weights, gradients and optimiser states are spread over the GPUs."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU at the end of a forward pass over the longest rows, when most is held."""

    weights: int
    """As they are stored: float32 where they are trained, unless pure_bfloat16."""
    copies: int
    """Weights again: whole layers, gathered from all GPUs, or what autocast made bfloat16."""
    gradients: int
    """With ddp on several GPUs twice: in the buckets that are sent around, too."""
    optimizer: int
    value_network: int
    """dro_v's, with its gradients and optimiser states: whole on every GPU."""
    activations: int
    head: int
    """Tiles of logits, hidden states of action tokens, the head's gradient while it is summed up, and its cast."""

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Sizes:
    """Of a model."""

    num_parameters: int
    num_trained: int


def estimate(
    config: Any, settings: TrainingSettings, *, num_gpus: int, strategy: Strategy, in_4bit: bool = False
) -> tuple[Sizes, Memory]:
    """What every GPU holds when a micro-batch of rows of `settings.max_length` has been run forward.

    Args:
        config: of a causal language model; rows are as long as its context if `max_length` is None.
        in_4bit: the frozen linear layers of the backbone are quantised.

    Raises:
        InputError: `batch_size` does not divide over the GPUs.
    """
    model = _trained_model(config, settings)
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    shards = 1 if strategy == "ddp" else num_gpus
    sent = 2 if strategy == "ddp" and num_gpus > 1 else 1
    saved = _saved_by_quantising(model) if in_4bit else 0
    memory = Memory(
        weights=(_bytes(parameters) - saved) // shards,
        copies=_copies(model, settings, is_sharded=shards > 1),
        gradients=sent * _bytes(trained) // shards,
        optimizer=_state_bytes(model, settings) // shards,
        value_network=_value_network(model, settings),
        activations=_activations(config, settings, num_gpus),
        head=_head(model, config, settings, num_gpus),
    )
    return Sizes(_count(parameters), _count(trained)), memory


def saved_bytes(model: nn.Module, shape: tuple[int, int], *, autocast: bool) -> int:
    """What autograd keeps of a forward pass over ids of this shape, (B, T), parameters and their casts left out."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage
        return tensor

    attention_mask = torch.ones(shape, dtype=torch.long)
    attention_mask[:, -1] = 0  # without padding there would be no mask to keep
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model.base_model(  # pyright: ignore[reportCallIssue]
            input_ids=torch.ones(shape, dtype=torch.long), attention_mask=attention_mask, use_cache=False
        )
    casts = 2 * _count(_linear_weights(model)) if autocast else 0
    return sum(storage.nbytes() for storage in saved.values()) - casts


def micro_batch(settings: TrainingSettings, num_gpus: int) -> int:
    """Trajectories of a forward pass on one GPU; a pair is two.

    Raises:
        InputError: `batch_size` does not divide over the GPUs.
    """
    rows = settings.micro_batch_size or max(1, settings.batch_size // num_gpus)
    if settings.batch_size % (rows * num_gpus):
        raise InputError(
            f"batch_size {settings.batch_size} is no multiple of micro_batch_size {rows} times {num_gpus} GPUs"
        )
    return rows * (2 if settings.recipe.rows == "pair" else 1)


def _trained_model(config: Any, settings: TrainingSettings, num_layers: int | None = None) -> Any:
    """As `train` has it before the first step, of the first layers only if `num_layers` says so."""
    config = copy.deepcopy(config)
    if num_layers is not None:
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:num_layers]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=exact_attention(config), dtype=DTYPES[settings.weights_dtype]
        )
        model = with_adapter(model, settings)
    if settings.computes_in_bfloat16:
        keep_trained_weights_in_float32(model)
    return model


def _on_cpu(model: nn.Module) -> nn.Module:
    """From the meta device, where nothing is cast; within a FakeTensorMode that takes no memory, either."""
    moved: dict[int, Tensor] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            new = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad)
            setattr(module, name, moved.setdefault(id(parameter), new))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return model


def _activations(config: Any, settings: TrainingSettings, num_gpus: int) -> int:
    """From one layer and two, all layers alike; with checkpointing their inputs, and all of one."""
    shape = micro_batch(settings, num_gpus), settings.max_length or config.max_position_embeddings
    autocast = settings.computes_in_bfloat16
    models = [unwrapped(_trained_model(config, settings, num_layers)) for num_layers in (1, 2)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        one, two = (saved_bytes(_on_cpu(model), shape, autocast=autocast) for model in models)
    layer, layers = two - one, config.num_hidden_layers
    if not settings.gradient_checkpointing:
        return one + (layers - 1) * layer
    stream = DTYPES[settings.weights_dtype].itemsize * shape[0] * shape[1] * config.hidden_size
    return one + layers * stream


def _copies(model: Any, settings: TrainingSettings, *, is_sharded: bool) -> int:
    compute = 2 if settings.dtype == "bfloat16" else DTYPES[settings.dtype].itemsize
    if is_sharded:  # two layers, one of them fetched ahead, and what is in no layer
        layers = unwrapped(model).base_model.layers
        largest = max(_count(layer.parameters()) for layer in layers)
        outside = _count(model.parameters()) - sum(_count(layer.parameters()) for layer in layers)
        return compute * (2 * largest + outside)
    cast = [weight for weight in _linear_weights(model) if weight.dtype == torch.float32]
    return 2 * _count(cast) if settings.computes_in_bfloat16 else 0


def _head(model: Any, config: Any, settings: TrainingSettings, num_gpus: int) -> int:
    """At most: as if all tokens were actions."""
    tokens = micro_batch(settings, num_gpus) * (settings.max_length or config.max_position_embeddings)
    selected = 2 * tokens * config.hidden_size * 4
    logits = tokens * config.vocab_size
    tiles = 4 * (3 * min(MAX_TILE, logits) + min(MAX_KEPT, logits))
    weight = unwrapped(model).get_output_embeddings().weight
    gradient = 4 * weight.numel() if weight.requires_grad else 0
    cast = 2 * weight.numel() if settings.computes_in_bfloat16 and weight.dtype == torch.float32 else 0
    return selected + tiles + gradient + cast


def _saved_by_quantising(model: Any) -> int:
    """NF4 with quantised scales takes 4.127 bits a weight (arXiv 2305.14314, section 3)."""
    frozen = [weight for weight in _linear_weights(model) if not weight.requires_grad]
    return _bytes(frozen) - int(_count(frozen) * 4.127 / 8)


def _value_network(model: Any, settings: TrainingSettings) -> int:
    """Weights, gradients and two states of AdamW, float32."""
    if settings.method != "dro_v":
        return 0
    return 4 * 4 * _count(unwrapped(model).base_model.parameters())


def _state_bytes(model: Any, settings: TrainingSettings) -> int:
    """Two moments a weight for AdamW, one for Muon."""
    optimizer = make_optimizer(model, settings)
    parts = optimizer.parts if isinstance(optimizer, JointOptimizer) else (optimizer,)
    return sum(
        (2 if isinstance(part, torch.optim.AdamW) else 1) * _bytes(group["params"])
        for part in parts
        for group in part.param_groups
    )


def _linear_weights(model: nn.Module) -> list[Tensor]:
    """Of the backbone: the head casts nothing."""
    modules = unwrapped(model).base_model.modules()
    return [module.weight for module in modules if isinstance(module, nn.Linear)]


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)
