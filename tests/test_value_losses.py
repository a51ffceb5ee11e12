"""PMPO, DRO-V, policy gradients, turns, distillation and mixtures: golden numbers and equations."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtpo.errors import InputError
from mtpo.losses import (
    dro_policy_loss,
    dro_value_loss,
    geometric_mixture,
    masked_sum,
    pmpo_loss,
    policy_gradient_loss,
    reward_to_go,
    sampled_kl,
    token_divergence,
    turn_gae,
    turn_sums,
    value_loss,
)

VECTORS = Path(__file__).resolve().parents[2] / "shared" / "spec" / "loss_vectors.json"
TOLERANCES = {torch.float64: (1e-9, 1e-11), torch.float32: (1e-4, 1e-5)}  # relative, absolute
FLAGS = ("mask", "accepted")

Results = dict[str, Tensor]
"""What a case computes: `loss` or `policy_loss` and `value_loss`, and the names of its `aux`."""


def run_pmpo(inputs: Results, params: dict[str, Any]) -> Results:
    normalize = params.get("normalize", False)
    score = masked_sum(inputs["policy"], inputs["mask"], normalize)
    kl = sampled_kl(
        inputs["policy"], inputs["ref"], inputs["mask"], params["kl_estimator"], "ref", normalize=normalize
    )
    out = pmpo_loss(score, inputs["accepted"], kl, params["alpha"], params["beta"])
    assert out.per_example is not None
    assert out.per_example.mean().item() == pytest.approx(out.loss.item(), rel=1e-5)
    return {"loss": out.loss, "kl": kl}


def run_dro(inputs: Results, params: dict[str, Any]) -> Results:
    rho = masked_sum(inputs["policy"], inputs["mask"]) - masked_sum(inputs["ref"], inputs["mask"])
    reward, value = inputs["reward"], inputs["value"]
    return {
        "policy_loss": dro_policy_loss(rho, reward, value, **params).loss,
        "value_loss": dro_value_loss(value, reward, rho, **params).loss,
        "logratio": rho,
    }


def run_nash_md(inputs: Results, params: dict[str, Any]) -> Results:
    """Spec 7.3: token n weighs (P - 1/2) - tau * what the log-ratio adds from n on."""
    mask = inputs["mask"]
    to_go = reward_to_go(inputs["policy"] - inputs["ref"], mask).detach()
    coef = torch.where(mask, inputs["pref_prob"][:, None] - 0.5 - params["tau"] * to_go, 0.0)
    return {"loss": policy_gradient_loss(inputs["policy"], mask, coef, len(mask)).loss, "coef": coef}


def run_mtpo(inputs: Results, params: dict[str, Any]) -> Results:
    """Spec 7.4: the KL of a turn and, on the last one, the preference are its reward."""
    turn_id, values = inputs["turn_id"].long(), inputs["values"]
    num_turns = turn_id.max(-1).values + 1
    turns = torch.arange(values.shape[1])
    rewards = -params["alpha"] * turn_sums(inputs["policy"] - inputs["ref"], turn_id, len(turns)).detach()
    rewards = rewards + inputs["pref_prob"][:, None] * (turns == num_turns[:, None] - 1)
    valid = turns < num_turns[:, None]
    advantage, returns = turn_gae(rewards, values, valid, params["lam"])
    weight = advantage.gather(1, turn_id.clamp(min=0))
    return {
        "policy_loss": policy_gradient_loss(inputs["policy"], inputs["mask"], weight, valid.sum()).loss,
        "value_loss": value_loss(values, returns, valid).loss,
        "advantage": advantage,
        "return": returns,
    }


def run_divergence(inputs: Results, params: dict[str, Any]) -> Results:
    args = inputs["student_logits"], inputs["teacher_logits"]
    per_token = torch.zeros(inputs["mask"].shape, dtype=args[0].dtype)
    for place in inputs["mask"].nonzero().tolist():
        alone = torch.zeros_like(inputs["mask"])
        alone[tuple(place)] = True
        per_token[tuple(place)] = token_divergence(*args, alone, **params).loss.detach()
    return {"loss": token_divergence(*args, inputs["mask"], **params).loss, "per_token": per_token}


def run_mixture(inputs: Results, params: dict[str, Any]) -> Results:
    logprobs, log_normalizer = geometric_mixture(inputs["policy_logits"], inputs["ref_logits"], **params)
    return {"logprobs": logprobs, "log_normalizer": log_normalizer}


RUNS: dict[str, Callable[[Results, dict[str, Any]], Results]] = {
    "pmpo": run_pmpo,
    "dro_v": run_dro,
    "nash_md_pg": run_nash_md,
    "mtpo_actor_critic": run_mtpo,
    "token_divergence": run_divergence,
    "geometric_mixture": run_mixture,
}


def cases() -> list[Any]:
    if not VECTORS.exists():
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"{VECTORS} is absent"))]
    loaded = json.loads(VECTORS.read_text())["cases"]
    return [pytest.param(case, id=case["id"]) for case in loaded if case["loss"] in RUNS]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", cases())
def test_golden_losses_and_gradients(case: dict[str, Any], dtype: torch.dtype) -> None:
    inputs = {
        name: torch.tensor(value, dtype=torch.bool if name in FLAGS else dtype)
        for name, value in case["inputs"].items()
    }
    expected = dict(case["expected"])
    aux, grads = expected.pop("aux", {}), expected.pop("grads", {})
    for name in grads:
        inputs[name].requires_grad_()
    results = RUNS[case["loss"]](inputs, dict(case["params"]))
    rtol, atol = TOLERANCES[dtype]
    known = {name: value for name, value in aux.items() if name in results}
    mask = inputs.get("mask")
    for name, value in (expected | known).items():
        actual, wanted = results[name].detach(), torch.tensor(value, dtype=dtype)
        assert actual.dtype == dtype
        if name == "per_token":  # the vectors also list what is off the mask
            assert mask is not None
            actual, wanted = actual[mask], wanted[mask]
        torch.testing.assert_close(actual, wanted, rtol=rtol, atol=atol)
    if not grads:
        return
    sum(value for name, value in results.items() if name.endswith("loss")).backward()  # pyright: ignore
    for name, gradient in grads.items():
        actual = inputs[name].grad
        assert actual is not None
        torch.testing.assert_close(actual, torch.tensor(gradient, dtype=dtype), rtol=rtol, atol=atol)
        if name != "values" and name != "value":
            assert mask is not None and (actual[~mask] == 0).all()


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -- PMPO --------------------------------------------------------------------------------------------------------


def test_pmpo_by_hand() -> None:
    score, kl = doubles(-1.0, -3.0, -5.0), doubles(0.1, 0.2, 0.6)
    out = pmpo_loss(score, torch.tensor([True, True, False]), kl, alpha=0.25, beta=2.0)
    assert out.loss.item() == pytest.approx(0.25 * 2.0 + 0.75 * -5.0 + 2.0 * 0.3)


@pytest.mark.parametrize(("accepted", "expected"), [(True, 0.25 * 2.0), (False, -0.75 * 2.0)])
def test_pmpo_takes_a_batch_of_one_class(accepted: bool, expected: float) -> None:
    score = doubles(-1.0, -3.0).requires_grad_()
    out = pmpo_loss(score, torch.tensor([accepted] * 2), doubles(0.0, 0.0), alpha=0.25)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(expected)
    assert score.grad is not None and torch.isfinite(score.grad).all()


@pytest.mark.parametrize(("alpha", "unused"), [(1.0, 1), (0.0, 0)])
def test_pmpo_learns_from_one_class_alone(alpha: float, unused: int) -> None:
    score = doubles(-1.0, -3.0).requires_grad_()
    pmpo_loss(score, torch.tensor([True, False]), doubles(0.0, 0.0), alpha=alpha).loss.backward()
    assert score.grad is not None and score.grad[unused] == 0 and score.grad[1 - unused] != 0


# -- DRO ---------------------------------------------------------------------------------------------------------


def test_dro_by_hand() -> None:
    rho, reward, value = doubles(0.5, -1.0), doubles(1.0, 0.0), doubles(0.2, 0.4)
    residuals = [1.0 - 0.2 - 2 * 0.5, 0.0 - 0.4 + 2 * 1.0]
    policy = dro_policy_loss(rho, reward, value, tau=2.0).loss.item()
    assert policy == pytest.approx(sum(r * r for r in residuals) / 2 / 4)
    assert dro_value_loss(value, reward, rho, tau=2.0).loss.item() == pytest.approx(2 * policy)


def test_dro_losses_move_one_network_each() -> None:
    rho, value = doubles(0.5, -1.0).requires_grad_(), doubles(0.2, 0.4).requires_grad_()
    reward = doubles(1.0, 0.0)
    dro_policy_loss(rho, reward, value).loss.backward()
    assert value.grad is None and rho.grad is not None
    rho.grad = None
    dro_value_loss(value, reward, rho).loss.backward()
    assert rho.grad is None and value.grad is not None


def test_dro_has_its_minimum_where_policy_and_value_are_optimal() -> None:
    """At pi ~ ref exp(r / tau) and V = tau log E_ref exp(r / tau) the residual is 0 for every trajectory."""
    ref, reward, tau = doubles(0.2, 0.5, 0.3), doubles(1.0, -0.5, 0.25), 0.7
    value = tau * (ref * (reward / tau).exp()).sum().log()
    rho = (reward - value) / tau
    assert (ref * rho.exp()).sum().item() == pytest.approx(1.0)
    assert dro_policy_loss(rho, reward, value.expand(3), tau).loss.item() == pytest.approx(0.0, abs=1e-15)


def test_dro_reports_the_variance_that_the_value_explains() -> None:
    reward, rho = doubles(1.0, 2.0, 4.0), doubles(0.0, 0.0, 0.0)
    assert dro_value_loss(reward, reward, rho).metrics["explained_variance"] == pytest.approx(1.0)
    flat = dro_value_loss(doubles(3.0, 3.0, 3.0), reward, rho)
    assert flat.metrics["explained_variance"] == pytest.approx(0.0)


# -- tokens and turns --------------------------------------------------------------------------------------------


def test_reward_to_go_by_hand() -> None:
    x, mask = doubles(1.0, math.nan, 10.0, 100.0)[None], torch.tensor([[1, 0, 1, 1]])
    assert reward_to_go(x, mask).tolist() == [[111.0, 0.0, 110.0, 100.0]]


def test_reward_to_go_makes_the_gradient_of_the_sequence_kl() -> None:
    """Exact, on all sequences of two tokens: E[sum_n (sum_{k>=n} d_k) grad log pi_n] = grad KL(pi || ref)."""
    logits = doubles(0.3, -0.7, 0.2, 1.1, -0.4, 0.5).reshape(3, 2).requires_grad_()  # root, after 0, after 1
    ref = doubles(0.1, 0.4, -0.6, 0.0, 0.9, -0.2).reshape(3, 2).log_softmax(-1)
    lp = logits.log_softmax(-1)
    sequences = [(a, b) for a in (0, 1) for b in (0, 1)]
    tokens = torch.stack([torch.stack([lp[0, a], lp[1 + a, b]]) for a, b in sequences])
    ref_tokens = torch.stack([torch.stack([ref[0, a], ref[1 + a, b]]) for a, b in sequences])
    mask = torch.ones(4, 2)
    chance = tokens.sum(-1).exp()
    kl = (chance * (tokens - ref_tokens).sum(-1)).sum()
    (exact,) = torch.autograd.grad(kl, logits, retain_graph=True)
    to_go = reward_to_go((tokens - ref_tokens).detach(), mask)
    loss = policy_gradient_loss(tokens, mask, -to_go * chance.detach()[:, None], 1.0).loss
    (estimated,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(estimated, exact)


def test_turn_sums_by_hand() -> None:
    x = doubles(9.0, 1.0, 2.0, math.inf, 4.0)[None]
    assert turn_sums(x, torch.tensor([[-1, 0, 0, -1, 1]]), 3).tolist() == [[3.0, 4.0, 0.0]]


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_advantages_by_hand(lam: float) -> None:
    rewards, values = doubles(1.0, 2.0, 7.0)[None], doubles(0.5, 0.25, math.nan)[None]
    advantages, returns = turn_gae(rewards, values, torch.tensor([[1, 1, 0]]), lam)
    last = 2.0 - 0.25
    first = 1.0 + 0.25 - 0.5 + lam * last
    assert advantages.tolist() == [[first, last, 0.0]]
    assert returns.tolist() == [[first + 0.5, 2.0, 0.0]]


def test_returns_at_lambda_one_are_the_rewards_to_come_whatever_the_values() -> None:
    rewards = doubles(0.3, -1.0, 2.0, 0.5).reshape(2, 2)
    valid = torch.ones(2, 2)
    for values in (torch.zeros_like(rewards), torch.randn_like(rewards)):
        _, returns = turn_gae(rewards, values, valid, 1.0)
        torch.testing.assert_close(returns, doubles(-0.7, -1.0, 2.5, 0.5).reshape(2, 2))


def test_policy_gradient_weighs_tokens_without_a_gradient_of_its_own() -> None:
    lp, weight = doubles(-1.0, -2.0)[None].requires_grad_(), doubles(3.0, 5.0)[None].requires_grad_()
    out = policy_gradient_loss(lp, torch.tensor([[1, 1]]), weight, 4)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(13 / 4)
    assert lp.grad is not None and lp.grad.tolist() == [[-0.75, -1.25]] and weight.grad is None


def test_value_loss_counts_turns_alike() -> None:
    values = doubles(1.0, 2.0, 4.0, 9.9).reshape(2, 2).requires_grad_()
    valid = torch.tensor([[1, 1], [1, 0]])
    out = value_loss(values, torch.zeros(2, 2, dtype=torch.float64), valid)
    out.loss.backward()
    assert out.loss.item() == pytest.approx((1 + 4 + 16) / 3)
    assert values.grad is not None and values.grad[1, 1] == 0


# -- distributions -----------------------------------------------------------------------------------------------


def logits(*rows: tuple[float, ...]) -> Tensor:
    return doubles(*[v for row in rows for v in row]).reshape(1, len(rows), -1)


ALL = torch.ones(1, 1)


def test_divergences_by_hand() -> None:
    teacher, student = doubles(0.5, 0.5), doubles(0.25, 0.75)
    args = student.log()[None, None], teacher.log()[None, None], ALL
    forward = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    reverse = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert token_divergence(*args, "forward_kl").loss.item() == pytest.approx(forward)
    assert token_divergence(*args, "reverse_kl").loss.item() == pytest.approx(reverse)
    assert token_divergence(*args, "ce").loss.item() == pytest.approx(forward + math.log(2))
    middle = 0.3 * teacher + 0.7 * student
    jsd = 0.3 * (teacher * (teacher / middle).log()).sum() + 0.7 * (student * (student / middle).log()).sum()
    assert token_divergence(*args, "jsd", beta=0.3).loss.item() == pytest.approx(jsd.item())
    assert token_divergence(*args, "jsd", beta=0.0).loss.item() == pytest.approx(forward)
    assert token_divergence(*args, "jsd", beta=1.0).loss.item() == pytest.approx(reverse)


def test_cross_entropy_and_forward_kl_have_one_gradient() -> None:
    student, teacher = logits((0.3, -1.0, 2.0)).requires_grad_(), logits((1.0, 0.0, -0.5))
    gradients = [
        torch.autograd.grad(token_divergence(student, teacher, ALL, kind, temperature=0.7).loss, student)[0]
        for kind in ("ce", "forward_kl")
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_equal_models_have_no_divergence_and_tokens_that_both_rule_out_do_no_harm(kind: str) -> None:
    same = logits((0.3, -math.inf, 2.0)).requires_grad_()
    out = token_divergence(same, same.detach(), ALL, kind)
    (gradient,) = torch.autograd.grad(out.loss, same)
    assert out.loss.item() == pytest.approx(0.0, abs=1e-15)
    assert gradient.abs().max().item() == pytest.approx(0.0, abs=1e-15)


def test_mixture_bypasses_a_model_that_has_no_part() -> None:
    policy, ref = logits((0.0, 1.0)), logits((math.nan, math.nan))
    logprobs, log_normalizer = geometric_mixture(policy, ref, 0.0)
    torch.testing.assert_close(logprobs, policy.log_softmax(-1))
    assert log_normalizer.item() == 0.0
    torch.testing.assert_close(geometric_mixture(ref, policy, 1.0)[0], policy.log_softmax(-1))


def test_mixture_is_the_geometric_mean_and_keeps_what_is_ruled_out() -> None:
    policy, ref = doubles(0.9, 0.1, 0.0), doubles(0.4, 0.2, 0.4)
    logprobs, log_normalizer = geometric_mixture(policy.log(), ref.log(), 0.25)
    unnormalised = policy**0.75 * ref**0.25
    torch.testing.assert_close(logprobs.exp(), unnormalised / unnormalised.sum())
    assert log_normalizer.exp().item() == pytest.approx(unnormalised.sum().item())
    assert logprobs[2].item() == -math.inf
    shifted = geometric_mixture(policy.log() + 3.0, ref.log() - 7.0, 0.25)
    torch.testing.assert_close(shifted[0], logprobs)


BAD_CALLS = {
    "alpha": lambda: pmpo_loss(doubles(1.0), torch.tensor([True]), doubles(0.0), alpha=1.5),
    "pmpo shape": lambda: pmpo_loss(doubles(1.0), torch.tensor([True, False]), doubles(0.0)),
    "dro nan": lambda: dro_policy_loss(doubles(math.nan), doubles(1.0), doubles(1.0)),
    "dro tau": lambda: dro_value_loss(doubles(1.0), doubles(1.0), doubles(1.0), tau=0.0),
    "turn id": lambda: turn_sums(doubles(1.0)[None], torch.tensor([[2]]), 2),
    "gap": lambda: turn_gae(torch.ones(1, 3), torch.ones(1, 3), torch.tensor([[1, 0, 1]]), 0.9),
    "no turn": lambda: value_loss(torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1, 2)),
    "nan reward": lambda: reward_to_go(doubles(math.nan)[None], ALL),
    "weights": lambda: policy_gradient_loss(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 3), 1),
    "divergence": lambda: token_divergence(torch.ones(1, 1, 2), torch.ones(1, 1, 2), ALL, "kl"),
    "vocabularies": lambda: token_divergence(torch.ones(1, 1, 2), torch.ones(1, 1, 3), ALL, "ce"),
    "all masked": lambda: token_divergence(torch.ones(1, 1, 2), torch.ones(1, 1, 2), 0 * ALL, "ce"),
    "logits nan": lambda: token_divergence(logits((math.nan, 1.0)), logits((1.0, 1.0)), ALL, "ce"),
    "ref_coef": lambda: geometric_mixture(doubles(1.0), doubles(1.0), 1.5),
    "no common token": lambda: geometric_mixture(doubles(0.0, -math.inf), doubles(-math.inf, 0.0), 0.5),
}


@pytest.mark.parametrize("call", list(BAD_CALLS.values()), ids=list(BAD_CALLS))
def test_bad_input_raises(call: Any) -> None:
    with pytest.raises(InputError):
        call()
