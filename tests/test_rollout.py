import asyncio

import pytest

from mtpo.errors import EngineError, SandboxError
from mtpo.rollout import Decoding, RolloutLimits, rollout, turn_seed
from mtpo.trajectory import Execution, Problem, StopReason, Trajectory
from tests.scripted import ScriptedEngine, ScriptedInterpreter, gemma_chat

PROBLEM = Problem("set/0", "How many clips?", "72")
CODE = "```python\nprint(48 + 24)\n```"
ANSWER = "It is $\\boxed{72}$."


async def collect(engine: ScriptedEngine, interpreter: ScriptedInterpreter, problems=(PROBLEM,), **options):
    return [t async for t in rollout(engine, interpreter, engine.chat, problems, **options)]


async def play(*replies: str | Exception, results=("72",), max_context: int = 4096, **limits) -> Trajectory:
    engine = ScriptedEngine(gemma_chat(), *replies, max_context=max_context)
    [trajectory] = await collect(engine, ScriptedInterpreter(*results), limits=RolloutLimits(**limits))
    return trajectory


async def test_tool_output_reaches_the_model_and_the_answer_ends_the_trajectory() -> None:
    engine, interpreter = ScriptedEngine(gemma_chat(), CODE, ANSWER), ScriptedInterpreter("72")
    [trajectory] = await collect(engine, interpreter)
    assert trajectory.stop_reason == StopReason.ANSWERED
    assert [m["role"] for m in trajectory.messages] == ["user", "assistant", "tool", "assistant"]
    assert [m["content"] for m in trajectory.messages] == [PROBLEM.question, CODE, "72", ANSWER]
    assert interpreter.codes == ["print(48 + 24)"]
    first, second = (prompt for prompt, _, _ in engine.calls)
    assert second[: len(first)] == first
    assert second == [i for s in trajectory.segments[:3] for i in s.ids]


async def test_every_sampled_id_is_kept_with_its_logp_and_nothing_else_is_marked() -> None:
    trajectory = await play(CODE, ANSWER)
    for action in trajectory.actions:
        assert action.logps == (-0.5,) * len(action.ids)
    assert sum(trajectory.completion_mask) == trajectory.num_action_tokens


@pytest.mark.parametrize(
    ("replies", "limits", "reason", "turns"),
    [
        (("I do not know.",), {}, StopReason.NO_CODE, 1),
        ((CODE,), {"max_turns": 3}, StopReason.TURN_LIMIT, 3),
        ((CODE,), {"max_turn_tokens": 4}, StopReason.TOKEN_LIMIT, 1),
        ((ANSWER,), {"max_tokens": 3}, StopReason.TOKEN_LIMIT, 1),
        ((f"{CODE}\nSo \\boxed{{72}}.",), {}, StopReason.ANSWERED, 1),
        (("```python\nprint('\\\\boxed{1}')\n```", ANSWER), {}, StopReason.ANSWERED, 2),
    ],
)
async def test_stop_reasons(replies, limits, reason, turns) -> None:
    trajectory = await play(*replies, **limits)
    assert (trajectory.stop_reason, trajectory.num_turns) == (reason, turns)


async def test_token_budget_of_a_trajectory_spans_its_turns() -> None:
    whole = await play(CODE, ANSWER)
    first = len(whole.actions[0].ids)
    trajectory = await play(CODE, ANSWER, max_tokens=first + 2)
    assert trajectory.stop_reason == StopReason.TOKEN_LIMIT
    assert [len(a.ids) for a in trajectory.actions] == [first, 2]


async def test_context_limit_is_told_apart_wherever_it_strikes() -> None:
    whole = await play(CODE, ANSWER)
    lengths = [len(s.ids) for s in whole.segments]
    for context in (lengths[0], sum(lengths[:2]) - 1, sum(lengths[:3]), sum(lengths) - 1):
        trajectory = await play(CODE, ANSWER, max_context=context)
        assert trajectory.stop_reason == StopReason.CONTEXT_LIMIT
        assert len(trajectory.input_ids) <= max(context, lengths[0])
    assert (await play(CODE, ANSWER, max_context=sum(lengths))).stop_reason == StopReason.ANSWERED


async def test_end_of_sequence_between_turns_leaves_the_context_and_the_mask() -> None:
    chat = gemma_chat()
    eos = chat.tokenizer.eos_token_id
    engine = ScriptedEngine(chat, CODE, ANSWER, end=eos)
    [trajectory] = await collect(engine, ScriptedInterpreter("72"))
    code, observation, answer = trajectory.segments[1:]
    assert eos not in code.ids and len(code.logps or ()) == len(code.ids)
    assert observation.ids[0] == chat.end_of_turn_id
    assert answer.ids[-1] == eos


