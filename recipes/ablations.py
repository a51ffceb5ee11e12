"""Compare ways to train on the tiny task: equal sampling budgets, learning rates chosen for each on dev, several seeds.

    python -m recipes.ablations --arms recipes/configs/ablations/claims.yaml --out runs/claims

An arms file names the arms by their options of recipes.iterate, or of recipes.online where the method is one of its
own; what all arms, all offline or all online ones share; and the learning rates to choose from, at the top or in any of
these places. The others are compared with the first arm:

    learning_rates: [1.0e-4, 3.0e-4, 1.0e-3]
    common: {batch_size: 16}
    offline: {iterations: 2, prompts: 200, samples: 8}
    online: {prompts: 1600}
    arms:
      M-DPO: {method: dpo}
      single-turn DPO: {method: dpo, mask: none}
      Nash-MD: {method: nash_md}

Every seed has a supervised model of its own, from which all arms start. Each arm's learning rate is the one with the
best accuracy on dev problems over the tuning seeds; only then are its final policies tested, on problems that nothing
was chosen by. An online run that stops itself ends with the best of its checkpoints, and the table says so.
OUT/results.json has every figure, OUT/table.md the table, OUT/accuracy.png the picture. What is done is kept, and
--workers runs go on side by side.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml

from data.generated import problems
from data.problems import write_problems
from eval.evaluate import correct_by_problem
from eval.metrics import Interval, bootstrap_interval, wilson_interval
from mtpo.cli import run_recipe
from mtpo.errors import GuardError, InputError
from mtpo.models import holds_model
from mtpo.runs import RunFolder, read_json, write_json
from mtpo.training.online_methods import ONLINE_METHODS
from mtpo.trajectory import Problem
from recipes.engines import Sampler
from recipes.evaluate import evaluate_into
from recipes.generate import SamplingOptions
from recipes.iterate import LoopOptions, Sets, run_loop
from recipes.online import Config as OnlineConfig
from recipes.online import train_policy as train_online_policy
from recipes.quickstart import PROMPTS_A_SEED, PROMPTS_START, supervised
from sandbox.confine import die_with

SECTIONS = {"learning_rates", "common", "offline", "online", "arms"}
"""Of an arms file."""

Correct = Mapping[str, bool]
"""Whether the greedy answer was right, by problem."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compare ways to train on the tiny task: equal sampling budgets, tuned learning rates, several seeds."""

    arms: str = field(metadata={"help": "YAML file of the arms"})
    out: str = field(metadata={"help": "run folder"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "of the final runs"})
    tuning_seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "of the runs that choose the learning rates"}
    )
    dev: int = field(default=100, metadata={"help": "problems for choosing"})
    test: int = field(default=300, metadata={"help": "held-out problems"})
    demonstrations: int = field(default=16_000, metadata={"help": "for the supervised model of each seed"})
    workers: int = field(default=2, metadata={"help": "runs side by side; each takes one core"})
    resume: bool = field(default=False, metadata={"help": "go on with an interrupted comparison"})

    def __post_init__(self) -> None:
        for name in ("dev", "test", "demonstrations", "workers"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seeds", "tuning_seeds"):
            if not getattr(self, name) or len(set(getattr(self, name))) < len(getattr(self, name)):
                raise InputError(f"--{name} must be one or more different numbers, got {getattr(self, name)}")


@dataclass(frozen=True)
class Arms:
    """What is compared: options by name of the arm, in order, and the learning rates of each."""

    options: Mapping[str, Mapping[str, Any]]
    learning_rates: Mapping[str, Sequence[float]]

    @classmethod
    def read(cls, path: str) -> Arms:
        """
        Raises:
            InputError: there is no such file, it is not of the form above, or an arm's options are refused.
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"--arms {path}: no such file") from None
        except yaml.YAMLError as error:
            raise InputError(f"--arms {path}: not YAML: {error}") from None
        if not isinstance(content, dict) or set(content) - SECTIONS or "arms" not in content:
            raise InputError(
                f"--arms {path}: expected arms, and of {', '.join(sorted(SECTIONS))} what they need"
            )
        rates, options = {}, {}
        for name, own in content["arms"].items():
            own = dict(own or {})
            kind = "online" if is_online(own) else "offline"
            options[name] = {**content.get("common", {}), **content.get(kind, {}), **own}
            rates[name] = options[name].pop("learning_rates", content.get("learning_rates", []))
            if not rates[name]:
                raise InputError(f"--arms {path}, arm {name!r}: there is no learning rate to choose from")
            try:
                for rate in rates[name]:
                    arm_options(options[name], rate, seed=0)
            except (InputError, TypeError) as error:
                raise InputError(f"--arms {path}, arm {name!r}: {error}") from None
        return cls(options, rates)


@dataclass(frozen=True)
class Job:
    """One arm trained from one seed's supervised model with one learning rate."""

    out: Path
    seed: int
    arm: str
    options: Mapping[str, Any]
    learning_rate: float
    config: Config

    @property
    def folder(self) -> Path:
        name = "".join(c if c.isalnum() else "_" for c in self.arm)
        return self.out / f"seed_{self.seed}" / name / f"lr_{self.learning_rate:g}"

    @property
    def run_options(self) -> Mapping[str, Any]:
        """With the cache that all arms share: most of their code is the same."""
        return {"execution_cache": str(self.out / "executions.sqlite"), **self.options}


def main(argv: Sequence[str] | None = None) -> int:
    return run_recipe(Config, compare_arms, "recipes.ablations", argv)


def compare_arms(config: Config) -> str:
    arms = Arms.read(config.arms)
    folder = RunFolder.open(
        config.out, config, resume=config.resume, may_change=frozenset({"workers", "arms"})
    )
    write_json(
        folder.path / "arms.json",
        {"options": dict(arms.options), "learning_rates": dict(arms.learning_rates)},
    )
    with ProcessPoolExecutor(
        config.workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=die_with,  # or a run that goes on would meet those that the killed one left behind
        initargs=(os.getpid(), signal.SIGKILL),
    ) as pool:
        results = run_all(folder.path, arms, config, lambda function, jobs: list(pool.map(function, jobs)))
    write_json(folder.path / "results.json", results)
    table = as_table(results)
    (folder.path / "table.md").write_text(table + "\n", encoding="utf-8")
    draw(results, folder.path / "accuracy.png")
    folder.finish({"arms": {name: result["accuracy"] for name, result in results["arms"].items()}})
    print(table)
    return f"{len(arms.options)} arms over {len(config.seeds)} seeds in {folder.path}"


Map = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]


