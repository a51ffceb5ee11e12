"""Where a run's metrics go beside metrics.jsonl: transformers' own reporters."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from mtpo.errors import InputError

REPORTERS = ("tensorboard", "trackio", "wandb")
"""TensorBoard writes to OUT/runs, trackio to a database of this machine, Weights & Biases to its servers."""


def check_reporters(names: Sequence[str]) -> None:
    """
    Raises:
        InputError: one is not installed, which transformers would only tell once the model is loaded.
    """
    for name in names:
        if find_spec(name) is None:
            raise InputError(f"report_to {name}: it is not installed, pip install {name}")
