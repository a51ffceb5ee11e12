"""What a training run would need and whether its config works, before a GPU is rented: `--dry_run` of a recipe.

The model is built without weights, so that its parameters and the memory on each GPU are known, and a copy of it that
is shrunk to a few thousand weights takes one real step under the same settings on random rows.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_args

from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from mtpo.batches import Row, RowKind
from mtpo.errors import InputError
from mtpo.models import DTYPES, exact_attention
from mtpo.training import TrainingSettings, TrainResult, train
from mtpo.training.memory import Memory, Sizes, Strategy, estimate, micro_batch
from recipes.architectures import architecture

GIB = 2**30
NUM_IDS = 64
"""Vocabulary of the shrunken copy; the ids 0, 1 and 2 are padding, end and beginning."""
NUM_ROWS = 4


@dataclass(frozen=True, kw_only=True)
class DryRunOptions:
    """Tell what training needs, instead of training."""

    dry_run: bool = field(
        default=False, metadata={"help": "print the memory per GPU, take a step on a tiny copy, and stop"}
    )
    gpus: int | None = field(default=None, metadata={"help": "of a dry run; 8 by default"})
    strategy: str | None = field(
        default=None, metadata={"help": f"of a dry run: {', '.join(get_args(Strategy))}; fsdp by default"}
    )

    @property
    def num_gpus(self) -> int:
        return self.gpus or 8

    def __post_init__(self) -> None:
        for name in ("gpus", "strategy"):
            if getattr(self, name) is not None and not self.dry_run:
                raise InputError(f"--{name} has no effect without --dry_run: the launcher decides it")
        if self.gpus is not None and self.gpus < 1:
            raise InputError(f"--gpus must be at least 1, got {self.gpus}")
        if self.strategy not in (None, *get_args(Strategy)):
            raise InputError(
                f"--strategy is {self.strategy!r}; expected one of {', '.join(get_args(Strategy))}"
            )


def dry_run(
    settings: TrainingSettings,
    options: DryRunOptions,
    model: str,
    *,
    in_4bit: bool = False,
    plan: Callable[[Sizes, Memory], str] | None = None,
) -> str:
    """Print what training `model` needs; the last line says that a step worked.

    Args:
        plan: says what else is to be done with a model of these sizes, and is printed in between.

    Raises:
        InputError: the model is unknown, the batch does not divide over the GPUs, or a setting is refused.
    """
    num_gpus, strategy = options.num_gpus, options.strategy or "fsdp"
    config, source = architecture(model)
    sizes, memory = estimate(config, settings, num_gpus=num_gpus, strategy=strategy, in_4bit=in_4bit)  # pyright: ignore[reportArgumentType]
    print(
        f"{model} ({source}): {config.model_type}, {config.num_hidden_layers} layers, hidden size "
        f"{config.hidden_size}, {sizes.num_parameters:,} parameters, {sizes.num_trained:,} of them trained"
    )
    length = settings.max_length or config.max_position_embeddings
    print(
        f"GiB on each of {num_gpus} GPUs ({strategy}), {micro_batch(settings, num_gpus)} trajectories of {length} "
        f"tokens at once{', checkpointed' if settings.gradient_checkpointing else ''}:"
    )
    print("\n".join(memory_table(memory)))
    if plan is not None:
        print(plan(sizes, memory))
    small = shrunken(config)
    result = one_step(small, settings)
    return (
        f"one step of {settings.method} on a copy of {small.num_hidden_layers} layers and hidden size "
        f"{small.hidden_size}: loss {result.metrics['loss']:.4f}, gradient norm {result.metrics['grad_norm']:.3g}"
    )


def memory_table(memory: Memory) -> list[str]:
    """A line for each part that is not 0, one for the reference, and the sum."""
    parts = {name.replace("_", " "): size for name, size in dataclasses.asdict(memory).items() if size}
    lines = [f"  {name:<14}{size / GIB:8.2f}" for name, size in parts.items()]
    reference = f"  {'reference':<14}{0:8.2f}  its log-probs are computed before training, and kept on disk"
    return [*lines, reference, f"  {'total':<14}{memory.total / GIB:8.2f}"]


def shrunken(config: Any) -> Any:
    """The same family with few and narrow layers: its kinds of attention, soft-caps and heads that share keys."""
    small = copy.deepcopy(config)
    groups = max(1, config.num_attention_heads // config.num_key_value_heads)
    small.hidden_size, small.intermediate_size, small.head_dim = 32, 64, 8
    small.num_attention_heads, small.num_key_value_heads = 4, max(1, 4 // groups)
    small.num_hidden_layers, small.vocab_size, small.max_position_embeddings = 2, NUM_IDS, 128
    if getattr(config, "layer_types", None):
        small.layer_types = (sorted(set(config.layer_types), reverse=True) * 2)[:2]
    if getattr(config, "sliding_window", None):
        small.sliding_window = 8
    if hasattr(config, "query_pre_attn_scalar"):
        small.query_pre_attn_scalar = 8
    small.pad_token_id, small.eos_token_id, small.bos_token_id = 0, 1, 2
    return small


def one_step(config: Any, settings: TrainingSettings) -> TrainResult:
    """Train a model of this config, randomly initialised, for one step on random rows."""
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=exact_attention(config), dtype=DTYPES[settings.weights_dtype]
    )
    settings = dataclasses.replace(
        settings, batch_size=NUM_ROWS, micro_batch_size=1, epochs=1, num_checkpoints=0, max_length=None
    )
    transformers_logging.disable_progress_bar()  # what is saved is thrown away
    with tempfile.TemporaryDirectory() as folder:
        return train(model, random_rows(settings.recipe.rows), settings, folder, progress=False)


def random_rows(kind: RowKind, *, seed: int = 0) -> list[Row]:
    """Trajectories of two turns with tool output between them."""
    rng, rows = random.Random(seed), []
    for number in range(NUM_ROWS):
        prompt = [2, 3 + number]
        sides = [_turns(rng, prompt) for _ in range(2 if kind == "pair" else 1)]
        row: Row = {"problem_id": f"random/{number}"}
        for side, (ids, mask) in zip(
            ("chosen_", "rejected_") if kind == "pair" else ("",), sides, strict=True
        ):
            row |= {f"{side}sample": 0, f"{side}input_ids": ids, f"{side}completion_mask": mask}
        rows.append(row | ({"label": number % 2 == 0} if kind == "label" else {}))
    return rows


def _turns(rng: random.Random, prompt: list[int]) -> tuple[list[int], list[int]]:
    mask = [1] * rng.randint(2, 6) + [0] * rng.randint(2, 4) + [1] * rng.randint(2, 6)
    return prompt + [rng.randrange(3, NUM_IDS) for _ in mask], [0] * len(prompt) + mask
