"""The benchmarks run, say what they should, and are not fooled."""

import contextlib
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.figures import Figures, quantile_ms
from benchmarks.grader import Example, GradingFigures, read_solutions, read_trajectories, summarise
from benchmarks.grader import bars as grader_bars
from benchmarks.maths import WrongAnswerError, check_answers, maths_trajectories
from benchmarks.processes import cpu_s, private_mib, pss_mib, rss_mib
from benchmarks.sandbox import OURS, PAPER, STOCK, bars, table
from sandbox.processes import descendants

ROOT = Path(__file__).resolve().parents[1]


def run(module: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def figures(**changes: float | None) -> Figures:
    values = {
        "sessions_per_s": 36.0,
        "executions_per_s": 108.0,
        "cpu_ms_per_execution": 15.0,
        "first_p50_ms": 20.0,
        "first_p95_ms": 25.0,
        "first_sympy_p50_ms": 40.0,
        "warm_p50_ms": 2.0,
        "close_p50_ms": 5.0,
        "private_mib_per_session": 14.0,
        "base_pss_mib": 130.0,
        "fork_p50_ms": 12.0,
    }
    return Figures(**(values | changes))  # pyright: ignore[reportArgumentType]


def test_known_answers_are_those_of_plain_python() -> None:
    trajectories = maths_trajectories(30, 6, seed=5)
    assert [t.kind for t in trajectories[:4]] == ["plain", "numpy", "sympy", "plain"]
    for trajectory in trajectories:
        state: dict = {}
        for cell in trajectory.cells:
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(cell.code, state)
            assert output.getvalue() == cell.text + "\n", cell.code


def test_later_cells_need_the_state_of_earlier_ones() -> None:
    for trajectory in maths_trajectories(30, 6, seed=6):
        for cell in trajectory.cells[1:]:
            with pytest.raises(NameError), contextlib.redirect_stdout(io.StringIO()):
                exec(cell.code, {})


def test_the_seed_alone_decides() -> None:
    assert maths_trajectories(6, 3, seed=1) == maths_trajectories(6, 3, seed=1)
    assert maths_trajectories(6, 3, seed=1) != maths_trajectories(6, 3, seed=2)


def test_a_wrong_answer_stops_the_comparison() -> None:
    trajectories = maths_trajectories(1, 2, seed=0)
    right = [[cell.text for cell in trajectories[0].cells]]
    check_answers(right, trajectories)
    with pytest.raises(WrongAnswerError, match="showed '0', but the answer is"):
        check_answers([[right[0][0], "0"]], trajectories)


def test_a_process_is_seen_with_all_that_it_started() -> None:
    child = (
        "import subprocess\np = subprocess.Popen(['sleep', '10'])\nx = b'1' * 2**25\n"
        "print(p.pid, flush=True)\np.wait()"
    )
    before = set(descendants(os.getpid()))
    with subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        grandchild = int(process.stdout.readline())
        assert set(descendants(os.getpid())) - before == {process.pid, grandchild}
        assert 32 < private_mib(process.pid) < pss_mib(process.pid) < rss_mib(process.pid) < 100
        os.kill(grandchild, 9)
    assert set(descendants(os.getpid())) == before
    assert private_mib(process.pid) == 0.0


def test_cpu_time_of_the_dead_counts() -> None:
    before = cpu_s(os.getpid())
    spin = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", spin], check=True)
    assert 0.25 < cpu_s(os.getpid()) - before < 1.0


def test_quantiles_are_values_that_were_measured() -> None:
    times = [0.004, 0.001, 0.003, 0.002]
    assert [quantile_ms(times, q) for q in (0.5, 0.75, 0.95)] == [2.0, 3.0, 4.0]
    assert quantile_ms([0.007], 0.5) == 7.0


def test_the_better_of_two_rounds_is_taken_figure_by_figure() -> None:
    one = figures(sessions_per_s=30.0, first_p50_ms=18.0, private_mib_per_session=13.0, fork_p50_ms=None)
    two = figures(sessions_per_s=40.0, first_p50_ms=22.0, private_mib_per_session=14.0, fork_p50_ms=None)
    best = figures(sessions_per_s=40.0, first_p50_ms=18.0, private_mib_per_session=13.0, fork_p50_ms=None)
    assert one.better(two) == two.better(one) == best


def test_bars_hold_at_their_value_and_not_beyond() -> None:
    stock = figures(sessions_per_s=4.0, first_p50_ms=300.0)
    paper = figures(sessions_per_s=25.0)
    found = {
        name: (value, is_held)
        for name, value, _, is_held in bars({OURS: figures(), STOCK: stock, PAPER: paper})
    }
    assert found == {
        "sessions/s, times stock ipykernel's >=": (9.0, True),
        "sessions/s, times the paper's executor's >=": (1.44, True),
        "first result p50, of stock ipykernel's <=": (pytest.approx(1 / 15), True),
        "private MiB per session <=": (14.0, True),
        "fork p50 ms <=": (12.0, True),
    }
    slow = figures(sessions_per_s=34.9, first_p50_ms=20.1, private_mib_per_session=15.1, fork_p50_ms=30.1)
    assert not any(is_held for *_, is_held in bars({OURS: slow, STOCK: stock, PAPER: paper}))


def test_a_peer_that_fails_is_named_and_not_compared() -> None:
    lines = list(table({STOCK: figures(), PAPER: "ValueError: no"}))
    assert lines[-1] == f"{PAPER}: not measured: ValueError: no"
    assert not any(PAPER in line for line in lines[:-1])


def test_impossible_numbers_are_refused() -> None:
    done = run("benchmarks.sandbox", "--turns", "1")
    assert done.returncode == 2
    assert done.stderr.endswith("argument --turns: must be at least 2, got 1\n")


def test_the_comparison_runs_and_prints_every_peer(tmp_path: Path) -> None:
    peers = ["ours, no isolation", PAPER, STOCK, "python -c per call"]
    tiny = ["--trajectories", "3", "--turns", "2", "--samples", "1", "--rounds", "1", "--concurrency", "2"]
    done = run("benchmarks.sandbox", *tiny, "--json", str(tmp_path / "f.json"), "--peers", *peers)
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "f.json").read_text())["figures"]
    assert list(measured) == peers
    rows = {line[:24].strip(): line[24:].split() for line in done.stdout.splitlines()[2:]}
    for name in ("sessions/s", "executions/s", "cpu ms/execution", "first p50 ms", "warm p50 ms"):
        assert len(rows[name]) == 4 and all(float(value) > 0 for value in rows[name]), name
    assert [value == "-" for value in rows["private MiB/session"]] == [False, True, False, True]
    assert [value == "-" for value in rows["fork p50 ms"]] == [False, True, True, True]


