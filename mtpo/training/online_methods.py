"""The online methods: from the value of a config to who samples, the rows that come of it, and the loss.

Of every prompt the first sampler plays a trajectory, the second its opponent, and a judge gives P, the probability
that the first is the better one. A new method is a function from `Scores` to `LossOut` and one line in
`ONLINE_METHODS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from mtpo.losses import (
    LossOut,
    masked_sum,
    paired_loss,
    policy_gradient_loss,
    reward_to_go,
    turn_sums,
    value_loss,
)
from mtpo.training.methods import Method, Options, Scores, kto
from mtpo.training.turns import TurnAdvantages, turn_advantages

Player = Literal["current", "mixture", "average"]
"""The policy; the geometric mixture of policy and reference, with the option `ref_coef`; or the exponential moving
average of the policy's weights, with the option `ema_decay`."""


@dataclass(frozen=True)
class OnlineMethod(Method):
    """One way to train on trajectories that are sampled on the way."""

    players: tuple[Player, ...] = ("current", "current")
    """Who samples: the trajectory and its opponent; one alone has no opponent, and is judged by itself."""
    trains_both: bool = False
    """Both trajectories make a row, each with the other for its opponent."""
    keeps_ties: bool = True
    """A pair of which neither is better has something to say."""


def judged_pairs(scores: Scores, options: Options, kind: str) -> LossOut:
    """Section 4's losses with the judge's P for a soft label: OAIF (arXiv 2402.04792), IPO-MD (arXiv 2403.08635)."""
    rho = scores.rho / scores.num_tokens if options["normalize"] else scores.rho
    rho_w, rho_l = rho.chunk(2)
    beta, tau = options.get("beta", 1.0), options.get("tau")  # a kind has one of them
    return paired_loss(rho_w, rho_l, kind, beta, tau, pref_prob=scores.pref_prob)


def nash_md(scores: Scores, options: Options) -> LossOut:
    """Nash-MD-PG (arXiv 2312.00886, section 6): token n is worth P - 1/2 - tau times the log-ratios from n on."""
    assert scores.rewards is not None
    penalty = options["tau"] * reward_to_go(_log_ratios(scores).detach(), scores.mask)
    weight = scores.rewards[:, None] - 0.5 - penalty
    out = policy_gradient_loss(scores.logps.double(), scores.mask, weight, len(weight))
    of_tokens = weight[scores.mask.bool()]
    metrics = {
        "num/token": float(len(of_tokens)),
        "weight/token": of_tokens.mean().item(),
        "weight_square/token": of_tokens.square().mean().item(),
    }
    return LossOut(out.loss, out.per_example, metrics)


def turn_actor_critic(scores: Scores, options: Options) -> LossOut:
    """MTPO's policy gradient over turns plus the loss of its value network, which share no parameter.

    Both are means over the turns of the batch (arXiv 2405.14655, section 5). With kl="explicit" the KL of a turn is
    no part of its own reward but, over the whole vocabulary, of the loss; where advantages are divided by their
    standard deviation so is that KL, or they would not balance where they should.
    """
    assert scores.values is not None and scores.turn_ids is not None
    of = turns_of(scores, options)
    advantages, scale = of.advantages, 1.0
    if options["normalize_advantage"]:
        mean, std = scores.advantage_moments or moments(advantages[of.valid])
        scale = 1 / (std + 1e-8)
        advantages = (advantages - mean) * scale
    weight = advantages.gather(1, scores.turn_ids.clamp(min=0))  # (N, T)
    policy = policy_gradient_loss(scores.logps.double(), scores.mask, weight, of.valid.sum())
    value = value_loss(scores.values.double(), of.returns, of.valid)
    loss = policy.loss + value.loss
    if scores.divergences is not None:
        kl = masked_sum(scores.divergences.double(), scores.mask).sum() / of.valid.sum()
        loss = loss + options["alpha"] * scale * kl
    return LossOut(
        loss,
        None,
        turn_metrics(of.advantages[of.valid], of.returns[of.valid], scores.values.detach().double()[of.valid])
        | {"loss/policy": policy.loss.item(), "loss/value": value.loss.item()},
    )


