"""What a run folder holds that a report can show, whichever recipe made it.

A set is a folder with `problems.jsonl` and `trajectories/`: the run itself, or any folder in it. A label or training
run names the folders that its rows came from in its `config.json`; they are read too where they still exist.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data.problems import read_problems
from data.trajectories import Key, read_trajectories, summarize
from mtpo.errors import InputError
from mtpo.grader import Grade, Grader
from mtpo.runs import read_json
from mtpo.trajectory import Problem, Trajectory

logger = logging.getLogger(__name__)

ROW_FILES = ("pairs.jsonl", "binary.jsonl", "sft.jsonl")
BATCH = 256
"""Trajectories graded at a time."""


@dataclass(frozen=True)
class TrajectorySet:
    """The trajectories of one policy on one problem set."""

    name: str
    """Where it is in its run, for example `test/SFT/greedy`; the run's own name for the run itself."""
    run: str
    """The run's name."""
    folder: Path
    grades: Path | None = None
    """A file of verdicts that a label stage wrote."""

    @cached_property
    def problems(self) -> dict[str, Problem]:
        return {problem.id: problem for problem in read_problems(self.folder / "problems.jsonl")}

    @cached_property
    def num_trajectories(self) -> int:
        return summarize(self.folder / "trajectories").num_trajectories

    def graded(self, grader: Grader) -> Iterator[tuple[Trajectory, Grade]]:
        """Every trajectory with the verdict that the run recorded, or, where there is none, the grader's.

        Raises:
            InputError: the journal is corrupt, or a trajectory is of a problem that `problems.jsonl` lacks.
        """
        trajectories = self.trajectories()
        while batch := list(itertools.islice(trajectories, BATCH)):
            yield from zip(batch, self._grades_of(batch, grader), strict=True)

    def trajectories(self) -> Iterator[Trajectory]:
        """As the journal has them."""
        return read_trajectories(self.folder / "trajectories")

    def grade(self, trajectory: Trajectory, grader: Grader) -> Grade:
        """The verdict on one trajectory, as `graded` gives it."""
        return self._grades_of([trajectory], grader)[0]

    def _grades_of(self, batch: Sequence[Trajectory], grader: Grader) -> list[Grade]:
        missing = [t for t in batch if (t.problem_id, t.sample) not in self._recorded]
        pairs = [(t.actions[-1].text if t.actions else "", self.problem_of(t).answer) for t in missing]
        new = {(t.problem_id, t.sample): g for t, g in zip(missing, grader.grade_many(pairs), strict=True)}
        return [new.get(key) or self._recorded[key] for key in ((t.problem_id, t.sample) for t in batch)]

    def problem_of(self, trajectory: Trajectory) -> Problem:
        """
        Raises:
            InputError: `problems.jsonl` lacks it.
        """
        if trajectory.problem_id not in self.problems:
            raise InputError(
                f"{self.folder}: a trajectory is of problem {trajectory.problem_id!r}, "
                "which is not in problems.jsonl"
            )
        return self.problems[trajectory.problem_id]

    @cached_property
    def _recorded(self) -> dict[Key, Grade]:
        found: dict[Key, Grade] = {}
        for path in (self.grades, self.folder / "predictions.jsonl"):
            if path is not None and path.exists():
                for row in _json_lines(path):
                    found[row["problem_id"], row["sample"]] = _grade_of(row)
        return found


@dataclass(frozen=True)
class TrainingLog:
    """The steps of one training run."""

    name: str
    steps: list[dict[str, float]]

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values, of the steps that have this figure."""
        points = [(step["step"], step[key]) for step in self.steps if isinstance(step.get(key), (int, float))]
        return [x for x, _ in points], [y for _, y in points]


@dataclass(frozen=True)
class Run:
    """Everything of a run folder, and of the folders that its rows came from."""

    name: str
    folder: Path
    config: dict[str, Any]
    """The options of the recipe; empty where there is no `config.json`."""
    sets: list[TrajectorySet]
    logs: list[TrainingLog]
    row_files: list[Path]
    """Files of training rows, as `mtpo.batches` describes them."""
    notes: list[str]
    """What could not be read, a sentence each."""

    @property
    def tokenizers(self) -> list[str]:
        """Names and folders where the run's tokenizer may be, the likeliest first."""
        named = [self.config.get("tokenizer"), self.config.get("model")]
        for options in map(_options, {s.folder for s in self.sets} | {p.parent for p in self.row_files}):
            named += [options.get("tokenizer"), options.get("model")]
        inside = sorted(str(path.parent) for path in self.folder.rglob("tokenizer_config.json"))
        return list(dict.fromkeys([name for name in named if isinstance(name, str)] + inside))


