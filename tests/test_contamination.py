from pathlib import Path

import pytest

from data.problems import load_problems
from eval.contamination import find_contamination
from mtpo.trajectory import Problem

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
WORDS = [f"word{i}" for i in range(1, 17)]


def problem(problem_id: str, question: str) -> Problem:
    return Problem(problem_id, question, "1")


def test_a_duplicate_is_found_whatever_its_case_spacing_and_punctuation() -> None:
    training = [problem("t/0", "Find $2x^{2} + 3x-5$,  please.\n"), problem("t/1", "Find 2")]
    found = find_contamination([problem("e/0", "find $2x^2+3x - 5$ PLEASE")], {"t": training})
    assert [(o.problem_id, o.train_id, o.kind) for o in found.pairs] == [("e/0", "t/0", "duplicate")]
    assert (found.duplicates.count, found.duplicates.of) == (1, 1)


@pytest.mark.parametrize(
    "other", ["Find $2x^2-3x-5$ please", "Find $2x^{23}x-5$ please", "Find $(2x)^2+3x-5$"]
)
def test_another_sign_number_or_bracket_is_another_question(other: str) -> None:
    found = find_contamination([problem("e/0", "Find $2x^2+3x-5$ please")], {"t": [problem("t/0", other)]})
    assert found.pairs == [] and found.duplicates.count == 0


def test_overlap_is_the_share_of_13_grams_that_training_problems_hold() -> None:
    training = [
        problem("t/0", "Zero, " + ", ".join(WORDS[:13])),
        problem("t/1", " ".join(WORDS[1:15]) + " end"),
    ]
    evaluation = [
        problem("e/0", " ".join(WORDS)),  # 4 grams; t/0 has the first, t/1 the next two
        problem("e/1", " ".join(reversed(WORDS))),
        problem("e/2", " ".join(WORDS[:12])),  # too short for a gram
    ]
    found = find_contamination(evaluation, {"t": training})
    [overlap] = found.pairs
    assert (overlap.problem_id, overlap.train_id, overlap.kind, overlap.share) == (
        "e/0",
        "t/1",
        "overlap",
        0.75,
    )
    assert (found.any_overlap.count, found.any_overlap.of) == (1, 2)
    assert (found.half_overlap.count, found.half_overlap.of) == (1, 2)
    assert found.num_train == 2


def test_every_training_set_counts_also_where_two_number_their_problems_alike() -> None:
    sets = {"a": [problem("t/0", "Find 1"), problem("t/1", "Find 2")], "b": [problem("t/0", "Find 3")]}
    found = find_contamination([problem(f"e/{i}", f"Find {i}") for i in range(5)], sets | {"c": sets["a"]})
    assert {o.problem_id for o in found.pairs} == {"e/1", "e/2", "e/3"}
    assert found.num_train == 3 and [s["num_problems"] for s in found.compared_with] == [2, 1, 2]


def test_nothing_to_compare_with_is_no_clean_bill() -> None:
    found = find_contamination([problem("e/0", "q")], {}, ["gemma: no run folder"])
    assert found.duplicates.value is None and found.duplicates.of == 0
    assert "nothing known" in found.table() and "gemma: no run folder" in found.table()


@pytest.mark.skipif(not (SHARED / "math").exists(), reason="the shared MATH files are not here")
def test_the_training_problems_in_math_test_are_found() -> None:
    training = load_problems(f"math:train@{SHARED / 'math'}")
    found = find_contamination(load_problems(f"math:test@{SHARED / 'math'}"), {"math:train": training})
    duplicates = {(o.train_id, o.problem_id) for o in found.pairs if o.kind == "duplicate"}
    assert ("math:train/2948", "math:test/4656") in duplicates  # known of the published splits
    assert ("math:train/1598", "math:test/311") in duplicates  # 2x^{2} there, 2x^2 here
    assert found.duplicates.of == 5000
