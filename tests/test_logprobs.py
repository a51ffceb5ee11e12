from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtpo import logprobs
from mtpo.errors import InputError
from mtpo.logprobs import action_logps, head_logits
from tests.child_processes import leave_together, start_pair
from tests.tiny_models import Family, tiny_model

SHAPES: tuple[Family, ...] = ("gemma", "gemma2", "gemma3", "llama")


def batch(seed: int = 0, rows: int = 3, length: int = 18) -> dict[str, Tensor]:
    """Two turns, tool output between them, and padding on the right of every row but the first."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 48, (rows, length), generator=generator)
    mask, attention = torch.zeros_like(ids), torch.ones_like(ids)
    for row in range(rows):
        end = length - 2 * row
        mask[row, 4 + row : 8] = 1
        mask[row, 12:end] = 1
        attention[row, end:], ids[row, end:] = 0, 0
    return {"input_ids": ids, "completion_mask": mask, "attention_mask": attention}


def naive(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    """The model's own logits for every position, then log_softmax, gather and mask."""
    ids, mask = rows["input_ids"], rows["completion_mask"]
    logits = model(input_ids=ids, attention_mask=rows["attention_mask"]).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return torch.cat([torch.zeros_like(logps[:, :1]), logps * mask[:, 1:]], 1)


def gradients(model: nn.Module, logps: Tensor) -> dict[str, Tensor]:
    """Of a sum that weighs every token differently."""
    model.zero_grad()
    weights = torch.arange(logps.numel(), dtype=logps.dtype).reshape(logps.shape).cos()
    (logps * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float, atol: float) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("rows_kept", [0, 7, 1000])
