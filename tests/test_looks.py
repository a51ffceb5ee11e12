"""Looks at held-out prompts: whom the policy is compared with, and that no interruption changes a figure."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtpo.errors import InputError, JudgeUnavailable
from mtpo.tabular import TreeGame, cyclic_preference
from mtpo.training.online import Paused
from mtpo.training.online_settings import OnlineSettings
from mtpo.trajectory import Problem, StopReason, Trajectory
from tests.games import STORAGE, GameEnvironment, GameSession, Judged, game_table, play_game

GAME = TreeGame.one_turn(cyclic_preference(), [1 / 3, 1 / 3, 1 / 3])
START = [0.6, 0.3, 0.1]
HELD_OUT = tuple(Problem(f"held-out-{i}", "your move", "") for i in range(5))
SETTINGS = OnlineSettings(
    method="nash_ema", learning_rate=0.1, epochs=48, batch_size=8, tau=0.1, ema_decay=0.5,
    sync_steps=3, eval_steps=4, num_checkpoints=2,
)  # fmt: skip
"""Six steps, with checkpoints after 2 and 4; looks after 0, 4 and 6, of which 4 is within a round."""


def looks_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]


class Seen(Judged):
    """Notes who is compared on held-out prompts, and fails at one judgement of them."""

    def __init__(self, game: TreeGame = GAME, fails_at: int = 10**9) -> None:
        super().__init__(game)
        self.pairs: list[tuple[str, int, str, int]] = []
        self.fails_at = fails_at

    async def prefer(self, first: Trajectory, second: Trajectory, problem: Problem) -> float | None:
        if problem in HELD_OUT:
            self.pairs.append((first.policy, first.iteration, second.policy, second.iteration))
            if len(self.pairs) == self.fails_at:
                raise JudgeUnavailable("the judge is out")
        return await super().prefer(first, second, problem)


def play(out: Path, judge: Judged | None = None, **options: Any) -> np.ndarray:
    table = game_table(GAME, judge, options.pop("environment", None))
    return play_game(GAME, START, SETTINGS, out, table=table, eval_problems=HELD_OUT, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, Seen]:
    out, judge = tmp_path_factory.mktemp("looks"), Seen()
    return out, play(out, judge), judge


def test_each_look_compares_with_the_reference_and_with_the_policy_of_the_look_before(
    whole: tuple[Path, np.ndarray, Seen],
) -> None:
    out, _, judge = whole
    expected = [
        ("current", 0, "reference", 0),
        *(("current", 4, "reference", 0), ("current", 4, "current", 0)),
        *(("current", 6, "reference", 0), ("current", 6, "current", 4)),
    ]
    assert judge.pairs == [pair for pair in expected for _ in HELD_OUT]
    looks = looks_of(out)
    assert [look["step"] for look in looks] == [0, 4, 6]
    assert ["eval_preference/previous" in look for look in looks] == [False, True, True]


def test_a_look_samples_with_the_weights_of_its_step_also_within_a_round(
    whole: tuple[Path, np.ndarray, Seen],
) -> None:
    """Rounds are sampled with the weights of their beginning, which are three steps old in the end."""
    out, pi, _ = whole
    (journal,) = out.glob("looks/00006/*/trajectories")
    drawn = list(STORAGE.read(journal))
    sampled = [action.logps[0] for t in drawn for action in t.actions if action.logps]
    assert sampled == pytest.approx([math.log(pi[0, t.metadata["final"]]) for t in drawn], abs=1e-5)
    log_ratios = [logp - math.log(1 / 3) for logp in sampled]
    look = looks_of(out)[-1]
    assert look["eval_kl/trajectory"] == pytest.approx(np.mean(log_ratios), abs=1e-5)
    assert look["eval_kl/token"] == look["eval_kl/trajectory"]  # one token each
    assert look["eval_entropy"] == pytest.approx(-(pi[0] * np.log(pi[0])).sum(), abs=1e-5)


@pytest.mark.parametrize(("reference", "preference", "ties"), [(1, 1.0, 0.0), (2, 0.0, 0.0), (0, 0.5, 1.0)])
def test_a_policy_that_plays_the_first_action_against_one_that_plays_another(
    reference: int, preference: float, ties: float, tmp_path: Path
) -> None:
    """The first action beats the second and loses to the third; of itself it is an equal."""
    mu, pi = np.full(3, 1e-9), [1 - 2e-9, 1e-9, 1e-9]
    mu[reference] = 1 - 2e-9
    game = TreeGame.one_turn(cyclic_preference(), mu)
    settings = OnlineSettings(method="mtpo", learning_rate=1e-3, epochs=8, batch_size=8, value_warmup_steps=1)
    play_game(game, pi, settings, tmp_path, eval_problems=HELD_OUT)
    before, after = looks_of(tmp_path)
    for look in (before, after):
        assert look["eval_num/reference"] == look["eval_num/played"] == 5
        assert (look["eval_preference/reference"], look["eval_ties/reference"]) == (preference, ties)
        assert (look["eval_length/played"], look["eval_turns/played"]) == (1, 1)
        assert look["eval_kl/trajectory"] == pytest.approx(
            0 if reference == 0 else 9 * math.log(10), rel=1e-4
        )
    assert (after["eval_preference/previous"], after["eval_ties/previous"]) == (0.5, 1.0)
    assert "| eval_preference/reference |" in (tmp_path / "model" / "README.md").read_text()


def test_equal_policies_draw_independently(tmp_path: Path) -> None:
    """Or P would be that of two who always do the same."""
    many = [Problem(f"p{i}", "your move", "") for i in range(12)]
    frozen = OnlineSettings(method="mtpo", learning_rate=1e-3, epochs=8, batch_size=8, value_warmup_steps=1)
    play_game(GAME, GAME.mu, frozen, tmp_path, eval_problems=many)
    drawn = set()
    for journal in tmp_path.glob("looks/*/*/trajectories"):
        finals = {t.problem_id: t.metadata["final"] for t in STORAGE.read(journal)}
        drawn.add(tuple(finals[problem.id] for problem in many))
    assert len(drawn) == 3  # of the reference, and of the policy before and after


def test_what_the_judge_cannot_tell_and_what_a_limit_cut_short_is_counted(tmp_path: Path) -> None:
    class Unsure(Judged):
        async def prefer(self, first: Trajectory, second: Trajectory, problem: Problem) -> float | None:
            return None if problem == HELD_OUT[0] else 1.0

    class Endless(GameEnvironment):
        def begin(self, problem: Problem) -> GameSession:
            return OutOfRoom(self.game)

    class OutOfRoom(GameSession):
        async def take(self, turn: str, *, seed: int, limit: StopReason | None) -> StopReason:
            await super().take(turn, seed=seed, limit=limit)
            return StopReason.CONTEXT_LIMIT

    play(tmp_path, Unsure(GAME), environment=Endless(GAME))
    look = looks_of(tmp_path)[-1]
    assert look["eval_num/unjudged"] == 2  # once against either opponent
    assert look["eval_num/reference"] == look["eval_num/previous"] == 4
    assert look["eval_preference/previous"] == look["eval_truncated/played"] == 1


# -- runs that are killed or paused ------------------------------------------------------------------------------


class Killed(BaseException):
    """No handler of ours catches it: files stay as they are."""


class Moves(GameEnvironment):
    """Counts what is played on held-out prompts, and is killed at one of them."""

    def __init__(self, killed_at: int = 10**9) -> None:
        super().__init__(GAME)
        self.count, self.killed_at = 0, killed_at

    def begin(self, problem: Problem) -> GameSession:
        self.count += problem in HELD_OUT
        if self.count == self.killed_at:
            raise Killed
        return super().begin(problem)


@pytest.mark.parametrize("killed_at", [3, 8, 13, 18])
def test_a_run_killed_in_a_look_ends_with_the_same_figures(
    killed_at: int, whole: tuple[Path, np.ndarray, Seen], tmp_path: Path
) -> None:
    """Killed while the reference plays, or the policy of step 0, 4 or 6; what was finished is not played again."""
    first, second = Moves(killed_at), Moves()
    with pytest.raises(Killed):
        play(tmp_path, environment=first)
    assert (play(tmp_path, environment=second, resume=True) == whole[1]).all()
    assert figures(tmp_path) == figures(whole[0])
    played = sum(1 for journal in tmp_path.glob("looks/*/*/trajectories") for _ in STORAGE.read(journal))
    assert played == 20 and second.count < 20 - 5 * ((killed_at - 1) // 5) + 1


@pytest.mark.parametrize("fails_at", [2, 7, 17])
def test_a_judge_that_is_down_in_a_look_pauses_the_run_and_the_look_is_made_up_for(
    fails_at: int, whole: tuple[Path, np.ndarray, Seen], tmp_path: Path
) -> None:
    with pytest.raises(Paused, match="the judge is out; go on with --resume"):
        play(tmp_path, Seen(fails_at=fails_at))
    assert (play(tmp_path, resume=True) == whole[1]).all()
    assert figures(tmp_path) == figures(whole[0])


def figures(out: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in look.items() if name != "epoch"} for look in looks_of(out)]


def test_a_run_that_starts_again_logs_its_first_look_once(
    whole: tuple[Path, np.ndarray, Seen], tmp_path: Path
) -> None:
    class Dies(Judged):
        async def prefer(self, first: Trajectory, second: Trajectory, problem: Problem) -> float | None:
            if problem not in HELD_OUT:
                raise Killed
            return await super().prefer(first, second, problem)

    with pytest.raises(Killed):
        play(tmp_path, Dies(GAME))
    assert [look["step"] for look in looks_of(tmp_path)] == [0]
    play(tmp_path, resume=True)
    assert figures(tmp_path) == figures(whole[0])


def test_the_look_before_is_found_where_another_number_of_processes_left_it(
    whole: tuple[Path, np.ndarray, Seen], tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        play(tmp_path, environment=Moves(killed_at=18))
    (tmp_path / "looks" / "00004" / "0-of-1").rename(tmp_path / "looks" / "00004" / "1-of-2")
    play(tmp_path, resume=True)
    assert figures(tmp_path) == figures(whole[0])


# -- what is refused ---------------------------------------------------------------------------------------------


def test_looks_need_prompts_of_different_ids(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="eval_steps has no effect without held-out problems"):
        play_game(GAME, START, SETTINGS, tmp_path)
    with pytest.raises(InputError, match="two have the id 'held-out-0', expected one each"):
        play_game(
            GAME,
            START,
            replace(SETTINGS, eval_steps=None),
            tmp_path,
            eval_problems=[HELD_OUT[0], HELD_OUT[0]],
        )
