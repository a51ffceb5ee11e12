"""Pairs, labels and demonstrations of others as training rows, with the labels that they come with.

Texts are rendered turn by turn with a model's own template, so that the mask is right: what an assistant message says
is trained, with the token that ends its turn, and nothing else. `recipes.label` grades instead of believing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from data.imports import ForeignTrajectory, read_foreign
from data.labels import Row, pair_row, single_row
from mtpo.chat import ChatFormat
from mtpo.errors import InputError, TemplateError
from mtpo.trajectory import Problem, Trajectory

logger = logging.getLogger(__name__)

Kind = Literal["pairs", "binary", "sft"]
Record = Sequence[ForeignTrajectory]
"""The conversations of one line: the two sides of a pair, or one."""


@dataclass(frozen=True)
class ForeignRows:
    """What could be made of a file, and what could not."""

    rows: list[Row]
    problems: list[Problem]
    """Of the rows, in the file's order."""
    refused: list[str]
    """One line for each record that gives no row: its place, and why."""


def foreign_rows(source: str | Path, chat: ChatFormat, kind: Kind) -> ForeignRows:
    """The rows of one kind in a file or data set that `read_foreign` reads.

    pairs     records with chosen and rejected
    binary    the same, each side a row with a label; or records with `label`
    sft       chosen sides, desirable completions, and conversations without a label

    Raises:
        InputError: there is no such file, a record is broken, the template changes an earlier turn of a conversation
            (names file, line and turn), two problems have one id, or no record gives a row.
    """
    rows: list[Row] = []
    problems: dict[str, Problem] = {}
    refused: list[str] = []
    records = groupby(read_foreign(source), key=lambda foreign: foreign.place)
    for place, group in tqdm(records, desc="importing", unit="row", delay=2):
        record = list(group)
        try:
            own = _MAKERS[kind](record, chat)
        except TemplateError as error:
            raise InputError(f"{place}: {error}") from error
        except InputError as error:
            refused.append(f"{place}: {error}")
            logger.warning("left out: %s", refused[-1])
            continue
        problem = record[0].problem
        if problems.setdefault(problem.id, problem) != problem:
            raise InputError(f"{place}: problem {problem.id!r} is another one than in a line before")
        rows += own
    if not rows:
        raise InputError(f"{source}: gives no row for {kind}{f': {refused[0]}' if refused else ''}")
    return ForeignRows(rows, list(problems.values()), refused)


def _pair(record: Record, chat: ChatFormat) -> list[Row]:
    sides = {str(foreign.metadata.get("side")): foreign for foreign in record}
    if set(sides) != {"chosen", "rejected"}:
        raise InputError("expected a pair, with the fields chosen and rejected")
    chosen, rejected = _rendered(sides["chosen"], chat, 0), _rendered(sides["rejected"], chat, 1)
    if chosen.segments[0].ids != rejected.segments[0].ids:
        raise InputError("chosen and rejected do not begin with the same prompt")
    if chosen.action_ids == rejected.action_ids:
        raise InputError("chosen and rejected take the same turns")
    return [pair_row(chosen.problem_id, chosen, rejected)]


def _labels(record: Record, chat: ChatFormat) -> list[Row]:
    rows = []
    for position, foreign in enumerate(record):
        label = _label(foreign)
        if not isinstance(label, bool):
            raise InputError(f"expected chosen and rejected, or a label that is true or false, got {label!r}")
        rows.append(single_row(foreign.problem.id, _rendered(foreign, chat, position)) | {"label": label})
    return rows


def _singles(record: Record, chat: ChatFormat) -> list[Row]:
    return [
        single_row(foreign.problem.id, _rendered(foreign, chat, position))
        for position, foreign in enumerate(record)
        if _label(foreign) is not False
    ]


_MAKERS: dict[Kind, Callable[[Record, ChatFormat], list[Row]]] = {
    "pairs": _pair,
    "binary": _labels,
    "sft": _singles,
}


def _label(foreign: ForeignTrajectory) -> object:
    side = foreign.metadata.get("side")
    return foreign.metadata.get("label") if side is None else side == "chosen"


def _rendered(foreign: ForeignTrajectory, chat: ChatFormat, position: int) -> Trajectory:
    """With the sample's number if the record has one, else its position in the record."""
    side = foreign.metadata.get("side")
    sample = foreign.metadata.get(f"{side}_sample" if side else "sample", position)
    try:
        return chat.import_trajectory(foreign.problem, foreign.messages, sample=sample)
    except InputError as error:
        raise type(error)(f"{side}: {error}" if side else str(error)) from None
