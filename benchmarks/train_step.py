"""One DPO training step, forward and backward, of TRL's trainer and of ours on the same rows.

    python -m benchmarks.train_step [--shape tiny|gemma-2-2b|gemma-2-9b] [--device cpu|cuda] [--attention NAME]

Gemma 2 with random weights and its real vocabulary of 256,000 tokens; pairs of trajectories of several turns, about
40% of them action tokens. Both sides read reference log-probs that were computed beforehand; TRL's default, which runs
the reference model at every step, is measured too. Each trainer runs in a process of its own, after a short step that
warms it up. On a CPU the bars are CPU time and peak memory against TRL with cached reference; in bfloat16 the
log-probs are also held against float32 with eager attention. Exits with 1 if a bar is missed or losses differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import Gemma2Config, PreTrainedModel, TrainingArguments
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from benchmarks.command import at_least, describe_machine
from mtpo.batches import PairCollator, Row, prompt_ids
from mtpo.layouts import Layout
from mtpo.logprobs import action_logps
from mtpo.scoring import layout_refusal
from mtpo.training import TrainingSettings
from mtpo.training.reference import add_reference_logps
from mtpo.training.trainer import TrajectoryTrainer

ROOT = Path(__file__).resolve().parents[1]
TRL, TRL_DEFAULT = "TRL, cached reference", "TRL's default"
PEERS: dict[str, Layout | None] = {TRL: None, TRL_DEFAULT: None} | {
    f"ours, {layout}": layout for layout in get_args(Layout)
}
OURS = "ours, padded"
"""The default, for which the bars are."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model, and the rows of a step."""

    config: Mapping[str, int]
    num_pairs: int
    max_length: int
    prompt_length: int


def _gemma(layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, inner: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
        "intermediate_size": inner,
        "vocab_size": 256_000,
    }


SHAPES = {
    "smoke": Shape(_gemma(2, 32, 4, 2, 8, 64) | {"vocab_size": 512, "sliding_window": 16}, 2, 64, 12),
    "tiny": Shape(_gemma(4, 256, 8, 4, 32, 1024) | {"sliding_window": 256}, 4, 512, 100),
    "gemma-2-2b": Shape(_gemma(26, 2304, 8, 4, 256, 9216), 4, 2048, 150),
    "gemma-2-9b": Shape(_gemma(42, 3584, 16, 8, 256, 14336), 2, 2048, 150),
}
"""`tiny` is as wide as Gemma 2 where it counts on a CPU, in the vocabulary; `smoke` only shows that all runs."""


@dataclass(frozen=True, slots=True)
class StepFigures:
    """One peer's step."""

    loss: float
    gradient_norm: float
    cpu_s: float
    wall_s: float
    peak_mib: float
    """Above what the process held before the step: gradients, activations, logits."""


def make_model(
    shape: Shape, options: argparse.Namespace, *, seed: int = 0, dtype: str = ""
) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Gemma2Config(**shape.config)  # pyright: ignore[reportArgumentType]
    attention = "eager" if dtype else options.attention
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, dtype=getattr(torch, dtype or options.dtype)
        )
    return model


