"""Training rows: how they lie on disk, and how they become padded batches.

A row is a plain dict, one JSON object a line. A single trajectory, with `label` if it is for KTO:

    {"problem_id": str, "sample": int, "input_ids": [int], "completion_mask": [0 or 1], "label": bool}

and a pair, both sides beginning with the same prompt:

    {"problem_id": str, "chosen_sample": int, "rejected_sample": int,
     "chosen_input_ids": [int], "chosen_completion_mask": [0 or 1],
     "rejected_input_ids": [int], "rejected_completion_mask": [0 or 1]}

Online training adds `pref_prob`, the probability that the chosen side wins, to a pair, and makes single trajectories
with a `reward` in place of `label`; such rows are never on disk.

`completion_mask` is 1 on the ids that the model sampled, 0 on prompt and tool output. The prompt is the
leading run of zeros.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mtpo.errors import InputError
from mtpo.layouts import Layout, arranged

logger = logging.getLogger(__name__)

Row = dict[str, Any]
RowKind = Literal["single", "label", "reward", "pair"]
Mask = Literal["action", "none", "last_turn"]

COLUMNS: dict[RowKind, dict[str, type]] = {
    "single": {"problem_id": str, "sample": int, "input_ids": list, "completion_mask": list},
    "label": {"problem_id": str, "sample": int, "input_ids": list, "completion_mask": list, "label": bool},
    "reward": {"problem_id": str, "sample": int, "input_ids": list, "completion_mask": list, "reward": float},
    "pair": {
        "problem_id": str,
        "chosen_sample": int,
        "rejected_sample": int,
        "chosen_input_ids": list,
        "chosen_completion_mask": list,
        "rejected_input_ids": list,
        "rejected_completion_mask": list,
    },
}


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a JSONL file, checked; blank lines are skipped.

    Raises:
        InputError: naming the file and the line: no such file, not JSON, a column is missing or of the wrong
            type, ids and mask differ in length, the mask marks token 0 or nothing at all, the sides of a pair
            do not share their prompt, rows of two kinds in one file, or no row at all.
    """
    rows: list[Row] = []
    try:
        with Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                rows.append(_parsed(line, where := f"{path}, line {number}"))
                if row_kind(rows[-1]) != row_kind(rows[0]):
                    raise InputError(
                        f"{where}: a {row_kind(rows[-1])} row in a file of {row_kind(rows[0])} rows"
                    )
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    if not rows:
        raise InputError(f"{path}: holds no rows")
    return rows


def row_kind(row: Row) -> RowKind:
    if "chosen_input_ids" in row:
        return "pair"
    return "label" if "label" in row else "reward" if "reward" in row else "single"


def check_row(row: Row, where: str) -> None:
    """
    Raises:
        InputError: beginning with `where`, what is wrong with the row.
    """
    for name, expected in COLUMNS[row_kind(row)].items():
        if name not in row:
            raise InputError(
                f"{where}: the column {name!r} is missing; a {row_kind(row)} row has "
                f"{', '.join(COLUMNS[row_kind(row)])}"
            )
        if type(row[name]) is not expected:
            raise InputError(f"{where}: {name} is {row[name]!r:.40}, expected {expected.__name__}")
    for side in sides(row):
        _check_side(row, side, where)
    if row_kind(row) == "pair" and prompt_ids(row, "chosen_") != prompt_ids(row, "rejected_"):
        raise InputError(f"{where}: chosen and rejected do not begin with the same prompt")


def sides(row: Row) -> tuple[str, ...]:
    """Prefixes of the columns that hold a trajectory."""
    return ("chosen_", "rejected_") if row_kind(row) == "pair" else ("",)


def prompt_ids(row: Row, side: str = "") -> list[int]:
    """The ids before the first one that the model sampled."""
    return row[f"{side}input_ids"][: row[f"{side}completion_mask"].index(1)]


def row_name(row: Row) -> str:
    """For messages: the problem, and which of its samples."""
    samples = [row.get(f"{side}sample", "?") for side in sides(row)]
    return f"{row.get('problem_id', '?')} sample {' over '.join(map(str, samples))}"


