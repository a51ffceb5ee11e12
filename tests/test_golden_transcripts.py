"""Whole rollouts with the real interpreter, compared with transcripts that were written by hand."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from mtpo.chat import ChatFormat
from mtpo.rollout import Generation, RolloutLimits, Sampling, rollout
from mtpo.trajectory import Problem, StopReason, Trajectory
from sandbox import InterpreterPool
from tests.scripted import ScriptedEngine
from tests.tiny_tokenizers import TINY_FAMILIES, make_tokenizer, published_template

PROBLEM = Problem("pens", "Tom has 3 boxes of 24 pens and gives 9 away.\nHow many pens are left?", "63")
SYSTEM = "Use Python. Put the answer in a box."
FILE = Path(__file__).with_name("golden_transcripts.txt")
SECTION = re.compile(r"^%% ([\w ]+)(?:: ([^\n]*))?\n(.*?»)\n(?:\n|\Z)", re.MULTILINE | re.DOTALL)
NO_THINKING = "{%- set enable_thinking = false %}"

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass(frozen=True)
class Golden:
    """One transcript for one tokenizer."""

    family: str
    how: str
    marked_text: str

    @property
    def text(self) -> str:
        return self.marked_text.replace("«", "").replace("»", "")

    @property
    def actions(self) -> list[str]:
        return re.findall("«(.*?)»", self.marked_text, re.DOTALL)

    def tokenizer(self) -> Any:
        template = published_template(self.family)
        return make_tokenizer(self.family, NO_THINKING + template if self.how == "no thinking" else template)

    def ids_and_mask(self, tokenizer: Any) -> tuple[list[int], list[int]]:
        """The whole text tokenised at once; a token is marked when its characters lie between the marks."""
        encoded = tokenizer(self.text, add_special_tokens=False, return_offsets_mapping=True)
        is_sampled = "".join(str(i % 2) * len(s) for i, s in enumerate(re.split("[«»]", self.marked_text)))
        pieces = [set(is_sampled[start:end]) for start, end in encoded["offset_mapping"]]
        assert {frozenset(piece) for piece in pieces} == {frozenset("0"), frozenset("1")}
        return encoded["input_ids"], [int(piece == {"1"}) for piece in pieces]


GOLDEN = [
    Golden(family, how or "", text)
    for families, how, text in SECTION.findall(FILE.read_text(encoding="utf-8"))
    for family in families.split()
]
goldens = pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: f"{g.family} {g.how}".strip())


class IdEngine(ScriptedEngine):
    """Samples prepared ids, as many as it may."""

    def __init__(self, chat: ChatFormat, turns: Sequence[Sequence[int]]) -> None:
        super().__init__(chat)
        self.ids = turns

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, session: str = ""
    ) -> Generation:
        self.calls.append((list(prompt_ids), sampling, session))
        whole = self.ids[len(self.calls) - 1]
        ids = tuple(whole[: sampling.max_tokens])
        return Generation(ids, None, "stop" if ids[-1] in sampling.stop_ids else "length")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def pool() -> AsyncIterator[InterpreterPool]:
    async with InterpreterPool(preload=(), size=2) as pool:
        yield pool


def sampled_turns(ids: Sequence[int], mask: Sequence[int]) -> list[list[int]]:
    runs = re.finditer("1+", "".join(map(str, mask)))
    return [list(ids[run.start() : run.end()]) for run in runs]


async def play(
    golden: Golden, pool: InterpreterPool, tokenizer: Any, turns: Sequence[Sequence[int]], max_tokens: int
) -> Trajectory:
    role = "user" if "user turn" in golden.how else None
    engine = IdEngine(ChatFormat.for_tokenizer(tokenizer, tool_role=role), turns)
    system = SYSTEM if golden.how == "system" else None
    limits = RolloutLimits(max_tokens=max_tokens, tool_timeout_s=60)
    [trajectory] = [
        t async for t in rollout(engine, pool, engine.chat, [PROBLEM], system=system, limits=limits)
    ]
    return trajectory


async def test_every_family_has_a_transcript_with_two_tool_calls() -> None:
    complete = {g.family for g in GOLDEN if len(g.actions) == 3 and "NameError" in g.text}
    assert complete == set(TINY_FAMILIES)
    assert {g.family for g in GOLDEN if g.how == "system"} == set(TINY_FAMILIES)


@goldens
async def test_rollout_gives_the_transcript(golden: Golden, pool: InterpreterPool) -> None:
    tokenizer = golden.tokenizer()
    ids, mask = golden.ids_and_mask(tokenizer)
    turns = sampled_turns(ids, mask)
    is_cut = golden.how == "cut"
    engine_turns = [*turns[:-1], turns[-1] + turns[0]] if is_cut else turns  # cut: it would have gone on
    trajectory = await play(golden, pool, tokenizer, engine_turns, max_tokens=sum(mask) + (not is_cut))
    assert tokenizer.decode(trajectory.input_ids) == golden.text
    assert trajectory.input_ids == ids
    assert trajectory.completion_mask == mask
    assert [tokenizer.decode(action.ids) for action in trajectory.actions] == golden.actions
    assert trajectory.stop_reason == (StopReason.TOKEN_LIMIT if is_cut else StopReason.ANSWERED)
    statuses = ["error", "ok"] if len(turns) == 3 else ["ok"] * (len(turns) - 1)
    assert [execution.status for execution in trajectory.executions] == statuses


@goldens
async def test_turn_that_the_token_limit_cuts_ends_the_transcript_there(
    golden: Golden, pool: InterpreterPool
) -> None:
    tokenizer = golden.tokenizer()
    ids, mask = golden.ids_and_mask(tokenizer)
    trajectory = await play(golden, pool, tokenizer, sampled_turns(ids, mask), max_tokens=sum(mask) - 3)
    assert trajectory.stop_reason == StopReason.TOKEN_LIMIT
    assert (trajectory.input_ids, trajectory.completion_mask) == (ids[:-3], mask[:-3])
