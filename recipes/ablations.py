"""Compare ways to train on the tiny task: equal sampling budgets, learning rates chosen for each on dev, several seeds.

    python -m recipes.ablations --arms recipes/configs/ablations/claims.yaml --out runs/claims

An arms file names the arms by their options of recipes.iterate, what all of them share, and the learning rates to
choose from. The first arm is the one that the others are compared with:

    learning_rates: [3.0e-5, 1.0e-4, 3.0e-4]
    common: {iterations: 2, prompts: 200, samples: 8}
    arms:
      M-DPO: {method: dpo}
      single-turn DPO: {method: dpo, mask: none}

Every seed has a supervised model of its own, from which all arms start. Each arm's learning rate is the one with the
best accuracy on dev problems over the tuning seeds; only then are its final policies tested, on problems that nothing
was chosen by. OUT/results.json has every figure, OUT/table.md the table, OUT/accuracy.png the picture. What is done is
kept, and --workers runs go on side by side.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml

from data.generated import problems
from eval.evaluate import correct_by_problem
from eval.metrics import Interval, bootstrap_interval, wilson_interval
from mtpo.cli import run_recipe
from mtpo.errors import InputError
from mtpo.runs import RunFolder, read_json, write_json
from recipes.engines import Sampler
from recipes.evaluate import evaluate_into
from recipes.iterate import LoopOptions, Sets, run_loop
from recipes.quickstart import PROMPTS_A_SEED, PROMPTS_START, supervised

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
        if not isinstance(content, dict) or set(content) != {"learning_rates", "common", "arms"}:
            raise InputError(f"--arms {path}: expected learning_rates, common and arms")
        rates, options = {}, {}
        for name, own in content["arms"].items():
            own = dict(own or {})
            rates[name] = own.pop("learning_rates", content["learning_rates"])
            options[name] = {**content["common"], **own}
            try:
                for rate in rates[name]:
                    loop_options(options[name], rate, seed=0)
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


def main(argv: Sequence[str] | None = None) -> int:
    return run_recipe(Config, compare_arms, "recipes.ablations", argv)


def compare_arms(config: Config) -> str:
    arms = Arms.read(config.arms)
    folder = RunFolder.open(config.out, config, resume=config.resume, may_change=frozenset({"workers"}))
    write_json(
        folder.path / "arms.json",
        {"options": dict(arms.options), "learning_rates": dict(arms.learning_rates)},
    )
    with ProcessPoolExecutor(config.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
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
    return summarize(by_arm, starts, chosen, dev)


def summarize(
    by_arm: Mapping[str, Sequence[Correct]],
    starts: Sequence[Correct],
    chosen: Mapping[str, float],
    dev: Mapping[str, Mapping[float, Sequence[float]]],
) -> dict[str, Any]:
    """Accuracies with intervals, and differences from the first arm.

    The interval of a difference draws problems again, with all seeds of a problem together, so that it holds for these
    seeds' supervised models and says nothing about others.
    """
    baseline = next(iter(by_arm.values()))
    arms = {}
    for arm, runs in by_arm.items():
        accuracies = [fmean(run.values()) for run in runs]
        differences = _mean_by_problem(runs, baseline)
        arms[arm] = {
            "learning_rate": chosen[arm],
            "dev": {f"{rate:g}": list(values) for rate, values in dev[arm].items()},
            "accuracy": fmean(accuracies),
            "by_seed": accuracies,
            "interval": _pooled_interval(runs),
            "difference": fmean(differences),
            "difference_interval": bootstrap_interval(differences)
            if any(differences)
            else Interval(0.0, 0.0),
        }
    before = [fmean(run.values()) for run in starts]
    return {
        "start": {"accuracy": fmean(before), "by_seed": before, "interval": _pooled_interval(starts)},
        "arms": arms,
    }


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
        if "difference" in row:
            rate = f"{row['learning_rate']:g}"
            a, b = (100 * x for x in row["difference_interval"])
            difference = f"{100 * row['difference']:+.1f} [{a:+.1f}, {b:+.1f}]"
        lines.append(
            f"| {name} | {rate} | {100 * row['accuracy']:.1f} [{low:.1f}, {high:.1f}] | {by_seed} | {difference} |"
        )
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
    options = loop_options(job.options, job.learning_rate, job.seed)
    policies = run_loop(job.folder, _start(job), _sets(job, options), options, name="SFT")
    selected = read_json(Path(policies[-1].model).parents[1] / "selected.json")
    return selected["dev"][selected["checkpoint"]]


def arm_answers(job: Job) -> dict[str, bool]:
    """Which held-out problems the arm's last policy answers."""
    selected = read_json(job.folder / f"iteration_{job.options['iterations']}" / "selected.json")
    return _answers(job, job.folder / "test", selected["model"])


def start_answers(job: Job) -> dict[str, bool]:
    """Which held-out problems the supervised model answers."""
    return _answers(job, job.out / f"seed_{job.seed}" / "test", _start(job))


def loop_options(options: Mapping[str, Any], learning_rate: float, seed: int) -> LoopOptions:
    """As `recipes.iterate` takes them."""
    return LoopOptions(**options, learning_rate=learning_rate, seed=seed)


def _answers(job: Job, folder: Path, model: str) -> dict[str, bool]:
    torch.set_num_threads(1)
    kept = folder / "correct.json"
    if not kept.exists():
        options = replace(loop_options(job.options, 1e-4, job.seed), temperature=0.0, samples=1)
        sampler = Sampler.load(model, options, options.dtype, options.attention)
        _, graded = evaluate_into(
            folder,
            sampler,
            problems("test", job.config.test),
            options,
            seed=job.seed,
            label=f"test, {job.arm}",
        )
        write_json(kept, correct_by_problem(graded))
    return json.loads(kept.read_text(encoding="utf-8"))


def _start(job: Job) -> str:
    return str(job.out / f"seed_{job.seed}" / "sft" / "model")


def _sets(job: Job, options: LoopOptions) -> Sets:
    first = PROMPTS_START + job.seed * PROMPTS_A_SEED
    prompts = problems("train", options.iterations * options.prompts, first)
    return Sets(prompts, problems("dev", job.config.dev), problems("test", job.config.test))


def _mean_by_problem(runs: Sequence[Correct], baseline: Sequence[Correct]) -> list[float]:
    pairs = list(zip(runs, baseline, strict=True))
    return [fmean(run[name] - base[name] for run, base in pairs) for name in runs[0]]


def _pooled_interval(runs: Sequence[Correct]) -> Interval:
    return wilson_interval(sum(sum(run.values()) for run in runs), sum(len(run) for run in runs))


if __name__ == "__main__":
    raise SystemExit(main())
