from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AttentionInterface, MambaConfig

from mtpo.batches import PairCollator, Row
from mtpo.errors import InputError
from mtpo.layouts import Layout, arranged
from mtpo.scoring import batch_actions, batch_logps, layout_refusal
from mtpo.training import TrainingSettings, train
from tests.tiny_models import FAMILIES, Family, tiny_config, tiny_model
from tests.tiny_rows import tiny_labels, tiny_pairs

FLAT: tuple[Layout, ...] = ("packed", "tree")


def pair(prompt: int, shared: int, chosen: int, rejected: int, seed: int) -> Row:
    """Both sides: a prompt, tokens that they share, then their own; every fifth token is tool output."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 48, (prompt + shared + chosen + rejected,), generator=generator).tolist()
    begin, first, second = ids[: prompt + shared], ids[prompt + shared :][:chosen], ids[-rejected:]
    row: Row = {"problem_id": f"pair/{seed}", "chosen_sample": 0, "rejected_sample": 1}
    for side, rest in (("chosen", first), ("rejected", second if rejected else [])):
        own = begin + rest
        row[f"{side}_input_ids"] = own
        row[f"{side}_completion_mask"] = [int(n >= prompt and n % 5 != 4) for n in range(len(own))]
    return row


PAIRS = [
    pair(
        prompt=5, shared=7, chosen=14, rejected=22, seed=1
    ),  # an equal turn, and longer than the window of 8
    pair(prompt=6, shared=9, chosen=11, rejected=0, seed=2),  # the rejected side is how the chosen one begins
    pair(prompt=12, shared=0, chosen=3, rejected=9, seed=3),  # nothing but the prompt in common
]


def test_a_tree_holds_the_shared_prefix_once() -> None:
    batch = arranged([[2, 5, 7, 8], [2, 5, 9, 6, 4], [2, 3], [2, 3, 1]], [(0, 1), (2, 3)], pad_id=0)
    assert batch["row_ids"].tolist() == [[2, 5, 7, 8, 9, 6, 4, 2, 3, 1]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 2, 3, 4, 0, 1, 2]]
    assert batch["documents"].tolist() == [[0, 0, 0, 0, 0, 0, 0, 1, 1, 1]]
    assert batch["branches"].tolist() == [[0, 0, 1, 1, 2, 2, 2, 0, 0, 2]]
    places = [[0, 1, 2, 3, 0], [0, 1, 4, 5, 6], [7, 8, 0, 0, 0], [7, 8, 9, 0, 0]]
    assert batch["places"].tolist() == places


def test_packed_rows_are_as_long_as_the_longest_trajectory_needs() -> None:
    ids = [[2] * 9, [3] * 3, [4] * 2, [5] * 3]
    batch = arranged(ids, [(0,), (1,), (2,), (3,)], pad_id=0)
    assert batch["row_ids"].tolist() == [[2] * 9 + [3] * 3 + [5] * 3 + [4] * 2]
    batch = arranged([*ids, [6] * 8], [(n,) for n in range(5)], pad_id=0)
    assert batch["row_ids"].tolist() == [[2] * 9 + [5] * 3 + [0], [6] * 8 + [3] * 3 + [4] * 2]
    assert batch["documents"][0].tolist() == [0] * 9 + [3] * 3 + [-1]
    assert batch["positions"][0].tolist() == [*range(9), *range(3), 0]


def test_an_action_token_that_both_sides_share_is_predicted_once() -> None:
    batch = PairCollator(0, "tree")(PAIRS)
    row, ids = PAIRS[0], batch["input_ids"]
    assert row["chosen_input_ids"][:12] == row["rejected_input_ids"][:12]
    num_shared = sum(
        sum(row["chosen_completion_mask"][:shared]) for row, shared in zip(PAIRS, (12, 15, 12), strict=True)
    )
    actions = batch_actions(batch)
    assert num_shared > 10 and len(actions.targets) == batch["completion_mask"].sum() - num_shared
    values = actions.placed(actions.targets.double())
    assert torch.equal(values, ids.double() * batch["completion_mask"])


@pytest.fixture(scope="module")
def padded() -> Callable[[Family, str], tuple[Any, Tensor, dict[str, Tensor]]]:
    """A model, its log-probs of `PAIRS` side by side, and their gradient, computed once."""
    known = {}

    def of(family: Family, attention: str) -> tuple[Any, Tensor, dict[str, Tensor]]:
        if (family, attention) not in known:
            model = tiny_model(family, std=0.3, attention=attention)
            known[family, attention] = model, *value_and_gradient(model, "padded")
        return known[family, attention]

    return of


def value_and_gradient(model: Any, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs, and the gradient of a sum that weighs every token differently."""
    model.zero_grad()
    logps = batch_logps(model, PairCollator(0, layout)(PAIRS))
    weights = torch.arange(logps.numel()).reshape(logps.shape).cos()
    (logps * weights).sum().backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logps.detach(), gradient


