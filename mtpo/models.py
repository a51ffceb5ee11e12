"""Models and tokenizers as transformers loads them, with the attention that the config asks for.

Gemma 2 squashes attention scores with `cap * tanh(score / cap)`. transformers 5.0 to 5.20 load it with sdpa,
which drops the cap without a word: log-probs are then off by several nats. So the implementation is always
named when a model is loaded, and checked before a model is trained or sampled from.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from mtpo.errors import GuardError, InputError
from mtpo.runs import read_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
"""No float16: Gemma's activations overflow it."""

TEXT_OF_MULTIMODAL = {r"^(model\.)?language_model\.(model\.)?": "model."}
"""Where a multimodal Gemma 3 checkpoint keeps the weights of its text model."""


def load_model(
    name_or_path: str | Path, *, dtype: str = "float32", attention: str | None = None, in_4bit: bool = False
) -> PreTrainedModel:
    """Load a causal language model in eval mode; of a multimodal Gemma 3 checkpoint, its text model.

    Args:
        name_or_path: a folder written by `save_pretrained`, or a name on the hub. Of an adapter's folder, the model
            is the one that its `adapter_config.json` names, with the adapter on it.
        dtype: a key of `DTYPES`.
        attention: transformers' `attn_implementation`; `exact_attention(config)` by default.
        in_4bit: quantise the linear layers, head excepted, on this process's GPU; they then compute in `dtype`.

    Raises:
        InputError: there is no such folder or name, it holds no causal language model, weights are missing
            from it, or the attention implementation is unknown or cannot run here.
        GuardError: `attention` would drop the model's soft-cap.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    base = adapter_base(name_or_path)
    if base is not None:
        model = load_model(base, dtype=dtype, attention=attention, in_4bit=in_4bit)
        return _with_adapter(model, name_or_path)
    config = load_config(name_or_path)
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "output_loading_info": True}
    if config.model_type == "gemma3_text":
        options["key_mapping"] = TEXT_OF_MULTIMODAL
    options |= {"config": config, "attn_implementation": attention or exact_attention(config)}
    if in_4bit:
        options |= _quantisation(dtype)
    model, info = _pretrained(AutoModelForCausalLM, name_or_path, "model", **options)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(f"model {name_or_path}: {len(missing)} weights are missing, {missing[0]} among them")
    require_exact_attention(model)
    model.config._name_or_path = model.name_or_path = str(name_or_path)  # what an adapter names as its base
    return model.eval()


def load_config(name_or_path: str | Path) -> Any:
    """What `load_model` would make a model of, without its weights; of an adapter's folder, its base's.

    Raises:
        InputError: there is no such folder or name, or it holds no model.
    """
    base = adapter_base(name_or_path)
    if base is not None:
        return load_config(base)
    config = _pretrained(AutoConfig, name_or_path, "model")
    return config.get_text_config() if config.model_type == "gemma3" else config


def adapter_base(name_or_path: str | Path) -> str | None:
    """The model that an adapter's folder names; None for any other folder or name.

    Raises:
        InputError: the folder's `adapter_config.json` is broken or names none.
    """
    path = Path(name_or_path) / "adapter_config.json"
    if not path.exists():
        return None
    base = read_json(path).get("base_model_name_or_path")
    if not base:
        raise InputError(f"{path}: names no model (base_model_name_or_path) that the adapter is for")
    return base


def holds_model(folder: Path) -> bool:
    """A model, or an adapter, was written there."""
    return any((folder / name).exists() for name in ("config.json", "adapter_config.json"))


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """
    Raises:
        InputError: there is no such folder or name, or it holds no tokenizer.
    """
    return _pretrained(AutoTokenizer, name_or_path, "tokenizer")


def exact_attention(config: Any) -> str:
    """The `attn_implementation` to load a transformers config with: exact, and available everywhere."""
    return "eager" if _softcap(config) else "sdpa"


def attention_refusal(config: Any) -> str | None:
    """Why a model that was loaded with this config would not attend as it was trained to; None if it does."""
    implementation = config.get_text_config()._attn_implementation
    if _softcap(config) and not _applies_softcap(implementation):
        return (
            f"attention implementation {implementation!r} drops the soft-cap of {_softcap(config)} that this "
            f"{config.model_type} model was trained with: load it with 'eager' or 'flex_attention'"
        )
    return None


def require_exact_attention(model: nn.Module) -> None:
    """
    Raises:
        GuardError: `attention_refusal` has a reason.
    """
    if reason := attention_refusal(unwrapped(model).config):
        raise GuardError(reason)


def unwrapped(model: nn.Module) -> Any:
    """The transformers model inside DDP, FSDP, DeepSpeed, torch.compile and PEFT wrappers."""
    while (inner := getattr(model, "module", None) or getattr(model, "_orig_mod", None)) is not None:
        model = inner
    unwrap_peft = getattr(model, "get_base_model", None)
    return unwrap_peft() if unwrap_peft is not None else model


def whole(parameter: Any) -> Any:
    """The tensor itself, put together where FSDP2 holds a shard of it; then all processes have to ask for it."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def gathered(parameter: Any) -> AbstractContextManager[Any]:
    """While it lasts, what DeepSpeed's ZeRO-3 has cut up is whole; all processes have to enter it."""
    if getattr(getattr(parameter, "ds_status", None), "name", "") != "NOT_AVAILABLE":
        return nullcontext()
    from deepspeed.zero import GatheredParameters  # pyright: ignore[reportMissingImports]

    return GatheredParameters([parameter])


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names, types, shapes and bytes of all weights, adapters included; 64 hex digits.

    Reads every weight once: about a second per GB. Of sharded weights it is that of the whole ones, and all processes
    have to ask for it.
    """
    digest = hashlib.sha256()
    for name, parameter in unwrapped(model).named_parameters():
        with gathered(parameter):
            weights = whole(parameter.detach()).cpu().contiguous()
        digest.update(f"{name} {weights.dtype} {tuple(weights.shape)}\n".encode())
        digest.update(weights.view(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
    return digest.hexdigest()


def _quantisation(dtype: str) -> dict[str, Any]:
    """NormalFloat in 4 bits with quantised scales: QLoRA (arXiv 2305.14314, section 3)."""
    if find_spec("bitsandbytes") is None or not torch.cuda.is_available():
        raise InputError("4-bit weights need a CUDA device and bitsandbytes, pip install bitsandbytes")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[dtype],
    )
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}


def _with_adapter(model: PreTrainedModel, folder: str | Path) -> Any:
    try:
        from peft import PeftModel

        return PeftModel.from_pretrained(model, str(folder)).eval()
    except ImportError as error:
        raise InputError(f"{folder} is an adapter, which needs peft, pip install 'mtpo[peft]'") from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"adapter {folder} does not fit {model.name_or_path}: {reason}") from error


def _softcap(config: Any) -> float | None:
    return getattr(config.get_text_config(), "attn_logit_softcapping", None)


def _applies_softcap(implementation: str) -> bool:
    """transformers passes the cap to flash-attn only if that knows it, which it does since 2.6."""
    if implementation == "flash_attention_2":
        try:
            return Version(importlib.metadata.version("flash_attn")) >= Version("2.6")
        except importlib.metadata.PackageNotFoundError:
            return False
    return implementation in ("eager", "flex_attention")


def _pretrained(auto_class: Any, name_or_path: str | Path, kind: str, **options: Any) -> Any:
    """`from_pretrained`, with one line instead of a traceback where the user's name or folder is at fault."""
    path = Path(name_or_path)
    looks_local = path.is_absolute() or str(name_or_path).startswith(".") or len(path.parts) > 2
    if looks_local and not path.is_dir():
        raise InputError(f"{kind} {name_or_path}: no such folder")
    if path.is_dir() and not (path / "config.json").exists() and kind == "model":
        raise InputError(f"{kind} {name_or_path}: the folder has no config.json")
    try:
        return auto_class.from_pretrained(str(name_or_path), **options)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{kind} {name_or_path}: {reason}") from error
