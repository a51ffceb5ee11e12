"""What the model reads: whole trajectories of cells with the exact text after each of them."""

import importlib.util
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import pytest_asyncio

from sandbox import InterpreterPool, Limits

pytestmark = pytest.mark.asyncio(loop_scope="module")

FILE = Path(__file__).with_name("sandbox_semantics.txt")
MAX_OUTPUT_CHARS = 600
TIMEOUT_S = 20.0


class Cell(NamedTuple):
    code: str
    timeout_s: float
    text: str
    status: str


class Script(NamedTuple):
    name: str
    absent: str
    """A module without which the texts hold; empty if there is none."""
    cells: list[Cell]


def read_scripts() -> Iterator[Script]:
    lines = [line for line in FILE.read_text(encoding="utf-8").splitlines() if not line.startswith("##")]
    for block in re.split(r"^== ", "\n".join(lines), flags=re.M)[1:]:
        heading, *parts = re.split(r"^>>(?: ([\d.]+))?\n", block, flags=re.M)
        name, _, absent = heading.strip().removesuffix(")").partition("  (without ")
        cells = []
        for timeout_s, cell in zip(parts[::2], parts[1::2], strict=True):
            code, status, text = re.split(r"^<<(?: (\w+))?\n", cell, flags=re.M)
            cells.append(Cell(code[:-1], float(timeout_s or TIMEOUT_S), text.rstrip("\n"), status or "ok"))
        yield Script(name, absent, cells)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def pool() -> AsyncIterator[InterpreterPool]:
    async with InterpreterPool(Limits(max_output_chars=MAX_OUTPUT_CHARS), size=2) as pool:
        yield pool


@pytest.mark.parametrize("script", list(read_scripts()), ids=lambda script: script.name)
async def test_the_model_reads(pool: InterpreterPool, script: Script) -> None:
    if script.absent and importlib.util.find_spec(script.absent):
        pytest.skip(f"{script.absent} is installed")
    async with pool.session() as session:
        for cell in script.cells:
            execution = await session.execute(cell.code, cell.timeout_s)
            assert (execution.text, execution.status) == (cell.text, cell.status), cell.code
