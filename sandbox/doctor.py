"""Which layers of isolation this machine gives, what each stops, and how to mend those that are missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sandbox.layers import LAYERS, OPTIONAL
from sandbox.pool import InterpreterPool


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer of isolation on this machine."""

    name: str
    missing: str | None
    """The reason why it is not in force; None when it is."""
    stops: str
    mend: str
    is_optional: bool
    """isolation="full" does without it."""


async def layer_reports() -> list[LayerReport]:
    """What a pool finds when it runs one session with all the isolation that it can get."""
    async with InterpreterPool(size=1, preload=(), isolation="available") as pool:
        async with pool.session() as session:
            await session.execute("1", timeout_s=60)
        reasons = pool.layers
    return [
        LayerReport(name, reasons.get(name, "not tried"), layer.stops, layer.mend, name in OPTIONAL)
        for name, layer in LAYERS.items()
    ]


def lacking_for_full(rows: Sequence[LayerReport]) -> list[str]:
    """Names of the layers without which isolation="full" refuses to start."""
    return [row.name for row in rows if row.missing is not None and not row.is_optional]


def as_table(rows: Sequence[LayerReport]) -> str:
    """A line a layer, the reason and the mend below those that are missing, and the verdict as the last line."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'layer':{width}}  state     what it stops"]
    for row in rows:
        state = "in force" if row.missing is None else "optional" if row.is_optional else "missing "
        lines.append(f"{row.name:{width}}  {state}  {row.stops}")
        if row.missing is not None:
            lines += [f"{'':{width}}    missing: {row.missing}", f"{'':{width}}    mend: {row.mend}"]
    missing = ", ".join(lacking_for_full(rows))
    lines.append('isolation="full" is ' + (f"not available: {missing} missing" if missing else "available"))
    return "\n".join(lines)
