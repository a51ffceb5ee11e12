"""What the rollout benchmarks roll out: trajectories whose turns, lengths and tool times are drawn beforehand.

A model with random weights ends no turn and calls no tool. So the plan says how many tokens the model samples in each
turn, and what it is then taken to have written: code for the sandbox, or the answer. The tokens are really
sampled, from the real and growing context, in which they stay.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from data.generated import problems as generated_problems
from mtpo.chat import ChatFormat
from mtpo.rollout import Engine, Generation, Sampling
from mtpo.trajectory import Problem, Trajectory
from recipes.tiny import train_tokenizer

TURN_WEIGHTS = (20, 30, 22, 14, 9, 5)
"""How often trajectories take 1, 2, ... 6 turns, in percent; 2.8 in the mean."""
TOKENS_MEDIAN, TOKENS_SIGMA, TOKENS_RANGE = 48, 0.6, (8, 192)
TOOL_MEDIAN_S, TOOL_SIGMA = 0.2, 1.682
"""Log-normal: the 99th percentile is 50 times the median, 10 s."""


@dataclass(frozen=True, slots=True)
class Turn:
    num_tokens: int
    text: str
    """What the model is taken to have written."""
    output: str | None
    """What the tool has to answer; None in the last turn."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One trajectory; its sample index is 0."""

    problem: Problem
    turns: tuple[Turn, ...]

    @property
    def name(self) -> str:
        return f"{self.problem.id}/0"


def make_plans(num: int, seed: int, max_tool_s: float) -> list[Plan]:
    """
    Args:
        max_tool_s: where the tail of the tool times is cut; 0 for tools that take no time.
    """
    rng = random.Random(seed)
    plans = []
    for number, problem in enumerate(generated_problems("train", num)):
        [num_turns] = rng.choices(range(1, 7), TURN_WEIGHTS)
        lengths = [_log_normal(rng, TOKENS_MEDIAN, TOKENS_SIGMA, *TOKENS_RANGE) for _ in range(num_turns)]
        seconds = [_log_normal(rng, TOOL_MEDIAN_S, TOOL_SIGMA, 0.0, max_tool_s) for _ in range(num_turns - 1)]
        calls = [(_code(s, number, turn), f"{number} {turn}") for turn, s in enumerate(seconds)]
        texts = [*calls, (f"It is $\\boxed{{{number}}}$.", None)]
        turns = tuple(Turn(round(n), *text) for n, text in zip(lengths, texts, strict=True))
        plans.append(Plan(problem, turns))
    return plans


def _log_normal(rng: random.Random, median: float, sigma: float, low: float, high: float) -> float:
    return min(high, max(low, median * rng.lognormvariate(0.0, sigma)))


def _code(seconds: float, number: int, turn: int) -> str:
    """Remembers the turn in the session's state, so that a session that is lost or mixed up shows."""
    first = "import time\nturn = 0\n" if turn == 0 else "turn += 1\n"
    return f"```python\n{first}time.sleep({seconds:.4f})\nprint({number}, turn)\n```"


@dataclass(frozen=True)
class PlannedChat(ChatFormat):
    """Reads a turn as what the plan says of it."""

    texts: dict[tuple[int, ...], str] = field(default_factory=dict)

    def action_text(self, ids: Sequence[int]) -> str:
        return self.texts.pop(tuple(ids))


class PlannedEngine:
    """Samples from an engine as many tokens as the plan says, the last of which becomes the end of the turn."""

    def __init__(self, engine: Engine, chat: PlannedChat, plans: Sequence[Plan]) -> None:
        self._engine = engine
        self._chat = chat
        self._turns = {plan.name: iter(plan.turns) for plan in plans}
        self.max_context = engine.max_context
        self.fingerprint = engine.fingerprint

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, session: str = ""
    ) -> Generation:
        turn = next(self._turns[session])
        sampling = replace(sampling, max_tokens=turn.num_tokens, stop_ids=())
        found = await self._engine.generate(prompt_ids, sampling, session=session)
        if len(found.ids) != turn.num_tokens:
            raise AssertionError(f"{session}: {len(found.ids)} tokens instead of {turn.num_tokens}")
        ids = (*found.ids[:-1], self._chat.end_of_turn_id)
        self._chat.texts[ids] = turn.text
        return Generation(ids, found.logps, "stop")

    def release(self, session: str) -> None:
        self._engine.release(session)

    async def aclose(self) -> None:
        """Leaves the engine to its owner."""


def check_trajectories(trajectories: Sequence[Trajectory], plans: Sequence[Plan]) -> None:
    """
    Raises:
        AssertionError: these are not the trajectories of the plans, or a tool gave another answer.
    """
    found = {(t.problem_id, tuple(e.text for e in t.executions)): t for t in trajectories}
    for plan in plans:
        outputs = tuple(turn.output for turn in plan.turns if turn.output is not None)
        trajectory = found.pop((plan.problem.id, outputs), None)  # pyright: ignore[reportArgumentType]
        if trajectory is None or [len(ids) for ids in trajectory.action_ids] != [
            turn.num_tokens for turn in plan.turns
        ]:
            raise AssertionError(f"{plan.name}: not rolled out as planned")
    if found:
        raise AssertionError(f"not planned: {Counter(problem_id for problem_id, _ in found)}")


def make_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(problem.question for problem in generated_problems("train", 1000))


def make_model(seed: int = 0) -> Gemma2ForCausalLM:
    """A Gemma 2 of 1.2 million random weights, with soft-caps and windows, in float32."""
    config = Gemma2Config(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # the smallest that vLLM attends with on a CPU
        query_pre_attn_scalar=32,
        sliding_window=256,
        max_position_embeddings=2048,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()
