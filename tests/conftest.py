"""Settings of the whole suite."""

import gc
import os
from pathlib import Path

import pytest

# Read when torch is first imported, here and in every process that a test starts: models this small lose more to
# handing work over between threads than they gain, and on a busy machine they wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """Spare the collector what was imported: every training run has it look at all there is, for 0.2 seconds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def coin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model that guesses."""
    from tests.coin import make_coin_model  # imports torch, which reads the settings above

    return make_coin_model(tmp_path_factory.mktemp("coin"))
