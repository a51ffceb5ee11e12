"""The online loop: rounds, what a judgement becomes, steps that are skipped, runs that are killed or paused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtpo.errors import GuardError, InputError, JudgeUnavailable
from mtpo.judges import CallableJudge
from mtpo.samplers import CURRENT, ema, geo_mix
from mtpo.scoring import batch_logps
from mtpo.tabular import TreeGame, cyclic_preference
from mtpo.training import trainer
from mtpo.training.online import Paused, prompt_order
from mtpo.training.online_methods import ONLINE_METHODS
from mtpo.training.online_settings import OnlineSettings
from mtpo.training.plays import Play, rows_of
from mtpo.trajectory import Problem, Segment, StopReason, Trajectory
from tests.games import (
    STORAGE,
    FirstActionIsRight,
    GameEnvironment,
    GameSession,
    Judged,
    game_table,
    play_game,
    table_policy,
)

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
    judge = Judged(GAME) if len(ONLINE_METHODS[method].players) == 2 else FirstActionIsRight(GAME)
    pi = play_game(GAME, START, settings(method, epochs=24), tmp_path, table=game_table(GAME, judge))
    steps = steps_of(tmp_path)
    assert len(steps) == 3
    assert all(np.isfinite(step["loss"]) and step["num/played"] == 8 for step in steps)
    assert np.abs(pi[0] - START).max() > 0.01
    assert (tmp_path / "model" / "config.json").exists()


# -- what goes wrong ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    """No handler of ours catches it: files stay as they are."""


class Moves(GameEnvironment):
    """Counts turns, and is killed at one of them."""

    def __init__(self, killed_at: int = 10**9) -> None:
        super().__init__(GAME)
        self.count, self.killed_at = 0, killed_at

    def begin(self, problem: Problem) -> GameSession:
        self.count += 1
        if self.count == self.killed_at:
            raise Killed
        return super().begin(problem)


class Verdicts(Judged):
    """The game's judge, that fails at one of its judgements."""

    def __init__(self, error: BaseException | None = None, fails_at: int = 10**9) -> None:
        super().__init__(GAME)
        self.count, self.error, self.fails_at = 0, error, fails_at

    async def prefer(self, first: Trajectory, second: Trajectory, problem: Problem) -> float | None:
        self.count += 1
        if self.count == self.fails_at and self.error is not None:
            raise self.error
        return await super().prefer(first, second, problem)


RESUMABLE = {
    "mtpo": settings("mtpo", sync_steps=2, num_checkpoints=1),
    "nash_ema": settings("nash_ema", tau=0.1, ema_decay=0.5, sync_steps=2, num_checkpoints=2),
    "ipo_md": settings("ipo_md", micro_batch_size=2),
}
"""Six steps of 8 prompts: 96 trajectories, 48 judgements."""


def run(method: str, out: Path, moves: Moves, judge: Any, *, resume: bool = False) -> np.ndarray:
    table = game_table(GAME, judge, environment=moves)
    return play_game(GAME, START, RESUMABLE[method], out, table=table, resume=resume)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return {method: run(method, folder / method, Moves(), Verdicts()) for method in RESUMABLE}


@pytest.mark.parametrize("method", RESUMABLE)
@pytest.mark.parametrize("killed_at", [5, 50, 90])
def test_a_run_killed_while_it_samples_ends_with_the_same_weights(
    method: str, killed_at: int, uninterrupted: dict[str, np.ndarray], tmp_path: Path
) -> None:
    first, second = Moves(killed_at), Moves()
    with pytest.raises(Killed):
        run(method, tmp_path, first, Verdicts())
    assert (run(method, tmp_path, second, Verdicts(), resume=True) == uninterrupted[method]).all()
    kept = len(list_trajectories(tmp_path)) - second.count
    assert kept == 96 - second.count > 0 or killed_at == 5  # what was finished was not played again


@pytest.mark.parametrize("method", RESUMABLE)
def test_a_judge_that_is_down_pauses_the_run_and_nothing_is_lost(
    method: str, uninterrupted: dict[str, np.ndarray], tmp_path: Path
) -> None:
    moves, again = Moves(), Moves()
    with pytest.raises(
        Paused, match=r"^paused after step \d of 6, nothing is lost: the judge is out; go on with --resume$"
    ):
        run(method, tmp_path, moves, Verdicts(JudgeUnavailable("the judge is out"), fails_at=37))
    assert (run(method, tmp_path, again, Verdicts(), resume=True) == uninterrupted[method]).all()
    assert moves.count + again.count == 96
    assert len(steps_of(tmp_path)) == 6


