"""Training rows as text for other trainers, and what that text has lost."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from data.conversations import conversation_rows, messages_of
from data.labels import pair_row, single_row
from mtpo.batches import Row
from mtpo.chat import ChatFormat
from mtpo.errors import InputError
from mtpo.runs import write_json, write_jsonl
from mtpo.trajectory import Problem, Segment, Trajectory
from recipes import export
from tests.tiny_models import tiny_model
from tests.tiny_runs import write_set
from tests.tiny_tokenizers import make_tokenizer

CODE, ANSWER, WRONG = "```python\nprint(48 + 24)\n```", "The answer is $\\boxed{72}$.", "So $\\boxed{24}$."
PROBLEMS = [Problem(f"p/{number}", f"What is {number} + 24?", "72") for number in range(4)]
GEMMA = ChatFormat.for_tokenizer(make_tokenizer("gemma"))


def attempt(chat: ChatFormat, problem: Problem, sample: int, *turns: str) -> Trajectory:
    """Turns of the model and of the tool, one after the other."""
    roles = ["assistant", "tool"] * len(turns)
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    return chat.import_trajectory(
        problem, [{"role": "user", "content": problem.question}, *messages], sample=sample
    )


def both(chat: ChatFormat, problem: Problem) -> tuple[Trajectory, Trajectory]:
    return attempt(chat, problem, 0, CODE, "72", ANSWER), attempt(chat, problem, 1, WRONG)


def run_folders(folder: Path, kind: str) -> tuple[Path, Path, list[Row]]:
    """What recipes.generate and recipes.label leave, and the rows."""
    tries = [both(GEMMA, problem) for problem in PROBLEMS]
    write_set(folder / "run", PROBLEMS, [trajectory for pair in tries for trajectory in pair])
    GEMMA.tokenizer.save_pretrained(folder / "model")
    write_json(folder / "run" / "config.json", {"options": {"model": str(folder / "model")}})
    if kind == "pairs":
        rows = [pair_row(problem.id, *pair) for problem, pair in zip(PROBLEMS, tries, strict=True)]
    else:
        rows = [single_row(t.problem_id, t) | {"label": t.sample == 0} for pair in tries for t in pair]
    write_jsonl(folder / "labels" / f"{kind}.jsonl", rows)
    return folder / "run", folder / "labels", rows


FENCED = ("user", "```output\n72\n```")


@pytest.mark.parametrize(
    ("family", "tool"), [("gemma", FENCED), ("mistral", FENCED), ("qwen2_5", ("tool", "72"))]
)
def test_a_template_renders_the_conversation_to_the_ids_of_the_row(
    family: str, tool: tuple[str, str]
) -> None:
    tokenizer = make_tokenizer(family)
    chosen, rejected = both(ChatFormat.for_tokenizer(tokenizer), PROBLEMS[0])
    row = pair_row("p/0", chosen, rejected)
    [shown] = conversation_rows([row], [rejected, chosen], ChatFormat.for_tokenizer(tokenizer))
    assert [(m["role"], m["content"]) for m in shown["chosen"]] == [
        ("assistant", CODE),
        tool,
        ("assistant", ANSWER),
    ]
    assert shown["prompt"] == [{"role": "user", "content": "What is 0 + 24?"}]
    assert (shown["problem_id"], shown["chosen_sample"], shown["rejected_sample"]) == ("p/0", 0, 1)
    for side in ("chosen", "rejected"):
        text = tokenizer.apply_chat_template(shown["prompt"] + shown[side], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected = row[f"{side}_input_ids"]
        assert (
            ids[: len(expected)] == expected and len(ids) <= len(expected) + 1
        )  # a newline may end the last turn


def test_labels_and_demonstrations_have_one_completion() -> None:
    first, second = both(GEMMA, PROBLEMS[0])
    label, demonstration = single_row("p/0", first) | {"label": True}, single_row("p/0", second)
    shown, other = conversation_rows([label, demonstration], [first, second], GEMMA)
    assert shown["label"] is True and len(shown["completion"]) == 3
    assert set(other) == {"problem_id", "sample", "prompt", "completion"}
    assert other["completion"] == [{"role": "assistant", "content": WRONG}]


def test_what_a_student_says_is_no_tool_output() -> None:
    lesson = attempt(GEMMA, PROBLEMS[0], 0, "Leaves are green.", "tool", "Because of light.")
    said = GEMMA.observation("Why?", after=lesson.segments[1].ids, role="user")
    lesson = dataclasses.replace(lesson, segments=(*lesson.segments[:2], said, lesson.segments[3]))
    assert messages_of(lesson, GEMMA)[2] == {"role": "user", "content": "Why?"}


def test_a_row_whose_trajectory_is_not_there_is_refused() -> None:
    chosen, rejected = both(GEMMA, PROBLEMS[0])
    other = dataclasses.replace(
        rejected, segments=(rejected.segments[0], Segment("action", (5, 5), None, WRONG))
    )
    rows = conversation_rows([pair_row("p/0", chosen, rejected)], [chosen, other], GEMMA)
    with pytest.raises(InputError, match=r"p/0 sample 0 over 1: its rejected is not among the trajectories"):
        list(rows)


def options(out: Path) -> dict[str, Any]:
    return {
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }


@pytest.mark.parametrize(
    ("kind", "config", "trainer", "columns"),
    [
        ("pairs", DPOConfig, DPOTrainer, ("chosen",)),
        ("binary", KTOConfig, KTOTrainer, ("completion", "label")),
    ],
)
def test_trls_own_trainers_take_the_file_and_train_tool_output(
    kind: str,
    config: Any,
    trainer: Any,
    columns: Sequence[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run, labels, rows = run_folders(tmp_path, kind)
    out = tmp_path / "shown.jsonl"
    assert export.main(["--trajectories", str(run), "--rows", str(labels), "--out", str(out)]) == 0
    name = "pair" if kind == "pairs" else "label"
    assert capsys.readouterr().out.splitlines()[-1] == f"{len(rows)} {name} rows as conversations in {out}"
    shown: Any = datasets.load_dataset(
        "json", data_files=str(out), split="train", cache_dir=str(tmp_path / "c")
    )
    assert {"prompt", *columns} <= set(shown.column_names) and len(shown) == len(rows)
    tokenizer = make_tokenizer("gemma")
    tokenizer.pad_token = "<pad>"
    policy, reference = (
        tiny_model("gemma2", vocab_size=len(tokenizer), num_hidden_layers=1, layer_types=["full_attention"])
        for _ in range(2)
    )
    trained = trainer(
        policy, reference, config(**options(tmp_path / "trl")), None, shown, processing_class=tokenizer
    )
    trained.train()
    assert trained.state.global_step == 1
    batch = trained.data_collator([trained.train_dataset[0]])
    ours: list[int] = rows[0]["chosen_completion_mask" if kind == "pairs" else "completion_mask"]
    theirs = batch["completion_mask"][0, : len(ours)].tolist()
    start = ours.index(1)
    assert theirs == [0] * start + [1] * (len(ours) - start) and 0 in ours[start:]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--out", "rows.parquet"), "--out must end in .jsonl, got 'rows.parquet'"),
        (("--out", "rows.jsonl", "--no_grade"), "--push_to_hub and --no_grade have no effect"),
        (("--out", "rows.jsonl", "--rows", "empty"), "--rows empty holds 0 files of rows"),
    ],
)
def test_the_recipe_refuses_what_it_cannot_write(
    argv: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    run, labels, _ = run_folders(tmp_path, "pairs")
    assert export.main(["--trajectories", str(run), "--rows", str(labels), *argv]) == 1
    assert message in capsys.readouterr().err and not list(tmp_path.glob("rows.*"))


def test_a_run_that_names_no_model_needs_a_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, labels, _ = run_folders(tmp_path, "pairs")
    write_json(run / "config.json", {"options": {}})
    argv = ["--trajectories", str(run), "--rows", str(labels), "--out", str(tmp_path / "o.jsonl")]
    assert export.main(argv) == 1
    assert "does not say which model it sampled from: expected --tokenizer" in capsys.readouterr().err
    assert export.main([*argv, "--tokenizer", str(tmp_path / "model")]) == 0


def test_a_label_folder_of_two_kinds_does_not_say_which(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, labels, rows = run_folders(tmp_path, "pairs")
    write_jsonl(labels / "sft.jsonl", [json.loads(json.dumps(rows[0]))])
    argv = ["--trajectories", str(run), "--rows", str(labels), "--out", str(tmp_path / "o.jsonl")]
    assert export.main(argv) == 1
    assert "holds 2 files of rows; expected one" in capsys.readouterr().err
