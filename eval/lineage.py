"""What a policy was trained on, as far as the run folders tell: from a model back to the problems.

A run's `config.json` names the model that it began with and its data; the data is a folder of recipes.label, whose
`config.json` names the trajectories, whose folder has the problems. Where the chain ends in something that is no run
folder, a published model say, that is told in words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.imports import read_foreign
from data.problems import read_problems
from mtpo.errors import InputError
from mtpo.runs import read_json
from mtpo.trajectory import Problem


@dataclass(frozen=True)
class Lineage:
    """The problems behind a policy."""

    known: dict[str, list[Problem]] = field(default_factory=dict)
    """By the file that holds them."""
    unknown: list[str] = field(default_factory=list)
    """In words, what could not be looked into."""


def lineage_of(model: str) -> Lineage:
    """Everything that is known to have trained a model, the models before it included.

    Args:
        model: name or folder, as given to a recipe. Paths in a run's config are taken as they stand there, so they
            are found from the folder in which that run was started.
    """
    lineage = Lineage()
    _trace_model(model, lineage, seen=set())
    return lineage


def _trace_model(model: str, lineage: Lineage, seen: set[str]) -> None:
    if model in seen:
        return
    seen.add(model)
    path = Path(model)
    run = _run_of(path) if path.is_dir() else None
    if run is None:
        lineage.unknown.append(f"{model}: no run folder says what it was trained on")
        return
    options = _options(run)
    for file in _problem_files(run, path):
        lineage.known[str(file)] = read_problems(file)
    data = options.get("data", [])
    for source in data if isinstance(data, list) else [data]:
        _trace_data(source, lineage, seen)
    if options.get("model") is not None:
        _trace_model(options["model"], lineage, seen)
    else:
        lineage.unknown.append(f"{run}: the demonstrations that its first policy was trained on")


def _run_of(model: Path) -> Path | None:
    """The run folder that holds a model; the training of an iteration is a part of the loop's run."""
    places = [p for p in [model, *model.parents] if not p.parent.name.startswith("iteration_")]
    return next((p for p in places if _options(p)), None)


def _problem_files(run: Path, model: Path) -> Iterator[Path]:
    """The problems sampled by recipes.iterate for a model of the loop: those of its iteration and of all before."""
    within = model.relative_to(run).parts
    name, _, number = within[0].partition("_") if within else ("", "", "")
    if name == "iteration" and number.isdecimal():
        for iteration in range(1, int(number) + 1):
            for policy in ("current", "previous"):
                file = run / f"iteration_{iteration}" / policy / "problems.jsonl"
                if file.exists():
                    yield file


def _trace_data(source: str, lineage: Lineage, seen: set[str]) -> None:
    """The problems of a label folder, of a file in one, of a run folder, or of a file of others."""
    if source in seen:
        return
    seen.add(source)
    path = Path(source)
    labels = _options(path if path.is_dir() else path.parent)
    if (path / "problems.jsonl").exists():
        lineage.known[str(path / "problems.jsonl")] = read_problems(path / "problems.jsonl")
    elif "trajectories" in labels:
        for trajectories in labels["trajectories"]:
            _trace_data(trajectories, lineage, seen)
    else:
        try:
            found = {foreign.problem.id: foreign.problem for foreign in read_foreign(path)}
        except InputError as error:
            lineage.unknown.append(f"{source}: {error}")
        else:
            lineage.known[source] = list(found.values())


def _options(folder: Path) -> dict[str, Any]:
    """The options in a run's `config.json`; empty for a folder that is no run's, such as a model's."""
    if not (folder / "config.json").exists():
        return {}
    record = read_json(folder / "config.json")
    return record.get("options", {}) if isinstance(record, dict) else {}
