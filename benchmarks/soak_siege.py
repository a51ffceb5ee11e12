"""Runs a recipe to its end, however often it, its servers and all that it starts are killed."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.soak_faults import Family, Plan, family_of, kill_one
from benchmarks.soak_watch import Watch
from mtpo.errors import MtpoError
from sandbox.processes import descendants

ROOT = Path(__file__).resolve().parents[1]
WATCHED = ("driver", "guardian", "fork server", "grader")
POLL_S = 0.1
CLEAN_UP_S = 120.0
KILLED = -9


class Server:
    """A replica of the model in a process of its own, at an address that stays its own."""

    def __init__(self, tokenizer: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self._command = [sys.executable, "-m", "benchmarks.soak_model", str(tokenizer), str(self.port)]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdin=subprocess.PIPE, cwd=ROOT)

    def stop(self) -> None:
        self.process.communicate()


@dataclass
class Siege:
    """A stage that is run to its end, however often its processes are killed."""

    servers: list[Server]
    scratch: Path
    """For the temporary files of the stages, and nothing else."""
    rng: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    """Starts, and kills by part."""
    watch: Watch = field(default_factory=Watch)
    left: set[object] = field(default_factory=set)
    """Processes and files that outlived their owner."""

    def run(self, recipe: str, config: Path, plan: Plan, progress: Callable[[Family], float]) -> None:
        """Start the recipe again and again until it ends by itself.

        Args:
            progress: how much work is done, from the processes of the moment.

        Raises:
            MtpoError: it ended with an error.
        """
        command = [sys.executable, "-m", recipe, "--config", str(config), "--resume"]
        environment = os.environ | {"TMPDIR": str(self.scratch), "OMP_NUM_THREADS": "1"}
        with config.with_suffix(".log").open("ab") as log:
            while True:
                self.counts[f"{recipe} started"] += 1
                driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
                try:
                    while driver.poll() is None:
                        self._attack(driver.pid, plan, progress)
                finally:
                    driver.kill()
                self._wait_until_all_is_gone()
                if driver.returncode == 0:
                    return
                if driver.returncode != KILLED:
                    *_, reason = Path(log.name).read_text().splitlines()
                    raise MtpoError(f"{recipe} ended with {driver.returncode}: {reason}")

    def _attack(self, driver: int, plan: Plan, progress: Callable[[Family], float]) -> None:
        time.sleep(self.rng.uniform(0.0, 2 * POLL_S))
        family = family_of(driver)
        family |= {"driver": [driver], "engine server": [server.process.pid for server in self.servers]}
        self.watch.sample({part: family[part][0] for part in WATCHED if family[part]})
        kill_one(plan, progress(family), family, self.rng, self.counts)
        for server in self.servers:
            if server.process.poll() is not None:
                server.start()

    def _wait_until_all_is_gone(self) -> None:
        """What an owner that was killed leaves behind ends by itself."""
        deadline = time.monotonic() + CLEAN_UP_S
        while left := self._orphans():
            if time.monotonic() > deadline:
                self.left |= left
                return
            time.sleep(POLL_S)

    def _orphans(self) -> set[object]:
        servers = {server.process.pid for server in self.servers}
        return {*descendants(os.getpid()), *self.scratch.iterdir()} - servers - self.left
