"""The figures of the overview, counted while the trajectories of a set go by: none of them is kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean

from eval.evaluate import Score
from eval.metrics import PairedTest, paired_test, pass_at_k
from mtpo.grader import Grade
from mtpo.trajectory import Problem, Trajectory


@dataclass
class Tally:
    """Counts of one set. A fault of the environment is counted as such and is in no other figure.

    Shares are for when everything has been added.
    """

    name: str
    run: str
    num_trajectories: int = 0
    num_faults: int = 0
    num_with_tool: int = 0
    num_calls: int = 0
    num_failed_calls: int = 0
    num_with_failed_call: int = 0
    num_recovered: int = 0
    """Correct ones among those with a failed call."""
    num_turns: int = 0
    num_tokens: int = 0
    problems: dict[str, Problem] = field(default_factory=dict)
    correct: defaultdict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))

    def add(self, trajectory: Trajectory, problem: Problem, grade: Grade) -> None:
        self.num_trajectories += 1
        if trajectory.fault is not None:
            self.num_faults += 1
            return
        is_correct = grade.verdict == "correct"
        failed = sum(execution.is_error for execution in trajectory.executions)
        self.problems[problem.id] = problem
        self.correct[problem.id].append(is_correct)
        self.num_with_tool += bool(trajectory.executions)
        self.num_calls += len(trajectory.executions)
        self.num_failed_calls += failed
        self.num_with_failed_call += bool(failed)
        self.num_recovered += is_correct and bool(failed)
        self.num_turns += trajectory.num_turns
        self.num_tokens += trajectory.num_action_tokens

    @property
    def num_counted(self) -> int:
        return self.num_trajectories - self.num_faults

    @cached_property
    def accuracy(self) -> Score | None:
        """None where all trajectories are faults."""
        return _score(list(self.correct.values())) if self.correct else None

    def by(self, attribute: str) -> dict[str, Score]:
        """Accuracy by `level` or `subject`, of the problems that have one."""
        groups: defaultdict[str, list[list[bool]]] = defaultdict(list)
        for problem_id, own in self.correct.items():
            if (group := getattr(self.problems[problem_id], attribute)) is not None:
                groups[str(group)].append(own)
        return {name: _score(groups[name]) for name in sorted(groups)}

    @property
    def pass_at(self) -> tuple[int, float] | None:
        """(k, unbiased pass@k) for the most samples that every problem has; None where that is one."""
        fewest = min(map(len, self.correct.values()), default=1)
        if fewest < 2:
            return None
        return fewest, fmean(pass_at_k(len(own), sum(own), fewest) for own in self.correct.values())


def paired(before: Tally, after: Tally) -> PairedTest | None:
    """The test on the problems of which both have one trajectory; None if there is no such problem."""
    shared = [i for i, own in before.correct.items() if len(own) == len(after.correct.get(i, ())) == 1]
    return (
        paired_test([before.correct[i][0] for i in shared], [after.correct[i][0] for i in shared])
        if shared
        else None
    )


def _score(correct: Sequence[Sequence[bool]]) -> Score:
    return Score.of([fmean(own) for own in correct], sum(map(len, correct)))
