"""Rules for answers that are one value: numbers, quantities, numerals, times, choices, words."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from mtpo.answer_comparison import PAPER_CONSTANTS, PAPER_DECIMALS, Comparison, Decision
from mtpo.answer_forms import (
    ALL_REALS,
    EMPTY_SETS,
    NO_SOLUTION,
    NUMBER_WORDS,
    RATIO,
    choice_letters,
    clock_time,
    labelled_choice,
    numeral,
    plain,
    words,
)
from mtpo.answer_text import squash
from mtpo.answer_units import Measured, measured, units_conflict
from mtpo.exact_numbers import DECIMAL, Number, TooLargeError, parse_number

GOLD_TOO_LARGE = "gold_too_large"
"""The rule of a decision that no algebra can make, for the gold is a number beyond what is computed."""


def times(comparison: Comparison, gold: str, answer: str) -> Decision | None:
    """Times of day; one side may leave out which half of the day."""
    if (gold_time := clock_time(gold)) is None:
        return None
    answer_time = clock_time(answer, bare=True)
    if answer_time is None or gold_time[:3] != answer_time[:3]:
        return Decision(False, "time")
    return Decision(None in (gold_time.half, answer_time.half) or gold_time == answer_time, "time")


def numbers(comparison: Comparison, gold: str, answer: str) -> Decision | None:
    """Exact arithmetic; final when both sides are numbers."""
    gold_side = measured(gold)
    answer_side = measured(answer, gold_side.unit)
    try:
        gold_values = _values(gold_side)
    except TooLargeError:
        return Decision(None, GOLD_TOO_LARGE)
    if not gold_values:
        return None
    try:
        answer_values = _values(answer_side)
    except TooLargeError:
        return Decision(False, "number_too_large")
    if not answer_values:
        return None
    if units_conflict(gold_side, answer_side):
        return Decision(False, "unit")
    if comparison.paper_tolerance and _near(gold_side, answer_side):
        return Decision(True, "paper_tolerance")
    if gold_side.is_percent and answer_side.is_percent:
        gold_values, answer_values = gold_values[:1], answer_values[:1]
    equal = any(g.equals(a) for g in gold_values for a in answer_values)
    return Decision(equal, "percent" if gold_side.is_percent or answer_side.is_percent else "number")


def choices(comparison: Comparison, gold: str, answer: str) -> Decision | None:
    """Choice letters, one or several; several in any order."""
    gold_letters, answer_letters = choice_letters(gold), choice_letters(answer)
    if gold_letters is None:
        if (label := labelled_choice(gold)) is None or answer_letters is None:
            return None
        gold_letters = [label]
    if answer_letters is None and len(gold_letters) == 1 and (label := labelled_choice(answer)):
        answer_letters = [label]
    if answer_letters is None and len(gold_letters) == 1 and squash(gold).isalpha() and "\\" not in gold:
        return None  # one bare letter may be a variable as well
    return Decision(gold_letters == answer_letters, "choice")


def numerals(comparison: Comparison, gold: str, answer: str) -> Decision | None:
    """A base-n numeral: the digits count; the subscript may be missing, never different."""
    gold_numeral, answer_numeral = numeral(gold), numeral(answer) or numeral(answer.upper())
    if gold_numeral is None:
        if answer_numeral is None or not parse_number(gold):
            return None
        return Decision(answer_numeral == (gold, "10"), "base")
    if answer_numeral is None:
        digits = plain(answer).upper().replace(",", "").lstrip("0")
        return Decision(digits == gold_numeral.digits, "base")
    return Decision(answer_numeral == gold_numeral, "base")


def ratios(comparison: Comparison, gold: str, answer: str) -> Decision | None:
    """Ratios of whole numbers are quotients."""
    gold_ratio, answer_ratio = RATIO.fullmatch(plain(gold)), RATIO.fullmatch(plain(answer))
    if gold_ratio is None and answer_ratio is None:
        return None
    return comparison.decide(
        _quotient(gold_ratio) if gold_ratio else gold, _quotient(answer_ratio) if answer_ratio else answer
    )


def same_words(comparison: Comparison, gold: str, answer: str) -> Decision | None:
    """Words, without case and articles; number words are numbers."""
    gold_words, answer_words = words(gold), words(answer)
    if squash(gold) in EMPTY_SETS or gold_words in NO_SOLUTION:
        return Decision(squash(answer) in EMPTY_SETS or answer_words in NO_SOLUTION, "words")
    if gold_words is None and answer_words is None:
        return None
    gold_value, answer_value = _value_of_words(gold_words), _value_of_words(answer_words)
    if gold_value or answer_value:
        return comparison.decide(gold_value or gold, answer_value or answer)
    if gold_words is None:
        return Decision(False, "words")
    return Decision(gold_words == (answer_words or words(rf"\text{{{plain(answer)}}}")), "words")


def quantities(comparison: Comparison, gold: str, answer: str) -> Decision | None:
    r"""Take units off what is no plain number, such as `2\sqrt{3} \text{ cm}`."""
    gold_side = measured(gold)
    answer_side = measured(answer, gold_side.unit)
    if (gold_side.value, answer_side.value) == (gold, answer):
        return None
    if units_conflict(gold_side, answer_side) or gold_side.scale != answer_side.scale:
        return Decision(False, "unit")
    return comparison.decide(gold_side.value, answer_side.value)


def _values(side: Measured) -> list[Number]:
    """The numbers that a measured value may stand for: p% is p, and p/100."""
    number = parse_number(side.value)
    if number is None:
        return []
    number = number.scaled(side.scale)
    return [number, number.scaled(Fraction(1, 100))] if side.is_percent else [number]


def _near(gold: Measured, answer: Measured) -> bool:
    """Equal with the paper's tolerance; both sides are numbers."""
    first, second = _values(gold)[0].value, _values(answer)[0].value
    if DECIMAL.fullmatch(gold.value) and DECIMAL.fullmatch(answer.value):
        wanted, tolerance = [first / 100, first, first * 100], PAPER_DECIMALS
    else:
        wanted, tolerance = [first], PAPER_CONSTANTS
    return any(abs(value - second) <= tolerance * max(abs(value), abs(second)) for value in wanted)


def _quotient(ratio: Any) -> str:
    return rf"\frac{{{ratio.group(1)}}}{{{ratio.group(2)}}}"


def _value_of_words(text: str | None) -> str | None:
    """What words say as mathematics, if they do."""
    if text in ALL_REALS:
        return r"\mathbb{R}"
    return str(NUMBER_WORDS[text]) if text in NUMBER_WORDS else None
