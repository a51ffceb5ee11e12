"""The benchmark of rollouts plays what it planned, on every loop, and its bars are no decoration."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from benchmarks.balance import NUM_SERVERS, NeverLeaving, simulate
from benchmarks.driver import DriverFigures, measure_driver
from benchmarks.loops import InProcess, play_freely, play_with_barriers, play_with_generate
from benchmarks.rollout import Bar, Speed, alternate, main
from benchmarks.workload import PlannedChat, check_trajectories, make_model, make_plans, make_tokenizer
from mtpo.engines.routing import Router
from mtpo.engines.transformers import TransformersEngine


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_plans_are_fixed_by_the_seed_and_within_their_bounds() -> None:
    plans = make_plans(300, 3, max_tool_s=30.0)
    assert plans == make_plans(300, 3, max_tool_s=30.0) != make_plans(300, 4, max_tool_s=30.0)
    assert {len(plan.turns) for plan in plans} == {1, 2, 3, 4, 5, 6}
    assert all(8 <= turn.num_tokens <= 192 for plan in plans for turn in plan.turns)
    assert all([t.output is None for t in plan.turns].index(True) == len(plan.turns) - 1 for plan in plans)


@pytest.mark.parametrize("play", [play_freely, play_with_barriers])
async def test_both_loops_play_every_plan(play, tokenizer) -> None:
    plans = make_plans(5, 1, max_tool_s=0.0)
    engine = TransformersEngine(make_model(), max_rows=5)
    trajectories = await play(engine, InProcess(), PlannedChat.for_tokenizer(tokenizer), plans)
    await engine.aclose()
    check_trajectories(trajectories, plans)
    with pytest.raises(AssertionError, match="not rolled out as planned"):
        check_trajectories(trajectories[1:], plans)
    with pytest.raises(AssertionError, match="not planned"):
        check_trajectories(trajectories, plans[1:])
    *others, last = sorted(trajectories, key=lambda t: t.num_turns)
    wrong = replace(last, executions=(*last.executions[:-1], replace(last.executions[-1], text="0")))
    with pytest.raises(AssertionError, match="not rolled out as planned"):
        check_trajectories([*others, wrong], plans)


async def test_both_loops_sample_the_same_ids(tokenizer) -> None:
    plans = make_plans(4, 1, max_tool_s=0.0)
    found = []
    for play in (play_freely, play_with_barriers):
        engine = TransformersEngine(make_model(), max_rows=4)
        played = await play(engine, InProcess(), PlannedChat.for_tokenizer(tokenizer), plans)
        found.append({t.problem_id: t.input_ids for t in played})
        await engine.aclose()
    assert found[0] == found[1]


def test_generate_counts_the_planned_tokens_and_no_padding(tokenizer) -> None:
    plans = make_plans(4, 1, max_tool_s=0.0)
    planned = sum(turn.num_tokens for plan in plans for turn in plan.turns)
    chat = PlannedChat.for_tokenizer(tokenizer)
    assert play_with_generate(make_model(), chat, plans, batch_size=3) == planned


async def test_the_driver_is_measured_over_turns_that_ended() -> None:
    figures = await measure_driver(20, turn_s=1.0)
    assert figures.num_turns > 0 and figures.cpu_s > 0
    assert DriverFigures(num_turns=50, seconds=10.0, cpu_s=0.1).ms_per_turn == 2.0
    assert DriverFigures(num_turns=50, seconds=10.0, cpu_s=0.1).share_of_core == 0.01


def test_the_escape_levels_what_a_failure_left_on_half_of_the_servers() -> None:
    leaving, staying = (
        simulate(router(NUM_SERVERS), 60, half_is_away=True) for router in (Router, NeverLeaving)
    )
    assert 1.0 <= leaving.max_over_mean < staying.max_over_mean - 0.1
    assert 0.95 < leaving.share_at_home < staying.share_at_home < 1.0


def test_sessions_of_a_few_turns_all_stay_at_home() -> None:
    found = simulate(Router(NUM_SERVERS), 6)
    assert found.share_at_home > 0.99 and found.max_over_mean < 1.2


def test_the_fastest_round_counts() -> None:
    speeds = iter([Speed(10, 4.0, 1.0), Speed(10, 8.0, 1.0), Speed(10, 2.0, 1.0), Speed(10, 9.0, 1.0)])
    best = alternate({"a": lambda: next(speeds), "b": lambda: next(speeds)}, rounds=2)
    assert {name: speed.tokens_per_s for name, speed in best.items()} == {"a": 5.0, "b": 1.25}


def test_bars_hold_at_their_value_and_not_beyond() -> None:
    assert [Bar("ratio", value, 1.8).is_held for value in (1.8, 1.79)] == [True, False]
    assert [Bar("share", value, 0.05, is_upper=True).is_held for value in (0.05, 0.051)] == [True, False]


@pytest.mark.slow
def test_the_command_prints_each_part_and_its_bar(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--trajectories", "3", "--generate_trajectories", "3", "--alone", "1", "--in_flight", "5"]
    quick = ["--max_tool_s", "0.01", "--turn_s", "1", "--rounds", "1", "--isolation", "none"]
    code = main([*sizes, *quick])
    verdicts = re.findall(r"^(held|MISSED) +(.*) [<>]= [\d.]+: [\d.e-]+$", capsys.readouterr().out, re.M)
    assert [name for _, name in verdicts] == [
        "wall time of the barrier on transformers, times ours",
        "tokens/s, times generate, 64 at a time",
        "share of a core at 5 in flight",
    ]
    assert (code == 0) == all(verdict == "held" for verdict, _ in verdicts)
