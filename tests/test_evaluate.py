import dataclasses
import json

import pytest

from eval.evaluate import correct_by_problem, evaluate, metrics
from mtpo.errors import InputError
from mtpo.grader import Grade
from mtpo.trajectory import Execution, Problem, Segment, StopReason, Trajectory

PROBLEMS = [
    Problem("p/0", "?", "1", level="1", subject="sum"),
    Problem("p/1", "?", "2", level="2", subject="sum"),
    Problem("p/2", "?", "3", level="2", subject="branch"),
]
CORRECT = Grade("correct", "1", "number")
WRONG = Grade("wrong", "9", "number")
NO_ANSWER = Grade("wrong", None, "no_answer")
UNGRADED = Grade("ungraded", "x^x", "timeout")
OK, ERROR = Execution("1", "1", "ok", 0.1), Execution("x", "NameError", "error", 0.1)


def trajectory(
    problem: int, sample: int = 0, reason=StopReason.ANSWERED, executions=(), tokens=2
) -> Trajectory:
    fault = "EngineError: gone" if reason == StopReason.ENVIRONMENT_FAULT else None
    segments = (Segment("prompt", (1,)), Segment("action", (5,) * tokens))
    return Trajectory(f"p/{problem}", sample, segments, reason, executions=executions, fault=fault)


def test_truncated_and_ungraded_count_as_not_correct_and_faults_do_not_count() -> None:
    result = evaluate(
        [
            (trajectory(0), CORRECT),
            (trajectory(1, reason=StopReason.TOKEN_LIMIT), NO_ANSWER),
            (trajectory(2), UNGRADED),
            (trajectory(0, 1, reason=StopReason.ENVIRONMENT_FAULT), NO_ANSWER),
        ],
        PROBLEMS,
    )
    assert result.accuracy.value == pytest.approx(1 / 3)
    assert result.num_faults == 1
    assert result.outcomes == {"correct": 1, "truncated (token_limit)": 1, "ungraded (timeout)": 1}


def test_interval_of_one_trajectory_a_problem_is_wilsons() -> None:
    problems = [Problem(f"p/{i}", "?", "1") for i in range(10)]
    graded = [(trajectory(i), CORRECT if i < 8 else WRONG) for i in range(10)]
    accuracy = evaluate(graded, problems).accuracy
    assert (accuracy.low, accuracy.high) == pytest.approx(
        (0.4901625, 0.9433178)
    )  # textbook value for 8 of 10


def test_samples_give_pass_at_k_and_the_majority() -> None:
    grades = {0: [CORRECT, WRONG, WRONG, CORRECT], 1: [WRONG] * 4}
    graded = [(trajectory(p, s), g) for p, own in grades.items() for s, g in enumerate(own)]
    result = evaluate(graded, PROBLEMS)
    assert (result.accuracy.value, result.accuracy.num_trajectories) == (pytest.approx(0.25), 8)
    assert {k: score.value for k, score in result.pass_at.items()} == pytest.approx(
        {1: 0.25, 2: 5 / 12, 4: 0.5}
    )  # 1 - C(2, 2) / C(4, 2) = 5/6 of one in two
    assert {k: score.value for k, score in result.majority_at.items()} == pytest.approx(
        {1: 0.25, 2: 0.25, 4: 0.25}
    )  # problem 0: two against two, whatever is drawn; a fair draw decides
    assert result.pass_at[4].interval == "wilson" and result.accuracy.interval == "bootstrap"


def test_a_fault_takes_pass_at_k_from_its_own_problem_only() -> None:
    graded = [(trajectory(p, s), CORRECT) for p in (0, 1) for s in range(4)]
    graded[7] = (trajectory(1, 3, reason=StopReason.ENVIRONMENT_FAULT), NO_ANSWER)
    result = evaluate(graded, PROBLEMS)
    assert {k: score.num_problems for k, score in result.pass_at.items()} == {1: 2, 2: 2, 4: 1}
    assert (result.samples, result.num_scored, result.num_problems) == ({"min": 3, "max": 4}, 2, 3)
    assert result.faults == {"EngineError: gone": 1}


def test_interval_of_many_samples_is_over_problems_and_not_over_samples() -> None:
    problems = [Problem(f"p/{i}", "?", "1") for i in range(10)]
    once = [(trajectory(i), CORRECT if i < 8 else WRONG) for i in range(10)]
    often = [(trajectory(i, s), CORRECT if i < 8 else WRONG) for i in range(10) for s in range(16)]
    narrow, wide = evaluate(often, problems).accuracy, evaluate(once, problems).accuracy
    assert (narrow.low, narrow.high) == (wide.low, wide.high)  # 16 equal samples tell no more than one


