"""The online methods on games whose answer is known, through the real rollout, judge and trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtpo.tabular import (
    TreeGame,
    additive_preference,
    cyclic_preference,
    exploitability,
    geometric_policy,
    solve_nash,
    tree_exploitability,
)
from mtpo.training.online_settings import OnlineSettings
from mtpo.trajectory import Problem, Trajectory
from tests.games import Judged, game_table, play_game

pytestmark = pytest.mark.slow

TAU = 0.25
REF_COEF = 0.25
STEPS, BATCH = 80, 64
SMALL_GAP = 1e-2
TILTED = [0.37554216, 0.50147067, 0.12298717]
"""With this reference (0.5, 0.3, 0.2) is the Nash policy of the cycle at TAU."""
START = [[0.7, 0.1, 0.2]]
SELF_PLAY: dict[str, dict[str, Any]] = {
    "online_ipo": {"tau": TAU},
    "nash_md": {"tau": TAU, "ref_coef": 0.0},
    "mtpo": {"alpha": TAU, "value_learning_rate": 0.1},
    "nash_ema": {"tau": TAU, "ema_decay": 0.8, "adam_beta1": 0.0},
}
"""An average of the policy stands still where the policy does, so that nash_ema's target is that of self-play. But a
policy circles where it answers one of before: the average is 5 steps behind, and AdamW's usual momentum would add 10.
With it 80 steps of the exact gradient still leave a gap of 0.008; without, 80 sampled ones one of 0.001."""
AGAINST_THE_MIXTURE: dict[str, dict[str, Any]] = {
    "ipo_md": {"tau": TAU, "ref_coef": REF_COEF},
    "nash_md": {"tau": TAU, "ref_coef": REF_COEF},
    "mtpo_tau": {"alpha": TAU, "ref_coef": REF_COEF, "value_learning_rate": 0.1},
}


def trained(
    game: TreeGame, start: Any, out: Path, method: str, judge: Any = None, **options: Any
) -> np.ndarray:
    settings = OnlineSettings(
        method=method,
        learning_rate=0.05,
        epochs=STEPS * BATCH,
        batch_size=BATCH,
        lr_schedule="linear",
        final_lr_ratio=0.02,
        max_grad_norm=1e9,
        **options,
    )
    return play_game(game, start, settings, out, table=game_table(game, judge))


@pytest.mark.parametrize("method", SELF_PLAY)
def test_self_play_reaches_the_nash_policy_of_a_cycle(method: str, tmp_path: Path) -> None:
    game = TreeGame.one_turn(cyclic_preference(), TILTED)
    assert exploitability(START[0], game.preference, TILTED, TAU) > 0.06
    pi = trained(game, START, tmp_path, method, **SELF_PLAY[method])
    assert exploitability(pi[0], game.preference, TILTED, TAU) < SMALL_GAP


def test_a_kl_in_the_loss_leads_where_a_kl_in_the_reward_does(tmp_path: Path) -> None:
    game = TreeGame.one_turn(cyclic_preference(), TILTED)
    pi = trained(game, START, tmp_path, "mtpo", kl="explicit", **SELF_PLAY["mtpo"])
    assert exploitability(pi[0], game.preference, TILTED, TAU) < SMALL_GAP


def test_rock_paper_scissors_ends_in_the_uniform_policy(tmp_path: Path) -> None:
    game = TreeGame.one_turn(cyclic_preference(), [1 / 3, 1 / 3, 1 / 3])
    assert exploitability(START[0], game.preference, game.mu[0], 1.0) > 0.2
    pi = trained(game, START, tmp_path, "online_ipo", tau=1.0)
    assert exploitability(pi[0], game.preference, game.mu[0], 1.0) < SMALL_GAP


@pytest.mark.parametrize("method", AGAINST_THE_MIXTURE)
def test_against_the_mixture_it_is_the_mixture_that_becomes_a_nash_policy(
    method: str, tmp_path: Path
) -> None:
    """At the higher temperature tau / (1 - b); the policy itself ends beyond it, away from the reference."""
    game = TreeGame.one_turn(cyclic_preference(), TILTED)
    pi = trained(game, START, tmp_path, method, **AGAINST_THE_MIXTURE[method])
    mixture = geometric_policy(pi[0], TILTED, REF_COEF)
    assert exploitability(mixture, game.preference, TILTED, TAU / (1 - REF_COEF)) < SMALL_GAP


@pytest.mark.parametrize("method", ["online_ipo", "ipo_md", "nash_md", "nash_ema", "mtpo"])
def test_with_a_verifiers_preferences_all_methods_have_one_target(method: str, tmp_path: Path) -> None:
    """mu exp(u / (2 tau)), whoever the opponent is."""
    u = np.array([1.0, 0.0, 0.0])
    game = TreeGame.one_turn(additive_preference(u / 2), [1 / 3, 1 / 3, 1 / 3])
    target = np.exp(u / (2 * TAU)) / np.exp(u / (2 * TAU)).sum()
    assert solve_nash(game.preference, game.mu[0], TAU) == pytest.approx(target, abs=1e-9)
    pi = trained(game, game.mu, tmp_path, method, **(AGAINST_THE_MIXTURE | SELF_PLAY)[method])
    assert pi[0] == pytest.approx(target, abs=0.06)


def test_rewards_instead_of_preferences_end_in_the_soft_optimum(tmp_path: Path) -> None:
    class Reward(Judged):
        async def reward(self, trajectory: Trajectory, problem: Problem) -> float:
            return float(trajectory.metadata["final"] == 0)

    game = TreeGame.one_turn(cyclic_preference(), [1 / 3, 1 / 3, 1 / 3])
    target = np.exp([2.0, 0.0, 0.0]) / np.exp([2.0, 0.0, 0.0]).sum()
    options = {"alpha": 0.5, "value_learning_rate": 0.1}
    pi = trained(game, game.mu, tmp_path, "rlhf", Reward(game), **options)
    assert pi[0] == pytest.approx(target, abs=0.06)


def test_mtpo_solves_a_game_of_two_turns_with_random_tools(tmp_path: Path) -> None:
    """The first turn leads to one of two states, by chance; the second to a final state of the cycle."""
    transitions = np.zeros((3, 3, 6))
    transitions[0, :, 1:3] = [[0.9, 0.1], [0.5, 0.5], [0.1, 0.9]]
    transitions[1, range(3), [3, 4, 3]] = 1
    transitions[2, range(3), [4, 5, 5]] = 1
    game = TreeGame(transitions, np.full((3, 3), 1 / 3), cyclic_preference())
    start = np.array([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])
    assert tree_exploitability(start, game, TAU) > 0.1
    pi = trained(game, start, tmp_path, "mtpo", **SELF_PLAY["mtpo"])
    assert tree_exploitability(pi, game, TAU) < SMALL_GAP
