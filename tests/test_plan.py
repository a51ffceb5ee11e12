"""The plan of a loop, held to figures that are worked out by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mtpo.cli import parse_config
from mtpo.errors import InputError
from mtpo.training import TrainingSettings
from mtpo.training.memory import Memory, Sizes
from recipes.iterate import Config
from recipes.plan import Assumptions, PlannedStage, Work, plan, plan_table, saved_bytes, training_flops

BILLION = Sizes(num_parameters=10**9, num_trained=10**9)
ADAPTER = Sizes(num_parameters=10**9, num_trained=10**6)
MEMORY = Memory(
    weights=1, copies=2, gradients=3, optimizer=4, value_network=0, activations=5, head=6
)  # 21 bytes
ROUND = Assumptions(
    engine_tokens_per_s=1000,
    gpu_tflops=100,
    turns=2,
    turn_tokens=50,
    read_tokens=100,
    usable=0.5,
    solved=0.8,
    gradings_per_s=100,
    bytes_per_token=10,
)


def work(method: str = "dpo", **changes: Any) -> Work:
    """Two iterations of 720 prompts with 4 + 1 samples, of which the second has the one."""
    settings = TrainingSettings(method=method, learning_rate=1e-3, dtype="bfloat16", num_checkpoints=2)
    values: dict[str, Any] = {
        "settings": settings, "iterations": 2, "prompts": 720, "samples": 4, "previous_samples": 1,
        "num_previous": 1, "per_problem": 1, "num_dev": 100, "num_test": 360, "test_samples": 1,
        "dtype": "bfloat16", "test_dtype": "float32", "num_engines": 2, "num_gpus": 4,
    }  # fmt: skip
    return Work(**values | changes)


def by_name(stages: list[PlannedStage]) -> dict[str, PlannedStage]:
    return {stage.name: stage for stage in stages}


def test_sampling_takes_its_tokens_over_the_rate_of_all_engines() -> None:
    """720 x 4 trajectories of 100 sampled tokens are 288,000 tokens: 144 s of two engines with 1,000 a second."""
    stage = by_name(plan(work(), BILLION, MEMORY, ROUND))["sample current"]
    assert (stage.times, stage.size, stage.tokens) == (2, "720 x 4", 288_000)
    assert stage.hours == pytest.approx(0.04)
    assert (stage.gpu_bytes, stage.disk_bytes) == (2 * 10**9, 2_880_000)  # bfloat16 weights; 10 bytes a token


def test_evaluations_have_a_policy_and_a_type_of_their_own() -> None:
    """Three policies to choose from on dev, and three to test, greedy and sampled, in float32."""
    stages = by_name(plan(work(), BILLION, MEMORY, ROUND))
    assert (stages["select on dev"].times, stages["select on dev"].tokens) == (2, 100 * 3 * 100)
    assert (stages["test"].times, stages["test"].tokens) == (3, 360 * 2 * 100)
    assert stages["test"].gpu_bytes == 4 * 10**9


@pytest.mark.parametrize(
    ("method", "size", "tokens"),
    [
        ("dpo", "360 pairs", 360 * 2 * 200),  # half the prompts; two sides of 100 sampled and 100 read tokens
        ("kto", "720 labels", 720 * 200),  # the halves of these pairs
        ("raft", "576 trajectories", 576 * 200),  # of the 80 % with a correct one
    ],
)
def test_training_has_the_rows_of_its_method(method: str, size: str, tokens: int) -> None:
    stages = by_name(plan(work(method), BILLION, MEMORY, ROUND))
    assert (stages["train"].size, stages["train"].tokens) == (size, tokens)
    assert ("score reference" in stages) == (method != "raft")


def test_training_takes_its_operations_over_those_of_all_gpus() -> None:
    """144,000 tokens x 6e9 operations over 4 x 100 TFLOP/s are 2.16 s, and 2e9 forward only are 0.72 s."""
    stages = by_name(plan(work(), BILLION, MEMORY, ROUND))
    assert stages["train"].hours * 3600 == pytest.approx(2.16)
    assert stages["train"].gpu_bytes == 21
    assert stages["score reference"].hours * 3600 == pytest.approx(0.72)
    assert stages["score reference"].gpu_bytes == 4 * 10**9  # float32, as what is trained
    settings = dataclasses.replace(work().settings, epochs=3)
    again = by_name(plan(work(settings=settings), BILLION, MEMORY, ROUND))
    assert again["train"].hours * 3600 == pytest.approx(3 * 2.16)


def test_recomputing_costs_a_forward_pass_and_an_adapter_saves_the_gradients_of_the_rest() -> None:
    assert training_flops(BILLION, checkpointed=False) == 6e9
    assert training_flops(BILLION, checkpointed=True) == 8e9
    assert training_flops(ADAPTER, checkpointed=True) == 6e9 + 2e6


def test_a_checkpoint_has_the_weights_and_two_states() -> None:
    """float32: 4 bytes a weight at the end, and twice 12 on the way."""
    settings = work().settings
    assert saved_bytes(settings, BILLION) == 28 * 10**9
    assert saved_bytes(settings, ADAPTER) == 28 * 10**6
    assert saved_bytes(dataclasses.replace(settings, pure_bfloat16=True), BILLION) == 14 * 10**9


def test_a_loop_without_an_earlier_policy_samples_none() -> None:
    stages = by_name(plan(work(num_previous=0), BILLION, MEMORY, ROUND))
    assert "sample previous" not in stages
    assert stages["grade and label"].size == "2,880"
    assert by_name(plan(work(), BILLION, MEMORY, ROUND))["grade and label"].size == "3,600"


def test_the_last_line_is_the_sum_over_all_times() -> None:
    stages = [
        PlannedStage("a", 2, "1 x 1", 3e6, 1.5, 2**30, 1e9),
        PlannedStage("b", 3, "2 x 2", 1e6, 1.0, 2**31, 2e9),
    ]
    lines = plan_table(stages).splitlines()
    assert lines[1].split() == ["a", "2", "1", "x", "1", "3.0M", "1.50", "1.0", "1.0"]
    assert lines[-1].split() == ["all", "9.0M", "6.00", "2.0", "8.0"]


def rates(*argv: str) -> Assumptions:
    known = ["--model", "m", "--problems", "p", "--dev", "d", "--test", "t", "--out", "o", "--method", "dpo"]
    return parse_config(Config, "recipes.iterate", [*known, "--learning_rate", "1", *argv]).assumptions


def test_the_rates_are_options_of_a_dry_run_alone() -> None:
    assert rates("--dry_run") == Assumptions()
    given = rates("--dry_run", "--engine_tokens_per_s", "4000", "--gpu_tflops", "400")
    assert (given.engine_tokens_per_s, given.gpu_tflops) == (4000, 400)
    with pytest.raises(InputError, match="--gpu_tflops has no effect without --dry_run"):
        rates("--gpu_tflops", "400")
    with pytest.raises(InputError, match=r"--engine_tokens_per_s must be positive, got 0\.0"):
        rates("--dry_run", "--engine_tokens_per_s", "0")