def make_rows(shape: Shape, seed: int = 0) -> list[Row]:
    """Pairs of 60% to 100% of the full length, in 3 or 4 turns; every other pair has an equal first turn."""
    rng = random.Random(seed)

    def turns(length: int) -> list[tuple[list[int], int]]:
        num = rng.choice((3, 4))
        each = length // num
        num_sampled = round(0.4 * length / num)
        parts = [(num_sampled, 1), (each - num_sampled, 0)] * (num - 1) + [(num_sampled, 1)]
        return [
            ([rng.randrange(3, shape.config["vocab_size"]) for _ in range(n)], is_action)
            for n, is_action in parts
        ]

    rows: list[Row] = []
    for number in range(shape.num_pairs):
        prompt = [2, *(rng.randrange(3, shape.config["vocab_size"]) for _ in range(shape.prompt_length - 1))]
        row: Row = {"problem_id": f"random/{number}", "chosen_sample": 0, "rejected_sample": 1}
        first = turns(shape.max_length // 2)[:2]
        for side in ("chosen", "rejected"):
            length = round(shape.max_length * rng.uniform(0.7, 1.1)) - len(prompt)
            parts = turns(length)
            if number % 2:
                parts = first + parts[2:]
            ids = prompt + [i for part, _ in parts for i in part]
            mask = [0] * len(prompt) + [is_action for part, is_action in parts for _ in part]
            row[f"{side}_input_ids"] = ids[: shape.max_length]
            row[f"{side}_completion_mask"] = mask[: shape.max_length]
        rows.append(row)
    return rows


def our_trainer(model: PreTrainedModel, rows: list[Row], layout: Layout, args: dict[str, Any]) -> Any:
    settings = TrainingSettings(method="dpo", learning_rate=1e-6, batch_size=len(rows), layout=layout)
    return TrajectoryTrainer(
        model, rows, settings, TrainingArguments(**args), None, [], starts_at_reference=False
    )


def trl_trainer(
    model: PreTrainedModel, reference: PreTrainedModel | None, rows: list[Row], args: dict[str, Any]
) -> Any:
    """TRL's, fed with ids and masks; without `reference` it reads the sums that the rows bring."""
    import datasets
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    class TokenizedDPOTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
            return dataset

    def collate(batch: list[Row]) -> dict[str, torch.Tensor]:
        columns = PairCollator(0)(
            [{k: v for k, v in row.items() if "ref" not in k and k != "index"} for row in batch]
        )
        sums = {
            f"ref_{side}_logps": torch.tensor(
                [float(row[f"{side}_ref_logps"].double().sum()) for row in batch]
            )
            for side in ("chosen", "rejected")
        }
        return columns | (sums if reference is None else {})

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(8)}, unk_token="w0"))
    config = DPOConfig(
        **args, precompute_ref_log_probs=reference is None, gradient_checkpointing=False, bf16=False
    )
    return TokenizedDPOTrainer(
        model=model,
        ref_model=reference,
        args=config,
        train_dataset=datasets.Dataset.from_list([{"row": n} for n in range(len(rows))]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1"),
        data_collator=collate,  # pyright: ignore[reportArgumentType]
    )


def make_trainer(peer: str, rows: list[Row], shape: Shape, options: argparse.Namespace, folder: str) -> Any:
    model = make_model(shape, options)
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    args: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": len(rows),
        "report_to": "none",
        "use_cpu": options.device == "cpu",
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    if layout := PEERS[peer]:
        return our_trainer(model, rows, layout, args)
    reference = make_model(shape, options, seed=1) if peer == TRL_DEFAULT else None
    return trl_trainer(model, reference, rows, args)


def measure(peer: str, rows: list[Row], shape: Shape, options: argparse.Namespace) -> StepFigures:
    """Steps of one peer in this process: the mean of all after the warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(peer, rows, shape, options, folder)
    short = [_cut(row, 32 + len(prompt_ids(row, "chosen_"))) for row in rows[:1]]
    step(trainer, short)
    for _ in range(options.warm_up):
        step(trainer, rows)
    trainer.model.zero_grad(set_to_none=True)
    before_mib = reset_peak_mib(options.device)
    start_cpu_s, start_s, loss = time.process_time(), time.perf_counter(), 0.0
    for _ in range(options.steps):
        trainer.model.zero_grad(set_to_none=True)
        loss = step(trainer, rows)
    cpu_s, wall_s = time.process_time() - start_cpu_s, time.perf_counter() - start_s
    squares = [p.grad.double().square().sum() for p in trainer.model.parameters() if p.grad is not None]
    return StepFigures(
        loss=loss,
        gradient_norm=float(torch.stack(squares).sum().sqrt()),
        cpu_s=cpu_s / options.steps,
        wall_s=wall_s / options.steps,
        peak_mib=peak_mib(options.device) - before_mib,
    )


def step(trainer: Any, rows: list[Row]) -> float:
    batch = trainer.data_collator([row | {"index": n} for n, row in enumerate(rows)])
    count = torch.tensor(len(rows), device=trainer.args.device)
    trainer.current_gradient_accumulation_steps = 1
    return float(trainer.training_step(trainer.model, batch, count))  # waits for the device


def reset_peak_mib(device: str) -> float:
    """What is held now; the peak counts from here."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    return _status_mib("VmRSS:")


def peak_mib(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else _status_mib("VmHWM:")


def parity(rows: list[Row], shape: Shape, options: argparse.Namespace) -> dict[str, float]:
    """How far log-probs in half precision are from those of the same weights in float32 with eager attention, nats."""
    batch = {name: t.to(options.device) for name, t in PairCollator(0)(rows[:1]).items()}
    inputs = {name: batch[name] for name in ("input_ids", "completion_mask", "attention_mask")}
    half = make_model(shape, options).eval()
    full = make_model(shape, options, dtype="float32").eval()
    full.load_state_dict(half.state_dict())
    with torch.no_grad():
        gaps = (action_logps(half, **inputs) - action_logps(full, **inputs)).abs()
    gaps = gaps[inputs["completion_mask"].bool()]
    return {"mean": gaps.mean().item(), "max": gaps.max().item()}


def model_flops(shape: Shape, rows: list[Row]) -> float:
    """Of a step, without padding and without what is computed twice: layers on all tokens, head on action tokens."""
    c = shape.config
    width = c["num_attention_heads"] * c["head_dim"]
    kv_width = c["num_key_value_heads"] * c["head_dim"]
    layer = c["hidden_size"] * (2 * width + 2 * kv_width + 3 * c["intermediate_size"])
    flops = 0.0
    for row in rows:
        for side in ("chosen", "rejected"):
            length = len(row[f"{side}_input_ids"])
            flops += 6 * c["num_hidden_layers"] * (layer * length + width * length**2)
            flops += 6 * c["hidden_size"] * c["vocab_size"] * sum(row[f"{side}_completion_mask"])
    return flops


def table(figures: Mapping[str, StepFigures], num_tokens: int, flops: float, options: Any) -> Iterator[str]:
    columns = ("CPU s", "wall s", "peak MiB", "tokens/s")
    yield (
        f"{'':26}{'loss':>12}{'gradient':>12}"
        + "".join(name.rjust(10) for name in columns)
        + f"{'TFLOP/s':>9}"
    )
    for peer, f in figures.items():
        rates = f"{num_tokens / f.wall_s:10,.0f}{flops / f.wall_s / 1e12:9.2f}"
        yield f"{peer:26}{f.loss:12.6f}{f.gradient_norm:12.6f}{f.cpu_s:10.2f}{f.wall_s:10.2f}{f.peak_mib:10,.0f}{rates}"
    for peer, f in figures.items():
        if PEERS[peer] and TRL in figures:
            trl = figures[TRL]
            speed = trl.wall_s / f.wall_s if options.device == "cuda" else trl.cpu_s / f.cpu_s
            memory = _share(f.peak_mib, trl.peak_mib)
            used = (
                f"{flops / f.wall_s / 1e10 / options.peak_tflops:.0f}% of the peak, "
                if options.peak_tflops
                else ""
            )
            yield f"{peer}: {used}{speed:.2f} times as fast as {TRL}, {memory:.2f} of its memory"


def bars(
    figures: Mapping[str, StepFigures], device: str, dtype: str
) -> Iterator[tuple[str, float, float, bool]]:
    """What was promised: figure, value, bar, and whether it holds."""
    if TRL not in figures:
        return
    trl, ours = figures[TRL], figures[OURS]
    if dtype == "float32":
        worst = max(abs(f.loss - trl.loss) / abs(trl.loss) for f in figures.values())
        yield "relative difference of losses <=", worst, 1e-5, worst <= 1e-5
        worst = max(abs(f.gradient_norm / trl.gradient_norm - 1) for f in figures.values())
        yield "relative difference of gradient norms <=", worst, 1e-4, worst <= 1e-4
    if device == "cpu":
        ratio, share = trl.cpu_s / ours.cpu_s, _share(ours.peak_mib, trl.peak_mib)
        yield "CPU time of TRL, times ours >=", ratio, 6, ratio >= 6
        yield "peak memory, of TRL's <=", share, 0.5, share <= 0.5


def _share(part: float, whole: float) -> float:
    """nan of nothing: a step on a small model may fit into memory that was there before it."""
    return part / whole if whole else math.nan


def _cut(row: Row, length: int) -> Row:
    """A row that begins as this one; of its reference, the log-probs that are left."""
    cut = dict(row)
    for side in ("chosen", "rejected"):
        mask = row[f"{side}_completion_mask"][:length]
        cut[f"{side}_input_ids"], cut[f"{side}_completion_mask"] = row[f"{side}_input_ids"][:length], mask
        cut[f"{side}_ref_logps"] = row[f"{side}_ref_logps"][: sum(mask)]
    return cut


def _status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def with_reference(rows: list[Row], shape: Shape, options: argparse.Namespace) -> list[Row]:
    with tempfile.TemporaryDirectory() as cache:
        reference = make_model(shape, options, seed=1).eval()
        return add_reference_logps(rows, reference, Path(cache), batch_size=len(rows), progress=False)


def run_apart(task: str, rows_file: Path, argv: Sequence[str]) -> dict[str, float]:
    """A task in a process of its own: a peer's step, the reference's log-probs, or the parity of types."""
    command = [sys.executable, "-m", "benchmarks.train_step", *argv, "--task", task, "--rows", str(rows_file)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}  # TRL would announce itself to the hub
    run = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def do_task(options: argparse.Namespace) -> dict[str, float]:
    shape = SHAPES[options.shape]
    if options.task == "reference":
        torch.save(with_reference(make_rows(shape), shape, options), options.rows)
        return {}
    rows = torch.load(options.rows)
    if options.task == "parity":
        return parity(rows, shape, options)
    return dataclasses.asdict(measure(options.task, rows, shape, options))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="by default bfloat16 on cuda only")
    parser.add_argument("--attention", help="of both trainers: eager by default, on cuda flex_attention")
    parser.add_argument("--steps", type=at_least(1), default=1, metavar="N", help="measured")
    parser.add_argument(
        "--warm_up", type=int, default=0, metavar="N", help="full steps before, to compile kernels"
    )
    parser.add_argument("--checkpointing", action="store_true", help="compute activations twice")
    parser.add_argument(
        "--peak_tflops", type=float, metavar="X", help="of the device, to show the share that is used"
    )
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    options.attention = options.attention or ("flex_attention" if options.device == "cuda" else "eager")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.task:
        print(json.dumps(do_task(options)))
        return 0
    argv = list(sys.argv[1:] if argv is None else argv)
    shape, figures, gap = SHAPES[options.shape], {}, None
    config = Gemma2Config()
    config._attn_implementation_internal = options.attention
    with tempfile.TemporaryDirectory() as folder:
        rows_file = Path(folder) / "rows.pt"
        run_apart("reference", rows_file, argv)
        for peer in options.only:
            layout = PEERS[peer]
            if layout and (reason := layout_refusal(config, layout, device=options.device)):
                print(f"{peer}: refused, {reason}")
                continue
            figures[peer] = StepFigures(**run_apart(peer, rows_file, argv))
        if options.dtype == "bfloat16":
            gap = run_apart("parity", rows_file, argv)
    rows = make_rows(shape)
    num_tokens = sum(len(row[f"{side}_input_ids"]) for row in rows for side in ("chosen", "rejected"))
    print(*table(figures, num_tokens, model_flops(shape, rows), options), sep="\n")
    if gap:
        print(
            f"log-probs in bfloat16 and in float32, eager: mean gap {gap['mean']:.2g} nats, largest {gap['max']:.2g}"
        )
    bars_for = (
        options.device if options.shape != "smoke" else ""
    )  # which is too small to tell anything of time
    held = list(bars(figures, bars_for, options.dtype))
    for name, value, bar, is_held in held:
        print(f"{'held  ' if is_held else 'MISSED'}  {name} {bar:.6g}: {value:.6g}")
    if options.json:
        of_peers = {peer: dataclasses.asdict(f) for peer, f in figures.items()}
        written = {"machine": describe_machine(), "options": argv, "figures": of_peers, "parity": gap}
        options.json.write_text(json.dumps(written, indent=2) + "\n")
    return int(not all(is_held for *_, is_held in held))


if __name__ == "__main__":
    sys.exit(main())
