"""Several policies of one run side by side: a table, and what a summary keeps of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.evaluate import Evaluation, Score
from eval.metrics import PairedTest
from eval.published import SETS, published_accuracies


@dataclass(frozen=True)
class Stage:
    """One policy on the test problems."""

    name: str
    model: str
    greedy: Evaluation
    sampled: Evaluation | None = None
    """The same problems at temperature 1."""
    training: Mapping[str, float] = field(default_factory=dict)
    """Figures of the last training steps that made this policy; empty for the first one."""

    def to_json(self) -> dict[str, Any]:
        accuracy = self.greedy.accuracy
        return {
            "name": self.name,
            "model": self.model,
            "greedy": accuracy.value,
            "greedy_ci": [accuracy.low, accuracy.high],
            "sampled": self.sampled.accuracy.value if self.sampled else None,
            "sampled_ci": [self.sampled.accuracy.low, self.sampled.accuracy.high] if self.sampled else None,
            "num_problems": accuracy.num_problems,
            "tool_use_rate": self.greedy.tool_use.value,
            "tool_error_rate": self.greedy.tool_errors.value or 0.0,
            "by_set": {
                name: [score.value, score.low, score.high] for name, score in self.greedy.by_set.items()
            },
            "by_subject": {name: a.value for name, a in self.greedy.by_subject.items()},
            "training": dict(self.training),
        }


def stages_table(stages: Sequence[Stage], test: PairedTest) -> str:
    """Accuracy of every stage with 95 % intervals, by subject, and the paired test of the last against the first."""
    lines = [
        f"{'':12} {'greedy':24} {'sampled, T = 1':24} {'tool use':>8} {'errors':>7}  {'log-ratio +/-':>13}"
    ]
    for stage in stages:
        tool_errors = stage.greedy.tool_errors.value or 0.0
        ratios = [
            f"{stage.training[name]:+.2f}" for names in RATIOS for name in names if name in stage.training
        ]
        lines.append(
            f"{stage.name:12} {stage.greedy.accuracy!s:24} "
            f"{str(stage.sampled.accuracy) if stage.sampled else '-':24} "
            f"{stage.greedy.tool_use.value:8.1%} {tool_errors:7.1%}  {' / '.join(ratios) or '-':>13}"
        )
    subjects = sorted(stages[0].greedy.by_subject)
    if len(subjects) > 1:
        lines += ["", f"{'greedy by kind':14}" + "".join(f"{name:>12}" for name in subjects)]
        for stage in stages:
            shares = (stage.greedy.by_subject[name].value for name in subjects)
            lines.append(f"{stage.name:14}" + "".join(f"{share:12.0%}" for share in shares))
    lines += [
        "",
        f"{stages[-1].name} against {stages[0].name} on {stages[0].greedy.accuracy.num_problems} problems, greedy: "
        f"{test.improved} improved, {test.worsened} worsened, z = {test.z:.1f}, p = {test.p:.1g}",
    ]
    return "\n".join(lines)


def published_table(stages: Sequence[Stage], name: str) -> str:
    """The stages beside a row of the paper, in per cent, with the 95 % intervals of ours.

    Raises:
        InputError: the paper has no such row.
    """
    told = published_accuracies(name, len(stages))
    title = f"{name}: greedy accuracy, and that of arXiv 2409.02392"
    lines = [title, f"{'':12}" + "".join(f"{f'{name}':24}{'paper':>8}  " for name in SETS).rstrip()]
    for stage, row in zip(stages, told, strict=True):
        cells = [
            f"{_score_on(stage, name)!s:24}{'-' if row is None else getattr(row, figure):>8}  "
            for name, figure in SETS.items()
        ]
        lines.append(f"{stage.name:12}" + "".join(cells).rstrip())
    return "\n".join(lines)


def _score_on(stage: Stage, name: str) -> Score | str:
    """The score on one of the paper's sets; "-" if it was not evaluated."""
    return stage.greedy.by_set.get(name, "-")


RATIOS = (("logratio/chosen", "rho/desirable"), ("logratio/rejected", "rho/undesirable"))
"""Mean log-ratios to the reference, in nats, of what training raises and of what it lowers; pairs, and kto."""
