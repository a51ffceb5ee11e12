"""What samples in a recipe: the embedded engine, vLLM in this process, or servers elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from mtpo.chat import ChatFormat
from mtpo.errors import InputError
from mtpo.models import adapter_base, load_model, load_tokenizer
from mtpo.rollout import Engine

ENGINES = ("transformers", "vllm", "openai")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Which engine samples, and how it is set up."""

    engine: str = field(
        default="transformers", metadata={"help": "transformers, vllm (in this process) or openai (servers)"}
    )
    engine_args: list[str] = field(
        default_factory=list,
        metadata={"help": "NAME=VALUE of vLLM: tensor_parallel_size=2 gpu_memory_utilization=0.9"},
    )
    urls: list[str] = field(
        default_factory=list, metadata={"help": "replicas of one OpenAI-style server: http://HOST:PORT"}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "name or folder, where it is not that of the model"}
    )
    allow_text: bool = field(
        default=False,
        metadata={"help": "take servers that return no token ids; nothing is trained on what they say"},
    )

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise InputError(f"--engine must be one of {ENGINES}, got {self.engine!r}")
        for name, owner in (("engine_args", "vllm"), ("urls", "openai"), ("allow_text", "openai")):
            if getattr(self, name) and self.engine != owner:
                raise InputError(f"--{name} has no effect with --engine {self.engine}: it is for {owner}")
        if self.engine == "openai" and not self.urls:
            raise InputError("--engine openai needs --urls")
        parse_engine_args(self.engine_args)


def parse_engine_args(pairs: Sequence[str]) -> Mapping[str, Any]:
    """`["a=1", "b=true"]` as `{"a": 1, "b": True}`; values are read as YAML.

    Raises:
        InputError: a pair is none, or its value is no YAML.
    """
    values = {}
    for pair in pairs:
        name, is_pair, text = pair.partition("=")
        if not is_pair or not name:
            raise InputError(f"--engine_args {pair!r}: expected NAME=VALUE")
        try:
            values[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise InputError(f"--engine_args {pair!r}: {text!r} is no YAML value") from None
    return values


def load_policy(
    name_or_path: str | Path, dtype: str = "float32", attention: str | None = None
) -> tuple[Any, ChatFormat]:
    """A model on the best device that there is, and the chat format of its tokenizer."""
    chat = ChatFormat.for_tokenizer(load_tokenizer(name_or_path))
    model = load_model(name_or_path, dtype=dtype, attention=attention)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), chat  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Sampler:
    """A policy to sample from: its name, how one talks to it, and the model itself if the engine is embedded."""

    name: str
    chat: ChatFormat
    model: Any
    dtype: str

    @classmethod
    def load(
        cls, name_or_path: str | Path, options: EngineOptions, dtype: str, attention: str | None = None
    ) -> Sampler:
        """Load what the engine of `options` needs in this process."""
        if options.engine == "transformers":
            model, chat = load_policy(name_or_path, dtype, attention)
            return cls(str(name_or_path), chat, model, dtype)
        tokenizer = load_tokenizer(options.tokenizer or name_or_path)
        return cls(str(name_or_path), ChatFormat.for_tokenizer(tokenizer), None, dtype)

    def engine(self, options: EngineOptions, max_in_flight: int) -> Engine:
        """Start the engine.

        Raises:
            InputError: it is not installed, cannot be reached, or refuses its arguments.
        """
        if options.engine == "vllm":
            from mtpo.engines.vllm import VLLMEngine

            arguments = {"dtype": self.dtype, **parse_engine_args(options.engine_args)}
            base = adapter_base(self.name)
            if base is not None:
                return VLLMEngine(base, adapter=self.name, **arguments)
            return VLLMEngine(self.name, **arguments)
        if options.engine == "openai":
            from mtpo.engines.openai import OpenAIEngine

            text_tokenizer = self.chat.tokenizer if options.allow_text else None
            return OpenAIEngine(options.urls, self.name, text_tokenizer=text_tokenizer)
        from mtpo.engines.transformers import TransformersEngine

        return TransformersEngine(self.model, max_rows=max_in_flight + max_in_flight // 2)
