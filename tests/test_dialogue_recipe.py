"""The dialogue recipe from a tiny teacher to pairs, and what its folder looks like to the other recipes."""

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from data.trajectories import read_trajectories
from eval.report import write_report
from mtpo.batches import read_rows
from mtpo.dialogue import transcript
from mtpo.models import fingerprint, load_model
from mtpo.runs import read_json
from mtpo.trajectory import Trajectory
from recipes import dialogue, online, show
from recipes.train import read_data
from tests.fake_server import Answer, FakeServer

SMALL = ("--limit", "3", "--max_turns", "4", "--max_turn_tokens", "24")
Key = tuple[str, int]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four talks on each of three topics by a teacher that has learned for 25 steps."""
    out = tmp_path_factory.mktemp("dialogue") / "run"
    assert dialogue.main(["--out", str(out), "--demonstrations", "400", "--samples", "4", *SMALL]) == 0
    return out


def talks_of(run: Path) -> dict[Key, Trajectory]:
    return {(t.problem_id, t.sample): t for t in read_trajectories(run / "dialogues" / "trajectories")}


def test_the_journal_has_every_talk_and_pairs_prefer_what_was_understood(run: Path) -> None:
    talks = talks_of(run)
    assert len(talks) == 12
    rows = read_rows(run / "labels" / "pairs.jsonl")
    assert rows == read_data(str(run / "labels"), "dpo") and rows
    for row in rows:
        sides = [talks[row["problem_id"], row[f"{side}_sample"]] for side in ("chosen", "rejected")]
        assert sides[0].metadata["comprehension"] > sides[1].metadata["comprehension"]
        assert row["chosen_input_ids"] == sides[0].input_ids
        assert row["chosen_completion_mask"] == sides[0].completion_mask


def test_the_summary_and_the_grades_say_what_was_understood(run: Path) -> None:
    talks, summary = talks_of(run), read_json(run / "summary.json")
    scores = {key: t.metadata["comprehension"] for key, t in talks.items()}
    assert summary["comprehension"] == pytest.approx(sum(scores.values()) / 12)
    assert summary["understood_all"] == pytest.approx(sum(s == 1 for s in scores.values()) / 12)
    assert sum(summary["stop_reasons"].values()) == sum(summary["ended_by"].values()) == 12
    grades = [json.loads(line) for line in (run / "labels" / "grades.jsonl").read_text().splitlines()]
    verdicts = {(g["problem_id"], g["sample"]): g["verdict"] for g in grades}
    assert verdicts == {key: "correct" if score == 1 else "wrong" for key, score in scores.items()}


def test_the_same_model_and_seed_hold_the_same_talks_and_another_seed_others(
    run: Path, tmp_path: Path
) -> None:
    model = ["--model", str(run / "teacher" / "model"), "--system", "", "--samples", "4", *SMALL]
    found = []
    for seed in ("0", "1"):
        assert dialogue.main([*model, "--seed", seed, "--out", str(tmp_path / seed)]) == 0
        found.append({key: (t.input_ids, t.metadata) for key, t in talks_of(tmp_path / seed).items()})
    assert found[0] == {key: (t.input_ids, t.metadata) for key, t in talks_of(run).items()} != found[1]


def test_a_resumed_run_holds_only_the_talks_that_are_missing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(run / "teacher" / "model"), "--system", "", "--samples", "4", *SMALL]
    assert dialogue.main([*options, "--out", str(tmp_path / "run")]) == 0
    whole = talks_of(tmp_path / "run")
    [shard] = (tmp_path / "run" / "dialogues" / "trajectories").glob("0*.jsonl")
    shard.write_text("".join(shard.read_text().splitlines(keepends=True)[:5]))
    assert dialogue.main([*options, "--out", str(tmp_path / "run")]) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert dialogue.main([*options, "--out", str(tmp_path / "run"), "--resume"]) == 0
    resumed = talks_of(tmp_path / "run")
    assert {k: t.input_ids for k, t in resumed.items()} == {k: t.input_ids for k, t in whole.items()}


def test_a_model_can_play_the_student(run: Path, tmp_path: Path) -> None:
    model, out = str(run / "teacher" / "model"), tmp_path / "run"
    options = ["--model", model, "--student", model, "--student_tokens", "8", "--judge", "none"]
    assert dialogue.main([*options, "--persona", "Learn.", "--samples", "1", *SMALL, "--out", str(out)]) == 0
    talks = talks_of(out)
    assert len(talks) == 3 and {t.fault for t in talks.values()} == {None}
    assert not (out / "labels" / "pairs.jsonl").exists()
    assert "comprehension" not in read_json(out / "summary.json")
    prompts = {t.segments[0].text for t in talks.values()}
    assert all(text.startswith(dialogue.TEACHER) for text in prompts)


def test_a_language_model_judges_whole_talks_and_its_answers_are_kept(run: Path, tmp_path: Path) -> None:
    def longer(body: dict[str, Any]) -> Answer:
        """Prefers the conversation with more messages of the student."""
        [message] = body["messages"]
        first, second = message["content"].partition("--- Conversation 2 ---")[::2]
        counts = [text.count("Student: ") for text in (first, second)]
        verdict = "tie" if counts[0] == counts[1] else str(1 + (counts[1] > counts[0]))
        return 200, {"choices": [{"message": {"role": "assistant", "content": f"Better: {verdict}"}}]}

    model, out = str(run / "teacher" / "model"), tmp_path / "run"
    server = FakeServer(longer, path="/v1/chat/completions")
    try:
        options = ["--model", model, "--system", "", "--samples", "4", *SMALL, "--out", str(out)]
        options += ["--judge", "llm", "--judge_urls", server.url, "--judge_model", "j"]
        assert dialogue.main(options) == 0
        num_asked = len(server.requests)
        assert dialogue.main([*options, "--resume"]) == 0
        assert len(server.requests) == num_asked > 0
    finally:
        server.stop()
    talks, rows = talks_of(out), read_rows(out / "labels" / "pairs.jsonl")  # at least one
    for row in rows:
        chosen, rejected = (talks[row["problem_id"], row[f"{s}_sample"]] for s in ("chosen", "rejected"))
        assert transcript(chosen).count("Student: ") > transcript(rejected).count("Student: ")
    assert read_json(out / "summary.json")["judge"]["answers from the cache"] == num_asked


def test_a_student_may_be_served_as_text_alone_and_what_the_teacher_sampled_is_still_its_own(
    run: Path, tmp_path: Path
) -> None:
    server = FakeServer(lambda _: (200, {"choices": [{"text": "And why?", "finish_reason": "stop"}]}))
    model, out = str(run / "teacher" / "model"), tmp_path / "run"
    options = ["--model", model, "--system", "", "--judge", "none", "--persona", "Learn.", "--samples", "1"]
    options += ["--student", "policy", "--student_engine", "openai", "--student_urls", server.url]
    try:
        assert dialogue.main([*options, "--student_tokenizer", model, *SMALL, "--out", str(out)]) == 0
    finally:
        server.stop()
    talks = talks_of(out).values()
    observed = [s.text for t in talks for s in t.segments if s.kind == "observation"]
    assert set(observed) == {"And why?"} and not any(t.is_from_text for t in talks)


def online_command(run: Path, out: Path, method: str, *more: str) -> list[str]:
    argv = ["--model", str(run / "teacher" / "model"), "--system", "", "--method", method, "--out", str(out)]
    argv += ["--problems", str(run / "dialogues" / "problems.jsonl"), "--learning_rate", "1e-4"]
    return [*argv, "--batch_size", "3", "--epochs", "2", *SMALL, *more]


def figures_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("method", ["mtpo", "online_ipo"])
def test_an_online_method_learns_from_its_own_talks(run: Path, tmp_path: Path, method: str) -> None:
    held_out = str(run / "dialogues" / "problems.jsonl")
    options = ["--student", "scripted", "--judge", "comprehension", "--eval_problems", held_out]
    out = tmp_path / "run"
    assert online.main(online_command(run, out, method, *options)) == 0
    assert [step["num/judged"] for step in figures_of(out / "metrics.jsonl")] == [3, 3]
    talks = [t for rounds in out.glob("rounds/*/*/trajectories") for t in read_trajectories(rounds)]
    assert len(talks) == 12 and all(0 <= t.metadata["comprehension"] <= 1 for t in talks)
    assert fingerprint(load_model(out / "model")) != fingerprint(load_model(run / "teacher" / "model"))
    before, after = figures_of(out / "eval.jsonl")
    assert before["eval_num/reference"] == after["eval_num/previous"] == 3
    assert after["eval_turns/played"] <= 4


def test_the_judge_of_an_online_run_reads_whole_talks_with_a_student_that_is_served(
    run: Path, tmp_path: Path
) -> None:
    """It prefers the second in either order, so that all are ties."""
    student = FakeServer(lambda _: (200, {"choices": [{"text": "And why?", "finish_reason": "stop"}]}))
    verdict = {"choices": [{"message": {"role": "assistant", "content": "Better: 2"}}]}
    judge = FakeServer(lambda _: (200, verdict), path="/v1/chat/completions")
    model, out = str(run / "teacher" / "model"), tmp_path / "run"
    options = ["--student", "policy", "--student_engine", "openai", "--student_urls", student.url]
    options += [
        "--student_tokenizer",
        model,
        "--judge",
        "llm",
        "--judge_urls",
        judge.url,
        "--judge_model",
        "j",
    ]
    try:
        assert online.main(online_command(run, out, "online_ipo", *options)) == 0
    finally:
        student.stop()
        judge.stop()
    steps = figures_of(out / "metrics.jsonl")
    assert [(step["num/judged"], step["ties/judged"]) for step in steps] == [(3, 1), (3, 1)]
    prompts = [request["messages"][-1]["content"] for request in judge.requests]
    assert prompts and all("--- Conversation 1 ---" in p and "Student: And why?" in p for p in prompts)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--student", "scripted"], "--judge verifier grades answers, which a dialogue has none of"),
        (["--judge", "comprehension"], "--judge comprehension needs --student scripted"),
        (["--persona", "Learn."], "--persona has no effect without --student"),
        (
            ["--student", "scripted", "--student_tokens", "5"],
            "--student_tokens has no effect with the scripted",
        ),
        (["--student", "scripted", "--kernels", "2"], "--kernels has no effect with --student: nobody runs"),
        (["--student", "m", "--judge", "llm"], "--judge llm needs --judge_urls and --judge_model"),
        (
            [
                "--judge",
                "llm",
                "--judge_urls",
                "http://h",
                "--judge_model",
                "j",
                "--judge_instruction",
                "/absent",
            ],
            "--judge_instruction /absent: no such file",
        ),
    ],
)
def test_bad_options_of_an_online_dialogue_are_one_line_and_make_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], complaint: str
) -> None:
    assert online.main(online_command(tmp_path, tmp_path / "run", "mtpo", *options)) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {complaint}") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def unpacked(report: Path) -> Any:
    found = re.search(r'<script type="application/gzip" id="index">([^<]*)</script>', report.read_text())
    assert found
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def test_the_report_shows_the_talks_with_what_was_understood_and_the_pairs(run: Path) -> None:
    index = unpacked(write_report(run))
    rows = index["rows"]
    talks = talks_of(run)
    assert len(rows["sample"]) == len(talks) and rows["calls"] == [0] * len(talks)
    named = [index["problems"][number][0] for number in rows["problem"]]
    for problem_id, sample, answer, rule in zip(
        named, rows["sample"], rows["answer"], rows["rule"], strict=True
    ):
        understood = talks[problem_id, sample].metadata["understood"]
        assert (answer, index["rules"][rule]) == (", ".join(understood) or None, "comprehension")
    assert len(index["pairs"]) == len(read_rows(run / "labels" / "pairs.jsonl"))


def test_a_talk_is_shown_in_the_terminal_with_its_mask(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (problem_id, sample), talk = next((k, t) for k, t in talks_of(run).items() if t.num_turns > 1)
    assert show.main([str(run), "--id", f"{problem_id}:{sample}"]) == 0
    shown = capsys.readouterr().out
    assert f"--- observation, {len(talk.segments[2].ids)} tokens, mask 0 ---" in shown
    assert talk.segments[2].text in shown and "(comprehension)" in shown


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--student_tokens", "5"], "--student_tokens has no effect with the scripted student"),
        (["--topics", "gsm8k:test"], "--topics has no effect with the scripted student"),
        (["--judge", "none", "--per_problem", "2"], "--per_problem has no effect with --judge none"),
        (["--model", "m", "--demonstrations", "9"], "--demonstrations has no effect with --model"),
        (["--student", "m"], "only what the scripted student understood is known"),
        (["--judge", "llm"], "--judge llm needs --judge_urls and --judge_model"),
        (["--judge_model", "m"], "--judge_model has no effect with --judge comprehension"),
        (["--student", "m", "--judge", "none", "--student_engine", "x"], "--engine must be one of"),
        (["--model", "./absent"], "tokenizer ./absent: no such folder"),
        (["--student", "./absent", "--judge", "none"], "tokenizer ./absent: no such folder"),
        (
            ["--student", "m", "--judge", "none", "--student_tokenizer", "t"],
            "--student_tokenizer has no effect with --student_engine transformers",
        ),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        (["--top_p", "0"], "--top_p must be above 0 and at most 1, got 0.0"),
        (["--temperature", "-1"], "--temperature must not be negative, got -1.0"),
    ],
)
def test_bad_options_are_one_line_and_make_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], complaint: str
) -> None:
    assert dialogue.main(["--out", str(tmp_path / "run"), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {complaint}") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
