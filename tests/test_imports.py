import dataclasses
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from data.imports import read_foreign
from data.problems import load_problems
from mtpo.errors import InputError
from mtpo.trajectory import Problem

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared_data = pytest.mark.skipif(
    not SHARED.exists(), reason="needs the real trajectories in ../shared/data"
)

CODE = "Let me count.\n```python\nprint(3 + 4)\n```"
ANSWER = "So it is $\\boxed{7}$."
QUESTION = {"role": "user", "content": "What is 3 + 4?"}
TURNS = [
    {"role": "assistant", "content": CODE},
    {"role": "tool", "content": "7"},
    {"role": "assistant", "content": ANSWER},
]
FLAT = f"{CODE}\n```output\n7\n```\n{ANSWER}"


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"question": "What is 3 + 4?", "gold": "7", "turns": TURNS, "response": "not looked at"},
        {"question": "What is 3 + 4?", "gold": "7", "turns": json.dumps(TURNS)},
        {"question": "What is 3 + 4?", "gt": "7", "code": [FLAT], "pred": ["7"]},
        {"problem": "What is 3 + 4?", "answer": "7", "response": FLAT},
        {"messages": [QUESTION, *TURNS], "answer": 7.0},
        {"prompt": [QUESTION], "completion": TURNS, "gold": "7"},
    ],
)
def test_every_form_gives_the_same_messages_and_problem(tmp_path: Path, row: Any) -> None:
    (found,) = read_foreign(write_rows(tmp_path / "toy.jsonl", row))
    assert found.messages == [QUESTION, *TURNS]
    assert found.problem == Problem("toy/0", "What is 3 + 4?", "7")


def test_a_pair_gives_both_sides_with_the_papers_user_turns(tmp_path: Path) -> None:
    chosen = [QUESTION, TURNS[0], {"role": "user", "content": "```output\n7\n```"}, TURNS[2]]
    rejected = [QUESTION, {"role": "assistant", "content": "\\boxed{8}"}]
    row = {"gt": "7", "chosen": chosen, "rejected": rejected}
    first, second = read_foreign(write_rows(tmp_path / "pairs.jsonl", row))
    assert (first.messages, first.metadata) == (chosen, {"gt": "7", "side": "chosen"})
    assert (second.messages, second.metadata["side"]) == (rejected, "rejected")
    assert first.problem == second.problem == Problem("pairs/0", "What is 3 + 4?", "7")


@pytest.mark.parametrize("prompt", ["What is 3 + 4?", [QUESTION]])
def test_a_prompt_beside_the_pair_comes_first(tmp_path: Path, prompt: Any) -> None:
    row = {"prompt": prompt, "chosen": TURNS}
    (found,) = read_foreign(write_rows(tmp_path / "pairs.jsonl", row))
    assert found.messages == [QUESTION, *TURNS]
    assert found.problem.answer == ""


def test_a_list_of_texts_is_several_samples(tmp_path: Path) -> None:
    row = {"idx": 5, "question": "What is 3 + 4?", "gt": "7", "code": [FLAT, "\\boxed{8}"]}
    first, second = read_foreign(write_rows(tmp_path / "tora.jsonl", row))
    assert first.messages == [QUESTION, *TURNS]
    assert second.messages == [QUESTION, {"role": "assistant", "content": "\\boxed{8}"}]
    assert (first.metadata, second.metadata) == (
        {"idx": 5, "gt": "7", "sample": 0},
        {"idx": 5, "gt": "7", "sample": 1},
    )


