"""Trajectories that are there already, ours or of others, as an evaluation takes them over."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.imports import import_file
from data.problems import read_problems
from data.trajectories import Journal, read_trajectories
from eval.lineage import Lineage, lineage_of
from mtpo.chat import ChatFormat
from mtpo.errors import InputError
from mtpo.models import load_tokenizer
from mtpo.runs import read_json
from mtpo.trajectory import Problem, Trajectory
from recipes.tiny import train_tokenizer


@dataclass(frozen=True)
class Outputs:
    """What a run folder or a file of others holds."""

    source: Path
    problems: list[Problem]
    """As the source names them."""
    trajectories: list[Trajectory]
    num_refused: int = 0
    """Records of a file that could not be imported."""

    @property
    def num_records(self) -> int:
        return len(self.trajectories) + self.num_refused

    def lineage(self) -> Lineage:
        """What trained the models behind the outputs, as far as a run folder tells."""
        config = self.source / "config.json"
        model = read_json(config)["options"].get("model") if config.exists() else None
        if model is None:
            return Lineage(unknown=[f"{self.source}: what its models were trained on"])
        return lineage_of(model)


def read_outputs(source: str, tokenizer: str | None) -> Outputs:
    """The trajectories of a run folder, or of a file in any form that `data.imports` reads.

    Without a tokenizer the ids of a file's trajectories are those of its bytes. They are marked as made from text, so
    that no token is counted and nothing is trained on them.

    Raises:
        InputError: it is neither, or none of it can be imported.
    """
    path = Path(source)
    if path.is_dir():
        if tokenizer is not None:
            raise InputError(
                "--tokenizer has no effect with a run folder, whose trajectories have their tokens"
            )
        problems = read_problems(path / "problems.jsonl")
        return Outputs(path, problems, list(read_trajectories(path / "trajectories")))
    chat = ChatFormat.for_tokenizer(load_tokenizer(tokenizer) if tokenizer else train_tokenizer([]))
    imported = import_file(path, chat)
    trajectories = [
        dataclasses.replace(t, policy=str(t.metadata.get("model", t.policy)), is_from_text=tokenizer is None)
        for t in imported.trajectories
    ]
    return Outputs(path, imported.problems, trajectories, len(imported.refused))


def copy_into(folder: Path, trajectories: Sequence[Trajectory]) -> None:
    """Put the trajectories into the folder's journal, but for those that it has already."""
    with Journal(folder / "trajectories") as journal:
        done = journal.done(retry_faults=False)
        for trajectory in trajectories:
            if (trajectory.problem_id, trajectory.sample) not in done:
                journal.append(trajectory)
