from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mtpo.engines.transformers import TransformersEngine
from mtpo.errors import GuardError, InputError
from mtpo.rollout import Sampling
from mtpo.training.guards import check_equal_norms, check_one_bos, engine_gap
from mtpo.trajectory import Segment, StopReason, Trajectory
from tests.tiny_models import tiny_model

BOS = 2


def row(ids: list[int], mask: list[int]) -> dict[str, Any]:
    return {"problem_id": "p", "sample": 0, "input_ids": ids, "completion_mask": mask}


GOOD = row([BOS, 5, 6, 7], [0, 0, 1, 1])


@pytest.mark.parametrize(
    ("rows", "count"),
    [([row([BOS, BOS, 5, 6], [0, 0, 0, 1])], 2), ([GOOD, row([5, 6, 7], [0, 1, 1])], 0)],
)
def test_doubled_and_missing_bos_are_refused(rows: list[dict[str, Any]], count: int) -> None:
    with pytest.raises(InputError, match=f"stands {count} times among its inserted ids, expected 1"):
        check_one_bos(rows, BOS)


def test_sampled_bos_and_families_without_one_are_fine() -> None:
    check_one_bos([GOOD, row([BOS, 5, BOS, 7], [0, 0, 1, 1])], BOS)
    check_one_bos([row([5, 6], [0, 1])], BOS)


async def sampled_by(model: Any) -> Trajectory:
    engine = TransformersEngine(model)
    prompt = (BOS, 5, 6, 7)
    turn = await engine.generate(prompt, Sampling(12, ()))
    await engine.aclose()
    segments = (Segment("prompt", prompt), Segment("action", turn.ids, turn.logps))
    return Trajectory("p", 0, segments, StopReason.NO_CODE, bos_id=BOS)


async def test_engine_and_trainer_agree_on_the_same_weights() -> None:
    model = tiny_model("gemma2", std=0.3)
    gap = engine_gap(model, [await sampled_by(model)])
    assert gap.num_tokens == 12 and gap.mean <= gap.max < 1e-4


def drop_soft_cap(model: Any) -> None:
    model.config.final_logit_softcapping = None


def other_weights(model: Any) -> None:
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)


@pytest.mark.parametrize("break_it", [drop_soft_cap, other_weights])
async def test_engine_that_runs_another_model_is_found_out(break_it: Callable[[Any], None]) -> None:
    sampler, trainer = tiny_model("gemma2", std=0.3), tiny_model("gemma2", std=0.3)
    break_it(trainer)
    with pytest.raises(GuardError, match="engine and trainer disagree"):
        engine_gap(trainer, [await sampled_by(sampler)])


async def test_trajectories_without_logps_cannot_be_compared() -> None:
    model = tiny_model("gemma2")
    found = await sampled_by(model)
    bare = replace(found, segments=(found.segments[0], replace(found.segments[1], logps=None)))
    with pytest.raises(InputError, match="nothing to compare"):
        engine_gap(model, [bare])


def test_gradients_that_differ_between_processes_are_refused() -> None:
    check_equal_norms([1.5, 1.5 * (1 + 1e-9)])
    with pytest.raises(GuardError, match="not synchronised"):
        check_equal_norms([1.5, 1.6])
