"""The commands, end to end, on a model that guesses 1 or 2."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.trajectories import read_trajectories
from mtpo.batches import read_rows
from mtpo.models import load_tokenizer
from mtpo.runs import read_json
from recipes import evaluate, generate, iterate, label, sft, train
from tests.child_processes import kill_when
from tests.coin import SHORT, write_problems_file

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def sampled(coin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of recipes.generate: 6 problems, 8 samples each."""
    folder = tmp_path_factory.mktemp("sampled")
    problems = write_problems_file(folder / "rounds.jsonl", "train", 6)
    argv = ["--model", coin, "--problems", problems, "--samples", 8, "--out", folder / "run", *SHORT]
    assert generate.main([str(a) for a in argv]) == 0
    return folder / "run"


def fails(capsys: pytest.CaptureFixture[str], main, *argv: object) -> str:
    """The one line of error that the command prints; its exit status must not be 0."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


def test_generate_keeps_every_trajectory_and_says_what_it_made(sampled: Path) -> None:
    found = list(read_trajectories(sampled / "trajectories"))
    assert len({(t.problem_id, t.sample) for t in found}) == len(found) == 48
    assert read_json(sampled / "summary.json")["trajectories"] == 48
    used_the_tool = [t for t in found if t.executions]
    assert used_the_tool and all(
        t.executions[0].text in ("1", "2") for t in used_the_tool if t.num_turns == 2
    )
    assert all(t.actions[0].logps and t.fingerprint for t in found)


def test_resuming_a_finished_run_samples_nothing_more(coin: Path, sampled: Path) -> None:
    before = (sampled / "trajectories" / "00000.jsonl").read_bytes()
    options = read_json(sampled / "config.json")["options"]
    argv = [
        "--model",
        coin,
        "--problems",
        options["problems"],
        "--samples",
        8,
        "--out",
        sampled,
        *SHORT,
        "--resume",
    ]
    assert generate.main([str(a) for a in argv]) == 0
    assert (sampled / "trajectories" / "00000.jsonl").read_bytes() == before


def test_generate_through_a_sandbox_service_gives_the_same_trajectories(
    coin: Path, sampled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTPO_SANDBOX_TOKEN", "a-token-of-the-test")
    serve = [sys.executable, "-m", "sandbox", "serve", "--port", "0", "--size", "4"]
    with subprocess.Popen(serve, cwd=ROOT, stdout=subprocess.PIPE, text=True) as service:
        try:
            assert service.stdout is not None
            url, *_ = re.findall(r"http://[\d.:]+", service.stdout.readline())
            argv = ["--model", coin, "--problems", sampled.parent / "rounds.jsonl", "--samples", 8]
            argv += [
                "--out",
                tmp_path / "run",
                "--sandbox_url",
                url,
                "--max_turns",
                3,
                "--max_turn_tokens",
                40,
            ]
            assert generate.main([str(a) for a in argv]) == 0
        finally:
            service.terminate()
    assert ids_of(tmp_path / "run") == ids_of(sampled)


def ids_of(run: Path) -> dict[tuple[str, int], tuple[int, ...]]:
    return {(t.problem_id, t.sample): tuple(t.input_ids) for t in read_trajectories(run / "trajectories")}


def test_generate_branches_at_a_turn(coin: Path, tmp_path: Path) -> None:
    problems = write_problems_file(tmp_path / "rounds.jsonl", "train", 4)
    argv = ["--model", coin, "--problems", problems, "--samples", 4, "--out", tmp_path / "run", *SHORT]
    assert generate.main([str(a) for a in (*argv, "--branch_turn", 1, "--branch_width", 4)]) == 0
    found = {(t.problem_id, t.sample): t for t in read_trajectories(tmp_path / "run" / "trajectories")}
    assert len(found) == 16
    branched = [t for t in found.values() if t.parent is not None]
    assert branched
    for t in branched:
        assert t.actions[0].ids == found[t.problem_id, 0].actions[0].ids
        assert (t.parent, t.branch_turn) == (0, 1)


def test_an_interrupted_generate_finishes_what_it_has_begun_and_resumes(
    coin: Path, sampled: Path, tmp_path: Path
) -> None:
    argv = ["--model", coin, "--problems", sampled.parent / "rounds.jsonl", "--samples", 8]
    argv += ["--out", tmp_path / "run", "--max_in_flight", 2, *SHORT]
    command = [sys.executable, "-m", "recipes.generate", *map(str, argv)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as run:
        shard = tmp_path / "run" / "trajectories" / "00000.jsonl"
        while not shard.exists() or shard.stat().st_size == 0:
            assert run.poll() is None
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "finishing what is in flight; Ctrl-C again leaves it unfinished" in errors
    assert errors.strip().endswith("interrupted; the same command with --resume goes on from here")
    first = ids_of(tmp_path / "run")
    assert 0 < len(first) < 48
    assert generate.main([str(a) for a in (*argv, "--resume")]) == 0
    assert ids_of(tmp_path / "run") == ids_of(sampled)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--engine", "llama"), "--engine must be one of ('transformers', 'vllm', 'openai'), got 'llama'"),
        (("--urls", "http://h:1"), "--urls has no effect with --engine transformers: it is for openai"),
        (("--engine", "openai"), "--engine openai needs --urls"),
        (("--engine", "vllm", "--engine_args", "dtype"), "--engine_args 'dtype': expected NAME=VALUE"),
        (("--branch_width", "3"), "--branch_width has no effect without --branch_turn"),
        (
            ("--branch_turn", "1", "--branch_width", "3"),
            "--samples (8) must be a multiple of --branch_width (3)",
        ),
        (("--isolation", "half"), "--isolation must be one of ('full', 'available', 'none'), got 'half'"),
        (("--sandbox_url", "http://h:1", "--kernels", "4"), "--kernels has no effect with --sandbox_url"),
        (
            ("--sandbox_url", "http://h:1", "--isolation", "full"),
            "--isolation has no effect with --sandbox_url",
        ),
        (
            ("--sandbox_url", "http://h:1"),
            "needs the service's token in the environment, as MTPO_SANDBOX_TOKEN",
        ),
    ],
)
def test_generate_refuses_a_sandbox_that_it_cannot_use(
    coin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    problems = write_problems_file(tmp_path / "rounds.jsonl", "train", 1)
    argv = ("--model", coin, "--problems", problems, "--out", tmp_path / "run", *options)
    assert message in fails(capsys, generate.main, *argv)


def test_run_with_a_torn_last_line_goes_on_and_gives_the_same_trajectories(
    coin: Path, tmp_path: Path
) -> None:
    problems = write_problems_file(tmp_path / "rounds.jsonl", "train", 3)
    argv = ["--model", coin, "--problems", problems, "--samples", 2, "--out", tmp_path / "run", *SHORT]
    assert generate.main([str(a) for a in argv]) == 0
    whole = {
        (t.problem_id, t.sample): t.input_ids for t in read_trajectories(tmp_path / "run" / "trajectories")
    }
    shard = tmp_path / "run" / "trajectories" / "00000.jsonl"
    lines = shard.read_bytes().splitlines(keepends=True)
    shard.write_bytes(b"".join(lines[:2]) + lines[2][:50])
    assert generate.main([str(a) for a in [*argv, "--resume"]]) == 0
    again = {
        (t.problem_id, t.sample): t.input_ids for t in read_trajectories(tmp_path / "run" / "trajectories")
    }
    assert again == whole


@pytest.mark.parametrize(("method", "kind"), [("dpo", "pairs"), ("kto", "binary"), ("raft", "sft")])
def test_label_then_train_raises_what_is_correct(
    coin: Path, sampled: Path, tmp_path: Path, method: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--trajectories", sampled, "--kind", kind, "--per_problem", 3, "--out", tmp_path / "labels"]
    assert label.main([str(a) for a in argv]) == 0
    assert "correct and wrong" in capsys.readouterr().out  # the table
    rows = len(read_rows(tmp_path / "labels" / f"{kind}.jsonl"))
    argv = ["--method", method, "--model", coin, "--data", tmp_path / "labels", "--out", tmp_path / "trained"]
    assert (
        train.main([str(a) for a in [*argv, "--learning_rate", 1e-4, "--batch_size", rows, "--epochs", 5]])
        == 0
    )
    steps = [json.loads(line) for line in (tmp_path / "trained" / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["loss"] < steps[0]["loss"]  # each step sees all rows
    assert capsys.readouterr().out.splitlines()[-1].endswith(str(tmp_path / "trained" / "model"))


def test_evaluate_compares_with_an_earlier_evaluation(coin: Path, tmp_path: Path, capsys) -> None:
    problems = write_problems_file(tmp_path / "rounds.jsonl", "test", 10)
    common = ["--model", coin, "--problems", problems, *SHORT]
    assert evaluate.main([str(a) for a in [*common, "--out", tmp_path / "a"]]) == 0
    options = ["--out", tmp_path / "b", "--compare", tmp_path / "a"]
    assert evaluate.main([str(a) for a in [*common, *options]]) == 0
    out = capsys.readouterr().out
    assert "0 improved, 0 worsened, z = 0.00, mcnemar p = 1" in out
    metrics = read_json(tmp_path / "b" / "metrics.json")
    assert metrics["accuracy"]["num_problems"] == 10
    assert sum(metrics["outcomes"].values()) == 10
    assert len((tmp_path / "b" / "predictions.jsonl").read_text().splitlines()) == 10


def test_sft_renders_conversations_of_others(coin: Path, tmp_path: Path) -> None:
    text = "Let us see.\n```python\nprint(2)\n```\n```output\n2\n```\nIt is $\\boxed{2}$."
    rows = [{"question": f"Round {i}?", "response": text, "answer": "2"} for i in range(8)]
    (tmp_path / "tora.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    argv = [
        "--model",
        coin,
        "--data",
        tmp_path / "tora.jsonl",
        "--learning_rate",
        1e-3,
        "--out",
        tmp_path / "run",
    ]
    assert sft.main([str(a) for a in [*argv, "--batch_size", 4, "--epochs", 3]]) == 0
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["loss"] < steps[0]["loss"]


# -- bad input ---------------------------------------------------------------------------------------------


def test_missing_model_is_one_line(capsys, tmp_path: Path) -> None:
    problems = write_problems_file(tmp_path / "rounds.jsonl", "train", 1)
    argv = ("--model", tmp_path / "absent", "--problems", problems, "--out", tmp_path / "run")
    assert "absent" in fails(capsys, generate.main, *argv)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("template", "message"),
    [(None, "has no chat template"), ("{{ messages[-1].content }}", "not prefix-stable at turn 1")],
)
def test_unusable_chat_template_is_one_line(capsys, coin: Path, tmp_path: Path, template, message) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in coin.iterdir():
        if file.name != "chat_template.jinja":
            (model / file.name).symlink_to(file)
    tokenizer = load_tokenizer(coin)
    tokenizer.chat_template = template
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(model)
    problems = write_problems_file(tmp_path / "rounds.jsonl", "train", 1)
    argv = ("--model", model, "--problems", problems, "--out", tmp_path / "run")
    assert message in fails(capsys, generate.main, *argv)


def test_broken_line_is_named_and_the_other_problems_are_used(
    capsys, caplog, coin: Path, tmp_path: Path
) -> None:
    problems = write_problems_file(tmp_path / "rounds.jsonl", "train", 3)
    lines = problems.read_text().splitlines()
    problems.write_text("\n".join([lines[0], '{"question": "half', lines[2]]))
    argv = ["--model", coin, "--problems", problems, "--samples", 1, "--out", tmp_path / "run", *SHORT]
    assert generate.main([str(a) for a in argv]) == 0
    assert "rounds.jsonl, line 2" in caplog.text
    assert read_json(tmp_path / "run" / "summary.json")["trajectories"] == 2


def test_empty_problem_set_is_an_error(capsys, coin: Path, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    argv = ("--model", coin, "--problems", tmp_path / "none.jsonl", "--out", tmp_path / "run")
    assert "none.jsonl" in fails(capsys, generate.main, *argv)


def test_zero_samples_are_an_error(capsys, coin: Path, tmp_path: Path) -> None:
    argv = ("--model", coin, "--problems", "gsm8k:test", "--samples", 0, "--out", tmp_path / "run")
    assert fails(capsys, generate.main, *argv) == "error: --samples must be at least 1, got 0"


def test_existing_run_is_not_overwritten(capsys, coin: Path, sampled: Path) -> None:
    argv = ("--model", coin, "--problems", "generated:dev", "--limit", 1, "--out", sampled)
    assert "already holds a run" in fails(capsys, generate.main, *argv)


def test_full_disk_stops_the_run_in_one_line_and_resuming_finishes_it(
    capsys, coin: Path, tmp_path: Path
) -> None:
    problems = write_problems_file(tmp_path / "rounds.jsonl", "train", 3)
    argv = ["--model", coin, "--problems", problems, "--samples", 2, "--out", tmp_path / "run", *SHORT]
    write, calls = os.write, []

    def full_after_two_lines(descriptor: int, content) -> int:
        if bytes(content).startswith(b'{"problem_id"'):
            calls.append(1)
            if len(calls) > 2:
                raise OSError(28, "No space left on device")
        return write(descriptor, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", full_after_two_lines)
        assert "No space left on device" in fails(capsys, generate.main, *argv)
    assert len(list(read_trajectories(tmp_path / "run" / "trajectories"))) == 2
    assert generate.main([str(a) for a in [*argv, "--resume"]]) == 0
    assert len(list(read_trajectories(tmp_path / "run" / "trajectories"))) == 6


def test_no_pair_says_why(capsys, coin: Path, tmp_path: Path) -> None:
    problems = write_problems_file(tmp_path / "rounds.jsonl", "train", 4)
    rows = [json.loads(line) | {"answer": "#### 7"} for line in problems.read_text().splitlines()]
    problems.write_text("".join(json.dumps(r) + "\n" for r in rows))
    argv = ["--model", coin, "--problems", problems, "--samples", 2, "--out", tmp_path / "run", *SHORT]
    assert generate.main([str(a) for a in argv]) == 0
    out = ("--out", tmp_path / "labels")
    assert (
        fails(capsys, label.main, "--trajectories", tmp_path / "run", *out)
        == "error: no pair: all 4 problems all wrong"
    )


def test_trajectory_longer_than_the_context_is_dropped_and_counted(
    capsys, coin: Path, sampled: Path, tmp_path: Path
) -> None:
    argv = ["--trajectories", sampled, "--per_problem", 2, "--out", tmp_path / "labels"]
    assert label.main([str(a) for a in argv]) == 0
    rows = read_rows(tmp_path / "labels" / "pairs.jsonl")
    longest = max(len(r["chosen_input_ids"]) for r in rows)
    common = ["--method", "dpo", "--model", coin, "--data", tmp_path / "labels", "--learning_rate", 1e-4]
    argv = [*common, "--max_length", longest - 1, "--out", tmp_path / "trained"]
    assert train.main([str(a) for a in argv]) == 0
    dropped = sum(max(len(r["chosen_input_ids"]), len(r["rejected_input_ids"])) >= longest for r in rows)
    assert read_json(tmp_path / "trained" / "summary.json")["dropped"] == dropped > 0
    error = fails(capsys, train.main, *common, "--max_length", 5, "--out", tmp_path / "none")
    assert "5" in error


def test_data_of_another_kind_says_which_is_needed(capsys, coin: Path, sampled: Path, tmp_path: Path) -> None:
    argv = ["--trajectories", sampled, "--kind", "binary", "--out", tmp_path / "labels"]
    assert label.main([str(a) for a in argv]) == 0
    argv = [
        "--method",
        "dpo",
        "--model",
        coin,
        "--data",
        tmp_path / "labels",
        "--learning_rate",
        1e-4,
        "--out",
        tmp_path / "t",
    ]
    assert "it has binary: use recipes.label --kind pairs" in fails(capsys, train.main, *argv)


# -- the loop ----------------------------------------------------------------------------------------------


def loop_arguments(coin: Path, folder: Path, out: Path) -> list[str]:
    sizes = {"train": 8, "dev": 4, "test": 6}
    files = {s: write_problems_file(folder / f"{s}.jsonl", s, n) for s, n in sizes.items()}
    argv = ["--model", coin, "--problems", files["train"], "--dev", files["dev"], "--test", files["test"]]
    argv += ["--iterations", 2, "--prompts", 4, "--samples", 6, "--previous_samples", 2, "--previous", coin]
    argv += ["--method", "dpo", "--learning_rate", 1e-4, "--batch_size", 4, "--per_problem", 3]
    argv += ["--num_checkpoints", 1, "--out", out, *SHORT]
    return [str(a) for a in argv]


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_loop_killed_anywhere_ends_where_an_undisturbed_one_ends(coin: Path, tmp_path: Path) -> None:
    assert iterate.main(loop_arguments(coin, tmp_path, tmp_path / "whole")) == 0
    out = tmp_path / "killed"
    argv = [*loop_arguments(coin, tmp_path, out), "--resume"]
    for under_way in (
        lambda: lines_in(out / "iteration_1/current/trajectories/00000.jsonl") > 5,
        lambda: (out / "iteration_1/train").exists(),
        lambda: (out / "iteration_1/dev").exists(),
        lambda: lines_in(out / "iteration_2/previous/trajectories/00000.jsonl") > 2,
        lambda: (out / "test").exists(),
    ):
        kill_when(under_way, iterate.main, argv)
        assert not (out / "summary.json").exists()
    assert iterate.main(argv) == 0
    for part in ("iteration_1/current", "iteration_1/previous", "iteration_2/current", "test/start/greedy"):
        whole, killed = (
            {
                (t.problem_id, t.sample): t.input_ids
                for t in read_trajectories(tmp_path / run / part / "trajectories")
            }
            for run in ("whole", "killed")
        )
        assert killed == whole
    stages = [read_json(tmp_path / run / "summary.json")["stages"] for run in ("whole", "killed")]
    assert [s["greedy"] for s in stages[0]] == [s["greedy"] for s in stages[1]]
    assert [s["name"] for s in stages[0]] == ["start", "iteration 1", "iteration 2"]
    assert "Learning curve" in (out / "report.html").read_text()


def test_loop_refuses_sets_that_are_too_small_or_overlap(capsys, coin: Path, tmp_path: Path) -> None:
    argv = loop_arguments(coin, tmp_path, tmp_path / "run")
    argv[argv.index("--prompts") + 1] = "5"
    assert "need 10 problems that are not in dev or test, but there are 8" in fails(
        capsys, iterate.main, *argv
    )
    argv = loop_arguments(coin, tmp_path, tmp_path / "run")
    argv[argv.index("--test") + 1] = argv[argv.index("--dev") + 1]
    assert "dev and test" in fails(capsys, iterate.main, *argv)
