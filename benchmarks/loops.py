"""Three ways to roll out the same plans: ours, turn by turn with barriers, and `generate` once a turn."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from benchmarks.workload import Plan, PlannedChat, PlannedEngine
from mtpo.chat import code_to_run
from mtpo.rollout import Engine, Interpreter, RolloutLimits, Sampling, rollout, turn_seed
from mtpo.trajectory import Execution, Segment, StopReason, Trajectory

TOOL_TIMEOUT_S = 60.0
"""Beyond every planned tool time."""


async def play_freely(
    engine: Engine, interpreter: Interpreter, chat: PlannedChat, plans: Sequence[Plan]
) -> list[Trajectory]:
    """Our rollout, with all trajectories in flight."""
    trajectories = rollout(
        PlannedEngine(engine, chat, plans),
        interpreter,
        chat,
        [plan.problem for plan in plans],
        limits=RolloutLimits(tool_timeout_s=TOOL_TIMEOUT_S),
        max_in_flight=len(plans),
    )
    return [trajectory async for trajectory in trajectories]


async def play_with_barriers(
    engine: Engine, interpreter: Interpreter, chat: PlannedChat, plans: Sequence[Plan]
) -> list[Trajectory]:
    """As the code of arXiv 2409.02392 does: a turn of all trajectories is generated, then all their tools run."""
    planned = PlannedEngine(engine, chat, plans)
    played: list[list[Segment]] = [[chat.prompt(plan.problem.question)] for plan in plans]
    executions: list[list[Execution]] = [[] for _ in plans]
    async with contextlib.AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(interpreter.session()) for _ in plans]

        async def generate(index: int, turn: int) -> None:
            plan, ids = plans[index], [i for segment in played[index] for i in segment.ids]
            sampling = Sampling(1, chat.stop_ids, seed=turn_seed(0, plan.problem.id, 0, turn))
            found = await planned.generate(ids, sampling, session=plan.name)
            played[index].append(Segment("action", found.ids, found.logps, chat.action_text(found.ids)))

        async def execute(index: int) -> bool:
            """Whether the trajectory goes on."""
            code = code_to_run(played[index][-1].text)
            if code is None:
                planned.release(plans[index].name)
                await sessions[index].close()
                return False
            executions[index].append(await sessions[index].execute(code, TOOL_TIMEOUT_S))
            output, action = executions[index][-1].text, played[index][-1]
            played[index].append(chat.observation(output, after=action.ids))
            return True

        live = list(range(len(plans)))
        for turn in range(max(len(plan.turns) for plan in plans)):
            await asyncio.gather(*(generate(index, turn) for index in live))
            goes_on = await asyncio.gather(*(execute(index) for index in live))
            live = [index for index, is_live in zip(live, goes_on, strict=True) if is_live]
    return [
        Trajectory(plan.problem.id, 0, tuple(segments), StopReason.ANSWERED, tuple(results))
        for plan, segments, results in zip(plans, played, executions, strict=True)
    ]


def play_with_generate(
    model: PreTrainedModel, chat: PlannedChat, plans: Sequence[Plan], batch_size: int
) -> int:
    """transformers' own `generate`, called for each turn with the live trajectories in batches, padded on the left.

    The tools' answers are taken from the plan.

    Returns:
        Tokens sampled, without those of rows that only wait for the others of their batch.
    """
    live = [(plan, list(chat.prompt(plan.problem.question).ids)) for plan in plans]
    num_tokens = 0
    for turn in range(max(len(plan.turns) for plan in plans)):
        live = [(plan, ids) for plan, ids in live if turn < len(plan.turns)]
        for start in range(0, len(live), batch_size):
            batch = live[start : start + batch_size]
            budgets = [plan.turns[turn].num_tokens for plan, _ in batch]
            for (plan, ids), new in zip(
                batch, _generate(model, [ids for _, ids in batch], budgets), strict=True
            ):
                ids += [*new[:-1], chat.end_of_turn_id]
                output = plan.turns[turn].output
                if output is not None:
                    ids += chat.observation(output, after=ids).ids
            num_tokens += sum(budgets)
    return num_tokens


@torch.no_grad()
def _generate(model: PreTrainedModel, prompts: list[list[int]], budgets: list[int]) -> list[list[int]]:
    """As many sampled ids of each row as its budget says."""
    width = max(map(len, prompts))
    found = model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts]),
        attention_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
        do_sample=True,
        top_k=0,
        max_new_tokens=max(budgets),
        eos_token_id=None,
        stopping_criteria=StoppingCriteriaList([_Budgets(width, budgets)]),
    )
    return [row[width : width + budget] for row, budget in zip(found.tolist(), budgets, strict=True)]


class _Budgets(StoppingCriteria):
    """Ends each row after its own number of tokens, as a sampled end of turn would."""

    def __init__(self, width: int, budgets: list[int]) -> None:
        self._lengths = width + torch.tensor(budgets)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # pyright: ignore
        return input_ids.shape[1] >= self._lengths


class InProcess:
    """An `Interpreter` that runs the plans' own code right here: for figures without a sandbox."""

    def session(self) -> InProcessSession:
        return InProcessSession()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None: ...


class InProcessSession:
    def __init__(self) -> None:
        self._state: dict[str, Any] = {}

    async def execute(self, code: str, timeout_s: float = 5.0) -> Execution:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(code, self._state)
        return Execution(code, output.getvalue().strip(), "ok", 0.0)

    async def fork(self) -> Self:
        raise NotImplementedError

    async def close(self) -> None: ...

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None: ...
