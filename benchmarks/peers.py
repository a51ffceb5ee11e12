"""The interpreters that are compared: ours, and peers that keep the state of a trajectory in other ways."""

from __future__ import annotations

import asyncio
import importlib
import multiprocessing
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from jupyter_client.manager import AsyncKernelManager
from pebble import ProcessPool

from benchmarks.maths import MathsTrajectory
from sandbox import InterpreterPool

TIMEOUT_S = 60.0


class OpenSession(Protocol):
    """One trajectory's interpreter."""

    async def run(self, code: str) -> str: ...

    async def close(self) -> None: ...


class Peer(Protocol):
    """A way to run the cells of many trajectories. An async context manager."""

    keeps_processes: bool
    """Whether a session holds a process of its own from its first cell until it is closed."""

    async def __aenter__(self) -> Peer: ...

    async def __aexit__(self, *_: object) -> None: ...

    def session(self) -> OpenSession: ...

    async def run_all(self, trajectories: Sequence[MathsTrajectory]) -> list[list[str]]:
        """What each cell of each trajectory shows."""
        ...


class _Sessions(ABC):
    """Runs trajectories side by side, `concurrency` at a time, each in a session of its own."""

    keeps_processes = True

    def __init__(self, concurrency: int) -> None:
        self._concurrency = concurrency

    async def __aexit__(self, *_: object) -> None:  # noqa: B027 - most have nothing to end
        pass

    @abstractmethod
    def session(self) -> OpenSession: ...

    async def run_all(self, trajectories: Sequence[MathsTrajectory]) -> list[list[str]]:
        slots = asyncio.Semaphore(self._concurrency)

        async def run(trajectory: MathsTrajectory) -> list[str]:
            async with slots:
                session = self.session()
                try:
                    return [await session.run(cell.code) for cell in trajectory.cells]
                finally:
                    await session.close()

        return await asyncio.gather(*map(run, trajectories))


class Ours(_Sessions):
    """`InterpreterPool` with isolation "full" or "none"."""

    def __init__(self, concurrency: int, isolation: str) -> None:
        super().__init__(concurrency)
        self.pool = InterpreterPool(size=max(64, 2 * concurrency), isolation=isolation)

    async def __aenter__(self) -> Ours:
        await self.pool.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.pool.__aexit__(*error)

    def session(self) -> OpenSession:
        return _OurSession(self.pool)


class _OurSession:
    def __init__(self, pool: InterpreterPool) -> None:
        self.session = pool.session()

    async def run(self, code: str) -> str:
        return (await self.session.execute(code, TIMEOUT_S)).text

    async def close(self) -> None:
        await self.session.close()


class StockJupyter(_Sessions):
    """A stock ipykernel for each session, through jupyter_client's own manager and client.

    As many kernels as there are processors start at once: with more they hold each other up.
    """

    async def __aenter__(self) -> StockJupyter:
        self.starts = asyncio.Semaphore(os.cpu_count() or 1)
        return self

    def session(self) -> OpenSession:
        return _StockSession(self.starts)


class _StockSession:
    def __init__(self, starts: asyncio.Semaphore) -> None:
        self._starts = starts
        self._manager = AsyncKernelManager(kernel_name="python3")
        self._client: Any = None

    async def run(self, code: str) -> str:
        client = self._client or await self._start()
        message_id = client.execute(code)
        text = ""
        while True:
            message = await client.get_iopub_msg(timeout=TIMEOUT_S)
            if message["parent_header"].get("msg_id") == message_id:
                match message["content"]:
                    case {"name": _, "text": written}:
                        text += written
                    case {"evalue": error}:
                        text += error
                    case {"execution_state": "idle"}:
                        return text.rstrip()

    async def close(self) -> None:
        self._client.stop_channels()
        await self._manager.shutdown_kernel(now=True)

    async def _start(self) -> Any:
        async with self._starts:
            await self._manager.start_kernel()
            self._client = self._manager.client()
            self._client.start_channels()
            await self._client.wait_for_ready(timeout=TIMEOUT_S)
        return self._client


class FreshPython(_Sessions):
    """`python -c` for each call, which runs the trajectory's earlier cells again, unheard, for their state."""

    keeps_processes = False

    async def __aenter__(self) -> FreshPython:
        return self

    def session(self) -> OpenSession:
        return _FreshSession()


class _FreshSession:
    def __init__(self) -> None:
        self._cells: list[str] = []

    async def run(self, code: str) -> str:
        earlier = "\n".join(self._cells)
        self._cells.append(code)
        program = (
            f"import io, sys\nsys.stdout = io.StringIO()\n{earlier}\nsys.stdout = sys.__stdout__\n{code}"
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        output, _ = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
        return output.decode().rstrip()

    async def close(self) -> None:
        pass


class ReplayingExecutor:
    """The executor of the multi-turn preference learning paper (arXiv 2409.02392), which goes back to ToRA's.

    Re-created from a reading of `inference/utils/python_executor.py` in the paper's repository: all
    trajectories go in lock step; each turn makes a Pebble pool of one forked worker a processor, which holds
    every call to a limit on time; a worker imports IPython, then for each trajectory runs ALL cells so far in
    a new shell, captured as IPython does, and keeps the output of the last. As there, the process that it
    forks from has already imported numpy and sympy (vLLM does). Left out, in its favour: the check for
    `input(`, an alarm around each call, and one round trip through JSON and one through pickle.
    """

    keeps_processes = False

    async def __aenter__(self) -> ReplayingExecutor:
        for name in ("numpy", "sympy"):
            importlib.import_module(name)
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def session(self) -> OpenSession:
        return _ReplayedSession(self)

    async def run_all(self, trajectories: Sequence[MathsTrajectory]) -> list[list[str]]:
        num_turns = len(trajectories[0].cells)
        turns = [
            self.run_batch([[cell.code for cell in t.cells[: turn + 1]] for t in trajectories])
            for turn in range(num_turns)
        ]
        return [list(texts) for texts in zip(*turns, strict=True)]

    def run_batch(self, histories: Sequence[list[str]]) -> list[str]:
        """The last output of each trajectory, given as its cells up to now."""
        workers = min(len(histories), os.cpu_count() or 1)
        with ProcessPool(workers, context=multiprocessing.get_context("fork")) as pool:
            return list(pool.map(_replay, histories, timeout=TIMEOUT_S).result())


class _ReplayedSession:
    def __init__(self, executor: ReplayingExecutor) -> None:
        self._executor = executor
        self._cells: list[str] = []

    async def run(self, code: str) -> str:
        self._cells.append(code)
        return self._executor.run_batch([self._cells])[0]

    async def close(self) -> None:
        pass


def _replay(cells: list[str]) -> str:
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    shell = InteractiveShell()
    shown = ""
    for code in cells:
        with capture_output() as captured:
            shell.run_cell(code)
        shown = f"{captured.stdout}{captured.stderr}"
    return shown.rstrip()


PEERS = {
    "ours, full isolation": lambda concurrency: Ours(concurrency, "full"),
    "ours, no isolation": lambda concurrency: Ours(concurrency, "none"),
    "paper's replaying executor": lambda concurrency: ReplayingExecutor(),
    "stock ipykernel": StockJupyter,
    "python -c per call": FreshPython,
}