@pytest.mark.parametrize("rows_per_tile", [1, 5, 1000])
@pytest.mark.parametrize("family", SHAPES)
def test_equals_full_logits_in_value_and_gradient(
    family: Family, rows_per_tile: int, rows_kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "MAX_TILE", 48 * rows_per_tile)
    monkeypatch.setattr(logprobs, "MAX_KEPT", 48 * rows_kept)
    model, rows = tiny_model(family, dtype=torch.float64, std=0.3), batch()
    expected, actual = naive(model, rows), action_logps(model, **rows)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert_same(gradients(model, actual), gradients(model, naive(model, rows)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("rows_kept", "computed_again"), [(0, [5, 5, 5]), (7, [5, 3]), (1000, [])])
def test_logits_that_wait_for_the_backward_pass_are_used_once(
    rows_kept: int, computed_again: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "MAX_TILE", 48 * 5)
    monkeypatch.setattr(logprobs, "MAX_KEPT", 48 * rows_kept)
    model, computed = tiny_model("gemma2", dtype=torch.float64, std=0.3), []
    original = logprobs._tile_logits

    def tile_logits(hidden: Tensor, *args: Any) -> Tensor:
        computed.append(len(hidden))
        return original(hidden, *args)

    monkeypatch.setattr(logprobs, "_tile_logits", tile_logits)
    hidden = torch.randn(15, 32, dtype=torch.float64, requires_grad=True)
    logps = logprobs.logps_after(model, hidden, torch.arange(15))
    forward = len(computed)
    (first,) = torch.autograd.grad(logps.sum(), hidden, retain_graph=True)
    assert computed[forward:] == computed_again
    (second,) = torch.autograd.grad(logps.sum(), hidden)
    assert sum(computed[forward:]) == sum(computed_again) + 15
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_no_logits_wait_where_there_is_no_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that wait end at a border between tiles."""
    monkeypatch.setattr(logprobs, "MAX_TILE", 48 * 5)
    monkeypatch.setattr(logprobs, "MAX_KEPT", 48 * 7)
    model, computed = tiny_model("gemma2"), []
    original = logprobs._tile_logits

    def tile_logits(hidden: Tensor, *args: Any) -> Tensor:
        computed.append(len(hidden))
        return original(hidden, *args)

    monkeypatch.setattr(logprobs, "_tile_logits", tile_logits)
    logprobs.logps_after(model, torch.randn(15, 32), torch.arange(15))
    with torch.no_grad():
        logprobs.logps_after(model, torch.randn(15, 32), torch.arange(15))
    assert computed == [5, 2, 5, 3, 5, 5, 5]


def test_saturated_softcap() -> None:
    """Raw logits beyond the cap of 30: without the cap the values differ by nats, and so do the gradients."""
    model, rows = tiny_model("gemma2", dtype=torch.float64, std=0.3), batch()
    with torch.no_grad():
        model.lm_head.weight.mul_(15)  # tied: larger inputs are normalised away, larger logits are not
    hidden = model.base_model(input_ids=rows["input_ids"]).last_hidden_state
    assert (hidden @ model.lm_head.weight.T).abs().max() > 60
    torch.testing.assert_close(action_logps(model, **rows), naive(model, rows), rtol=0, atol=1e-11)
    expected = gradients(model, naive(model, rows))
    assert_same(gradients(model, action_logps(model, **rows)), expected, rtol=1e-8, atol=1e-11)


def test_untied_head_with_bias() -> None:
    model, rows = tiny_model("llama", dtype=torch.float64, std=0.3), batch()
    model.lm_head = nn.Linear(32, 48, dtype=torch.float64)
    expected = gradients(model, naive(model, rows))
    assert "lm_head.bias" in expected
    assert_same(gradients(model, action_logps(model, **rows)), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", SHAPES)
def test_float32_is_close_to_float64(family: Family) -> None:
    model, rows = tiny_model(family, std=0.3), batch()
    actual = action_logps(model, **rows)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), naive(model.double(), rows), rtol=1e-5, atol=1e-5)


def test_bfloat16_rounds_no_logit_to_half_precision() -> None:
    """The head's own error must vanish next to that of the hidden states that it is given."""
    model, rows = tiny_model("gemma2", std=0.3, dtype=torch.bfloat16), batch()
    with torch.no_grad():
        actual = action_logps(model, **rows)
        hidden = model.base_model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"])
        logits = 30 * torch.tanh(hidden.last_hidden_state.double() @ model.lm_head.weight.double().T / 30)
    exact = logits[:, :-1].log_softmax(-1).gather(-1, rows["input_ids"][:, 1:, None]).squeeze(-1)
    on = rows["completion_mask"][:, 1:].bool()
    torch.testing.assert_close(actual[:, 1:][on].double(), exact[on], rtol=0, atol=1e-4)


def test_the_fused_head_of_trl_is_not_taken_since_it_rounds_logits() -> None:
    """It writes each tile of logits in the type of the weights, on a GPU too: steps of 0.125 near Gemma 2's cap."""
    kernel = pytest.importorskip("trl.kernels").ChunkedLogProbFunction
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=generator, dtype=torch.bfloat16)
    targets = torch.randint(0, 48, (64,), generator=generator)
    model = tiny_model("gemma2", dtype=torch.bfloat16, std=4.0)
    weight = model.lm_head.weight.detach()
    exact = (30 * torch.tanh(hidden.double() @ weight.double().T / 30)).log_softmax(-1)
    exact = exact.gather(-1, targets[:, None]).squeeze(-1)
    with torch.no_grad():
        fused = kernel.apply(hidden, weight, None, targets, 1.0, 32768, 30.0)[0].double()
        ours = logprobs.logps_after(model, hidden, targets).double()
    assert (ours - exact).abs().max() < 1e-4 < 0.01 < (fused - exact).abs().max()


def test_off_the_mask_is_zero_and_gets_no_gradient() -> None:
    model, rows = tiny_model("gemma2", std=0.3), batch()
    logps = action_logps(model, **rows)
    off = rows["completion_mask"] == 0
    assert (logps[off] == 0).all() and (logps[~off] < 0).all()
    (gradient,) = torch.autograd.grad(logps[off].sum(), model.lm_head.weight)
    assert (gradient == 0).all()


def test_attention_mask_is_optional_with_right_padding() -> None:
    model, rows = tiny_model("gemma3", std=0.3), batch()
    with_mask = action_logps(model, **rows)
    without = action_logps(model, rows["input_ids"], rows["completion_mask"])
    torch.testing.assert_close(with_mask, without, rtol=0, atol=1e-5)


