"""The report as a file: what is in it, without a browser (tests/test_viewer_browser.py has one)."""

import base64
import gzip
import hashlib
import html
import io
import json
import re
import sys
import threading
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from eval.lineage import Lineage
from eval.report import write_report
from eval.report.records import keeps, pack
from eval.report.terminal import printable, trajectory_lines
from eval.report.tokens import fits, joined, token_pieces
from mtpo.errors import InputError
from mtpo.grader import Grade
from mtpo.runs import write_json, write_jsonl
from mtpo.trajectory import Execution, Problem, StopReason
from recipes import show as show_recipe
from recipes.evaluate import conclude
from recipes.view import report_server
from tests.tiny_runs import APPLES, PEARS, TOKENIZER, attempt, write_log, write_pairs, write_run, write_set
from tests.tiny_tokenizers import make_tokenizer

RIGHT = attempt(
    APPLES, 0, "```python\nprint(2 + 3)\n```", Execution("print(2 + 3)", "5", "ok", 0.01), "\\boxed{5}"
)
WRONG = attempt(APPLES, 1, "\\boxed{6}")
CUT = attempt(PEARS, 0, "```python\nwhile 1: pass\n```", stop=StopReason.TURN_LIMIT)
FAULT = attempt(PEARS, 1, "so", stop=StopReason.ENVIRONMENT_FAULT, fault="EngineError: gone")
ALL = [RIGHT, WRONG, CUT, FAULT]


def unpacked(report: Path, name: str) -> Any:
    found = re.search(rf'<script type="application/gzip" id="{name}">([^<]*)</script>', report.read_text())
    assert found, f"no {name}"
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def text_of(report: Path) -> str:
    """What a reader sees of the overview, roughly."""
    body = report.read_text().partition("<main")[2].partition("</main>")[0]
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def test_the_index_says_of_each_trajectory_what_became_of_it(tmp_path: Path) -> None:
    index = unpacked(write_report(write_run(tmp_path / "run", ALL)), "index")
    rows = index["rows"]
    outcomes = [index["outcomes"][i] for i in rows["outcome"]]
    assert outcomes == ["correct", "wrong answer", "truncated (turn_limit)", "environment fault"]
    assert rows["answer"] == ["5", "6", None, None]
    assert (rows["turns"], rows["calls"], rows["errors"]) == ([2, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0])
    assert index["problems"] == [
        [APPLES.id, APPLES.question, "5", "1", "sum"], [PEARS.id, PEARS.question, "8", "2", "cost"]
    ]  # fmt: skip


def test_tokens_come_with_their_ids_and_log_probs_in_thousandths(tmp_path: Path) -> None:
    report = write_report(write_run(tmp_path / "run", [WRONG]))
    prompt, action = unpacked(report, "tokens-0")[0]
    assert prompt == [list(WRONG.segments[0].ids), None]
    assert action == [list(WRONG.segments[1].ids), [-100, -200, -300, -400, -500, -600]]
    pieces = unpacked(report, "pieces")
    assert "".join(pieces[str(i)] for i in action[0][:-1]) == "\\boxed{6}"


def test_the_table_counts_no_fault_and_gives_the_interval(tmp_path: Path) -> None:
    shown = text_of(write_report(write_run(tmp_path / "run", ALL)))
    # Problem 0 has one of two right, problem 1 none of one: the mean of 1/2 and 0.
    assert "run 25.0%" in shown and "2 4" in shown and shown.count("25.0%") == 1


def test_the_interval_is_that_of_the_evaluation(tmp_path: Path) -> None:
    problems = [Problem(f"toy/{n}", "1 + 1?", "2") for n in range(4)]
    answers = [2, 2, 2, 3]
    write_set(
        tmp_path / "run",
        problems,
        [attempt(p, 0, f"\\boxed{{{a}}}") for p, a in zip(problems, answers, strict=True)],
    )
    # Wilson's interval of 3 of 4, by hand.
    assert "75.0% 30.1 to 95.4" in text_of(write_report(tmp_path / "run"))


def test_what_an_evaluation_found_is_there_in_full(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ALL)
    metrics = conclude(run, [APPLES, PEARS], Lineage({"train": [APPLES]})).table()
    assert "13-grams" in metrics  # the check for contamination
    assert " ".join(metrics.split()) in html.unescape(text_of(write_report(run)))


def test_a_verdict_that_the_run_recorded_is_not_graded_again(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [WRONG])
    row = {
        "problem_id": "toy/0",
        "sample": 1,
        "answer": "6",
        "outcome": "ungraded (timeout)",
        "rule": "timeout",
    }
    write_jsonl(run / "predictions.jsonl", [row])
    index = unpacked(write_report(run), "index")
    assert index["outcomes"] == ["ungraded (timeout)"]


