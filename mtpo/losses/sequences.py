"""Log-probs of tokens, their sums over the action tokens of a trajectory, and the likelihood as a loss."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mtpo.errors import InputError
from mtpo.losses.checks import LossOut, check_shapes, checked_mask, mean_out, on_mask


def token_logps(
    logits: Tensor, tokens: Tensor, softcap: float | None = None, temperature: float = 1.0
) -> Tensor:
    """log p(token t | tokens before it) from the logits at t - 1.

    Args:
        logits: (B, T, V), any float type; computed in float32, or float64 if they are float64.
        tokens: (B, T) int64.
        softcap: for raw head outputs of a model that caps them, `cap * tanh(logits / cap)`; None when the
            model's forward has done it.

    Returns:
        (B, T); entry 0, which nothing predicts, is 0.
    """
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise InputError(f"logits {tuple(logits.shape)} do not fit tokens {tuple(tokens.shape)}")
    logits = logits[:, :-1]
    if logits.dtype != torch.float64:
        logits = logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logps = (logits / temperature).log_softmax(-1)  # (B, T - 1, V)
    return F.pad(logps.gather(-1, tokens[:, 1:, None]).squeeze(-1), (1, 0))


def masked_sum(x: Tensor, mask: Tensor, normalize: bool = False) -> Tensor:
    """Sum (B, T) over the action tokens of each row; 0 for a row without any.

    Args:
        normalize: divide by the number of action tokens of the row (at least 1).
    """
    mask = checked_mask(x, mask)
    total = on_mask(x, mask).sum(-1)
    return total / mask.sum(-1).clamp(min=1) if normalize else total


def sampled_kl(
    lp: Tensor,
    ref_lp: Tensor,
    mask: Tensor,
    kind: Literal["k1", "k2", "k3"],
    samples_from: Literal["policy", "ref"],
    normalize: bool = False,
) -> Tensor:
    """Estimate a KL per sequence, (B,), from the sampled tokens alone (Schulman 2020, "Approximating KL").

    With d = lp - ref_lp: KL(policy || ref) on samples of the policy has k1 = d, k2 = d^2 / 2 and
    k3 = exp(-d) - 1 + d; KL(ref || policy) on samples of the reference has k1 = -d, k2 = d^2 / 2 and
    k3 = exp(d) - 1 - d. On samples of the policy none of them has the gradient of the sequence KL.
    """
    if samples_from not in ("policy", "ref"):
        raise InputError(f"samples_from is {samples_from!r}; expected 'policy' or 'ref'")
    mask = checked_mask(lp, mask)
    check_shapes(lp=lp, ref_lp=ref_lp)
    d = on_mask(lp, mask) - on_mask(ref_lp, mask)
    d = d if samples_from == "policy" else -d
    if kind == "k1":
        return masked_sum(d, mask, normalize)
    if kind == "k2":
        return masked_sum(d.square() / 2, mask, normalize)
    if kind == "k3":
        return masked_sum(torch.expm1(-d) + d, mask, normalize)
    raise InputError(f"KL estimator {kind!r}; expected 'k1', 'k2' or 'k3'")


def sft_loss(
    lp: Tensor, mask: Tensor, reduction: Literal["token", "sequence_mean", "sequence_sum"] = "token"
) -> LossOut:
    """Negative log-likelihood of the action tokens.

    Args:
        reduction: "token" is the mean over all action tokens of the batch (`per_example` is None, because
            long rows count for more); "sequence_mean" the mean over rows of their token means;
            "sequence_sum" the mean over rows of their sums.
    """
    if reduction == "token":
        mask = checked_mask(lp, mask)
        return LossOut(-on_mask(lp, mask).sum() / mask.sum(), None, {})
    if reduction not in ("sequence_mean", "sequence_sum"):
        raise InputError(f"reduction {reduction!r}; expected 'token', 'sequence_mean' or 'sequence_sum'")
    return mean_out(-masked_sum(lp, mask, normalize=reduction == "sequence_mean"), {})
