"""The paper's figures, and a loop's beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.evaluate import evaluate
from eval.published import AFTER_ITERATIONS, MODELS, PUBLISHED, check_published, published_accuracies
from eval.stages import Stage, published_table
from mtpo.errors import InputError
from mtpo.grader import Grade
from mtpo.trajectory import Problem, Segment, StopReason, Trajectory

SPEC = Path(__file__).resolve().parents[2] / "shared" / "spec" / "algorithms.md"
METHODS = {
    "SFT": "SFT",
    "RAFT": "RAFT",
    "iterative single-turn DPO": "single-turn DPO",
    "iterative single-turn KTO": "single-turn KTO",
    "iterative M-DPO": "M-DPO",
    "iterative M-KTO": "M-KTO",
}
"""As the specification names them."""


@pytest.mark.skipif(not SPEC.exists(), reason="needs the specification in ../shared/spec")
def test_the_figures_are_those_of_the_specification() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in SPEC.read_text().splitlines()]
    table = {METHODS[row[0]]: row[1:] for row in rows if len(row) == 5 and row[0] in METHODS}
    told = {
        f"{model}, {method}": tuple(map(float, cell.split(" / ")))
        for method, cells in table.items()
        for model, cell in zip(MODELS, cells, strict=True)
    }
    assert len(told) == 24 and told == PUBLISHED


def test_the_last_iteration_told_is_the_row() -> None:
    for name, iterations in AFTER_ITERATIONS.items():
        assert iterations[-1] == PUBLISHED[name]


def test_a_row_stands_beside_the_third_iteration_and_sft_beside_the_start() -> None:
    assert published_accuracies("Gemma 2 9B, M-KTO", 4) == [(84.1, 51.0), None, None, (86.1, 54.5)]
    assert published_accuracies("Gemma 2 9B, M-KTO", 3) == [(84.1, 51.0), None, None]
    assert published_accuracies("Gemma 1.1 7B, M-DPO", 5)[1:] == [
        (81.5, 49.1), (82.5, 49.7), (83.9, 51.2), None,
    ]  # fmt: skip


def test_an_unknown_row_is_one_line_with_the_choices() -> None:
    with pytest.raises(InputError, match=r"'Gemma 3, M-DPO' is no row .* Gemma 2 9B and one of SFT; RAFT"):
        check_published("Gemma 3, M-DPO")


def stage(name: str, *correct: str) -> Stage:
    """A policy that solves these of two problems of GSM8K and two of MATH."""
    problems = [
        Problem(f"{part}:test/{n}", f"{part} {n}?", "1") for part in ("gsm8k", "math") for n in (0, 1)
    ]
    segments = (Segment("prompt", (1,), None, "?"), Segment("action", (2,), (-0.1,), "1"))
    graded = [
        (
            Trajectory(p.id, 0, segments, StopReason.ANSWERED),
            Grade("correct" if p.id in correct else "wrong", "1", "text"),
        )
        for p in problems
    ]
    return Stage(name, name, evaluate(graded, problems))


STAGES = [stage("start", "gsm8k:test/0"), stage("iteration 1", "gsm8k:test/0", "gsm8k:test/1", "math:test/1")]


def test_both_sets_are_told_apart_and_beside_the_paper() -> None:
    title, header, start, first = published_table(STAGES, "Gemma 1.1 7B, M-DPO").splitlines()
    assert title.startswith("Gemma 1.1 7B, M-DPO:") and header.split() == [
        "gsm8k:test", "paper", "math:test", "paper",
    ]  # fmt: skip
    assert start.split() == [
        "start", "50.0%", "[9.5%,", "90.5%]", "77.5", "0.0%", "[0.0%,", "65.8%]", "46.1",
    ]  # fmt: skip
    assert first.split()[2:] == ["100.0%", "[34.2%,", "100.0%]", "81.5", "50.0%", "[9.5%,", "90.5%]", "49.1"]


def test_a_summary_keeps_the_sets_apart() -> None:
    kept = STAGES[1].to_json()["by_set"]
    assert kept["gsm8k:test"][0] == 1.0 and kept["math:test"] == pytest.approx(
        [0.5, 0.0945, 0.9055], abs=1e-4
    )
    assert "  set math:test" in STAGES[1].greedy.table()


def test_a_set_that_was_not_evaluated_has_a_dash() -> None:
    problem = Problem("gsm8k:test/0", "?", "1")
    segments = (Segment("prompt", (1,), None, "?"), Segment("action", (2,), (-0.1,), "1"))
    graded = [(Trajectory(problem.id, 0, segments, StopReason.ANSWERED), Grade("correct", "1", "text"))]
    alone = Stage("start", "m", evaluate(graded, [problem]))
    row = published_table([alone], "Gemma 2 9B, RAFT").splitlines()[-1].split()
    assert row == ["start", "100.0%", "[20.7%,", "100.0%]", "84.1", "-", "51.0"]
    assert "  set" not in alone.greedy.table()
