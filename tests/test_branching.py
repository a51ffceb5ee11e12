"""Rollouts whose trajectories part at a chosen turn, with the real interpreter."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
import pytest_asyncio

from data.labels import make_pairs
from mtpo.branching import Branching
from mtpo.errors import InputError, SandboxError
from mtpo.grader import Grade
from mtpo.rollout import Generation, Interpreter, RolloutLimits, Sampling, rollout
from mtpo.trajectory import Problem, StopReason, Trajectory
from sandbox import InterpreterPool
from sandbox.session import Session
from tests.scripted import ScriptedEngine, ScriptedInterpreter, gemma_chat

PROBLEMS = [Problem(f"set/{i}", "Which number?", "1") for i in range(2)]
BRANCHING = Branching(turn=2, width=3)
NESTED = (Branching(turn=1, width=2), Branching(turn=3, width=2))
"""Samples 0 to 3 part into 0, 1 and 2, 3 at turn 1, and these into single ones at turn 3."""
SEED = 2
"""Samples that part never draw the same digit there."""

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


async def grow(
    engine: DigitEngine,
    interpreter: Interpreter,
    branching: Branching | Sequence[Branching] = BRANCHING,
    samples: int = 6,
    **options,
) -> dict[tuple[str, int], Trajectory]:
    found = rollout(
        engine, interpreter, engine.chat, PROBLEMS, samples=samples, branching=branching, **options
    )
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


def ids_before(trajectory: Trajectory, turn: int) -> list[int]:
    """All that the model had read and written when the turn began."""
    return [i for segment in trajectory.segments[: 1 + 2 * turn] for i in segment.ids]


async def test_branches_branch_again_with_the_ids_and_the_state_of_their_parent(
    pool: InterpreterPool,
) -> None:
    engine = DigitEngine()
    found = await grow(engine, pool, NESTED, samples=4, seed=SEED)
    parents = {0: (None, None), 1: (0, 3), 2: (0, 1), 3: (2, 3)}
    for (problem, sample), trajectory in found.items():
        assert (trajectory.parent, trajectory.branch_turn) == parents[sample]
        assert trajectory.executions[-1].text == digits(trajectory)  # nothing of any other branch
        if sample:
            parent, turn = parents[sample]
            assert ids_before(trajectory, turn) == ids_before(found[problem, parent], turn)
    for problem in PROBLEMS:  # the digits of turns 1 and 2, and the last one, were drawn apart
        numbers = [digits(found[problem.id, sample]) for sample in range(4)]
        assert numbers[0][:3] == numbers[1][:3] != numbers[2][:3] == numbers[3][:3]
    assert len({digits(trajectory) for trajectory in found.values()}) == 8
    assert len(engine.calls) == 2 * (1 + 2 * 2 + 4 * 2)  # a problem: turn 0, turns 1 and 2, turns 3 and 4


@pytest.mark.parametrize("wanted", [(0,), (1,), (3,), (0, 2), (1, 2), (1, 3), (2, 3), (1, 2, 3)])
async def test_any_part_of_a_tree_comes_out_the_same(pool: InterpreterPool, wanted: tuple[int, ...]) -> None:
    whole = await grow(DigitEngine(), pool, NESTED, samples=4)
    skip = {key for key in whole if key[1] not in wanted}
    part = await grow(DigitEngine(), pool, NESTED, samples=4, skip=skip)
    assert {key: (t.input_ids, t.parent, t.branch_turn) for key, t in part.items()} == {
        key: (t.input_ids, t.parent, t.branch_turn) for key, t in whole.items() if key not in skip
    }


async def test_a_branch_that_ends_before_its_own_turns_parts_one_branching_earlier(
    pool: InterpreterPool,
) -> None:
    branchings = (Branching(turn=1, width=2), Branching(turn=4, width=2))
    found = await grow(DigitEngine(num_digits=2), pool, branchings, samples=4)
    part = await grow(
        DigitEngine(num_digits=2), pool, branchings, samples=4, skip={k for k in found if k[1] in (0, 2)}
    )
    assert {k: (actions(t), t.parent) for k, t in part.items()} == {
        k: (actions(t), t.parent) for k, t in found.items() if k[1] in (1, 3)
    }
    for problem in PROBLEMS:
        trajectories = [found[problem.id, sample] for sample in range(4)]
        assert [(t.parent, t.branch_turn) for t in trajectories] == [(None, None), (0, 1), (0, 1), (0, 1)]
        assert len({actions(t)[0] for t in trajectories}) == 1
        assert len({digits(t) for t in trajectories}) > 2


async def test_a_tree_wider_than_the_pool_comes_out_the_same(pool: InterpreterPool) -> None:
    whole = await grow(DigitEngine(), pool, NESTED, samples=4)
    async with asyncio.timeout(300), InterpreterPool(preload=(), size=2) as small:
        narrow = await grow(DigitEngine(), small, NESTED, samples=4)
    assert {k: t.input_ids for k, t in narrow.items()} == {k: t.input_ids for k, t in whole.items()}


async def test_pairs_of_branches_share_their_ids_up_to_the_turn_where_they_part(
    pool: InterpreterPool,
) -> None:
    found = await grow(DigitEngine(), pool, NESTED, samples=4, seed=SEED)
    for chosen, rejected, turn in ((0, 1, 3), (3, 2, 3), (1, 2, 1), (3, 0, 1)):
        good, bad = found["set/0", chosen], found["set/0", rejected]
        [row], _ = make_pairs([(good, Grade("correct", "1", "exact")), (bad, Grade("wrong", "1", "exact"))])
        shared = len(ids_before(good, turn))
        assert row["chosen_input_ids"][:shared] == row["rejected_input_ids"][:shared]
        assert row["chosen_completion_mask"][:shared] == row["rejected_completion_mask"][:shared]
        assert good.actions[turn].ids != bad.actions[turn].ids


async def test_branches_without_a_copy_of_the_session_replay_their_beginning(pool: InterpreterPool) -> None:
    class NoFork:
        def session(self) -> Session:
            session = pool.session()

            async def fork() -> Session:
                raise SandboxError("no copy today")

            session.fork = fork  # type: ignore[method-assign]
            return session

    for branching, samples in ((BRANCHING, 6), (NESTED, 4)):
        whole = await grow(DigitEngine(), pool, branching, samples)
        replayed = await grow(DigitEngine(), NoFork(), branching, samples)
        assert {k: (t.input_ids, t.parent) for k, t in replayed.items()} == {
            k: (t.input_ids, t.parent) for k, t in whole.items()
        }


@pytest.mark.parametrize("values", [{"turn": 0, "width": 2}, {"turn": 1, "width": 1}])
async def test_impossible_branchings_are_refused(values: dict) -> None:
    with pytest.raises(InputError, match="branching needs"):
        Branching(**values)


async def test_turns_of_branchings_increase() -> None:
    engine = DigitEngine()
    with pytest.raises(InputError, match=r"the turns of branchings must increase, got \[3, 1\]"):
        await grow(engine, ScriptedInterpreter(""), NESTED[::-1], samples=4)


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
