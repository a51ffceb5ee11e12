"""Our rollout beside a turn-by-turn barrier, the embedded engine beside `generate`, and what the driver costs.

    python -m benchmarks.rollout [--parts barrier generate driver routing] [--engine transformers|vllm]

barrier: the same plans on the same engine in the real sandbox, each trajectory on its own against turn by turn.
generate: sampled tokens a second, against transformers' `generate` called for each turn; no sandbox.
driver: share of a core that 1,000 trajectories in flight take while engine and interpreter are asleep.
routing: how evenly sessions that stick to a server load the servers.

Comparisons alternate between the two for `--rounds` rounds; the better round of each counts, as it does for the
driver. Prints what was measured; exits with 1 if a bar is missed or a trajectory is not the planned one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.balance import report
from benchmarks.command import at_least, describe_machine
from benchmarks.driver import TURN_S, measure_driver
from benchmarks.loops import InProcess, play_freely, play_with_barriers, play_with_generate
from benchmarks.workload import (
    TOOL_MEDIAN_S,
    Plan,
    PlannedChat,
    check_trajectories,
    make_model,
    make_plans,
    make_tokenizer,
)
from mtpo.engines.transformers import TransformersEngine
from mtpo.rollout import Engine, Interpreter
from mtpo.trajectory import Trajectory
from sandbox import InterpreterPool

Play = Callable[[Engine, Interpreter, PlannedChat, Sequence[Plan]], Awaitable[list[Trajectory]]]
InterpreterMaker = Callable[[], AbstractAsyncContextManager[Interpreter]]

PARTS = ("barrier", "generate", "driver", "routing")
BARRIER_BAR, GENERATE_BAR, DRIVER_BAR = 1.8, 2.5, 0.05
VLLM_ARGS: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "gpu_memory_utilization": 0.2}
VLLM_ARGS |= {"max_model_len": 2048}
"""A compiled graph makes so small a model no faster, and takes 40 s to make."""


@dataclass(frozen=True, slots=True)
class Bar:
    name: str
    value: float
    bound: float
    is_upper: bool = False

    @property
    def is_held(self) -> bool:
        return self.value <= self.bound if self.is_upper else self.value >= self.bound

    def __str__(self) -> str:
        sign = "<=" if self.is_upper else ">="
        return (
            f"{'held  ' if self.is_held else 'MISSED'}  {self.name} {sign} {self.bound:g}: {self.value:.3g}"
        )


@dataclass(frozen=True, slots=True)
class Speed:
    num_tokens: int
    seconds: float
    cpu_s: float
    """Of this process, which is all of it without sandbox and vLLM."""

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    def __str__(self) -> str:
        return f"{self.seconds:7.1f} s, {self.cpu_s:6.1f} CPU s of this process, {self.tokens_per_s:6.0f} tokens/s"


@dataclass(frozen=True)
class Contest:
    """The same plans for everyone."""

    plans: Sequence[Plan]
    tokenizer: Any = field(default_factory=make_tokenizer)

    def timed(self, play: Play, make_engine: Callable[[], Engine], interpreter: InterpreterMaker) -> Speed:
        """How fast a loop plays the plans. Starting the engine and the sandbox is not counted.

        Raises:
            AssertionError: it does not play them as planned.
        """
        return asyncio.run(self._timed(play, make_engine(), interpreter))

    async def _timed(self, play: Play, engine: Engine, interpreter: InterpreterMaker) -> Speed:
        chat = PlannedChat.for_tokenizer(self.tokenizer)
        try:
            async with interpreter() as tools, tools.session() as session:
                await session.execute("1 + 1", 60.0)
                clock = Clock()
                trajectories = await play(engine, tools, chat, self.plans)
                speed = clock.speed(sum(t.num_action_tokens for t in trajectories))
        finally:
            await engine.aclose()
        check_trajectories(trajectories, self.plans)
        return speed

    def timed_generate(self, model: Any, batch_size: int) -> Speed:
        clock = Clock()
        chat = PlannedChat.for_tokenizer(self.tokenizer)
        return clock.speed(play_with_generate(model, chat, self.plans, batch_size))


class Clock:
    """Wall time and this process's CPU time since it was made."""

    def __init__(self) -> None:
        self._started, self._cpu_started = time.perf_counter(), time.process_time()

    def speed(self, num_tokens: int) -> Speed:
        return Speed(num_tokens, time.perf_counter() - self._started, time.process_time() - self._cpu_started)


def alternate(loops: dict[str, Callable[[], Speed]], rounds: int) -> dict[str, Speed]:
    """The fastest round of each loop."""
    best: dict[str, Speed] = {}
    for number in range(1, rounds + 1):
        for name, loop in loops.items():
            speed = loop()
            print(f"  round {number} of {rounds}: {name:30} {speed}", flush=True)
            best[name] = min(best.get(name, speed), speed, key=lambda s: s.seconds)
    return best