def assert_same(actual: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=2e-5)
    largest = max(gradient.abs().max().item() for gradient in expected[1].values())
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(actual[1][name], gradient, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("layout", FLAT)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_change_neither_log_probs_nor_gradients(
    family: Family, attention: str, layout: Layout, padded: Any
) -> None:
    if family == "gemma2" and attention == "sdpa":
        pytest.skip("sdpa has no soft-cap, and is refused")
    model, *expected = padded(family, attention)
    assert_same(value_and_gradient(model, layout), tuple(expected))


def by_bounds(
    module: Any,
    query: Tensor,  # (1, heads, T, D)
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention with the interface of flash attention's: sequence by sequence, between the bounds that it is given."""
    bounds, groups = cu_seq_lens_q.tolist(), module.num_key_value_groups
    assert attention_mask is None and bounds == cu_seq_lens_k.tolist() and bounds[-1] == query.shape[2]
    lengths = [end - start for start, end in pairwise(bounds)]
    assert max(lengths) == max_length_q == max_length_k
    found = []
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
        scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * scaling
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        past = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        hidden = (past < 0) | (past >= (sliding_window or len(past)))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        found.append((weights @ v.repeat_interleave(groups, 1)).transpose(1, 2))
    return torch.cat(found, 1), None


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3", "mistral"])
def test_flash_attention_is_told_where_packed_trajectories_begin(family: Family, padded: Any) -> None:
    AttentionInterface.register("flash_attention_by_bounds", by_bounds)
    model, (_, *expected) = tiny_model(family, std=0.3), padded(family, "eager")
    model.config._attn_implementation_internal = "flash_attention_by_bounds"
    assert_same(value_and_gradient(model, "packed"), tuple(expected))


@pytest.mark.parametrize("layout", FLAT)
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_flex_attention_takes_the_same_masks(family: Family, layout: Layout, padded: Any) -> None:
    """Its maths without its compiler, which needs a minute here; `benchmarks.gemma_parity` takes that minute."""
    flex, (_, expected, _) = tiny_model(family, std=0.3, attention="flex_attention"), padded(family, "eager")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        actual = batch_logps(flex, PairCollator(0, layout)(PAIRS))
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "lora"])
def test_wrapped_models_take_the_masks_of_a_tree(wrapper: str, tmp_path: Path) -> None:
    """One process is enough: what could go wrong is how a wrapper hands on a dictionary of masks."""
    plain, model = tiny_model("gemma2", std=0.3), tiny_model("gemma2", std=0.3)
    expected = value_and_gradient(plain, "padded")
    if wrapper == "lora":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        model = peft.get_peft_model(model, config).eval()
        assert_same(value_and_gradient(model, "tree"), value_and_gradient(model, "padded"))
        return
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        if wrapper == "ddp":
            wrapped: Any = torch.nn.parallel.DistributedDataParallel(model)
        else:
            mesh = init_device_mesh("cpu", (1,))
            for layer in model.base_model.layers:  # pyright: ignore
                fully_shard(layer, mesh=mesh)  # pyright: ignore
            wrapped = fully_shard(model, mesh=mesh)
        logps, gradient = value_and_gradient(wrapped, "tree")
    finally:
        torch.distributed.destroy_process_group()
    whole = {
        name.removeprefix("module."): getattr(g, "to_local", lambda g=g: g)() for name, g in gradient.items()
    }
    assert_same((logps, whole), expected)


