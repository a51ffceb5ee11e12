"""Two processes that sample, judge and train together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.trajectories import read_trajectories
from mtpo.errors import JudgeUnavailable
from mtpo.tabular import TreeGame, cyclic_preference
from mtpo.training.online import Paused
from mtpo.training.online_settings import OnlineSettings
from mtpo.trajectory import Problem, Trajectory
from tests.games import Judged, game_table, play_game
from tests.process_pair import leave_together, start_pair

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


def _worker(rank: int, folder: str) -> None:
    """A run; and another one in which one process alone loses its judge, and that is resumed."""
    own = Path(folder)
    whole = play_game(GAME, START, SETTINGS, own / "whole")
    reason = ""
    try:
        judge = Away(GAME) if rank else None
        play_game(GAME, START, SETTINGS, own / "paused", table=game_table(GAME, judge))
    except Paused as error:
        reason = str(error)
    resumed = play_game(GAME, START, SETTINGS, own / "paused", resume=True)
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
