"""Every knob of an online run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from mtpo.errors import InputError
from mtpo.samplers import CURRENT, Sampler, ema, geo_mix
from mtpo.training.methods import Method
from mtpo.training.online_methods import ONLINE_METHODS, OnlineMethod, Player
from mtpo.training.settings import RANGES, TrainingSettings


@dataclass(frozen=True)
class OnlineSettings(TrainingSettings):
    """How to sample, and to train on what was sampled; the options from `alpha` to `normalize_advantage` are None
    for the method's own default.

    Raises:
        InputError: a value is out of range, or is set although the method does not use it.
    """

    METHODS: ClassVar[Mapping[str, Method]] = ONLINE_METHODS
    RANGES: ClassVar[Mapping[str, tuple[float, float]]] = RANGES | {
        "ref_coef": (0, 1),
        "ema_decay": (0, 1),
        "lam": (0, 1),
        "normalize_advantage": (False, True),
    }

    method: str = field(metadata={"help": f"one of {', '.join(ONLINE_METHODS)}"})
    alpha: float | None = field(
        default=None, metadata={"help": "mtpo, mtpo_tau, rlhf: weight of the KL in the reward of a turn"}
    )
    beta: float | None = field(
        default=None,
        metadata={"help": "online_dpo, online_slic, online_kto: scale of log-ratios in the loss"},
    )
    tau: float | None = field(
        default=None, metadata={"help": "online_ipo, ipo_md, nash_md, nash_ema: temperature of the KL"}
    )
    ref_coef: float | None = field(
        default=None,
        metadata={"help": "ipo_md, nash_md, mtpo_tau: weight of the reference in the mixture that samples"},
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "nash_ema: share of the old average that a step keeps"}
    )
    lam: float | None = field(
        default=None, metadata={"help": "mtpo, mtpo_tau, rlhf: lambda of the advantages of turns"}
    )
    normalize_advantage: bool | None = field(
        default=None,
        metadata={"help": "mtpo, mtpo_tau, rlhf: false leaves advantages their scale over a batch"},
    )
    kl: str | None = field(
        default=None,
        metadata={
            "help": "mtpo, mtpo_tau, rlhf: reward puts the sampled KL of a turn into its reward, explicit sums it over "
            "the vocabulary in the loss"
        },
    )
    eval_steps: int | None = field(
        default=None,
        metadata={
            "help": "steps between two looks at the held-out prompts; by default one before and one after training"
        },
    )
    value_warmup_steps: int = field(
        default=0, metadata={"help": "first steps in which only the value network learns"}
    )
    sync_steps: int = field(
        default=1, metadata={"help": "steps a round: trajectories are sampled for so many at a time"}
    )
    max_skipped_steps: int = field(
        default=10,
        metadata={"help": "steps without a finite gradient, or without a judgement, before the run stops"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("value_warmup_steps", 0), ("sync_steps", 1), ("max_skipped_steps", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least {least}")
        if self.value_warmup_steps and not self.recipe.has_values:
            raise InputError(f"value_warmup_steps has no effect on method {self.method!r}")

    @property
    def recipe(self) -> OnlineMethod:
        return ONLINE_METHODS[self.method]

    @property
    def samplers(self) -> tuple[Sampler, ...]:
        """Who samples the trajectory, and who its opponent, if there is one."""
        return tuple(self._sampler(player) for player in self.recipe.players)

    def _sampler(self, player: Player) -> Sampler:
        if player == "current":
            return CURRENT
        return geo_mix(self.options["ref_coef"]) if player == "mixture" else ema(self.options["ema_decay"])
