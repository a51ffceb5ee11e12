"""The attacks that the sandbox must hold: data in `attacks.yaml`, which says how it is written."""

from __future__ import annotations

import string
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from mtpo.errors import InputError

ATTACKS = Path(__file__).with_name("attacks.yaml")
EVIDENCE = ("marker", "secret", "file", "connection", "victim", "neighbour", "left", "call", "status")
STATUSES = ("ok", "error", "timeout", "died")


@dataclass(frozen=True, slots=True)
class Attack:
    """One hostile trajectory: its cells run in a session of their own, each under `timeout_s`."""

    name: str
    category: str
    tries: str
    """One line: what it is after."""
    cells: tuple[str, ...]
    shows: str
    """The kind of evidence, one of `EVIDENCE`, that is expected where it works. Every kind is looked for."""
    held_by: str = "layers"
    """"layers", or "pool" for what is held without any isolation."""
    ends: tuple[str, ...] = ()
    """Statuses that the last cell may have: proof that a bomb went off, and that no overrun passes for ok."""
    other: str = ""
    """A cell for two other sessions, one while the attacker is open and one after it was closed."""
    fork: bool = False
    """Whether the session is forked after its cells."""
    timeout_s: float = 2.0


@dataclass(frozen=True, slots=True)
class AttackFile:
    prelude: str
    """A cell that runs before each attack: tools of the attacker."""
    attacks: tuple[Attack, ...]


def load_attacks(path: Path = ATTACKS) -> AttackFile:
    """Read a file of attacks.

    Raises:
        InputError: it is not as described, with the attack and the value in one line.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or content.keys() != {"prelude", "attacks"}:
        raise InputError(f"{path}: expected a mapping of `prelude` and `attacks`")
    attacks = tuple(
        _parse(entry, f"{path}: attack {i}") for i, entry in enumerate(content["attacks"], start=1)
    )
    names = [attack.name for attack in attacks]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path}: two attacks have the name {name!r}")
    return AttackFile(content["prelude"], attacks)


def _parse(entry: Any, place: str) -> Attack:
    if not isinstance(entry, dict):
        raise InputError(f"{place}: expected a mapping, got {entry!r}")
    place += f" ({entry.get('name')})"
    known = {f.name for f in fields(Attack)}
    if unknown := entry.keys() - known:
        raise InputError(f"{place}: unknown key {min(unknown)!r}; expected some of {sorted(known)}")
    for name in ("name", "category", "tries", "shows"):
        value = entry.get(name)
        if not isinstance(value, str) or not value or "\n" in value:
            raise InputError(f"{place}: {name} must be one line of text, got {value!r}")
    cells, ends = entry.get("cells"), entry.get("ends", [])
    if not isinstance(cells, list) or not cells or not all(isinstance(cell, str) for cell in cells):
        raise InputError(f"{place}: cells must be a list of code, got {cells!r}")
    if entry["shows"] not in EVIDENCE:
        raise InputError(f"{place}: shows must be one of {EVIDENCE}, got {entry['shows']!r}")
    if not isinstance(ends, list) or not set(ends) <= set(STATUSES):
        raise InputError(f"{place}: ends must be a list of {STATUSES}, got {ends!r}")
    if entry.get("held_by", "layers") not in ("layers", "pool"):
        raise InputError(f"{place}: held_by must be 'layers' or 'pool', got {entry['held_by']!r}")
    if not isinstance(timeout_s := entry.get("timeout_s", 1.0), int | float) or not 0 < timeout_s <= 60:
        raise InputError(f"{place}: timeout_s must be a number of seconds up to 60, got {timeout_s!r}")
    if not isinstance(entry.get("fork", False), bool):
        raise InputError(f"{place}: fork must be true or false, got {entry['fork']!r}")
    for code in (*cells, other := entry.get("other", "")):
        if not isinstance(other, str) or not string.Template(code).is_valid():
            raise InputError(f"{place}: `$` stands for a name from outside, or `$$` for itself: {code!r}")
    values: dict[str, Any] = {**entry, "cells": tuple(cells), "ends": tuple(ends)}
    return Attack(**values)
