"""The soaks run at a small size, and are not fooled: they see what is lost, mixed up, or leaking."""

import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import soak
from benchmarks.sandbox_soak import Tally
from benchmarks.soak_expected import Outcome, differs_by_told_loss
from benchmarks.soak_faults import plan_kills
from benchmarks.soak_model import make_problems, next_turn
from benchmarks.soak_watch import Footprint, judge_life
from mtpo.trajectory import Execution

ROOT = Path(__file__).resolve().parents[1]
RIGHT = ("value = 3", "3", "ok")
TOLD = (
    "value = value + 1",
    "[the interpreter died since the last cell; all variables are gone]\nNameError",
    "error",
)


def run(module: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


def kept(stdout: str) -> dict[str, bool]:
    """Of every check, the first words, and whether it held."""
    lines = re.findall(r"^(held  |FAILED)  (\w+ \w+)", stdout, re.MULTILINE)
    return {name: verdict == "held  " for verdict, name in lines}


def test_the_sandbox_soak_runs_and_every_answer_is_right() -> None:
    done = run("benchmarks.sandbox_soak", "--executions", "200", "--size", "4", "--isolation", "none")
    found = kept(done.stdout)
    assert found["no wrong"] and found["losses were"] and found["nothing left"], done.stdout + done.stderr
    assert {"owner flat", "guardian flat", "fork server"} < found.keys()  # too short a life to be judged
    assert (done.returncode == 0) == all(found.values())


@pytest.mark.parametrize("value", ["16", "0", "ten"])
def test_a_soak_is_of_whole_problems(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        soak.parse(["--trajectories", value])
    assert "--trajectories" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_killed_at_random_moments_gives_the_trajectories_and_labels_of_one_in_peace() -> None:
    done = run("benchmarks.soak", "--trajectories", "40", "--size", "4", "--isolation", "none")
    found = kept(done.stdout)
    for check in (
        "killed were",
        "each trajectory",
        "trajectories as",
        "verdicts as",
        "no fault",
        "nothing left",
    ):
        assert found[check], done.stdout + done.stderr


def test_the_soak_tells_a_loss_that_was_told_from_one_that_was_not() -> None:
    tally = Tally(num_planned=10)
    assert tally.note(Execution("print(x)", "5", "ok", 0.0), "5")
    assert not tally.note(Execution("print(x)", "[died; all variables are gone]", "died", 0.0), "5")
    assert not tally.surprises
    assert not tally.note(Execution("print(x)", "NameError: name 'x' is not defined", "error", 0.0), "5")
    assert len(tally.surprises) == 1


@pytest.mark.parametrize(
    ("executions", "is_told"),
    [
        ((RIGHT, TOLD), True),
        ((TOLD, RIGHT), False),  # not the cell that was to run first
        ((("value = 3", "4", "ok"), TOLD), False),  # wrong before the loss
        ((RIGHT, ("value = value + 1", "NameError", "error")), False),
        ((RIGHT,), False),
    ],
)
def test_a_trajectory_may_differ_from_where_a_loss_was_told(
    executions: tuple[tuple[str, str, str], ...], is_told: bool
) -> None:
    expected = Outcome(b"", (RIGHT, ("value = value + 1", "4", "ok")))
    assert differs_by_told_loss(Outcome(b"other", executions), expected) is is_told


def test_a_life_is_judged_by_its_last_tenth() -> None:
    life = [Footprint(50.0, 9)] * 10 + [Footprint(100.0, 50)] * 45  # the first tenth of 55 looks is warm-up
    assert judge_life("owner", [*life, *[Footprint(110.0, 58)] * 45])[0]
    assert not judge_life("owner", [*life, *[Footprint(110.2, 50)] * 45])[0]
    assert not judge_life("owner", [*life, *[Footprint(100.0, 59)] * 45])[0]


def test_kills_are_planned_from_a_seed_and_spare_the_old() -> None:
    plan = plan_kills(1000, {"kernel": 10, "driver": 100}, random.Random(1), young=("driver",))
    assert plan == plan_kills(1000, {"kernel": 10, "driver": 100}, random.Random(1), young=("driver",))
    assert plan != plan_kills(1000, {"kernel": 10, "driver": 100}, random.Random(2), young=("driver",))
    assert Counter(part for _, part in plan) == {"kernel": 90, "driver": 5}
    assert max(due for due, part in plan if part == "driver") < 500 < max(due for due, _ in plan) < 900


def test_the_model_goes_on_from_what_the_cells_showed() -> None:
    prompt = "Start with 4. Then take 3 times it plus 5. What is it?"
    assert next_turn(prompt, seed=0) == "```python\nvalue = 4\nprint(value)\n```"
    prompt += "```output\n4\n```\n"
    cells = Counter(next_turn(prompt, seed) for seed in range(1000))
    right, slip = (f"```python\nvalue = value * 3 + 5{more}\nprint(value)\n```" for more in ("", " + 1"))
    assert cells.keys() == {right, slip} and 60 < cells[slip] < 140
    assert next_turn(prompt + "```output\n17\n```", seed=0) == "It is $\\boxed{17}$."
    assert next_turn(prompt + "```output\nNameError\n```", seed=0) == "I do not know."
    square = prompt.replace("What is it?", "Expand (x + it)^2.")
    assert next_turn(square + "```output\n17\n```", seed=0) == "It is $\\boxed{x^2 + 34x + 289}$."


def test_answers_of_the_soak_are_those_of_its_steps() -> None:
    for problem in make_problems(20, seed=3):
        value, *steps = map(int, re.findall(r"(?:with|take|plus) (\d+)", problem.question))
        for factor, term in zip(steps[::2], steps[1::2], strict=True):
            value = value * factor + term
        assert problem.answer in (str(value), f"(x + {value})^2")
