"""recipes.evaluate and recipes.compare, end to end."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.trajectories import read_trajectories
from eval.predictions import read_predictions
from mtpo.runs import read_json
from recipes import compare, evaluate
from tests.child_processes import kill_when
from tests.coin import SHORT, write_problems_file

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
TRAJECTORIES = SHARED / "trajectories" / "real_trajectories.jsonl.gz"


@pytest.fixture(scope="module")
def runs(coin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `greedy`, and with `sampled`: 4 samples at temperature 1, both of the same 8 problems."""
    folder = tmp_path_factory.mktemp("runs")
    problems = write_problems_file(folder / "rounds.jsonl", "test", 8)
    common = ["--model", coin, "--problems", problems, *SHORT]
    succeeds(evaluate.main, *common, "--out", folder / "greedy")
    succeeds(evaluate.main, *common, "--samples", 4, "--temperature", 1, "--out", folder / "sampled")
    return folder


def succeeds(main: Any, *argv: object) -> None:
    assert main([str(a) for a in argv]) == 0


def fails(capsys: pytest.CaptureFixture[str], main: Any, *argv: object) -> str:
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


def figures(run: Path) -> dict[str, Any]:
    """The metrics without what a clock measured."""
    metrics = read_json(run / "metrics.json")
    metrics["table"] = [line for line in metrics["table"].splitlines() if not line.startswith("seconds")]
    return {key: value for key, value in metrics.items() if key != "seconds"}


def test_samples_give_every_figure_with_its_denominator(runs: Path) -> None:
    metrics = figures(runs / "sampled")
    assert (metrics["num_problems"], metrics["num_trajectories"], metrics["samples"]) == (
        8,
        32,
        {"min": 4, "max": 4},
    )
    predictions = read_predictions(runs / "sampled" / "predictions.jsonl")
    assert metrics["accuracy"]["value"] == pytest.approx(sum(p.is_correct for p in predictions) / 32)
    assert list(metrics["pass_at"]) == list(metrics["majority_at"]) == ["1", "2", "4"]
    assert metrics["pass_at"]["1"]["value"] == pytest.approx(metrics["accuracy"]["value"])
    assert sum(metrics["outcomes"].values()) == 32
    assert metrics["tool_use"]["count"] == sum(p.tool_calls > 0 for p in predictions)
    assert any("of 32 trajectories" in line for line in metrics["table"])
    assert (runs / "sampled" / "report.html").stat().st_size > 10_000
    assert metrics["grader"] == {
        "accept_joined": False,
        "last_sentence": False,
        "paper_tolerance": False,
        "timeout_s": 5.0,
    }


@pytest.mark.slow
def test_a_run_killed_in_the_middle_ends_with_the_same_metrics(
    coin: Path, runs: Path, tmp_path: Path
) -> None:
    argv = ["--model", coin, "--problems", runs / "rounds.jsonl", *SHORT, "--samples", 4, "--temperature", 1]
    argv += ["--out", tmp_path / "run", "--max_in_flight", 2, "--resume"]
    shard = tmp_path / "run" / "trajectories" / "00000.jsonl"
    kill_when(lambda: shard.exists() and b"\n" in shard.read_bytes(), evaluate.main, [str(a) for a in argv])
    assert 0 < len(list(read_trajectories(shard.parent))) < 32
    assert not (tmp_path / "run" / "metrics.json").exists()
    succeeds(evaluate.main, *argv)
    assert figures(tmp_path / "run") == figures(runs / "sampled")


