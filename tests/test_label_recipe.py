"""Grading trajectories and writing rows: the options of grading reach the verdicts and the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mtpo.errors import InputError
from mtpo.grader import STRICT, GradingOptions
from mtpo.trajectory import Problem, Segment, StopReason, Trajectory
from recipes.label import Config, grade_trajectories, write_rows

PROBLEM = Problem("p/0", "Which roots?", "1", joined_answer="-2, 1")


def trajectory(sample: int, answer: str) -> Trajectory:
    action = Segment("action", (7, sample + 10), text=rf"So $\boxed{{{answer}}}$.")
    return Trajectory(PROBLEM.id, sample, (Segment("prompt", (1, 2)), action), StopReason.ANSWERED)


def verdicts(options: GradingOptions, *answers: str) -> list[str]:
    trajectories = [trajectory(sample, answer) for sample, answer in enumerate(answers)]
    return [grade.verdict for _, grade in grade_trajectories(trajectories, [PROBLEM], options=options)]


def test_all_values_of_a_cut_gold_answer_count_only_where_that_is_asked_for() -> None:
    assert verdicts(STRICT, "1", "1, -2", "-2") == ["correct", "wrong", "wrong"]
    assert verdicts(GradingOptions(accept_joined=True), "1", "1, -2", "-2") == ["correct", "correct", "wrong"]


def test_tolerance_counts_only_where_that_is_asked_for() -> None:
    assert verdicts(STRICT, "1.00001") == ["wrong"]
    assert verdicts(GradingOptions(paper_tolerance=True), "1.00001", "1.1") == ["correct", "wrong"]


@pytest.mark.parametrize("options", [STRICT, GradingOptions(accept_joined=True, paper_tolerance=True)])
def test_every_grade_names_the_options_it_was_given_with(tmp_path: Path, options: GradingOptions) -> None:
    graded = grade_trajectories([trajectory(0, "1"), trajectory(1, "2")], [PROBLEM], options=options)
    write_rows(tmp_path, graded, "sft", options=options)
    rows = [json.loads(line) for line in (tmp_path / "grades.jsonl").read_text().splitlines()]
    assert [row["grading"] for row in rows] == [options.names] * 2
    assert options.names == (["accept_joined", "paper_tolerance"] if options != STRICT else [])


def test_flags_of_the_recipe_become_options() -> None:
    config = Config(trajectories=["runs/a"], out="runs/b", accept_joined=True)
    assert config.grading == GradingOptions(accept_joined=True)
    with pytest.raises(InputError, match="--workers must be at least 1, got 0"):
        Config(trajectories=["runs/a"], out="runs/b", workers=0)
