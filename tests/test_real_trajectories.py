"""Trajectories of real models (MathCoder, ToRA, MINT), from their records to a training epoch."""

import json
from pathlib import Path

import pytest

from data.imports import read_foreign
from data.trajectories import read_trajectories
from mtpo.batches import read_rows
from mtpo.runs import read_json
from recipes import evaluate, generate, label, train
from recipes.tiny import train_tokenizer
from tests.coin import make_coin_model
from tests.tiny_models import tiny_model

SHARED = Path(__file__).resolve().parents[2] / "shared"
TRAJECTORIES = SHARED / "data" / "trajectories" / "real_trajectories.jsonl.gz"
needs_trajectories = pytest.mark.skipif(
    not TRAJECTORIES.exists(), reason="the shared trajectories are not here"
)
GSM8K = SHARED / "data" / "gsm8k" / "test.jsonl"


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny Gemma 2 with a Gemma tokenizer that knows the words of the trajectories."""
    folder = tmp_path_factory.mktemp("gemma")
    texts = [m["content"] for t in read_foreign(TRAJECTORIES) for m in t.messages]
    tokenizer = train_tokenizer(texts[:2000]).train_new_from_iterator(texts, 4096, show_progress=False)
    tokenizer.save_pretrained(folder)
    model = tiny_model("gemma2", vocab_size=len(tokenizer), max_position_embeddings=1024, sliding_window=256)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def labelled(gemma: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for kind in ("pairs", "binary"):
        folders[kind] = tmp_path_factory.mktemp("labels") / kind
        argv = ["--trajectories", TRAJECTORIES, "--tokenizer", gemma, "--kind", kind, "--out", folders[kind]]
        assert label.main([str(a) for a in argv]) == 0
    return folders


@needs_trajectories
def test_every_record_is_imported_and_graded_as_its_label_says(labelled: dict[str, Path]) -> None:
    records = [t.metadata for t in read_foreign(TRAJECTORIES)]
    grades = [json.loads(line) for line in (labelled["pairs"] / "grades.jsonl").read_text().splitlines()]
    assert len(records) == len(grades) == 1015
    compared = [
        (r["label"], g["verdict"] == "correct")
        for r, g in zip(records, grades, strict=True)
        if r["label"] is not None
    ]
    agreement = sum(ours == theirs for ours, theirs in compared) / len(compared)
    assert agreement >= 0.99
    assert not any(ours and not theirs for theirs, ours in compared)  # a false positive poisons a pair


@needs_trajectories
def test_counts_account_for_every_trajectory(labelled: dict[str, Path]) -> None:
    for kind, folder in labelled.items():
        counts = read_json(folder / "summary.json")
        assert sum(counts["trajectories"].values()) == 1015
        assert sum(counts["problems"].values()) == 599
        assert counts["num_rows"] == len(read_rows(folder / f"{kind}.jsonl"))


@needs_trajectories
def test_mask_covers_what_the_models_wrote_and_no_tool_output(labelled: dict[str, Path]) -> None:
    rows = read_rows(labelled["binary"] / "binary.jsonl")
    share = sum(sum(r["completion_mask"]) for r in rows) / sum(len(r["input_ids"]) for r in rows)
    assert 0.5 < share < 0.8  # the rest is questions, tool output and turn markers


@needs_trajectories
@pytest.mark.parametrize(("method", "kind"), [("dpo", "pairs"), ("kto", "binary")])
def test_an_epoch_trains_on_them(
    gemma: Path, labelled: dict[str, Path], tmp_path: Path, method: str, kind: str
) -> None:
    """On what is short enough of some forty rows, from first to last."""
    rows = (labelled[kind] / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    rows = rows[:: len(rows) // 32]
    data = tmp_path / f"{kind}.jsonl"
    data.write_text("".join(rows), encoding="utf-8")
    argv = ["--method", method, "--model", gemma, "--data", data, "--learning_rate", 1e-3]
    argv += ["--batch_size", 4, "--micro_batch_size", 4, "--max_length", 640, "--out", tmp_path / "run"]
    assert train.main([str(a) for a in argv]) == 0
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["rows"] + summary["dropped"] == len(rows)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps[0]["loss"] == pytest.approx(
        {"dpo": 0.6931, "kto": 0.5}[method], abs=1e-3
    )  # policy = reference
    assert steps[-1]["loss"] != steps[0]["loss"]


@pytest.mark.skipif(not GSM8K.exists(), reason="the shared GSM8K file is not here")
@pytest.mark.slow
def test_gsm8k_runs_through_generate_and_evaluate(tmp_path: Path) -> None:
    model = make_coin_model(tmp_path / "coin")
    common = ["--model", model, "--problems", f"gsm8k:test@{GSM8K}", "--limit", 50, "--max_turn_tokens", 60]
    argv = [*common, "--samples", 1, "--out", tmp_path / "generated"]
    assert generate.main([str(a) for a in argv]) == 0
    found = list(read_trajectories(tmp_path / "generated" / "trajectories"))
    assert len(found) == 50 and {t.problem_id for t in found} == {f"gsm8k:test/{i}" for i in range(50)}
    assert evaluate.main([str(a) for a in [*common, "--out", tmp_path / "evaluated"]]) == 0
    metrics = read_json(tmp_path / "evaluated" / "metrics.json")
    assert sum(metrics["outcomes"].values()) + metrics["num_faults"] == 50
