"""A run that is there to be killed: a scripted model, the real sandbox, a journal.

    python -m tests.crash_driver FOLDER NUM

Each line on stdout is a trajectory that the journal has. Exits with 3 while some of them are environment faults.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.processes import generations
from data.trajectories import Journal, read_trajectories
from mtpo.chat import ChatFormat
from mtpo.rollout import Generation, RolloutLimits, Sampling, rollout
from mtpo.trajectory import Problem, Trajectory
from sandbox import InterpreterPool
from tests.scripted import gemma_chat

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = 10
HAS_FAULTS = 3


def replies(session: str) -> list[str]:
    """What the model writes in a session: cells that need the state of earlier ones, and mostly an answer."""
    rng = random.Random(session)
    total = rng.randrange(100)
    cells = [f"total = {total}\nprint(total)"]
    for _ in range(rng.randrange(4)):
        factor, term = rng.randrange(2, 10), rng.randrange(100)
        total = total * factor + term
        cells.append(f"total = total * {factor} + {term}\nprint(total)")
    match rng.randrange(10):
        case 0:
            cells.append("print(total / 0)")
        case 1:
            cells.append("import os\nos._exit(total % 100)")  # a death by the code's own hand is no fault
    answer = "I do not know." if rng.randrange(10) == 0 else f"It is $\\boxed{{{total}}}$."
    return [*(f"```python\n{cell}\n```" for cell in cells), answer]


class SessionEngine:
    """Gives the replies of each session in turn."""

    max_context = 4096
    fingerprint = "scripted"

    def __init__(self, chat: ChatFormat) -> None:
        self.chat = chat
        self.turns: Counter[str] = Counter()

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, session: str = ""
    ) -> Generation:
        await asyncio.sleep(0)
        text = replies(session)[self.turns[session]]
        self.turns[session] += 1
        ids = (*self.chat.tokenizer(text, add_special_tokens=False)["input_ids"], self.chat.end_of_turn_id)
        return Generation(ids, tuple(-1 / (1 + i) for i in ids), "stop")

    def release(self, session: str) -> None:
        del self.turns[session]

    async def aclose(self) -> None: ...


async def run(folder: Path, num: int) -> int:
    """Make what the journal lacks of `num` trajectories.

    Returns:
        How many of them met an environment fault.
    """
    chat = gemma_chat()
    problems = [Problem(f"sums/{index}", f"What is sum {index}?", "") for index in range(num // SAMPLES)]
    async with InterpreterPool(size=4, preload=(), isolation="available") as pool:
        with Journal(folder, max_shard_trajectories=max(10, num // 8)) as journal:
            trajectories = rollout(
                SessionEngine(chat),
                pool,
                chat,
                problems,
                samples=SAMPLES,
                limits=RolloutLimits(max_turns=5, tool_timeout_s=60.0),
                skip=journal.done(),
                max_in_flight=8,
            )
            async with contextlib.aclosing(trajectories):
                async for trajectory in trajectories:
                    journal.append(trajectory)
                    print(trajectory.problem_id, trajectory.sample, flush=True)
            return len(journal.done(retry_faults=False)) - len(journal.done())


def disturbed_run(folder: Path, num: int, seed: int, *, drivers: int, servers: int) -> Counter[str]:
    """The same as `run`, while the run is killed `drivers` times, and its fork server `servers` times.

    The kills come after random numbers of trajectories and random fractions of a second.

    Returns:
        How often each was killed, and how often the run was started.
    """
    rng = random.Random(seed)
    victims = ["driver"] * drivers + ["fork server"] * servers
    rng.shuffle(victims)
    plan = deque(zip(sorted(rng.sample(range(1, num * 9 // 10), len(victims))), victims, strict=True))
    counts: Counter[str] = Counter()
    while True:
        command = [sys.executable, "-m", "tests.crash_driver", str(folder), str(num)]
        counts["start"] += 1
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as driver:
            assert driver.stdout is not None
            is_alive = True
            for _ in driver.stdout:
                counts["line"] += 1
                if is_alive and plan and counts["line"] >= plan[0][0]:
                    time.sleep(rng.uniform(0.0, 0.03))
                    if _kill(driver.pid, victim := plan[0][1]):
                        plan.popleft()
                        counts[victim] += 1
                        is_alive = victim != "driver"  # lines that are still in the pipe go on coming
        if driver.returncode == 0 and not plan:
            return counts
        if driver.returncode not in (-signal.SIGKILL, HAS_FAULTS):
            raise RuntimeError(f"the run ended with {driver.returncode}, {len(plan)} kills before its time")


def contents(folder: Path) -> dict[tuple[str, int], Any]:
    """Of every trajectory in a journal all but the times.

    Raises:
        InputError: one is there twice.
    """
    return {(t.problem_id, t.sample): _content(t) for t in read_trajectories(folder)}


def _content(trajectory: Trajectory) -> Any:
    executions = [(e.code, e.text, e.status) for e in trajectory.executions]
    return trajectory.segments, executions, trajectory.stop_reason, trajectory.fault


def _kill(driver: int, victim: str) -> bool:
    """Kill the driver or the fork server, which its guardian has started; False while there is none."""
    family = generations(driver)
    if victim == "fork server" and len(family) < 2:
        return False
    os.kill(driver if victim == "driver" else family[1][0], signal.SIGKILL)
    return True


if __name__ == "__main__":
    raise SystemExit(HAS_FAULTS if asyncio.run(run(Path(sys.argv[1]), int(sys.argv[2]))) else 0)
