"""The published architectures that the configs in recipes/configs train, so that a dry run needs no network.

Sizes are those of the `config.json` that comes with each model; the Gemma papers list them too (arXiv 2403.08295,
table 1; 2408.00118, table 1; 2503.19786, table 1). A test holds each to its published number of parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Gemma2Config, Gemma3TextConfig, GemmaConfig, MistralConfig

from mtpo.models import load_config


def gemma_7b() -> GemmaConfig:
    """Gemma 1.1 and CodeGemma 1.1."""
    return GemmaConfig(
        vocab_size=256_000,
        hidden_size=3072,
        intermediate_size=24_576,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=256,
        max_position_embeddings=8192,
    )


def gemma_2_2b() -> Gemma2Config:
    return Gemma2Config(
        vocab_size=256_000,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=4096,
        max_position_embeddings=8192,
    )


def gemma_2_9b() -> Gemma2Config:
    return Gemma2Config(
        vocab_size=256_000,
        hidden_size=3584,
        intermediate_size=14_336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=4096,
        max_position_embeddings=8192,
    )


def gemma_3_4b() -> Gemma3TextConfig:
    """Its text model."""
    return Gemma3TextConfig(
        vocab_size=262_208,
        hidden_size=2560,
        intermediate_size=10_240,
        num_hidden_layers=34,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=1024,
        max_position_embeddings=131_072,
    )


def mistral_7b_v03() -> MistralConfig:
    return MistralConfig(
        vocab_size=32_768,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        sliding_window=None,
        max_position_embeddings=32_768,
    )


PUBLISHED = {
    "google/gemma-1.1-7b-it": gemma_7b,
    "google/codegemma-1.1-7b-it": gemma_7b,
    "google/gemma-2-2b-it": gemma_2_2b,
    "google/gemma-2-9b-it": gemma_2_9b,
    "google/gemma-3-4b-it": gemma_3_4b,
    "mistralai/Mistral-7B-v0.3": mistral_7b_v03,
    "mistralai/Mistral-7B-Instruct-v0.3": mistral_7b_v03,
}
"""By name on the hub, where the Gemma models are only shown to those who have signed their licence."""


def architecture(model: str) -> tuple[Any, str]:
    """The config of a model and where it is from: its folder, this file, or the hub.

    Raises:
        InputError: there is no such folder, or the name is not known here nor on the hub.
    """
    if model in PUBLISHED and not Path(model).is_dir():
        return PUBLISHED[model](), "the published architecture"
    return load_config(model), "its config.json"
