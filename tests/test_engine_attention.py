from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from mtpo.engines.attention import GROUPED, additive_mask, attention_windows, grouped, grouped_attention
from mtpo.errors import InputError
from mtpo.models import load_model
from tests.tiny_models import FAMILIES, Family, tiny_config, tiny_model


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("width", [1, 3])
def test_grouped_attention_is_that_of_transformers(width: int, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query = 4 * torch.randn(2, width, 6, 8, generator=generator).transpose(1, 2)
    key, value = (torch.randn(2, 2, 16, 8, generator=generator)[:, :, :7] for _ in range(2))
    mask = additive_mask(torch.tensor([[3, 4, 5], [4, 5, 6]])[:, :width], 7, 4, torch.float32)
    module = SimpleNamespace(num_key_value_groups=3, training=False)
    expected, _ = eager_attention_forward(module, query, key, value, mask, scaling=0.5, softcap=softcap)  # pyright: ignore[reportArgumentType]
    found, _ = grouped_attention(torch.nn.Identity(), query, key, value, mask, scaling=0.5, softcap=softcap)
    assert torch.allclose(found, expected, atol=1e-6)


def attentions(model: torch.nn.Module) -> list[str]:
    """The attention implementation of each layer."""
    return [m.config._attn_implementation for m in model.modules() if type(m).__name__.endswith("Attention")]  # pyright: ignore


@pytest.mark.parametrize("family", FAMILIES)
def test_a_twin_attends_in_groups_and_the_model_as_before(family: Family, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    for model in (tiny_model(family), load_model(tmp_path)):
        own = attentions(model)
        twin = grouped(model.base_model, model.config.get_text_config())
        assert attentions(twin) == [GROUPED] * len(own)
        assert attentions(model) == own and GROUPED not in own
        pairs = zip(twin.parameters(), model.base_model.parameters(), strict=True)
        assert all(mine is theirs for mine, theirs in pairs)


def test_an_adapter_switched_off_is_off_for_the_twin_too() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("gemma2")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    twin = grouped(model.base_model, model.config)
    ids = torch.tensor([[3, 4, 5]])
    mask = additive_mask(torch.arange(3)[None], 3, None, torch.float32)
    masks = dict.fromkeys(("full_attention", "sliding_attention"), mask)
    hidden = {}
    with torch.no_grad():
        hidden["on"] = twin(ids, attention_mask=masks).last_hidden_state
        with adapted.disable_adapter():
            hidden["off"] = twin(ids, attention_mask=masks).last_hidden_state
            expected = model.base_model(ids, attention_mask=masks).last_hidden_state
    assert torch.allclose(hidden["off"], expected, atol=1e-5)
    assert not torch.allclose(hidden["off"], hidden["on"], atol=1e-2)


def test_an_unknown_family_keeps_its_own_attention() -> None:
    module = torch.nn.Identity()
    assert grouped(module, SimpleNamespace(model_type="gpt_oss")) is module


def test_masks_show_the_past_as_far_as_the_window_goes() -> None:
    mask = additive_mask(torch.tensor([[2, 3], [0, 1]]), 4, 2, torch.float32)
    visible = [[[0, 1, 1, 0], [0, 0, 1, 1]], [[1, 0, 0, 0], [1, 1, 0, 0]]]
    assert (mask[:, 0] == 0).int().tolist() == visible
    assert mask.min() == torch.finfo(torch.float32).min


def test_layers_of_another_type_are_refused() -> None:
    config = tiny_config("gemma2")
    assert attention_windows(config) == {"full_attention": None, "sliding_attention": 8}
    config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(InputError, match="not \\['chunked_attention'\\]"):
        attention_windows(config)
