from types import SimpleNamespace

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from mtpo.engines.attention import GROUPED, additive_mask, attention_windows, grouped, grouped_attention
from mtpo.errors import InputError
from tests.tiny_models import FAMILIES, tiny_config


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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_gets_its_own_attention_back(family) -> None:
    config = tiny_config(family, attn_implementation="eager")
    with pytest.raises(KeyError), grouped(config):
        assert config._attn_implementation == GROUPED
        raise KeyError
    assert config._attn_implementation == "eager"


def test_an_unknown_family_keeps_its_own_attention() -> None:
    config = SimpleNamespace(model_type="gpt_oss", _attn_implementation="eager")
    with grouped(config):
        assert config._attn_implementation == "eager"


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
