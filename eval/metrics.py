"""Metrics of graded samples, with intervals: pass@k, majority vote, and paired comparisons of two models."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist
from typing import NamedTuple, TypeVar

import numpy as np

from mtpo.errors import InputError

Answer = TypeVar("Answer")


class Interval(NamedTuple):
    """A confidence interval, both ends included."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PairedTest:
    """How two models compare on the same problems."""

    improved: int
    """Problems that only the second model gets right."""
    worsened: int
    """Problems that only the first model gets right."""
    z: float
    """(improved - worsened) / sqrt(improved + worsened); 0 without a difference."""
    p: float
    """Exact McNemar: chance of a split at least this uneven, either way, if each were a fair coin's."""


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased chance that at least one of k samples is correct: 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, eq. 1).

    Raises:
        InputError: not 0 <= num_correct <= num_samples, or not 1 <= k <= num_samples.
    """
    if not 0 <= num_correct <= num_samples:
        raise InputError(f"num_correct must be between 0 and {num_samples}, got {num_correct}")
    if not 1 <= k <= num_samples:
        raise InputError(f"pass@k needs 1 <= k <= {num_samples} samples, got k = {k}")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a share; (0, 1) for n = 0.

    Raises:
        InputError: not 0 <= successes <= n, or a confidence outside (0, 1).
    """
    if not 0 <= successes <= n:
        raise InputError(f"successes must be between 0 and {n}, got {successes}")
    z = _normal_quantile(confidence)
    if n == 0:
        return Interval(0.0, 1.0)
    share = successes / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return Interval(max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale))


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, *, num_resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the mean.

    Args:
        values: one number a problem (its mean over samples), so that problems are the units drawn again.

    Raises:
        InputError: no values, fewer than 1 resample, or a confidence outside (0, 1).
    """
    if not len(values) or num_resamples < 1:
        raise InputError(
            f"a bootstrap needs values and resamples, got {len(values)} values and {num_resamples} resamples"
        )
    _normal_quantile(confidence)
    rng, size = np.random.default_rng(seed), len(values)
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    # a resample is how often each distinct value is drawn: far fewer numbers than problems
    means = [rng.multinomial(size, counts / size) @ distinct / size for _ in range(num_resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def majority_vote(
    answers: Sequence[Answer | None], equal: Callable[[Answer, Answer], bool] = operator.eq
) -> Answer | None:
    """The answer given most often, as first written; a tie goes to the one seen first.

    Args:
        answers: None where a sample has no answer; it has no vote.
        equal: whether two answers are the same; each is compared with the first of its group.

    Returns:
        None if nobody answered.
    """
    groups: list[tuple[Answer, int]] = []
    for answer in answers:
        if answer is None:
            continue
        for index, (first, votes) in enumerate(groups):
            if equal(first, answer):
                groups[index] = (first, votes + 1)
                break
        else:
            groups.append((answer, 1))
    return max(groups, key=lambda group: group[1])[0] if groups else None


def majority_at_k(num_samples: int, num_correct: int, wrong_votes: Sequence[int], k: int) -> float:
    """Chance that the vote of k of the samples, drawn without replacement, is for the correct answer.

    Exact: a sum over the votes j that the correct answer gets, where no other answer may get more; of t others
    that get j as well, a fair draw leaves 1 / (t + 1). At k = n it is the vote of all samples.

    Args:
        num_samples: n, also those without an answer, which have no vote.
        num_correct: samples with the correct answer, in whatever spelling.
        wrong_votes: for each other answer the number of samples that give it.

    Raises:
        InputError: not 1 <= k <= n, or more votes than samples.
    """
    if not 1 <= k <= num_samples:
        raise InputError(f"maj@k needs 1 <= k <= {num_samples} samples, got k = {k}")
    if num_correct + sum(wrong_votes) > num_samples:
        raise InputError(f"{num_correct} + {sum(wrong_votes)} votes of {num_samples} samples")
    ways: defaultdict[int, int] = defaultdict(int)  # by the number of other answers with as many votes
    for j in range(1, min(num_correct, k) + 1):
        rivals = [votes for votes in wrong_votes if votes >= j]
        others = num_samples - num_correct - sum(rivals)  # too few to matter, or no votes at all
        for (drawn, ties), count in _rival_draws(rivals, j, k - j).items():
            ways[ties] += math.comb(num_correct, j) * count * math.comb(others, k - j - drawn)
    return sum(count / ((ties + 1) * math.comb(num_samples, k)) for ties, count in ways.items())


def _rival_draws(rivals: Sequence[int], j: int, limit: int) -> dict[tuple[int, int], int]:
    """(samples drawn of the rivals, rivals with j of them) -> ways, where none has more than j, all at most `limit`."""
    ways = {(0, 0): 1}
    for votes in rivals:
        longer: defaultdict[tuple[int, int], int] = defaultdict(int)
        for (drawn, ties), count in ways.items():
            for own in range(min(j, limit - drawn) + 1):
                longer[drawn + own, ties + (own == j)] += count * math.comb(votes, own)
        ways = dict(longer)
    return ways


def paired_test(
    a: Mapping[str, float] | Sequence[float], b: Mapping[str, float] | Sequence[float]
) -> PairedTest:
    """Compare model b with model a on the same problems.

    Args:
        a: 1 (or True) where the model is right and 0 where it is wrong: by problem id, or in one fixed order.
        b: the same problems, as the same kind of collection.

    Raises:
        InputError: the problems differ, there is none, or a value is neither 0 nor 1.
    """
    improved = worsened = 0
    for before, after in _paired(a, b):
        if not {before, after} <= {0, 1}:
            raise InputError(f"a paired test needs outcomes 0 or 1, got {before!r} and {after!r}")
        improved += after > before
        worsened += before > after
    discordant = improved + worsened
    z = (improved - worsened) / math.sqrt(discordant) if discordant else 0.0
    tail = term = 1  # C(n, 0), then C(n, i) one from the other: exact integers, and fast for thousands
    for i in range(min(improved, worsened)):
        term = term * (discordant - i) // (i + 1)
        tail += term
    return PairedTest(improved, worsened, z, min(1.0, 2 * tail / 2**discordant))


GRID = 240
"""Finest unit of a mean in `permutation_test`, 1/240: exact for 15 and 16 samples side by side, and for any one number
of samples up to 240; beyond that, means are rounded to it."""


def permutation_test(
    a: Mapping[str, float] | Sequence[float], b: Mapping[str, float] | Sequence[float]
) -> float:
    """Two-sided p of the exact paired permutation test: how often the mean difference would be as large if, on every
    problem by itself, it were a coin's toss which model has which result.

    All 2^n assignments count, by a recurrence over the sums that they can reach; nothing is drawn. For outcomes of
    0 and 1 this is the exact McNemar test.

    Args:
        a: the mean over the samples of each problem, as in `paired_test`.
        b: the same problems.

    Raises:
        InputError: the problems differ, there is none, or a value is outside [0, 1].
    """
    pairs = _paired(a, b)
    if outside := [x for pair in pairs for x in pair if not 0 <= x <= 1]:
        raise InputError(f"a permutation test needs means between 0 and 1, got {outside[0]!r}")
    denominators = {Fraction(x).limit_denominator(GRID).denominator for pair in pairs for x in pair}
    unit = min(math.lcm(*denominators), GRID)
    steps = [round(after * unit) - round(before * unit) for before, after in pairs]
    sizes = sorted(abs(step) for step in steps if step)
    chances = np.zeros(
        sum(sizes) + 1
    )  # chances[s]: that the differences that fall out in favour of b sum to s
    chances[0], top = 1.0, 1
    for size in sizes:
        chances[:top] /= 2
        chances[size : top + size] += chances[:top].copy()
        top += size
    sums = 2 * np.arange(len(chances)) - sum(sizes)
    return min(1.0, float(chances[np.abs(sums) >= abs(sum(steps))].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for the number of tests, in order (Holm 1979): no more than a 5 % chance of even one
    false finding when those below 0.05 are called findings."""
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def _paired(
    a: Mapping[str, float] | Sequence[float], b: Mapping[str, float] | Sequence[float]
) -> list[tuple[float, float]]:
    if isinstance(a, Mapping) != isinstance(b, Mapping):
        raise InputError("a paired test needs two mappings or two sequences, got one of each")
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if unpaired := sorted(a.keys() ^ b.keys()):
            raise InputError(f"{len(unpaired)} problems are in only one of the results, e.g. {unpaired[0]!r}")
        pairs = [(a[key], b[key]) for key in a]
    elif len(a) != len(b):
        raise InputError(f"a paired test needs the same problems, got {len(a)} and {len(b)} outcomes")
    else:
        pairs = list(zip(a, b, strict=True))
    if not pairs:
        raise InputError("a paired test needs at least one problem")
    return pairs  # pyright: ignore[reportReturnType]


def _normal_quantile(confidence: float) -> float:
    """z such that a standard normal is within +-z with this probability."""
    if not 0 < confidence < 1:
        raise InputError(f"confidence must be between 0 and 1, got {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)
