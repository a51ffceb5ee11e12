"""Sample trajectories of a model that works with a code interpreter.

    python -m recipes.generate --model google/gemma-2-2b-it --problems gsm8k:train --samples 8 --out runs/train

OUT/problems.jsonl holds the problems, OUT/trajectories/ the journal: one checksummed line a trajectory, written
as soon as it is finished. After a crash, the same command with --resume samples what is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

from tqdm import tqdm

from data.problems import load_problems, write_problems
from data.trajectories import Journal, summarize
from mtpo.branching import Branching, BranchingTree
from mtpo.cli import run_recipe
from mtpo.cluster import connect
from mtpo.environment import Interpreter
from mtpo.errors import InputError
from mtpo.grader import grade
from mtpo.rollout import Decoding, RolloutLimits, rollout
from mtpo.runs import RunFolder
from mtpo.trajectory import Problem, Trajectory
from recipes.engines import EngineOptions, Sampler
from sandbox import TOKEN_VARIABLE, InterpreterPool, Limits, RemoteInterpreter
from sandbox.cache import CachingInterpreter, ExecutionCache
from sandbox.cluster import ClusterInterpreter
from sandbox.layers import Policy

OF_THE_OWN_SANDBOX = ("memory_mb", "preload", "kernels", "isolation", "ray_pools")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(EngineOptions):
    """How trajectories are sampled, whatever they are sampled for."""

    samples: int = field(default=8, metadata={"help": "trajectories per problem"})
    temperature: float = field(default=1.0, metadata={"help": "0 takes the most likely token"})
    top_p: float = field(
        default=1.0, metadata={"help": "keep the most likely tokens of this total probability"}
    )
    top_k: int = field(default=0, metadata={"help": "keep this many most likely tokens; 0 keeps all"})
    min_p: float = field(default=0.0, metadata={"help": "drop tokens below this share of the likeliest one"})
    max_turns: int = field(default=6, metadata={"help": "model turns of one trajectory"})
    max_turn_tokens: int = field(default=512, metadata={"help": "sampled tokens of one turn"})
    max_tokens: int | None = field(default=None, metadata={"help": "sampled tokens of one trajectory"})
    tool_timeout_s: float = field(default=5.0, metadata={"help": "seconds that one code block may run"})
    memory_mb: int = field(
        default=1024, metadata={"help": "memory that the code of one interpreter may take"}
    )
    preload: list[str] = field(
        default_factory=lambda: ["numpy", "sympy"],
        metadata={
            "help": "modules that interpreters have imported before they start; what code imports is free"
        },
    )
    kernels: int = field(default=16, metadata={"help": "interpreters alive at once"})
    isolation: str = field(
        default="available",
        metadata={"help": "full refuses to run code behind less; available warns of what is missing; none"},
    )
    sandbox_url: str | None = field(
        default=None,
        metadata={
            "help": f"use `python -m sandbox serve` there, with its limits; its token is ${TOKEN_VARIABLE}"
        },
    )
    execution_cache: str | None = field(
        default=None,
        metadata={
            "help": "file, shared by any number of runs, that remembers what code did: it then runs once in each state"
        },
    )
    max_in_flight: int = field(default=64, metadata={"help": "trajectories under way at once"})

    branch_turn: list[int] = field(
        default_factory=list,
        metadata={
            "help": "turn, from 0, at which blocks of samples part; each part parts again at a further turn"
        },
    )
    branch_width: list[int] = field(
        default_factory=lambda: [2],
        metadata={"help": "parts of a block, with --branch_turn; one for all turns, or one each"},
    )
    system: str | None = field(
        default=None, metadata={"help": "instructions for the model, before the question"}
    )
    max_seconds: float | None = field(
        default=None, metadata={"help": "wall seconds after which a trajectory takes no further turn"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("branch_turn", "branch_width"):  # a YAML file may hold anything
            if not isinstance(getattr(self, name), list):
                raise InputError(f"--{name} must be a list, as [1], got {getattr(self, name)!r}")
        if not self.branch_turn and self.branch_width != [2]:
            raise InputError("--branch_width has no effect without --branch_turn")
        if self.samples % BranchingTree(self.branching).width:
            widths = " x ".join(str(branching.width) for branching in self.branching)
            raise InputError(f"--samples ({self.samples}) must be a multiple of --branch_width ({widths})")
        for name in ("samples", "max_turns", "max_turn_tokens", "kernels", "max_in_flight"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in ("temperature", "top_k", "min_p"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top_p must be above 0 and at most 1, got {self.top_p}")
        if self.isolation not in get_args(Policy):
            raise InputError(f"--isolation must be one of {get_args(Policy)}, got {self.isolation!r}")
        if self.sandbox_url is not None:
            refuse_idle(self, OF_THE_OWN_SANDBOX, "with --sandbox_url: the service has its own")
        if self.tool_timeout_s <= 0:
            raise InputError(f"--tool_timeout_s must be positive, got {self.tool_timeout_s}")

    @property
    def decoding(self) -> Decoding:
        return Decoding(self.temperature, self.top_p, self.top_k, self.min_p)

    @property
    def limits(self) -> RolloutLimits:
        return RolloutLimits(
            self.max_turns,
            self.max_turn_tokens,
            self.max_tokens,
            self.tool_timeout_s,
            max_seconds=self.max_seconds,
        )

    @property
    def branching(self) -> tuple[Branching, ...]:
        turns, widths = self.branch_turn, self.branch_width
        if len(widths) not in (1, len(turns)):
            raise InputError(
                f"--branch_width must be one number, or one for each --branch_turn, got {widths}"
            )
        return tuple(map(Branching, turns, widths if len(widths) == len(turns) else widths * len(turns)))


@dataclass(frozen=True, kw_only=True)
class Config(SamplingOptions):
    """Sample trajectories of a model that works with a code interpreter."""

    model: str = field(metadata={"help": "model name or folder"})
    problems: str = field(
        metadata={"help": "gsm8k:train, math:test, math500, generated:train, FILE.jsonl, HUB:SPLIT"}
    )
    out: str = field(metadata={"help": "run folder"})
    limit: int | None = field(default=None, metadata={"help": "first problems only"})
    first_sample: int = field(default=0, metadata={"help": "index of the first sample of each problem"})
    dtype: str = field(default="float32", metadata={"help": "float32, or bfloat16 to halve the memory"})
    attention: str | None = field(default=None, metadata={"help": "attention; by default an exact one"})
    seed: int = field(default=0, metadata={"help": "fixes every draw"})
    resume: bool = field(default=False, metadata={"help": "go on with an interrupted run"})


SPEED_ONLY = frozenset(
    {
        *("kernels", "max_in_flight", "preload", "isolation", "sandbox_url", "engine", "engine_args", "urls"),
        *("ray", "ray_engines", "ray_gpus", "ray_pools", "execution_cache"),
    }
)
"""Options that change no trajectory, so that a run may be resumed with others."""


def main(argv: Sequence[str] | None = None) -> int:
    return run_recipe(Config, generate, "recipes.generate", argv)


def generate(config: Config) -> str:
    problems = load_problems(config.problems, config.limit, strict=False)
    sampler = Sampler.load(config.model, config, config.dtype, config.attention)
    folder = RunFolder.open(config.out, config, resume=config.resume, may_change=SPEED_ONLY)
    tally = sample_into(
        folder.path,
        sampler,
        problems,
        config,
        seed=config.seed,
        first_sample=config.first_sample,
    )
    folder.finish(tally)
    return f"{tally['trajectories']} trajectories on {len(problems)} problems in {folder.path}: {tally['stop_reasons']}"


def sample_into(
    folder: Path,
    sampler: Sampler,
    problems: Sequence[Problem],
    options: SamplingOptions,
    *,
    seed: int,
    name: str | None = None,
    iteration: int = 0,
    samples: int | None = None,
    first_sample: int = 0,
    label: str = "trajectories",
) -> dict[str, Any]:
    """Sample what `folder` lacks of `samples` trajectories of each problem, in this process.

    Returns:
        Counts over all that the folder then holds: trajectories, stop reasons, tool calls, tokens sampled.
    """
    samples = options.samples if samples is None else samples
    write_problems(folder / "problems.jsonl", problems)
    with Journal(folder / "trajectories") as journal:
        wanted = {(p.id, s) for p in problems for s in range(first_sample, first_sample + samples)}
        missing = len(wanted - journal.done())
        if missing:
            progress = _Progress(missing, label)
            work = _sample(
                sampler, problems, journal, options, progress,
                seed=seed, policy=name or sampler.name, iteration=iteration, samples=samples,
                first_sample=first_sample,
            )  # fmt: skip
            with progress:
                asyncio.run(work)
    return summarize(folder / "trajectories").counts()


async def _sample(
    sampler: Sampler,
    problems: Sequence[Problem],
    journal: Journal,
    options: SamplingOptions,
    progress: _Progress,
    **names: Any,
) -> None:
    engine = sampler.engine(options, options.max_in_flight)
    golds = {problem.id: problem.answer for problem in problems}
    try:
        async with open_interpreter(options) as interpreter:
            with _interruptible(progress) as is_stopping:
                trajectories = rollout(
                    engine,
                    interpreter,
                    sampler.chat,
                    problems,
                    decoding=options.decoding,
                    limits=options.limits,
                    system=options.system,
                    skip=journal.done(),
                    max_in_flight=options.max_in_flight,
                    branching=options.branching,
                    is_stopping=is_stopping,
                    **names,
                )
                async with contextlib.aclosing(trajectories):
                    async for trajectory in trajectories:
                        journal.append(trajectory)
                        progress.add(trajectory, await asyncio.to_thread(_is_correct, trajectory, golds))
                if is_stopping():
                    raise KeyboardInterrupt
    finally:
        await engine.aclose()


@contextlib.contextmanager
def _interruptible(progress: _Progress) -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C ask for an orderly end; the second is one as ever."""
    loop, is_asked = asyncio.get_running_loop(), asyncio.Event()

    def ask() -> None:
        is_asked.set()
        loop.remove_signal_handler(signal.SIGINT)
        progress.say("finishing what is in flight; Ctrl-C again leaves it unfinished")

    if threading.current_thread() is threading.main_thread():
        loop.add_signal_handler(signal.SIGINT, ask)
    try:
        yield is_asked.is_set
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _is_correct(trajectory: Trajectory, golds: Mapping[str, str]) -> bool:
    response = trajectory.actions[-1].text if trajectory.actions else ""
    return grade(response, golds[trajectory.problem_id]).verdict == "correct"


