"""What counts as the answer of a response, and of a worked solution."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from mtpo.answers import (
    boxed_in_prose,
    extract_answer,
    gold_from_gsm8k,
    gold_from_solution,
    last_boxed,
)

SHARED = Path(__file__).resolve().parents[2] / "shared"

CODE = "Let me compute.\n```python\nprint(6 * 7)\n```\n```output\n42\n```\n"


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{B}", "B"),
        (r"\boxed 7", "7"),
        (r"$\boxed 12$", "12"),
        (r"\boxed\pi", r"\pi"),
        (r"\boxed {9}", "9"),
        (r"first \boxed{1}, hence finally \boxed{2}", "2"),
        (r"\boxed{\boxed{5}}", r"\boxed{5}"),
        (r"\boxed{}", ""),
        (r"\boxedx{3}", None),
        (r"\boxed{3", None),
        (r"an open \boxed{3 and then \boxed{4}", "4"),
        ("none", None),
    ],
)
def test_last_boxed_matches_braces(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    "text",
    [
        r"$\boxed{5}$ or $\boxed{7}$",
        r"\boxed{5} and \boxed{7}",
        r"$\boxed{5}, \boxed{7}$",
        r"$x = \boxed{5}$ or $x = \boxed{7}$",
        r"\boxed{5} \text{ or } \boxed{7}",
        r"\(\boxed{5}\) and \(\boxed{7}\)",
        r"$\boxed{5},$ or $\boxed{7}$",
    ],
)
def test_boxes_joined_by_and_or_comma_are_one_answer(text: str) -> None:
    assert last_boxed(text) == "5, 7"


def test_boxes_apart_are_not_joined() -> None:
    assert last_boxed(r"\boxed{5} is too small and hence \boxed{7}") == "7"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"The answer is $\boxed{18}$.", "18"),
        (CODE + r"So $\boxed{42}$.", "42"),
        (r"I guess \boxed{1}." + "\n" + CODE + "Done.", None),  # an earlier turn
        ("```python\nprint(r'\\boxed{42}')\n```", None),  # code
        ("```python\nprint(1)\n```\n```output\n\\boxed{42}\n```", None),  # tool output, nothing after it
        (CODE + "```python\n# \\boxed{3}\n", None),  # an unterminated code fence
        ("```python\nprint(1)\n```\n```output\n\\boxed{9}", None),  # an unterminated output fence
        (CODE + "\\boxed{42}\n```python\n# \\boxed{3}\n```\n", "42"),  # code after the box, never run
        ("```python\nx = 1\n```output\n1\n```\nThe answer is \\boxed{1}", "1"),  # a close that was forgotten
        ("```output\n3\n```So it is \\boxed{3}", "3"),
        (r"\boxed{ }", None),
        (r"\boxed{}", None),
        ("", None),
    ],
)
def test_only_prose_of_the_last_message_counts(response: str, answer: str | None) -> None:
    assert extract_answer(response) == answer


def test_one_message_with_fences_inside() -> None:
    message = "\\boxed{8}\n```output\n\\boxed{9}\n```\nas the output says"
    assert boxed_in_prose(message) == "8"
    assert extract_answer(message) is None


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("16 - 3 = <<16-3=13>>13\n#### 2,125", "2,125"),
        ("#### -3 \n", "-3"),
        ("So \\boxed{7}.\n#### 8", "7"),  # a box comes first
        ("#### Step 2: 5", None),  # a heading
        ("#### 5\nThat is all.", None),
        (CODE + "```python\nprint(1)\n#### 5", None),
    ],
)
def test_gsm8ks_mark_in_the_last_line_is_an_answer(response: str, answer: str | None) -> None:
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    ("prose", "answer"),
    [
        ("Tom has 3 pens. Thus the total is 42.", "42"),
        ("He pays $45 and gets 3 pens for $1,234.50.", "$1,234.50"),
        (r"Hence $x = 5$ and the slope is $\frac{3}{4}$.", r"\frac{3}{4}"),
        (r"The point is \((1, 2)\)", "(1, 2)"),
        ("It is 3/4 of them, 75%.", "75%"),
        ("I do not know. There were 5 of them.\nSorry.", None),
        ("", None),
    ],
)
def test_the_last_sentence_answers_only_where_that_is_asked_for(prose: str, answer: str | None) -> None:
    assert extract_answer(CODE + prose) is None
    assert extract_answer(CODE + prose, last_sentence=True) == answer


@pytest.mark.parametrize("response", [CODE, CODE + "```python\nprint(5)", CODE + r"so \boxed{}, 5."])
def test_neither_code_nor_output_nor_an_empty_box_gives_way_to_the_last_sentence(response: str) -> None:
    assert extract_answer(response, last_sentence=True) is None


def test_a_million_open_boxes_are_read_in_linear_time() -> None:
    start = time.process_time()
    assert last_boxed(r"\boxed{" * 100_000) is None
    assert last_boxed(r"\boxed{1}" + " " * 1_000_000 + r"\boxed{2}") == "2"
    assert time.process_time() - start < 5


def test_gold_of_a_solution_is_the_last_box_unless_joined_is_asked_for() -> None:
    solution = r"The roots are $\boxed{-2}$ and $\boxed{1}$."
    assert gold_from_solution(solution) == "1"
    assert gold_from_solution(solution, joined=True) == "-2, 1"
    assert gold_from_solution(r"so $\boxed 2.$") == "2"
    assert gold_from_solution(r"so $\boxed{}$") == ""
    assert gold_from_solution("no box") is None


def test_gold_of_gsm8k_has_no_separators() -> None:
    assert gold_from_gsm8k("16 - 3 = <<16-3=13>>13\n#### 2,125") == "2125"
    assert gold_from_gsm8k("#### -3 ") == "-3"
    assert gold_from_gsm8k("no answer") is None


@pytest.mark.parametrize("split", ["train", "test"])
def test_gold_of_every_math_solution(split: str) -> None:
    folder = SHARED / "data" / "math"
    if not folder.exists():
        pytest.skip(f"{folder} is not on this machine")
    with (folder / f"{split}.jsonl").open() as records, (folder / f"{split}_meta.jsonl").open() as metas:
        for record, meta in zip(records, metas, strict=True):
            expected = json.loads(meta)["answer"].strip()
            assert gold_from_solution(json.loads(record)["solution"]) == expected
