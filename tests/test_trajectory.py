import json
from dataclasses import replace

import pytest

from mtpo.errors import InputError
from mtpo.trajectory import Execution, Segment, StopReason, Trajectory

BOS = 2
PROMPT = Segment("prompt", (BOS, 10, 11), None, "How many?")
CODE = Segment("action", (20, 21, 107), (-0.1, -0.2, -0.3), "```python\nprint(3)\n```")
OUTPUT = Segment("observation", (108, 30, 31), None, "3")
ANSWER = Segment("action", (40, 107), (-0.4, -0.5), "\\boxed{3}")
TRAJECTORY = Trajectory(
    "set/0",
    1,
    (PROMPT, CODE, OUTPUT, ANSWER),
    StopReason.ANSWERED,
    executions=(Execution("print(3)", "3", "ok", 0.25),),
    bos_id=BOS,
    policy="current",
    fingerprint="f",
    iteration=2,
    seed=7,
)


def test_ids_and_mask_follow_the_segments() -> None:
    assert TRAJECTORY.input_ids == [2, 10, 11, 20, 21, 107, 108, 30, 31, 40, 107]
    assert TRAJECTORY.completion_mask == [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1]
    assert (TRAJECTORY.num_turns, TRAJECTORY.num_action_tokens) == (2, 5)
    assert TRAJECTORY.action_ids == ((20, 21, 107), (40, 107))


def test_messages_are_a_view_of_the_segments() -> None:
    assert [m["role"] for m in TRAJECTORY.messages] == ["user", "assistant", "tool", "assistant"]
    assert TRAJECTORY.messages[2]["content"] == "3"


def test_json_round_trip_keeps_everything() -> None:
    assert Trajectory.from_json(json.loads(json.dumps(TRAJECTORY.to_json()))) == TRAJECTORY


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ((), "first segment must be the prompt"),
        ((CODE,), "first segment must be the prompt"),
        ((PROMPT, OUTPUT), "segment 1 is 'observation'"),
        ((PROMPT, CODE, ANSWER), "segment 2 is 'action'"),
        ((PROMPT, CODE, OUTPUT), "tool output that no action answers"),
        ((PROMPT, replace(CODE, ids=(), logps=())), r"segment 1 \(action\) is empty"),
        ((PROMPT, replace(CODE, logps=(-0.1,))), "3 ids but 1 log-probs"),
        ((replace(PROMPT, logps=(0.0, 0.0, 0.0)), CODE), "only actions are sampled"),
        ((replace(PROMPT, ids=(10, 11)), CODE), "BOS id 2 once, at the start"),
        ((replace(PROMPT, ids=(BOS, BOS, 10)), CODE), "hold it 2 times"),
        ((PROMPT, CODE, replace(OUTPUT, ids=(108, BOS)), ANSWER), "hold it 2 times"),
    ],
)
def test_broken_invariant_is_refused_by_name(segments: tuple[Segment, ...], message: str) -> None:
    with pytest.raises(InputError, match=f"trajectory 'set/0' sample 1: .*{message}"):
        replace(TRAJECTORY, segments=segments)


def test_bos_that_the_model_sampled_is_its_own_doing() -> None:
    sampled = replace(CODE, ids=(BOS, 21, 107))
    assert replace(TRAJECTORY, segments=(PROMPT, sampled)).completion_mask == [0, 0, 0, 1, 1, 1]


def test_fault_and_its_stop_reason_go_together() -> None:
    with pytest.raises(InputError, match="does not go with fault"):
        replace(TRAJECTORY, fault="EngineError: gone")
    with pytest.raises(InputError, match="does not go with fault"):
        replace(TRAJECTORY, stop_reason=StopReason.ENVIRONMENT_FAULT)


@pytest.mark.parametrize("key", ["segments", "stop_reason", "problem_id"])
def test_row_without_a_field_is_refused(key: str) -> None:
    row = TRAJECTORY.to_json()
    del row[key]
    with pytest.raises(InputError, match="not a trajectory"):
        Trajectory.from_json(row)


def test_unknown_stop_reason_is_refused_with_its_value() -> None:
    with pytest.raises(InputError, match="'tired'"):
        Trajectory.from_json(TRAJECTORY.to_json() | {"stop_reason": "tired"})


def test_truncated_is_neither_finished_nor_a_fault() -> None:
    kinds = {r: (r.is_finished, r.is_truncated) for r in StopReason}
    assert kinds == {
        StopReason.ANSWERED: (True, False),
        StopReason.NO_CODE: (True, False),
        StopReason.CLOSED: (True, False),
        StopReason.TURN_LIMIT: (False, True),
        StopReason.TOKEN_LIMIT: (False, True),
        StopReason.CONTEXT_LIMIT: (False, True),
        StopReason.TIME_LIMIT: (False, True),
        StopReason.ENVIRONMENT_FAULT: (False, False),
    }