def test_a_problem_is_named_as_load_problems_names_it(tmp_path: Path) -> None:
    row = {"dataset": "gsm8k", "split": "test", "index": 17, "id": "ST1", "question": "q", "turns": TURNS}
    other = {"problem_id": "mine/3", "question": "q", "turns": TURNS}
    first, second = read_foreign(write_rows(tmp_path / "toy.jsonl", row, other))
    assert (first.problem.id, first.metadata["id"]) == ("gsm8k:test/17", "ST1")
    assert second.problem.id == "mine/3"


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("not an object", "expected a JSON object, got str"),
        ({"question": "q"}, r"no trajectory among the fields \['question'\]"),
        ({"turns": TURNS}, "expected the question as a text"),
        ({"question": "q", "turns": []}, "'turns' must be a list of messages"),
        ({"question": "q", "turns": "{"}, "'turns' is a text but not JSON"),
        ({"question": "q", "turns": [{"role": "tool"}]}, "'turns', message 0: expected role and content"),
        (
            {"messages": [QUESTION, {"role": "gpt", "content": "hi"}]},
            "'messages', message 1: unknown role 'gpt'",
        ),
        ({"messages": TURNS}, "the messages hold no question"),
        ({"question": "q", "code": [None]}, "'code' must be a text or a list of texts"),
    ],
)
def test_a_broken_record_names_file_and_line(tmp_path: Path, row: Any, complaint: str) -> None:
    good = {"question": "q", "turns": TURNS}
    path = tmp_path / "toy.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join([json.dumps(good), json.dumps(row)]).encode()))
    found = read_foreign(path)
    assert next(found).problem.question == "q"
    with pytest.raises(InputError, match=rf"toy\.jsonl\.gz, line 2: {complaint}") as raised:
        next(found)
    assert "\n" not in str(raised.value)


def test_parquet_and_the_hub_give_what_a_file_of_lines_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"gold": str(n), "messages": [QUESTION, *TURNS]} for n in range(3)]
    [*expected] = read_foreign(write_rows(tmp_path / "toy.jsonl", *rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "toy.parquet")
    found = list(read_foreign(tmp_path / "toy.parquet"))
    places = [f"{tmp_path / 'toy.parquet'}, row {n}" for n in range(3)]
    assert [foreign.place for foreign in found] == places
    assert [dataclasses.replace(foreign, place="") for foreign in found] == [
        dataclasses.replace(foreign, place="") for foreign in expected
    ]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, config, split: rows if split == "train" else None
    )
    assert [f.problem.id for f in read_foreign("me/toy:train")] == ["me/toy/0", "me/toy/1", "me/toy/2"]
    with pytest.raises(InputError, match="nowhere: no such file"):
        next(read_foreign("me/nowhere"))


@needs_shared_data
def test_the_real_trajectories_are_read_and_belong_to_the_real_problems() -> None:
    found = list(read_foreign(SHARED / "trajectories" / "real_trajectories.jsonl.gz"))
    assert Counter(t.metadata["format"] for t in found) == {"mathcoder": 695, "tora": 200, "mint": 120}
    problems = {p.id: p for s in ("gsm8k", "math") for p in load_problems(f"{s}:test@{SHARED / s}")}
    for trajectory in found:
        assert trajectory.problem.question == problems[trajectory.problem.id].question
        roles = [message["role"] for message in trajectory.messages]
        assert roles == ["user", *["assistant", "tool"] * len(roles)][: len(roles)]
    assert sum(t.messages[-1]["role"] == "tool" for t in found) == 16


def test_answer_in_solution_tags_becomes_a_box(tmp_path: Path) -> None:
    turns = [
        {"role": "assistant", "content": "<thought>Try.</thought> <solution> 7 </solution>"},
        {"role": "tool", "content": "<solution>wrong</solution>"},
        {"role": "assistant", "content": "<solution>It is $\\boxed{8}$.</solution>"},
    ]
    path = tmp_path / "mint.jsonl"
    path.write_text(json.dumps({"question": "q", "gold": "8", "turns": turns}))
    [found] = read_foreign(path)
    assert [m["content"] for m in found.messages[1:]] == [
        "<thought>Try.</thought> \\boxed{7}",
        "<solution>wrong</solution>",
        "It is $\\boxed{8}$.",
    ]