def turns_of(scores: Scores, options: Options) -> TurnAdvantages:
    """Advantages and returns of the batch's turns, in float64."""
    assert scores.rewards is not None and scores.values is not None and scores.turn_ids is not None
    log_ratios, ids, values = _log_ratios(scores).detach(), scores.turn_ids, scores.values.double()
    alpha = options["alpha"]
    of = turn_advantages(log_ratios, ids, scores.rewards.double(), values, alpha, options["lam"])
    if scores.divergences is None:
        return of
    own = alpha * turn_sums(log_ratios, ids, values.shape[1])  # the KL that the loss has in closed form
    return of._replace(advantages=of.advantages + own)


def moments(advantages: Tensor) -> tuple[float, float]:
    """Mean and standard deviation, over the population."""
    return advantages.mean().item(), advantages.std(unbiased=False).item()


def turn_metrics(advantages: Tensor, returns: Tensor, values: Tensor) -> dict[str, float]:
    residual = returns - values
    return {
        "advantage": advantages.mean().item(),
        "advantage_square": advantages.square().mean().item(),
        "value": values.mean().item(),
        "target": returns.mean().item(),
        "target_square": returns.square().mean().item(),
        "residual": residual.mean().item(),
        "residual_square": residual.square().mean().item(),
    }


def _log_ratios(scores: Scores) -> Tensor:
    """(N, T) float64; 0 off the mask."""
    assert scores.ref_logps is not None
    return torch.where(scores.mask.bool(), scores.logps.double() - scores.ref_logps.double(), 0.0)


PREFERENCE = {"beta": 0.1, "normalize": False}
IPO = {"tau": 1.0, "normalize": False}
MIXED = {"ref_coef": 0.125}
TURNS = {"lam": 0.95, "normalize_advantage": True, "kl": "reward"}
OF_TURNS: dict[str, Any] = {"has_values": True, "choices": {"kl": ("reward", "explicit")}}
KTO: Options = {"beta": 0.1, "lambda_pos": 1.0, "lambda_neg": 1.0}

ONLINE_METHODS: Mapping[str, OnlineMethod] = {
    "online_dpo": OnlineMethod("pair", partial(judged_pairs, kind="logistic"), PREFERENCE, keeps_ties=False),
    "online_ipo": OnlineMethod("pair", partial(judged_pairs, kind="ipo"), IPO),
    "online_slic": OnlineMethod(
        "pair", partial(judged_pairs, kind="hinge"), PREFERENCE | {"beta": 0.002}, keeps_ties=False
    ),
    "ipo_md": OnlineMethod(
        "pair", partial(judged_pairs, kind="ipo"), IPO | MIXED, players=("mixture", "mixture")
    ),
    "nash_md": OnlineMethod("reward", nash_md, {"tau": 0.008} | MIXED, players=("current", "mixture")),
    "nash_ema": OnlineMethod(
        "reward", nash_md, {"tau": 0.008, "ema_decay": 0.999}, players=("current", "average")
    ),
    "mtpo": OnlineMethod("reward", turn_actor_critic, {"alpha": 0.005} | TURNS, trains_both=True, **OF_TURNS),
    "mtpo_tau": OnlineMethod(
        "reward",
        turn_actor_critic,
        {"alpha": 0.0025, "ref_coef": 0.0375} | TURNS,
        players=("mixture", "mixture"),
        trains_both=True,
        **OF_TURNS,
    ),
    "rlhf": OnlineMethod(
        "reward", turn_actor_critic, {"alpha": 0.01} | TURNS, players=("current",), **OF_TURNS
    ),
    "online_kto": OnlineMethod("label", kto, KTO, players=("current",)),
}
"""Defaults are those of the papers."""
