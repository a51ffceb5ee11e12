"""Log-probs and gradients of tiny saturated Gemma models, by every attention and layout, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.gemma_parity import FAMILIES, LAYOUTS, TOLERANCE, Cell, certify, mistakes, refusal, table
from mtpo import scoring
from tests.tiny_models import Family


@pytest.fixture(autouse=True)
def without_compiler() -> Iterator[None]:
    """The maths of flex attention are the same, and its compiler takes minutes."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cell_is_exact_or_refused_with_its_reason(family: Family) -> None:
    cells = certify([family], ["eager", "sdpa", "flex_attention"])
    assert len(cells) == 9 and all(c.is_right for c in cells), [c for c in cells if not c.is_right]
    no_sdpa = {c.layout for c in cells if c.refused and "drops the soft-cap of 50" in c.refused}
    assert no_sdpa == (set(LAYOUTS) if family == "gemma2" else set())
    for c in cells:
        assert bool(c.refused) == (family == "gemma2" and c.attention == "sdpa")
        assert bool(c.gradient_refused) == (c.attention == "flex_attention")
        if not c.refused:
            expected = {"float32 log-probs", "float32 gradients", "float64 log-probs", "float64 gradients"}
            assert set(c.errors) == ({"float32 log-probs"} if c.gradient_refused else expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_mistakes_would_be_seen(family: Family) -> None:
    """Soft-caps saturate, windows hide tokens, and trajectories would disturb each other."""
    costs = mistakes(family)
    assert len(costs) == {"gemma": 1, "gemma2": 4, "gemma3": 2}[family]
    assert min(costs.values()) > 1000 * TOLERANCE[torch.float32]


def test_a_window_of_columns_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = scoring._mask

    def by_column(implementation: str, positions: torch.Tensor, *rest: object) -> object:
        return right(implementation, torch.arange(positions.shape[1]).expand_as(positions), *rest)  # pyright: ignore

    monkeypatch.setattr(scoring, "_mask", by_column)
    cells = {c.layout: c for c in certify(["gemma2"], ["eager"])}
    assert cells["padded"].is_right and not cells["tree"].is_right
    assert "WRONG by" in list(table(list(cells.values())))[2]


def test_an_attention_that_is_not_installed_is_refused_by_name() -> None:
    assert "flash" in str(refusal("gemma", "flash_attention_3", "padded")).lower()


def test_the_table_numbers_its_reasons() -> None:
    cells = [
        Cell("gemma", "eager", "padded", errors={"float32 log-probs": 1e-6}),
        Cell("gemma", "eager", "packed", refused="no"),
        Cell("gemma", "eager", "tree", gradient_refused="never", errors={"float32 log-probs": 1e-6}),
    ]
    lines = list(table(cells))
    assert lines[2] == "| gemma, eager | yes | refused: 1 | yes; training refused: 2 |"
    assert lines[4:] == ["1. no", "2. never"]
