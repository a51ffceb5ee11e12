from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    SiglipVisionConfig,
    ViTConfig,
)

from mtpo.errors import GuardError, InputError
from mtpo.models import exact_attention, fingerprint, load_model, load_tokenizer, require_exact_attention
from tests.tiny_models import FAMILIES, Family, tiny_config, tiny_model

IDS = torch.arange(3, 23)[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_with_exact_attention(family: Family, tmp_path: Path) -> None:
    model = tiny_model(family, std=0.3)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config._attn_implementation == ("eager" if family == "gemma2" else "sdpa")
    torch.testing.assert_close(
        loaded(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-4
    )


def test_a_multimodal_gemma_3_loads_as_its_text_model(tmp_path: Path) -> None:
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    text = tiny_config("gemma3")
    multimodal = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text,  # pyright: ignore
            vision_config=vision,
            mm_tokens_per_image=4,
            boi_token_index=44,
            eoi_token_index=45,
            image_token_index=46,
        )
    ).eval()
    multimodal.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded).__name__ == "Gemma3ForCausalLM"
    expected = multimodal(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_softcap_rules_out_sdpa() -> None:
    assert exact_attention(tiny_config("gemma2")) == "eager"
    assert exact_attention(tiny_config("gemma3")) == "sdpa"
    model = tiny_model("gemma2")
    require_exact_attention(model)
    model.config._attn_implementation = "sdpa"  # what transformers 5.0 to 5.20 load by default
    with pytest.raises(GuardError, match="soft-cap of 50"):
        require_exact_attention(model)


@pytest.mark.parametrize(("version", "is_exact"), [("2.5.9", False), ("2.6.0", True), ("2.10.1", True)])
def test_flash_attention_is_exact_once_it_knows_the_softcap(
    version: str, is_exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gemma2")
    model.config._attn_implementation = "flash_attention_2"
    monkeypatch.setattr("importlib.metadata.version", {"flash_attn": version}.__getitem__)
    if is_exact:
        require_exact_attention(model)
    else:
        with pytest.raises(GuardError):
            require_exact_attention(model)


def test_fingerprint_changes_with_one_bit_of_one_weight() -> None:
    model, same = tiny_model("llama"), tiny_model("llama")
    assert fingerprint(model) == fingerprint(same)
    assert fingerprint(model) != fingerprint(tiny_model("llama", dtype=torch.bfloat16))
    with torch.no_grad():
        same.lm_head.weight[0, 0] += 1e-6
    assert fingerprint(model) != fingerprint(same)


def test_bad_names_and_folders_give_one_line(tmp_path: Path) -> None:
    ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path / "vit")
    (tmp_path / "empty").mkdir()
    tiny_config("llama").save_pretrained(tmp_path / "no_weights")
    cases = {
        "missing": "no such folder",
        "empty": "no config.json",
        "vit": "Unrecognized configuration",
        "no_weights": "model.safetensors",
    }
    for name, expected in cases.items():
        with pytest.raises(InputError, match=expected) as caught:
            load_model(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="tokenizer"):
        load_tokenizer(tmp_path / "empty")
    with pytest.raises(InputError, match="float16"):
        load_model(tmp_path, dtype="float16")


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_config("llama", num_hidden_layers=3).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="weights are missing"):
        load_model(tmp_path)
