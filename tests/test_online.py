"""The online loop: rounds, what a judgement becomes, steps that are skipped, runs that are killed or paused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtpo.errors import InputError
from mtpo.samplers import CURRENT, ema, geo_mix
from mtpo.tabular import TreeGame, cyclic_preference
from mtpo.training.online import prompt_order
from mtpo.training.online_methods import ONLINE_METHODS
from mtpo.training.online_settings import OnlineSettings
from mtpo.training.plays import Play, rows_of
from mtpo.trajectory import Problem, Segment, StopReason, Trajectory
from tests.games import game_judge, game_table, play_game

GAME = TreeGame.one_turn(cyclic_preference(), [1 / 3, 1 / 3, 1 / 3])
START = [0.6, 0.3, 0.1]
PROBLEM = Problem("game", "your move", "")


def settings(method: str, **options: Any) -> OnlineSettings:
    return OnlineSettings(**{"method": method, "learning_rate": 0.1, "epochs": 48, "batch_size": 8} | options)


def steps_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# -- what a judgement becomes ------------------------------------------------------------------------------------


def trajectory(sample: int, token: int) -> Trajectory:
    segments = Segment("prompt", (1,)), Segment("action", (token,), (-0.5,), str(token))
    return Trajectory("game", sample, segments, StopReason.ANSWERED)


def play(preference: float | None) -> Play:
    return Play(PROBLEM, trajectory(0, 3), trajectory(1, 4), preference)


@pytest.mark.parametrize(("preference", "chosen", "pref_prob"), [(0.9, 3, 0.9), (0.2, 4, 0.8), (0.5, 3, 0.5)])
def test_the_side_that_wins_more_often_is_the_chosen_one(
    preference: float, chosen: int, pref_prob: float
) -> None:
    (row,) = rows_of(play(preference), ONLINE_METHODS["online_ipo"])
    assert (row["chosen_input_ids"], row["pref_prob"]) == ([1, chosen], pref_prob)


def test_both_trajectories_of_mtpo_are_each_others_opponents() -> None:
    rows = rows_of(play(0.75), ONLINE_METHODS["mtpo"])
    assert [(row["input_ids"], row["reward"]) for row in rows] == [([1, 3], 0.75), ([1, 4], 0.25)]
    (row,) = rows_of(play(0.75), ONLINE_METHODS["nash_md"])
    assert (row["input_ids"], row["reward"]) == ([1, 3], 0.75)


def test_ties_are_dropped_where_they_say_nothing() -> None:
    tied, unjudged = play(0.5), play(None)
    kept = {name for name, method in ONLINE_METHODS.items() if tied.is_usable(method, 99)}
    assert set(ONLINE_METHODS) - kept == {"online_dpo", "online_slic"}
    assert not any(unjudged.is_usable(method, 99) for method in ONLINE_METHODS.values())
    assert not play(1.0).is_usable(ONLINE_METHODS["online_dpo"], max_length=1)


def test_every_method_samples_from_the_policies_that_its_paper_names() -> None:
    current, mixture = [CURRENT], [geo_mix(0.25)]
    expected = {
        "online_dpo": current * 2, "online_ipo": current * 2, "online_slic": current * 2,
        "ipo_md": mixture * 2, "nash_md": current + mixture, "nash_ema": [*current, ema(0.5)],
        "mtpo": current * 2, "mtpo_tau": mixture * 2, "rlhf": current, "online_kto": current,
    }  # fmt: skip
    for name, samplers in expected.items():
        defaults = ONLINE_METHODS[name].defaults
        options = {"ref_coef": 0.25, "ema_decay": 0.5}
        given = {option: value for option, value in options.items() if option in defaults}
        assert settings(name, **given).samplers == tuple(samplers)


def test_options_without_effect_are_refused() -> None:
    with pytest.raises(InputError, match="ref_coef has no effect on method 'mtpo'"):
        settings("mtpo", ref_coef=0.1)
    with pytest.raises(InputError, match="value_warmup_steps has no effect on method 'nash_md'"):
        settings("nash_md", value_warmup_steps=3)
    with pytest.raises(InputError, match="sync_steps is 0, expected at least 1"):
        settings("mtpo", sync_steps=0)
    with pytest.raises(InputError, match="do not fill one batch of 8"):
        prompt_order([PROBLEM], settings("mtpo", epochs=7))


# -- the loop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ONLINE_METHODS)
def test_every_method_takes_its_steps_and_moves_the_policy(method: str, tmp_path: Path) -> None:
    judge: Any = game_judge(GAME)
    if len(ONLINE_METHODS[method].players) == 1:
        judge = FirstActionIsRight()
    pi = play_game(GAME, START, settings(method, epochs=24), tmp_path, table=game_table(GAME, judge))
    steps = steps_of(tmp_path)
    assert len(steps) == 3
    assert all(np.isfinite(step["loss"]) and step["num/played"] == 8 for step in steps)
    assert np.abs(pi[0] - START).max() > 0.01
    assert (tmp_path / "model" / "config.json").exists()


class FirstActionIsRight:
    """A judge of single trajectories."""

    counts: Any = None

    async def prefer(self, first: Trajectory, second: Trajectory, problem: Problem) -> float:
        raise NotImplementedError

    async def reward(self, trajectory: Trajectory, problem: Problem) -> float:
        return float(trajectory.metadata["final"] == 0)