def run_all(out: Path, arms: Arms, config: Config, run_each: Map) -> dict[str, Any]:
    """Supervised models, then the learning rates, then the final runs and their tests: all figures as JSON."""
    seeds = sorted({*config.seeds, *config.tuning_seeds})
    run_each(train_supervised, [(out, seed, config.demonstrations) for seed in seeds])

    def job(seed: int, arm: str, rate: float) -> Job:
        return Job(out, seed, arm, arms.options[arm], rate, config)

    trials = [(arm, rate) for arm, rates in arms.learning_rates.items() for rate in rates]
    tuning = [job(seed, arm, rate) for arm, rate in trials for seed in config.tuning_seeds]
    dev: dict[str, dict[float, list[float]]] = {arm: {} for arm in arms.options}
    for trial, accuracy in zip(tuning, run_each(train_arm, tuning), strict=True):
        dev[trial.arm].setdefault(trial.learning_rate, []).append(accuracy)
    chosen = {arm: max(rates, key=lambda rate: (fmean(rates[rate]), -rate)) for arm, rates in dev.items()}

    final = [job(seed, arm, chosen[arm]) for arm in arms.options for seed in config.seeds]
    run_each(train_arm, final)
    tested = run_each(arm_answers, final)
    starts = run_each(start_answers, [job(seed, next(iter(arms.options)), 0.0) for seed in config.seeds])
    by_arm: dict[str, list[Correct]] = {arm: [] for arm in arms.options}
    for trial, correct in zip(final, tested, strict=True):
        by_arm[trial.arm].append(correct)
    subjects = {problem.id: str(problem.subject) for problem in problems("test", config.test)}
    stopped = {f"{trial.arm}, seed {trial.seed}": why for trial in final if (why := why_stopped(trial))}
    return {**summarize(by_arm, starts, chosen, dev, subjects), "stopped": stopped}


def summarize(
    by_arm: Mapping[str, Sequence[Correct]],
    starts: Sequence[Correct],
    chosen: Mapping[str, float],
    dev: Mapping[str, Mapping[float, Sequence[float]]],
    subjects: Mapping[str, str],
) -> dict[str, Any]:
    """Accuracies with intervals, of all problems and of each subject, and differences from the first arm.

    The interval of a difference draws problems again, with all seeds of a problem together, so that it holds for these
    seeds' supervised models and says nothing about others.
    """
    baseline = next(iter(by_arm.values()))
    arms = {}
    for arm, runs in by_arm.items():
        differences = _mean_by_problem(runs, baseline)
        arms[arm] = {
            "learning_rate": chosen[arm],
            "dev": {f"{rate:g}": list(values) for rate, values in dev[arm].items()},
            **_accuracies(runs, subjects),
            "difference": fmean(differences),
            "difference_interval": bootstrap_interval(differences)
            if any(differences)
            else Interval(0.0, 0.0),
        }
    return {"start": _accuracies(starts, subjects), "arms": arms}


