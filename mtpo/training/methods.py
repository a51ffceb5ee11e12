"""The training methods: from the value of a config to the rows it takes and the loss it minimises.

A new method is a function from `Scores` to `LossOut` and one line in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from mtpo.batches import RowKind
from mtpo.losses import (
    LossOut,
    dro_policy_loss,
    dro_value_loss,
    kto_loss,
    masked_sum,
    paired_loss,
    pmpo_loss,
    sampled_kl,
    sft_loss,
)
from mtpo.losses.distributions import DIVERGENCES, Divergence

Options = Mapping[str, Any]
"""Numbers, yes or no, and words."""


@dataclass(frozen=True)
class Scores:
    """What the trainer has computed for one batch of N trajectories; of B pairs, N = 2 B, chosen ones first."""

    logps: Tensor
    """(N, T), the policy's log-probs; carries the gradient."""
    mask: Tensor
    """(N, T), 1 on action tokens."""
    sums: Tensor
    """(N,) float64, the policy's log-probs summed over the action tokens."""
    ref_logps: Tensor | None = None
    """(N, T), the reference's log-probs; 0 off the mask."""
    labels: Tensor | None = None
    """(N,) bool, desirable or not."""
    z0: Tensor | None = None
    """KTO's baseline, for the whole global batch."""
    desirable_share: Tensor | None = None
    """Share of the desirable trajectories in the global batch."""
    rewards: Tensor | None = None
    """(N,): of dro_v 1 or 0 by label, of mean 0 and variance 1 over the data set; in online training the judge's."""
    values: Tensor | None = None
    """What the value network says of the prompts, (N,), or of the states before each turn, (N, H), H being the
    most turns of a row; carries its gradient."""
    pref_prob: Tensor | None = None
    """(B,), the probability that the chosen side wins, where a judge gives one."""
    turn_ids: Tensor | None = None
    """(N, T), the turn that each action token belongs to, from 0; -1 off the mask."""
    divergences: Tensor | None = None
    """(N, T), between the next-token distributions of the policy and of another model, its teacher or reference, at
    each action token; carries its gradient."""
    advantage_moments: tuple[float, float] | None = None
    """Mean and standard deviation of the turns' advantages over the global batch; None if this batch is all of it."""

    @property
    def rho(self) -> Tensor:
        """(N,) float64, log-ratios of policy and reference."""
        assert self.ref_logps is not None
        return self.sums - masked_sum(self.ref_logps.double(), self.mask)

    @property
    def num_tokens(self) -> Tensor:
        """(N,), action tokens of each trajectory."""
        return self.mask.sum(-1)