def read_run(folder: str | Path) -> Run:
    """
    Raises:
        InputError: there is no such folder, or nothing in it that a report could show.
    """
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"{path}: no such run folder")
    name, notes = path.resolve().name, []
    config = _options(path)
    sets = find_sets(path, name)
    row_files = sorted((p for n in ROW_FILES for p in path.rglob(n)), key=lambda p: _order(p, path))
    for data in _listed(config.get("data")):
        row_files += [p for n in ROW_FILES if (p := Path(data) / n).exists()] or [
            p for p in [Path(data)] if p.suffix == ".jsonl" and p.exists()
        ]
        if not Path(data).exists():
            notes.append(f"The training rows are not at {data} any more.")
    sources = _trajectory_sources(path, config)
    grades = next((p for f in row_files if (p := f.parent / "grades.jsonl").exists()), None)
    for source in sources:
        if source.is_dir():
            known = {s.folder.resolve() for s in sets}
            own_grades = (
                grades if len(sources) == 1 else None
            )  # those of several folders may share their keys
            sets += [s for s in find_sets(source, source.name, own_grades) if s.folder.resolve() not in known]
        else:
            notes.append(f"The labelled trajectories are not a run folder at {source}; rows stand for them.")
    logs = list(_training_logs(path))
    if not sets and not logs and not row_files:
        raise InputError(f"{path}: holds no trajectories, no training rows and no training log")
    return Run(name, path, config, sets, logs, row_files, notes)


def find_sets(folder: Path, run: str, grades: Path | None = None) -> list[TrajectorySet]:
    """The sets in a folder: those of a test first, then iteration by iteration."""
    found = [p.parent for p in folder.rglob("problems.jsonl") if any(p.parent.glob("trajectories/0*.jsonl*"))]
    return [
        TrajectorySet(
            str(place.relative_to(folder)) if place != folder else run,
            run,
            place,
            next((p for p in (place.parent / "labels" / "grades.jsonl",) if p.exists()), grades),
        )
        for place in sorted(found, key=lambda place: _order(place, folder))
    ]


def _order(path: Path, folder: Path) -> list[tuple[int, str]]:
    """Sorts `iteration_10` after `iteration_9`, and both after whatever is of no iteration."""
    parts = path.relative_to(folder).parts
    numbers = [re.fullmatch(r"iteration_(\d+)", part) for part in parts]
    return [(int(n[1]) if n else 0, part) for n, part in zip(numbers, parts, strict=True)]


def _training_logs(folder: Path) -> Iterator[TrainingLog]:
    for path in sorted(folder.rglob("metrics.jsonl"), key=lambda p: _order(p, folder)):
        steps = [row for row in _json_lines(path) if "step" in row and "loss" in row]
        if steps:
            place = path.parent.relative_to(folder)
            yield TrainingLog(
                str(place).removesuffix("/train") if place.parts else folder.resolve().name, steps
            )


def _trajectory_sources(folder: Path, config: dict[str, Any]) -> list[Path]:
    """Where the label stage that this run is, or trained on, took its trajectories."""
    options = [config, *(_options(Path(data)) for data in _listed(config.get("data")))]
    return list(dict.fromkeys(Path(s) for o in options for s in _listed(o.get("trajectories"))))


def _options(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return read_json(path).get("options", {}) if path.exists() else {}


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [v for v in value or () if isinstance(v, str)]


def _grade_of(row: dict[str, Any]) -> Grade:
    """From a line of `grades.jsonl`, or of `predictions.jsonl`, which names the outcome instead."""
    outcome = row.get("outcome", "")
    verdict = row.get("verdict") or (
        "correct" if outcome == "correct" else "ungraded" if outcome.startswith("ungraded") else "wrong"
    )
    return Grade(verdict, row.get("answer"), row.get("rule", ""))


def _json_lines(path: Path) -> Iterable[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                if line.endswith("\n"):
                    raise InputError(f"{path}, line {number}: not JSON: {error.msg}") from None
                logger.warning("%s, line %d: left out a torn line", path, number)
