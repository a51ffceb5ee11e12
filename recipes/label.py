"""Grade trajectories and make training rows of them: pairs, binary labels, or correct ones only.

    python -m recipes.label --trajectories runs/train --kind pairs --out runs/pairs

--trajectories takes folders made by recipes.generate, and files of others (.jsonl, .jsonl.gz: message lists, or flat
text with ```python and ```output fences), which --tokenizer renders into ids. OUT/pairs.jsonl (binary.jsonl,
sft.jsonl) holds the rows, OUT/grades.jsonl the verdict on every trajectory and the rule that gave it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from data.imports import import_file
from data.labels import LabelCounts, make_binary, make_pairs, make_sft
from data.problems import read_problems
from data.trajectories import read_trajectories
from mtpo.chat import ChatFormat
from mtpo.cli import run_recipe
from mtpo.errors import InputError
from mtpo.grader import STRICT, WORKERS, Grade, GradingOptions, shared_grader
from mtpo.models import load_tokenizer
from mtpo.runs import RunFolder, write_jsonl
from mtpo.trajectory import Problem, Trajectory

Kind = Literal["pairs", "binary", "sft"]
Graded = list[tuple[Trajectory, Grade]]
BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Config:
    """Grade trajectories and make training rows of them."""

    trajectories: list[str] = field(metadata={"help": "folders of recipes.generate, or files of others"})
    out: str = field(metadata={"help": "run folder"})
    kind: Kind = field(default="pairs", metadata={"help": "pairs, binary labels, or sft (correct ones only)"})
    per_problem: int = field(
        default=1, metadata={"help": "pairs of a problem; for binary, labels of each class"}
    )
    max_tokens: int | None = field(default=None, metadata={"help": "leave out longer trajectories"})
    keep_ignored_errors: bool = field(
        default=False, metadata={"help": "keep correct trajectories whose last tool output is an error"}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "renders files of others into ids"})
    accept_joined: bool = field(
        default=False,
        metadata={"help": 'where a gold answer is the last of several boxes ("5 or 7"), accept them all too'},
    )
    paper_tolerance: bool = field(
        default=False, metadata={"help": "let numbers differ as in the grader of arXiv 2409.02392"}
    )
    workers: int = field(default=WORKERS, metadata={"help": "processes for the answers that need algebra"})
    seed: int = field(default=0, metadata={"help": "fixes which pairs are drawn"})
    resume: bool = field(default=False, metadata={"help": "go on with an interrupted run"})

    def __post_init__(self) -> None:
        if self.per_problem < 1:
            raise InputError(f"--per_problem must be at least 1, got {self.per_problem}")
        if self.workers < 1:
            raise InputError(f"--workers must be at least 1, got {self.workers}")

    @property
    def grading(self) -> GradingOptions:
        """Without `last_sentence`: only a box earns a label."""
        return GradingOptions(accept_joined=self.accept_joined, paper_tolerance=self.paper_tolerance)


def main(argv: Sequence[str] | None = None) -> int:
    return run_recipe(Config, label, "recipes.label", argv)


def label(config: Config) -> str:
    graded: Graded = []
    for source in config.trajectories:
        problems, trajectories = read_source(source, config.tokenizer)
        graded += grade_trajectories(trajectories, problems, workers=config.workers, options=config.grading)
    folder = RunFolder.open(config.out, config, resume=config.resume, may_change=frozenset({"workers"}))
    counts = write_rows(
        folder.path,
        graded,
        config.kind,
        per_problem=config.per_problem,
        seed=config.seed,
        max_tokens=config.max_tokens,
        drop_ignored_errors=not config.keep_ignored_errors,
        options=config.grading,
    )
    print(counts.table())
    folder.finish(dataclasses.asdict(counts) | {"grading": config.grading.names})
    return f"{counts.num_rows} rows in {folder.path / f'{config.kind}.jsonl'}"


def read_source(source: str, tokenizer: str | None) -> tuple[list[Problem], list[Trajectory]]:
    """The problems and trajectories of a run folder, or of a file of others.

    Raises:
        InputError: it is neither, a file of others comes without a tokenizer, or none of it can be imported.
    """
    path = Path(source)
    if path.is_dir():
        return read_problems(path / "problems.jsonl"), list(read_trajectories(path / "trajectories"))
    if tokenizer is None:
        raise InputError(
            f"--trajectories {path} is not a folder of recipes.generate; a file of others needs --tokenizer"
        )
    chat = ChatFormat.for_tokenizer(load_tokenizer(tokenizer))
    imported = import_file(path, chat)
    return imported.problems, imported.trajectories


def grade_trajectories(
    trajectories: Iterable[Trajectory],
    problems: Iterable[Problem],
    *,
    workers: int = WORKERS,
    options: GradingOptions = STRICT,
) -> Graded:
    """Each trajectory with the verdict on its last turn. Tool output and earlier turns cannot give the answer.

    Raises:
        InputError: a trajectory is of a problem that is not among `problems`.
    """
    golds = {problem.id: options.golds(problem) for problem in problems}
    listed = list(trajectories)
    for trajectory in listed:
        if trajectory.problem_id not in golds:
            raise InputError(
                f"a trajectory is of problem {trajectory.problem_id!r}, which is not in problems.jsonl"
            )
    pairs = [(t.actions[-1].text if t.actions else "", golds[t.problem_id]) for t in listed]
    grader = shared_grader(workers=workers, options=options)
    grades: list[Grade] = []
    for start in tqdm(range(0, len(pairs), BATCH), desc="grading", unit_scale=BATCH, unit="traj", delay=2):
        grades += grader.grade_many(pairs[start : start + BATCH])
    return list(zip(listed, grades, strict=True))


def write_rows(
    folder: Path,
    graded: Graded,
    kind: Kind,
    *,
    per_problem: int = 1,
    seed: int = 0,
    max_tokens: int | None = None,
    drop_ignored_errors: bool = True,
    options: GradingOptions = STRICT,
) -> LabelCounts:
    """Write `grades.jsonl`, which names the options of grading, and the rows of one kind to `KIND.jsonl`.

    Raises:
        InputError: there would be no row; says why.
    """
    write_jsonl(folder / "grades.jsonl", (_grade_row(t, g, options) for t, g in graded))
    makers: dict[Kind, Callable[..., tuple[list[dict[str, Any]], LabelCounts]]] = {
        "pairs": make_pairs,
        "binary": make_binary,
        "sft": make_sft,
    }
    rows, counts = makers[kind](
        graded, per_problem, seed, max_tokens, drop_ignored_errors=drop_ignored_errors
    )
    if reason := counts.why_empty():
        raise InputError(reason)
    write_jsonl(folder / f"{kind}.jsonl", rows)
    return counts


def _grade_row(trajectory: Trajectory, verdict: Grade, options: GradingOptions) -> dict[str, Any]:
    return {
        "problem_id": trajectory.problem_id,
        "sample": trajectory.sample,
        "verdict": verdict.verdict,
        "rule": verdict.rule,
        "answer": verdict.answer,
        "grading": options.names,
        "stop_reason": trajectory.stop_reason.value,
    }


if __name__ == "__main__":
    raise SystemExit(main())
