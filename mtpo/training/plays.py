"""What came of a prompt in online training, and the rows and figures that are made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mtpo.batches import Row
from mtpo.training.online_methods import OnlineMethod
from mtpo.trajectory import Problem, Trajectory


@dataclass(frozen=True)
class Play:
    """What came of one prompt."""

    problem: Problem
    first: Trajectory
    second: Trajectory | None
    """The opponent, where the method has one."""
    preference: float | None
    """P(first > second), or the reward of a first one that has no opponent; None if the judge could not tell."""

    @property
    def sides(self) -> tuple[Trajectory, ...]:
        return (self.first,) if self.second is None else (self.first, self.second)

    @property
    def is_tie(self) -> bool:
        return self.second is not None and self.preference == 0.5

    def is_usable(self, recipe: OnlineMethod, max_length: int) -> bool:
        """There is something to learn from it: a judgement, no tie that the method drops, nothing too long."""
        if self.preference is None or (self.is_tie and not recipe.keeps_ties):
            return False
        return all(t.actions and len(t.input_ids) <= max_length for t in self.sides)


def rows_of(play: Play, recipe: OnlineMethod) -> list[Row]:
    """The training rows of a play that is usable. In a pair the side that wins more often is the chosen one."""
    assert play.preference is not None
    if recipe.rows == "pair":
        assert play.second is not None
        is_first = play.preference >= 0.5
        chosen, rejected = (play.first, play.second) if is_first else (play.second, play.first)
        row: Row = {"problem_id": play.problem.id, "pref_prob": max(play.preference, 1 - play.preference)}
        for side, trajectory in (("chosen", chosen), ("rejected", rejected)):
            row[f"{side}_sample"] = trajectory.sample
            row[f"{side}_input_ids"] = trajectory.input_ids
            row[f"{side}_completion_mask"] = trajectory.completion_mask
        return [row]
    rows = [_single(play.first) | {"reward": play.preference}]
    if recipe.rows == "label":
        return [_single(play.first) | {"label": play.preference >= 0.5}]
    if recipe.trains_both and play.second is not None:
        rows.append(_single(play.second) | {"reward": 1 - play.preference})
    return rows


def play_metrics(plays: Sequence[Play], usable: Sequence[Play]) -> dict[str, float]:
    """Of the plays of one step: shares and means; how many were played, and how many of them make no row."""
    judged = [play for play in plays if play.preference is not None]
    metrics = {
        "num/played": float(len(plays)),
        "num/dropped": float(len(plays) - len(usable)),
        "num/judged": float(len(judged)),
        "num/unjudged": float(len(plays) - len(judged)),
    }
    if judged:
        metrics["preference/judged"] = sum(p.preference for p in judged if p.preference is not None) / len(
            judged
        )
        metrics["ties/judged"] = sum(p.is_tie for p in judged) / len(judged)
    for side, name in zip(range(len(plays[0].sides) if plays else 0), ("first", "second"), strict=False):
        played = [play.sides[side] for play in plays]
        metrics[f"{name}_length/played"] = sum(t.num_action_tokens for t in played) / len(played)
        metrics[f"{name}_turns/played"] = sum(t.num_turns for t in played) / len(played)
        metrics[f"{name}_truncated/played"] = sum(t.stop_reason.is_truncated for t in played) / len(played)
    return metrics


def _single(trajectory: Trajectory) -> Row:
    return {
        "problem_id": trajectory.problem_id,
        "sample": trajectory.sample,
        "input_ids": trajectory.input_ids,
        "completion_mask": trajectory.completion_mask,
    }
