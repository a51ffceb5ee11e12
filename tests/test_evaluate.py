import pytest

from eval.evaluate import correct_by_problem, evaluate, outcome
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
    assert result.accuracy.value == pytest.approx(0.25)
    assert result.pass_at == pytest.approx(
        {1: 0.25, 2: 5 / 12, 4: 0.5}
    )  # 1 - C(2, 2) / C(4, 2) = 5/6 of one in two
    assert result.majority == pytest.approx(0.5)  # 1 and 9 tie twice each: the first seen, 1, is right


def test_accuracy_is_told_by_subject_and_level() -> None:
    graded = [(trajectory(0), CORRECT), (trajectory(1), WRONG), (trajectory(2), CORRECT)]
    result = evaluate(graded, PROBLEMS)
    assert {name: a.value for name, a in result.by_subject.items()} == {"branch": 1.0, "sum": 0.5}
    assert {name: (a.value, a.num_problems) for name, a in result.by_level.items()} == {
        "1": (1.0, 1),
        "2": (0.5, 2),
    }


def test_tool_figures() -> None:
    result = evaluate(
        [
            (trajectory(0, executions=(OK, ERROR), tokens=4), CORRECT),
            (trajectory(1, executions=(ERROR,)), WRONG),
            (trajectory(2), CORRECT),
        ],
        PROBLEMS,
    )
    assert result.tool_use_rate == pytest.approx(2 / 3)
    assert result.tool_error_rate == pytest.approx(2 / 3)
    assert result.recovery_rate == pytest.approx(1 / 2)
    assert result.mean_action_tokens == pytest.approx(8 / 3)
    assert "1 wrong answer" in result.table()


def test_outcome_says_why_a_trajectory_is_not_correct() -> None:
    assert outcome(trajectory(0), WRONG) == "wrong answer"
    assert outcome(trajectory(0, reason=StopReason.NO_CODE), NO_ANSWER) == "no answer"
    assert outcome(trajectory(0, reason=StopReason.ENVIRONMENT_FAULT), NO_ANSWER) == "environment fault"


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