def list_trajectories(out: Path) -> list[Trajectory]:
    return [t for folder in sorted(out.glob("rounds/*/*/trajectories")) for t in STORAGE.read(folder)]


def test_a_run_is_not_gone_on_with_by_accident(tmp_path: Path) -> None:
    run("mtpo", tmp_path, Moves(), Verdicts())
    with pytest.raises(InputError, match="holds checkpoint-3 of an earlier run"):
        run("mtpo", tmp_path, Moves(), Verdicts())


def test_pairs_that_no_one_can_judge_are_dropped_and_counted(tmp_path: Path) -> None:
    class Unsure(Verdicts):
        async def prefer(self, first: Trajectory, second: Trajectory, problem: Problem) -> float | None:
            return (None, 1.0, 0.5)[first.metadata["final"]]

    table = game_table(GAME, Unsure())
    chosen = settings("online_dpo", epochs=32, batch_size=16, micro_batch_size=2)
    play_game(GAME, START, chosen, tmp_path, table=table)
    for step in steps_of(tmp_path):
        assert 0 < step["num/unjudged"] < step["num/dropped"] < 16
        assert step["num/trajectory"] == 2 * (16 - step["num/dropped"])


def test_a_step_without_a_judgement_changes_nothing_and_too_many_end_the_run(tmp_path: Path) -> None:
    table = game_table(GAME, CallableJudge(lambda first, second, problem: None))
    options = settings("mtpo", max_skipped_steps=2, epochs=16)
    pi = play_game(GAME, START, options, tmp_path / "few", table=table)
    assert pi[0] == pytest.approx(START)
    assert [step["skipped_steps"] for step in steps_of(tmp_path / "few")] == [1, 2]
    with pytest.raises(GuardError, match="3 steps had no finite gradient, or nothing to learn from"):
        play_game(GAME, START, settings("mtpo", max_skipped_steps=2), tmp_path / "many", table=table)


def test_a_ratio_that_is_not_finite_skips_its_step(tmp_path: Path) -> None:
    """The reference never plays what the policy plays now and then."""
    options = settings("online_ipo", batch_size=2, epochs=20, lr_schedule="constant")
    reference = table_policy(GAME.mu)
    with torch.no_grad():
        reference.head.bias[-1] = -torch.inf
    play_game(GAME, START, options, tmp_path, reference=reference)
    steps = steps_of(tmp_path)
    skipped = [step["skipped_steps"] for step in steps]
    assert 0 < skipped[-1] < 10
    played = [STORAGE.read(folder) for folder in sorted(tmp_path.glob("rounds/*/*/trajectories"))]
    forbidden = [any(t.metadata["final"] == 2 for t in trajectories) for trajectories in played]
    assert skipped == np.cumsum(forbidden).tolist()


@pytest.mark.parametrize(("micro_batch_size", "fails_at"), [(8, 1), (4, 4)])
def test_a_loss_that_is_not_finite_leaves_weights_and_momenta(
    micro_batch_size: int, fails_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps, the second of which fails, are one step. Two micro-batches are scored first for their moments."""
    options = {"lr_schedule": "constant", "value_learning_rate": 0.3, "micro_batch_size": micro_batch_size}
    once = play_game(GAME, START, settings("mtpo", epochs=8, **options), tmp_path / "one")
    calls = itertools.count()

    def broken(*args: Any, **kwargs: Any) -> torch.Tensor:
        return batch_logps(*args, **kwargs) * (torch.inf if next(calls) == fails_at else 1)

    monkeypatch.setattr(trainer, "batch_logps", broken)
    twice = play_game(GAME, START, settings("mtpo", epochs=16, **options), tmp_path / "two")
    assert (once == twice).all()
    assert steps_of(tmp_path / "two")[-1]["skipped_steps"] == 1


def test_the_policy_stands_still_while_its_values_warm_up(tmp_path: Path) -> None:
    pi = play_game(GAME, START, settings("mtpo", epochs=16, value_warmup_steps=2), tmp_path)
    assert pi[0] == pytest.approx(START)
    first, second = steps_of(tmp_path)
    assert first["value"] == 0 != second["value"]


def test_accumulation_changes_no_step_of_mtpo(tmp_path: Path) -> None:
    """Advantages are normalised over the whole batch."""
    whole, parts = (
        play_game(GAME, START, settings("mtpo", epochs=16, micro_batch_size=size), tmp_path / str(size))
        for size in (8, 2)
    )
    assert whole == pytest.approx(parts, abs=1e-5)
    assert np.abs(whole[0] - START).max() > 0.01


def test_a_method_of_single_trajectories_needs_a_judge_of_them(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rewards single trajectories, which Judged cannot"):
        play_game(GAME, START, settings("rlhf"), tmp_path)
