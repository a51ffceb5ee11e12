"""Who samples in online training: the policy, an earlier one, its reference, their average or their mixture.

A `Sampler` says which; `PolicySamplers` gives an engine for it and moves the trainer's weights there, every k steps.
The name of the sampler belongs into `Trajectory.policy`; the engine's own log-probs, of a mixture the mixture's, are
in the trajectory already.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mtpo.engines.cached_model import Weights
from mtpo.engines.mixture import Mixture
from mtpo.engines.transformers import TransformersEngine
from mtpo.errors import InputError
from mtpo.models import unwrapped

Parameters = dict[str, Tensor]
AVERAGE = "average with decay "
Kind = Literal["current", "previous", "reference", "ema", "geo_mix"]


@dataclass(frozen=True, slots=True)
class Sampler:
    """Which policy samples: `CURRENT`, `REFERENCE`, or what `previous`, `ema` and `geo_mix` make."""

    kind: Kind
    value: float | None = None

    @property
    def name(self) -> str:
        """As in `geo_mix(0.125)`: for `Trajectory.policy`, logs and options."""
        return self.kind if self.value is None else f"{self.kind}({self.value:g})"


CURRENT = Sampler("current")
"""The policy as it was last pushed."""
REFERENCE = Sampler("reference")


def previous(pushes: int = 1) -> Sampler:
    """The policy as it was `pushes` pushes before the last one; until there were so many, as it began.

    Raises:
        InputError: `pushes` is below 1.
    """
    if pushes < 1:
        raise InputError(f"previous(k) needs k of at least 1, got {pushes}")
    return Sampler("previous", pushes)


def ema(decay: float) -> Sampler:
    """The exponential moving average of the policy's weights: average <- decay average + (1 - decay) policy.

    Raises:
        InputError: `decay` is not in [0, 1).
    """
    if not 0 <= decay < 1:
        raise InputError(f"ema(decay) needs a decay in [0, 1), got {decay}")
    return Sampler("ema", decay)


def geo_mix(ref_coef: float) -> Sampler:
    """policy^(1 - b) reference^b / Z token by token, with b = `ref_coef`.

    Raises:
        InputError: `ref_coef` is not in [0, 1].
    """
    if not 0 <= ref_coef <= 1:
        raise InputError(f"geo_mix(b) needs b in [0, 1], got {ref_coef}")
    return Sampler("geo_mix", ref_coef)


class PolicySamplers:
    """Engines in this process for all that is made of one policy and one reference.

    With `push_every` 1 the trainer's own modules sample, so that there is one copy of the policy; above 1 there is a
    second one, which stays as it is between two pushes. `previous` takes a copy, and k + 1 in main memory; `ema` takes
    a copy in float32, and above 1 a second one. Sampling after a push first reads all weights, for the fingerprint.

    Args:
        policy: the model that is trained in place, bare or wrapped, but not sharded. Sampling leaves it in eval mode.
        reference: the model that `REFERENCE` and `geo_mix` need; its weights must not change. By default, if the policy
            has an adapter, the policy without it, which shares its weights.
        tokenizers: of policy and reference, where they are not one and the same; a mixture compares them.
        push_every: k; the trainer's weights go to the engines every k steps.
        max_rows, max_context: as of `TransformersEngine`.

    Raises:
        InputError: `push_every` is below 1.
    """

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module | None = None,
        *,
        tokenizers: tuple[Any, Any] | None = None,
        push_every: int = 1,
        max_rows: int = 64,
        max_context: int | None = None,
    ) -> None:
        if push_every < 1:
            raise InputError(f"push_every must be at least 1, got {push_every}")
        self._policy: nn.Module = unwrapped(policy)
        self._reference = reference
        self._tokenizers = tokenizers
        self._push_every = push_every
        self._engine_options: dict[str, Any] = {"max_rows": max_rows, "max_context": max_context}
        self._engines: dict[Sampler, TransformersEngine] = {}
        self._weights: dict[Sampler, Weights] = {}
        self._copies: dict[str, nn.Module] = {}
        self._saved: dict[str, Parameters] = {}
        self._history: deque[Parameters] = deque(maxlen=1)
        self._step = self._pushed_at = 0

    @property
    def staleness(self) -> int:
        """Steps that the policy has taken since the engines got its weights."""
        return self._step - self._pushed_at

    def engine(self, sampler: Sampler) -> TransformersEngine:
        """The engine of one sampler, which is made when it is first asked for; averages and history begin then.

        Raises:
            InputError: the sampler needs a reference and there is none, policy and reference cannot be mixed, or a
                model is loaded with an attention implementation that the engine does not take.
        """
        if sampler not in self._engines:
            self._engines[sampler] = TransformersEngine(self._source(sampler), **self._engine_options)
        return self._engines[sampler]

    def update(self, step: int) -> None:
        """Take note of the policy after `step` optimiser steps; push it where that is due.

        Raises:
            EngineError: weights are to be pushed while a request is in flight; nothing has changed then.
        """
        is_due = step % self._push_every == 0
        if is_due:
            for engine in self._engines.values():
                engine.forget()
        for name, average in self._copies.items():
            if name.startswith(AVERAGE):
                _follow(average, self._policy, float(name.removeprefix(AVERAGE)))
        self._step = step
        if is_due:
            self._push()

    def metrics(self) -> dict[str, float]:
        """Staleness, and mean and minimum of the mixtures' log Z over the tokens sampled since the last call."""
        found: dict[str, float] = {"staleness": self.staleness}
        for sampler, engine in self._engines.items():
            tally = engine.log_normalizers
            if tally.count:
                found[f"{sampler.name}/log_z_mean"] = tally.mean
                found[f"{sampler.name}/log_z_min"] = tally.minimum
            tally.clear()
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the policy's own checkpoint: averages, earlier and served weights."""
        return {
            "step": self._step,
            "pushed_at": self._pushed_at,
            "copies": self._saved | {name: _parameters(model) for name, model in self._copies.items()},
            "history": list(self._history),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`. The policy must have been restored before.

        Raises:
            EngineError: a request is in flight.
        """
        for engine in self._engines.values():
            engine.forget()
        self._step, self._pushed_at = state["step"], state["pushed_at"]
        self._saved = dict(state["copies"])
        self._history = deque(state["history"], maxlen=max(self._history.maxlen or 1, len(state["history"])))
        for name, model in self._copies.items():
            if name in self._saved:
                _load(model, self._saved.pop(name))
        for weights in self._weights.values():
            weights.refresh()

    async def aclose(self) -> None:
        for engine in self._engines.values():
            await engine.aclose()

    # -- whose weights ---------------------------------------------------------------------------------------

    def _source(self, sampler: Sampler) -> Weights | Mixture:
        if sampler.kind != "geo_mix":
            return self._served(sampler)
        assert sampler.value is not None
        return Mixture(
            self._served(CURRENT), self._served(REFERENCE, sampler), sampler.value, self._tokenizers
        )

    def _served(self, sampler: Sampler, wanted_by: Sampler | None = None) -> Weights:
        if sampler not in self._weights:
            if sampler.kind == "reference":
                model = self._reference or _without_adapter(self._policy)
                if model is self._policy:
                    raise InputError(f"the sampler {(wanted_by or sampler).name} needs a reference model")
            elif sampler.kind == "previous":
                model = self._copy(f"served {sampler.name}", self._policy)
                self._remember(int(sampler.value or 1))
                _load(model, self._earlier(sampler))
            else:
                model = self._policy
                if sampler.kind == "ema":
                    model = self._copy(f"{AVERAGE}{sampler.value!r}", self._policy, torch.float32)
                if self._push_every > 1:
                    model = self._copy(f"served {sampler.name}", model)
            self._weights[sampler] = Weights(model)
        return self._weights[sampler]

    def _copy(self, name: str, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """A model of its own with the same weights, or with those that were saved under the name."""
        made = self._copies[name] = copy.deepcopy(model).requires_grad_(False).to(dtype)
        if name in self._saved:
            _load(made, self._saved.pop(name))
        return made

    def _remember(self, pushes: int) -> None:
        self._history = deque(self._history, maxlen=max(self._history.maxlen or 1, pushes + 1))
        if not self._history:
            self._history.append(_parameters(self._served(CURRENT).model))

    def _earlier(self, sampler: Sampler) -> Parameters:
        wanted = len(self._history) - 1 - int(sampler.value or 1)
        return self._history[max(0, wanted)]

    def _push(self) -> None:
        if self._history:
            self._history.append(_parameters(self._policy))
        for sampler, weights in self._weights.items():
            if sampler.kind == "reference":
                continue
            if sampler.kind == "previous":
                _load(weights.model, self._earlier(sampler))
            elif self._push_every > 1:
                source = (
                    self._copies[f"{AVERAGE}{sampler.value!r}"] if sampler.kind == "ema" else self._policy
                )
                _load(weights.model, dict(source.named_parameters()))
            weights.refresh()
        self._pushed_at = self._step


def _without_adapter(module: nn.Module) -> nn.Module:
    """A twin of the module that leaves out what peft has put around its layers; itself if there is no such layer."""
    for name in ("base_layer", "original_module"):
        if isinstance(inner := getattr(module, name, None), nn.Module):
            return _without_adapter(inner)
    children = {name: child and _without_adapter(child) for name, child in module._modules.items()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    twin = copy.copy(module)
    twin._modules = children
    return twin


def _parameters(model: nn.Module) -> Parameters:
    """A copy in main memory."""
    return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}


@torch.no_grad()
def _load(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(parameters[name])


@torch.no_grad()
def _follow(average: nn.Module, policy: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) policy, in the dtype of the average."""
    latest = dict(policy.named_parameters())
    for name, parameter in average.named_parameters():
        parameter.lerp_(latest[name].to(parameter), 1 - decay)
