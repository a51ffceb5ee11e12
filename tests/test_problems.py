import dataclasses
import gzip
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from data.problems import (
    MATH_SUBJECTS,
    assert_disjoint,
    drop_repeated,
    drop_shared,
    load_problems,
    num_problems,
    read_problem_file,
)
from mtpo.errors import InputError
from mtpo.trajectory import Problem

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared_data = pytest.mark.skipif(
    not SHARED.exists(), reason="needs the GSM8K and MATH files in ../shared/data"
)

GSM8K_ROW = {"question": "Tom has 2,000 pens and buys 125. How many?", "answer": "2000+125=2125\n#### 2,125"}
MATH_ROW = {
    "problem": "What is $1/2 + 1/4$?",
    "level": "Level 1",
    "type": "Prealgebra",
    "solution": "First \\boxed{\\frac12}, so the sum is $\\boxed{\\frac{3}{4}}$.",
}


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        (GSM8K_ROW, GSM8K_ROW["question"], "2125"),
        (MATH_ROW, MATH_ROW["problem"], "\\frac{3}{4}"),
        (MATH_ROW | {"answer": "0.75"}, MATH_ROW["problem"], "0.75"),
        ({"problem": "p", "solution": "Thus $\\boxed 2$."}, "p", "2"),
        ({"input": "i", "target": 43.0}, "i", "43"),
        ({"input": "i", "target": -2.5}, "i", "-2.5"),
        (
            {"Body": "Eve has 3 figs. ", "Question": "How many?", "Answer": 3.0},
            "Eve has 3 figs. How many?",
            "3",
        ),
        ({"question": "q", "answer": 7}, "q", "7"),
        ({"question": "q", "final_answer": ["$1$", "$2$"]}, "q", "$1$, $2$"),
        ({"query": "q", "response": "2 + 3 = 5.\n#### 5\nThe answer is: 5", "type": "GSM_SV"}, "q", "5"),
        ({"query": "q", "response": "So $\\boxed{7}$ is y.\nThe answer is: \\frac12 "}, "q", "\\frac12"),
        ({"query": "q", "response": "The answer is: not yet.\nIt is $\\boxed{7}$."}, "q", "7"),
        ({"instruction": "i", "output": "The answer is: $\\boxed{\\{1\\}}$.", "source": "s"}, "i", "\\{1\\}"),
        ({"question": "q", "solution": "2 + 3\n#### 1,005", "type": "gsm8k"}, "q", "1005"),
    ],
)
def test_a_row_is_recognised_by_its_fields(tmp_path: Path, row: Any, question: str, answer: str) -> None:
    (problem,) = load_problems(str(write_rows(tmp_path / "set.jsonl", row)))
    assert (problem.question, problem.answer) == (question, answer)


def test_a_gold_answer_that_is_the_last_of_several_boxes_keeps_them_all(tmp_path: Path) -> None:
    solution = r"The roots are $\boxed{-2}$ and $\boxed{1}$."
    rows = [{"problem": "p", "solution": solution}, {"problem": "p", "answer": "1", "solution": solution}]
    others = [MATH_ROW, {"problem": "p", "answer": "7", "solution": solution}, GSM8K_ROW]
    problems = load_problems(str(write_rows(tmp_path / "set.jsonl", *rows, *others)))
    assert [p.answer for p in problems[:2]] == ["1", "1"]
    assert [p.joined_answer for p in problems] == ["-2, 1", "-2, 1", None, None, None]
    assert load_problems(str(write_rows(tmp_path / "again.jsonl", problems[0].to_json())))[0] == (
        dataclasses.replace(problems[0], id="set/0")
    )


@needs_shared_data
def test_golds_of_math_that_are_cut_from_several_boxes(caplog: pytest.LogCaptureFixture) -> None:
    problems = [p for split in ("train", "test") for p in load_problems(f"math:{split}@{SHARED / 'math'}")]
    assert len(problems) == 12_498
    assert "left out 2 problems with an empty box" in caplog.text
    assert sum(p.joined_answer is not None for p in problems) == 22  # counted by hand, see the data's README


def test_the_rows_in_the_readme_are_all_read(tmp_path: Path) -> None:
    readme = (Path(__file__).resolve().parents[1] / "data" / "README.md").read_text()
    rows = readme.partition("```json\n")[2].partition("```")[0]
    (tmp_path / "readme.jsonl").write_text(rows)
    answers = [p.answer for p in load_problems(str(tmp_path / "readme.jsonl"))]
    assert answers == ["2125", "\\frac34", "5", "4", "4", "4", "4", "4"]


