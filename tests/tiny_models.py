"""Random causal language models of a few thousand parameters, one factory for every family."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

Family = Literal["gemma", "gemma2", "gemma3", "llama", "mistral", "qwen2", "qwen3"]
FAMILIES: tuple[Family, ...] = get_args(Family)

torch.set_num_threads(
    1
)  # a second thread speeds nothing up here, and on a busy machine makes it ten times slower

CONFIGS: dict[Family, type[PretrainedConfig]] = {
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}


def tiny_config(family: Family, *, vocab_size: int = 48, **overrides: Any) -> PretrainedConfig:
    """Two layers, hidden size 32, 4 heads, 2 KV heads; a sliding window of 8 where the family has one.

    Ids 0, 1 and 2 are pad, eos and bos, as in Gemma's vocabulary. Soft-caps and tied embeddings are the
    family's own defaults.
    """
    options: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    if family in ("gemma2", "gemma3", "mistral"):
        options["sliding_window"] = 8
    if family in ("gemma2", "gemma3"):
        options["query_pre_attn_scalar"] = 8
        options["layer_types"] = ["sliding_attention", "full_attention"]
    return CONFIGS[family](**{**options, **overrides})


def tiny_model(
    family: Family,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attention: str = "eager",
    std: float | None = None,
    **overrides: Any,
) -> PreTrainedModel:
    """The model of `tiny_config` with random weights, in eval mode.

    Args:
        std: standard deviation of every weight matrix. The default of 0.02 gives nearly uniform
            predictions; about 0.5 gives logits that saturate Gemma 2's soft-cap.
        overrides: options of the config.
    """
    config = tiny_config(family, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
        if std is not None:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 2:
                        parameter.normal_(0.0, std)
    return model.eval()