@contextlib.asynccontextmanager
async def open_interpreter(options: SamplingOptions) -> AsyncIterator[Interpreter]:
    """What runs the code: the sandbox of this machine, those of a Ray cluster, or a service; with its cache, if any.

    Raises:
        InputError: the service's token is not in the environment, or the cache is no such file.
    """
    async with _sandbox(options) as interpreter:
        if options.execution_cache is None:
            yield interpreter
            return
        with contextlib.closing(
            ExecutionCache(options.execution_cache, scope=f"{options.memory_mb} MiB")
        ) as cache:
            yield CachingInterpreter(interpreter, cache)


def _sandbox(options: SamplingOptions) -> InterpreterPool | RemoteInterpreter | ClusterInterpreter:
    if options.sandbox_url is None:
        make = partial(
            InterpreterPool,
            Limits(memory_mb=options.memory_mb),
            size=options.kernels,
            preload=tuple(options.preload),
            isolation=cast(Policy, options.isolation),
        )
        if options.ray is None:
            return make()
        connect(options.ray)
        return ClusterInterpreter(make, options.ray_pools, {"num_cpus": 1})
    if TOKEN_VARIABLE not in os.environ:
        raise InputError(f"--sandbox_url needs the service's token in the environment, as {TOKEN_VARIABLE}")
    return RemoteInterpreter(options.sandbox_url, os.environ[TOKEN_VARIABLE])


