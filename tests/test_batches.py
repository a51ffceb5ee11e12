from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mtpo.batches import (
    PairCollator,
    SingleCollator,
    drop_too_long,
    masked_rows,
    prompt_ids,
    read_rows,
)
from mtpo.errors import InputError

SINGLE: dict[str, Any] = {
    "problem_id": "p/1",
    "sample": 3,
    "input_ids": [2, 11, 12, 13, 14, 15],
    "completion_mask": [0, 0, 1, 0, 0, 1],
}
PAIR: dict[str, Any] = {
    "problem_id": "p/1",
    "chosen_sample": 0,
    "rejected_sample": 4,
    "chosen_input_ids": [2, 11, 12, 13],
    "chosen_completion_mask": [0, 0, 1, 1],
    "rejected_input_ids": [2, 11, 21, 22, 23],
    "rejected_completion_mask": [0, 0, 1, 0, 1],
}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path / "a.jsonl", SINGLE, "", SINGLE)) == [SINGLE, SINGLE]
    assert read_rows(write(tmp_path / "b.jsonl", PAIR)) == [PAIR]
    labelled = SINGLE | {"label": False}
    assert read_rows(write(tmp_path / "c.jsonl", labelled)) == [labelled]


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "not json": ('{"problem_id": "p', "not JSON"),
    "no object": ("[1]", "expected an object"),
    "missing": ({k: v for k, v in SINGLE.items() if k != "completion_mask"}, "'completion_mask' is missing"),
    "missing side": ({k: v for k, v in PAIR.items() if k != "rejected_input_ids"}, "'rejected_input_ids'"),
    "type": (SINGLE | {"sample": "3"}, "sample is '3', expected int"),
    "label type": (SINGLE | {"label": 1}, "label is 1, expected bool"),
    "ids": (SINGLE | {"input_ids": [2, 11, 12.0, 13, 14, 15]}, "non-negative integers"),
    "mask value": (SINGLE | {"completion_mask": [0, 0, 1, 0, 0, 2]}, "0 and 1 only"),
    "length": (SINGLE | {"completion_mask": [0, 1]}, "6 input_ids but 2"),
    "empty mask": (SINGLE | {"completion_mask": [0] * 6}, "no 1"),
    "token 0": (SINGLE | {"completion_mask": [1] * 6}, "token 0"),
    "two prompts": (PAIR | {"rejected_input_ids": [2, 99, 21, 22, 23]}, "the same prompt"),
    "two prompt lengths": (PAIR | {"rejected_completion_mask": [0, 0, 0, 0, 1]}, "the same prompt"),
}


@pytest.mark.parametrize(("row", "message"), list(BAD_ROWS.values()), ids=list(BAD_ROWS))
def test_bad_rows_name_file_and_line(row: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", PAIR if "chosen_sample" in row else SINGLE, row)
    with pytest.raises(InputError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}, line 2: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_trained_on(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_rows(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="holds no rows"):
        read_rows(write(tmp_path / "empty.jsonl", ""))
    with pytest.raises(InputError, match="line 2: a pair row in a file of single rows"):
        read_rows(write(tmp_path / "mixed.jsonl", SINGLE, PAIR))


def test_too_long_rows_are_dropped_whole_and_counted() -> None:
    assert drop_too_long([SINGLE, PAIR], 5) == ([PAIR], 1)
    assert drop_too_long([SINGLE, PAIR], 6) == ([SINGLE, PAIR], 0)
    with pytest.raises(InputError, match="none of 2 rows fits into 4 tokens; the shortest needs 5"):
        drop_too_long([SINGLE, PAIR], 4)


def test_without_the_mask_everything_after_the_prompt_counts() -> None:
    (single,) = masked_rows([SINGLE], "none")
    assert single["completion_mask"] == [0, 0, 1, 1, 1, 1]
    (pair,) = masked_rows([PAIR], "none")
    assert pair["rejected_completion_mask"] == [0, 0, 1, 1, 1]
    (around,) = masked_rows([SINGLE | {"mismatched": SINGLE}], "none")
    assert around["mismatched"]["completion_mask"] == [0, 0, 1, 1, 1, 1]
    assert SINGLE["completion_mask"] == [0, 0, 1, 0, 0, 1]
    assert masked_rows([SINGLE], "action") == [SINGLE]
    assert prompt_ids(single) == [2, 11]


def test_the_last_turn_is_what_follows_the_last_tool_output() -> None:
    (pair,) = masked_rows([PAIR], "last_turn")
    assert pair["chosen_completion_mask"] == [0, 0, 1, 1]  # a single turn is the last one
    assert pair["rejected_completion_mask"] == [0, 0, 0, 0, 1]
    three_turns = SINGLE | {"input_ids": [2] * 9, "completion_mask": [0, 1, 1, 0, 1, 0, 1, 1, 0]}
    (single,) = masked_rows([SINGLE | {"mismatched": three_turns}], "last_turn")
    assert single["completion_mask"] == [0, 0, 0, 0, 0, 1]
    assert single["mismatched"]["completion_mask"] == [0, 0, 0, 0, 0, 0, 1, 1, 0]


def test_single_collator_pads_on_the_right() -> None:
    short = SINGLE | {"input_ids": [2, 7], "completion_mask": [0, 1]}
    logps = torch.tensor([-1.5, -0.5]), torch.tensor([-2.5])
    rows = [SINGLE | {"label": True, "ref_logps": logps[0]}, short | {"label": False, "ref_logps": logps[1]}]
    batch = SingleCollator(pad_id=0)(rows)
    assert batch["input_ids"].tolist() == [[2, 11, 12, 13, 14, 15], [2, 7, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1, 1, 0, 0, 0, 0]]
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 0, 0, 1], [0, 1, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [True, False] and batch["labels"].dtype == torch.bool
    assert batch["ref_logps"].tolist() == [[0, 0, -1.5, 0, 0, -0.5], [0, -2.5, 0, 0, 0, 0]]


def test_single_collator_keeps_mismatched_rows_apart() -> None:
    mismatched = {"input_ids": [2, 9, 9], "completion_mask": [0, 0, 1], "ref_logps": torch.tensor([-4.0])}
    batch = SingleCollator(pad_id=0)([SINGLE | {"mismatched": mismatched}])
    assert batch["kl_input_ids"].tolist() == [[2, 9, 9]] and batch["kl_ref_logps"].tolist() == [[0, 0, -4.0]]
    assert batch["input_ids"].shape == (1, 6) and "ref_logps" not in batch


def test_pair_collator_stacks_chosen_over_rejected() -> None:
    rows = [
        PAIR
        | {f"{side}_ref_logps": torch.tensor(values) for side, values in logps.items()}
        | {"index": index}
        for index, logps in (
            (7, {"chosen": [-1.0, -2.0], "rejected": [-3.0, -4.0]}),
            (2, {"chosen": [-5.0, -6.0], "rejected": [-7.0, -8.0]}),
        )
    ]
    batch = PairCollator(pad_id=0)(rows)
    chosen, rejected = [2, 11, 12, 13, 0], [2, 11, 21, 22, 23]
    assert batch["input_ids"].tolist() == [chosen, chosen, rejected, rejected]
    assert batch["completion_mask"][::2].tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 0, 1]]
    assert batch["ref_logps"].tolist() == [
        [0, 0, -1.0, -2.0, 0],
        [0, 0, -5.0, -6.0, 0],
        [0, 0, -3.0, 0, -4.0],
        [0, 0, -7.0, 0, -8.0],
    ]
    assert batch["index"].tolist() == [7, 2]
