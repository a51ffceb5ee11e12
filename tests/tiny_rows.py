"""Random training rows of two turns with tool output between them, for models with 48 tokens or more."""

from __future__ import annotations

import random
from collections.abc import Iterator

from mtpo.batches import Row

Side = tuple[list[int], list[int]]


def tiny_pairs(count: int, *, seed: int = 0) -> list[Row]:
    """Pairs of different problems, 10 to 24 tokens a side."""
    sides = _sides(seed)
    rows = []
    for number in range(count):
        prompt = [2, 3 + number % 40, 5 + number // 40]
        chosen, rejected = next(sides), next(sides)
        rows.append(
            {
                "problem_id": f"tiny/{number}",
                "chosen_sample": 0,
                "rejected_sample": 1,
                "chosen_input_ids": prompt + chosen[0],
                "chosen_completion_mask": [0, 0, 0, *chosen[1]],
                "rejected_input_ids": prompt + rejected[0],
                "rejected_completion_mask": [0, 0, 0, *rejected[1]],
            }
        )
    return rows


def tiny_singles(count: int, *, seed: int = 0) -> list[Row]:
    """The chosen sides of `tiny_pairs`, without label."""
    return [_single(row, "chosen") for row in tiny_pairs(count, seed=seed)]


def tiny_labels(count: int, *, seed: int = 0) -> list[Row]:
    """Both sides of `count` pairs, side by side, with labels."""
    return [
        _single(row, side) | {"label": side == "chosen"}
        for row in tiny_pairs(count, seed=seed)
        for side in ("chosen", "rejected")
    ]


def _single(row: Row, side: str) -> Row:
    return {
        "problem_id": row["problem_id"],
        "sample": row[f"{side}_sample"],
        "input_ids": row[f"{side}_input_ids"],
        "completion_mask": row[f"{side}_completion_mask"],
    }


def _sides(seed: int) -> Iterator[Side]:
    rng = random.Random(seed)
    while True:
        mask = [1] * rng.randint(2, 8) + [0] * rng.randint(3, 5) + [1] * rng.randint(2, 8)
        yield [rng.randrange(3, 48) for _ in mask], mask