def refuse_idle(options: Any, names: Collection[str], why: str) -> None:
    """
    Raises:
        InputError: one of these options of a config is not what it is by default, although it has no effect.
    """
    for option in fields(options):
        default = option.default_factory() if callable(option.default_factory) else option.default
        if option.name in names and getattr(options, option.name) != default:
            raise InputError(f"--{option.name} has no effect {why}")


class _Progress:
    """A bar that appears after two seconds: trajectories, tokens and tool calls a second, the share of correct
    ones, faults, time left."""

    def __init__(self, total: int, label: str) -> None:
        self._bar = tqdm(total=total, desc=label, unit="traj", delay=2, smoothing=0.1)
        self._started = time.monotonic()
        self._counts: Counter[str] = Counter()

    def say(self, text: str) -> None:
        self._bar.write(text, file=sys.stderr)

    def add(self, trajectory: Trajectory, is_correct: bool) -> None:
        self._counts["all"] += 1
        self._counts["correct"] += is_correct
        self._counts["tokens"] += trajectory.num_action_tokens
        self._counts["calls"] += len(trajectory.executions)
        self._counts["faults"] += trajectory.fault is not None
        seconds = max(time.monotonic() - self._started, 1e-6)
        rates = {f"{name}/s": f"{self._counts[name] / seconds:.0f}" for name in ("tokens", "calls")}
        share = f"{self._counts['correct'] / self._counts['all']:.0%}"
        self._bar.set_postfix(rates | {"correct": share, "faults": self._counts["faults"]}, refresh=False)
        self._bar.update()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()


if __name__ == "__main__":
    raise SystemExit(main())