def test_many_sessions_open_answer_and_are_gone() -> None:
    done = run("benchmarks.sandbox", "--open", "12", "--isolation", "none")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "opened 12 sessions" in done.stdout and "; 0 wrong answers" in done.stdout
    assert "left behind: nothing" in done.stdout


def grading_figures(**changes: float) -> GradingFigures:
    values = {
        "num": 100,
        "num_labelled": 100,
        "right": 98,
        "false_positives": 1,
        "false_negatives": 1,
        "ungraded": 0,
    }
    return GradingFigures(**{**values, "cpu_s": 3.0, "wall_s": 3.0, **changes})  # pyright: ignore[reportArgumentType]


def test_verdicts_are_counted_against_their_labels() -> None:
    labels = [True, True, False, False, True, None]
    verdicts = [True, False, False, True, None, True]
    examples = [Example("response", "gold", label) for label in labels]
    assert summarise(examples, verdicts, 1.5, 2.0) == GradingFigures(6, 5, 2, 1, 1, 1, 1.5, 2.0)


def test_bars_of_the_grader_hold_at_their_value_and_not_beyond() -> None:
    theirs = grading_figures(cpu_s=10.0)
    held = {"cases": {"ours": grading_figures(), "math-verify": theirs}}
    assert [is_held for *_, is_held in grader_bars(held)] == [True, True]
    missed = {"cases": {"ours": grading_figures(right=97, cpu_s=3.1), "math-verify": theirs}}
    assert [is_held for *_, is_held in grader_bars(missed)] == [False, False]
    fast = {"trajectories": {"ours": grading_figures(cpu_s=1.0), "math-verify": theirs}}
    assert [value for _, value, _, _ in grader_bars(fast)] == [0.98, 10.0]
    golds = {"math": {"ours": grading_figures()}, "gsm8k": {"ours": grading_figures()}}
    assert [is_held for *_, is_held in grader_bars(golds)] == [True, False]  # two golds of MATH are empty


def test_the_graders_are_compared_on_any_cases(tmp_path: Path) -> None:
    rows = [
        {"response": r"so \\boxed{\\frac{1}{2}}", "gold": "0.5", "label": True},
        {"response": r"so \\boxed{2}", "gold": "2", "label": True},
        {"response": r"so \\boxed{3}", "gold": "2", "label": False},
    ]
    path = tmp_path / "cases.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("benchmarks.grader", "--cases", str(path), "--json", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())["cases"]
    assert {peer: (f["num"], f["right"], f["ungraded"]) for peer, f in figures.items()} == {
        "ours": (3, 3, 0),
        "math-verify": (3, 3, 0),
    }
    assert "share of the cases right >= 0.98: 1" in done.stdout


def test_trajectories_and_solutions_are_read_for_the_graders(tmp_path: Path) -> None:
    turns = [
        {"role": "assistant", "content": "```python\nprint(7)\n```"},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "<solution>7</solution>"},
    ]
    row = {"question": "?", "turns": turns, "gold": "7", "label": None}
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    text = "```python\nprint(7)\n```\n```output\n7\n```\n\\boxed{7}"
    assert read_trajectories(tmp_path / "t.jsonl") == [Example(text, "7", None)]
    for split in ("train", "test"):
        solution = json.dumps({"answer": "3 * 6 =\u2028 18\n#### 18"}, ensure_ascii=False)
        (tmp_path / f"{split}.jsonl").write_text(solution + "\n", encoding="utf-8")
    assert read_solutions(tmp_path) == [Example("3 * 6 =\u2028 18\n#### 18", "18", True)] * 2


def commands() -> list[str]:
    text = (ROOT / "benchmarks" / "README.md").read_text() + (ROOT / "docs" / "results.md").read_text()
    return re.findall(r"python -m (benchmarks\.\w+[^\n`#]*)", text)


@pytest.mark.parametrize("command", commands())
def test_commands_shown_are_commands_that_exist(command: str) -> None:
    name, *argv = shlex.split(command)
    importlib.import_module(name).parse(argv)
