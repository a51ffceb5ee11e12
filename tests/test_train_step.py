"""The step benchmark on a smoke-sized model: every peer runs, and all agree."""

from __future__ import annotations

import pytest
import torch

from benchmarks.train_step import (
    OURS,
    PEERS,
    SHAPES,
    TRL,
    StepFigures,
    bars,
    make_model,
    make_rows,
    measure,
    model_flops,
    parity,
    parse,
    table,
    with_reference,
)

SMOKE = SHAPES["smoke"]


def test_all_peers_take_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # TRL would announce itself to the hub
    options = parse(["--shape", "smoke", "--checkpointing", "--warm_up", "1", "--steps", "2"])
    rows = with_reference(make_rows(SMOKE), SMOKE, options)
    figures = {peer: measure(peer, rows, SMOKE, options) for peer in PEERS}
    held = {name: is_held for name, *_, is_held in bars(figures, "cpu", "float32")}
    assert held["relative difference of losses <="] and held["relative difference of gradient norms <="]
    assert figures[OURS].loss > 0.01 and figures[OURS].gradient_norm > 0.01
    assert len(list(table(figures, 1, 1.0, options))) == 1 + len(PEERS) + 3


def test_half_precision_is_held_against_float32() -> None:
    options = parse(["--shape", "smoke", "--dtype", "bfloat16"])
    rows = with_reference(make_rows(SMOKE), SMOKE, options)
    gap = parity(rows, SMOKE, options)
    assert 0 < gap["mean"] <= gap["max"] < 0.1


def test_rows_have_turns_tool_output_and_now_and_then_an_equal_turn() -> None:
    rows = make_rows(SHAPES["tiny"])
    for number, row in enumerate(rows):
        chosen, rejected = row["chosen_input_ids"], row["rejected_input_ids"]
        assert (
            max(len(chosen), len(rejected)) <= 512
            and 0.25 < sum(row["chosen_completion_mask"]) / len(chosen) < 0.5
        )
        shared = next(n for n, ids in enumerate(zip(chosen, rejected, strict=False)) if ids[0] != ids[1])
        assert shared > 120 if number % 2 else shared == 100
        assert "".join(map(str, row["chosen_completion_mask"])).count("01") >= 3


def test_flops_are_six_for_each_weight_and_token() -> None:
    rows = make_rows(SMOKE)
    options = parse(["--shape", "smoke"])
    layers = sum(p.numel() for n, p in make_model(SMOKE, options).named_parameters() if "proj" in n)
    lengths = [len(row[f"{side}_input_ids"]) for row in rows for side in ("chosen", "rejected")]
    actions = sum(sum(row[f"{side}_completion_mask"]) for row in rows for side in ("chosen", "rejected"))
    head, scores = (
        32 * 512 * actions,
        2 * 32 * sum(length**2 for length in lengths),
    )  # q k^T and the sum of values
    assert model_flops(SMOKE, rows) == pytest.approx(6 * (layers * sum(lengths) + head + scores))


def test_bars_hold_at_their_value_and_not_beyond() -> None:
    def held(cpu_s: float, peak_mib: float, loss: float) -> list[bool]:
        figures = {
            TRL: StepFigures(0.5, 1.0, 6.0, 9.0, 100.0),
            OURS: StepFigures(loss, 1.0, cpu_s, 9.0, peak_mib),
        }
        return [is_held for *_, is_held in bars(figures, "cpu", "float32")]

    assert held(1.0, 50.0, 0.5) == [True, True, True, True]
    assert held(1.01, 51.0, 0.50001) == [False, True, False, False]
    unseen = {name: StepFigures(0.5, 1.0, 1.0, 9.0, 0.0) for name in (TRL, OURS)}
    assert [is_held for *_, is_held in bars(unseen, "cpu", "float32")] == [True, True, False, False]
    assert list(bars({OURS: StepFigures(1, 1, 1, 1, 1)}, "cpu", "float32")) == []


def test_half_precision_on_a_gpu_is_the_default_there() -> None:
    options = parse(["--device", "cuda"])
    assert (options.dtype, options.attention) == ("bfloat16", "flex_attention")
    assert getattr(torch, parse([]).dtype) == torch.float32
