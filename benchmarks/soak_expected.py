"""What ought to come out of the soak, and whether it did.

The same trajectories are made in one process, by a model that is called, with cells that are run by `exec`: nothing is
served, isolated or killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from tokenizers import Tokenizer

from benchmarks.soak_model import MAX_CONTEXT, generate
from data.problems import write_problems
from data.trajectories import Journal, read_trajectories
from mtpo.chat import ChatFormat
from mtpo.models import load_tokenizer
from mtpo.rollout import Generation, Sampling, rollout
from mtpo.trajectory import Execution, Problem
from sandbox.session import GONE

Key = tuple[str, int]


class Outcome(NamedTuple):
    """What a trajectory is compared by."""

    digest: bytes
    """Of all but times and names."""
    executions: tuple[tuple[str, str, str], ...]
    """(code, text, status)."""


async def make_undisturbed(
    folder: Path, problems: Sequence[Problem], samples: int, tokenizer: Path, seed: int
) -> None:
    """Write a run folder as far as `recipes.label` reads it."""
    chat = ChatFormat.for_tokenizer(load_tokenizer(tokenizer.parent))
    write_problems(folder / "problems.jsonl", problems)
    with Journal(folder / "trajectories") as journal:
        engine, interpreter = CalledEngine(tokenizer), PlainInterpreter()
        async for trajectory in rollout(engine, interpreter, chat, problems, samples=samples, seed=seed):
            journal.append(trajectory)


def outcomes(folder: Path) -> dict[Key, Outcome]:
    """Of every trajectory in the journal of a run folder.

    Raises:
        InputError: one is there twice, or corrupt.
    """
    found: dict[Key, Outcome] = {}
    for t in read_trajectories(folder / "trajectories"):
        executions = tuple((e.code, e.text, e.status) for e in t.executions)
        content = repr((t.segments, executions, t.stop_reason, t.fault))
        found[t.problem_id, t.sample] = Outcome(hashlib.sha256(content.encode()).digest(), executions)
    return found


def differs_by_told_loss(found: Outcome, expected: Outcome) -> bool:
    """Whether all was as expected until the text of a cell said that the state is gone."""
    for number, ((code, text, _), theirs) in enumerate(
        zip(found.executions, expected.executions, strict=False)
    ):
        if GONE in text:
            return code == theirs[0] and found.executions[:number] == expected.executions[:number]
    return False


class CalledEngine:
    """The model of the soak without a server."""

    max_context = MAX_CONTEXT
    fingerprint = "called"

    def __init__(self, tokenizer: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(tokenizer))

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, session: str = ""
    ) -> Generation:
        return generate(self._tokenizer, list(prompt_ids), sampling.seed)

    def release(self, session: str) -> None: ...

    async def aclose(self) -> None: ...


class PlainInterpreter:
    """Cells in this process, a dict of variables a session."""

    def session(self) -> PlainSession:
        return PlainSession()


class PlainSession:
    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    async def execute(self, code: str, timeout_s: float = 5.0) -> Execution:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(code, self.state)
        return Execution(code, output.getvalue().rstrip(), "ok", 0.0)

    async def fork(self) -> PlainSession:
        raise NotImplementedError

    async def close(self) -> None: ...

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None: ...
