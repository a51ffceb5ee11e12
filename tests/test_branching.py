"""Rollouts whose trajectories part at a chosen turn, with the real interpreter."""

from collections.abc import AsyncIterator, Sequence

import pytest
import pytest_asyncio

from mtpo.errors import InputError, SandboxError
from mtpo.rollout import Branching, Generation, RolloutLimits, Sampling, rollout
from mtpo.trajectory import Problem, StopReason, Trajectory
from sandbox import InterpreterPool
from sandbox.session import Session
from tests.scripted import ScriptedEngine, ScriptedInterpreter, gemma_chat

PROBLEMS = [Problem(f"set/{i}", "Which number?", "1") for i in range(2)]
BRANCHING = Branching(turn=2, width=3)

pytestmark = pytest.mark.asyncio(loop_scope="module")


class DigitEngine(ScriptedEngine):
    """Each turn appends a digit, drawn by its seed, to a number that the interpreter holds; then it answers."""

    def __init__(self, num_digits: int = 4) -> None:
        super().__init__(gemma_chat())
        self.num_digits = num_digits

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, session: str = ""
    ) -> Generation:
        self.calls.append((list(prompt_ids), sampling, session))
        turn = self.chat.tokenizer.decode(prompt_ids).count("```output")
        cell = f"x = globals().get('x', '') + '{sampling.seed % 10}'\nprint(x)"
        text = f"```python\n{cell}\n```" if turn < self.num_digits else "It is $\\boxed{1}$."
        ids = [*self.chat.tokenizer(text, add_special_tokens=False)["input_ids"], self.end]
        return Generation(tuple(ids), tuple(-0.5 for _ in ids), "stop")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def pool() -> AsyncIterator[InterpreterPool]:
    async with InterpreterPool(preload=()) as pool:
        yield pool


async def grow(engine: DigitEngine, interpreter, **options) -> dict[tuple[str, int], Trajectory]:
    found = rollout(engine, interpreter, engine.chat, PROBLEMS, samples=6, branching=BRANCHING, **options)
    return {(t.problem_id, t.sample): t async for t in found}


def digits(trajectory: Trajectory) -> str:
    """What the interpreter must hold in the end, from the code alone."""
    return "".join(execution.code.partition("+ '")[2][0] for execution in trajectory.executions)


def actions(trajectory: Trajectory) -> list[tuple[int, ...]]:
    return [segment.ids for segment in trajectory.actions]


async def test_branches_share_their_beginning_and_the_state_of_the_interpreter(pool: InterpreterPool) -> None:
    engine = DigitEngine()
    found = await grow(engine, pool)
    assert sorted(found) == [(p.id, s) for p in PROBLEMS for s in range(6)]
    for (problem, sample), trajectory in found.items():
        root = sample - sample % 3
        assert trajectory.stop_reason == StopReason.ANSWERED
        assert trajectory.executions[-1].text == digits(trajectory)
        assert actions(trajectory)[:2] == actions(found[problem, root])[:2]
        expected = (None, None) if sample == root else (root, 2)
        assert (trajectory.parent, trajectory.branch_turn) == expected
    own = {digits(t)[2:] for t in found.values()}
    assert len(own) > 6  # of twelve: the rest of each is drawn for itself
    assert len(engine.calls) == 4 * (2 + 3 * 3)  # the shared turns are sampled once


async def test_branches_that_are_resumed_come_out_the_same(pool: InterpreterPool) -> None:
    whole = await grow(DigitEngine(), pool)
    done = {key for index, key in enumerate(sorted(whole)) if index % 3 != 1}
    rest = await grow(DigitEngine(), pool, skip=done)
    assert {key: actions(t) for key, t in rest.items()} == {
        key: actions(t) for key, t in whole.items() if key not in done
    }
    assert {t.parent for t in rest.values()} == {0, 3}


async def test_a_beginning_that_ends_too_early_is_sampled_anew(pool: InterpreterPool) -> None:
    found = await grow(DigitEngine(num_digits=1), pool)
    assert {t.parent for t in found.values()} == {None}
    assert len({str(actions(t)) for (problem, _), t in found.items() if problem == "set/0"}) > 1


async def test_branches_without_a_copy_of_the_session_replay_their_beginning(pool: InterpreterPool) -> None:
    class NoFork:
        def session(self) -> Session:
            session = pool.session()

            async def fork() -> Session:
                raise SandboxError("no copy today")

            session.fork = fork  # type: ignore[method-assign]
            return session

    whole, replayed = await grow(DigitEngine(), pool), await grow(DigitEngine(), NoFork())
    assert {k: actions(t) for k, t in replayed.items()} == {k: actions(t) for k, t in whole.items()}


@pytest.mark.parametrize("values", [{"turn": 0, "width": 2}, {"turn": 1, "width": 1}])
async def test_impossible_branchings_are_refused(values: dict) -> None:
    with pytest.raises(InputError, match="branching needs"):
        Branching(**values)


async def test_blocks_are_whole() -> None:
    engine = DigitEngine()
    with pytest.raises(
        InputError, match=r"samples \(4, from 0\) must be a multiple of the branching width 3"
    ):
        await anext(
            rollout(engine, ScriptedInterpreter(""), engine.chat, PROBLEMS, samples=4, branching=BRANCHING)
        )


async def test_wall_time_ends_a_trajectory_between_turns() -> None:
    engine = DigitEngine()
    limits = RolloutLimits(max_seconds=1e-9)
    [trajectory, _] = [
        t async for t in rollout(engine, ScriptedInterpreter("1"), engine.chat, PROBLEMS, limits=limits)
    ]
    assert (trajectory.stop_reason, trajectory.num_turns) == (StopReason.TIME_LIMIT, 1)
    assert trajectory.executions == ()


async def test_a_rollout_that_is_stopping_finishes_what_it_has_begun() -> None:
    problems = [Problem(f"set/{i}", "How many?", "1") for i in range(20)]
    engine, found = ScriptedEngine(gemma_chat(), "It is $\\boxed{1}$."), []
    trajectories = rollout(
        engine,
        ScriptedInterpreter(""),
        engine.chat,
        problems,
        max_in_flight=4,
        is_stopping=lambda: bool(found),
    )
    async for trajectory in trajectories:
        found.append(trajectory)
    assert 4 <= len(found) <= 8
    assert len(engine.calls) == len(found)
