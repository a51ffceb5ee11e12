"""What samples in a recipe: the embedded engine, vLLM in this process, or servers elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
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
    ray: str | None = field(
        default=None,
        metadata={"help": "spread engines and interpreters over this Ray cluster: HOST:PORT, auto or local"},
    )
    ray_engines: int = field(default=1, metadata={"help": "with --ray: engines, an actor each"})
    ray_gpus: float = field(default=0.0, metadata={"help": "with --ray: GPUs of one engine"})
    ray_pools: int = field(
        default=1, metadata={"help": "with --ray: sandboxes of --kernels interpreters, an actor each"}
    )

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise InputError(f"--engine must be one of {ENGINES}, got {self.engine!r}")
        for name, owner in (("engine_args", "vllm"), ("urls", "openai"), ("allow_text", "openai")):
            if getattr(self, name) and self.engine != owner:
                raise InputError(f"--{name} has no effect with --engine {self.engine}: it is for {owner}")
        if self.engine == "openai" and not self.urls:
            raise InputError("--engine openai needs --urls")
        for name, default in (("ray_engines", 1), ("ray_gpus", 0.0), ("ray_pools", 1)):
            if getattr(self, name) < default:
                raise InputError(f"--{name} must be at least {default:g}, got {getattr(self, name)}")
            if getattr(self, name) != default and self.ray is None:
                raise InputError(f"--{name} has no effect without --ray")
        if self.engine == "openai" and (self.ray_engines, self.ray_gpus) != (1, 0.0):
            raise InputError(
                "--ray_engines and --ray_gpus have no effect with --engine openai: it has --urls"
            )
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
    attention: str | None = None

    @classmethod
    def load(
        cls, name_or_path: str | Path, options: EngineOptions, dtype: str, attention: str | None = None
    ) -> Sampler:
        """Load what the engine of `options` needs in this process."""
        if options.engine == "transformers" and options.ray is None:
            model, chat = load_policy(name_or_path, dtype, attention)
            return cls(str(name_or_path), chat, model, dtype, attention)
        tokenizer = load_tokenizer(options.tokenizer or name_or_path)
        return cls(str(name_or_path), ChatFormat.for_tokenizer(tokenizer), None, dtype, attention)

    def engine(self, options: EngineOptions, max_in_flight: int) -> Engine:
        """Start the engine.

        Raises:
            InputError: it is not installed, cannot be reached, or refuses its arguments.
        """
        if options.engine == "openai":
            from mtpo.engines.openai import OpenAIEngine

            text_tokenizer = self.chat.tokenizer if options.allow_text else None
            return OpenAIEngine(options.urls, self.name, text_tokenizer=text_tokenizer)
        make = self._vllm(options) if options.engine == "vllm" else self._embedded(max_in_flight)
        if options.ray is None:
            return make()
        from mtpo.cluster import connect
        from mtpo.engines.cluster import ClusterEngine

        connect(options.ray)
        resources = {"num_cpus": 1, "num_gpus": options.ray_gpus}
        return ClusterEngine(make, options.ray_engines, resources)

    def _vllm(self, options: EngineOptions) -> Callable[[], Engine]:
        from mtpo.engines.vllm import VLLMEngine

        arguments = {"dtype": self.dtype, **parse_engine_args(options.engine_args)}
        base = adapter_base(self.name)
        if base is not None:
            return partial(VLLMEngine, base, adapter=self.name, **arguments)
        return partial(VLLMEngine, self.name, **arguments)

    def _embedded(self, max_in_flight: int) -> Callable[[], Engine]:
        max_rows = max_in_flight + max_in_flight // 2
        if self.model is None:
            return partial(_load_engine, self.name, self.dtype, self.attention, max_rows)
        from mtpo.engines.transformers import TransformersEngine

        return partial(TransformersEngine, self.model, max_rows=max_rows)


def _load_engine(name: str, dtype: str, attention: str | None, max_rows: int) -> Engine:
    from mtpo.engines.transformers import TransformersEngine

    model, _ = load_policy(name, dtype, attention)
    return TransformersEngine(model, max_rows=max_rows)
