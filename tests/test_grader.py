"""Which answers are equal: one test a rule, then the shared cases and the golds of the data sets."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtpo.answers import gold_from_gsm8k, gold_from_solution
from mtpo.grader import Grade, Grader, GradingOptions, grade, shared_grader
from mtpo.trajectory import Problem

SHARED = Path(__file__).resolve().parents[2] / "shared"


CASES: dict[str, list[dict[str, Any]]] = yaml.safe_load(
    (Path(__file__).parent / "grading_cases.yaml").read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader() as grader:
        yield grader


def verdict(grader: Grader, gold: str, answer: str) -> str:
    return grader.grade(rf"The answer is $\boxed{{{answer}}}$.", gold).verdict


# gold, answers that are right, answers that are wrong
RULES: list[tuple[str, list[str], list[str]]] = [
    # value, not form
    (r"\frac{13}{18}", [r"\frac{26}{36}", "26/36", r"\dfrac{13}{18}"], ["13/17", "18/13", "0.7222"]),
    (r"3\sqrt{13}", [r"\sqrt{117}", "3*sqrt(13)", r"3 \sqrt{13} \text{ cm}"], [r"\sqrt{116}", "10.8166538"]),
    ("x^2+4x+9", ["(x+2)^2+5", "x**2 + 4*x + 9", "9 + x(x+4)"], ["x^2+4x+8", "(x+2)^2", "y^2+4y+9"]),
    ("12", [r"\frac{24}{2}", "3 \\cdot 4", "2^2*3", r"\binom{12}{1}", "12.0"], ["-12", "21", "12x", "1 2"]),
    (r"2\frac{1}{3}", ["7/3", "2 1/3", r"\frac{7}{3}"], ["2/3", "2.33"]),
    (r"\frac{\sqrt{2}}{2}", [r"\frac{1}{\sqrt{2}}", "2^{-1/2}", r"\sin 45^\circ"], ["0.7071", r"\sqrt{2}"]),
    ("1+2i", ["2i+1", r"\frac{2+4i}{2}", "1+2j", "(1+2j)"], ["1-2i", "2+i", "3i"]),
    (r"\ln 8", [r"3\ln 2", "log(8)"], [r"\ln 6"]),
    # decimals: exact, or a float printed in full
    ("18", ["17.999999999999996", "18.000000000000004"], ["17.9999", "18.001"]),
    (r"\frac{3}{7}", ["0.42857142857142855", r"0.\overline{428571}"], ["0.4286", "0.428571"]),
    (r"\pi", ["3.141592653589793", "pi", "π"], ["3.14", "22/7", "3.14159"]),
    ("0", ["1.2246467991473532e-16", "0.0", "-0"], ["1e-7", "0.001"]),
    # percent, currency, units, scale
    ("25\\%", ["25", "0.25", r"\frac{1}{4}", r"25 \text{ percent}"], ["0.025", "2.5", "250\\%", "0.25\\%"]),
    ("20", ["20\\%"], ["0.2"]),
    ("\\$1,\\!250", ["1250", "\\$1250.00", r"1{,}250 \text{ dollars}"], ["125", r"1250 \text{ cents}"]),
    (r"12 \text{ gm}", ["12", r"12 \text{ grams}"], [r"12 \text{ kg}", r"13 \text{ gm}"]),
    (r"9\text{ cm}^2", ["9", r"9 \text{ square centimeters}"], [r"9 \text{ cm}", r"9 \text{ in}^2"]),
    ("5000", ["5 thousand", "5,000", r"5\,000"], ["5", "5 million"]),
    ("40^\\circ", ["40", r"40 \text{ degrees}"], ["50^\\circ"]),
    # lists and sets in any order, tuples and points in order
    (
        "2, 3, 5",
        ["5,3,2", r"\{2,3,5\}", "[2, 3, 5]", "x=2, x=3, x=5", r"2, 3 \text{ and } 5"],
        ["2,3", "2,3,6"],
    ),
    (r"\{-1, 4\}", ["4 and -1", "x = 4 or x = -1", "{4, -1}"], ["-1", "1, 4"]),
    (r"3 \pm \sqrt{2}", [r"3+\sqrt2, 3-\sqrt2"], [r"3+\sqrt{2}", r"2 \pm \sqrt{3}"]),
    (
        "(1, 2, 3)",
        ["x=1, y=2, z=3", "[1, 2, 3]", r"\begin{pmatrix}1\\2\\3\end{pmatrix}"],
        ["(3,2,1)", "(1,2)"],
    ),
    ("(4, -3)", ["{x: 4, y: -3}", "Point(4, -3)", "y = -3, x = 4"], ["(-3, 4)", "4"]),
    ("7", ["[7]", r"\{7\}", "7 or 7.0"], ["5 or 7", "7, 8"]),
    ("x = 1, y = 2", ["y = 2, x = 1", "(1, 2)"], ["x = 2, y = 1", "a = 1, b = 2"]),
    (r"2, \frac{4}{2}", ["2, 2.0"], ["2, 3"]),
    # intervals
    (r"[2, \infty)", [r"x \ge 2", "Interval(2, oo)", r"2 \le x"], [r"(2, \infty)", "x > 2", "[2, 9)"]),
    ("(-1,4]", ["-1 < x <= 4", r"x \in (-1, 4]"], ["(-1,4)", "[-1,4]"]),
    (
        r"(-\infty,-8) \cup (8,\infty)",
        ["x > 8 or x < -8", "|x| > 8", "(8,oo) U (-oo,-8)"],
        ["(-8,8)", "x > 8"],
    ),
    (
        r"(-\infty,3) \cup (3,\infty)",
        [r"x \ne 3", r"\mathbb{R} \setminus \{3\}"],
        [r"x \ne -3", r"\mathbb{R}"],
    ),
    (r"(-\infty,\infty)", [r"\mathbb{R}", r"\text{all real numbers}"], [r"(0,\infty)"]),
    ("a < b < c", ["c > b > a"], ["a < c < b", r"a \le b \le c"]),
    # matrices
    (
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        ["[[1, 2], [3, 4]]", "Matrix([[1, 2], [3, 4]])", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"],
        [r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}", "[1, 2, 3, 4]"],
    ),
    # equations
    ("5", ["x = 5", "5 = x", r"\angle A = 5", "AB = 2+3 = 5"], ["2x = 10", "x + y = 5", "x = -5", "x > 5"]),
    ("6", [], ["2x = 6", "x = 3"]),
    ("y = 2x - 3", ["2x - y = 3", "4x - 2y - 6 = 0", "2x-3"], ["y = 2x + 3", "2x + y = 3"]),
    (r"n \equiv 5 \pmod{17}", ["5"], [r"n \equiv 5 \pmod{16}", "22"]),
    (r"\frac{x}{3} + \frac{y}{2} = 1", ["2x + 3y = 6"], ["2x + 3y = 1", "2 = 3", "x = x", "6 = 6"]),
    (
        r"2\sqrt{3}",
        [r"2\sqrt{3} \approx 3.46", r"x = 2\sqrt{3} \approx 3.46"],
        [r"x \approx 3.46", r"x = 1 y = 2\sqrt{3}"],
    ),
    (r"(t, 2t)", ["(t, t + t)"], [r"(3t, 2t)", r"t \in \mathbb{R}"]),
    # functions of a variable
    (r"\sin 2x", [r"2 \sin x \cos x", "sin(2*x)"], [r"2 \sin x", r"\sin 2y"]),
    ("|x|", [r"\sqrt{x^2}"], ["x", "-x"]),
    (
        r"n - \lfloor n/2 \rfloor",
        [r"\lceil n/2 \rceil + n - \lceil n/2 \rceil - \lfloor n/2 \rfloor"],
        [r"n - \lfloor n/3 \rfloor"],
    ),
    (r"\frac{n(n+1)}{2}", ["n*(n+1)/2", r"\binom{n+1}{2}", "(n^2+n)/2"], [r"\frac{n(n-1)}{2}"]),
    (r"\lfloor (x+1) \rfloor", [r"\lfloor x + 1 \rfloor"], [r"\lceil x \rceil + 2"]),
    (r"e^{2x}", ["(e^x)^2", "exp(2*x)"], ["e^{x^2}", "2e^x"]),
    ("3 - 2f(x)", ["-2*f(x) + 3"], ["3 - 2g(x)", "3 - 2f(y)"]),
    # base n, choices, times, ratios, words
    ("1101_2", ["1101", "1101_{2}", r"1101 \text{ base } 2"], ["1101_3", "13", "1011_2"]),
    (r"\text{(C)}", ["C", "(C)", r"\text{(C) Plane}", r"\textbf{C}"], ["D", "(CC)", "3"]),
    ("A, C", ["C, A", r"\text{A and C}"], ["A", "A, B"]),
    ("9:24", ["9{:}24", "09:24"], ["9:42", "9.24"]),
    ("3:4", ["6:8", "3/4", "3 to 4"], ["4:3"]),
    (r"\text{Saturday}", ["saturday", r"\textit{Saturday}."], ["Sunday", "6"]),
    (r"\text{no solution}", [r"\text{There is no solution.}", r"\emptyset"], ["0", r"\text{one solution}"]),
    (r"\text{four}", ["4", "Four"], ["5"]),
    # Python's spelling, and what it prints when something went wrong
    (
        r"\frac{3}{4}",
        ["Rational(3, 4)", "Fraction(3, 4)", "np.float64(0.75)", "mpf('0.75')"],
        ["Rational(4, 3)"],
    ),
    ("72", ['["72"]', "72.0"], ["None", "nan", "inf", "NameError: name 'x' is not defined", "True"]),
]


@pytest.mark.parametrize(("gold", "right", "wrong"), RULES, ids=[gold for gold, _, _ in RULES])
def test_rule(grader: Grader, gold: str, right: list[str], wrong: list[str]) -> None:
    assert {answer: verdict(grader, gold, answer) for answer in right} == dict.fromkeys(right, "correct")
    assert {answer: verdict(grader, gold, answer) for answer in wrong} == dict.fromkeys(wrong, "wrong")


@pytest.mark.parametrize("kind", CASES)
def test_cases_of_every_kind(grader: Grader, kind: str) -> None:
    expected = {
        (case["gold"], answer if case.get("responses") else rf"\boxed{{{answer}}}"): verdict
        for case in CASES[kind]
        for verdict, answers in (("correct", case["right"]), ("wrong", case["wrong"]))
        for answer in answers
    }
    grades = grader.grade_many((response, gold) for gold, response in expected)
    found = dict(zip(expected, (grade.verdict for grade in grades), strict=True))
    assert {pair for pair in expected if found[pair] != expected[pair]} == set()


# Pairs that graders in use have called equal
@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("2516_8", "2516_7"),
        (r"12 \text{ gm}", r"12 \text{ kg}"),
        (r"7 \text{ days}", r"7 \text{ weeks}"),
        ("6", "2x=6"),
        (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}"),
        (r"\frac{1}{2004!}", r"\frac{1}{2005!}"),
        ("10^{-7}", r"2 \cdot 10^{-7}"),
        ("0.001", "0.0010000001"),
        ("5", "500"),
        ("10000", "10001"),
        ("123456789012345678", "123456789012345679"),
        ("1", "1,-2"),
        ("3i", "3i,-3i"),
        ("(a+5)(b+2)", "(a+5)(b-2)"),
        ("1", r"\frac{1023}{1024}"),
        (r"[46,\infty)", r"[46,\infty]9"),
        ("x >= 4", "x <= 4"),
        ("[-13,3)", "[-13,3]"),
        (r"\mbox{Saturday}", ""),
        (r"1 - \frac{1}{e}", r"1 + \frac{1}{e}"),
        ("3 = 4", "5 = 6"),
        (r"20 \text{ miles}", r"20\%"),
        ("y", "y'"),
        ("x_2 = 4", "x_3 = 4"),
        ("(1,234)", "1234"),
    ],
)
def test_false_positives_of_other_graders(grader: Grader, gold: str, answer: str) -> None:
    assert verdict(grader, gold, answer) == "wrong"


def test_a_response_without_a_box_is_wrong() -> None:
    assert grade("The answer is 5.", "5") == Grade("wrong", None, "no_answer")


def test_an_empty_gold_is_reported_not_graded() -> None:
    assert grade(r"\boxed{0}", "") == Grade("ungraded", "0", "empty_gold")


def test_numbers_name_their_rule_and_start_no_process() -> None:
    grader = Grader()
    assert grader.grade(r"\boxed{2,125}", "2125") == Grade("correct", "2,125", "number")
    assert grader.grade(r"\boxed{\frac{1}{3}}", "0.33").verdict == "wrong"
    assert grader._pool is None


def test_importing_and_grading_numbers_loads_neither_torch_nor_sympy() -> None:
    code = (
        "import sys; from mtpo.grader import grade; assert grade('boxed', '1').rule == 'no_answer';"
        "assert grade(chr(92) + 'boxed{1/2}', '0.5').verdict == 'correct';"
        "print(sorted({'torch', 'sympy', 'mpmath', 'math_verify', 'latex2sympy2_extended'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_options_that_are_on_are_named() -> None:
    assert GradingOptions().names == []
    assert GradingOptions(paper_tolerance=True, accept_joined=True).names == [
        "accept_joined",
        "paper_tolerance",
    ]


def test_joined_boxes_are_accepted_only_where_that_is_asked_for(grader: Grader) -> None:
    problem = Problem("p", "Roots?", "1", joined_answer="-2, 1")
    for options, verdicts in [
        (GradingOptions(), ["correct", "wrong", "wrong"]),
        (GradingOptions(accept_joined=True), ["correct", "correct", "wrong"]),
    ]:
        golds = options.golds(problem)
        grades = [grader.grade(rf"\boxed{{{answer}}}", golds) for answer in ("1", "1, -2", "1, 2")]
        assert [grade.verdict for grade in grades] == verdicts


def test_an_answer_is_wrong_only_if_every_gold_says_so(grader: Grader) -> None:
    assert grader.grade(r"\boxed{2}", ("1", "")) == Grade("ungraded", "2", "empty_gold")
    assert grader.grade(r"\boxed{2}", ("", "2")).verdict == "correct"


def test_the_last_sentence_counts_only_where_that_is_asked_for() -> None:
    response = "I add them up. The total is $1,250."
    assert Grader().grade(response, "1250").rule == "no_answer"
    assert Grader(options=GradingOptions(last_sentence=True)).grade(response, "1250") == Grade(
        "correct", "$1,250", "number"
    )


# what math_equal of the paper's grader says, worked out from its source by hand
@pytest.mark.parametrize(
    ("gold", "answer", "is_equal"),
    [
        ("10000", "10001", True),
        ("10000", "10002", False),
        ("5", "500", True),
        ("5", "0.05", True),
        ("5", "50", False),
        (r"\frac{3}{7}", "0.4286", True),
        (r"\frac{3}{7}", "0.43", False),
        (r"\frac{1}{2}", "50", False),
        (r"\frac{1997}{2}", "999", True),
        (r"2\sqrt{3}", "3.464", True),
        (r"2\sqrt{3}", "3.46", False),
        (r"\sqrt{2}x", r"1.4142x", False),
        ("(1, 0.3333)", r"(1, \frac{1}{3})", True),
    ],
)
def test_the_papers_tolerance(gold: str, answer: str, is_equal: bool) -> None:
    with Grader(workers=1, options=GradingOptions(paper_tolerance=True)) as tolerant:
        assert verdict(tolerant, gold, answer) == ("correct" if is_equal else "wrong")


def test_one_grader_serves_all_with_the_same_settings() -> None:
    assert shared_grader() is shared_grader(workers=2, options=GradingOptions())
    assert shared_grader() is not shared_grader(options=GradingOptions(last_sentence=True))


def shared_cases() -> list[dict]:
    path = SHARED / "grading_cases.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_shared_cases(grader: Grader) -> None:
    cases = shared_cases()
    grades = grader.grade_many([(case["response"], case["gold"]) for case in cases])
    wrong = [
        (case["id"], case["label"], grade.verdict, grade.rule)
        for case, grade in zip(cases, grades, strict=True)
        if grade.verdict != ("correct" if case["label"] else "wrong")
    ]
    assert len(wrong) <= 0.02 * len(cases), wrong
    assert sum(not label for _, label, _, _ in wrong) <= 3, wrong


def test_no_shared_bomb_costs_the_caller_much(grader: Grader) -> None:
    for case in shared_cases():
        if case["category"] == "dos":
            start = time.process_time()
            grader.grade(case["response"], case["gold"])
            assert time.process_time() - start < 5, case["id"]


def test_every_gold_of_gsm8k_is_found_in_its_own_solution(grader: Grader) -> None:
    folder = SHARED / "data" / "gsm8k"
    if not folder.exists():
        pytest.skip(f"{folder} is not on this machine")
    rows = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.open()]
    grades = grader.grade_many([(row["answer"], gold_from_gsm8k(row["answer"]) or "") for row in rows])
    assert len(grades) == 8792
    assert {grade.verdict for grade in grades} == {"correct"}


def test_every_gold_of_math_is_found_in_its_own_solution(grader: Grader) -> None:
    folder = SHARED / "data" / "math"
    if not folder.exists():
        pytest.skip(f"{folder} is not on this machine")
    rows = [json.loads(line) for split in ("train", "test") for line in (folder / f"{split}.jsonl").open()]
    solutions = [row["solution"] for row in rows]
    joined = grader.grade_many([(s, gold_from_solution(s, joined=True) or "") for s in solutions])
    assert len(joined) == 12_500
    assert sum(grade.verdict == "correct" for grade in joined) == 12_498
    assert [grade.rule for grade in joined if grade.verdict != "correct"] == ["empty_gold", "empty_gold"]
    # the last box alone cuts the answers of some solutions short, and then the whole answer is not equal to it
    last = grader.grade_many([(s, gold_from_solution(s) or "") for s in solutions])
    assert sum(grade.verdict == "correct" for grade in last) >= 12_480