def test_a_batch_without_actions_still_backpropagates() -> None:
    model, rows = tiny_model("llama"), batch()
    logps = action_logps(model, rows["input_ids"], torch.zeros_like(rows["input_ids"]))
    logps.sum().backward()  # another process may have actions, and waits for this one
    assert (model.lm_head.weight.grad == 0).all()


def test_marking_token_zero_raises() -> None:
    rows = batch()
    rows["completion_mask"][1, 0] = 1
    with pytest.raises(InputError, match="token 0"):
        action_logps(tiny_model("llama"), **rows)


def test_families_that_scale_their_logits_are_refused() -> None:
    model = tiny_model("llama")
    model.config.logit_scale = 0.0625
    with pytest.raises(InputError, match="logit_scale"):
        action_logps(model, **batch())


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]], ids=["backbone", "head"])
def test_lora(targets: list[str]) -> None:
    peft = pytest.importorskip("peft")
    base = tiny_model("gemma2", dtype=torch.float64, std=0.3, tie_word_embeddings=False)
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, lora_dropout=0.0)
    model, rows = peft.get_peft_model(base, config).double(), batch()
    torch.testing.assert_close(action_logps(model, **rows), naive(model, rows), rtol=0, atol=1e-12)
    expected = gradients(model, naive(model, rows))
    assert expected and all("lora" in name for name in expected)
    assert_same(gradients(model, action_logps(model, **rows)), expected, rtol=1e-9, atol=1e-12)


def test_gradient_checkpointing_changes_nothing() -> None:
    model, rows = tiny_model("gemma2", dtype=torch.float64, std=0.3), batch()
    expected = gradients(model, naive(model, rows))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert_same(gradients(model, action_logps(model, **rows)), expected, rtol=1e-9, atol=1e-12)


def test_forward_and_generate_still_work_on_the_patched_model() -> None:
    model, rows = tiny_model("gemma2", std=0.3), batch()
    before = model(input_ids=rows["input_ids"]).logits
    action_logps(model, **rows)
    action_logps(model, **rows)
    torch.testing.assert_close(model(input_ids=rows["input_ids"]).logits, before, rtol=0, atol=0)
    assert model.generate(rows["input_ids"][:1], max_new_tokens=2, do_sample=False).shape[1] > 18  # pyright: ignore[reportCallIssue]


def test_a_copy_of_a_patched_model_has_its_own_weights() -> None:
    model, rows = tiny_model("llama", std=0.3), batch()
    before = action_logps(model, **rows).detach()
    reference = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    assert not torch.allclose(action_logps(model, **rows), before)
    torch.testing.assert_close(action_logps(reference, **rows), before, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_head_logits_are_those_of_the_model(family: Family) -> None:
    model, rows = tiny_model(family, std=0.3), batch()
    hidden = model.base_model(input_ids=rows["input_ids"]).last_hidden_state
    expected = model(input_ids=rows["input_ids"]).logits
    torch.testing.assert_close(head_logits(model, hidden), expected, rtol=1e-6, atol=1e-5)


def _distributed_worker(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    model = tiny_model("gemma2", std=0.3)
    wrapped: Any = nn.parallel.DistributedDataParallel(model)
    mine = {name: tensor[2 * rank : 2 * rank + 2] for name, tensor in batch(rows=4).items()}
    action_logps(wrapped, **mine).sum().backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/gradients.pt")
    leave_together(folder, rank)


def test_ddp_gradients_equal_those_of_one_process(tmp_path: Path) -> None:
    """DDP averages over processes, so each must hold half of the gradient of the whole batch."""
    pair = start_pair(_distributed_worker, str(tmp_path))
    while not pair.join():
        pass
    model = tiny_model("gemma2", std=0.3)
    (action_logps(model, **batch(rows=4)).sum() / 2).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same(torch.load(tmp_path / "gradients.pt"), expected, rtol=1e-4, atol=1e-5)