def test_pairs_point_at_their_trajectories_and_a_stray_row_stands_for_itself(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [RIGHT, WRONG])
    stray = attempt(PEARS, 7, "\\boxed{9}")
    write_pairs(run / "labels" / "pairs.jsonl", (RIGHT, WRONG), (attempt(PEARS, 3, "\\boxed{8}"), stray))
    report = write_report(run)
    index = unpacked(report, "index")
    assert index["pairs"] == [[0, 1], [2, 3]]
    assert index["uses"] == {"0": ["chosen"], "1": ["rejected"], "2": ["chosen"], "3": ["rejected"]}
    assert index["rows"]["sample"] == [0, 1, 3, 7]
    segments = unpacked(report, "text-0")[3]["segments"]
    assert [kind for kind, _, _ in segments] == ["p", "a"] and segments[1][1] == "\\boxed{9}"


def test_a_label_run_shows_the_trajectories_it_came_from(tmp_path: Path) -> None:
    sampled = write_run(tmp_path / "sampled", [RIGHT, WRONG])
    labels = tmp_path / "labels"
    write_pairs(labels / "pairs.jsonl", (RIGHT, WRONG))
    (labels / "config.json").write_text(json.dumps({"options": {"trajectories": [str(sampled)]}}))
    report = write_report(labels)
    assert unpacked(report, "index")["pairs"] == [[0, 1]]
    assert "\\boxed" in unpacked(report, "text-0")[0]["segments"][3][1]
    assert unpacked(report, "pieces") is not None  # the tokenizer is that of the sampled run


def test_an_iterated_run_gets_a_learning_curve_and_its_training(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for policy, attempts in (("SFT", [WRONG]), ("iteration_1", [RIGHT]), ("iteration_10", [RIGHT])):
        write_set(run / "test" / policy / "greedy", [APPLES], attempts)
    write_log(run / "iteration_1" / "train")
    page = write_report(run).read_text()
    titles = re.findall(r"<h3>(.*?)</h3>", page)
    assert titles == [
        "Learning curve", "Accuracy by subject or kind", "Accuracy by level", "Where trajectories end",
        "Lengths and turns", "Training: iteration_1",
    ]  # fmt: skip
    curve = re.search(r"Learning curve.*?</svg>", page, re.DOTALL)
    assert curve
    labels = re.findall(r"<text[^>]*>([^<]+)</text>", curve[0])
    assert [label for label in labels if label[0] in "Si"] == ["SFT", "iteration 1", "iteration 10"]
    training = page.partition("Training: iteration_1")[2]
    for panel in ("margin", "log-ratio to reference, nats", "chosen", "rejected"):
        assert f">{panel}</text>" in training


def test_a_loop_that_names_a_row_of_the_paper_stands_beside_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [RIGHT], published="Gemma 2 9B, M-DPO")
    own = {"gsm8k:test": [0.805, 0.78, 0.83], "math:test": [0.5, 0.49, 0.51]}
    stages = [{"name": name, "by_set": own} for name in ("start", "iteration 1", "iteration 2", "<b>3</b>")]
    write_json(run / "summary.json", {"stages": stages})
    table = write_report(run).read_text().partition("<caption>")[2].partition("</table>")[0]
    assert table.startswith("Gemma 2 9B, M-DPO: greedy accuracy, and that of arXiv 2409.02392")
    rows = [re.sub(r"<[^>]+>", " ", row).split() for row in table.split("<tr>")[2:]]
    ours = ["80.5%", "78.0", "to", "83.0"], ["50.0%", "49.0", "to", "51.0"]
    assert rows[0] == ["start", *ours[0], "84.1%", *ours[1], "51.0%"]
    assert rows[1] == ["iteration", "1", *ours[0], *ours[1]]
    assert rows[3] == ["&lt;b&gt;3&lt;/b&gt;", *ours[0], "86.3%", *ours[1], "54.5%"]


def test_a_training_run_alone_is_a_report(tmp_path: Path) -> None:
    write_log(tmp_path / "run")
    report = write_report(tmp_path / "run")
    assert "Training: run" in report.read_text()
    assert unpacked(report, "index")["rows"]["set"] == []