def test_runs_are_compared_into_files_for_programs_and_for_people(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [runs / "greedy", runs / "sampled", runs / "greedy", "--out", tmp_path / "comparison"]
    succeeds(compare.main, *argv)
    sampled, same = read_json(tmp_path / "comparison" / "comparison.json")
    assert (sampled["test"], sampled["num_problems"], sampled["num_tests"]) == ("permutation", 8, 2)
    assert sampled["after_score"]["value"] == figures(runs / "sampled")["accuracy"]["value"]
    assert len(sampled["changed"]) == sampled["improved"] + sampled["worsened"] > 0
    assert (same["test"], same["changed"], same["p"]) == ("mcnemar", [], 1)
    page = (tmp_path / "comparison" / "comparison.md").read_text()
    assert all(f"`{change['problem_id']}`" in page for change in sampled["changed"])
    assert "2 comparisons with" in capsys.readouterr().out.splitlines()[-1]


def test_other_problems_are_refused_before_anything_is_sampled(
    coin: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = write_problems_file(tmp_path / "rounds.jsonl", "test", 4)
    argv = ["--model", coin, "--problems", problems, *SHORT, "--out", tmp_path / "run"]
    error = fails(capsys, evaluate.main, *argv, "--compare", runs / "greedy")
    assert "over different problems (8 and 4, 4 of them the same)" in error
    assert not (tmp_path / "run").exists()
    succeeds(evaluate.main, *argv)
    both = ("--runs", runs / "greedy", tmp_path / "run", "--out", tmp_path / "comparison")
    assert "different problems" in fails(capsys, compare.main, *both)
    succeeds(compare.main, *both, "--common")
    [found] = read_json(tmp_path / "comparison" / "comparison.json")
    assert (found["num_problems"], found["left_out"], found["is_common_only"]) == (4, 4, True)


def test_training_problems_in_the_set_are_reported(coin: Path, runs: Path, tmp_path: Path) -> None:
    metrics = figures(runs / "greedy")["contamination"]
    assert metrics["num_train"] == 0 and any(str(coin) in text for text in metrics["unknown"])
    argv = [
        "--trajectories",
        runs / "greedy",
        "--train_problems",
        write_problems_file(tmp_path / "t.jsonl", "test", 3),
    ]
    succeeds(evaluate.main, *argv, "--out", tmp_path / "run")
    found = figures(tmp_path / "run")["contamination"]
    assert (found["duplicates"]["count"], found["duplicates"]["of"], found["num_train"]) == (3, 8, 3)


def test_a_run_scored_again_has_the_same_figures(runs: Path, tmp_path: Path) -> None:
    succeeds(evaluate.main, "--trajectories", runs / "sampled", "--out", tmp_path / "again")
    assert figures(tmp_path / "again") == figures(runs / "sampled")
    assert not (tmp_path / "again" / "README.md").exists()


CALL = "```python\nprint(4)\n```\n```output\n4\n```\n\\boxed{4}"


def outputs(path: Path) -> Path:
    rows = [
        {"question": "What is 3 / 7?", "answer": "3/7", "response": "\\boxed{0.4286}", "correct": True, "model": "m"},
        {"question": "What is 2 + 2?", "answer": "4", "response": CALL},
        {"question": "What is 5 + 5?", "answer": "10", "response": "It is 10."},
        {"question": "Who?", "answer": "1", "messages": [{"role": "user", "content": "Who?"}]},
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_outputs_of_others_are_scored_without_a_model(tmp_path: Path) -> None:
    argv = ["--trajectories", outputs(tmp_path / "theirs.jsonl"), "--out", tmp_path / "run"]
    succeeds(evaluate.main, *argv)
    metrics = figures(tmp_path / "run")
    assert metrics["outcomes"] == {"wrong answer": 1, "correct": 1, "no answer": 1}
    assert (metrics["policies"], metrics["action_tokens"]) == ({"m": 1, "imported": 2}, None)
    assert metrics["tool_use"]["count"] == 1
    sources = metrics["sources"]
    assert (sources["num_records"], sources["num_not_imported"], sources["num_other_problems"]) == (4, 1, 0)
    [wrong] = sources["flags"]["correct"]["disagreements"]
    assert (wrong["kind"], wrong["answer"]) == ("rounding of the gold answer", "0.4286")
    readme = (tmp_path / "run" / "README.md").read_text()
    assert "3 of 4 trajectories were scored; 1 could not be imported" in readme
    assert "flagged right, here wrong: rounding of the gold answer" in readme
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    succeeds(evaluate.main, *argv, "--resume")
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before


def test_grading_options_are_passed_on_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--trajectories", outputs(tmp_path / "theirs.jsonl")]
    succeeds(evaluate.main, *argv, "--out", tmp_path / "strict")
    succeeds(evaluate.main, *argv, "--last_sentence", "--paper_tolerance", "--out", tmp_path / "lenient")
    metrics = figures(tmp_path / "lenient")
    assert metrics["outcomes"] == {"correct": 3}
    assert metrics["grader"]["last_sentence"] and metrics["grader"]["paper_tolerance"]
    assert "`paper_tolerance` = True" in (tmp_path / "lenient" / "README.md").read_text()
    both = ("--runs", tmp_path / "strict", tmp_path / "lenient", "--out", tmp_path / "comparison")
    assert "graded with different options" in fails(capsys, compare.main, *both)


@pytest.mark.skipif(not TRAJECTORIES.exists(), reason="the shared trajectories are not here")
@pytest.mark.slow
def test_real_trajectories_are_scored_as_their_labels_say(tmp_path: Path) -> None:
    succeeds(evaluate.main, "--trajectories", TRAJECTORIES, "--out", tmp_path / "run")
    metrics = figures(tmp_path / "run")
    assert (metrics["num_trajectories"], metrics["num_problems"]) == (1015, 599)
    assert (metrics["outcomes"]["correct"], metrics["ungraded"]["count"]) == (620, 0)
    label, reported = (metrics["sources"]["flags"][name] for name in ("label", "reported_correct"))
    assert (label["agreement"]["count"], label["agreement"]["of"], label["missing"]) == (975, 975, 40)
    assert label["disagreements"] == []
    assert reported["agreement"]["count"] < reported["agreement"]["of"]
    theirs = {(d["problem_id"], d["answer"]): d for d in reported["disagreements"]}
    assert theirs["math:test/1028", "5.7446"]["flag"] is True  # for the square root of 33
    assert theirs["math:test/550", "-5"]["flag"] is False  # the gold answer itself
    readme = (tmp_path / "run" / "README.md").read_text()
    told = readme.partition("flag `reported_correct`")[2]
    assert "- 12 flagged right, here wrong: rounding of the gold answer" in told  # counted by hand
    assert "answer `-5`, gold answer `-5`" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "expected --model to sample from, or --trajectories to score"),
        (("--model", "m", "--trajectories", "t"), "one of the two"),
        (("--model", "m"), "--model needs --problems"),
        (("--trajectories", "t", "--limit", 3), "--limit has no effect without --problems"),
        (
            ("--model", "m", "--problems", "p", "--flags", "label"),
            "--flags has no effect without --trajectories",
        ),
        (("--trajectories", "t", "--samples", 4), "--samples has no effect with --trajectories"),
        (("--trajectories", "t", "--temperature", 1), "--temperature has no effect with --trajectories"),
        (("--trajectories", "absent.jsonl"), "absent.jsonl: no such file"),
    ],
)
def test_options_without_an_effect_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[object, ...], message: str
) -> None:
    assert message in fails(capsys, evaluate.main, *options, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_comparing_takes_two_finished_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "at least 2 evaluations, got 1" in fails(
        capsys, compare.main, "--runs", "a", "--out", tmp_path / "c"
    )
    assert "no metrics.json" in fails(capsys, compare.main, "--runs", "a", "b", "--out", tmp_path / "c")
