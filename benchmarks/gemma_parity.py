"""The Gemma certificate: which attention and layout give the log-probs and gradients of plain eager attention.

    python -m benchmarks.gemma_parity [--json FILE]

Tiny random Gemma 1, 2 and 3 models, with logits and attention scores far beyond their soft-caps and trajectories
longer than their sliding window, score pairs with equal turns, and weigh each log-prob differently for the gradient.
The truth is eager attention on padded rows in float64 throughout. A cell is `yes` if log-probs and gradients are the
truth in float32 and, where the implementation knows it, in float64; else the reason why the library refuses it. What
the mistakes would cost that it guards against is printed too. Exits with 1 if a cell is wrong.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.command import describe_machine
from mtpo.batches import PairCollator, Row
from mtpo.layouts import Layout
from mtpo.scoring import batch_logps, layout_refusal
from tests.tiny_models import Family, tiny_config, tiny_model

FAMILIES: tuple[Family, ...] = ("gemma", "gemma2", "gemma3")
ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-9}
"""Of a log-prob in nats, and of a gradient as a share of its largest entry."""

Scored = tuple[Tensor, Tensor]
"""Log-probs (N, T) and the gradient of all weights, flat."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One model with one attention in one layout."""

    family: str
    attention: str
    layout: Layout
    refused: str | None = None
    """Why it cannot score."""
    gradient_refused: str | None = None
    """Why it can score, but not train."""
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    """By type, and whether of log-probs or of gradients."""

    @property
    def is_right(self) -> bool:
        return all(error <= TOLERANCE[getattr(torch, name.split()[0])] for name, error in self.errors.items())


def certify(families: Sequence[Family] = FAMILIES, attention: Sequence[str] = ATTENTION) -> list[Cell]:
    cells = []
    for family in families:
        with float64_throughout():
            truth = scored(saturated(family, torch.float64), "padded")
        cells += [cell(family, name, layout, truth) for name in attention for layout in LAYOUTS]
    return cells


def cell(family: Family, attention: str, layout: Layout, truth: Scored) -> Cell:
    if reason := refusal(family, attention, layout):
        return Cell(family, attention, layout, refused=reason)
    config = saturated(family, torch.float32, attention).config
    no_gradient = layout_refusal(config, layout)
    errors = {}
    for dtype in (torch.float32,) if attention == "flex_attention" else (torch.float32, torch.float64):
        with float64_throughout():
            found = scored(saturated(family, dtype, attention), layout, with_gradient=not no_gradient)
        name = str(dtype).removeprefix("torch.")
        errors[f"{name} log-probs"] = (found[0] - truth[0]).abs().max().item()
        if not no_gradient:
            errors[f"{name} gradients"] = ((found[1] - truth[1]).abs().max() / truth[1].abs().max()).item()
    return Cell(family, attention, layout, gradient_refused=no_gradient, errors=errors)


def refusal(family: Family, attention: str, layout: Layout) -> str | None:
    """Why this machine's libraries cannot run it at all, or ours does not let them."""
    config = tiny_config(family)
    config._attn_implementation_internal = attention  # as of a model that was loaded with it
    reason = layout_refusal(config, layout, with_gradient=False)
    if reason and not attention.startswith("flash"):
        return reason
    try:
        tiny_model(family, attention=attention)
    except (ImportError, ValueError) as error:
        return str(error).split(". ")[0].split(": ")[-1].rstrip(".")
    return reason