@dataclass(frozen=True)
class Method:
    """One way to train."""

    rows: RowKind
    loss: Callable[[Scores, Options], LossOut]
    defaults: Options = field(default_factory=dict)
    """The options that have an effect, with their defaults; any other option is refused."""
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Of the options that are words."""
    has_values: bool = False
    """A value network is trained beside the policy."""
    has_teacher: bool = False
    """Learns from the distributions of another model, which is in memory all along."""

    @property
    def needs_reference(self) -> bool:
        return self.rows != "single"


def sft(scores: Scores, options: Options) -> LossOut:
    return sft_loss(scores.logps, scores.mask)


def paired(scores: Scores, options: Options, kind: str) -> LossOut:
    rho = scores.rho / scores.num_tokens if options["normalize"] else scores.rho
    nll = -(scores.sums / scores.num_tokens).chunk(2)[0] if options["nll_coef"] else None
    rho_w, rho_l = rho.chunk(2)
    of_loss: Options = {name: value for name, value in options.items() if name != "normalize"}
    return paired_loss(rho_w, rho_l, kind, nll=nll, **of_loss)  # pyright: ignore[reportArgumentType]


def kto(scores: Scores, options: Options) -> LossOut:
    assert scores.labels is not None and scores.z0 is not None
    return kto_loss(scores.rho, scores.labels, scores.z0, **options)


def pmpo(scores: Scores, options: Options) -> LossOut:
    """KL(reference || policy), by k3 or over the full vocabulary, takes the rows for samples of the reference."""
    assert scores.labels is not None and scores.ref_logps is not None
    per_token = bool(options["normalize"])
    logps, ref_logps = scores.logps.double(), scores.ref_logps.double()
    if scores.divergences is not None:
        kl = masked_sum(scores.divergences.double(), scores.mask, per_token)
    else:
        kl = sampled_kl(logps, ref_logps, scores.mask, "k3", "ref", per_token)
    out = pmpo_loss(
        scores.sums / scores.num_tokens if per_token else scores.sums,
        scores.labels,
        kl,
        options["alpha"],
        options["beta"],
        accepted_share=scores.desirable_share,
    )
    drift = scores.rho.detach() / scores.num_tokens
    for name, members in (("accepted", scores.labels), ("rejected", ~scores.labels)):
        if members.any():
            out.metrics[f"drift/{name}"] = drift[members].mean().item()
    return out


def distilled(scores: Scores, options: Options) -> LossOut:
    """Mean over the action tokens of the batch of the divergence from the teacher (arXiv 2306.13649, eq. 4)."""
    assert scores.divergences is not None
    num_tokens = scores.mask.sum()
    loss = masked_sum(scores.divergences.double(), scores.mask).sum() / num_tokens
    nll = -scores.sums.detach().sum().item() / num_tokens.item()
    return LossOut(loss, None, {"nll": nll})


def teacher_divergence(options: Options) -> Divergence:
    """What kd and gkd minimise."""
    return Divergence(options["divergence"], options["jsd_beta"], options["divergence_temperature"])


def dro_v(scores: Scores, options: Options) -> LossOut:
    """The loss of the policy plus that of the value network, which share no parameter."""
    assert scores.rewards is not None and scores.values is not None
    rho, rewards, values, tau = scores.rho, scores.rewards, scores.values.double(), options["tau"]
    policy = dro_policy_loss(rho, rewards, values, tau)
    value = dro_value_loss(values, rewards, rho, tau)
    assert policy.per_example is not None and value.per_example is not None
    metrics = {name: policy.metrics[name] for name in ("residual", "rho", "value")}
    target = (rewards - tau * rho).detach()
    metrics |= {"target": target.mean().item(), "target_square": target.square().mean().item()}
    metrics |= {"loss/policy": policy.loss.item(), "loss/value": value.loss.item()}
    metrics["residual_square"] = 2 * value.loss.item()
    return LossOut(policy.loss + value.loss, policy.per_example + value.per_example, metrics)


OF_PAIRS = {"label_smoothing": 0.0, "nll_coef": 0.0, "normalize": False}
PAIRED = {"beta": 0.1} | OF_PAIRS
OF_TEACHERS = {"jsd_beta": 0.5, "divergence_temperature": 1.0}
DIVERGENCE = {"divergence": DIVERGENCES}

METHODS: dict[str, Method] = {
    "sft": Method("single", sft),
    "raft": Method("single", sft),  # SFT on the correct trajectories of the current policy
    "dpo": Method("pair", partial(paired, kind="logistic"), PAIRED),
    "cdpo": Method("pair", partial(paired, kind="logistic"), PAIRED | {"label_smoothing": 0.1}),
    "ipo": Method("pair", partial(paired, kind="ipo"), {"tau": 0.1} | OF_PAIRS),
    "slic": Method("pair", partial(paired, kind="hinge"), PAIRED),
    "exponential": Method("pair", partial(paired, kind="exponential"), PAIRED),
    "truncated_quadratic": Method("pair", partial(paired, kind="truncated_quadratic"), PAIRED),
    "squared": Method("pair", partial(paired, kind="squared"), PAIRED),
    "savage": Method("pair", partial(paired, kind="savage"), PAIRED),
    "kto": Method("label", kto, {"beta": 0.1, "lambda_pos": 1.0, "lambda_neg": 1.0}),
    "pmpo": Method(
        "label",
        pmpo,
        {"alpha": 0.5, "beta": 0.5, "normalize": False, "kl": "k3"},
        choices={"kl": ("k3", "full")},
    ),
    "dro_v": Method("label", dro_v, {"tau": 1.0}, has_values=True),
    "kd": Method("single", distilled, {"divergence": "ce"} | OF_TEACHERS, DIVERGENCE, has_teacher=True),
    "gkd": Method(
        "single",
        distilled,
        {"divergence": "jsd", "on_policy": 0.5} | OF_TEACHERS,
        DIVERGENCE,
        has_teacher=True,
    ),
}
