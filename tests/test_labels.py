import dataclasses
import random
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import pytest

from data.labels import make_binary, make_pairs, make_sft
from mtpo.errors import InputError
from mtpo.grader import Grade
from mtpo.trajectory import Execution, ExecutionStatus, Segment, StopReason, Trajectory

Verdict = Literal["correct", "wrong", "ungraded"]
Labelled = tuple[Trajectory, Grade]


def graded(
    verdict: Verdict,
    sample: int,
    *,
    problem_id: str = "p",
    action: tuple[int, ...] | None = None,
    stop_reason: StopReason = StopReason.ANSWERED,
    executed: ExecutionStatus | None = None,
) -> Labelled:
    """A trajectory of prompt [1, 2], code [7], tool output [8, 9] and an answer of its own, with its grade."""
    answer = (100 + sample,) if action is None else action
    segments = (
        Segment("prompt", (1, 2)),
        Segment("action", (7,)),
        Segment("observation", (8, 9)),
        Segment("action", answer),
    )
    executions = () if executed is None else (Execution("1/0", "", executed, 0.0),)
    fault = "kernel died" if stop_reason == StopReason.ENVIRONMENT_FAULT else None
    return (
        Trajectory(problem_id, sample, segments, stop_reason, executions, fault=fault),
        Grade(verdict, "1", "exact"),
    )


def samples(rows: list[dict[str, Any]], key: str = "sample") -> list[int]:
    return sorted(row[key] for row in rows)


def test_a_pair_is_a_correct_and_a_wrong_trajectory_with_ids_and_masks() -> None:
    rows, counts = make_pairs([graded("wrong", 0), graded("correct", 5, action=(3, 4))])
    assert rows == [
        {
            "problem_id": "p",
            "chosen_sample": 5,
            "rejected_sample": 0,
            "chosen_input_ids": [1, 2, 7, 8, 9, 3, 4],
            "chosen_completion_mask": [0, 0, 1, 0, 0, 1, 1],
            "rejected_input_ids": [1, 2, 7, 8, 9, 100],
            "rejected_completion_mask": [0, 0, 1, 0, 0, 1],
        }
    ]
    assert counts.num_rows == 1 and counts.why_empty() is None


def test_pairs_are_drawn_uniformly() -> None:
    attempts = [graded("correct", s) for s in range(2)] + [graded("wrong", s) for s in range(2, 5)]
    drawn = Counter[tuple[int, int]]()
    for seed in range(600):
        (row,), _ = make_pairs(attempts, seed=seed)
        drawn[row["chosen_sample"], row["rejected_sample"]] += 1
    assert set(drawn) == {(c, w) for c in (0, 1) for w in (2, 3, 4)}
    # 100 expected of each, standard deviation sqrt(600 * 1/6 * 5/6) = 9.1: all within 4 of them
    assert all(abs(n - 100) < 4 * 9.1 for n in drawn.values())


def test_k_pairs_are_different_and_never_more_than_there_are() -> None:
    attempts = [graded("correct", 0), graded("correct", 1), graded("wrong", 2), graded("wrong", 3)]
    for k, expected in ((1, 1), (3, 3), (4, 4), (9, 4)):
        rows, counts = make_pairs(attempts, k=k)
        assert len({(r["chosen_sample"], r["rejected_sample"]) for r in rows}) == len(rows) == expected
        assert counts.num_rows == expected


@pytest.mark.parametrize("make", [make_pairs, make_binary, make_sft])
def test_rows_depend_on_the_seed_and_not_on_the_order(make: Callable[..., Any]) -> None:
    attempts = [
        graded(("correct", "wrong", "ungraded")[s % 3], s, problem_id=f"p{p}", action=(s % 7,))
        for p in range(6)
        for s in range(12)
    ]
    limit = {"per_class": 2} if make is make_binary else {"k": 2}
    first = make(attempts, seed=1, **limit)
    for shuffle_seed in range(5):
        shuffled = random.Random(shuffle_seed).sample(attempts, len(attempts))
        again = make(iter(shuffled), seed=1, **limit)
        assert again == first and again[1].table() == first[1].table()
    assert make(attempts, seed=2, **limit)[0] != first[0]