def as_table(results: Mapping[str, Any]) -> str:
    """Markdown: a row an arm, in %."""
    seeds = len(results["start"]["by_seed"])
    lines = [
        f"| arm | learning rate | accuracy, mean of {seeds} | by seed | difference from the first arm |",
        "|---|---|---|---|---|",
    ]
    rows: Iterable[tuple[str, Any]] = [("before", results["start"]), *results["arms"].items()]
    for name, row in rows:
        low, high = (100 * x for x in row["interval"])
        by_seed = ", ".join(f"{100 * x:.1f}" for x in row["by_seed"])
        rate, difference = "-", "-"
        if "learning_rate" in row:
            rate = f"{row['learning_rate']:g}"
        if name not in ("before", next(iter(results["arms"]))):
            a, b = (100 * x for x in row["difference_interval"])
            difference = f"{100 * row['difference']:+.1f} [{a:+.1f}, {b:+.1f}]"
        lines.append(
            f"| {name} | {rate} | {100 * row['accuracy']:.1f} [{low:.1f}, {high:.1f}] | {by_seed} | {difference} |"
        )
    for name, why in results.get("stopped", {}).items():
        lines.append(f"\n{name}, stopped itself and was tested with the best of its checkpoints: {why}")
    return "\n".join(lines)


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Accuracy of each arm with its interval, and a dot for each seed.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("the picture needs matplotlib, pip install 'mtpo[report]'") from error
    rows = [("before", results["start"]), *results["arms"].items()]
    figure = Figure(figsize=(7, 0.8 + 0.38 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, (_, row) in enumerate(rows):
        low, high = row["interval"]
        color = "#777777" if place == 0 else "#0072b2"
        axes.plot([100 * low, 100 * high], [place, place], color=color, linewidth=2)
        axes.plot([100 * row["accuracy"]], [place], "o", color=color)
        axes.plot(
            [100 * x for x in row["by_seed"]], [place] * len(row["by_seed"]), "|", color=color, markersize=9
        )
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel("greedy accuracy on held-out problems, %")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)


def train_supervised(task: tuple[Path, int, int]) -> None:
    """The supervised model of one seed, unless it is there."""
    out, seed, num_demonstrations = task
    torch.set_num_threads(1)
    supervised(out / f"seed_{seed}" / "sft", num_demonstrations, seed)


def train_arm(job: Job) -> float:
    """Accuracy on dev of what the arm ends with; trained only if it is not there."""
    torch.set_num_threads(1)
    _check_options(job)
    selected = _selected(job)
    if not selected.exists():
        if is_online(job.options):
            _train_online(job, selected)
        else:
            options = loop_options(job.run_options, job.learning_rate, job.seed)
            run_loop(job.folder, _start(job), _sets(job, options), options, name="SFT")
    found = read_json(selected)
    return found["dev"][found["checkpoint"]]


def arm_answers(job: Job) -> dict[str, bool]:
    """Which held-out problems the arm's last policy answers."""
    return _answers(job, job.folder / "test", read_json(_selected(job))["model"])


def why_stopped(job: Job) -> str | None:
    """What a run that stopped itself said."""
    return read_json(_selected(job)).get("stopped")


def start_answers(job: Job) -> dict[str, bool]:
    """Which held-out problems the supervised model answers."""
    return _answers(job, job.out / f"seed_{job.seed}" / "test", _start(job))


def is_online(options: Mapping[str, Any]) -> bool:
    return options.get("method") in ONLINE_METHODS


def arm_options(options: Mapping[str, Any], learning_rate: float, seed: int) -> LoopOptions | OnlineConfig:
    """What an arm's recipe would be told, checked.

    Raises:
        InputError: it refuses a value.
        TypeError: it has no such option, or lacks one.
    """
    if is_online(options):
        return online_config(options, learning_rate, seed, model="", problems="", out="")
    return loop_options(options, learning_rate, seed)


def loop_options(options: Mapping[str, Any], learning_rate: float, seed: int) -> LoopOptions:
    """As `recipes.iterate` takes them."""
    return LoopOptions(**options, learning_rate=learning_rate, seed=seed)


def online_config(options: Mapping[str, Any], learning_rate: float, seed: int, **places: Any) -> OnlineConfig:
    """As `recipes.online` takes it; `prompts`, which is no option of it, says how many problems there are."""
    own: dict[str, Any] = {name: value for name, value in options.items() if name != "prompts"}
    return OnlineConfig(**own, **places, learning_rate=learning_rate, seed=seed, resume=True)


def _train_online(job: Job, selected: Path) -> None:
    prompts = job.folder / "prompts.jsonl"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    write_problems(prompts, _prompts(job, job.options["prompts"]))
    places: dict[str, Any] = {
        "model": _start(job),
        "problems": str(prompts),
        "out": str(job.folder / "train"),
    }
    stopped = None
    try:
        train_online_policy(online_config(job.run_options, job.learning_rate, job.seed, **places))
    except GuardError as error:
        stopped = str(error)
    models = sorted(path for path in (job.folder / "train").glob("*") if holds_model(path))
    if not models:
        raise GuardError(f"{job.folder}: {stopped}")
    dev = {}
    for model in models:
        dev[model.name] = fmean(
            _graded(
                job, job.folder / "dev" / model.name, str(model), problems("dev", job.config.dev)
            ).values()
        )
    best = max(dev, key=lambda name: (dev[name], name == "model"))
    found = {"model": str(job.folder / "train" / best), "checkpoint": best, "dev": dev, "stopped": stopped}
    write_json(selected, found)


def _check_options(job: Job) -> None:
    """
    Raises:
        InputError: what is in the job's folder was made with other options, under the same name of an arm.
    """
    path, options = job.folder / "options.json", json.loads(json.dumps(dict(job.options)))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, options)
    elif (before := read_json(path)) != options:
        raise InputError(f"{job.folder}: arm {job.arm!r} was trained with {before}, not {options}: rename it")