def test_level_and_subject_are_kept_as_text(tmp_path: Path) -> None:
    math500_row = {"problem": "p", "answer": "1", "subject": "Algebra", "level": 2}
    first, second = load_problems(str(write_rows(tmp_path / "set.jsonl", MATH_ROW, math500_row)))
    assert (first.level, first.subject) == ("Level 1", "Prealgebra")
    assert (second.level, second.subject) == ("2", "Algebra")


def test_ids_are_the_rows_own_or_set_and_index(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "1"}
    own = [row | {"id": "mine"}, row | {"unique_id": "test/algebra/1.json"}, row | {"ID": "chal-777"}, row]
    problems = load_problems(str(write_rows(tmp_path / "toy.jsonl", *own)))
    assert [p.id for p in problems] == ["mine", "test/algebra/1.json", "chal-777", "toy/3"]


def test_a_blank_line_moves_no_id(tmp_path: Path) -> None:
    path = tmp_path / "toy.jsonl"
    path.write_text('{"question": "a", "answer": "1"}\n\n{"question": "b", "answer": "2"}\n')
    assert [p.id for p in load_problems(str(path))] == ["toy/0", "toy/2"]


def test_a_problem_written_as_json_is_read_back_unchanged(tmp_path: Path) -> None:
    problem = Problem("generated:dev/4", "How many?", "12", level="3", subject="days")
    assert load_problems(str(write_rows(tmp_path / "set.jsonl", problem.to_json()))) == [problem]


def test_gzipped_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "toy.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(GSM8K_ROW).encode()))
    assert load_problems(str(path))[0].id == "toy/0"
    path.write_bytes(b"not gzip")
    with pytest.raises(InputError, match=r"toy\.jsonl\.gz: broken gzip file"):
        load_problems(str(path))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"question": "q", "answer"', "not JSON"),
        (b'{"question": "\xff", "answer": "1"}', "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b'["q", "1"]', "expected a JSON object, got list"),
        (
            b'{"prompt": "q", "answer": "1"}',
            r"no question and answer among the fields \['answer', 'prompt'\]",
        ),
        (b'{"question": 5, "answer": "1"}', "'question' must be a text, got 5"),
        (b'{"question": " ", "answer": "1"}', "'question' must be a text"),
        (b'{"question": "q", "answer": "#### "}', "expected an answer"),
        (b'{"question": "q", "answer": NaN}', "expected an answer, got nan"),
        (b'{"question": "q", "answer": true}', "expected an answer, got True"),
        (b'{"problem": "p", "solution": "no box"}', "'solution' holds no"),
        (b'{"question": "q", "answer": "1", "id": "toy/0"}', "the id 'toy/0' is already taken by .* line 1"),
    ],
)
def test_a_broken_row_names_file_and_line_and_the_rest_is_not_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, line: bytes, complaint: str
) -> None:
    path = tmp_path / "toy.jsonl"
    good = json.dumps(GSM8K_ROW).encode()
    path.write_bytes(b"\n".join([good, line, good, b""]))
    with pytest.raises(InputError, match=rf"toy\.jsonl, line 2: {complaint}") as raised:
        load_problems(str(path))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    problems, errors = read_problem_file(path)
    assert [p.id for p in problems] == ["toy/0", "toy/2"]
    assert len(errors) == 1 and "line 2" in errors[0]
    with caplog.at_level(logging.WARNING):
        assert load_problems(str(path), strict=False) == problems
    assert "toy.jsonl, line 2" in caplog.text


def test_an_empty_box_as_gold_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    empty = MATH_ROW | {"solution": "The answer is $\\boxed{}$."}
    path = write_rows(tmp_path / "toy.jsonl", MATH_ROW, empty)
    with caplog.at_level(logging.WARNING):
        assert [p.id for p in load_problems(str(path))] == ["toy/0"]
    assert "left out 1 problems with an empty box as gold answer: toy/1" in caplog.text


def test_limit_keeps_the_first_problems(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "toy.jsonl", *[GSM8K_ROW] * 5)
    assert [p.id for p in load_problems(str(path), 2)] == ["toy/0", "toy/1"]
    with pytest.raises(InputError, match="at least 1, got 0"):
        load_problems(str(path), 0)


