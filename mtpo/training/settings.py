"""Every knob of a training run, its default and its check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from mtpo.batches import Mask
from mtpo.errors import InputError
from mtpo.layouts import Layout
from mtpo.models import DTYPES
from mtpo.training.methods import METHODS, Method, Options
from mtpo.training.reporters import REPORTERS

Optimizer = Literal["adamw", "muon"]
Schedule = Literal["cosine", "linear", "constant"]

RANGES: dict[str, tuple[float, float]] = {
    "alpha": (0, 1),
    "beta": (0, float("inf")),
    "tau": (0, float("inf")),
    "label_smoothing": (0, 0.5),
    "nll_coef": (0, float("inf")),
    "lambda_pos": (0, float("inf")),
    "lambda_neg": (0, float("inf")),
    "normalize": (False, True),
    "jsd_beta": (0, 1),
    "divergence_temperature": (0, float("inf")),
    "on_policy": (0, 1),
}
"""Of the options that only some methods have."""
POSITIVE = ("beta", "tau", "divergence_temperature")
"""Those of them that must differ from 0."""
WORDS = ("kl", "divergence")
"""Options that only some methods have, each with its own choices."""


@dataclass(frozen=True)
class TrainingSettings:
    """How to train. The options from `alpha` to `on_policy` are None for the method's own default.

    Raises:
        InputError: a value is out of range, or is set although the method does not use it.
    """

    METHODS: ClassVar[Mapping[str, Method]] = METHODS
    RANGES: ClassVar[Mapping[str, tuple[float, float]]] = RANGES

    method: str = field(metadata={"help": f"one of {', '.join(METHODS)}"})
    learning_rate: float = field(metadata={"help": "peak of the schedule"})
    alpha: float | None = field(
        default=None,
        metadata={"help": "pmpo: 1 learns from accepted trajectories only, 0 from rejected only"},
    )
    beta: float | None = field(
        default=None,
        metadata={
            "help": "scale of log-ratios in the loss (eta in the multi-turn papers); in pmpo weight of the KL"
        },
    )
    tau: float | None = field(default=None, metadata={"help": "temperature of ipo and dro_v"})
    label_smoothing: float | None = field(
        default=None, metadata={"help": "assumed share of pairs with the wrong label"}
    )
    nll_coef: float | None = field(
        default=None, metadata={"help": "weight of the chosen trajectory's negative log-likelihood per token"}
    )
    lambda_pos: float | None = field(
        default=None, metadata={"help": "weight of desirable trajectories in kto"}
    )
    lambda_neg: float | None = field(
        default=None, metadata={"help": "weight of undesirable trajectories in kto"}
    )
    normalize: bool | None = field(
        default=None,
        metadata={"help": "true: divide what a trajectory counts by its number of action tokens"},
    )
    kl: str | None = field(
        default=None,
        metadata={
            "help": "pmpo: k3 estimates the KL from the sampled tokens, full sums over the vocabulary and keeps "
            "the reference in memory"
        },
    )
    divergence: str | None = field(
        default=None,
        metadata={
            "help": "kd, gkd: ce (cross entropy), forward_kl (teacher first), reverse_kl (student first), jsd"
        },
    )
    jsd_beta: float | None = field(
        default=None, metadata={"help": "the teacher's share in jsd's mixture; 0 is forward, 1 is reverse KL"}
    )
    divergence_temperature: float | None = field(
        default=None, metadata={"help": "kd, gkd: the logits of both models are divided by it"}
    )
    on_policy: float | None = field(
        default=None, metadata={"help": "gkd: share of the batches that the student samples itself"}
    )
    value_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "peak of the value network's schedule, where there is one; by default 5 times learning_rate"
        },
    )
    mask: Mask = field(
        default="action",
        metadata={
            "help": "train what the model sampled, all that follows the prompt (none), or its last turn only"
        },
    )
    optimizer: Optimizer = field(
        default="adamw", metadata={"help": "muon: torch.optim.Muon for hidden matrices, AdamW for the rest"}
    )
    lr_schedule: Schedule = field(default="cosine", metadata={"help": "what follows the warm-up"})
    final_lr_ratio: float = field(
        default=0.0, metadata={"help": "where cosine and linear end, as a share of the learning rate"}
    )
    warmup_steps: int = field(default=0, metadata={"help": "steps of linear warm-up"})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's first momentum"})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's second momentum"})
    weight_decay: float = field(default=0.0, metadata={"help": "on matrices only"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    batch_size: int = field(
        default=32, metadata={"help": "rows a step over all devices and micro-batches; a pair is one row"}
    )
    micro_batch_size: int | None = field(
        default=None,
        metadata={"help": "rows a forward pass on one device: memory, not results; by default all of them"},
    )
    layout: Layout = field(
        default="padded",
        metadata={
            "help": "packed: trajectories end to end; tree: pairs share their prefix; speed and memory, not results"
        },
    )
    epochs: int = field(default=1, metadata={"help": "how often every row is drawn"})
    max_length: int | None = field(
        default=None,
        metadata={"help": "longer rows are dropped; by default those beyond the model's context"},
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "float32, or bfloat16 to compute in; what is trained is kept in float32 all the same"
        },
    )
    pure_bfloat16: bool = field(
        default=False,
        metadata={"help": "keep what is trained in bfloat16: half the memory, but small steps are lost"},
    )
    lora_rank: int | None = field(
        default=None, metadata={"help": "train a LoRA adapter of this rank; by default the whole model"}
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "the adapter counts alpha / rank; by default alpha is twice the rank"}
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "on the adapter's input; sft and raft only, log-ratios take none"}
    )
    lora_targets: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "layers with an adapter: q_proj, lm_head, ...; all-linear is all but the head"},
    )
    merge_adapter: bool = field(
        default=False, metadata={"help": "save the whole model with the adapter added to its weights"}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "compute activations twice, to keep fewer"}
    )
    eval_steps: int | None = field(
        default=None,
        metadata={
            "help": "steps between two looks at the held-out rows; by default one look, after the last step"
        },
    )
    report_to: list[str] = field(
        default_factory=list,
        metadata={"help": f"metrics also go to {', '.join(REPORTERS)}; they are always in metrics.jsonl"},
    )
    run_name: str | None = field(default=None, metadata={"help": "what trackio and wandb call the run"})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "OWNER/NAME on the Hugging Face hub to push the trained model to"}
    )
    hub_public: bool = field(default=False, metadata={"help": "a repository made there is for everybody"})
    num_checkpoints: int = field(
        default=0, metadata={"help": "models to save on the way; a run resumes from the last one"}
    )
    seed: int = field(default=0, metadata={"help": "fixes the order of rows and KTO's partners"})

    def __post_init__(self) -> None:
        for name, allowed in (
            ("method", tuple(self.METHODS)),
            ("mask", get_args(Mask)),
            ("optimizer", get_args(Optimizer)),
            ("lr_schedule", get_args(Schedule)),
            ("layout", get_args(Layout)),
            ("dtype", tuple(DTYPES)),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}")
        for name in (*self.RANGES, *WORDS):
            self._check_option(name)
        for name, (low, high) in self.RANGES.items():
            self._check_range(name, low, high)
        for name, choices in self.recipe.choices.items():
            if self.options[name] not in choices:
                raise InputError(f"{name} is {self.options[name]!r}; expected one of {', '.join(choices)}")
        if self.jsd_beta is not None and self.options["divergence"] != "jsd":
            raise InputError(f"jsd_beta has no effect on divergence {self.options['divergence']!r}")
        self._check_numbers()
        self._check_adapter()

    def _check_option(self, name: str) -> None:
        if getattr(self, name) is not None and name not in self.recipe.defaults:
            used = ", ".join(self.recipe.defaults) or "none of these options"
            raise InputError(f"{name} has no effect on method {self.method!r}, which uses {used}")

    def _check_range(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if isinstance(self.recipe.defaults[name], bool) != isinstance(value, bool):
            raise InputError(f"{name} is {value!r}, expected {type(self.recipe.defaults[name]).__name__}")
        if not low <= value <= high or (name in POSITIVE and value == 0):
            raise InputError(f"{name} is {value}, expected a number from {low} to {high}")

    def _check_numbers(self) -> None:
        minimum = {"batch_size": 1, "micro_batch_size": 1, "epochs": 1, "max_length": 2, "eval_steps": 1}
        for name in [*minimum, "warmup_steps", "num_checkpoints", "weight_decay"]:
            value = getattr(self, name)
            if value is not None and value < minimum.get(name, 0):
                raise InputError(f"{name} is {value}, expected at least {minimum.get(name, 0)}")
        if self.value_learning_rate is not None and not self.recipe.has_values:
            raise InputError(f"value_learning_rate has no effect on method {self.method!r}")
        for name in ("learning_rate", "max_grad_norm", "value_learning_rate"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}, expected a positive number")
        if unknown := set(self.report_to) - set(REPORTERS):
            raise InputError(f"report_to is {sorted(unknown)[0]!r}; expected some of {', '.join(REPORTERS)}")
        if self.run_name is not None and not set(self.report_to) - {"tensorboard"}:
            raise InputError("run_name has no effect without report_to trackio or wandb")
        if self.hub_public and self.hub_model_id is None:
            raise InputError("hub_public has no effect without hub_model_id")
        if self.pure_bfloat16 and self.dtype != "bfloat16":
            raise InputError(f"pure_bfloat16 has no effect with dtype {self.dtype}")
        if not 0 <= self.final_lr_ratio <= 1:
            raise InputError(f"final_lr_ratio is {self.final_lr_ratio}, expected 0 to 1")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 0 and less than 1")
        if self.layout == "tree" and self.recipe.rows != "pair":
            raise InputError(
                f"layout 'tree' shares the prefix of a pair, but method {self.method!r} trains on "
                f"{self.recipe.rows} rows: take 'packed'"
            )
        if self.lr_schedule == "constant" and self.final_lr_ratio:
            raise InputError("final_lr_ratio has no effect on the constant schedule")

    def _check_adapter(self) -> None:
        if self.lora_rank is None:
            for name in ("lora_alpha", "lora_dropout", "merge_adapter"):
                if getattr(self, name):
                    raise InputError(f"{name} has no effect without lora_rank")
            if self.lora_targets != ["all-linear"]:
                raise InputError("lora_targets has no effect without lora_rank")
            return
        if self.lora_rank < 1 or (self.lora_alpha is not None and not self.lora_alpha > 0):
            raise InputError(
                f"lora_rank {self.lora_rank} and lora_alpha {self.lora_alpha}: expected positive numbers"
            )
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"lora_dropout is {self.lora_dropout}, expected at least 0 and less than 1")
        if self.lora_dropout and self.recipe.needs_reference:
            raise InputError(
                f"lora_dropout: method {self.method!r} compares policy and reference, and dropout would differ"
            )

    @property
    def recipe(self) -> Method:
        return self.METHODS[self.method]

    @property
    def computes_in_bfloat16(self) -> bool:
        """By autocast, on weights of which those that are trained are float32."""
        return self.dtype == "bfloat16" and not self.pure_bfloat16

    @property
    def weights_dtype(self) -> str:
        """What to load the policy and its reference in: bfloat16 only where nothing is trained on it, or if asked."""
        is_trained = self.lora_rank is None
        return "float32" if self.computes_in_bfloat16 and is_trained else self.dtype

    @property
    def options(self) -> Options:
        """The method's options, defaults filled in."""
        defaults = self.recipe.defaults
        given = {option: getattr(self, option) for option in defaults}
        return {option: defaults[option] if value is None else value for option, value in given.items()}
