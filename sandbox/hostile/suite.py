"""Runs hostile code against the sandbox, and says what it achieved.

`python -m sandbox attack` runs `attacks.yaml` on this machine; with a layer switched off it shows what that
layer stops.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Sequence

from mtpo.errors import InputError, MtpoError, SandboxError
from sandbox.hostile.arena import LIMITS, MARKER, Arena, Outcome
from sandbox.hostile.attacks import Attack, load_attacks
from sandbox.layers import LAYERS, OPTIONAL, Isolation
from sandbox.limits import Limits


async def run_attacks(
    attacks: Sequence[Attack],
    *,
    prelude: str,
    isolation: Isolation = "full",
    limits: Limits = LIMITS,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run attacks one after the other; the last outcome is about what the pool leaves when it closes.

    Args:
        prelude: the cell before each of them, of the same file.
        on_outcome: called with each outcome as soon as it is there.

    Raises:
        SandboxError: this machine cannot isolate as asked.
    """
    outcomes: list[Outcome] = []

    def add(outcome: Outcome) -> None:
        outcomes.append(outcome)
        on_outcome(outcome)

    async with Arena(prelude, isolation=isolation, limits=limits) as arena:
        for attack in attacks:
            add(await arena.run(attack))
        started = time.monotonic()
    add(Outcome("end-of-the-pool", "cleanup", not arena.left, arena.left, time.monotonic() - started))
    return outcomes


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m sandbox attack`.

    Returns:
        The exit status: 0 if every attack held (with --table: if none got through all layers), else 1; 2
        after bad input, or where the machine cannot isolate as asked.
    """
    parser = argparse.ArgumentParser(prog="python -m sandbox attack", description=__doc__)
    parser.add_argument(
        "--without", action="append", default=[], choices=list(LAYERS), help="a layer to switch off"
    )
    parser.add_argument("--category", help="only the attacks of this category")
    parser.add_argument(
        "--table",
        action="store_true",
        help="print, as Markdown, which of the attacks that layers hold succeed with each layer switched off",
    )
    args = parser.parse_args(argv)
    try:
        file = load_attacks()
        attacks = [attack for attack in file.attacks if args.category in (None, attack.category)]
        if not attacks:
            categories = sorted({attack.category for attack in file.attacks})
            raise InputError(f"--category {args.category}: expected one of {categories}")
        if args.table:
            return _print_table(file.prelude, [attack for attack in attacks if attack.held_by == "layers"])
        isolation = _all_but(args.without) if args.without else "full"
        outcomes = asyncio.run(
            run_attacks(attacks, prelude=file.prelude, isolation=isolation, on_outcome=_print_outcome)
        )
    except MtpoError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    num_held = sum(outcome.held for outcome in outcomes)
    print(f"{num_held} of {len(outcomes)} held in {sum(outcome.seconds for outcome in outcomes):.0f} s")
    return 0 if num_held == len(outcomes) else 1


def _print_outcome(outcome: Outcome) -> None:
    verdict = "held   " if outcome.held else MARKER
    line = (
        f"{verdict} {outcome.seconds:5.2f} s  {outcome.category:12} {outcome.name}  {outcome.reason}".rstrip()
    )
    print(line.encode("ascii", "backslashreplace").decode(), flush=True)


def _all_but(layers: Sequence[str]) -> list[str]:
    return [name for name in LAYERS if name not in {*layers, *OPTIONAL}]


def _print_table(prelude: str, attacks: Sequence[Attack]) -> int:
    """One row a policy: all layers, all but one, none.

    Returns:
        0 if nothing succeeded against all layers, else 1.
    """
    policies: dict[str, Isolation] = {"nothing": "full"}
    policies |= {f"`{layer}`": _all_but([layer]) for layer in LAYERS if layer not in OPTIONAL}
    policies["everything"] = "none"
    print(f"| switched off | succeed, of {len(attacks)} | which |\n|---|---|---|", flush=True)
    is_tight = True
    for name, isolation in policies.items():
        try:
            outcomes = asyncio.run(run_attacks(attacks, prelude=prelude, isolation=isolation))
        except SandboxError as error:  # a layer may need another one, depending on the machine
            if isolation == "full":
                raise
            print(f"| {name} | | not to be had here: {error} |", flush=True)
            continue
        names = [f"`{outcome.name}`" for outcome in outcomes if not outcome.held]
        print(f"| {name} | {len(names)} | {', '.join(names) or '-'} |", flush=True)
        is_tight = is_tight and not (names and isolation == "full")
    return 0 if is_tight else 1
