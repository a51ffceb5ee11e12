"""Mismatched trajectories, from which KTO estimates its baseline."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

from mtpo.batches import Row, prompt_ids
from mtpo.errors import InputError


def with_mismatched(rows: Sequence[Row], seed: int) -> list[Row]:
    """The rows, each with a row under `mismatched`: its own prompt, then the turns of another prompt's row.

    The turns keep their own tool output and mask. Partners are drawn once for the whole data set, so that any
    batch, however small or one-sided, has a baseline.

    Raises:
        InputError: more than half of the rows have the same prompt.
    """
    prompts = [tuple(prompt_ids(row)) for row in rows]
    partners = mismatched_partners(prompts, seed)
    return [
        row | {"mismatched": _joined(prompt, rows[partner])}
        for row, prompt, partner in zip(rows, prompts, partners, strict=True)
    ]


def mismatched_partners(prompts: Sequence[Hashable], seed: int) -> list[int]:
    """For each row the index of a row with another prompt; every row is some row's partner.

    The rows are shuffled, laid out prompt by prompt, and rotated by the smallest shift for which no row keeps
    its own prompt. With the rows of a prompt side by side, that is the size of the largest prompt.
    """
    shuffled = list(range(len(prompts)))
    random.Random(seed).shuffle(shuffled)
    groups: dict[Hashable, list[int]] = {}
    for row in shuffled:
        groups.setdefault(prompts[row], []).append(row)
    layout = [row for group in groups.values() for row in group]
    shift = max(map(len, groups.values()), default=0)
    if 2 * shift > len(layout):
        raise InputError(
            f"KTO's baseline pairs every prompt with the turns of another one, but {shift} of "
            f"{len(layout)} rows have the same prompt; at most half may"
        )
    partners = [0] * len(layout)
    for place, row in enumerate(layout):
        partners[row] = layout[(place + shift) % len(layout)]
    return partners


def _joined(prompt: Sequence[int], turns: Row) -> Row:
    start = len(prompt_ids(turns))
    return {
        "input_ids": [*prompt, *turns["input_ids"][start:]],
        "completion_mask": [0] * len(prompt) + turns["completion_mask"][start:],
    }