def test_another_run_stands_beside_the_first(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one", [WRONG]), write_run(tmp_path / "two", [RIGHT])
    report = write_report(one, compare=two)
    assert report == one / "report_against_two.html"
    assert [(s["run"], s["name"]) for s in unpacked(report, "index")["sets"]] == [
        ("one", "one"),
        ("two", "two"),
    ]
    assert "one against two , problem by problem: 0 improved, 1 worsened" in text_of(report)
    same = write_run(tmp_path / "other" / "one", [RIGHT])
    named = unpacked(write_report(one, compare=same), "index")["sets"]
    assert [s["run"] for s in named] == [f"{tmp_path.name}/one", "other/one"]


def test_the_tokenizer_may_be_that_of_the_policy(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path / "policy")
    write_set(tmp_path / "run", [APPLES], [attempt(APPLES, 0, "\\boxed{5}", policy=str(tmp_path / "policy"))])
    assert unpacked(write_report(tmp_path / "run"), "pieces") is not None


def test_a_limit_keeps_whole_problems_and_says_so(tmp_path: Path) -> None:
    problems = [Problem(f"toy/{n}", "1 + 1?", "2") for n in range(40)]
    write_set(tmp_path / "run", problems, [attempt(p, s, "\\boxed{2}") for p in problems for s in range(3)])
    report = write_report(tmp_path / "run", limit=60)
    index = unpacked(report, "index")
    samples: dict[int, list[int]] = {}
    for problem, sample in zip(index["rows"]["problem"], index["rows"]["sample"], strict=True):
        samples.setdefault(problem, []).append(sample)
    assert all(found == [0, 1, 2] for found in samples.values())
    assert len(samples) == sum(keeps(p.id, 0.5) for p in problems) and 5 < len(samples) < 35
    assert f"{3 * len(samples)} of 120 trajectories" in text_of(report) and "100.0%" in text_of(report)


def test_nothing_of_a_run_is_markup(tmp_path: Path) -> None:
    evil = '</script><script>alert(1)</script><img src=x onerror="alert(2)">\u2028'
    problem = Problem(evil, evil, evil, evil, evil)
    run = tmp_path / "run"
    write_set(run, [problem], [attempt(problem, 0, f"{evil}\\boxed{{{evil}}}", policy=evil)])
    (run / "config.json").write_text(json.dumps({"options": {"model": evil, "method": evil}}))
    page = write_report(run).read_text()
    tags: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append(tag)
    parser.feed(page)
    assert "img" not in tags and "svg" in tags
    assert (
        page.count("<script") == page.count("</script>") == 4 + 1
    )  # index, pieces, text, tokens; and the page's own
    assert unpacked(run / "report.html", "index")["problems"][0][1] == evil


def test_the_policy_allows_the_pages_own_script_and_style_and_nothing_else(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run", ALL)).read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy and policy[1].startswith("default-src 'none'; ")
    for tag in ("script", "style"):
        source = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(source[-1].encode()).digest()).decode()
        assert len(source) == 1 and f"{tag}-src 'sha256-{digest}'" in policy[1]
    assert " style=" not in page and not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)[0]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|fetch\(", script)


def test_packed_data_cannot_end_its_element() -> None:
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", pack({"text": "</script>\u2028\ud800"}))


def test_without_matplotlib_there_are_no_plots_but_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", ALL)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what makes `import matplotlib` fail
    shown = text_of(write_report(run))
    assert "Plots need matplotlib" in shown and "25.0%" in shown


def test_a_run_without_its_tokenizer_has_no_pieces_and_says_so(tmp_path: Path) -> None:
    write_set(tmp_path / "run", [APPLES], [RIGHT])
    report = write_report(tmp_path / "run")
    assert unpacked(report, "pieces") is None and "No tokenizer on this machine reads" in text_of(report)


def test_a_tokenizer_that_did_not_make_the_ids_is_not_believed(tmp_path: Path) -> None:
    write_set(tmp_path / "run", [APPLES], [RIGHT])
    make_tokenizer("gemma").save_pretrained(tmp_path / "other")
    report = write_report(tmp_path / "run", tokenizer=str(tmp_path / "other"))
    assert unpacked(report, "pieces") is None and "No tokenizer on this machine reads" in text_of(report)


@pytest.mark.parametrize("family", ["gemma", "mistral", "llama3", "qwen2_5"])
def test_pieces_put_together_are_the_text(family: str) -> None:
    tokenizer = make_tokenizer(family)
    text = "So  48 clips\tand\n\n  24 €: `print(1)`"
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = token_pieces(tokenizer, ids)
    whole = joined([pieces[i] for i in ids])
    if "\ufffd" not in tokenizer.decode(ids) and tokenizer.unk_token_id not in ids:
        assert whole.lstrip(" ") == tokenizer.decode(ids).lstrip(" ")
    assert fits(tokenizer, [(ids, tokenizer.decode(ids))])


def test_bytes_that_are_no_character_stay_bytes() -> None:
    ids = TOKENIZER.encode("€", add_special_tokens=False)
    pieces = token_pieces(TOKENIZER, ids)
    assert [pieces[i] for i in ids] == [[0xE2], [0x82], [0xAC]]


def test_a_broken_training_row_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [RIGHT])
    write_pairs(run / "pairs.jsonl", (RIGHT, RIGHT))
    row = json.loads((run / "pairs.jsonl").read_text())
    write_jsonl(run / "pairs.jsonl", [row, row | {"chosen_completion_mask": [0]}])
    with pytest.raises(
        InputError, match=r"pairs\.jsonl, line 2: .* chosen_input_ids but 1 chosen_completion_mask"
    ):
        write_report(run)


