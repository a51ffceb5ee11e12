from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtpo.errors import InputError
from mtpo.losses import (
    GPO,
    LossOut,
    gpo_f,
    kto_baseline,
    kto_loss,
    masked_sum,
    paired_loss,
    sampled_kl,
    sft_loss,
    token_logps,
)

VECTORS = Path(__file__).resolve().parents[2] / "shared" / "spec" / "loss_vectors.json"
TOLERANCES = {torch.float64: (1e-9, 1e-11), torch.float32: (1e-4, 1e-5)}  # relative, absolute


def cases() -> list[Any]:
    if not VECTORS.exists():
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"{VECTORS} is absent"))]
    loaded = json.loads(VECTORS.read_text())["cases"]
    return [pytest.param(c, id=c["id"]) for c in loaded if c["loss"] in ("paired", "kto", "sft")]


def log_ratio(inputs: dict[str, Tensor], side: str = "", normalize: bool = False) -> Tensor:
    mask = inputs[f"mask{side}"]
    return masked_sum(inputs[f"policy{side}"], mask, normalize) - masked_sum(
        inputs[f"ref{side}"], mask, normalize
    )


def run_case(case: dict[str, Any], inputs: dict[str, Tensor]) -> LossOut:
    params = dict(case["params"])
    if case["loss"] == "sft":
        return sft_loss(inputs["policy"], inputs["mask"], **params)
    if case["loss"] == "kto":
        if "z0" not in params:
            params["z0"] = kto_baseline(log_ratio(inputs, "_kl"))
        assert float(params["z0"]) == pytest.approx(case["expected"]["aux"]["z0"], rel=1e-4, abs=1e-5)
        return kto_loss(log_ratio(inputs), inputs["desirable"], **params)
    normalize = params.pop("normalize", False)
    for name in ("pref_prob", "offset"):
        if name in params:
            params[name] = torch.tensor(params[name], dtype=inputs["policy_w"].dtype)
    if params.get("nll_coef"):
        params["nll"] = -masked_sum(inputs["policy_w"], inputs["mask_w"], normalize=True)
    rho_w, rho_l = log_ratio(inputs, "_w", normalize), log_ratio(inputs, "_l", normalize)
    return paired_loss(rho_w, rho_l, case["kind"], **params)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", cases())
def test_golden_losses_and_gradients(case: dict[str, Any], dtype: torch.dtype) -> None:
    inputs = {
        name: torch.tensor(value, dtype=torch.bool if name.startswith(("mask", "desirable")) else dtype)
        for name, value in case["inputs"].items()
    }
    expected = case["expected"]
    for name in expected["grads"]:
        inputs[name].requires_grad_()
    out = run_case(case, inputs)
    assert out.loss.dtype == dtype
    out.loss.backward()

    def close(actual: Tensor, value: Any) -> None:
        rtol, atol = TOLERANCES[dtype]
        torch.testing.assert_close(actual, torch.tensor(value, dtype=dtype), rtol=rtol, atol=atol)

    close(out.loss.detach(), expected["loss"])
    if "per_example" in expected:
        assert out.per_example is not None
        close(out.per_example.detach(), expected["per_example"])
    for name, gradient in expected["grads"].items():
        actual, mask = inputs[name].grad, inputs[name.replace("policy", "mask")]
        assert actual is not None
        close(actual, gradient)
        assert (actual[~mask] == 0).all()


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_token_logps_reads_the_logits_before_each_token() -> None:
    logits = torch.zeros(1, 4, 8)  # uniform over 8 tokens
    logits[0, 1, 5] = 100.0  # after token 1 the model is sure of token 5
    lp = token_logps(logits, torch.tensor([[3, 1, 5, 2]]))
    assert lp[0].tolist() == pytest.approx([0.0, -math.log(8), 0.0, -math.log(8)], abs=1e-6)


