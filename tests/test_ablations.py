"""The comparison of arms: what it chooses, how it counts, and that it runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mtpo.errors import GuardError, InputError
from mtpo.runs import write_json
from mtpo.training.online_methods import ONLINE_METHODS
from mtpo.trajectory import Problem
from recipes import ablations
from recipes.ablations import (
    Arms,
    Config,
    Job,
    as_table,
    draw,
    is_online,
    run_all,
    summarize,
    train_arm,
    why_stopped,
)
from recipes.online import Config as OnlineConfig
from tests.coin import WHO

ROOT = Path(__file__).resolve().parents[1]
ONE_RATE = "learning_rates: [1.0e-4]\n"


def arms_file(folder: Path, text: str) -> str:
    path = folder / "arms.yaml"
    path.write_text(text)
    return str(path)


def test_each_arm_gets_the_rate_that_is_best_on_dev_and_of_equals_the_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = arms_file(
        tmp_path,
        "learning_rates: [7]\noffline: {iterations: 1, learning_rates: [1.0e-4, 3.0e-4]}\narms:\n"
        "  a: {method: dpo}\n  b: {method: kto}\n  c: {method: raft, learning_rates: [1.0e-3]}\n",
    )
    dev = {("a", 1e-4): 0.5, ("a", 3e-4): 0.7, ("b", 1e-4): 0.6, ("b", 3e-4): 0.6, ("c", 1e-3): 0.1}
    trained: list[tuple[str, float, int]] = []

    def train_arm(job: Job) -> float:
        trained.append((job.arm, job.learning_rate, job.seed))
        return dev[job.arm, job.learning_rate]

    monkeypatch.setattr(ablations, "train_supervised", lambda task: None)
    monkeypatch.setattr(ablations, "train_arm", train_arm)
    monkeypatch.setattr(ablations, "why_stopped", lambda job: "too fast" if job.arm == "b" else None)
    monkeypatch.setattr(ablations, "arm_answers", lambda job: {"p": job.learning_rate > 2e-4, "q": True})
    monkeypatch.setattr(
        ablations, "problems", lambda *_: [Problem("p", "?", "1", subject="s"), Problem("q", "?", "1")]
    )
    monkeypatch.setattr(ablations, "start_answers", lambda job: {"p": False, "q": True})
    config = Config(arms=path, out=str(tmp_path / "out"), seeds=[4, 5], tuning_seeds=[3])
    results = run_all(tmp_path, Arms.read(path), config, lambda function, jobs: list(map(function, jobs)))
    rates = {arm: row["learning_rate"] for arm, row in results["arms"].items()}
    assert rates == {"a": 3e-4, "b": 1e-4, "c": 1e-3}
    assert {(arm, rate) for arm, rate, seed in trained if seed == 3} == set(dev)
    assert {(arm, rate) for arm, rate, seed in trained if seed != 3} == set(rates.items())
    assert results["arms"]["a"]["by_seed"] == [1.0, 1.0]
    assert results["start"]["accuracy"] == 0.5
    assert results["start"]["by_subject"]["s"]["accuracy"] == 0.0
    assert results["stopped"] == {"b, seed 4": "too fast", "b, seed 5": "too fast"}
    assert as_table(results).endswith(
        "\nb, seed 5, stopped itself and was tested with the best of its checkpoints: too fast"
    )


def test_accuracies_and_differences_by_hand() -> None:
    base = [{"p": True, "q": False, "r": False, "s": False}, {"p": True, "q": True, "r": False, "s": False}]
    other = [{"p": True, "q": True, "r": False, "s": False}, {"p": True, "q": True, "r": True, "s": True}]
    subjects = {"p": "sum", "q": "branch", "r": "branch", "s": "branch"}
    rates, dev = {"base": 1e-4, "other": 1e-4}, {"base": {}, "other": {}}
    found = summarize({"base": base, "other": other}, base, rates, dev, subjects)
    row = found["arms"]["other"]
    assert {name: score["accuracy"] for name, score in row["by_subject"].items()} == {
        "branch": 4 / 6,
        "sum": 1.0,
    }
    assert found["start"]["by_subject"]["branch"]["accuracy"] == 1 / 6
    assert (row["by_seed"], row["accuracy"]) == ([0.5, 1.0], 0.75)
    assert row["difference"] == pytest.approx(3 / 8)
    # p never changes, the others do in one seed of two: the mean of 4 draws lies in [0, 0.5], seldom at an end
    low, high = row["difference_interval"]
    assert 0 <= low < 3 / 8 < high <= 0.5
    assert found["arms"]["base"]["difference"] == 0
    *_, first, line = as_table(found).splitlines()
    assert first.endswith("| 25.0, 50.0 | - |")
    assert line.startswith("| other | 0.0001 | 75.0 [") and "| 50.0, 100.0 | +37.5 [" in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arms: {}\nother: {}", "expected arms, and of arms, common, learning_rates, offline, online"),
        ("arms: {a: {method: dpo}}", "arm 'a': there is no learning rate"),
        (
            ONE_RATE + "common: {}\narms: {a: {method: dpo, tau: 1.0}}",
            "arm 'a': tau has no effect on method 'dpo'",
        ),
        (ONE_RATE + "common: {}\narms: {a: {method: dpo, colour: red}}", "arm 'a': .*colour"),
        (": :", "not YAML"),
    ],
)
def test_a_bad_arms_file_is_named_with_its_arm(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Arms.read(arms_file(tmp_path, text))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes/configs/ablations").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_arms_that_are_shipped_sample_equally_much(path: Path) -> None:
    def budget(options: Mapping[str, Any]) -> int:
        if is_online(options):
            return options["prompts"] * len(ONLINE_METHODS[options["method"]].players)
        return options["iterations"] * options["prompts"] * (options["samples"] + options["previous_samples"])

    budgets = set(map(budget, Arms.read(str(path)).options.values()))
    # the policy before the first iteration's is none, so a mixture samples a little less
    assert budgets == {3200}


@pytest.mark.parametrize("num_checkpoints", [0, 1])
def test_a_run_that_stops_itself_ends_with_its_best_checkpoint(
    coin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_checkpoints: int
) -> None:
    def train(config: OnlineConfig) -> None:
        for number in range(num_checkpoints):
            Path(config.out).mkdir(parents=True)
            (Path(config.out) / f"checkpoint-{number}").symlink_to(coin)
        raise GuardError("11 steps had no finite gradient")

    monkeypatch.setattr(ablations, "train_online_policy", train)
    monkeypatch.setattr(ablations, "_graded", lambda *_: {"p": True, "q": False})
    config = Config(arms="", out=str(tmp_path), dev=2)
    job = Job(tmp_path, 0, "nash", {"method": "nash_md", "prompts": 4}, 1e-3, config)
    if num_checkpoints:
        assert train_arm(job) == 0.5
        assert why_stopped(job) == "11 steps had no finite gradient"
    else:
        with pytest.raises(GuardError, match=r"nash/lr_0\.001: 11 steps"):
            train_arm(job)


@pytest.mark.slow
def test_arms_are_trained_and_tested_for_real(
    coin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rounds(split: str, count: int, first: int = 0) -> list[Problem]:
        return [
            Problem(f"{split}/{i}", f"{split}: does {WHO[i % 8]} say 1 or 2 in round {i}?", str(1 + i % 2))
            for i in range(first, first + count)
        ]

    def supervised(out: Path, *_: Any) -> Path:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "model").exists():
            (out / "model").symlink_to(coin)
        return out / "model"

    monkeypatch.setattr(ablations, "problems", rounds)
    monkeypatch.setattr(ablations, "supervised", supervised)
    path = arms_file(
        tmp_path,
        ONE_RATE + "common: {max_turns: 3, max_turn_tokens: 40, kernels: 4, preload: [math], batch_size: 4}\n"
        "offline: {iterations: 1, prompts: 8, samples: 4, previous_samples: 0}\nonline: {prompts: 8}\n"
        "arms:\n  dpo: {method: dpo}\n  nash: {method: nash_md}\n",
    )
    config = Config(arms=path, out=str(tmp_path / "out"), seeds=[0], dev=4, test=6)
    arms = Arms.read(path)

    def run() -> dict[str, Any]:
        return run_all(tmp_path / "out", arms, config, lambda function, jobs: list(map(function, jobs)))

    results = run()
    assert list(results["arms"]) == ["dpo", "nash"]
    assert all(0 <= row["accuracy"] <= 1 for row in results["arms"].values())
    assert len((tmp_path / "out/seed_0/dpo/lr_0.0001/test/correct.json").read_text().split(",")) == 6
    draw(results, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(ablations, "evaluate_into", None)  # what is done is not done again
    assert run() == results
    write_json(tmp_path / "out/seed_0/nash/lr_0.0001/options.json", {"method": "ipo_md"})
    with pytest.raises(InputError, match="arm 'nash' was trained with"):
        run()
