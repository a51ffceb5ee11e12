"""recipes.distill from the command line, on a model that guesses 1 or 2, with the real interpreter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data.trajectories import read_trajectories
from mtpo.models import load_model, load_tokenizer
from mtpo.runs import read_json
from recipes import distill, tiny_distillation
from recipes.tiny import make_tiny_gemma2
from tests.coin import SHORT, write_problems_file

TRAINING = ("--learning_rate", "1e-2", "--batch_size", "4", "--sync_steps", "2")


@pytest.fixture(scope="module")
def student(coin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half as wide as its teacher, with the same tokenizer."""
    folder = tmp_path_factory.mktemp("student")
    tokenizer = load_tokenizer(coin)
    make_tiny_gemma2(tokenizer, seed=1, num_heads=2).save_pretrained(folder)  # pyright: ignore[reportArgumentType]
    tokenizer.save_pretrained(folder)
    return folder


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert distill.main([str(a) for a in argv]) == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_the_student_samples_for_itself_round_by_round(coin: Path, student: Path, tmp_path: Path) -> None:
    """Four steps, two rounds; the second round is sampled by weights that the first has moved."""
    problems = write_problems_file(tmp_path / "rounds.jsonl", "train", 16)
    argv = [
        "--teacher",
        coin,
        "--model",
        student,
        "--problems",
        problems,
        "--on_policy",
        1,
        *TRAINING,
        *SHORT,
    ]
    assert distill.main([str(a) for a in [*argv, "--out", tmp_path / "run"]]) == 0
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [step["staleness"] for step in steps] == [0, 1, 0, 1]
    rounds = sorted((tmp_path / "run/rounds").iterdir())
    first, second = (list(read_trajectories(part / "trajectories")) for part in rounds)
    assert len(first) == len(second) == 8
    assert {t.problem_id for t in first}.isdisjoint(t.problem_id for t in second)
    prints = [{t.fingerprint for t in sampled} for sampled in (first, second)]
    assert len(prints[0]) == len(prints[1]) == 1 and prints[0] != prints[1]
    assert all(read_json(part / "engine_gap.json")["mean"] < 1e-4 for part in rounds)


def test_kd_takes_every_trajectory_of_the_teachers_folder(coin: Path, student: Path, tmp_path: Path) -> None:
    from recipes import generate

    problems = write_problems_file(tmp_path / "rounds.jsonl", "train", 4)
    sample = ["--model", coin, "--problems", problems, "--samples", 2, "--out", tmp_path / "samples", *SHORT]
    assert generate.main([str(a) for a in sample]) == 0
    argv = ["--method", "kd", "--teacher", coin, "--model", student, "--data", tmp_path / "samples"]
    argv += [*TRAINING[:4], "--epochs", 4, "--out", tmp_path / "run"]
    assert distill.main([str(a) for a in argv]) == 0
    assert read_json(tmp_path / "run/summary.json")["rows"] == 8
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 8 and steps[-1]["loss"] < steps[0]["loss"]
    ours, before = load_model(tmp_path / "run/model"), load_model(student)
    assert not torch.equal(ours.lm_head.weight, before.lm_head.weight)

    small = [*argv, "--out", tmp_path / "bfloat16", "--learning_rate", 1e-12, "--dtype", "bfloat16"]
    assert distill.main([str(a) for a in small]) == 0
    unmoved = load_model(tmp_path / "bfloat16/model")  # bfloat16 is for computing, not for the weights
    torch.testing.assert_close(unmoved.lm_head.weight, before.lm_head.weight, rtol=0, atol=1e-6)


def test_bad_input_ends_in_one_line(
    coin: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = write_problems_file(tmp_path / "rounds.jsonl", "train", 6)
    argv = ["--teacher", coin, "--model", student, *TRAINING, "--out", tmp_path / "run"]
    assert "--data is needed" in fails(capsys, *argv)
    assert "--problems is needed" in fails(capsys, *argv, "--on_policy", 1)
    assert "--problems has no effect" in fails(
        capsys, *argv, "--method", "kd", "--data", tmp_path, "--problems", problems
    )
    few = fails(capsys, *argv, "--on_policy", 1, "--problems", problems)
    assert "6 problems are fewer than the 8 trajectories of a round" in few
    assert "--method dpo has no teacher; use recipes.train" in fails(capsys, *argv, "--method", "dpo")


def test_a_teacher_with_other_tokens_is_refused_though_as_many(
    coin: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(coin)
    state = json.loads(tokenizer.backend_tokenizer.to_str())  # pyright: ignore
    vocab = state["model"]["vocab"]
    first, second = (next(token for token, i in vocab.items() if i == n) for n in (40, 41))
    vocab[first], vocab[second] = 41, 40
    other = tmp_path / "other"
    load_model(coin).save_pretrained(other)
    tokenizer.save_pretrained(other)
    saved = other / "tokenizer.json"
    changed = json.loads(saved.read_text())
    changed["model"]["vocab"] = vocab
    saved.write_text(json.dumps(changed))
    problems = write_problems_file(tmp_path / "rounds.jsonl", "train", 8)
    argv = ["--teacher", other, "--model", student, "--problems", problems, "--on_policy", 1, *TRAINING]
    error = fails(capsys, *argv, "--out", tmp_path / "run")
    assert "distillation needs one tokenizer, but those of student and teacher differ in 4 entries" in error
    assert not (tmp_path / "run").exists()


def test_only_a_finished_quickstart_is_distilled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("summary", {"steps": 4}), ("config", {"options": {"model": "m"}})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    argv = ["--teacher", tmp_path, "--out", tmp_path / "run"]
    assert tiny_distillation.main([str(a) for a in argv]) == 1
    assert "is no finished run of recipes.quickstart" in capsys.readouterr().err
    assert tiny_distillation.main([str(a) for a in [*argv, "--prompts", 10]]) == 1
    assert "--prompts must be from 160 to 5000, got 10" in capsys.readouterr().err
