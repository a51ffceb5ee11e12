"""What a step reports, averaged over micro-batches and processes, and when it is time to worry."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping

from accelerate.utils import gather_object

from mtpo.training.methods import Scores

log = logging.getLogger(__name__)

COLLAPSE = -1.0
"""Mean log-ratio of good trajectories, in nats, below which likelihood displacement is under way."""
FALLEN = -1.0
"""Mean log-ratio of a rejected token, in nats, below which pmpo's KL does not hold the rejected ones any more."""
FAR = 5.0
"""Mean log-ratio, in nats, beyond which the policy has left the reference behind."""


class StepMetrics:
    """Sums and weighted means since the last `take`."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._means: dict[str, tuple[float, float]] = {}

    def add(self, values: Mapping[str, float], weight: float) -> None:
        """Add a micro-batch of `weight` examples.

        `num/x` and names ending in `tokens` add up. Of the rest the mean is taken: of `.../x` over the `num/x`
        examples of that class, if that is among the values, and over `weight` examples otherwise.
        """
        for name, value in values.items():
            if name.startswith("num/") or name.endswith("tokens"):
                self._sums[name] += value
            else:
                of_class = values.get(f"num/{name.rpartition('/')[2]}", weight)
                total, weights = self._means.get(name, (0.0, 0.0))
                self._means[name] = total + value * of_class, weights + of_class

    def take(self) -> dict[str, float]:
        """The values over all processes; starts anew."""
        joint = StepMetrics()
        for sums, means in gather_object([(dict(self._sums), self._means)]):
            joint.add(sums, 0.0)
            for name, (total, weights) in means.items():
                before = joint._means.get(name, (0.0, 0.0))
                joint._means[name] = before[0] + total, before[1] + weights
        self._sums.clear()
        self._means = {}
        return dict(joint._sums) | {name: total / weight for name, (total, weight) in joint._means.items()}


def pair_metrics(scores: Scores) -> dict[str, float]:
    """Log-probs, log-ratios and action tokens of each side, per trajectory."""
    values: dict[str, float] = {}
    for half, side in enumerate(("chosen", "rejected")):
        values[f"logps/{side}"] = scores.sums.detach().chunk(2)[half].mean().item()
        values[f"logratio/{side}"] = scores.rho.detach().chunk(2)[half].mean().item()
        values[f"length/{side}"] = scores.mask.chunk(2)[half].sum(-1).double().mean().item()
    return values


def explained_variance(values: Mapping[str, float]) -> dict[str, float]:
    """Of what the value network aims at, over a whole step; nothing if that does not vary.

    From the means of the target, its square, the residual and its square.
    """
    if "target" not in values:  # no example was left in the step
        return {}
    variance = values["target_square"] - values["target"] ** 2
    left = values["residual_square"] - values["residual"] ** 2
    return {"explained_variance": 1 - left / variance} if variance > 1e-9 else {}


def advantage_std(values: Mapping[str, float]) -> dict[str, float]:
    """Of the turns, or of tokens the weights, of a whole step, from the means of them and of their squares."""
    found: dict[str, float] = {}
    for kind, of in (("advantage", ""), ("weight", "/token")):
        if f"{kind}{of}" in values:
            variance = values[f"{kind}_square{of}"] - values[f"{kind}{of}"] ** 2
            found[f"{kind}_std{of}"] = max(0.0, variance) ** 0.5
    return found


class CollapseMonitor:
    """Warns, once of each kind, when good trajectories become unlikely or the policy runs away."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def check(self, step: int, values: Mapping[str, float]) -> None:
        good = {name: values[name] for name in ("logratio/chosen", "rho/desirable") if name in values}
        bad = {name: values[name] for name in ("logratio/rejected", "rho/undesirable") if name in values}
        for name, value in good.items():
            if value < COLLAPSE:
                self._warn(
                    "collapse", f"step {step}: {name} is {value:.2f}: good trajectories become unlikely"
                )
        if values.get("drift/rejected", 0.0) < FALLEN:
            self._warn(
                "fallen",
                f"step {step}: drift/rejected is {values['drift/rejected']:.2f} nats a token: rejected trajectories "
                "become ever more unlikely, beta is too small",
            )
        for name, value in (good | bad).items():
            if abs(value) > FAR:
                self._warn("far", f"step {step}: {name} is {value:.2f}: the policy is far from the reference")

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning(message)
