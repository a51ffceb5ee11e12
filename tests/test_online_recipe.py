"""recipes.online, end to end, on a model that guesses 1 or 2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data.trajectories import read_trajectories
from mtpo.errors import JudgeUnavailable
from mtpo.judges import VerifierJudge
from mtpo.runs import read_json
from recipes import generate, online
from tests.child_processes import kill_when
from tests.coin import SHORT, write_problems_file
from tests.tiny_tokenizers import make_tokenizer

OPTIONS = ("--batch_size", "4", "--sync_steps", "2", "--learning_rate", "1e-3", "--num_checkpoints", "1")


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_problems_file(tmp_path_factory.mktemp("problems") / "rounds.jsonl", "train", 16)


def command(coin: Path, problems: Path, out: Path, method: str, *more: str) -> list[str]:
    where = ["--model", str(coin), "--problems", str(problems), "--out", str(out)]
    return [*where, "--method", method, *OPTIONS, *SHORT, *more]


@pytest.mark.parametrize(("method", "judge"), [("mtpo", "verifier"), ("nash_md", "efficiency")])
def test_a_run_leaves_its_trajectories_figures_and_a_model_to_sample_from(
    coin: Path, problems: Path, method: str, judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert online.main(command(coin, problems, tmp_path / "run", method, "--judge", judge)) == 0
    assert capsys.readouterr().out.startswith(f"4 steps of {method} on 16 prompts; model in ")
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["staleness"] for step in steps] == [0, 1, 0, 1]
    assert all(step["num/played"] == 4 and "kl/token" in step for step in steps)
    played = [
        trajectory
        for folder in sorted((tmp_path / "run" / "rounds").glob("*/0-of-1/trajectories"))
        for trajectory in read_trajectories(folder)
    ]
    assert len(played) == 32
    opponents = {t.policy for t in played}
    assert opponents == ({"current"} if method == "mtpo" else {"current", "geo_mix(0.125)"})
    argv = ["--model", tmp_path / "run" / "model", "--problems", problems, "--samples", 1, "--limit", 2]
    assert generate.main([str(a) for a in [*argv, "--out", tmp_path / "again", *SHORT]]) == 0


def test_an_adapter_is_compared_with_the_policy_without_it(
    coin: Path, problems: Path, tmp_path: Path
) -> None:
    more = ("--lora_rank", "2", "--eval_problems", str(problems), "--learning_rate", "0.02")
    assert online.main(command(coin, problems, tmp_path / "run", "online_ipo", *more)) == 0
    before, after = (json.loads(line) for line in (tmp_path / "run" / "eval.jsonl").read_text().splitlines())
    assert (before["step"], after["step"]) == (0, 4)
    assert before["eval_kl/trajectory"] == pytest.approx(0, abs=1e-5)
    assert abs(after["eval_kl/trajectory"]) > 1e-3
    assert after["eval_num/reference"] == after["eval_num/previous"] == 16
    assert 0 <= after["eval_preference/reference"] <= 1


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_model(coin: Path, problems: Path, tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert online.main(command(coin, problems, whole, "mtpo")) == 0
    argv = command(coin, problems, torn, "mtpo")
    journal = torn / "rounds" / "00001" / "0-of-1" / "trajectories" / "00000.jsonl"
    kill_when(lambda: journal.exists() and journal.stat().st_size > 0, online.main, argv)
    assert online.main([*argv, "--resume"]) == 0
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (whole, torn)]
    assert weights[0] == weights[1]


def test_a_judge_that_is_away_pauses_the_command_which_says_so(
    coin: Path,
    problems: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def prefer(*_: object) -> float:
        raise JudgeUnavailable("http://10.0.0.7: no answer for 300 s")

    argv = command(coin, problems, tmp_path / "run", "online_ipo")
    with monkeypatch.context() as away:
        away.setattr(VerifierJudge, "prefer", prefer)
        assert online.main(argv) == 1
    expected = "error: paused after step 0 of 4, nothing is lost: http://10.0.0.7: no answer for 300 s"
    assert capsys.readouterr().err.strip().splitlines()[-1] == expected + "; go on with --resume"
    assert not (tmp_path / "run" / "summary.json").exists()
    assert online.main([*argv, "--resume"]) == 0
    assert read_json(tmp_path / "run" / "summary.json")["steps"] == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--samples", "4"), "--samples has no effect"),
        (("--engine", "vllm"), "--engine has no effect"),
        (
            ("--judge", "oracle"),
            "--judge is 'oracle'; expected one of verifier, efficiency, comprehension, llm",
        ),
        (("--judge", "llm"), "--judge llm needs --judge_urls and --judge_model"),
        (("--judge_model", "m"), "--judge_model has no effect with --judge verifier"),
        (("--tau", "0.1"), "tau has no effect on method 'mtpo'"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_in_one_line(
    more: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = command(tmp_path / "nowhere", tmp_path / "nothing", tmp_path / "run", "mtpo", *more)
    assert online.main(argv) == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_reference_with_another_tokenizer_is_refused(
    coin: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(coin, tmp_path / "other")
    make_tokenizer("mistral").save_pretrained(other)
    argv = command(coin, problems, tmp_path / "run", "nash_md", "--reference", str(other))
    assert online.main(argv) == 1
    assert (
        "--method nash_md needs one tokenizer, but those of policy and reference" in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
