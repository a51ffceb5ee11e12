from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from mtpo import divergences
from mtpo.batches import SingleCollator
from mtpo.divergences import KL_FROM_POLICY, KL_FROM_REFERENCE, Comparison, logps_and_divergences
from mtpo.errors import InputError
from mtpo.logprobs import action_logps
from mtpo.losses import Divergence
from tests.child_processes import leave_together, start_pair
from tests.tiny_models import tiny_model
from tests.tiny_rows import tiny_singles

EVERY = [
    Divergence("ce"),
    Divergence("forward_kl", temperature=0.7),
    Divergence("reverse_kl"),
    Divergence("jsd", 0.3, temperature=2.0),
    Divergence("jsd", 0.0),
    Divergence("jsd", 1.0),
]
LENGTH, VOCAB = 18, 48


def batch(rows: int = 3) -> dict[str, Tensor]:
    """Two turns with tool output between them; the last row is padded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (rows, LENGTH), generator=generator)
    attention, mask = torch.ones_like(ids), torch.zeros_like(ids)
    mask[:, 4:8] = mask[:, 12:] = 1
    attention[-1, 14:] = mask[-1, 14:] = ids[-1, 14:] = 0
    return {"input_ids": ids, "completion_mask": mask, "attention_mask": attention}


def student(**options: Any) -> PreTrainedModel:
    return tiny_model("gemma2", **{"dtype": torch.float64, "std": 0.3, **options})


def teacher(**options: Any) -> PreTrainedModel:
    """Another width, and another cap on its logits."""
    defaults = {"hidden_size": 48, "final_logit_softcapping": 12.0, "seed": 1}
    return student(**{**defaults, **options})


def saturated(model: PreTrainedModel) -> PreTrainedModel:
    """Raw logits beyond any cap; larger inputs are normalised away, the tied head's larger weights are not."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(15)  # pyright: ignore
    return model


def naive(model: Any, other: Any, rows: dict[str, Tensor], divergence: Divergence) -> Tensor:
    """(B, T), from all logits at once, as the definitions have it."""
    inputs = {name: rows[name] for name in ("input_ids", "attention_mask")}
    q = (model(**inputs).logits[:, :-1].double() / divergence.temperature).softmax(-1)
    with torch.no_grad():
        p = (other(**inputs).logits[:, :-1].double() / divergence.temperature).softmax(-1)
    share = divergence.beta
    middle = share * p + (1 - share) * q
    kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(share) if divergence.kind == "jsd" else None
    per_token = {
        "ce": -(p * q.log()).sum(-1),
        "forward_kl": (p * (p / q).log()).sum(-1),
        "reverse_kl": (q * (q / p).log()).sum(-1),
        "jsd": (share * p * (p / middle).log() + (1 - share) * q * (q / middle).log()).sum(-1),
    }[kind or divergence.kind]
    on = rows["completion_mask"][:, 1:].bool()
    return nn.functional.pad(per_token.where(on, torch.zeros(())), (1, 0))


