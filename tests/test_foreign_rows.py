"""Others' pairs, labels and demonstrations become rows that we train on, turn by turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.conversations import conversation_rows
from data.foreign_rows import foreign_rows
from data.labels import pair_row, single_row
from data.problems import read_problems
from eval.lineage import lineage_of
from mtpo.batches import Row, read_rows, sides
from mtpo.chat import ChatFormat
from mtpo.errors import InputError
from mtpo.runs import write_jsonl
from mtpo.trajectory import Problem
from recipes import import_rows, train
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import make_tokenizer, published_template

GEMMA = ChatFormat.for_tokenizer(make_tokenizer("gemma"))
CODE, ANSWER, WRONG = "```python\nprint(48 + 24)\n```", "The answer is $\\boxed{72}$.", "So $\\boxed{24}$."


def message(role: str, content: str) -> dict[str, str]:
    return {"content": content, "role": role}


def paper_pair(number: int = 0) -> dict[str, Any]:
    """As the authors of arXiv 2409.02392 write pairs: message lists, tool output in fenced user turns."""
    question, output = message("user", f"What is {number} + 72?"), message("user", "```output\n72\n```")
    return {
        "gt": "72",
        "chosen": [question, message("assistant", CODE), output, message("assistant", ANSWER)],
        "rejected": [question, message("assistant", CODE), output, message("assistant", WRONG)],
    }


def write_parquet(path: Path, *rows: dict[str, Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def trained_text(row: Row, side: str) -> str:
    ids = [i for i, m in zip(row[f"{side}input_ids"], row[f"{side}completion_mask"], strict=True) if m]
    return GEMMA.tokenizer.decode(ids)


def test_a_pair_trains_what_the_assistant_wrote_and_nothing_else(tmp_path: Path) -> None:
    found = foreign_rows(
        write_parquet(tmp_path / "pairs.parquet", paper_pair(), paper_pair(1)), GEMMA, "pairs"
    )
    assert [row["problem_id"] for row in found.rows] == ["pairs/0", "pairs/1"] and not found.refused
    assert found.problems[1] == Problem("pairs/1", "What is 1 + 72?", "72")
    row = found.rows[0]
    assert trained_text(row, "chosen_") == f"{CODE}<end_of_turn>{ANSWER}<end_of_turn>"
    assert trained_text(row, "rejected_") == f"{CODE}<end_of_turn>{WRONG}<end_of_turn>"
    for side in sides(row):  # the template itself, on the whole conversation
        text = GEMMA.tokenizer.apply_chat_template(paper_pair()[side.strip("_")], tokenize=False)
        assert GEMMA.tokenizer.decode(row[f"{side}input_ids"]) == text.rstrip("\n")


def test_pairs_give_labels_and_demonstrations_too(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "pairs.parquet", paper_pair())
    pair, labels = foreign_rows(file, GEMMA, "pairs").rows[0], foreign_rows(file, GEMMA, "binary").rows
    assert [row["label"] for row in labels] == [True, False]
    for row, side in zip(labels, ("chosen_", "rejected_"), strict=True):
        assert row["input_ids"] == pair[f"{side}input_ids"]
        assert row["completion_mask"] == pair[f"{side}completion_mask"]
    assert foreign_rows(file, GEMMA, "sft").rows == [
        {name: value for name, value in labels[0].items() if name != "label"}
    ]


def test_demonstrations_are_message_lists(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "sft.jsonl", [{"messages": paper_pair()["chosen"]}])
    [row] = foreign_rows(tmp_path / "sft.jsonl", GEMMA, "sft").rows
    assert trained_text(row, "") == f"{CODE}<end_of_turn>{ANSWER}<end_of_turn>"


@pytest.mark.parametrize("kind", ["pairs", "binary", "sft"])
def test_rows_come_back_from_their_export(kind: Any, tmp_path: Path) -> None:
    """What was tokenised from text keeps its ids: the conversations that we write are those that we read."""
    whole = paper_pair()
    problem = Problem("p/7", whole["chosen"][0]["content"], "72")
    first, second = (
        GEMMA.import_trajectory(problem, whole[side], sample=sample)
        for sample, side in ((3, "chosen"), (5, "rejected"))
    )
    rows = {
        "pairs": [pair_row("p/7", first, second)],
        "binary": [single_row("p/7", t) | {"label": t is first} for t in (first, second)],
        "sft": [single_row("p/7", first)],
    }[kind]
    write_jsonl(tmp_path / "shown.jsonl", conversation_rows(rows, [first, second], GEMMA))
    assert foreign_rows(tmp_path / "shown.jsonl", GEMMA, kind).rows == rows


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rejected": None}, "expected a pair, with the fields chosen and rejected"),
        ({"rejected": paper_pair()["chosen"]}, "chosen and rejected take the same turns"),
        ({"rejected": paper_pair(1)["rejected"]}, "chosen and rejected do not begin with the same prompt"),
        (
            {"chosen": [*paper_pair()["chosen"], message("assistant", "And?")]},
            "chosen: message 4 has the role 'assistant', expected tool or user",
        ),
    ],
)
def test_a_record_that_gives_no_row_is_left_out_and_told(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "pairs.jsonl"
    write_jsonl(file, [paper_pair(), paper_pair() | changes])
    found = foreign_rows(file, GEMMA, "pairs")
    assert found.refused == [f"{file}, line 2: {reason}"] and len(found.rows) == len(found.problems) == 1
    write_jsonl(file, [paper_pair() | changes])
    with pytest.raises(InputError, match=rf"gives no row for pairs: .*line 1: {reason}"):
        foreign_rows(file, GEMMA, "pairs")


def test_a_label_must_be_true_or_false(tmp_path: Path) -> None:
    row = {"prompt": [message("user", "q")], "completion": [message("assistant", "a")], "label": 1}
    write_jsonl(tmp_path / "labels.jsonl", [row])
    with pytest.raises(InputError, match=r"line 1: expected chosen and rejected, or a label .* got 1"):
        foreign_rows(tmp_path / "labels.jsonl", GEMMA, "binary")


def test_a_template_that_changes_a_turn_of_a_conversation_is_refused_with_its_place(tmp_path: Path) -> None:
    shouting = published_template("gemma").replace(
        "message['content']", "message['content'].replace('print', 'PRINT')"
    )
    tokenizer = make_tokenizer("gemma", shouting)
    write_jsonl(tmp_path / "pairs.jsonl", [paper_pair()])
    with pytest.raises(InputError, match=r"pairs\.jsonl, line 1: chosen: .* is not prefix-stable at turn 1"):
        foreign_rows(tmp_path / "pairs.jsonl", ChatFormat.for_tokenizer(tokenizer), "pairs")


def test_two_questions_may_not_share_a_problem_id(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", [paper_pair(n) | {"problem_id": "p"} for n in (0, 1)])
    with pytest.raises(InputError, match="line 2: problem 'p' is another one than in a line before"):
        foreign_rows(tmp_path / "pairs.jsonl", GEMMA, "pairs")


def test_a_published_set_is_imported_and_trained_on_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def hub(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_list([paper_pair(n) for n in range(4)])

    monkeypatch.setattr(datasets, "load_dataset", hub)
    tokenizer = GEMMA.tokenizer
    model = tiny_model(
        "gemma2", vocab_size=len(tokenizer), num_hidden_layers=1, layer_types=["full_attention"]
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    name, out = "RLHF4MATH/Gemma-7B-1.1-it-iter1-random-pairs", tmp_path / "theirs"
    more = write_parquet(
        tmp_path / "more.parquet", paper_pair(9), paper_pair(9) | {"rejected": paper_pair(9)["chosen"]}
    )
    argv = ["--data", f"{name}:train", str(more), "--tokenizer", str(tmp_path / "model"), "--out", str(out)]
    assert import_rows.main(argv) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"5 rows in {out}/pairs.jsonl (1 records left out)"
    assert asked == [(name, None, "train")]
    assert [p.id for p in read_problems(out / "problems.jsonl")] == [
        *(f"{name}/{n}" for n in range(4)),
        "more/0",
    ]
    assert len(read_rows(out / "pairs.jsonl")) == 5
    argv = [
        "--method",
        "dpo",
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(out),
        "--out",
        str(tmp_path / "dpo"),
    ]
    assert train.main([*argv, "--learning_rate", "1e-3", "--batch_size", "5"]) == 0
    assert "1 steps on 5 rows" in capsys.readouterr().out
    known = lineage_of(str(tmp_path / "dpo" / "model")).known
    assert [p.question for p in known[str(out / "problems.jsonl")]][4] == "What is 9 + 72?"


def test_an_existing_folder_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    GEMMA.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(paper_pair()))
    argv = [
        "--data",
        str(tmp_path / "pairs.jsonl"),
        "--tokenizer",
        str(tmp_path / "model"),
        "--out",
        str(tmp_path / "o"),
    ]
    assert import_rows.main(argv) == 0
    assert import_rows.main(argv) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert import_rows.main([*argv, "--resume"]) == 0
