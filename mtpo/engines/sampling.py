"""Drawing the next token of every row of a batch, each by its own rules and its own random number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtpo.rollout import Sampling


def sample_tokens(
    logits: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]
) -> tuple[list[int], list[float]]:
    """One token a row, by inversion of the cumulative distribution, and its log-prob.

    Args:
        logits: (B, V), after the model's soft-cap.
        uniforms: B numbers from [0, 1). A row's token depends on nothing but its logits, rules and number,
            so the other rows of the batch do not matter.

    Returns:
        B token ids, and B log-probs of them at temperature 1 without truncation, in nats.
    """
    logits = logits.float()
    temperature = _column([s.temperature or 1.0 for s in samplings], logits)
    scaled = _truncate(logits / temperature, samplings)
    cumulative = scaled.double().softmax(-1).cumsum(-1)  # (B, V)
    target = _column(list(uniforms), cumulative) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
    greedy = torch.tensor([s.temperature == 0 for s in samplings], device=logits.device)
    tokens = torch.where(greedy, logits.argmax(-1), drawn)
    logps = logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    return tokens.tolist(), logps.tolist()


def _truncate(scaled: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Remove the tokens that top-k, min-p and top-p exclude, in this order, always keeping the most likely one."""
    if all(s.top_k == 0 and s.min_p == 0 and s.top_p >= 1 for s in samplings):
        return scaled
    ordered, index = scaled.sort(-1, descending=True)
    rank = torch.arange(scaled.shape[-1], device=scaled.device)
    top_k = _column([s.top_k or scaled.shape[-1] for s in samplings], scaled)
    dropped = rank >= top_k
    probs = ordered.masked_fill(dropped, -torch.inf).softmax(-1)
    dropped |= probs < _column([s.min_p for s in samplings], scaled) * probs[:, :1]
    probs = ordered.masked_fill(dropped, -torch.inf).softmax(-1)
    mass_before = probs.cumsum(-1) - probs
    dropped |= mass_before >= _column([s.top_p if s.top_p < 1 else torch.inf for s in samplings], scaled)
    dropped[:, 0] = False
    return scaled.masked_fill(dropped.gather(-1, index.argsort(-1)), -torch.inf)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