def test_every_problem_draws_for_itself() -> None:
    attempts = [
        graded("correct" if s % 2 else "wrong", s, problem_id=f"p{p}") for p in range(20) for s in range(8)
    ]
    rows, _ = make_pairs(attempts)
    assert len({(row["chosen_sample"], row["rejected_sample"]) for row in rows}) > 5
    alone, _ = make_pairs([attempt for attempt in attempts if attempt[0].problem_id == "p7"])
    assert alone == [row for row in rows if row["problem_id"] == "p7"]


@pytest.mark.parametrize(
    ("left_out", "fate"),
    [
        (graded("wrong", 9, stop_reason=StopReason.TURN_LIMIT), "truncated"),
        (graded("wrong", 9, stop_reason=StopReason.TOKEN_LIMIT), "truncated"),
        (graded("wrong", 9, stop_reason=StopReason.CONTEXT_LIMIT), "truncated"),
        (graded("wrong", 9, stop_reason=StopReason.ENVIRONMENT_FAULT), "environment fault"),
        (graded("ungraded", 9), "ungraded"),
        (
            (
                Trajectory("p", 9, (Segment("prompt", (1, 2)),), StopReason.NO_CODE),
                Grade("wrong", None, "no_answer"),
            ),
            "without action ids",
        ),
        (
            (dataclasses.replace(graded("correct", 9)[0], is_from_text=True), Grade("correct", "1", "exact")),
            "read from text",
        ),
        (graded("wrong", 9, stop_reason=StopReason.TIME_LIMIT), "truncated"),
    ],
)
def test_what_says_nothing_about_the_model_is_never_a_label(left_out: Labelled, fate: str) -> None:
    attempts = [graded("correct", 0), left_out]
    pairs, counts = make_pairs(attempts)
    assert pairs == [] and counts.trajectories == {"correct": 1, fate: 1}
    assert samples(make_binary(attempts)[0]) == [0]


def test_the_same_holds_for_a_truncated_trajectory_that_is_graded_correct() -> None:
    attempts = [graded("wrong", 0), graded("correct", 1, stop_reason=StopReason.TOKEN_LIMIT)]
    assert make_pairs(attempts)[0] == make_sft(attempts)[0] == []


@pytest.mark.parametrize("verdict", ["wrong", "ungraded"])
def test_finishing_without_an_answer_is_wrong(verdict: Verdict) -> None:
    rows, _ = make_binary([graded(verdict, 3, stop_reason=StopReason.NO_CODE)])
    assert [(row["sample"], row["label"]) for row in rows] == [(3, False)]


def test_winners_that_ignored_a_tool_error_are_dropped_unless_asked_for() -> None:
    attempts = [graded("correct", 0, executed="timeout"), graded("wrong", 1, executed="error")]
    rows, counts = make_pairs(attempts)
    assert rows == [] and counts.trajectories == {"ignored tool error": 1, "wrong": 1}
    assert len(make_pairs(attempts, drop_ignored_errors=False)[0]) == 1
    mended = [graded("correct", 0, executed="ok"), attempts[1]]
    assert len(make_pairs(mended)[0]) == 1


def test_longer_than_max_tokens_is_dropped() -> None:
    attempts = [graded("correct", 0, action=(5,) * 3), graded("correct", 1, action=(5,) * 4)]  # 8 and 9 ids
    rows, counts = make_sft(attempts, k=5, max_tokens=8)
    assert samples(rows) == [0] and counts.trajectories == {"correct": 1, "too long": 1}


