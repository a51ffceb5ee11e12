import asyncio
from typing import Any

import pytest

from data.labels import Row
from data.preferences import judged_pairs
from mtpo.batches import check_row
from mtpo.errors import InputError
from mtpo.judges import CallableJudge
from mtpo.trajectory import Problem, Segment, StopReason, Trajectory

PROBLEMS = [Problem("a", "?", ""), Problem("b", "?", "")]


def talk(problem_id: str, sample: int, score: int, **fields: Any) -> Trajectory:
    """A trajectory whose one action is the id 10 + score."""
    segments = (Segment("prompt", (1, 2)), Segment("action", (10 + score,)))
    return Trajectory(problem_id, sample, segments, fields.pop("stop_reason", StopReason.CLOSED), **fields)


def prefer_higher(first: Trajectory, second: Trajectory, problem: Problem) -> float | None:
    one, other = (t.input_ids[-1] for t in (first, second))
    return None if 19 in (one, other) else 0.9 if one > other else 0.1


def judged(*trajectories: Trajectory, **options: Any) -> tuple[list[Row], Any]:
    return asyncio.run(judged_pairs(trajectories, PROBLEMS, CallableJudge(prefer_higher), **options))


def test_the_preferred_side_is_chosen_whichever_comes_first() -> None:
    rows, counts = judged(talk("a", 0, 1), talk("a", 1, 2), talk("b", 0, 4), talk("b", 1, 3))
    assert [(r["problem_id"], r["chosen_sample"], r["rejected_sample"]) for r in rows] == [
        ("a", 1, 0), ("b", 0, 1)
    ]  # fmt: skip
    assert rows[0]["chosen_input_ids"] == [1, 2, 12] and rows[0]["chosen_completion_mask"] == [0, 0, 1]
    for row in rows:
        check_row(row, "row")
    assert (counts.num_rows, counts.problems) == (2, {"with a preference": 2})


def test_ties_silence_truncated_faulty_and_equal_talks_give_no_row_and_are_counted() -> None:
    fault = talk("a", 3, 4, stop_reason=StopReason.ENVIRONMENT_FAULT, fault="EngineError: gone")
    late = talk("a", 2, 5, stop_reason=StopReason.TOKEN_LIMIT)
    rows, counts = judged(talk("a", 0, 1), talk("a", 1, 1), late, fault, talk("b", 0, 9), talk("b", 1, 2))
    assert rows == []
    assert counts.trajectories == {"comparable": 3, "duplicate": 1, "truncated": 1, "environment fault": 1}
    assert counts.problems == {"fewer than two to compare": 1, "without a preference": 1}
    tie = CallableJudge(lambda *_: 0.5)
    assert asyncio.run(judged_pairs([talk("a", 0, 1), talk("a", 1, 2)], PROBLEMS, tie))[0] == []


def test_draws_are_limited_fixed_by_the_seed_and_free_of_the_order() -> None:
    talks = [talk("a", sample, sample) for sample in range(8)]
    rows, _ = judged(*talks, per_problem=5)
    assert len({(r["chosen_sample"], r["rejected_sample"]) for r in rows}) == 5
    assert rows == judged(*reversed(talks), per_problem=5)[0] != judged(*talks, per_problem=5, seed=1)[0]
    assert len(judged(*talks, per_problem=100)[0]) == 28


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(InputError, match="per_problem must be at least 1, got 0"):
        judged(talk("a", 0, 1), per_problem=0)
    with pytest.raises(InputError, match="problem 'c', which is not among"):
        judged(talk("c", 0, 1))
