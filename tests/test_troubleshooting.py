"""docs/troubleshooting.md explains messages that the code really prints."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
EXPLAINED = re.findall(r"^\*\*`(.+?)`\*\*", PAGE, re.MULTILINE)


@cache
def texts() -> str:
    """Every string of the code, one a line, with `...` for what an f-string puts in."""
    found = []
    for room in ("mtpo", "sandbox", "data", "eval", "recipes"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(text.replace("\n", " ") for text in found)


def test_the_page_explains_many_messages() -> None:
    assert len(EXPLAINED) > 20
    assert len(set(EXPLAINED)) == len(EXPLAINED)


@pytest.mark.parametrize("message", EXPLAINED)
def test_every_message_explained_is_one_of_the_code(message: str) -> None:
    pieces = [re.escape(piece) for piece in message.split("...")]
    assert re.search("[^\n]*?".join(pieces), texts())
