"""A run that is there to be killed: a scripted model behind a server, the real sandbox, a journal.

    python -m tests.crash_driver FOLDER NUM

Each line on stdout is a trajectory that the journal has. Exits with 3 while some of them are environment faults.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data.trajectories import Journal, read_trajectories
from mtpo.chat import ChatFormat
from mtpo.errors import EngineError
from mtpo.rollout import Generation, RolloutLimits, Sampling, rollout
from mtpo.trajectory import Problem, Trajectory
from sandbox import InterpreterPool
from sandbox.processes import generations
from tests.scripted import gemma_chat

ROOT = Path(__file__).resolve().parents[1]
SERVER = ROOT / "tests" / "crash_server.py"
SAMPLES = 10
HAS_FAULTS = 3


class ServedEngine:
    """Asks `tests.crash_server` for every turn, and starts another one when that is found dead."""

    max_context = 4096
    fingerprint = "scripted"

    def __init__(self, chat: ChatFormat) -> None:
        self.chat = chat
        self.turns: Counter[str] = Counter()
        self.start_server()

    def start_server(self) -> None:
        command = [sys.executable, str(SERVER)]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.server.stdout is not None
        self.port = int(self.server.stdout.readline() or 0)

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, session: str = ""
    ) -> Generation:
        if self.server.poll() is not None:
            self.start_server()
        try:
            text = await self.ask(session, self.turns[session])
        except (OSError, ValueError) as error:
            raise EngineError(f"the engine server died: {error}") from None
        self.turns[session] += 1
        ids = (*self.chat.tokenizer(text, add_special_tokens=False)["input_ids"], self.chat.end_of_turn_id)
        return Generation(ids, tuple(-1 / (1 + i) for i in ids), "stop")

    async def ask(self, session: str, turn: int) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        with contextlib.closing(writer):
            writer.write(json.dumps([session, turn]).encode() + b"\n")
            return json.loads(await reader.readline())

    def release(self, session: str) -> None:
        self.turns.pop(session, None)

    async def aclose(self) -> None:
        self.server.communicate()


async def run(folder: Path, num: int) -> int:
    """Make what the journal lacks of `num` trajectories.

    Returns:
        How many of them met an environment fault.
    """
    chat = gemma_chat()
    problems = [Problem(f"sums/{index}", f"What is sum {index}?", "") for index in range(num // SAMPLES)]
    async with InterpreterPool(size=4, preload=(), isolation="available") as pool:
        with Journal(folder, max_shard_trajectories=max(10, num // 8)) as journal:
            engine = ServedEngine(chat)
            trajectories = rollout(
                engine,
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
            await engine.aclose()
            return len(journal.done(retry_faults=False)) - len(journal.done())


def disturbed_run(folder: Path, num: int, seed: int, **kills: int) -> Counter[str]:
    """The same as `run`, while parts of it are killed after random numbers of trajectories and fractions of a second.

    Args:
        kills: how often to kill each of `VICTIMS`.

    Returns:
        How often each was killed, and how often the run was started.
    """
    rng = random.Random(seed)
    victims = [victim for victim, times in kills.items() for _ in range(times)]
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
                    victim = plan[0][1]
                    if (pid := VICTIMS[victim](driver.pid)) is not None:
                        os.kill(pid, signal.SIGKILL)
                        counts[victim] += 1
                        plan.popleft()
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


def _engine_server(driver: int) -> int | None:
    for pid in next(iter(generations(driver)), []):
        with contextlib.suppress(OSError):
            if SERVER.name in Path(f"/proc/{pid}/cmdline").read_text():
                return pid
    return None


def _fork_server(driver: int) -> int | None:
    """The child of its guardian."""
    family = generations(driver)
    return family[1][0] if len(family) > 1 else None


VICTIMS: dict[str, Callable[[int], int | None]] = {
    "driver": lambda driver: driver,
    "engine_server": _engine_server,
    "fork_server": _fork_server,
}
"""What `disturbed_run` can kill: from the process id of the driver to that of the victim, None while there is none."""


if __name__ == "__main__":
    raise SystemExit(HAS_FAULTS if asyncio.run(run(Path(sys.argv[1]), int(sys.argv[2]))) else 0)
