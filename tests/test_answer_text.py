"""One spelling for many, and never another value."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mtpo.answer_text import MAX_CHARS, normalise, squash

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        (r"\dfrac12", r"\frac{1}{2}"),
        (r"\frac\pi 2", r"\frac{\pi}{2}"),
        (r"{3 \over 4}", r"\frac{3 }{ 4}"),
        (r"\sqrt5", r"\sqrt{5}"),
        ("√5", r"\sqrt{5}"),
        ("2**(1/3)", "2^{1/3}"),
        ("x**2 + 3*x", r"x^{2} + 3\cdot x"),
        ("x²", "x^{2}"),
        ("2½", r"2\frac{1}{2}"),
        ("Rational(3, 4)", r"\frac{3}{4}"),
        ("32{,}348", "32348"),
        (r"32,\!348", "32348"),
        (r"32\,348", "32348"),
        ("32,348", "32,348"),
        (r"\left( 1, 2 \right)", "( 1, 2 )"),
        (r"\mbox{ cm}", r"\text{cm}"),
        (r"5 \text{ or } 7", r"5 \lor 7"),
        ("0.272727...", r"0.\overline{27}"),
        ("6.02e23", r"6.02\cdot 10^{23}"),
        (r"\cos 60^\circ", r"\cos (60 \cdot \pi/180)"),
        (r"60^\circ", "60"),
        ("[[1 0]\n [0 1]]", "[[1, 0], [0, 1]]"),
        ("**5**", "5"),
        ("$5$.", "5"),
        (r"\sqrt{5}}", r"\sqrt{5}"),
        (r"\boxed{5}", "5"),
        ("5." + "0" * 100_000, "5"),
        ("", ""),
    ],
)
def test_normal_spelling(answer: str, normal: str) -> None:
    assert normalise(answer) == normal


def test_rows_of_a_matrix_are_not_taken_for_spaces() -> None:
    assert normalise(r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}").count(r"\newrow") == 1
    assert (
        normalise(r"\begin{pmatrix}1\\\frac12\end{pmatrix}")
        == r"\begin{pmatrix}1 \newrow \frac{1}{2}\end{pmatrix}"
    )


def test_what_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match=f"up to {MAX_CHARS}"):
        normalise("1+" * MAX_CHARS)
    with pytest.raises(ValueError, match="nested more than 50 deep"):
        normalise("[" * 51 + "1" + "]" * 51)


def test_squash_keeps_two_numbers_apart() -> None:
    assert squash("1 2") != squash("12")
    assert squash("1 + 2") == squash("1+2")


def test_normalising_twice_changes_nothing_more() -> None:
    folder = SHARED / "data" / "math"
    if not folder.exists():
        pytest.skip(f"{folder} is not on this machine")
    lines = [line for path in sorted(folder.glob("*_meta.jsonl")) for line in path.open()]
    golds = {json.loads(line)["answer"] for line in lines}
    changed = [gold for gold in golds if normalise(normalise(gold)) != normalise(gold)]
    assert changed == []
