"""Judges that need no endpoint: by grades, by any function, and by efficiency."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mtpo.errors import InputError
from mtpo.grader import Grader, GradingOptions
from mtpo.judges import CallableJudge, EfficiencyJudge, Judge, VerifierJudge
from mtpo.trajectory import Execution, Problem, Segment, StopReason, Trajectory
from tests.trajectory_texts import attempt

PROBLEM = Problem("toy/0", "What is 3 + 4?", "7")
RIGHT, WRONG = "It is $\\boxed{7}$.", "It is $\\boxed{8}$."


def costing(turns: int, tokens: int, failures: int, text: str = RIGHT) -> Trajectory:
    """An attempt of so many turns, sampled tokens and failed executions."""
    assert failures < turns <= tokens
    segments = [Segment("prompt", (2, 5), text=PROBLEM.question)]
    for turn in range(turns - 1):
        segments += [
            Segment("action", (7,), text=f"```python\n{turn}\n```"),
            Segment("observation", (3,), text="1"),
        ]
    segments.append(Segment("action", (7,) * (tokens - turns + 1), text=text))
    runs = [Execution("", "", "error" if index < failures else "ok", 0.0) for index in range(turns - 1)]
    return Trajectory(PROBLEM.id, 0, tuple(segments), StopReason.ANSWERED, executions=tuple(runs))


async def preferences(judge: Judge, *trajectories: Trajectory) -> list[float | None]:
    """Of each trajectory over the next, and of the last over the first."""
    pairs = zip(trajectories, [*trajectories[1:], trajectories[0]], strict=True)
    return [await judge.prefer(first, second, PROBLEM) for first, second in pairs]


# -- the verifier --------------------------------------------------------------------------------------------


async def test_right_beats_wrong_and_equals_tie() -> None:
    judge = VerifierJudge()
    assert await preferences(judge, attempt(RIGHT), attempt(WRONG)) == [1.0, 0.0]
    assert await preferences(judge, attempt(RIGHT), attempt("So $\\boxed{7.0}$")) == [0.5, 0.5]
    assert await preferences(judge, attempt(WRONG), attempt("So $\\boxed{9}$")) == [0.5, 0.5]
    assert judge.counts == {"judged": 6}


@pytest.mark.parametrize("reason", [StopReason.TOKEN_LIMIT, StopReason.TURN_LIMIT, StopReason.NO_CODE])
async def test_what_did_not_end_in_an_answer_is_wrong_whatever_its_text_says(reason: StopReason) -> None:
    unfinished = attempt(RIGHT, stop_reason=reason)
    assert await preferences(VerifierJudge(), attempt(RIGHT), unfinished) == [1.0, 0.0]
    assert await preferences(VerifierJudge(), attempt(WRONG), unfinished) == [0.5, 0.5]


async def test_a_box_in_an_earlier_turn_or_in_tool_output_is_no_answer() -> None:
    talkative = attempt("```python\n1\n```", RIGHT, WRONG)
    assert await preferences(VerifierJudge(), talkative, attempt(RIGHT)) == [0.0, 1.0]


async def test_faults_and_what_cannot_be_graded_give_no_label_and_are_counted() -> None:
    fault = attempt(RIGHT, stop_reason=StopReason.ENVIRONMENT_FAULT)
    for judge in (VerifierJudge(), EfficiencyJudge()):
        assert await preferences(judge, attempt(RIGHT), fault) == [None, None]
        assert await judge.prefer(attempt(RIGHT), attempt(WRONG), Problem("toy/0", "?", "")) is None
        assert judge.counts == {"environment fault": 2, "ungraded": 1}


async def test_a_single_trajectory_is_rewarded_by_its_grade() -> None:
    judge = VerifierJudge()
    unfinished = attempt(RIGHT, stop_reason=StopReason.TOKEN_LIMIT)
    fault = attempt(RIGHT, stop_reason=StopReason.ENVIRONMENT_FAULT)
    attempts = (attempt(RIGHT), attempt(WRONG), unfinished, fault)
    assert [await judge.reward(each, PROBLEM) for each in attempts] == [1.0, 0.0, 0.0, None]
    assert judge.counts == {"judged": 3, "environment fault": 1}


async def test_the_graders_options_hold() -> None:
    problem = Problem("toy/1", "Which?", "7", joined_answer="5, 7")
    both, neither = attempt("$\\boxed{5}$ or $\\boxed{7}$"), attempt(WRONG)
    assert await VerifierJudge().prefer(both, neither, problem) == 0.5
    lenient = VerifierJudge(Grader(options=GradingOptions(accept_joined=True)))
    assert await lenient.prefer(both, neither, problem) == 1.0


# -- efficiency ----------------------------------------------------------------------------------------------


async def test_among_right_attempts_efficiency_goes_in_circles() -> None:
    """Each of the three has the best of two criteria against the next: by hand, from the docstring."""
    circle = [costing(2, 300, 1), costing(3, 100, 2), costing(4, 200, 0)]
    judge = EfficiencyJudge()
    assert await preferences(judge, *circle) == pytest.approx([2 / 3] * 3)
    assert await preferences(judge, *reversed(circle)) == pytest.approx([1 / 3] * 3)


async def test_grades_come_before_efficiency() -> None:
    judge = EfficiencyJudge()
    assert await preferences(judge, costing(4, 90, 3), costing(1, 1, 0, WRONG)) == [1.0, 0.0]
    assert await preferences(judge, costing(2, 9, 0, WRONG), costing(2, 10, 0, WRONG)) == pytest.approx(
        [2 / 3, 1 / 3]
    )
    assert await preferences(judge, costing(2, 9, 1), costing(2, 9, 1)) == [0.5, 0.5]


# -- any function --------------------------------------------------------------------------------------------

costs = st.tuples(st.integers(1, 4), st.integers(4, 20), st.integers(0, 3), st.sampled_from([RIGHT, WRONG]))


@settings(deadline=None)
@given(
    one=costs,
    other=costs,
    table=st.lists(st.floats(0, 1), min_size=2, max_size=2),
)
@example(one=(1, 4, 0, RIGHT), other=(1, 5, 0, RIGHT), table=[0.9, 0.97])  # where rounding would show
async def test_every_judge_is_symmetric_to_the_last_bit(one, other, table: Sequence[float]) -> None:
    first, second = (
        costing(turns, tokens, min(failures, turns - 1), text)
        for turns, tokens, failures, text in (one, other)
    )

    def by_place(shown_first: Trajectory, _: Trajectory, problem: Problem) -> float:
        return table[shown_first is second]

    for judge in (CallableJudge(by_place), VerifierJudge(), EfficiencyJudge()):
        forward = await judge.prefer(first, second, PROBLEM)
        backward = await judge.prefer(second, first, PROBLEM)
        assert forward is not None and backward is not None
        assert 0 <= forward <= 1 and forward + backward == 1


async def test_a_functions_bias_for_a_place_is_averaged_out() -> None:
    judge = CallableJudge(lambda first, second, problem: 0.8)
    assert await preferences(judge, attempt(RIGHT), attempt(WRONG)) == pytest.approx([0.5, 0.5])

    async def by_tokens(first: Trajectory, second: Trajectory, problem: Problem) -> float | None:
        return 0.9 if first.num_action_tokens < second.num_action_tokens else 0.3

    short, long = costing(1, 2, 0), costing(1, 5, 0)
    assert await preferences(CallableJudge(by_tokens), short, long) == pytest.approx([0.8, 0.2])


async def test_a_function_that_cannot_tell_gives_no_label_and_never_sees_a_fault() -> None:
    calls = itertools.count()

    def undecided(first: Trajectory, second: Trajectory, problem: Problem) -> float | None:
        return None if next(calls) % 2 else 1.0

    judge = CallableJudge(undecided)
    assert await preferences(judge, attempt(RIGHT), attempt(WRONG)) == [None, None]
    num_calls = next(calls)
    fault = attempt(RIGHT, stop_reason=StopReason.ENVIRONMENT_FAULT)
    assert await judge.prefer(attempt(RIGHT), fault, PROBLEM) is None
    assert next(calls) == num_calls + 1
    assert judge.counts == {"undecided": 2, "environment fault": 1}


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan")])
async def test_a_value_that_is_no_probability_is_refused(value: float) -> None:
    judge = CallableJudge(lambda first, second, problem: value)
    with pytest.raises(InputError, match=rf"preference on toy/0 is {value}, expected one in \[0, 1\]"):
        await judge.prefer(attempt(RIGHT), attempt(WRONG), PROBLEM)
