"""Every knob of a training run, its default and its check."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from mtpo.batches import Mask
from mtpo.errors import InputError
from mtpo.training.methods import METHODS, Method, Options

Optimizer = Literal["adamw", "muon"]
Schedule = Literal["cosine", "linear", "constant"]

RANGES: dict[str, tuple[float, float]] = {
    "beta": (0, float("inf")),
    "tau": (0, float("inf")),
    "label_smoothing": (0, 0.5),
    "nll_coef": (0, float("inf")),
    "lambda_pos": (0, float("inf")),
    "lambda_neg": (0, float("inf")),
}
"""Of the options that only some methods have; beta and tau must also differ from 0."""


@dataclass(frozen=True)
class TrainingSettings:
    """How to train. The six options from `beta` to `lambda_neg` are None for the method's own default.

    Raises:
        InputError: a value is out of range, or is set although the method does not use it.
    """

    method: str
    """A key of `METHODS`."""
    learning_rate: float
    beta: float | None = None
    """Scale of the log-ratios inside the loss; the multi-turn papers call it eta."""
    tau: float | None = None
    """Temperature of ipo."""
    label_smoothing: float | None = None
    """Assumed share of pairs whose label is wrong."""
    nll_coef: float | None = None
    """Weight of the negative log-likelihood per token of the chosen trajectory."""
    lambda_pos: float | None = None
    """Weight of desirable trajectories in kto."""
    lambda_neg: float | None = None
    """Weight of undesirable trajectories in kto."""
    mask: Mask = "action"
    """What is trained: only what the model sampled, or ("none") everything after the prompt."""
    optimizer: Optimizer = "adamw"
    """muon updates the hidden matrices with torch.optim.Muon and the rest with AdamW."""
    lr_schedule: Schedule = "cosine"
    final_lr_ratio: float = 0.0
    """Where cosine and linear end, as a share of the learning rate."""
    warmup_steps: int = 0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    """On matrices only."""
    max_grad_norm: float = 1.0
    batch_size: int = 32
    """Rows per optimiser step, over all devices; a pair is one row."""
    micro_batch_size: int | None = None
    """Rows per forward pass on one device; the whole batch by default. Results do not depend on it."""
    epochs: int = 1
    max_length: int | None = None
    """Rows with a longer trajectory are dropped; the model's context by default."""
    gradient_checkpointing: bool = False
    num_checkpoints: int = 0
    """Evenly spaced over the run, before the final model; a run resumes from the last one."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("method", tuple(METHODS)),
            ("mask", get_args(Mask)),
            ("optimizer", get_args(Optimizer)),
            ("lr_schedule", get_args(Schedule)),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}")
        for name, (low, high) in RANGES.items():
            self._check_option(name, low, high)
        self._check_numbers()

    def _check_option(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if name not in self.recipe.defaults:
            used = ", ".join(self.recipe.defaults) or "none of these options"
            raise InputError(f"{name} has no effect on method {self.method!r}, which uses {used}")
        if not low <= value <= high or (name in ("beta", "tau") and value == 0):
            raise InputError(f"{name} is {value}, expected a number from {low} to {high}")

    def _check_numbers(self) -> None:
        minimum = {"batch_size": 1, "micro_batch_size": 1, "epochs": 1, "max_length": 2}
        for name in [*minimum, "warmup_steps", "num_checkpoints", "weight_decay"]:
            value = getattr(self, name)
            if value is not None and value < minimum.get(name, 0):
                raise InputError(f"{name} is {value}, expected at least {minimum.get(name, 0)}")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}, expected a positive number")
        if not 0 <= self.final_lr_ratio <= 1:
            raise InputError(f"final_lr_ratio is {self.final_lr_ratio}, expected 0 to 1")
        if self.lr_schedule == "constant" and self.final_lr_ratio:
            raise InputError("final_lr_ratio has no effect on the constant schedule")

    @property
    def recipe(self) -> Method:
        return METHODS[self.method]

    @property
    def options(self) -> Options:
        """The method's options, defaults filled in."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: default if given[name] is None else given[name]
            for name, default in self.recipe.defaults.items()
        }
