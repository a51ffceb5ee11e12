"""Measure a model on a problem set, greedy by default or with several samples a problem; or score what others sampled.

    python -m recipes.evaluate --model runs/dpo/model --problems gsm8k:test --out runs/eval --compare runs/eval-sft
    python -m recipes.evaluate --trajectories outputs.jsonl.gz --problems math500 --out runs/theirs

OUT/metrics.json holds every figure, OUT/predictions.jsonl the answer and verdict of every trajectory; `eval/README.md`
has their fields. --compare adds paired tests against earlier evaluations of the same problems, and OUT/comparison.md
with the problems that changed. --trajectories takes a run folder or a file of others, in any form that `data.imports`
reads, and needs no model; without --problems, the gold answers are those that come with it. For a file, OUT/README.md
says what was scored, and where the sources' own flags of correctness are wrong.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from data.problems import load_problems, write_problems
from data.trajectories import read_trajectories
from eval.comparison import Comparison, Run, compare_runs, comparison_page, shared_problems
from eval.contamination import Contamination, find_contamination
from eval.evaluate import Evaluation, metrics, summarize
from eval.lineage import Lineage, lineage_of
from eval.metrics import PairedTest, paired_test
from eval.predictions import by_problem, is_equivalent, predictions_of
from eval.report import write_report
from eval.sources import Sources, compare_flags, match_problems, readme
from mtpo.cli import run_recipe
from mtpo.errors import InputError
from mtpo.grader import STRICT, TIMEOUT_S, GradingOptions
from mtpo.runs import RunFolder, write_json, write_jsonl
from mtpo.trajectory import Problem
from recipes.engines import Sampler
from recipes.generate import SPEED_ONLY, SamplingOptions, sample_into
from recipes.label import Graded, grade_trajectories
from recipes.outputs import Outputs, copy_into, read_outputs


@dataclass(frozen=True, kw_only=True)
class Config(SamplingOptions, GradingOptions):
    """Measure a model on a problem set, or score outputs of others."""

    model: str | None = field(default=None, metadata={"help": "model name or folder"})
    problems: str | None = field(
        default=None,
        metadata={"help": "gsm8k:test, math:test, math500, generated:test, FILE.jsonl, HUB:SPLIT"},
    )
    out: str = field(metadata={"help": "run folder"})
    limit: int | None = field(default=None, metadata={"help": "first problems only"})
    samples: int = field(default=1, metadata={"help": "trajectories per problem"})
    temperature: float = field(default=0.0, metadata={"help": "0 takes the most likely token"})
    trajectories: str | None = field(
        default=None, metadata={"help": "score these and sample nothing: a run folder, or a file of others"}
    )
    flags: list[str] = field(
        default_factory=list,
        metadata={"help": "fields of a file of others with its own verdicts; by default the usual names"},
    )
    compare: list[str] = field(default_factory=list, metadata={"help": "evaluations to compare with"})
    train_problems: list[str] = field(
        default_factory=list,
        metadata={"help": "problem sets to look for in --problems; by default what the run folders name"},
    )
    dtype: str = field(default="float32", metadata={"help": "float32, or bfloat16 to halve the memory"})
    attention: str | None = field(default=None, metadata={"help": "attention; by default an exact one"})
    seed: int = field(default=0, metadata={"help": "fixes every draw"})
    resume: bool = field(default=False, metadata={"help": "go on with an interrupted run"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model is None) == (self.trajectories is None):
            raise InputError("expected --model to sample from, or --trajectories to score: one of the two")
        if self.model is not None and self.problems is None:
            raise InputError("--model needs --problems")
        if self.limit is not None and self.problems is None:
            raise InputError("--limit has no effect without --problems")
        if self.flags and self.trajectories is None:
            raise InputError("--flags has no effect without --trajectories")
        if self.trajectories is not None:
            self._check_that_nothing_is_sampled()

    def _check_that_nothing_is_sampled(self) -> None:
        of_sampling = {option.name for option in fields(SamplingOptions)} - {"tokenizer"}
        for option in fields(self):
            if option.name in of_sampling | {"dtype", "attention"}:
                default = option.default_factory() if callable(option.default_factory) else option.default
                if getattr(self, option.name) != default:
                    raise InputError(f"--{option.name} has no effect with --trajectories: nothing is sampled")


def main(argv: Sequence[str] | None = None) -> int:
    return run_recipe(Config, run_evaluation, "recipes.evaluate", argv)


def run_evaluation(config: Config) -> str:
    earlier = [Run.read(folder) for folder in config.compare]
    training = {spec: load_problems(spec, strict=False) for spec in config.train_problems}
    lineage = Lineage(training) if training else None
    if config.trajectories is None:
        folder, results = _evaluate_model(config, earlier, lineage)
    else:
        folder, results = _score(
            config, read_outputs(config.trajectories, config.tokenizer), earlier, lineage
        )
    print(results.table())
    accuracy = results.evaluation.accuracy
    paired = {c.before: {k: v for k, v in c.to_json().items() if k != "changed"} for c in results.comparisons}
    folder.finish({"accuracy": accuracy.value, "paired": paired})
    write_report(folder.path)
    figures = folder.path / "metrics.json"
    return f"accuracy {str(accuracy).strip()} on {accuracy.num_problems} problems; all figures in {figures}"


@dataclass(frozen=True)
class Results:
    """What an evaluation found."""

    graded: Graded
    evaluation: Evaluation
    contamination: Contamination
    comparisons: list[Comparison]
    sources: Sources | None

    def table(self) -> str:
        return "\n".join([self.evaluation.table(), self.contamination.table(), *map(str, self.comparisons)])


def _evaluate_model(
    config: Config, earlier: Sequence[Run], lineage: Lineage | None
) -> tuple[RunFolder, Results]:
    problems = load_problems(str(config.problems), config.limit, strict=False)
    _check_comparable(earlier, problems, config.grading)
    sampler = Sampler.load(str(config.model), config, config.dtype, config.attention)
    folder = _open(config)
    sample_into(folder.path, sampler, problems, config, seed=config.seed, label="evaluating")
    lineage = lineage or lineage_of(sampler.name)
    return folder, conclude(folder.path, problems, lineage, earlier, grading=config.grading)


def _score(
    config: Config, outputs: Outputs, earlier: Sequence[Run], lineage: Lineage | None
) -> tuple[RunFolder, Results]:
    problems = outputs.problems
    if config.problems is not None:
        problems = load_problems(config.problems, config.limit, strict=False)
    _check_comparable(earlier, problems, config.grading)
    matched = match_problems(outputs.trajectories, outputs.problems, problems)
    if not matched:
        raise InputError(
            f"--trajectories {outputs.source}: none is on a problem of --problems {config.problems}"
        )
    folder = _open(config)
    write_problems(folder.path / "problems.jsonl", problems)
    copy_into(folder.path, matched)
    num_other = len(outputs.trajectories) - len(matched)
    sources = Sources(str(outputs.source), outputs.num_records, outputs.num_refused, num_other, {})
    results = conclude(
        folder.path,
        problems,
        lineage or outputs.lineage(),
        earlier,
        sources=None if outputs.source.is_dir() else sources,
        flags=config.flags,
        grading=config.grading,
    )
    if results.sources is not None:
        problems_from = config.problems or "those in the file"
        text = readme(results.sources, results.table(), problems_from, _grader(config.grading))
        (folder.path / "README.md").write_text(text, encoding="utf-8")
    return folder, results


def conclude(
    folder: Path,
    problems: Sequence[Problem],
    lineage: Lineage,
    earlier: Sequence[Run] = (),
    *,
    sources: Sources | None = None,
    flags: Sequence[str] = (),
    grading: GradingOptions = STRICT,
) -> Results:
    """Grade the trajectories in the folder, and write `predictions.jsonl`, `metrics.json` and, with earlier runs,
    `comparison.md`."""
    graded = grade_trajectories(read_trajectories(folder / "trajectories"), problems, options=grading)
    predictions = predictions_of(graded, problems, functools.partial(is_equivalent, options=grading))
    run = Run(str(folder), {p.id: p for p in problems}, by_problem(predictions), _grader(grading))
    comparisons = compare_runs([(before, run) for before in earlier])
    if sources is not None:
        records = {(t.problem_id, t.sample): t.metadata for t, _ in graded}
        sources = dataclasses.replace(
            sources, flags=compare_flags(predictions, records, is_equivalent, flags)
        )
    contamination = find_contamination(problems, lineage.known, lineage.unknown)
    results = Results(graded, summarize(predictions, problems), contamination, comparisons, sources)
    write_jsonl(folder / "predictions.jsonl", (prediction.to_json() for prediction in predictions))
    if comparisons:
        page = comparison_page(comparisons, run.problems)
        (folder / "comparison.md").write_text(page, encoding="utf-8")
    found = metrics(
        results.evaluation,
        grader=_grader(grading),
        contamination=contamination.to_json(),
        comparisons=[comparison.to_json() for comparison in comparisons],
        sources=None if sources is None else sources.to_json(),
    )
    write_json(folder / "metrics.json", found | {"table": results.table()})
    return results


def evaluate_into(
    folder: Path,
    sampler: Sampler,
    problems: Sequence[Problem],
    options: SamplingOptions,
    **names: Any,
) -> tuple[Evaluation, Graded]:
    """Sample what is missing, grade, and write `metrics.json` and `predictions.jsonl` into the folder.

    Returns:
        The figures, and what they were computed from.
    """
    sample_into(folder, sampler, problems, options, **names)
    results = conclude(folder, problems, lineage_of(sampler.name))
    return results.evaluation, results.graded


def compare(before: dict[str, bool], after: dict[str, bool]) -> PairedTest:
    """A paired test on the problems that both have; an environment fault in either leaves a problem out.

    Raises:
        InputError: they have no problem in common.
    """
    shared = sorted(before.keys() & after.keys())
    if not shared:
        raise InputError("the evaluations have no problem in common")
    return paired_test([before[i] for i in shared], [after[i] for i in shared])


def _open(config: Config) -> RunFolder:
    may_change = SPEED_ONLY | {"compare", "train_problems"}
    return RunFolder.open(config.out, config, resume=config.resume, may_change=may_change)


def _check_comparable(earlier: Sequence[Run], problems: Sequence[Problem], grading: GradingOptions) -> None:
    """Refuse, before anything is sampled, an earlier run that could not be compared with."""
    for before in earlier:
        shared_problems(before, Run("this run", {p.id: p for p in problems}, {}, _grader(grading)))


def _grader(grading: GradingOptions) -> dict[str, Any]:
    """How answers are graded, for the files of results; runs that differ in it are not compared."""
    return {**dataclasses.asdict(grading), "timeout_s": TIMEOUT_S}


if __name__ == "__main__":
    raise SystemExit(main())
