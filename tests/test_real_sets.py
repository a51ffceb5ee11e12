"""Sets of reals: pieces by hand, and random unions in many spellings."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtpo.answer_equality import compare
from mtpo.answer_text import normalise
from mtpo.real_sets import INFINITY, MINUS_INFINITY, Piece, parse_set


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("[1, 2)", [Piece("1", True, "2", False)]),
        ("x >= 1", [Piece("1", True, INFINITY, False)]),
        ("2 > x", [Piece(MINUS_INFINITY, False, "2", False)]),
        ("-1 < x <= 3", [Piece("-1", False, "3", True)]),
        ("3 >= x > -1", [Piece("-1", False, "3", True)]),
        ("[-oo, 3]", [Piece(MINUS_INFINITY, False, "3", True)]),
        ("Interval.Lopen(0, 1)", [Piece("0", False, "1", True)]),
        ("Interval(0, 1, True, False)", [Piece("0", False, "1", True)]),
        ("(0 < x) & (x < 5)", [Piece("0", False, "5", False)]),
        (r"\{x \mid x > 3\}", [Piece("3", False, INFINITY, False)]),
        (r"x \ne 2", [Piece(MINUS_INFINITY, False, "2", False), Piece("2", False, INFINITY, False)]),
        (r"\mathbb{R}", [Piece(MINUS_INFINITY, False, INFINITY, False)]),
    ],
)
def test_pieces(text: str, pieces: list[Piece]) -> None:
    assert parse_set(normalise(text)) == pieces


@pytest.mark.parametrize(
    "text", ["5", "x", "x^2 < 4", "x + y < 2", "1 < 2x < 3", "[1, 2, 3]", r"(t, 2t) \in \mathbb{R}", ""]
)
def test_what_is_no_solved_set(text: str) -> None:
    assert parse_set(normalise(text)) is None


unions = st.lists(st.integers(-50, 50), min_size=2, max_size=8, unique=True).filter(
    lambda ends: len(ends) % 2 == 0
)


@given(unions, st.randoms(use_true_random=False))
def test_a_union_in_any_order_and_spelling_is_equal(ends: list[int], rng: random.Random) -> None:
    ends.sort()
    pairs = list(zip(ends[::2], ends[1::2], strict=True))
    gold = normalise(r" \cup ".join(f"({low}, {high}]" for low, high in pairs))
    rng.shuffle(pairs)
    answer = normalise(" or ".join(f"{low} < x <= {high}" for low, high in pairs))
    assert compare(gold, answer).equal is True
    low, high = pairs[0]
    other = normalise(" or ".join([f"{low} < x <= {high + 1}", *(f"{a} < x <= {b}" for a, b in pairs[1:])]))
    assert compare(gold, other).equal is False


@given(st.lists(st.integers(-99, 99), min_size=2, max_size=8, unique=True), st.randoms(use_true_random=False))
def test_lists_have_no_order_and_tuples_have(values: list[int], rng: random.Random) -> None:
    shuffled = rng.sample(values, len(values))
    gold, answer = ", ".join(map(str, values)), ", ".join(map(str, shuffled))
    assert compare(normalise(gold), normalise(answer)).equal is True
    assert compare(normalise(f"({gold})"), normalise(f"({answer})")).equal is (values == shuffled)
    assert compare(normalise(gold), normalise(answer + ", 100")).equal is False