def usable_rows(
    rows: Sequence[Row], kind: RowKind, *, trainer: str, vocab_size: int, max_length: int
) -> list[Row]:
    """The rows that fit into `max_length` tokens, all checked; a warning counts the others.

    Args:
        trainer: for messages: what is to train on them.
        vocab_size: how many ids the model knows.

    Raises:
        InputError: there is no row, one is broken, of another kind or holds an id that the model does not know,
            or none fits.
    """
    if not rows:
        raise InputError("there are no rows to train on")
    for number, row in enumerate(rows, start=1):
        if row_kind(row) != kind:
            raise InputError(f"{trainer} trains on {kind} rows, but row {number} is a {row_kind(row)} row")
        check_row(row, f"row {number}")
        largest = max(max(row[f"{side}input_ids"]) for side in sides(row))
        if largest >= vocab_size:
            raise InputError(
                f"row {number} ({row_name(row)}) holds token id {largest}, but the model knows {vocab_size}: "
                "was it made with another tokenizer?"
            )
    kept, num_dropped = drop_too_long(rows, max_length)
    if num_dropped:
        logger.warning("dropped %d of %d rows: longer than %d tokens", num_dropped, len(rows), max_length)
    return kept


def drop_too_long(rows: Sequence[Row], max_length: int) -> tuple[list[Row], int]:
    """The rows of which no trajectory is longer than `max_length` tokens, and the number of the others.

    A trajectory is never cut: without its end it would be another one.

    Raises:
        InputError: nothing is left.
    """
    kept = [row for row in rows if row_length(row) <= max_length]
    if not kept:
        shortest = min((row_length(row) for row in rows), default=0)
        raise InputError(
            f"none of {len(rows)} rows fits into {max_length} tokens; the shortest needs {shortest}"
        )
    return kept, len(rows) - len(kept)


def row_length(row: Row) -> int:
    """Tokens of the row's longest trajectory."""
    return max(len(row[f"{side}input_ids"]) for side in sides(row))


def masked_rows(rows: Sequence[Row], mask: Mask) -> list[Row]:
    """The rows, and those under their `mismatched`, with another mask.

    "action" leaves them as they are. "none" counts everything after the prompt: the single-turn baseline of the
    multi-turn papers, which trains tool output and turn headers too. "last_turn" counts what the model sampled
    after the last tool output, as trainers do that take the conversation so far for the prompt; the prompt of
    such a row, to `prompt_ids`, then ends there.
    """
    if mask == "action":
        return list(rows)
    masked = []
    for row in rows:
        columns: Row = {
            f"{side}completion_mask": _masked(row[f"{side}completion_mask"], mask) for side in sides(row)
        }
        if "mismatched" in row:
            columns["mismatched"] = masked_rows([row["mismatched"]], mask)[0]
        masked.append(row | columns)
    return masked


def _masked(completion_mask: Sequence[int], mask: Mask) -> list[int]:
    if mask == "none":
        start, end = completion_mask.index(1), len(completion_mask)
    else:
        from_the_end = list(reversed(completion_mask))
        end = len(completion_mask) - from_the_end.index(1)
        start = max((place + 1 for place in range(end) if not completion_mask[place]), default=0)
    return [int(start <= place < end) for place in range(len(completion_mask))]


@dataclass(frozen=True)
class SingleCollator:
    """Rows with one trajectory -> right-padded tensors, and in another layout than "padded" those of `mtpo.layouts`.

    input_ids, attention_mask, completion_mask: (B, T) int64. If the rows have them: labels (B,) bool from
    `label`, rewards (B,) float64 from `reward`, ref_logps (B, T), 0 off the mask, from `ref_logps`, a tensor with a
    value for each action token, index (B,) int64 from `index`; and from `mismatched`, a row itself, the same tensors
    with the prefix `kl_`.
    """

    pad_id: int
    layout: Layout = "padded"

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        batch = _padded([(row["input_ids"], row["completion_mask"]) for row in rows], self.pad_id)
        if self.layout != "padded":
            alone = [(n,) for n in range(len(rows))]
            batch |= arranged([row["input_ids"] for row in rows], alone, self.pad_id)
        if "label" in rows[0]:
            batch["labels"] = torch.tensor([row["label"] for row in rows], dtype=torch.bool)
        if "reward" in rows[0]:
            batch["rewards"] = torch.tensor([row["reward"] for row in rows], dtype=torch.float64)
        if "ref_logps" in rows[0]:
            batch["ref_logps"] = _on_mask(batch["completion_mask"], [row["ref_logps"] for row in rows])
        if "mismatched" in rows[0]:
            mismatched = SingleCollator(self.pad_id, self.layout)([row["mismatched"] for row in rows])
            batch |= {f"kl_{name}": tensor for name, tensor in mismatched.items()}
        return batch | _index(rows)


