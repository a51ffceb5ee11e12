"""Print one trajectory in the terminal, with its mask in colour.

    python -m recipes.show runs/quickstart --id generated:test/17 --set test/SFT/greedy

What the model wrote is cyan (mask 1), the prompt is dim and tool output yellow (mask 0). Colours are left out where
the output is no terminal or NO_COLOR is set.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from eval.report.sources import Run, TrajectorySet, read_run
from eval.report.terminal import printable, trajectory_lines
from eval.report.tokens import Piece, fits, load_local_tokenizer, token_pieces
from mtpo.cli import run_recipe
from mtpo.errors import InputError
from mtpo.grader import Grade, shared_grader
from mtpo.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class Config:
    """Print one trajectory in the terminal, with its mask in colour."""

    FIRST: ClassVar = "run"
    run: str = field(metadata={"help": "run folder; may come first, without --run"})
    id: str = field(metadata={"help": "PROBLEM or PROBLEM:SAMPLE; the first sample by default"})
    set: str | None = field(
        default=None, metadata={"help": "which part of the run, for example test/SFT/greedy"}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "name or folder; the run's by default"})


def main(argv: Sequence[str] | None = None) -> int:
    return run_recipe(Config, show, "recipes.show", argv)


def show(config: Config) -> str:
    run = read_run(config.run)
    (source, trajectory, grade), *others = _found(run, config)
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    problem = source.problem_of(trajectory)
    named = [config.tokenizer] if config.tokenizer else [*run.tokenizers, trajectory.policy]
    pieces = _pieces(trajectory, named)
    print("\n".join(trajectory_lines(trajectory, problem, grade, pieces, color=color)) + "\n")
    elsewhere = f"; --set shows it in {', '.join(printable(s.name) for s, _, _ in others)}" if others else ""
    without = "" if pieces else "; without the run's tokenizer, which --tokenizer may name"
    return f"from {printable(source.name)}{without}{elsewhere}"


def _found(run: Run, config: Config) -> list[tuple[TrajectorySet, Trajectory, Grade]]:
    """The trajectory as each set of the run has it.

    Raises:
        InputError: no set is of this name, or none has this trajectory.
    """
    sets = [s for s in run.sets if config.set in (None, s.name)]
    if not sets:
        raise InputError(
            f"--set {config.set}: {run.folder} has {', '.join(s.name for s in run.sets) or 'none'}"
        )
    found = []
    for source in sets:
        first = min(_wanted(source, config.id), key=lambda t: t.sample, default=None)
        if first is not None:
            found.append((source, first, source.grade(first, shared_grader())))
    if not found:
        raise InputError(f"--id {config.id}: no trajectory of this problem and sample in {run.folder}")
    return found


def _wanted(source: TrajectorySet, name: str) -> Iterator[Trajectory]:
    """The trajectories that the name may mean: a problem id may itself end in a colon and a number."""
    problem_id, _, sample = name.rpartition(":")
    for trajectory in source.trajectories():
        is_sample = sample.isdecimal() and (trajectory.problem_id, trajectory.sample) == (
            problem_id,
            int(sample),
        )
        if trajectory.problem_id == name or is_sample:
            yield trajectory


def _pieces(trajectory: Trajectory, names: Sequence[str]) -> dict[int, Piece] | None:
    """
    Returns:
        None without a tokenizer on this machine that reads these tokens as their text says.
    """
    tokenizer = load_local_tokenizer(names)
    if tokenizer is None or not fits(tokenizer, [(s.ids, s.text) for s in trajectory.actions]):
        return None
    return token_pieces(tokenizer, set(trajectory.input_ids))


if __name__ == "__main__":
    raise SystemExit(main())
