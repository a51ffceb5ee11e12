"""Fakes that replay: an engine with prepared replies, an interpreter with prepared results."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from mtpo.chat import ChatFormat
from mtpo.rollout import Generation, Sampling
from mtpo.trajectory import Execution
from tests.tiny_tokenizers import make_tokenizer

Reply = str | Exception | Callable[[], str]


def gemma_chat() -> ChatFormat:
    return ChatFormat.for_tokenizer(make_tokenizer("gemma"))


class ScriptedEngine:
    """Replies in order within a session; a reply ends with the end-of-turn id unless it is cut by `max_tokens`."""

    fingerprint = "scripted"

    def __init__(
        self, chat: ChatFormat, *replies: Reply, max_context: int = 4096, end: int | None = None
    ) -> None:
        self.chat = chat
        self.replies = replies
        self.max_context = max_context
        self.end = chat.end_of_turn_id if end is None else end
        self.calls: list[tuple[list[int], Sampling, str]] = []
        self.turns: dict[str, int] = {}
        self.released: list[str] = []
        self.in_flight = 0
        self.most_in_flight = 0

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, session: str = ""
    ) -> Generation:
        self.calls.append((list(prompt_ids), sampling, session))
        turn = self.turns.get(session, 0)
        self.turns[session] = turn + 1
        self.in_flight += 1
        self.most_in_flight = max(self.in_flight, self.most_in_flight)
        await asyncio.sleep(0)
        self.in_flight -= 1
        reply = self.replies[min(turn, len(self.replies) - 1)]
        if isinstance(reply, Exception):
            raise reply
        text = reply if isinstance(reply, str) else reply()
        ids = [*self.chat.tokenizer(text, add_special_tokens=False)["input_ids"], self.end]
        cut = tuple(ids[: sampling.max_tokens])
        return Generation(cut, tuple(-0.5 for _ in cut), "stop" if len(cut) == len(ids) else "length")

    def release(self, session: str) -> None:
        self.released.append(session)
        self.turns.pop(session, None)

    async def aclose(self) -> None: ...


class ScriptedInterpreter:
    """Every session gives the results in order; an exception among them is raised."""

    def __init__(self, *results: str | Exception | Execution) -> None:
        self.results = results
        self.open_sessions = 0
        self.codes: list[str] = []

    def session(self) -> ScriptedSession:
        return ScriptedSession(self)


class ScriptedSession:
    def __init__(self, interpreter: ScriptedInterpreter) -> None:
        self.interpreter = interpreter
        self.index = 0

    async def execute(self, code: str, timeout_s: float = 5.0) -> Execution:
        self.interpreter.codes.append(code)
        result = self.interpreter.results[min(self.index, len(self.interpreter.results) - 1)]
        self.index += 1
        await asyncio.sleep(0)
        if isinstance(result, Exception):
            raise result
        if isinstance(result, Execution):
            return result
        return Execution(code, result, "ok", 0.01)

    async def fork(self) -> ScriptedSession:
        raise NotImplementedError

    async def close(self) -> None: ...

    async def __aenter__(self) -> ScriptedSession:
        self.interpreter.open_sessions += 1
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.interpreter.open_sessions -= 1