def compare_with_barrier(options: argparse.Namespace) -> Bar:
    """With the real sandbox, in which every trajectory has a session from the first call on."""
    contest = Contest(make_plans(options.trajectories, options.seed, options.max_tool_s))
    print(
        f"barrier: {len(contest.plans)} trajectories on {options.engine}, "
        f"{sum(turn.num_tokens for plan in contest.plans for turn in plan.turns)} tokens, tool time log-normal, "
        f"median {TOOL_MEDIAN_S} s, 99th percentile 10 s, cut at {options.max_tool_s:g} s"
    )
    pool = partial(InterpreterPool, size=1 + len(contest.plans), isolation=options.isolation)
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_maker(options.engine, Path(folder), len(contest.plans))
        best = alternate(
            {
                "ours": lambda: contest.timed(play_freely, engine, pool),
                "barrier": lambda: contest.timed(play_with_barriers, engine, pool),
            },
            options.rounds,
        )
    ratio = best["barrier"].seconds / best["ours"].seconds
    return Bar(f"wall time of the barrier on {options.engine}, times ours", ratio, BARRIER_BAR)


def engine_maker(name: str, folder: Path, num_sessions: int) -> Callable[[], Engine]:
    """Makes engines of one model, each of which has yet computed nothing."""
    model = make_model()
    if name == "transformers":
        return lambda: TransformersEngine(model, max_rows=num_sessions)
    from mtpo.engines.vllm import VLLMEngine

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
    model.save_pretrained(folder)
    return lambda: VLLMEngine(folder, max_num_seqs=num_sessions, **VLLM_ARGS)


def compare_with_generate(options: argparse.Namespace) -> Bar:
    """Nothing but generation: tools answer at once, in this process."""
    contest = Contest(make_plans(options.generate_trajectories, options.seed, max_tool_s=0.0))
    alone = Contest(contest.plans[: options.alone], contest.tokenizer)
    model = make_model()
    print(
        f"generate: {len(contest.plans)} trajectories, {torch.get_num_threads()} torch thread(s); "
        f"one at a time: the first {len(alone.plans)}"
    )

    def ours() -> Speed:
        engine = partial(TransformersEngine, model, max_rows=len(contest.plans))
        return contest.timed(play_freely, engine, InProcess)

    batched = f"generate, {options.batch} at a time"
    best = alternate(
        {
            "ours": ours,
            batched: lambda: contest.timed_generate(model, options.batch),
            "generate, one at a time": lambda: alone.timed_generate(model, 1),
        },
        options.rounds,
    )
    ratio = best["ours"].tokens_per_s / best[batched].tokens_per_s
    return Bar(f"tokens/s, times {batched}", ratio, GENERATE_BAR)


def measure_overhead(options: argparse.Namespace) -> Bar:
    rounds = [asyncio.run(measure_driver(options.in_flight, options.turn_s)) for _ in range(options.rounds)]
    found = min(rounds, key=lambda figures: figures.share_of_core)
    rate = found.num_turns / found.seconds
    print(
        f"driver: {options.in_flight} in flight, turns of {options.turn_s:g} s: {rate:.0f} turns/s, "
        f"{found.ms_per_turn:.2f} CPU ms a turn"
    )
    name = f"share of a core at {options.in_flight} in flight"
    return Bar(name, found.share_of_core, DRIVER_BAR, is_upper=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rollout",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    number = at_least(1)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"of {PARTS}"
    )
    parser.add_argument(
        "--engine", choices=("transformers", "vllm"), default="transformers", help="of barrier"
    )
    parser.add_argument("--trajectories", type=number, default=512, metavar="N", help="of barrier")
    parser.add_argument("--max_tool_s", type=float, default=30.0, metavar="S", help="longest tool time")
    parser.add_argument("--isolation", default="available", choices=("full", "available", "none"))
    parser.add_argument("--generate_trajectories", type=number, default=128, metavar="N")
    parser.add_argument("--batch", type=number, default=64, metavar="N", help="rows of `generate`")
    parser.add_argument("--alone", type=number, default=8, metavar="N", help="trajectories one at a time")
    parser.add_argument("--in_flight", type=number, default=1000, metavar="N", help="of driver")
    parser.add_argument("--turn_s", type=float, default=TURN_S, metavar="S", help="of driver, in the engine")
    parser.add_argument("--threads", type=number, default=1, metavar="N", help="of torch")
    parser.add_argument("--rounds", type=number, default=2, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    print(describe_machine())
    measures = {
        "barrier": compare_with_barrier,
        "generate": compare_with_generate,
        "driver": measure_overhead,
    }
    bars = [measure(options) for part, measure in measures.items() if part in options.parts]
    if "routing" in options.parts:
        print(*report(), sep="\n")
    print(*bars, sep="\n")
    return int(not all(bar.is_held for bar in bars))


if __name__ == "__main__":
    sys.exit(main())
