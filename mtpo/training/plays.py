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
    rows = [single_row(play.first) | {"reward": play.preference}]
    if recipe.rows == "label":
        return [single_row(play.first) | {"label": play.preference >= 0.5}]
    if recipe.trains_both and play.second is not None:
        rows.append(single_row(play.second) | {"reward": 1 - play.preference})
    return rows


def play_metrics(plays: Sequence[Play], usable: Sequence[Play]) -> dict[str, float]:
    """Of the plays of one step: shares and means; how many were played, and how many of them make no row."""
    metrics = judgement_metrics(plays, "judged") | {
        "num/played": float(len(plays)),
        "num/dropped": float(len(plays) - len(usable)),
        "num/unjudged": float(sum(play.preference is None for play in plays)),
    }
    for side, name in zip(range(len(plays[0].sides) if plays else 0), ("first_", "second_"), strict=False):
        metrics |= trajectory_metrics([play.sides[side] for play in plays], name)
    return metrics


def judgement_metrics(plays: Sequence[Play], among: str) -> dict[str, float]:
    """num/AMONG plays have a judgement; the mean of P, and the share of ties, over these."""
    preferences = [play.preference for play in plays if play.preference is not None]
    metrics = {f"num/{among}": float(len(preferences))}
    if preferences:
        metrics[f"preference/{among}"] = sum(preferences) / len(preferences)
        ties = sum(play.is_tie for play in plays if play.preference is not None)
        metrics[f"ties/{among}"] = ties / len(preferences)
    return metrics


def trajectory_metrics(trajectories: Sequence[Trajectory], whose: str = "") -> dict[str, float]:
    """Means over what one sampler played: action tokens, turns, and the share that a limit cut short."""
    if not trajectories:
        return {}
    of_each = {
        "length": [t.num_action_tokens for t in trajectories],
        "turns": [t.num_turns for t in trajectories],
        "truncated": [t.stop_reason.is_truncated for t in trajectories],
    }
    return {f"{whose}{name}/played": sum(values) / len(values) for name, values in of_each.items()}


def single_row(trajectory: Trajectory) -> Row:
    return {
        "problem_id": trajectory.problem_id,
        "sample": trajectory.sample,
        "input_ids": trajectory.input_ids,
        "completion_mask": trajectory.completion_mask,
    }