def saturated(family: Family, dtype: torch.dtype, attention: str = "eager") -> Any:
    """A model of which logits and attention scores go far beyond 30 and 50, the caps of Gemma 2."""
    model: Any = tiny_model(family, attention=attention, std=0.3)
    model.to(dtype)  # one draw of weights for all types
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):  # some releases multiply it by positions in float32
            buffer.data = buffer.to(torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(15)  # tied: larger inputs are normalised away, larger logits are not
        for layer in model.base_model.layers:
            for norm in ("q_norm", "k_norm"):
                if hasattr(layer.self_attn, norm):
                    getattr(layer.self_attn, norm).weight.fill_(2)
            layer.self_attn.q_proj.weight.mul_(3)
            layer.self_attn.k_proj.weight.mul_(3)
    return model


def pairs() -> list[Row]:
    """Sides of 9 to 46 tokens: with an equal turn, one that begins as the other, and with a prompt in common only."""
    generator = torch.Generator().manual_seed(0)
    rows: list[Row] = []
    for prompt, shared, chosen, rejected in ((6, 8, 15, 32), (7, 10, 12, 0), (9, 0, 4, 1)):
        ids = torch.randint(3, 48, (prompt + shared + chosen + rejected,), generator=generator).tolist()
        begin, rest = ids[: prompt + shared], ids[prompt + shared :]
        row: Row = {"problem_id": "random", "chosen_sample": 0, "rejected_sample": 1}
        for side, own in (("chosen", rest[:chosen]), ("rejected", rest[chosen:])):
            row[f"{side}_input_ids"] = begin + own
            is_action = [int(n >= prompt and n % 5 != 4) for n in range(len(begin + own))]
            row[f"{side}_completion_mask"] = is_action  # every fifth token is tool output
        rows.append(row)
    return rows


def scored(model: Any, layout: Layout, *, with_gradient: bool = True) -> Scored:
    with torch.set_grad_enabled(with_gradient):
        logps = batch_logps(model, PairCollator(0, layout)(pairs()))
    if not with_gradient:
        return logps.double(), torch.empty(0)
    weights = torch.arange(logps.numel(), dtype=logps.dtype).reshape(logps.shape).cos()
    gradients = torch.autograd.grad((logps * weights).sum(), list(model.parameters()))
    return logps.detach().double(), torch.cat([gradient.flatten() for gradient in gradients]).double()


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Keeps transformers from rounding a float64 model's norms and attention weights to float32."""
    to_float, softmax = torch.Tensor.float, torch.nn.functional.softmax

    def at_least_float(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else to_float(x)

    def own_softmax(x: Tensor, *args: Any, dtype: Any = None, **options: Any) -> Tensor:
        return softmax(x, *args, dtype=None if x.dtype == torch.float64 else dtype, **options)

    with (
        patch.object(torch.Tensor, "float", at_least_float),
        patch.object(torch.nn.functional, "softmax", own_softmax),
    ):
        yield


def mistakes(family: Family) -> dict[str, float]:
    """What a log-prob would change by, in nats at most, if a part of the model were left out."""
    model = saturated(family, torch.float32)
    truth, batch = scored(model, "padded", with_gradient=False)[0], PairCollator(0, "packed")(pairs())
    costs = {}
    if model.config.model_type == "gemma2":
        uncapped = copy.deepcopy(model)
        uncapped.config.final_logit_softcapping = None
        costs["the soft-cap of logits"] = uncapped
        uncapped = copy.deepcopy(model)
        for layer in uncapped.base_model.layers:
            layer.self_attn.attn_logit_softcapping = None
        costs["the soft-cap of attention"] = uncapped
    if model.config.model_type != "gemma":
        costs["the sliding window"] = copy.deepcopy(model)
        costs["the sliding window"].config.sliding_window = 10**6
    found = {
        name: (scored(wrong, "padded", with_gradient=False)[0] - truth).abs().max().item()
        for name, wrong in costs.items()
    }
    batch["documents"].zero_()
    with torch.no_grad():
        found["the border of trajectories"] = (batch_logps(model, batch) - truth).abs().max().item()
    return found


def table(cells: Sequence[Cell]) -> Iterator[str]:
    """The certificate in Markdown, the reasons below it."""
    reasons: list[str] = []

    def note(reason: str) -> int:
        if reason not in reasons:
            reasons.append(reason)
        return reasons.index(reason) + 1

    yield "| model, attention | " + " | ".join(LAYOUTS) + " |"
    yield "|---|" + "---|" * len(LAYOUTS)
    of = {(c.family, c.attention, c.layout): c for c in cells}
    for family, attention in dict.fromkeys((c.family, c.attention) for c in cells):
        texts = []
        for layout in LAYOUTS:
            c = of[family, attention, layout]
            text = "yes" if c.is_right else f"WRONG by {max(c.errors.values()):.1g}"
            if c.refused:
                text = f"refused: {note(c.refused)}"
            elif c.gradient_refused:
                text += f"; training refused: {note(c.gradient_refused)}"
            texts.append(text)
        yield f"| {family}, {attention} | " + " | ".join(texts) + " |"
    yield ""
    yield from (f"{number}. {reason}" for number, reason in enumerate(reasons, start=1))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gemma_parity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    # the compiler of torch 2.13 writes C++ that does not compile for shapes that vary
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=64):  # pyright: ignore
        cells = certify()
    print(*table(cells), sep="\n")
    print()
    for name in sorted({name for c in cells for name in c.errors}):
        unit = "nats" if name.endswith("log-probs") else "of the largest entry"
        print(f"largest error in {name}: {max(c.errors.get(name, 0) for c in cells):.2g} {unit}")
    costs = {family: mistakes(family) for family in FAMILIES}
    for family, of_family in costs.items():
        left_out = ", ".join(f"{name} {cost:.2g} nats" for name, cost in of_family.items())
        print(f"{family} would be wrong without {left_out}")
    if options.json:
        figures = {
            "machine": describe_machine(),
            "cells": [dataclasses.asdict(c) for c in cells],
            "costs": costs,
        }
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return int(not all(c.is_right for c in cells))


if __name__ == "__main__":
    sys.exit(main())
