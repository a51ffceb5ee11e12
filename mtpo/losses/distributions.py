"""Losses and mixtures of whole next-token distributions, of which there are two: distillation, Nash-MD, IPO-MD."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mtpo.errors import InputError
from mtpo.losses.checks import LossOut, check_no_nan, check_shapes

DIVERGENCES = ("ce", "forward_kl", "reverse_kl", "jsd")


def token_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    kind: str,
    beta: float = 0.5,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> LossOut:
    """Mean over action tokens of a divergence between teacher T and student S (Agarwal et al. 2023, GKD).

    `ce` is -sum_v T log S, as Gemma 2 was distilled; `forward_kl` KL(T || S); `reverse_kl` KL(S || T);
    `jsd` beta KL(T || M) + (1 - beta) KL(S || M) with M = beta T + (1 - beta) S, and forward or reverse KL at
    beta = 0 or 1. No factor of temperature^2.

    Args:
        student_logits, teacher_logits: (B, T, V) that predict the token at the same place of the mask; computed in
            float32, or float64 if they are float64. Only the student's carry gradient.
        mask: (B, T).
        softcap: for raw head outputs of models that cap them, `cap * tanh(logits / cap)`.

    Returns:
        `per_example` is None, because long rows count for more.
    """
    check_shapes(student_logits=student_logits, teacher_logits=teacher_logits)
    if student_logits.ndim != 3 or student_logits.shape[:2] != mask.shape:
        raise InputError(f"logits {tuple(student_logits.shape)} and mask {tuple(mask.shape)} do not fit")
    divergence = Divergence(kind, beta, temperature)
    mask = mask.bool()
    if not mask.any():
        raise InputError("the mask has no action token in the whole batch: nothing to learn from")
    per_token = divergence.between(
        log_probs(student_logits[mask], temperature, softcap),
        log_probs(teacher_logits.detach()[mask], temperature, softcap),
    )
    check_no_nan(divergence=per_token)
    return LossOut(per_token.mean(), None, {})


@dataclass(frozen=True, slots=True)
class Divergence:
    """A divergence of two next-token distributions, as `token_divergence` explains it.

    Raises:
        InputError: there is no such kind, or a number is out of range.
    """

    kind: str
    beta: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in DIVERGENCES:
            raise InputError(f"divergence {self.kind!r}; expected one of {', '.join(DIVERGENCES)}")
        if not 0 <= self.beta <= 1 or not self.temperature > 0:
            raise InputError(
                f"beta {self.beta} must lie in [0, 1] and temperature {self.temperature} be positive"
            )

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Of log-probs (N, V) at this temperature; (N,) in nats."""
        kind, beta = self.kind, self.beta
        if kind == "jsd" and beta in (0, 1):
            kind = "forward_kl" if beta == 0 else "reverse_kl"
        if kind == "ce":
            return -_expectation(teacher, student)
        if kind == "forward_kl":
            return _kl(teacher, student)
        if kind == "reverse_kl":
            return _kl(student, teacher)
        middle = _mixture(teacher, student, beta)
        return beta * _kl(teacher, middle) + (1 - beta) * _kl(student, middle)


def log_probs(logits: Tensor, temperature: float = 1.0, softcap: float | None = None) -> Tensor:
    """log softmax(cap(logits) / temperature), in float32, or float64 if the logits are float64."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return (logits / temperature).log_softmax(-1)


def geometric_mixture(policy_logits: Tensor, ref_logits: Tensor, ref_coef: float) -> tuple[Tensor, Tensor]:
    """log of pi^(1-b) mu^b / Z at each position, with b = ref_coef (Munos et al. 2023, Nash-MD).

    A token that either model rules out stays ruled out; at b = 0 or 1 the other model is not looked at.

    Args:
        policy_logits, ref_logits: (..., V), after each model's own soft-cap; computed in float32, or float64 if
            they are float64.

    Returns:
        Log-probs (..., V) and log Z (...), which is at most 0, and 0 where both models agree.
    """
    check_shapes(policy_logits=policy_logits, ref_logits=ref_logits)
    if not 0 <= ref_coef <= 1:
        raise InputError(f"ref_coef must lie in [0, 1], got {ref_coef}")
    if ref_coef in (0, 1):
        only = log_probs(ref_logits if ref_coef else policy_logits)
        check_no_nan(logits=only)
        return only, torch.zeros_like(only[..., 0])
    mixed = (1 - ref_coef) * log_probs(policy_logits) + ref_coef * log_probs(ref_logits)
    log_normalizer = mixed.logsumexp(-1)
    check_no_nan(logits=mixed)
    if torch.isneginf(log_normalizer).any():
        raise InputError("policy and reference have no token in common: their mixture is empty")
    return mixed - log_normalizer[..., None], log_normalizer


def _mixture(p: Tensor, q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q) of log-probs; a token that both rule out has no gradient, not nan."""
    nobody = torch.isneginf(p) & torch.isneginf(q)
    p, q = (torch.where(nobody, 0.0, x) for x in (p, q))
    return torch.logaddexp(p + math.log(share), q + math.log(1 - share)).masked_fill(nobody, -torch.inf)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probs (N, V), (N,)."""
    return _expectation(p, p - q)


def _expectation(p: Tensor, x: Tensor) -> Tensor:
    """Mean of x under log-probs p; what has no chance counts nothing, whatever its x."""
    possible = ~torch.isneginf(p)
    return (torch.where(possible, p, 0.0).exp() * torch.where(possible, x, 0.0) * possible).sum(-1)