@dataclass(frozen=True)
class PairCollator:
    """B pairs -> one right-padded batch of 2 B trajectories, all chosen ones before all rejected ones.

    In another layout than "padded" also the tensors of `mtpo.layouts`.
    input_ids, attention_mask, completion_mask: (2 B, T) int64. If the rows have them: ref_logps (2 B, T), 0 off
    the mask, from `chosen_ref_logps` and `rejected_ref_logps`, tensors with a value for each action token, index
    (B,) int64 from `index`, pref_prob (B,) float64 from `pref_prob`.
    """

    pad_id: int
    layout: Layout = "padded"

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        order = [(row, side) for side in ("chosen_", "rejected_") for row in rows]
        batch = _padded(
            [(row[f"{side}input_ids"], row[f"{side}completion_mask"]) for row, side in order], self.pad_id
        )
        if self.layout != "padded":
            pairs = [(n, len(rows) + n) for n in range(len(rows))]
            units = pairs if self.layout == "tree" else [(n,) for pair in pairs for n in pair]
            batch |= arranged([row[f"{side}input_ids"] for row, side in order], units, self.pad_id)
        if "chosen_ref_logps" in rows[0]:
            logps = [row[f"{side}ref_logps"] for row, side in order]
            batch["ref_logps"] = _on_mask(batch["completion_mask"], logps)
        if "pref_prob" in rows[0]:
            batch["pref_prob"] = torch.tensor([row["pref_prob"] for row in rows], dtype=torch.float64)
        return batch | _index(rows)


def _padded(sequences: Sequence[tuple[list[int], list[int]]], pad_id: int) -> dict[str, Tensor]:
    shape = len(sequences), max(len(ids) for ids, _ in sequences)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    completion_mask = torch.zeros(shape, dtype=torch.int64)
    for row, (ids, mask) in enumerate(sequences):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        completion_mask[row, : len(ids)] = torch.tensor(mask)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "completion_mask": completion_mask}


def _on_mask(completion_mask: Tensor, values: Sequence[Tensor]) -> Tensor:
    """(B, T): the values of each row in order where its mask is 1, and 0 elsewhere."""
    joint = torch.cat(list(values))
    return joint.new_zeros(completion_mask.shape).masked_scatter(completion_mask.bool(), joint)


def _index(rows: Sequence[Row]) -> dict[str, Tensor]:
    return {"index": torch.tensor([row["index"] for row in rows])} if "index" in rows[0] else {}


def _parsed(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object, got {line.strip()!r:.40}")
    check_row(row, where)
    return row


def _check_side(row: Row, side: str, where: str) -> None:
    ids, mask = row[f"{side}input_ids"], row[f"{side}completion_mask"]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise InputError(f"{where}: {side}input_ids must be non-negative integers")
    if not all(type(m) is int and 0 <= m <= 1 for m in mask):
        raise InputError(f"{where}: {side}completion_mask must hold 0 and 1 only")
    if len(ids) != len(mask):
        raise InputError(f"{where}: {len(ids)} {side}input_ids but {len(mask)} {side}completion_mask")
    if 1 not in mask:
        raise InputError(f"{where}: {side}completion_mask has no 1: there is nothing to learn from")
    if mask[0]:
        raise InputError(
            f"{where}: {side}completion_mask marks token 0, which nothing predicts: is the prompt empty?"
        )