def _selected(job: Job) -> Path:
    """What says which model the arm ends with, once it has."""
    last = "" if is_online(job.options) else f"iteration_{job.options['iterations']}"
    return job.folder / last / "selected.json"


def _answers(job: Job, folder: Path, model: str) -> dict[str, bool]:
    torch.set_num_threads(1)
    kept = folder / "correct.json"
    if not kept.exists():
        write_json(kept, _graded(job, folder, model, problems("test", job.config.test)))
    return json.loads(kept.read_text(encoding="utf-8"))


def _graded(job: Job, folder: Path, model: str, wanted: Sequence[Problem]) -> dict[str, bool]:
    """Whether the model's greedy answers are right."""
    names = {option.name for option in fields(SamplingOptions)}
    shared = {name: value for name, value in job.run_options.items() if name in names}
    options = SamplingOptions(**shared | {"temperature": 0.0, "samples": 1})
    sampler = Sampler.load(model, options, "float32")
    _, graded = evaluate_into(
        folder, sampler, wanted, options, seed=job.seed, label=f"{job.arm}, {folder.name}"
    )
    return correct_by_problem(graded)


def _start(job: Job) -> str:
    return str(job.out / f"seed_{job.seed}" / "sft" / "model")


def _sets(job: Job, options: LoopOptions) -> Sets:
    prompts = _prompts(job, options.iterations * options.prompts)
    return Sets(prompts, problems("dev", job.config.dev), problems("test", job.config.test))


def _prompts(job: Job, count: int) -> list[Problem]:
    return problems("train", count, PROMPTS_START + job.seed * PROMPTS_A_SEED)


def _mean_by_problem(runs: Sequence[Correct], baseline: Sequence[Correct]) -> list[float]:
    pairs = list(zip(runs, baseline, strict=True))
    return [fmean(run[name] - base[name] for run, base in pairs) for name in runs[0]]


def _accuracies(runs: Sequence[Correct], subjects: Mapping[str, str]) -> dict[str, Any]:
    """Of one policy a seed."""
    by_subject = {
        subject: _pooled([{name: run[name] for name in run if subjects[name] == subject} for run in runs])
        for subject in sorted(set(subjects.values()))
    }
    return {"by_seed": [fmean(run.values()) for run in runs], **_pooled(runs), "by_subject": by_subject}


def _pooled(runs: Sequence[Correct]) -> dict[str, Any]:
    """Runs that answered equally many problems."""
    num_correct, num = sum(sum(run.values()) for run in runs), sum(len(run) for run in runs)
    return {"accuracy": num_correct / num, "interval": wilson_interval(num_correct, num)}


if __name__ == "__main__":
    raise SystemExit(main())
