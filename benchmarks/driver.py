"""What the rollout itself costs: its CPU time while an engine and an interpreter elsewhere do the work.

Both are asleep here for as long as they would compute. What is left is the loop over the turns: chat format,
tokenizer, bookkeeping of the trajectories in flight, journal.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from benchmarks.workload import make_tokenizer
from data.generated import problems as generated_problems
from data.trajectories import Journal
from mtpo.chat import ChatFormat
from mtpo.rollout import Generation, Sampling, rollout
from mtpo.trajectory import Execution

TURN_S = 15.0
"""Mean time of a turn in the engine: 150 tokens of 10 a second, which for 1,000 at once are 10,000 tokens a second."""
TOOL_S = 0.5
CALL = """\
First I put down what is known and then let Python do the sums.
```python
from sympy import symbols, solve

x = symbols("x")
start, bags, size = 17, 3, 8
total = start + bags * size
solutions = solve(x + total - 2 * start, x)
print(total, solutions)
```"""
ANSWER = "The output shows how many there are in the end, so the answer is $\\boxed{41}$."
OUTPUT = "41 [-7]"
NUM_CALLS = 2


@dataclass(frozen=True, slots=True)
class DriverFigures:
    num_turns: int
    """That ended while it was measured."""
    seconds: float
    cpu_s: float
    """Of this process."""

    @property
    def share_of_core(self) -> float:
        return self.cpu_s / self.seconds

    @property
    def ms_per_turn(self) -> float:
        return 1e3 * self.cpu_s / self.num_turns


class SleepingEngine:
    """Makes every turn wait, half of `TURN_S` at least and one and a half times at most."""

    max_context = 8192
    fingerprint = "asleep"

    def __init__(self, chat: ChatFormat, turn_s: float) -> None:
        rng = random.Random(0)
        ids = [chat.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (CALL, ANSWER)]
        self._replies = [
            Generation((*i, chat.end_of_turn_id), tuple(-rng.expovariate(2.0) for _ in (*i, 0)), "stop")
            for i in ids
        ]
        self._turn_s = turn_s
        self._turns: dict[str, int] = {}
        self._random = rng
        self.num_turns = 0

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, session: str = ""
    ) -> Generation:
        turn = self._turns.get(session, 0)
        self._turns[session] = turn + 1
        reply = self._replies[turn >= NUM_CALLS]
        await asyncio.sleep(self._random.uniform(0.5, 1.5) * self._turn_s)
        self.num_turns += 1
        return reply

    def release(self, session: str) -> None:
        self._turns.pop(session, None)

    async def aclose(self) -> None: ...


class SleepingInterpreter:
    def session(self) -> SleepingSession:
        return SleepingSession()


class SleepingSession:
    async def execute(self, code: str, timeout_s: float = 5.0) -> Execution:
        await asyncio.sleep(TOOL_S)
        return Execution(code, OUTPUT, "ok", TOOL_S)

    async def fork(self) -> Self:
        raise NotImplementedError

    async def close(self) -> None: ...

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None: ...


async def measure_driver(num_in_flight: int, turn_s: float = TURN_S) -> DriverFigures:
    """Roll out into a journal; measured are two turns' time, after another during which trajectories drift apart."""
    chat = ChatFormat.for_tokenizer(make_tokenizer())
    engine = SleepingEngine(chat, turn_s)
    trajectories = rollout(
        engine,
        SleepingInterpreter(),
        chat,
        generated_problems("train", 4 * num_in_flight),  # more than there is time for
        samples=8,
        max_in_flight=num_in_flight,
    )
    with tempfile.TemporaryDirectory() as folder, Journal(folder) as journal:

        async def write() -> None:
            async with contextlib.aclosing(trajectories):
                async for trajectory in trajectories:
                    journal.append(trajectory)

        writing = asyncio.create_task(write())
        await asyncio.sleep(turn_s)
        started, cpu_started = time.perf_counter(), time.process_time()
        num_turns = engine.num_turns
        await asyncio.wait({writing}, timeout=2 * turn_s)
        cpu_s, wall_s = time.process_time() - cpu_started, time.perf_counter() - started
        figures = DriverFigures(engine.num_turns - num_turns, wall_s, cpu_s)
        writing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await writing
    return figures
