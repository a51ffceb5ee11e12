from pathlib import Path

import pytest

from eval.comparison import Run, compare_runs, comparison_page
from eval.metrics import paired_test, permutation_test
from eval.predictions import Prediction
from mtpo.errors import InputError
from mtpo.trajectory import Problem


def run(name: str, results: dict[str, str], **changes: str) -> Run:
    """A run from "1" for a correct and "0" for a wrong sample of each problem; "" where all are faults."""
    return Run(
        name,
        {i: Problem(i, changes.get(i, f"What is {i}?"), "1") for i in results},
        {i: [prediction(i, s, r == "1") for s, r in enumerate(own)] for i, own in results.items() if own},
        {"tolerance": name == "lenient"},
    )


def prediction(problem_id: str, sample: int, is_correct: bool) -> Prediction:
    verdict = "correct" if is_correct else "wrong"
    return Prediction(
        problem_id=problem_id, sample=sample, policy="", gold="1", answer="1", verdict=verdict, rule="number",
        outcome=verdict, vote=0, stop_reason="answered", fault=None, turns=1, tool_calls=0, tool_errors=0,
        action_tokens=1, generate_s=None, execute_s=None,
    )  # fmt: skip


def test_single_answers_are_compared_by_mcnemar_with_the_problems_that_changed() -> None:
    before = run("old", {"a": "1", "b": "0", "c": "0", "d": "1"})
    after = run("new", {"a": "0", "b": "1", "c": "1", "d": "1"})
    [found] = compare_runs([(before, after)])
    assert (found.test, found.improved, found.worsened, found.num_problems) == ("mcnemar", 2, 1, 4)
    expected = paired_test([1, 0, 0, 1], [0, 1, 1, 1])
    assert (found.p, found.z) == (expected.p, pytest.approx(expected.z))
    assert [(c.problem_id, c.before, c.after) for c in found.changed] == [
        ("a", 1, 0),
        ("b", 0, 1),
        ("c", 0, 1),
    ]
    assert (found.before_score.value, found.after_score.value, found.difference.value) == (0.5, 0.75, 0.25)


def test_samples_are_compared_by_each_problems_share() -> None:
    before = run("old", {"a": "1100", "b": "0000", "c": "1111"})
    after = run("new", {"a": "1110", "b": "01", "c": "1111"})
    [found] = compare_runs([(before, after)])
    assert (found.test, found.improved, found.worsened) == ("permutation", 2, 0)
    assert found.p == permutation_test([0.5, 0, 1], [0.75, 0.5, 1]) == 0.5  # 2 of 4 swaps are as large
    assert found.difference.value == pytest.approx(0.25)
    assert found.difference.low <= 0.25 <= found.difference.high


def test_problems_with_nothing_but_faults_are_left_out_and_counted() -> None:
    [found] = compare_runs([(run("old", {"a": "1", "b": "1"}), run("new", {"a": "1", "b": ""}))])
    assert (found.num_problems, found.left_out, found.is_common_only) == (1, 1, False)


def test_different_problems_are_refused_unless_what_is_common_is_asked_for() -> None:
    before = run("old", {"a": "1", "b": "1", "c": "0"})
    after = run("new", {"b": "0", "c": "0", "d": "1"}, c="Another question?")
    with pytest.raises(
        InputError, match=r"old and new are over different problems \(3 and 3, 1 of them the same\)"
    ):
        compare_runs([(before, after)])
    [found] = compare_runs([(before, after)], common=True)
    assert (found.num_problems, found.left_out, found.is_common_only) == (1, 3, True)
    with pytest.raises(InputError, match="no graded problem in common"):
        compare_runs([(before, run("none", {"x": "1"}))], common=True)


def test_runs_graded_with_different_options_are_refused() -> None:
    with pytest.raises(InputError, match="old and lenient were graded with different options"):
        compare_runs([(run("old", {"a": "1"}), run("lenient", {"a": "1"}))])


def test_p_values_of_several_runs_are_corrected_for_their_number() -> None:
    ids = [f"p{i}" for i in range(8)]
    first = run("first", dict.fromkeys(ids, "0"))
    better = run("better", dict.fromkeys(ids, "1"))
    same = run("same", dict.fromkeys(ids, "0"))
    found = compare_runs([(first, better), (first, same)])
    assert [c.p for c in found] == [2 / 2**8, 1.0]
    assert [c.p_holm for c in found] == [4 / 2**8, 1.0]
    assert {c.num_tests for c in found} == {2}


def test_page_lists_every_problem_that_changed() -> None:
    before = run("old", {"a": "1", "b": "0", "c": "1"}, a="A very\nlong question " * 20)
    after = run("new", {"a": "0", "b": "1", "c": "1"}, a="A very\nlong question " * 20)
    page = comparison_page(compare_runs([(before, after)]), before.problems)
    worse, better = page.split("## Improved")
    assert "Worsened: new against old (1)" in worse and "- `a` 1.00 -> 0.00: A very long question" in worse
    assert "- `b` 0.00 -> 1.00: What is b?" in better and "`c`" not in page
    assert max(map(len, page.splitlines())) < 220


def test_a_folder_without_a_finished_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no metrics\.json; is it the --out of a finished"):
        Run.read(tmp_path)