def test_an_empty_set_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"toy\.jsonl: holds no problem"):
        load_problems(str(write_rows(tmp_path / "toy.jsonl")))
    with pytest.raises(InputError, match=r"holds no problem; .* line 1"):
        load_problems(str(write_rows(tmp_path / "toy.jsonl", {})), strict=False)


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("gsm8k", "gsm8k has no split '', expected gsm8k:train or gsm8k:test"),
        ("math:dev", "math has no split 'dev'"),
        ("missing.jsonl", "missing.jsonl: no such file"),
        ("missing/folder:test", None),
        ("aqua", "aqua: no such file, and no problem set"),
        ("gsm8k:test@missing.jsonl", "missing.jsonl: no such file"),
    ],
)
def test_a_spec_that_names_nothing_is_an_error(
    monkeypatch: pytest.MonkeyPatch, spec: str, complaint: str | None
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match=complaint):
        load_problems(spec)


def offline(name: str, config: str | None = None, *, split: str) -> Any:
    raise ConnectionError(f"Couldn't reach '{name}' on the Hub")


def test_offline_says_how_to_use_a_local_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match=r"cannot load .* openai/gsm8k: .* gsm8k:test@FILE\.jsonl"):
        load_problems("gsm8k:test")
    with pytest.raises(InputError, match=r"owner/name: .* path: FILE\.jsonl"):
        load_problems("owner/name:test")


def test_hub_sets_are_loaded_by_name_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    def hub(name: str, config: str | None = None, *, split: str) -> list[dict[str, str]]:
        return [{"question": f"{name} {config} {split}", "answer": "1"}]

    monkeypatch.setattr(datasets, "load_dataset", hub)

    def asked(spec: str) -> list[tuple[str, str]]:
        return [(p.id, p.question) for p in load_problems(spec)]

    assert asked("gsm8k:train") == [("gsm8k:train/0", "openai/gsm8k main train")]
    assert asked("math500") == [("math500:test/0", "HuggingFaceH4/MATH-500 None test")]
    assert asked("me/sums:dev") == [("me/sums:dev/0", "me/sums None dev")]
    assert asked("me/sums:hard:dev") == [("me/sums:hard:dev/0", "me/sums hard dev")]
    expected = [f"EleutherAI/hendrycks_math {subject} test" for subject in sorted(MATH_SUBJECTS)]
    assert asked("math:test") == [(f"math:test/{i}", question) for i, question in enumerate(expected)]


def test_a_local_file_or_folder_stands_in_for_the_hub(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "test.jsonl", MATH_ROW)
    (problem,) = load_problems(f"math:test@{tmp_path}")
    assert problem.id == "math:test/0"
    assert load_problems(f"math:test@{path}") == [problem]
    assert load_problems(f"{tmp_path}:test")[0].id == f"{tmp_path.name}:test/0"
    with pytest.raises(InputError, match=r"cannot load split 'train'"):
        load_problems(f"math:train@{tmp_path}")


def test_generated_problems_need_no_file() -> None:
    problems = load_problems("generated:test", 3)
    assert [p.id for p in problems] == ["generated:test/0", "generated:test/1", "generated:test/2"]


def test_sets_that_share_a_question_are_refused() -> None:
    train = [Problem("train/0", "What is 1 + 1?", "2"), Problem("train/1", "Twice?", "2")]
    test = [Problem("test/0", "what  is\n1 + 1? ", "2")]
    assert_disjoint(("train", train), ("dev", [Problem("dev/0", "Thrice?", "3")]))
    with pytest.raises(
        InputError, match=r"train and test .* share 1 questions.* train/0 = test/0: 'what is 1"
    ):
        assert_disjoint(("train", train), ("dev", []), ("test", test))


def test_shared_questions_can_be_dropped(caplog: pytest.LogCaptureFixture) -> None:
    train = [Problem("train/0", "What is 1 + 1?", "2"), Problem("train/1", "Twice?", "2")]
    with caplog.at_level(logging.WARNING):
        assert drop_shared(train, [Problem("test/0", "TWICE? ", "2")]) == train[:1]
    assert "left out 1 problems that another set shares: train/1" in caplog.text