def gradients(model: nn.Module, values: Tensor) -> dict[str, Tensor]:
    """Of a sum that weighs every token differently."""
    model.zero_grad()
    weights = torch.arange(values.numel(), dtype=values.dtype).reshape(values.shape).cos()
    (values * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float, atol: float) -> None:
    assert actual.keys() == expected.keys() and expected
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("saturate", [False, True], ids=["", "saturated"])
@pytest.mark.parametrize("divergence", EVERY, ids=str)
def test_equals_all_logits_in_value_and_gradient(
    divergence: Divergence, saturate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In tiles of five positions; the models differ in width and cap."""
    monkeypatch.setattr(divergences, "MAX_TILE", 5 * VOCAB)
    ours, theirs, rows = student(), teacher(), batch()
    if saturate:
        ours, theirs = saturated(ours), saturated(theirs)
    expected = naive(ours, theirs, rows, divergence)
    actual = logps_and_divergences(ours, rows, Comparison(theirs, divergence))
    assert actual.divergences.dtype == torch.float64 and expected.abs().max() > 0.1
    torch.testing.assert_close(actual.divergences, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(actual.logps, action_logps(ours, **rows), rtol=0, atol=1e-12)
    assert_same(gradients(ours, actual.divergences), gradients(ours, expected), rtol=1e-8, atol=1e-11)
    assert all(p.grad is None for p in theirs.parameters())


def test_both_results_of_one_pass_carry_their_gradients() -> None:
    ours, theirs, rows = student(), teacher(), batch()
    apart = action_logps(ours, **rows) + 2 * naive(ours, theirs, rows, KL_FROM_REFERENCE)
    scored = logps_and_divergences(ours, rows, Comparison(theirs, KL_FROM_REFERENCE))
    joint = scored.logps + 2 * scored.divergences
    # two passes round twice in Gemma's norms, which are float32 whatever the model is
    assert_same(gradients(ours, joint), gradients(ours, apart), rtol=1e-5, atol=1e-5)


def test_the_two_kls_by_hand() -> None:
    """A student that is uniform over 48 tokens, and a teacher that puts 1/2 on token 7 and shares out the rest."""
    uniform, peaked = tiny_model("llama"), tiny_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        for model in (uniform, peaked):
            model.lm_head = nn.Linear(32, VOCAB)
            model.lm_head.weight.zero_()
            model.lm_head.bias.zero_()
        peaked.lm_head.bias[7] = math.log(VOCAB - 1)
    reference_first = 0.5 * math.log(0.5 * VOCAB) + 0.5 * math.log(0.5 / (VOCAB - 1) * VOCAB)
    policy_first = (math.log(2 / VOCAB) + (VOCAB - 1) * math.log(2 * (VOCAB - 1) / VOCAB)) / VOCAB
    for divergence, expected in ((KL_FROM_REFERENCE, reference_first), (KL_FROM_POLICY, policy_first)):
        found = logps_and_divergences(uniform, batch(), Comparison(peaked, divergence)).divergences
        on = batch()["completion_mask"].bool()
        assert found[on].tolist() == pytest.approx([expected] * int(on.sum()), rel=1e-5)


def test_off_the_mask_is_zero() -> None:
    rows = batch()
    found = logps_and_divergences(student(), rows, Comparison(teacher(), Divergence("ce")))
    off = rows["completion_mask"] == 0
    assert (found.divergences[off] == 0).all() and (found.divergences[~off] > 0).all()


def test_float32_is_close_to_float64() -> None:
    divergence, rows = Divergence("jsd"), batch()
    single = student(dtype=torch.float32), teacher(dtype=torch.float32)
    actual = logps_and_divergences(single[0], rows, Comparison(single[1], divergence)).divergences
    assert actual.dtype == torch.float32
    double = naive(single[0].double(), single[1].double(), rows, divergence)
    torch.testing.assert_close(actual.double(), double, rtol=1e-4, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that any operation makes, forward or backward."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, Tensor):
                self.numel = max(self.numel, made.numel())
        return out


@pytest.mark.parametrize("head", ["plain", "lora"])
def test_no_tensor_has_a_number_for_every_token_of_the_vocabulary_at_every_position(
    head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab, tile = 4096, 4
    monkeypatch.setattr(divergences, "MAX_TILE", tile * vocab)
    monkeypatch.setattr("mtpo.logprobs.MAX_TILE", tile * vocab)
    sizes = {"vocab_size": vocab, "dtype": torch.float32, "tie_word_embeddings": False}
    ours, theirs, rows = student(**sizes, hidden_size=8), teacher(**sizes, hidden_size=16), batch(rows=6)
    if head == "lora":
        peft = pytest.importorskip("peft")
        ours = peft.get_peft_model(ours, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with LargestTensor() as largest:
        scored = logps_and_divergences(ours, rows, Comparison(theirs, Divergence("jsd")))
        (scored.logps + scored.divergences).sum().backward()
    weights = 16 * vocab  # the teacher's head, which exists anyway
    assert largest.numel == weights < int(rows["completion_mask"].sum()) * vocab
    with LargestTensor() as largest:
        naive(ours, theirs, rows, Divergence("jsd")).sum().backward()
    assert largest.numel == 6 * LENGTH * vocab


@pytest.mark.parametrize(
    "targets", [["q_proj", "down_proj"], ["q_proj", "lm_head"]], ids=["backbone", "head"]
)
def test_without_another_model_it_is_the_one_without_its_adapter(targets: list[str]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, lora_dropout=0.0)
    base = student(tie_word_embeddings=False)
    bare = student(tie_word_embeddings=False)  # the same weights
    model, rows = peft.get_peft_model(base, config).double(), batch()
    expected = naive(model, bare, rows, KL_FROM_REFERENCE)
    actual = logps_and_divergences(model, rows, Comparison(None, KL_FROM_REFERENCE)).divergences
    assert expected.max() > 0.01
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    of_expected = gradients(model, expected)
    assert all("lora" in name for name in of_expected)
    actual = logps_and_divergences(model, rows, Comparison(None, KL_FROM_REFERENCE)).divergences
    assert_same(gradients(model, actual), of_expected, rtol=1e-8, atol=1e-11)


def test_there_must_be_another_model_or_an_adapter() -> None:
    with pytest.raises(InputError, match="no other model, and the model has no adapter"):
        logps_and_divergences(student(), batch(), Comparison(None, KL_FROM_POLICY))


def test_vocabularies_of_two_sizes_are_refused() -> None:
    with pytest.raises(
        InputError, match="needs one vocabulary, but the model has 48 tokens and the other model 56"
    ):
        logps_and_divergences(student(), batch(), Comparison(teacher(vocab_size=56), KL_FROM_POLICY))


@pytest.mark.parametrize("divergence", [Divergence("forward_kl"), Divergence("jsd")], ids=str)
def test_packed_rows_have_the_divergences_of_padded_ones(divergence: Divergence) -> None:
    comparison = Comparison(teacher(sliding_window=16), divergence)
    padded, packed = (
        logps_and_divergences(
            student(sliding_window=16), SingleCollator(0, layout)(tiny_singles(4)), comparison
        )
        for layout in ("padded", "packed")
    )
    assert padded.divergences.max() > 0.1
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-6)


def _distributed_worker(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    ours, theirs = student(), teacher()
    wrapped: Any = nn.parallel.DistributedDataParallel(ours)
    mine = {name: tensor[2 * rank : 2 * rank + 2] for name, tensor in batch(rows=4).items()}
    scored = logps_and_divergences(wrapped, mine, Comparison(theirs, Divergence("jsd")))
    (scored.logps + scored.divergences).sum().backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in ours.named_parameters()}, f"{folder}/gradients.pt")
    leave_together(folder, rank)


def test_ddp_gradients_equal_those_of_one_process(tmp_path: Path) -> None:
    """DDP averages over processes, so each must hold half of the gradient of the whole batch."""
    pair = start_pair(_distributed_worker, str(tmp_path))
    while not pair.join():
        pass
    ours, rows = student(), batch(rows=4)
    expected = action_logps(ours, **rows) + naive(ours, teacher(), rows, Divergence("jsd"))
    (expected.sum() / 2).backward()
    whole = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert_same(torch.load(tmp_path / "gradients.pt"), whole, rtol=1e-5, atol=1e-5)