def test_accuracy_is_told_by_subject_and_level() -> None:
    graded = [(trajectory(0), CORRECT), (trajectory(1), WRONG), (trajectory(2), CORRECT)]
    result = evaluate(graded, PROBLEMS)
    assert {name: a.value for name, a in result.by_subject.items()} == {"branch": 1.0, "sum": 0.5}
    assert {name: (a.value, a.num_problems) for name, a in result.by_level.items()} == {
        "1": (1.0, 1),
        "2": (0.5, 2),
    }


def test_several_policies_are_told_apart() -> None:
    graded = [
        (dataclasses.replace(trajectory(0, 0), policy="a"), CORRECT),
        (dataclasses.replace(trajectory(0, 1), policy="b"), WRONG),
        (dataclasses.replace(trajectory(1, 0), policy="b"), CORRECT),
    ]
    result = evaluate(graded, PROBLEMS)
    assert result.policies == {"b": 2, "a": 1}
    assert {name: (s.value, s.num_problems) for name, s in result.by_policy.items()} == {
        "a": (1.0, 1),
        "b": (0.5, 2),
    }
    assert evaluate(graded[:1], PROBLEMS).by_policy == {}


def test_tool_figures() -> None:
    result = evaluate(
        [
            (trajectory(0, executions=(OK, ERROR), tokens=4), CORRECT),
            (trajectory(1, executions=(ERROR,)), WRONG),
            (trajectory(2), CORRECT),
        ],
        PROBLEMS,
    )
    assert (result.tool_use.count, result.tool_use.of) == (2, 3)
    assert (result.tool_errors.count, result.tool_errors.of) == (2, 3)
    assert (result.recovery.count, result.recovery.of, result.recovery.value) == (1, 2, 0.5)
    assert result.action_tokens is not None and result.action_tokens.mean == pytest.approx(8 / 3)
    assert result.seconds == {"generate": None, "execute": None}  # nobody measured any
    assert "1 wrong answer" in result.table()
    assert "66.7%  2 of 3 code blocks" in result.table()


def test_paired_outcomes_leave_faults_out_and_refuse_several_samples() -> None:
    fault = trajectory(1, reason=StopReason.ENVIRONMENT_FAULT)
    assert correct_by_problem([(trajectory(0), CORRECT), (fault, NO_ANSWER)]) == {"p/0": True}
    with pytest.raises(InputError, match="'p/0' has several trajectories"):
        correct_by_problem([(trajectory(0), CORRECT), (trajectory(0, 1), CORRECT)])


def test_nothing_to_evaluate_is_an_error() -> None:
    fault = trajectory(1, reason=StopReason.ENVIRONMENT_FAULT)
    with pytest.raises(InputError, match="all of them environment faults"):
        evaluate([(fault, NO_ANSWER)], PROBLEMS)
    with pytest.raises(InputError, match="not in the problem set"):
        evaluate([(trajectory(0), CORRECT)], PROBLEMS[1:])


def test_truncated_and_ungraded_are_rates_with_their_denominators() -> None:
    graded = [
        (trajectory(0), CORRECT),
        (trajectory(1, reason=StopReason.TOKEN_LIMIT), UNGRADED),
        (trajectory(2, reason=StopReason.ENVIRONMENT_FAULT), NO_ANSWER),
    ]
    result = evaluate(graded, PROBLEMS)
    assert (result.truncated.count, result.ungraded.count, result.no_answer.count) == (1, 1, 0)
    assert {r.of for r in (result.truncated, result.ungraded, result.no_answer)} == {2}
    assert result.outcomes == {"correct": 1, "truncated (token_limit)": 1}


def test_metrics_are_json_with_a_version_and_every_part() -> None:
    result = evaluate([(trajectory(0), CORRECT)], PROBLEMS)
    row = json.loads(json.dumps(metrics(result, grader={"a": 1}, contamination={"n": 13})))
    assert (row["schema"], row["grader"], row["contamination"]) == (1, {"a": 1}, {"n": 13})
    assert (row["comparisons"], row["sources"]) == ([], None)
    assert row["recovery"] == {"value": None, "count": 0, "of": 0, "unit": "trajectories with a tool error"}
    assert row["turns_histogram"] == {"1": {"trajectories": 1, "correct": 1}}