@pytest.mark.parametrize("folder", ["nothing", "empty"])
def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=f"{folder}: .*no such run folder|{folder}: holds no trajectories"):
        write_report(tmp_path / folder)


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ALL)
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_a_terminal_gets_no_escape_sequence_of_the_model() -> None:
    evil = "\x1b]0;title\x07\x1b[2J\x9b31m\r\u202etxt.exe\u200b"
    assert printable(evil + "\n\ta€") == ("\\x1b]0;title\\x07\\x1b[2J\\x9b31m\\r\\u202etxt.exe\\u200b\n\ta€")
    problem = Problem(evil, evil, evil)
    run = Execution("", evil, "error", 0.1)
    names = {"policy": evil, "metadata": {"last_words": f"bye {evil}"}}
    trajectory = attempt(problem, 0, evil, run, f"\\boxed{{{evil}}}", **names)
    pieces = token_pieces(TOKENIZER, trajectory.input_ids)
    for known in (None, pieces):
        lines = "\n".join(
            trajectory_lines(trajectory, problem, Grade("wrong", evil, "text"), known, color=False)
        )
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u200b]", lines)
        assert "--- never read ---\nbye " in lines


def test_the_mask_has_its_colours_and_unlikely_tokens_a_line() -> None:
    trajectory = attempt(APPLES, 1, "\\boxed{6} which it is, I say, and so on")
    pieces = token_pieces(TOKENIZER, trajectory.input_ids)
    colored = "\n".join(
        trajectory_lines(trajectory, APPLES, Grade("wrong", "6", "number"), pieces, color=True)
    )
    plain = "\n".join(
        trajectory_lines(trajectory, APPLES, Grade("wrong", "6", "number"), pieces, color=False)
    )
    assert re.sub(r"\x1b\[[\d;]*m", "", colored).startswith(plain)
    action = colored.partition("--- action")[2]
    first, *_, last = re.findall(
        r"\x1b\[([\d;]*)m", action.partition("underlined")[0].partition("<|im_end|>")[0]
    )
    assert first == "36"  # log p -0.1
    assert last in ("36;4", "96;4")  # log p below -2.3
    assert "\x1b[2m" in colored.partition("--- action")[0]


def test_show_finds_a_sample_and_names_the_other_sets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", [WRONG, attempt(APPLES, 0, "\\boxed{5}")])
    write_set(run / "later", [APPLES], [RIGHT])
    assert show_recipe.main([str(run), "--id", "toy/0:1"]) == 0
    out = capsys.readouterr().out
    assert "wrong answer: answer 6, gold 5 (number)" in out and "\x1b" not in out
    assert "--- action, turn 1, 6 tokens, mask 1, sum of log p -2.10 ---" in out
    assert show_recipe.main([str(run), "--id", "toy/0"]) == 0
    assert "answer 5" in (out := capsys.readouterr().out) and out.endswith("--set shows it in later\n")
    assert show_recipe.main([str(run), "--id", "toy/0:9"]) == 1
    assert "error: --id toy/0:9: no trajectory" in capsys.readouterr().err


def test_show_uses_color_on_a_terminal_unless_told_not_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    run = write_run(tmp_path / "run", [WRONG])
    for value, has_color in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", value)
        monkeypatch.setattr(sys, "stdout", terminal := Terminal())
        assert show_recipe.main([str(run), "--id", "toy/0"]) == 0
        assert ("\x1b[36m" in terminal.getvalue()) == has_color


def test_the_server_gives_one_file_to_loopback_names_only(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("the report")
    (tmp_path / "secret").write_text("secret")
    with report_server(tmp_path / "report.html") as server:
        assert server.server_address[0] == "127.0.0.1"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        try:
            assert urllib.request.urlopen(f"{base}/", timeout=60).read() == b"the report"
            for path, host, status in (
                ("/secret", None, 404), ("/../secret", None, 404), ("/", "evil.example:80", 403),
            ):  # fmt: skip
                request = urllib.request.Request(base + path, headers={"Host": host} if host else {})
                with pytest.raises(urllib.error.HTTPError) as refused:
                    urllib.request.urlopen(request, timeout=60)
                assert refused.value.code == status
        finally:
            server.shutdown()
