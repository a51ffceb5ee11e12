"""docs/reference.md has every option, as the recipes have it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from recipes.reference import options_table, reference_page

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == reference_page(), "python -m recipes.reference --out docs/reference.md"


@dataclass(frozen=True)
class Shared:
    seed: int = field(default=0, metadata={"help": "fixes every draw"})


@dataclass(frozen=True)
class Options(Shared):
    model: str = field(metadata={"help": "a | b"}, kw_only=True)
    mask: Literal["action", "none"] = "action"
    urls: list[str] = field(default_factory=list)
    limit: int | None = None
    resume: bool = False


def test_aoptions_table_shows_types_defaults_and_what_is_required_of_a_class_of_its_own() -> None:
    assert options_table(Options).splitlines()[2:] == [
        "| `model` | str | required | a \\| b |",
        "| `mask` | `action` \\| `none` | `action` |  |",
        "| `urls` | str, several |  |  |",
        "| `limit` | int |  |  |",
        "| `resume` | bool | `false` |  |",
    ]
