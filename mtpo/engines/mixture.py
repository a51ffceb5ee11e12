"""The geometric mixture of two models, token by token, for the embedded engine.

Each token is drawn from pi^(1-b) mu^b / Z, where pi is the policy, mu the reference and b weights the reference
(Munos et al. 2023, arXiv 2312.00886). Both models read the same ids and keep their own keys and values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mtpo.engines.cached_model import CachedModel, Feed, NextLogits, Weights
from mtpo.errors import InputError
from mtpo.losses import geometric_mixture
from mtpo.vocabularies import require_one_vocabulary


@dataclass(frozen=True, eq=False)
class Mixture:
    """Two models that are to be mixed.

    Args:
        ref_coef: b; at 0 the policy alone is looked at, at 1 the reference alone.
        tokenizers: of policy and reference, where they are not one and the same.

    Raises:
        InputError: `ref_coef` is not in [0, 1], the models do not share one vocabulary, or the attention
            implementation of one cannot take the masks of the embedded engine.
    """

    policy: Weights
    reference: Weights
    ref_coef: float
    tokenizers: tuple[Any, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.ref_coef <= 1:
            raise InputError(f"ref_coef must lie in [0, 1], got {self.ref_coef}")
        models = {"policy": self.policy.model, "reference": self.reference.model}
        require_one_vocabulary(models, self.tokenizers, purpose="a mixture")

    @property
    def fingerprint(self) -> str:
        """SHA-256 over both fingerprints and b; of a single model, its own."""
        if self.ref_coef in (0, 1):
            return (self.reference if self.ref_coef else self.policy).fingerprint
        parts = f"{self.policy.fingerprint} {self.reference.fingerprint} {self.ref_coef!r}"
        return hashlib.sha256(parts.encode()).hexdigest()


@dataclass
class LogNormalizers:
    """log Z of the mixture at the tokens that were sampled: 0 where both models agree, else negative."""

    count: int = 0
    total: float = 0.0
    minimum: float = 0.0

    @property
    def mean(self) -> float:
        """0 without a token."""
        return self.total / self.count if self.count else 0.0

    def add(self, found: Sequence[float]) -> None:
        self.count += len(found)
        self.total += sum(found)
        self.minimum = min(self.minimum, *found)

    def clear(self) -> None:
        self.count, self.total, self.minimum = 0, 0.0, 0.0


class CachedMixture:
    """A `Policy` that is a mixture; the model that b rules out is never asked."""

    def __init__(self, mixture: Mixture, max_rows: int) -> None:
        self._mixture = mixture
        shares = ((mixture.policy, 1 - mixture.ref_coef), (mixture.reference, mixture.ref_coef))
        self._models = [CachedModel(weights, max_rows) for weights, share in shares if share > 0]

    @property
    def max_context(self) -> int:
        return min(model.max_context for model in self._models)

    @property
    def fingerprint(self) -> str:
        return self._mixture.fingerprint

    def begin(self) -> None:
        for model in self._models:
            model.begin()

    def refresh(self) -> None:
        for model in self._models:
            model.refresh()

    def copy(self, source: int, target: int, length: int) -> None:
        for model in self._models:
            model.copy(source, target, length)

    def swap(self, a: int, b: int, length: int) -> None:
        for model in self._models:
            model.swap(a, b, length)

    def feed(self, feed: Feed) -> NextLogits:
        """Log-probs of the mixture, and log Z; a token that one of both models rules out stays ruled out.

        At b = 0 or 1 the logits of the one model, and zeros.
        """
        if len(self._models) == 1:
            only = self._models[0].feed(feed).logits
            return NextLogits(only, only.new_zeros(len(only)))
        policy, reference = (model.feed(feed).logits for model in self._models)
        return NextLogits(*geometric_mixture(policy, reference.to(policy.device), self._mixture.ref_coef))