def test_token_logps_caps_before_the_temperature() -> None:
    logits = torch.tensor([[[1000.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    capped = token_logps(logits, torch.tensor([[0, 1]]), softcap=3.0, temperature=2.0)
    assert capped[0, 1].item() == pytest.approx(-math.log1p(math.exp(1.5)))


def test_masked_values_change_nothing_and_get_no_gradient() -> None:
    mask = torch.tensor([[0, 1, 0, 1]])
    x = torch.tensor([[math.inf, -1.0, math.nan, -2.0]], requires_grad=True)
    total = masked_sum(x, mask)
    assert total.tolist() == [-3.0]
    total.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[0.0, 1.0, 0.0, 1.0]]
    assert masked_sum(x, mask, normalize=True).tolist() == [-1.5]


def test_a_row_without_action_tokens_sums_to_zero() -> None:
    x, mask = doubles(-1.0, -2.0)[None].repeat(2, 1), torch.tensor([[1, 1], [0, 0]])
    assert masked_sum(x, mask, normalize=True).tolist() == [-1.5, 0.0]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("logistic", math.log(2)),
        ("hinge", 1.0),
        ("squared", 1.0),
        ("exponential", 1.0),
        ("truncated_quadratic", 1.0),
        ("savage", 0.25),
    ],
)
def test_equal_policy_and_reference_costs_f_of_zero(kind: str, expected: float) -> None:
    out = paired_loss(doubles(0.0), doubles(0.0), kind)
    assert out.loss.item() == pytest.approx(expected, rel=1e-12)
    assert out.metrics["accuracy"] == 0.0


def test_ipo_at_zero_margin_costs_the_squared_target() -> None:
    assert paired_loss(doubles(0.0), doubles(0.0), "ipo", tau=0.1).loss.item() == pytest.approx(25.0)


def test_f_by_hand() -> None:
    z = doubles(-1.0, 0.5, 3.0)
    assert gpo_f(z, "logistic").tolist() == pytest.approx([math.log1p(math.exp(-v)) for v in (-1, 0.5, 3)])
    assert gpo_f(z, "hinge").tolist() == [2.0, 0.5, 0.0]
    assert gpo_f(z, "squared").tolist() == [4.0, 0.25, 4.0]
    assert gpo_f(z, "truncated_quadratic").tolist() == [4.0, 0.25, 0.0]
    assert gpo_f(z, "exponential").tolist() == pytest.approx([math.e, math.exp(-0.5), math.exp(-3)])
    assert gpo_f(z, "savage").tolist() == pytest.approx([(1 / (1 + math.exp(v))) ** 2 for v in (-1, 0.5, 3)])


@pytest.mark.parametrize("kind", list(GPO))
def test_reported_weight_is_the_slope(kind: str) -> None:
    """The metric must agree with autograd, or a flat loss would look alive."""
    rho_w = doubles(4.0, -3.0, 15.0).requires_grad_()
    out = paired_loss(rho_w, doubles(0.0, 1.0, 0.0), kind, beta=0.1)
    (gradient,) = torch.autograd.grad(out.loss, rho_w)
    assert out.metrics["weight"] == pytest.approx(gradient.abs().sum().item() / 0.1)
    assert out.metrics["flat"] == pytest.approx((gradient == 0).double().mean().item())


def test_ipo_is_squared_on_another_scale() -> None:
    rho_w, rho_l, tau = doubles(1.0, -2.0, 7.0), doubles(0.5, 3.0, -1.0), 0.3
    ipo = paired_loss(rho_w, rho_l, "ipo", tau=tau).loss
    squared = paired_loss(rho_w, rho_l, "squared", beta=2 * tau).loss
    assert ipo.item() == pytest.approx(squared.item() / (4 * tau**2), rel=1e-12)


@pytest.mark.parametrize("kind", [*GPO, "ipo"])
def test_swapping_sides_and_preference_changes_nothing(kind: str) -> None:
    rho_w, rho_l, p = doubles(1.0, -2.0), doubles(0.5, 3.0), doubles(0.8, 0.3)
    tau = 0.2 if kind == "ipo" else None
    one = paired_loss(rho_w, rho_l, kind, tau=tau, pref_prob=p).loss
    other = paired_loss(rho_l, rho_w, kind, tau=tau, pref_prob=1 - p).loss
    assert one.item() == pytest.approx(other.item(), rel=1e-12)


def test_label_smoothing_is_a_soft_label() -> None:
    rho_w, rho_l = doubles(1.0, -2.0), doubles(0.5, 3.0)
    smoothed = paired_loss(rho_w, rho_l, "logistic", label_smoothing=0.1).loss
    soft = paired_loss(rho_w, rho_l, "logistic", pref_prob=doubles(0.9, 0.9)).loss
    assert smoothed.item() == pytest.approx(soft.item(), rel=1e-12)


def test_certain_preference_survives_an_overflowing_other_side() -> None:
    rho_w = doubles(2000.0).requires_grad_()
    out = paired_loss(rho_w, doubles(0.0), "exponential", beta=1.0, pref_prob=doubles(1.0))
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert rho_w.grad is not None and rho_w.grad.tolist() == [0.0]


def test_chosen_and_rejected_tokens_get_opposite_gradients() -> None:
    rho_w, rho_l = doubles(1.0, -2.0).requires_grad_(), doubles(0.5, 3.0).requires_grad_()
    paired_loss(rho_w, rho_l, "savage", beta=0.4).loss.backward()
    assert rho_w.grad is not None and rho_l.grad is not None
    assert torch.equal(rho_w.grad, -rho_l.grad) and (rho_w.grad < 0).all()


def test_weights_scale_pairs_but_not_the_denominator() -> None:
    out = paired_loss(doubles(0.0, 0.0), doubles(0.0, 0.0), "hinge", weights=doubles(3.0, 0.0))
    assert out.loss.item() == pytest.approx(1.5)


@pytest.mark.parametrize("kind", list(GPO))
def test_two_half_batches_average_to_the_full_batch(kind: str) -> None:
    rho_w, rho_l = doubles(1.0, -2.0, 0.3, 4.0), doubles(0.5, 3.0, 0.1, -1.0)
    full = paired_loss(rho_w, rho_l, kind).loss
    halves = [paired_loss(rho_w[s], rho_l[s], kind).loss for s in (slice(0, 2), slice(2, 4))]
    assert full.item() == pytest.approx((halves[0] + halves[1]).item() / 2, rel=1e-12)
    order = torch.tensor([2, 0, 3, 1])
    assert paired_loss(rho_w[order], rho_l[order], kind).loss.item() == pytest.approx(full.item(), rel=1e-12)


def test_kto_by_hand() -> None:
    """u = (2, -1) at z0 = 1, beta = 0.5: sigmoid(-1) for the desirable one, sigmoid(-0.5) for the other."""
    out = kto_loss(doubles(3.0, 0.0), torch.tensor([True, False]), 1.0, 0.5, lambda_pos=1.2, lambda_neg=0.7)
    assert out.per_example is not None
    expected = [1.2 / (1 + math.exp(1.0)), 0.7 / (1 + math.exp(0.5))]
    assert out.per_example.tolist() == pytest.approx(expected)
    assert out.metrics["rho/desirable"] == 3.0 and out.metrics["num/undesirable"] == 1.0


@pytest.mark.parametrize("desirable", [True, False])
def test_kto_takes_a_batch_of_one_class(desirable: bool) -> None:
    out = kto_loss(doubles(0.0, 0.0), torch.tensor([desirable] * 2), 0.0)
    assert out.loss.item() == pytest.approx(0.5)
    assert ("rho/undesirable" in out.metrics) is not desirable


def test_kto_baseline_is_clamped_below_only_and_carries_no_gradient() -> None:
    assert kto_baseline(doubles(-3.0, 1.0)).item() == 0.0
    baseline = kto_baseline(doubles(30.0, 10.0).requires_grad_())
    assert baseline.item() == 20.0 and not baseline.requires_grad


def test_sft_reductions_by_hand() -> None:
    lp, mask = torch.tensor([[-1.0, -2.0, -9.0], [-4.0, 7.0, 7.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert sft_loss(lp, mask).loss.item() == pytest.approx(7 / 3)
    assert sft_loss(lp, mask, "sequence_mean").loss.item() == pytest.approx((1.5 + 4) / 2)
    assert sft_loss(lp, mask, "sequence_sum").loss.item() == pytest.approx((3 + 4) / 2)


def test_padding_on_either_side_changes_nothing() -> None:
    lp, mask = torch.tensor([[-1.0, -2.0]]), torch.tensor([[1, 1]])
    for pad in ((0, 3), (3, 0)):
        padded = torch.nn.functional.pad(lp, pad, value=9.0), torch.nn.functional.pad(mask, pad)
        assert sft_loss(*padded).loss.item() == 1.5
        assert masked_sum(*padded).tolist() == [-3.0]


def test_sampled_kl_by_hand() -> None:
    lp, ref, mask = (
        doubles(-1.0, 5.0, -2.0)[None],
        doubles(-1.5, -40.0, -1.0)[None],
        torch.tensor([[1, 0, 1]]),
    )
    d = [0.5, -1.0]
    assert sampled_kl(lp, ref, mask, "k1", "policy").tolist() == pytest.approx([sum(d)])
    assert sampled_kl(lp, ref, mask, "k1", "ref").tolist() == pytest.approx([-sum(d)])
    assert sampled_kl(lp, ref, mask, "k2", "policy").tolist() == pytest.approx([(0.25 + 1) / 2])
    k3 = sum(math.exp(-v) - 1 + v for v in d)
    assert sampled_kl(lp, ref, mask, "k3", "policy").tolist() == pytest.approx([k3])
    assert sampled_kl(lp, ref, mask, "k3", "policy", normalize=True).tolist() == pytest.approx([k3 / 2])
    assert sampled_kl(lp, ref, mask, "k3", "ref").tolist() == pytest.approx(
        [sum(math.exp(v) - 1 - v for v in d)]
    )


def test_k1_on_reference_samples_has_the_expected_value_of_the_true_kl() -> None:
    """Over the whole vocabulary, weighted by the reference, k1 and k3 sum to KL(ref || policy)."""
    policy, ref = doubles(0.5, 0.3, 0.2), doubles(0.1, 0.6, 0.3)
    exact = (ref * (ref / policy).log()).sum().item()
    ones = torch.ones(3, 1)
    for kind in ("k1", "k3"):
        each = sampled_kl(policy.log()[:, None], ref.log()[:, None], ones, kind, "ref")
        assert (ref * each).sum().item() == pytest.approx(exact)


BAD_CALLS = {
    "nan": lambda: masked_sum(torch.tensor([[math.nan, 0.0]]), torch.tensor([[1, 0]])),
    "all masked": lambda: sft_loss(torch.zeros(2, 3), torch.zeros(2, 3)),
    "mask shape": lambda: masked_sum(torch.zeros(2, 3), torch.ones(2, 2)),
    "logits shape": lambda: token_logps(torch.zeros(2, 3, 5), torch.zeros(2, 2, dtype=torch.int64)),
    "pair shape": lambda: paired_loss(doubles(1.0, 2.0), doubles(1.0), "logistic"),
    "pair nan": lambda: paired_loss(doubles(math.nan), doubles(1.0), "logistic"),
    "offset shape": lambda: paired_loss(doubles(1.0), doubles(1.0), "logistic", offset=doubles(1.0, 2.0)),
    "no pairs": lambda: paired_loss(doubles(), doubles(), "logistic"),
    "kind": lambda: paired_loss(doubles(1.0), doubles(1.0), "dpo"),
    "tau without ipo": lambda: paired_loss(doubles(1.0), doubles(1.0), "logistic", tau=0.1),
    "ipo without tau": lambda: paired_loss(doubles(1.0), doubles(1.0), "ipo"),
    "smoothing and label": lambda: paired_loss(
        doubles(1.0), doubles(1.0), "hinge", label_smoothing=0.1, pref_prob=doubles(0.5)
    ),
    "preference": lambda: paired_loss(doubles(1.0), doubles(1.0), "hinge", pref_prob=doubles(1.5)),
    "nll without coefficient": lambda: paired_loss(doubles(1.0), doubles(1.0), "hinge", nll=doubles(1.0)),
    "kto shape": lambda: kto_loss(doubles(1.0, 2.0), torch.tensor([True]), 0.0),
    "kto z0": lambda: kto_loss(doubles(1.0), torch.tensor([True]), math.nan),
    "empty baseline": lambda: kto_baseline(doubles()),
    "reduction": lambda: sft_loss(torch.zeros(1, 2), torch.ones(1, 2), "mean"),  # pyright: ignore
    "estimator": lambda: sampled_kl(*[torch.ones(1, 2)] * 3, "k4", "ref"),  # pyright: ignore
    "sampler": lambda: sampled_kl(*[torch.ones(1, 2)] * 3, "k1", "data"),  # pyright: ignore
}


@pytest.mark.parametrize("call", list(BAD_CALLS.values()), ids=list(BAD_CALLS))
def test_bad_input_raises(call: Any) -> None:
    with pytest.raises(InputError):
        call()
