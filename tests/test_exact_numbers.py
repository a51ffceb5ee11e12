"""Exact arithmetic on text: random fractions in many spellings, and values known by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mtpo.answer_text import normalise
from mtpo.exact_numbers import TooLargeError, parse_number

fractions = st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=10**4)


def value(text: str) -> Fraction | None:
    number = parse_number(normalise(text))
    return number and number.value


def spellings(x: Fraction) -> list[str]:
    n, d = x.numerator, x.denominator
    sign, whole, rest = "-" if n < 0 else "", abs(n) // d, abs(n) % d
    texts = [
        f"{n}/{d}",
        rf"\frac{{{n}}}{{{d}}}",
        rf"\dfrac{{{n}}}{{{d}}}",
        rf"{sign}\tfrac {{{abs(n)}}} {{{d}}}",
        rf"$-\frac{{{-n}}}{{{d}}}$",
        f"Rational({n}, {d})",
        f"Fraction({n}, {d})",
        f"({n})/({d})",
        rf"{n} \cdot {d}^{{-1}}",
        rf"\frac{{{3 * n}}}{{{3 * d}}}",
        rf"{n} \div {d}",
        f"{n}*{d}**-1",
        rf"\left( {n} \right) / {d} .",
        rf"\frac{{{n + d}}}{{{d}}} - 1",
    ]
    if rest:
        texts += [rf"{sign}{whole}\frac{{{rest}}}{{{d}}}", f"{sign}{whole} {rest}/{d}"]
    if d == 1:
        texts += [f"{n:,}", f"{n}.0", f"np.float64({n}.0)", f"{n:,}".replace(",", ",\\!"), f"{n}e0"]
    return texts


@given(fractions)
def test_all_spellings_of_a_fraction_have_its_value(x: Fraction) -> None:
    assert {text: value(text) for text in spellings(x)} == dict.fromkeys(spellings(x), x)


@given(fractions, st.integers(1, 9), st.integers(1, 40))
def test_a_small_difference_is_a_difference(x: Fraction, numerator: int, power: int) -> None:
    other = x + Fraction(numerator, 10**power)
    for text in (
        rf"\frac{{{other.numerator}}}{{{other.denominator}}}",
        f"{other.numerator}/{other.denominator}",
    ):
        number, exact = parse_number(normalise(text)), parse_number(str(x))
        assert number is not None
        assert exact is not None
        assert not exact.equals(number)


@given(st.floats(min_value=-1e9, max_value=1e9))
def test_a_float_printed_in_full_equals_its_neighbours(x: float) -> None:
    assume(len(repr(x).replace("-", "").replace(".", "").split("e")[0].lstrip("0")) >= 13)
    number, neighbour = parse_number(repr(x)), parse_number(repr(math.nextafter(x, math.inf)))
    assert number is not None
    assert neighbour is not None
    assert number.equals(neighbour)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.\\overline{27}", Fraction(3, 11)),
        ("1.2\\overline{3}", Fraction(37, 30)),
        ("6.02 \\times 10^{23}", Fraction(602 * 10**21)),
        ("6.02e-3", Fraction(602, 10**5)),
        ("-2^2", Fraction(-4)),
        ("(-2)^2", Fraction(4)),
        ("2^{3^{2}}", Fraction(512)),
        ("5!", Fraction(120)),
        (r"\binom{52}{5}", Fraction(2598960)),
        ("8^{2/3}", Fraction(4)),
        (r"\sqrt{\frac{9}{4}}", Fraction(3, 2)),
        (r"\sqrt[3]{27}", Fraction(3)),
        (r"\frac{4}{\frac{2}{3}}", Fraction(6)),
        ("2(3+4)", Fraction(14)),
        ("½", Fraction(1, 2)),
        ("11\\,880", Fraction(11880)),
        ("12 000", Fraction(12000)),
        ("8/4/2", Fraction(1)),
        ("1,000,000", Fraction(10**6)),
    ],
)
def test_value(text: str, expected: Fraction) -> None:
    assert value(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "2x",
        "1/0",
        "0^0",
        r"\sqrt{2}",
        "1/2(3)",
        "2 3",
        "1,00",
        "(1,234)",
        "3!!",
        "1+",
        ")(",
        "4_5",
        "2^3^2",
    ],
)
def test_what_is_no_rational_number_has_no_value(text: str) -> None:
    assert value(text) is None


@pytest.mark.parametrize(
    "text", ["9^{9^{9}}", "3001!", "1e99999", "2^{60001}", "+".join(["1"] * 300), "(" * 50 + "1"]
)
def test_what_is_too_large_is_refused_at_once(text: str) -> None:
    with pytest.raises(TooLargeError):
        parse_number(normalise(text))
