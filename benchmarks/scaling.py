"""How sampling scales from one machine to a thousand: a simulation with the rates of one machine put in.

    python -m benchmarks.scaling --tokens_per_s 10000 --machines 1 8 64 1000

Every machine has an engine and a sandbox; the machines share drivers, one process each with a rollout loop and a
journal. An engine gives each of its turns as many tokens a second as it would have alone, until all together reach
what the engine can do. A driver and a core of a sandbox do one thing at a time. The rates of driver and sandbox are
measured (docs/results.md); those of the engine depend on model and GPU and are the user's. Networks cost nothing here.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.command import at_least


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of one machine, and of one driver."""

    tokens_per_s: float
    """Of an engine with as many turns as it likes."""
    tokens_per_s_alone: float
    """Of a turn that has an engine for itself."""
    in_flight: int = 256
    """Trajectories under way for each engine."""
    cores: int = 8
    """For the sandbox."""
    driver_ms: float = 0.71
    """CPU time of a driver for one turn and its call of the tool; measured: `benchmarks.rollout`."""
    tool_ms: float = 15.3
    """CPU time of an execution, its share of opening and closing the session included; measured:
    `benchmarks.sandbox`."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a number of machines would do."""

    machines: int
    seconds: float
    tokens: int
    engine_load: float
    """Tokens sampled over what all engines could have sampled."""
    driver_load: float
    sandbox_load: float

    @property
    def machine_hours(self) -> float:
        return self.machines * self.seconds / 3600


@dataclass(slots=True)
class _Engine:
    """Shares its tokens a second out evenly among its turns."""

    rates: Rates
    done: float = 0.0
    """Tokens that a turn has got which is here since the beginning."""
    at: float = 0.0
    turns: list[tuple[float, int]] = field(default_factory=list)
    """A heap: the value of `done` at which a trajectory's turn ends."""
    version: int = 0

    def advance(self, now: float) -> None:
        if self.turns:
            self.done += (now - self.at) * self._speed()
        self.at = now

    def next_end(self) -> float:
        return self.at + max(0.0, self.turns[0][0] - self.done) / self._speed()

    def _speed(self) -> float:
        return min(self.rates.tokens_per_s_alone, self.rates.tokens_per_s / len(self.turns))


def simulate(
    rates: Rates,
    machines: int,
    trajectories: int,
    drivers: int = 1,
    mean_tokens: float = 150.0,
    seed: int = 0,
) -> Forecast:
    """Sample `trajectories` of 1 to 6 turns, 3.5 on average, of log-normal lengths."""
    rng = random.Random(seed)
    waiting = iter(range(trajectories))
    engines = [_Engine(rates) for _ in range(machines)]
    sandboxes = [[0.0] * rates.cores for _ in range(machines)]
    driver_free = [0.0] * drivers
    turns_left: dict[int, int] = {}
    homes: dict[int, int] = {}
    arrivals: list[tuple[float, int]] = []  # of turns at their engine
    ends: list[tuple[float, int, int]] = []  # (time, machine, version) of the next turn to end on an engine
    tokens, num_turns, num_calls, now = 0, 0, 0, 0.0

    def drive(trajectory: int, at: float) -> float:
        driver = trajectory % drivers
        driver_free[driver] = max(driver_free[driver], at) + rates.driver_ms / 1e3
        return driver_free[driver]

    def begin(machine: int, at: float) -> None:
        trajectory = next(waiting, None)
        if trajectory is not None:
            turns_left[trajectory], homes[trajectory] = rng.randint(1, 6), machine
            heapq.heappush(arrivals, (at, trajectory))

    def expect_end(machine: int) -> None:
        engine = engines[machine]
        engine.version += 1
        if engine.turns:
            heapq.heappush(ends, (engine.next_end(), machine, engine.version))

    for _ in range(rates.in_flight):
        for machine in range(machines):
            begin(machine, 0.0)
    while arrivals or ends:
        if ends and (not arrivals or ends[0][0] <= arrivals[0][0]):
            now, machine, version = heapq.heappop(ends)
            engine = engines[machine]
            if version != engine.version:
                continue
            engine.advance(now)
            _, trajectory = heapq.heappop(engine.turns)
            expect_end(machine)
            driven = drive(trajectory, now)
            turns_left[trajectory] -= 1
            if not turns_left[trajectory]:
                del turns_left[trajectory], homes[trajectory]
                begin(machine, driven)
                continue
            cores = sandboxes[machine]
            ready = max(driven, heapq.heappop(cores)) + rates.tool_ms / 1e3
            heapq.heappush(cores, ready)
            num_calls += 1
            heapq.heappush(arrivals, (ready, trajectory))
        else:
            now, trajectory = heapq.heappop(arrivals)
            machine = homes[trajectory]
            engine = engines[machine]
            engine.advance(now)
            length = max(1, round(mean_tokens * rng.lognormvariate(-0.125, 0.5)))  # of mean 1
            heapq.heappush(engine.turns, (engine.done + length, trajectory))
            expect_end(machine)
            tokens, num_turns = tokens + length, num_turns + 1
    return Forecast(
        machines,
        now,
        tokens,
        tokens / (now * machines * rates.tokens_per_s),
        num_turns * rates.driver_ms / 1e3 / (now * drivers),
        num_calls * rates.tool_ms / 1e3 / (now * machines * rates.cores),
    )


def table(forecasts: Sequence[Forecast], price: float | None) -> str:
    lines = [
        "machines      hours   tokens/s  engines  drivers  sandboxes  machine-hours"
        + "     cost" * bool(price)
    ]
    for f in forecasts:
        cost = f"{f.machine_hours * price:9,.0f}" if price else ""
        lines.append(
            f"{f.machines:8,} {f.seconds / 3600:10.2f} {f.tokens / f.seconds:10,.0f} {f.engine_load:8.0%} "
            f"{f.driver_load:8.1%} {f.sandbox_load:10.1%} {f.machine_hours:14,.1f}{cost}"
        )
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens_per_s", type=float, required=True, help="of one engine that is full")
    parser.add_argument(
        "--tokens_per_s_alone", type=float, default=50.0, help="of one turn alone (default: %(default)g)"
    )
    parser.add_argument("--machines", type=at_least(1), nargs="+", default=[1, 8, 64, 256, 1000])
    parser.add_argument("--trajectories", type=at_least(1), default=600_000, help="(default: %(default)s)")
    parser.add_argument("--mean_tokens", type=float, default=150.0, help="of a turn (default: %(default)g)")
    parser.add_argument(
        "--in_flight", type=at_least(1), default=256, help="for each engine (default: %(default)s)"
    )
    parser.add_argument("--cores", type=at_least(1), default=8, help="of a sandbox (default: %(default)s)")
    parser.add_argument("--drivers", type=at_least(1), default=1, help="processes (default: %(default)s)")
    parser.add_argument("--price", type=float, help="of a machine for an hour")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    rates = Rates(
        tokens_per_s=options.tokens_per_s,
        tokens_per_s_alone=options.tokens_per_s_alone,
        in_flight=options.in_flight,
        cores=options.cores,
    )
    forecasts = [
        simulate(rates, machines, options.trajectories, options.drivers, options.mean_tokens)
        for machines in options.machines
    ]
    print(f"{options.trajectories:,} trajectories, {options.drivers} drivers, {rates}")
    print(table(forecasts, options.price))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
