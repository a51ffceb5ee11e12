"""Constants are compared by value: identities known by hand, and random ones."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtpo.answer_text import normalise
from mtpo.constant_equality import equal_constants

small = st.integers(-50, 50)


def equal(gold: str, answer: str, within: float = 0.0) -> bool | None:
    return equal_constants(normalise(gold), normalise(answer), within)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (r"3\sqrt{13}", r"\sqrt{117}"),
        (r"3 + 2\sqrt{2}", r"(1+\sqrt{2})^2"),
        (r"\sqrt{24\sqrt{2} + 41}", r"3 + 4\sqrt{2}"),
        (r"\frac{1}{\sqrt{2}}", "2^{-1/2}"),
        (r"25\pi", r"\frac{50\pi}{2}"),
        (r"\frac{2}{3}\sqrt{2}", r"\frac{2\sqrt{2}}{3}"),
        (r"5\frac{\sqrt{3}}{2}", r"\frac{5\sqrt{3}}{2}"),
        (r"2\frac{1}{3}\pi", r"\frac{7\pi}{3}"),
        ("e^{i \\pi}", "-1 + 0i"),
        (r"(1 + i)^2", "2i"),
        (r"\sqrt{-4}", "2i"),
        (r"\binom{5}{2}\pi", r"10\pi"),
        (r"3!\sqrt{2}", r"\sqrt{72}"),
        (r"1 + \sqrt[3]{2}", "2^{1/3} + 1"),
    ],
)
def test_equal_by_value(gold: str, answer: str) -> None:
    assert equal(gold, answer) is True
    assert equal(rf"{gold} + \frac{{1}}{{10^{{30}}}}", answer) is False


def test_a_float_printed_in_full_is_the_constant_that_it_was_computed_from() -> None:
    assert equal(r"\pi", "3.141592653589793") is True
    assert equal(r"\pi", "3.141592653") is False


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (r"\sqrt{2}", "1.4142"),
        (r"\frac{355}{113}", r"\pi"),
        ("2i", "-2i"),
        (r"\pi", "3.14159265"),
        ("e", "i"),
    ],
)
def test_unequal_by_value(gold: str, answer: str) -> None:
    assert equal(gold, answer) is False


@pytest.mark.parametrize(
    "text",
    [
        "x",
        r"\sin 1",
        "2x",
        r"\pi r",
        "1/2\\pi",
        r"\sqrt[3]{-8}",
        r"0^0\pi",
        r"\pi/0",
        "ie",
        "",
        r"\pi!",
        "1,2",
    ],
)
def test_what_is_no_constant_is_left_to_others(text: str) -> None:
    assert equal_constants(normalise(text), "2") is None
    assert equal_constants("2", normalise(text)) is None


@given(small, small, small, small, st.sampled_from([2, 3, 5, 7, 11]))
def test_products_of_surds_multiplied_out(a: int, b: int, c: int, d: int, root: int) -> None:
    product = rf"({a} + {b}\sqrt{{{root}}})({c} + {d}\sqrt{{{root}}})"
    whole, surd = a * c + b * d * root, a * d + b * c
    assert equal(product, rf"{whole} + {surd}\sqrt{{{root}}}") is True
    assert equal(product, rf"{whole} + {surd + 1}\sqrt{{{root}}}") is False


def test_a_relative_difference_can_be_let_pass() -> None:
    assert equal(r"2\sqrt{3}", "3.464", within=1e-3) is True
    assert equal(r"2\sqrt{3}", "3.46", within=1e-3) is False


@pytest.mark.parametrize(
    "text",
    [
        "e^{" * 20 + "e" + "}" * 20,
        r"\pi^{9^{9^{9}}}",
        "(1+i)^{99999^{99}}",
        r"(\pi^{9999})^{9999}" * 20,
        r"\sqrt{" * 39 + r"\pi" + "}" * 39,
        r"e^{i 10^{4000}}",
        "+".join([r"\pi^{3000}"] * 70),
    ],
)
def test_a_huge_constant_costs_little(text: str) -> None:
    start = time.process_time()
    assert equal(text, r"\pi") is not True
    assert time.process_time() - start < 10