def test_equal_action_ids_count_once() -> None:
    attempts = [graded("correct", s, action=(5,)) for s in (4, 2, 3)] + [graded("wrong", 1)]
    rows, counts = make_pairs(attempts, k=9)
    assert [(r["chosen_sample"], r["rejected_sample"]) for r in rows] == [(2, 1)]
    assert counts.trajectories == {"duplicate": 2, "correct": 1, "wrong": 1}
    elsewhere = [graded("correct", 0, action=(5,), problem_id=p) for p in ("p", "q")]
    assert len(make_sft(elsewhere)[0]) == 2


def test_binary_labels_can_be_capped_per_class_and_problem() -> None:
    attempts = [graded("correct", s) for s in range(4)] + [graded("wrong", 7)]
    attempts += [graded("wrong", s, problem_id="q") for s in range(3)]

    def labels(**options: Any) -> Counter[tuple[str, bool]]:
        return Counter((row["problem_id"], row["label"]) for row in make_binary(attempts, **options)[0])

    assert labels() == {("p", True): 4, ("p", False): 1, ("q", False): 3}
    assert labels(per_class=2) == {("p", True): 2, ("p", False): 1, ("q", False): 2}
    assert labels(per_class=1, only_both=True) == {("p", True): 1, ("p", False): 1}


def test_sft_rows_are_correct_trajectories_without_a_label() -> None:
    attempts = [graded("correct", s) for s in range(3)] + [graded("wrong", 3)]
    rows, _ = make_sft(attempts, k=2)
    assert len(rows) == 2 and set(samples(rows)) < {0, 1, 2}
    assert set(rows[0]) == {"problem_id", "sample", "input_ids", "completion_mask"}


@pytest.mark.parametrize(
    ("attempts", "reason"),
    [
        ([], "no pair: there is no trajectory"),
        (
            [graded("correct", s, problem_id=f"p{s}") for s in range(40)],
            "no pair: all 40 problems all correct",
        ),
        ([graded("wrong", s, problem_id=f"p{s}") for s in range(3)], "no pair: all 3 problems all wrong"),
        (
            [
                graded("correct", 0, problem_id="a"),
                graded("correct", 0, problem_id="b"),
                graded("correct", 0, problem_id="c", stop_reason=StopReason.TURN_LIMIT),
                graded("wrong", 0, problem_id="d", stop_reason=StopReason.TURN_LIMIT),
                graded("ungraded", 1, problem_id="d"),
                graded("correct", 0, problem_id="e", stop_reason=StopReason.TURN_LIMIT),
            ],
            "no pair: of 5 problems 2 all correct, 2 all truncated, 1 nothing usable",
        ),
    ],
)
def test_no_pair_says_why_in_one_line(attempts: list[Labelled], reason: str) -> None:
    assert make_pairs(attempts)[1].why_empty() == reason


def test_the_table_accounts_for_every_trajectory_and_problem() -> None:
    attempts = [
        graded("correct", 0),
        graded("wrong", 1),
        graded("ungraded", 2),
        graded("wrong", 0, problem_id="q"),
    ]
    _, counts = make_pairs(attempts)
    assert [line.split() for line in counts.table().splitlines()] == [
        ["pairs", "1"],
        ["trajectories", "4"],
        ["wrong", "2", "50.0%"],
        ["correct", "1", "25.0%"],
        ["ungraded", "1", "25.0%"],
        ["problems", "2"],
        ["all", "wrong", "1", "50.0%"],
        ["correct", "and", "wrong", "1", "50.0%"],
    ]


@pytest.mark.parametrize(
    ("make", "limit"),
    [(make_pairs, "k"), (make_sft, "k"), (make_binary, "per_class"), (make_pairs, "max_tokens")],
)
def test_limits_below_one_are_refused(make: Callable[..., Any], limit: str) -> None:
    with pytest.raises(InputError, match=f"{limit} must be at least 1, got 0"):
        make([], **{limit: 0})
