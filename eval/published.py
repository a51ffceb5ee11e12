"""What arXiv 2409.02392 reports: greedy accuracy on GSM8K and MATH with the tool, for our runs to stand beside."""

from __future__ import annotations

from typing import NamedTuple

from mtpo.errors import InputError


class Accuracy(NamedTuple):
    """In per cent of the test problems."""

    gsm8k: float
    math: float


START = "SFT"
"""The row of the policies that all other rows start from."""
MODELS = ("Gemma 1.1 7B", "CodeGemma 1.1 7B", "Mistral 7B v0.3", "Gemma 2 9B")
ROWS = {
    START: ((77.5, 46.1), (77.3, 46.4), (77.8, 42.7), (84.1, 51.0)),
    "RAFT": ((79.2, 47.3), (78.8, 48.4), (79.8, 43.7), (84.2, 52.6)),
    "single-turn DPO": ((81.7, 48.9), (79.1, 48.9), (79.8, 45.1), (85.2, 53.1)),
    "single-turn KTO": ((80.6, 49.0), (80.2, 48.6), (81.3, 46.3), (85.4, 52.9)),
    "M-DPO": ((83.9, 51.2), (81.5, 50.1), (82.3, 47.5), (86.3, 54.5)),
    "M-KTO": ((82.1, 49.5), (81.6, 49.6), (81.7, 46.7), (86.1, 54.5)),
}
"""Table 1: after three iterations, by method, in the order of MODELS."""
PUBLISHED = {
    f"{model}, {method}": Accuracy(*row[place])
    for method, row in ROWS.items()
    for place, model in enumerate(MODELS)
}
AFTER_ITERATIONS = {
    "Gemma 1.1 7B, M-DPO": (Accuracy(81.5, 49.1), Accuracy(82.5, 49.7), Accuracy(83.9, 51.2)),
}
"""Where the paper has every iteration."""
SETS = {"gsm8k:test": "gsm8k", "math:test": "math"}
"""Problem sets, and the figure of each."""


def check_published(name: str) -> None:
    """
    Raises:
        InputError: the paper has no such row.
    """
    if name not in PUBLISHED:
        raise InputError(
            f"--published {name!r} is no row of arXiv 2409.02392; expected MODEL, METHOD with one of "
            f"{'; '.join(MODELS)} and one of {'; '.join(ROWS)}"
        )


def published_accuracies(name: str, num_policies: int) -> list[Accuracy | None]:
    """The paper's figure for each policy of a loop, the one that it starts from first; None where it tells none.

    Raises:
        InputError: the paper has no such row.
    """
    check_published(name)
    model, _, _ = name.partition(", ")
    start = PUBLISHED[f"{model}, {START}"]
    told = AFTER_ITERATIONS.get(name, (None, None, PUBLISHED[name]))
    return [start, *told, *[None] * num_policies][:num_policies]
