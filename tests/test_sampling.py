import math

import pytest
import torch

from mtpo.engines.sampling import sample_tokens
from mtpo.rollout import Sampling

PROBS = [0.4, 0.3, 0.2, 0.1]
LOGITS = torch.tensor(PROBS).log()


def draw(sampling: Sampling, uniforms: list[float]) -> list[int]:
    tokens, _ = sample_tokens(LOGITS.expand(len(uniforms), -1), [sampling] * len(uniforms), uniforms)
    return tokens


def shares(sampling: Sampling, grid: int = 10_000) -> list[float]:
    """How often each token is drawn when the uniform number runs over a fine grid: its exact probability."""
    tokens = torch.tensor(draw(sampling, [(i + 0.5) / grid for i in range(grid)]))
    return (torch.bincount(tokens, minlength=4) / grid).tolist()


def rules(**options: float) -> Sampling:
    return Sampling(1, (), **options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (rules(), PROBS),
        (rules(temperature=0.5), [p * p / 0.3 for p in PROBS]),
        (rules(top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (rules(top_p=0.65), [4 / 7, 3 / 7, 0, 0]),
        (rules(top_p=0.4), [1, 0, 0, 0]),
        (rules(min_p=0.6), [4 / 7, 3 / 7, 0, 0]),
        (rules(temperature=0), [1, 0, 0, 0]),
        (rules(top_k=3, top_p=0.5), [4 / 7, 3 / 7, 0, 0]),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(sampling: Sampling, expected: list[float]) -> None:
    assert shares(sampling) == pytest.approx(expected, abs=2e-4)


def test_rows_of_one_batch_follow_their_own_rules() -> None:
    samplings = [rules(temperature=0), rules(top_k=1), rules()]
    tokens, _ = sample_tokens(LOGITS.expand(3, -1), samplings, [0.99, 0.99, 0.99])
    assert tokens == [0, 0, 3]


def test_logps_are_at_temperature_one_and_untruncated() -> None:
    _, logps = sample_tokens(LOGITS[None], [rules(temperature=0.1, top_k=1)], [0.5])
    assert logps == pytest.approx([math.log(0.4)])


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    found = {sample_tokens(logits, [rules()], [u])[0][0] for u in (0.0, 0.49, 0.5, 1 - 2**-53)}
    assert found == {1, 3}
