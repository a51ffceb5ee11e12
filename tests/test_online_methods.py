"""The losses of the online methods, against the specification's numbers and against the equations by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mtpo.training.methods import Scores
from mtpo.training.metrics import advantage_std
from mtpo.training.online_methods import ONLINE_METHODS, moments, turns_of
from mtpo.training.turns import turn_ids, turn_starts

VECTORS = Path(__file__).resolve().parents[2] / "shared" / "spec" / "loss_vectors.json"


def cases(loss: str) -> list[Any]:
    if not VECTORS.exists():
        skip = pytest.mark.skip(reason="the specification's loss_vectors.json is not here")
        return [pytest.param({}, marks=skip, id=loss)]
    found = json.loads(VECTORS.read_text())["cases"]
    return [pytest.param(case, id=case["id"]) for case in found if case["loss"] == loss]


def tensors(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    found = {
        name: torch.tensor(value, dtype=torch.int64 if name in ("mask", "turn_id") else torch.float64)
        for name, value in case["inputs"].items()
    }
    for name in case["expected"]["grads"]:
        found[name].requires_grad_()
    return found


def scores_of(inputs: dict[str, torch.Tensor]) -> Scores:
    policy, mask = inputs["policy"], inputs["mask"]
    return Scores(
        logps=policy,
        mask=mask,
        sums=(torch.where(mask.bool(), policy, 0.0)).sum(-1),
        ref_logps=inputs["ref"],
        rewards=inputs["pref_prob"],
        values=inputs.get("values"),
        turn_ids=inputs.get("turn_id"),
    )


def close(found: torch.Tensor | None, expected: Any) -> None:
    assert found is not None
    torch.testing.assert_close(
        found.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("case", cases("nash_md_pg"))
def test_nash_md_has_the_numbers_of_the_specification(case: dict[str, Any]) -> None:
    inputs = tensors(case)
    out = ONLINE_METHODS["nash_md"].loss(scores_of(inputs), case["params"])
    out.loss.backward()
    close(out.loss, case["expected"]["loss"])
    close(inputs["policy"].grad, case["expected"]["grads"]["policy"])


@pytest.mark.parametrize("case", cases("mtpo_actor_critic"))
def test_mtpo_has_the_numbers_of_the_specification(case: dict[str, Any]) -> None:
    inputs, expected = tensors(case), case["expected"]
    scores = scores_of(inputs)
    out = ONLINE_METHODS["mtpo"].loss(scores, case["params"])
    out.loss.backward()
    assert out.metrics["loss/policy"] == pytest.approx(expected["policy_loss"], rel=1e-9, abs=1e-11)
    assert out.metrics["loss/value"] == pytest.approx(expected["value_loss"], rel=1e-9, abs=1e-11)
    close(inputs["policy"].grad, expected["grads"]["policy"])
    close(inputs["values"].grad, expected["grads"]["values"])


@pytest.mark.parametrize("case", cases("mtpo_actor_critic"))
def test_two_halves_of_a_batch_have_the_gradient_of_the_whole(case: dict[str, Any]) -> None:
    """With the moments of the whole, and each half counted by its turns."""
    inputs = tensors(case)
    scores, options = scores_of(inputs), case["params"] | {"normalize_advantage": True}
    of = turns_of(scores, options)
    whole = moments(of.advantages[of.valid])
    total = torch.zeros((), dtype=torch.float64)
    for place in range(len(scores.mask)):
        row = {name: value[place : place + 1] for name, value in inputs.items()}
        row["values"] = row["values"][:, : int(row["turn_id"].max()) + 1]
        part = scores_of(row)
        out = ONLINE_METHODS["mtpo"].loss(Scores(**{**part.__dict__, "advantage_moments": whole}), options)
        total = total + out.loss * (int(row["turn_id"].max()) + 1) / of.valid.sum()
    together = ONLINE_METHODS["mtpo"].loss(scores, options).loss
    close(
        torch.stack(torch.autograd.grad(total, inputs["policy"], retain_graph=True)).squeeze(0),
        torch.autograd.grad(together, inputs["policy"])[0].tolist(),
    )


def test_turns_are_the_runs_of_the_mask() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 0, 1], [0, 1, 1, 0, 0, 0, 0, 0]])
    ids = turn_ids(mask)
    assert ids.tolist() == [[-1, -1, 0, 0, -1, 1, -1, 2], [-1, 0, 0, -1, -1, -1, -1, -1]]
    assert turn_starts(ids).tolist() == [[1, 4, 6], [0, 0, 0]]


LOGPS = ([-1.0, -2.0], [-0.25, -3.0], [-1.5, -1.0], [-0.75, -1.25])
REFERENCE = ([-2.5, -2.5], [-0.5, -1.0], [-4.0, -0.5], [-0.25, -1.0])
P = (1.0, 0.7)
"""Of two pairs: trajectories 0 and 1 against 2 and 3."""


def f(method: str, z: float) -> float:
    if method == "online_dpo":
        return math.log1p(math.exp(-z))
    return max(0.0, 1 - z) if method == "online_slic" else (z - 1) ** 2


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("method", ["online_dpo", "online_slic", "online_ipo", "ipo_md"])
def test_pairs_count_both_ways_by_the_judges_probability(method: str, per_token: bool) -> None:
    scale = {"tau": 0.5} if "ipo" in method else {"beta": 0.7}
    mask = torch.tensor([[0, 1, 1]] * 4)
    both = [torch.tensor([[0.0, *row] for row in rows], dtype=torch.float64) for rows in (LOGPS, REFERENCE)]
    scores = Scores(
        logps=both[0],
        mask=mask,
        sums=both[0].sum(-1),
        ref_logps=both[1],
        pref_prob=torch.tensor(P, dtype=torch.float64),
    )
    rho = [sum(own) - sum(ref) for own, ref in zip(LOGPS, REFERENCE, strict=True)]
    expected = 0.0
    for pair, p in enumerate(P):
        margin = (rho[pair] - rho[pair + 2]) / (2 if per_token else 1)
        z = margin * (2 * 0.5 if "ipo" in method else 0.7)
        expected += (p * f(method, z) + (1 - p) * f(method, -z)) / (4 * 0.5**2 if "ipo" in method else 1) / 2
    out = ONLINE_METHODS[method].loss(scores, scale | {"normalize": per_token})
    assert out.loss.item() == pytest.approx(expected, rel=1e-12)


def test_an_explicit_kl_leaves_the_reward_of_its_own_turn_alone() -> None:
    """Two turns of one token; V = 0, lambda = 1, alpha = 0.5, P = 1, log-ratios 0.2 and -0.4, KLs 0.3 and 0.1."""
    logps = torch.tensor([[0.0, -1.0, 0.0, -2.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[0, 1, 0, 1]])
    scores = Scores(
        logps=logps,
        mask=mask,
        sums=logps.sum(-1),
        ref_logps=torch.tensor([[0.0, -1.2, 0.0, -1.6]], dtype=torch.float64),
        rewards=torch.tensor([1.0], dtype=torch.float64),
        values=torch.zeros(1, 2, dtype=torch.float64),
        turn_ids=turn_ids(mask),
        divergences=torch.tensor([[0.0, 0.3, 0.0, 0.1]], dtype=torch.float64),
    )
    options = {"alpha": 0.5, "lam": 1.0, "normalize_advantage": False}
    first, second = 1 + 0.5 * 0.4, 1.0  # the reward, less the KL of later turns
    policy = -(first * -1.0 + second * -2.0) / 2
    value = ((first - 0.5 * 0.2) ** 2 + (second + 0.5 * 0.4) ** 2) / 2  # V learns the own turn's KL, too
    out = ONLINE_METHODS["mtpo"].loss(scores, options)
    assert out.loss.item() == pytest.approx(policy + value + 0.5 * (0.3 + 0.1) / 2, rel=1e-12)
    # At (1.2, 1.0) the advantages have the mean 1.1 and the deviation 0.1.
    out = ONLINE_METHODS["mtpo"].loss(scores, options | {"normalize_advantage": True})
    policy = -(1.0 * -1.0 + -1.0 * -2.0) / 2
    assert out.loss.item() == pytest.approx(policy + value + 0.5 / 0.1 * (0.3 + 0.1) / 2, rel=1e-6)


def test_the_weights_of_nash_mds_tokens_are_reported_with_their_spread() -> None:
    """P = 1, tau = 0.5, log-ratios 0.2 and -0.4: 1 - 1/2 - 0.5 (0.2 - 0.4) = 0.6 and 1 - 1/2 - 0.5 (-0.4) = 0.7."""
    logps, mask = torch.tensor([[0.0, -1.0, -2.0]], dtype=torch.float64), torch.tensor([[0, 1, 1]])
    scores = Scores(
        logps=logps,
        mask=mask,
        sums=logps.sum(-1),
        ref_logps=torch.tensor([[0.0, -1.2, -1.6]], dtype=torch.float64),
        rewards=torch.tensor([1.0], dtype=torch.float64),
    )
    found = ONLINE_METHODS["nash_md"].loss(scores, {"tau": 0.5}).metrics
    assert (found["num/token"], found["weight/token"]) == (2, pytest.approx(0.65))
    assert advantage_std(found) == {"weight_std/token": pytest.approx(0.05)}