async def test_passing_fault_is_retried_from_the_start() -> None:
    failures = iter([EngineError("server gone")])

    def flaky() -> str:
        for failure in failures:
            raise failure
        return CODE

    engine = ScriptedEngine(gemma_chat(), flaky, ANSWER)
    [trajectory] = await collect(engine, ScriptedInterpreter("72"))
    assert trajectory.stop_reason == StopReason.ANSWERED and trajectory.fault is None


async def test_lasting_fault_is_recorded_after_bounded_retries() -> None:
    engine = ScriptedEngine(gemma_chat(), CODE)
    interpreter = ScriptedInterpreter(SandboxError("no kernel"))
    [trajectory] = await collect(engine, interpreter, limits=RolloutLimits(max_retries=2))
    assert trajectory.stop_reason == StopReason.ENVIRONMENT_FAULT
    assert trajectory.fault == "SandboxError: no kernel"
    assert trajectory.num_turns == 1
    assert len(interpreter.codes) == 3


async def test_an_interpreter_lost_through_no_doing_of_the_code_is_a_fault() -> None:
    lost = Execution("c", "[the interpreter died (killed from outside)]", "died", 0.1, is_fault=True)
    interpreter = ScriptedInterpreter(lost)
    limits = RolloutLimits(max_retries=1)
    [trajectory] = await collect(ScriptedEngine(gemma_chat(), CODE, ANSWER), interpreter, limits=limits)
    assert (trajectory.stop_reason, trajectory.executions) == (StopReason.ENVIRONMENT_FAULT, ())
    assert len(interpreter.codes) == 2


async def test_each_turn_has_its_own_seed_and_reruns_have_the_same() -> None:
    async def seeds(seed: int) -> set[int]:
        engine = ScriptedEngine(gemma_chat(), CODE, ANSWER)
        await collect(engine, ScriptedInterpreter("72"), samples=3, seed=seed)
        return {sampling.seed for _, sampling, _ in engine.calls}

    assert len(await seeds(0)) == 6
    assert await seeds(0) == await seeds(0)
    assert not await seeds(0) & await seeds(1)
    assert turn_seed(0, "a", 1, 2) == 929292052816288532  # pinned: a run must resume under any later version


async def test_decoding_reaches_the_engine() -> None:
    engine = ScriptedEngine(gemma_chat(), ANSWER)
    await collect(
        engine, ScriptedInterpreter(""), decoding=Decoding(temperature=0.7, top_p=0.9, top_k=5, min_p=0.1)
    )
    [(_, sampling, _)] = engine.calls
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.7, 0.9, 5, 0.1)
    assert sampling.stop_ids == engine.chat.stop_ids


async def test_finished_pairs_are_skipped_and_the_rest_is_sampled() -> None:
    problems = [Problem(f"set/{i}", "How many?", "1") for i in range(3)]
    skip = {("set/0", 0), ("set/2", 1)}
    engine = ScriptedEngine(gemma_chat(), ANSWER)
    found = await collect(engine, ScriptedInterpreter(""), problems, samples=2, skip=skip)
    assert {(t.problem_id, t.sample) for t in found} == {(p.id, s) for p in problems for s in (0, 1)} - skip


async def test_no_more_than_max_in_flight_run_and_no_one_waits_for_the_slowest() -> None:
    release = asyncio.Event()

    class OneSlow(ScriptedEngine):
        async def generate(self, prompt_ids, sampling, *, session=""):
            if session == "set/0/0":
                await release.wait()
            return await super().generate(prompt_ids, sampling, session=session)

    engine = OneSlow(gemma_chat(), ANSWER)
    problems = [Problem(f"set/{i}", "How many?", "1") for i in range(10)]
    order = []
    async for trajectory in rollout(engine, ScriptedInterpreter(""), engine.chat, problems, max_in_flight=3):
        order.append(trajectory.problem_id)
        if len(order) == 9:
            release.set()
    assert order[-1] == "set/0" and len(order) == 10
    assert engine.most_in_flight <= 3


async def test_slow_consumer_slows_the_rollout_down() -> None:
    engine = ScriptedEngine(gemma_chat(), ANSWER)
    problems = [Problem(f"set/{i}", "How many?", "1") for i in range(50)]
    trajectories = rollout(engine, ScriptedInterpreter(""), engine.chat, problems, max_in_flight=4)
    await anext(trajectories)
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(engine.calls) <= 4
    await trajectories.aclose()


async def test_closing_early_cancels_what_is_in_flight() -> None:
    engine, interpreter = ScriptedEngine(gemma_chat(), CODE), ScriptedInterpreter("72")
    problems = [Problem(f"set/{i}", "How many?", "1") for i in range(5)]
    trajectories = rollout(engine, interpreter, engine.chat, problems, limits=RolloutLimits(max_turns=3))
    await anext(trajectories)
    await trajectories.aclose()
    assert interpreter.open_sessions == 0
    assert set(engine.released) == {session for _, _, session in engine.calls}
