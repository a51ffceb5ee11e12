import math

import pytest

from mtpo.engines.checks import checked_generation, tokens_to_sample
from mtpo.errors import EngineError, InputError
from mtpo.rollout import Sampling


def test_the_context_bounds_what_is_asked_for() -> None:
    assert tokens_to_sample([5] * 7, Sampling(64, ()), max_context=10) == 3
    assert tokens_to_sample([5] * 7, Sampling(2, ()), max_context=10) == 2
    with pytest.raises(InputError, match="a prompt of 10 tokens does not fit a context of 10"):
        tokens_to_sample([5] * 10, Sampling(1, ()), max_context=10)


def test_the_last_id_says_why_a_turn_ended() -> None:
    assert checked_generation([5, 6, 1], None, (1, 9), 3).finish_reason == "stop"
    assert checked_generation([5, 6, 7], [-1.0, -2.0, 0.0], (1, 9), 3).finish_reason == "length"


@pytest.mark.parametrize(
    ("ids", "logps", "complaint"),
    [
        ([], [], "returned no token"),
        ([5, 1, 6], None, r"went on after a stop id: it samples past \[1, 9\]"),
        ([5, 6], None, "ended after 2 of 3 tokens without a stop id"),
        ([5, 1], [-1.0], "2 tokens came with 1 log-probs"),
        ([5, 6, 1], [-1.0, math.nan, -2.0], "1 of 3 log-probs are not finite"),
        ([5, 6, 1], [-math.inf, None, -2.0], "2 of 3 log-probs are not finite"),
    ],
)
def test_an_answer_that_cannot_be_right_is_a_fault_of_the_engine(ids, logps, complaint: str) -> None:
    with pytest.raises(EngineError, match=complaint):
        checked_generation(ids, logps, (9, 1), 3)
