"""Give trajectories to others: runs of recipes.generate as one Parquet file, or as a data set on the hub.

    python -m recipes.export --trajectories runs/train --out train.parquet
    python -m recipes.export --trajectories runs/a runs/b --push_to_hub me/my-trajectories --private

A row is a trajectory with its messages, its exact token ids, the mask and log-probs of those that the model wrote,
what its code printed, and why it ended; with --no_grade left out, also with the gold answer, its own and the verdict.
A trajectory that several runs share is written once; runs that differ in one are refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.export import GRADE_COLUMNS, Merge, Row, export_rows, to_row
from data.problems import read_problems
from mtpo.cli import run_recipe
from mtpo.errors import InputError
from mtpo.trajectory import Problem, Trajectory
from recipes.label import BATCH, grade_trajectories


@dataclass(frozen=True, kw_only=True)
class Config:
    """Give trajectories to others, as a Parquet file or as a data set on the hub."""

    trajectories: list[str] = field(metadata={"help": "folders of recipes.generate"})
    out: str | None = field(default=None, metadata={"help": "FILE.parquet, which must not exist"})
    push_to_hub: str | None = field(default=None, metadata={"help": "OWNER/NAME of the data set"})
    private: bool = field(default=False, metadata={"help": "make a new data set on the hub private"})
    grade: bool = field(default=True, metadata={"help": "add gold answers and verdicts"})
    workers: int = field(default=2, metadata={"help": "processes for the answers that need algebra"})

    def __post_init__(self) -> None:
        if self.out is None and self.push_to_hub is None:
            raise InputError("nothing to do: expected --out FILE.parquet, --push_to_hub OWNER/NAME, or both")
        if self.out is not None and not self.out.endswith(".parquet"):
            raise InputError(f"--out must end in .parquet, got {self.out!r}")
        if self.private and self.push_to_hub is None:
            raise InputError("--private has no effect without --push_to_hub")


def main(argv: Sequence[str] | None = None) -> int:
    return run_recipe(Config, export, "recipes.export", argv)


def export(config: Config) -> str:
    parquet = None if config.out is None else Path(config.out)
    if parquet is not None and parquet.exists():
        raise InputError(f"--out {parquet} exists: take another name")
    runs = [Path(run) for run in config.trajectories]
    problems = read_all_problems(runs) if config.grade else {}
    merge = Merge([run / "trajectories" for run in runs])
    if parquet is not None:
        parquet.parent.mkdir(parents=True, exist_ok=True)
    num_rows = export_rows(
        graded_rows(merge, problems, config.workers),
        parquet=parquet,
        hub_name=config.push_to_hub,
        is_private=config.private,
    )
    places = [str(parquet)] * (parquet is not None)
    places += [f"https://huggingface.co/datasets/{config.push_to_hub}"] * (config.push_to_hub is not None)
    return (
        f"{num_rows} trajectories in {' and '.join(places)} ({merge.num_duplicates} duplicates and "
        f"{merge.num_replaced_faults} replaced faults left out)"
    )


def read_all_problems(runs: Sequence[Path]) -> dict[str, Problem]:
    """The problems of all runs by their ids.

    Raises:
        InputError: two runs mean different problems by one id, or a run has no problems.
    """
    problems: dict[str, Problem] = {}
    for run in runs:
        for problem in read_problems(run / "problems.jsonl"):
            if problems.setdefault(problem.id, problem) != problem:
                raise InputError(
                    f"{run / 'problems.jsonl'}: problem {problem.id!r} is another one than in the runs before"
                )
    return problems


def graded_rows(
    trajectories: Iterable[Trajectory], problems: Mapping[str, Problem], workers: int
) -> Iterator[Row]:
    """A row a trajectory; with its grade, unless there are no problems."""
    source = iter(trajectories)
    while batch := list(itertools.islice(source, BATCH)):
        if not problems:
            yield from map(to_row, batch)
            continue
        for trajectory, verdict in grade_trajectories(batch, problems.values(), workers=workers):
            gold = problems[trajectory.problem_id].answer
            grade = zip(GRADE_COLUMNS, (gold, verdict.answer, verdict.verdict), strict=True)
            yield to_row(trajectory) | dict(grade)


if __name__ == "__main__":
    raise SystemExit(main())
