import functools
from pathlib import Path

import pytest

from eval.predictions import by_problem, is_equivalent, outcome, predictions_of, read_predictions
from mtpo.errors import InputError
from mtpo.grader import Grade, GradingOptions
from mtpo.runs import write_jsonl
from mtpo.trajectory import Execution, Problem, Segment, StopReason, Trajectory

PROBLEMS = [Problem("p/1", "?", "1/2"), Problem("p/0", "?", "7")]
WRONG, NO_ANSWER = Grade("wrong", "9", "number"), Grade("wrong", None, "no_answer")


def trajectory(problem: str, sample: int = 0, reason=StopReason.ANSWERED, **fields) -> Trajectory:
    fault = "EngineError: gone" if reason == StopReason.ENVIRONMENT_FAULT else None
    segments = (Segment("prompt", (1,)), Segment("action", (5, 6)))
    return Trajectory(problem, sample, segments, reason, fault=fault, **fields)


def test_equivalent_answers_vote_together_however_they_are_written() -> None:
    answers = ["0.5", "2/6", r"\frac12", None, r"\frac{1}{3}", "x^2-1", "(x-1)(x+1)", "2/6"]
    verdicts = [
        Grade("wrong", None, "no_answer")
        if a is None
        else Grade("correct" if i in (0, 2) else "wrong", a, "")
        for i, a in enumerate(answers)
    ]
    graded = [(trajectory("p/1", i), verdict) for i, verdict in enumerate(verdicts)]
    assert [p.vote for p in predictions_of(graded, PROBLEMS)] == [0, 1, 0, None, 1, 2, 2, 1]


def test_votes_are_counted_with_the_options_of_the_grader() -> None:
    graded = [(trajectory("p/1", i), Grade("wrong", a, "")) for i, a in enumerate(["1/3", "0.33333"])]
    lenient = functools.partial(is_equivalent, options=GradingOptions(paper_tolerance=True))
    assert [p.vote for p in predictions_of(graded, PROBLEMS)] == [0, 1]
    assert [p.vote for p in predictions_of(graded, PROBLEMS, lenient)] == [0, 0]


def test_a_correct_answer_never_votes_with_a_wrong_one() -> None:
    graded = [
        (trajectory("p/1", 0), Grade("wrong", "a", "")),
        (trajectory("p/1", 1), Grade("correct", "a", "")),
    ]
    assert [p.vote for p in predictions_of(graded, PROBLEMS, equal=lambda a, b: True)] == [0, 1]


def test_predictions_come_in_the_order_of_problems_and_samples() -> None:
    graded = [(trajectory("p/0", 1), WRONG), (trajectory("p/1"), WRONG), (trajectory("p/0", 0), WRONG)]
    found = predictions_of(graded, PROBLEMS)
    assert [(p.problem_id, p.sample, p.gold) for p in found] == [
        ("p/1", 0, "1/2"),
        ("p/0", 0, "7"),
        ("p/0", 1, "7"),
    ]
    with pytest.raises(InputError, match="'p/2', which is not in the problem set"):
        predictions_of([(trajectory("p/2"), WRONG)], PROBLEMS)


def test_a_fault_has_neither_answer_nor_verdict() -> None:
    fault = trajectory("p/0", reason=StopReason.ENVIRONMENT_FAULT)
    [found] = predictions_of([(fault, Grade("correct", "7", "same_text"))], PROBLEMS)
    assert (found.verdict, found.answer, found.vote, found.outcome) == (
        "ungraded",
        None,
        None,
        "environment fault",
    )
    assert found.fault == "EngineError: gone" and by_problem([found]) == {}


def test_outcome_says_why_a_trajectory_is_not_correct() -> None:
    assert outcome(trajectory("p/0"), WRONG) == "wrong answer"
    assert outcome(trajectory("p/0", reason=StopReason.NO_CODE), NO_ANSWER) == "no answer"
    assert outcome(trajectory("p/0", reason=StopReason.TOKEN_LIMIT), NO_ANSWER) == "truncated (token_limit)"
    assert outcome(trajectory("p/0"), Grade("ungraded", "x", "timeout")) == "ungraded (timeout)"
    assert outcome(trajectory("p/0", reason=StopReason.ENVIRONMENT_FAULT), NO_ANSWER) == "environment fault"


def test_tokens_and_seconds_are_unknown_where_nobody_counted_them() -> None:
    runs = (Execution("1", "1", "ok", 0.1), Execution("x", "NameError", "error", 0.1))
    ours = trajectory("p/0", 0, generate_s=1.5, execute_s=0.2, executions=runs)
    theirs = trajectory("p/0", 1, is_from_text=True, executions=runs)
    first, second = predictions_of([(ours, WRONG), (theirs, WRONG)], PROBLEMS)
    assert (first.action_tokens, first.generate_s, first.execute_s) == (2, 1.5, 0.2)
    assert (second.action_tokens, second.generate_s, second.execute_s) == (None, None, None)
    assert (first.tool_calls, first.tool_errors) == (second.tool_calls, second.tool_errors) == (2, 1)


def test_predictions_are_read_as_they_were_written(tmp_path: Path) -> None:
    found = predictions_of([(trajectory("p/0"), WRONG), (trajectory("p/1"), NO_ANSWER)], PROBLEMS)
    write_jsonl(tmp_path / "predictions.jsonl", (p.to_json() for p in found))
    assert read_predictions(tmp_path / "predictions.jsonl") == found
    (tmp_path / "old.jsonl").write_text('{"problem_id": "p/0", "sample": 0}\n')
    with pytest.raises(InputError, match=r"old\.jsonl, line 1: no prediction: action_tokens, .* missing"):
        read_predictions(tmp_path / "old.jsonl")