METHODS: dict[str, tuple[Callable[[], list[Row]], tuple[Layout, ...]]] = {
    "dpo": (lambda: PAIRS + tiny_pairs(3), FLAT),
    "kto": (lambda: tiny_labels(3), ("packed",)),
    "dro_v": (lambda: tiny_labels(3), ("packed",)),
}


@pytest.mark.parametrize("method", list(METHODS))
def test_training_goes_the_same_way_in_every_layout(method: str, tmp_path: Path) -> None:
    """Two steps of two micro-batches, activations computed twice; KTO's mismatched trajectories are packed too."""
    rows, layouts = METHODS[method]
    weights, steps = {}, {}
    for layout in ("padded", *layouts):
        model, out = tiny_model("gemma2", std=0.1), tmp_path / layout
        settings = TrainingSettings(
            method=method,
            learning_rate=1e-3,
            batch_size=6,
            micro_batch_size=3,
            epochs=2,
            max_grad_norm=1e9,
            gradient_checkpointing=True,
            layout=layout,
        )
        train(model, rows(), settings, out, progress=False)
        weights[layout] = torch.cat([p.detach().flatten() for p in model.parameters()])
        lines = (out / "metrics.jsonl").read_text().splitlines()
        steps[layout] = [json.loads(line) | {"tokens_per_s": 0} for line in lines]
    assert abs(steps["padded"][1]["loss"] - steps["padded"][0]["loss"]) > 1e-3  # it does learn
    for layout in layouts:
        assert steps[layout][0]["loss"] == pytest.approx(steps["padded"][0]["loss"], rel=1e-5)
        assert steps[layout][1] == pytest.approx(steps["padded"][1], rel=1e-3, abs=1e-4)
        torch.testing.assert_close(weights[layout], weights["padded"], rtol=0, atol=1e-4)


REFUSED: list[tuple[str, str, Layout, str, str]] = [
    ("gemma2", "sdpa", "padded", "cuda", "drops the soft-cap of 50"),
    ("gemma2", "flex_attention", "padded", "cpu", "no backward pass on a CPU"),
    ("gemma3", "flash_attention_2", "tree", "cuda", "no mask that has branches"),
    ("gemma3", "paged|sdpa", "packed", "cuda", "'paged|sdpa' is not known"),
    ("mamba", "eager", "packed", "cpu", "mamba models are not known to keep"),
]


@pytest.mark.parametrize(("family", "attention", "layout", "device", "reason"), REFUSED)
def test_what_cannot_be_exact_is_refused(
    family: Any, attention: str, layout: Layout, device: str, reason: str
) -> None:
    config = MambaConfig() if family == "mamba" else tiny_config(family)
    config._attn_implementation_internal = attention  # as of a model that was loaded with it
    assert reason in str(layout_refusal(config, layout, device=device))
    if attention == "flex_attention":
        assert layout_refusal(config, layout, device="cuda") is None
        assert layout_refusal(config, layout, device="cpu", with_gradient=False) is None


def test_chunked_attention_is_refused_where_it_would_need_a_mask() -> None:
    config = tiny_config("gemma2")
    config._attn_implementation_internal = "eager"
    config.layer_types = ["chunked_attention", "full_attention"]
    assert "chunked_attention" in str(layout_refusal(config, "tree"))


def test_a_tree_needs_pairs(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="shares the prefix of a pair, but method 'kto' trains on label rows"
    ):
        TrainingSettings(method="kto", learning_rate=1e-3, layout="tree")
    model = tiny_model("llama", attention="flex_attention")
    settings = TrainingSettings(method="dpo", learning_rate=1e-3, batch_size=2, layout="tree")
    with pytest.raises(InputError, match="layout 'tree': flex_attention has no backward pass on a CPU"):
        train(model, tiny_pairs(2), settings, tmp_path, progress=False)