def test_loading_a_file_imports_no_datasets(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "toy.jsonl", GSM8K_ROW)
    code = (
        f"import sys, data.problems as p; p.load_problems({str(path)!r}); sys.exit('datasets' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


@needs_shared_data
@pytest.mark.parametrize(
    ("spec", "count"),
    [
        ("gsm8k:train", 7473),
        ("gsm8k:test", 1319),
        ("math:train", 7498),  # two golds are an empty box
        ("math:test", 5000),
        ("math500", 500),
    ],
)
def test_the_real_sets_load_completely(spec: str, count: int) -> None:
    folder = SHARED / spec.split(":")[0]
    problems = load_problems(f"{spec}@{folder}")
    assert len(problems) == len({p.id for p in problems}) == num_problems(spec) == count
    if spec.startswith("gsm8k"):
        assert all(p.answer.lstrip("-").isdigit() for p in problems)


@needs_shared_data
@pytest.mark.parametrize("split", ["train", "test"])
def test_math_golds_are_the_published_last_boxes(split: str) -> None:
    meta = [json.loads(line) for line in (SHARED / "math" / f"{split}_meta.jsonl").open()]
    for problem in load_problems(f"math:{split}@{SHARED / 'math'}"):
        assert problem.answer == meta[int(problem.id.rpartition("/")[2])]["answer"].strip()


@needs_shared_data
def test_the_empty_golds_of_math_train_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_problems(f"math:train@{SHARED / 'math'}")
    meta = [json.loads(line) for line in (SHARED / "math" / "train_meta.jsonl").open()]
    ids = [int(word.rpartition("/")[2]) for word in caplog.text.split("gold answer: ")[1].split(", ")]
    names = sorted(meta[i]["unique_id"] for i in ids)
    assert names == ["train/number_theory/7115.json", "train/number_theory/7117.json"]


@needs_shared_data
@pytest.mark.parametrize("name", ["svamp", "mawps", "gsm_hard", "college_math", "olympiadbench"])
def test_other_files_load_without_a_broken_row(name: str) -> None:
    path = SHARED / "extra" / f"{name}.jsonl"
    problems, errors = read_problem_file(path)
    assert errors == [] and len(problems) == len(path.read_text(encoding="utf-8").splitlines())


@needs_shared_data
def test_math_shares_one_question_between_train_and_test() -> None:
    train, test, test500 = (
        load_problems(f"{s}@{SHARED / s.split(':')[0]}") for s in ("math:train", "math:test", "math500")
    )
    with pytest.raises(InputError, match=r"share 1 questions.* math:train/2948 = math:test/4656"):
        assert_disjoint(("math:train", train), ("math:test", test))
    assert_disjoint(("math:train", drop_shared(train, test)), ("math:test", test))
    with pytest.raises(InputError, match="share 500 questions"):
        assert_disjoint(("math:test", test), ("math500", test500))


def test_several_sets_follow_each_other_and_none_loses_its_ids(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", {"id": "7", "question": "a", "answer": "1"}, GSM8K_ROW)
    two = write_rows(tmp_path / "two.jsonl", {"id": "7", "question": "b", "answer": "2"}, GSM8K_ROW)
    spec = f"{one}, {two}"
    ids = ["7", "one/1", f"{two}/7", "two/1"]
    assert [p.id for p in load_problems(spec)] == ids
    assert [p.id for p in load_problems(spec, 3)] == ids[:3]
    assert (num_problems(spec), num_problems(spec, 3)) == (4, 3)
    with pytest.raises(InputError, match=r"one\.jsonl: .* is a set named twice\?"):
        load_problems(f"{one},{one},{one}")


def test_a_question_that_is_asked_again_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    problems = [
        Problem(f"p/{n}", question, "1") for n, question in enumerate(["A  cat?", "b", "a cat?", "b"])
    ]
    assert [p.id for p in drop_repeated(problems)] == ["p/0", "p/1"]
    assert "left out 2 problems that ask what another one asks: p/2, p/3" in caplog.text


def test_what_is_left_out_is_named_up_to_five(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"instruction": "i", "output": "No final answer."} for _ in range(7)]
    path = write_rows(tmp_path / "set.jsonl", *rows, {"question": "q", "answer": "1"})
    assert len(load_problems(str(path), strict=False)) == 1
    assert [f"{path}, line {n}: " in record.message for n, record in enumerate(caplog.records, start=1)] == (
        [True] * 5 + [False]
    )
    assert caplog.records[-1].message == f"{path}: left out 2 more broken rows"


def test_named_sets_are_counted_without_being_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("loaded"))
    assert num_problems("gsm8k:test,math:test") == 1319 + 5000
    assert num_problems("math500", 20) == 20
