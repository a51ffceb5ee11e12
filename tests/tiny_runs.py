"""Run folders as the recipes leave them, with a tokenizer of bytes and trajectories written out by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.problems import write_problems
from data.trajectories import Journal
from mtpo.runs import write_json, write_jsonl
from mtpo.trajectory import Execution, Problem, Segment, StopReason, Trajectory
from tests.tiny_tokenizers import make_tokenizer

TOKENIZER = make_tokenizer("qwen2_5")
APPLES = Problem("toy/0", "Ann has 2 apples and buys 3. How many?", "5", "1", "sum")
PEARS = Problem("toy/1", "A pear costs 4 €. What do 2 pears cost?", "8", "2", "cost")


def attempt(
    problem: Problem,
    sample: int,
    *turns: str | Execution,
    stop: StopReason = StopReason.ANSWERED,
    **names: Any,
) -> Trajectory:
    """What the model wrote and what it read, in turn; the k-th sampled token of a turn has log-prob -k / 10."""
    segments = [Segment("prompt", _ids(f"user: {problem.question}\n"), None, problem.question)]
    for turn in turns:
        if isinstance(turn, Execution):
            segments.append(Segment("observation", _ids(f"\noutput: {turn.text}\n"), None, turn.text))
        else:
            ids = (*_ids(turn), TOKENIZER.eos_token_id)
            logps = tuple(-place / 10 for place in range(1, len(ids) + 1))
            segments.append(Segment("action", ids, logps, turn))
    executions = tuple(turn for turn in turns if isinstance(turn, Execution))
    return Trajectory(problem.id, sample, tuple(segments), stop, executions, **names)


def write_set(folder: Path, problems: Sequence[Problem], trajectories: Sequence[Trajectory]) -> None:
    """What recipes.generate leaves: problems and journal."""
    write_problems(folder / "problems.jsonl", problems)
    with Journal(folder / "trajectories") as journal:
        for trajectory in trajectories:
            journal.append(trajectory)


def write_run(folder: Path, trajectories: Sequence[Trajectory], **options: Any) -> Path:
    """A run of recipes.generate on both problems, whose model has a tokenizer."""
    write_set(folder, [APPLES, PEARS], trajectories)
    TOKENIZER.save_pretrained(folder / "model")
    write_json(folder / "config.json", {"options": {"model": str(folder / "model")} | options})
    return folder


def write_pairs(file: Path, *pairs: tuple[Trajectory, Trajectory]) -> None:
    """Rows of recipes.label."""
    rows = []
    for chosen, rejected in pairs:
        row: dict[str, Any] = {"problem_id": chosen.problem_id}
        for side, trajectory in (("chosen", chosen), ("rejected", rejected)):
            row |= {
                f"{side}_sample": trajectory.sample,
                f"{side}_input_ids": trajectory.input_ids,
                f"{side}_completion_mask": trajectory.completion_mask,
            }
        rows.append(row)
    write_jsonl(file, rows)


def write_log(folder: Path, num_steps: int = 4) -> None:
    """What training on pairs logs."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = [
        {"step": n, "loss": 0.7 - n / 100, "margin": n / 50, "accuracy": 0.5, "grad_norm": 1.0,
         "logratio/chosen": n / 20, "logratio/rejected": -n / 10}
        for n in range(1, num_steps + 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))


def _ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text, add_special_tokens=False))
