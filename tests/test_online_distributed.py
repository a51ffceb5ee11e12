"""Two processes that sample, judge and train together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data.trajectories import read_trajectories
from mtpo.errors import JudgeUnavailable
from mtpo.tabular import TreeGame, cyclic_preference
from mtpo.training.online import Paused
from mtpo.training.online_settings import OnlineSettings
from mtpo.trajectory import Problem, Trajectory
from tests.child_processes import leave_together, start_pair
from tests.games import FirstActionIsRight, Judged, game_table, play_game

pytestmark = pytest.mark.slow

GAME = TreeGame.one_turn(cyclic_preference(), [1 / 3, 1 / 3, 1 / 3])
START = [0.6, 0.3, 0.1]
SETTINGS = OnlineSettings(method="mtpo", learning_rate=0.1, epochs=24, batch_size=8, micro_batch_size=2)


class Away(Judged):
    """Out from a process's sixth judgement on, in its second step."""

    async def prefer(self, first: Trajectory, second: Trajectory, problem: Problem) -> float | None:
        self.counts["asked"] += 1
        if self.counts["asked"] > 5:
            raise JudgeUnavailable("the judge is out")
        return await super().prefer(first, second, problem)


HELD_OUT = [Problem(f"held-out-{i}", "your move", "") for i in range(3)]
"""Two for one process, one for the other."""


class UnsureAtFirst(FirstActionIsRight):
    """Cannot tell anything of a process's first step."""

    def knows(self) -> bool:
        self.counts["asked"] += 1
        return self.counts["asked"] > 4

    async def prefer(self, first: Trajectory, second: Trajectory, problem: Problem) -> float | None:
        return await super().prefer(first, second, problem) if self.knows() else None

    async def reward(self, trajectory: Trajectory, problem: Problem) -> float | None:
        return await super().reward(trajectory, problem) if self.knows() else None


def _unsure_worker(rank: int, folder: str) -> None:
    """Runs in which one process alone has nothing to learn from in its first step."""
    own, found = Path(folder), {}
    for method in ("mtpo", "online_kto"):
        table = game_table(GAME, UnsureAtFirst(GAME) if rank else FirstActionIsRight(GAME))
        found[method] = play_game(
            GAME, START, replace(SETTINGS, method=method), own / method, table=table
        ).tolist()
    (own / f"found-{rank}.json").write_text(json.dumps(found))
    leave_together(folder, rank)


def _worker(rank: int, folder: str) -> None:
    """A run; and another one in which one process alone loses its judge, and that is resumed."""
    own = Path(folder)
    whole = play_game(GAME, START, SETTINGS, own / "whole", eval_problems=HELD_OUT)
    reason = ""
    try:
        judge = Away(GAME) if rank else None
        table = game_table(GAME, judge)
        play_game(GAME, START, SETTINGS, own / "paused", table=table, eval_problems=HELD_OUT)
    except Paused as error:
        reason = str(error)
    resumed = play_game(GAME, START, SETTINGS, own / "paused", resume=True, eval_problems=HELD_OUT)
    found = {"whole": whole.tolist(), "resumed": resumed.tolist(), "reason": reason}
    (own / f"found-{rank}.json").write_text(json.dumps(found))
    leave_together(folder, rank)


def test_two_processes_share_the_prompts_and_learn_as_one(tmp_path: Path) -> None:
    processes = start_pair(_worker, str(tmp_path))
    while not processes.join():
        pass
    first, second = (json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["resumed"] == first["whole"] != [START]
    assert first["reason"].startswith("paused after step 1 of 3, nothing is lost: the judge is out")
    steps = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [(step["num/played"], step["num/trajectory"]) for step in steps] == [(8, 16)] * 3
    drawn = [
        [
            t.action_ids
            for t in read_trajectories(tmp_path / "whole" / "rounds" / "00000" / share / "trajectories")
        ]
        for share in ("0-of-2", "1-of-2")
    ]
    assert len(drawn[0]) == len(drawn[1]) == 8 and drawn[0] != drawn[1]
    looks = [(tmp_path / run / "eval.jsonl").read_text().splitlines() for run in ("whole", "paused")]
    figures = [[json.loads(line) for line in lines] for lines in looks]
    assert figures[0] == figures[1]
    assert [(look["step"], look["eval_num/played"]) for look in figures[0]] == [(0, 3), (3, 3)]
    assert figures[0][-1]["eval_num/previous"] == figures[0][-1]["eval_num/reference"] == 3


def test_a_process_without_a_judgement_keeps_step_with_the_other(tmp_path: Path) -> None:
    """Its model has a buffer, as rotary models do, which processes must not try to exchange in a forward pass."""
    processes = start_pair(_unsure_worker, str(tmp_path))
    while not processes.join():
        pass
    first, second = (json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert all(pi != [START] for pi in first.values())
