r"""Whether two normalised answers are equal: a list of rules, the first that applies decides.

Values are compared, not forms: `26/36` is `13/18`, `x=5` is 5, `x > 8` is `(8, \infty)`. The form counts only
where the gold answer is one: a base-n numeral, a choice letter, a time, a word. Rules for tuples, sets,
matrices and intervals ask for the equality of their elements by the same list of rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from mtpo.answer_forms import (
    ALL_REALS,
    APPROXIMATELY,
    EMPTY_SETS,
    EQUALS,
    NO_SOLUTION,
    NUMBER_WORDS,
    RATIO,
    Items,
    chain,
    choice_letters,
    clock_time,
    is_name,
    items,
    labelled_choice,
    matrix,
    named_values,
    numeral,
    plain,
    without_modulus,
    words,
    written_out,
)
from mtpo.answer_text import split_top, squash
from mtpo.answer_units import Measured, measured, units_conflict
from mtpo.constants import equal_constants
from mtpo.exact_numbers import DECIMAL, Number, TooLargeError, parse_number
from mtpo.real_sets import Piece, looks_like_set, parse_set
from mtpo.symbolic_equality import UnreadableError, check_readable

GOLD_TOO_LARGE = "gold_too_large"
"""The rule of a decision that no algebra can make, for the gold is a number beyond what is computed."""
MAX_ITEMS = 64
MAX_DEPTH = 6

PAPER_DECIMALS, PAPER_CONSTANTS = Fraction(1, 10**4), Fraction(1, 10**3)
"""What arXiv 2409.02392's grader (after microsoft/ToRA, src/eval/grader.py@723a8f7) lets two decimals, and two
other constants, differ by, relatively to the larger."""

Symbolic = Callable[[str, str, float], bool | None]
"""Equality of two expressions or equations, constants up to a relative difference; None if one cannot be read."""


class Decision(NamedTuple):
    """What the rules found; `equal` is None where only the symbolic rule could tell."""

    equal: bool | None
    rule: str


def compare(
    gold: str, answer: str, symbolic: Symbolic | None = None, *, paper_tolerance: bool = False
) -> Decision:
    """Compare two normalised answers.

    Args:
        symbolic: the rule of last resort; without it, the decision on what reaches it is None.
        paper_tolerance: let numbers differ by `PAPER_DECIMALS` or `PAPER_CONSTANTS`, and decimals by a factor
            of 100 for percent.
    """
    return _Comparison(symbolic, paper_tolerance).decide(gold, answer)


class _Comparison:
    """The rules. Each returns a decision, or None where it does not apply."""

    def __init__(self, symbolic: Symbolic | None, paper_tolerance: bool) -> None:
        self._symbolic = symbolic
        self._paper_tolerance = paper_tolerance
        self._depth = 0

    def decide(self, gold: str, answer: str) -> Decision:
        gold, answer = gold.strip(), answer.strip()
        if squash(gold) == squash(answer):
            return Decision(True, "same_text")
        if not answer or self._depth > MAX_DEPTH:
            return Decision(False, "unreadable")
        self._depth += 1
        try:
            for rule in self._RULES:
                decision = rule(self, gold, answer)
                if decision is not None:
                    return decision
        finally:
            self._depth -= 1
        return self._expressions(gold, answer)

    def _numbers(self, gold: str, answer: str) -> Decision | None:
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
        if self._paper_tolerance and _near(gold_side, answer_side):
            return Decision(True, "paper_tolerance")
        if gold_side.is_percent and answer_side.is_percent:
            gold_values, answer_values = gold_values[:1], answer_values[:1]
        equal = any(g.equals(a) for g in gold_values for a in answer_values)
        return Decision(equal, "percent" if gold_side.is_percent or answer_side.is_percent else "number")

    def _named(self, gold: str, answer: str) -> Decision | None:
        """`D = (-1, 0]` and `N = 7602_8`, where the gold answer has no name."""
        if answer.count("=") != 1 or "=" in gold:
            return None
        sides = split_top(answer, EQUALS)
        value = self._solved_side(sides) if len(sides) == 2 and is_name(sides[0]) else None
        return self.decide(gold, value) if value else None

    def _several_for_one(self, gold: str, answer: str) -> Decision | None:
        """A bare list for a single value is right only if it spells that value in different ways: 1/2 or 0.5."""
        several = items(answer)
        if several is None or several.bracket or len(several.values) < 2:
            return None
        if len(set(map(squash, several.values))) < len(several.values):
            return None
        if (
            items(gold) is not None
            or matrix(gold)
            or words(gold)
            or looks_like_set(gold)
            or choice_letters(gold)
        ):
            return None
        if looks_like_set(answer):
            return None
        return self._in_order([gold] * len(several.values), several.values, "list")

    def _choices(self, gold: str, answer: str) -> Decision | None:
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

    def _numerals(self, gold: str, answer: str) -> Decision | None:
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

    def _times(self, gold: str, answer: str) -> Decision | None:
        """Times of day; one side may leave out which half of the day."""
        if (gold_time := clock_time(gold)) is None:
            return None
        answer_time = clock_time(answer, bare=True)
        if answer_time is None or gold_time[:3] != answer_time[:3]:
            return Decision(False, "time")
        return Decision(None in (gold_time.half, answer_time.half) or gold_time == answer_time, "time")

    def _ratios(self, gold: str, answer: str) -> Decision | None:
        """Ratios of whole numbers are quotients."""
        gold_ratio, answer_ratio = RATIO.fullmatch(plain(gold)), RATIO.fullmatch(plain(answer))
        if gold_ratio is None and answer_ratio is None:
            return None
        return self.decide(
            _quotient(gold_ratio) if gold_ratio else gold, _quotient(answer_ratio) if answer_ratio else answer
        )

    def _words(self, gold: str, answer: str) -> Decision | None:
        """Words, without case and articles; number words are numbers."""
        gold_words, answer_words = words(gold), words(answer)
        if squash(gold) in EMPTY_SETS or gold_words in NO_SOLUTION:
            return Decision(squash(answer) in EMPTY_SETS or answer_words in NO_SOLUTION, "words")
        if gold_words is None and answer_words is None:
            return None
        gold_value, answer_value = _value_of_words(gold_words), _value_of_words(answer_words)
        if gold_value or answer_value:
            return self.decide(gold_value or gold, answer_value or answer)
        if gold_words is None:
            return Decision(False, "words")
        return Decision(gold_words == (answer_words or words(rf"\text{{{plain(answer)}}}")), "words")

    def _matrices(self, gold: str, answer: str) -> Decision | None:
        """Matrices elementwise; a single column or row is also a tuple."""
        gold_rows, answer_rows = matrix(gold), matrix(answer)
        if gold_rows is None and answer_rows is None:
            return None
        if gold_rows is not None and answer_rows is not None:
            if [len(row) for row in gold_rows] != [len(row) for row in answer_rows]:
                return Decision(False, "matrix")
            return self._in_order(_flat(gold_rows), _flat(answer_rows), "matrix")
        if answer_rows is not None and len(answer_rows) == len(answer_rows[0]) == 1:
            return self.decide(gold, answer_rows[0][0])
        gold_vector, answer_vector = _vector(gold, gold_rows), _vector(answer, answer_rows)
        if gold_vector is None or answer_vector is None:
            return None if _is_equation(gold) or _is_equation(answer) else Decision(False, "matrix")
        return self._in_order(gold_vector, answer_vector, "vector")

    def _sets(self, gold: str, answer: str) -> Decision | None:
        """Intervals, unions and solved inequalities; other inequalities link by link."""
        is_closed_interval = gold[:1] == "[" and (several := items(gold)) and len(several.values) == 2
        if not (is_closed_interval or looks_like_set(gold) or looks_like_set(answer)):
            return None
        gold_set, answer_set = parse_set(gold), parse_set(answer)
        if gold_set is not None and answer_set is not None:
            return self._in_any_order(gold_set, answer_set, "interval", self._pieces)
        gold_chain, answer_chain = chain(gold), chain(answer)
        if gold_chain is None or answer_chain is None:
            return None if gold_set is None and gold_chain is None else Decision(False, "interval")
        if gold_chain.relations != answer_chain.relations:
            return Decision(False, "inequality")
        same = map(self._same_link, gold_chain.operands, answer_chain.operands)
        return Decision(all(same), "inequality")

    def _pieces(self, gold: Piece, answer: Piece) -> Decision:
        if (gold.low_closed, gold.high_closed) != (answer.low_closed, answer.high_closed):
            return Decision(False, "interval")
        return self._in_order([gold.low, gold.high], [answer.low, answer.high], "interval")

    def _same_link(self, gold: str, answer: str) -> bool:
        return squash(gold) == squash(answer) or self._numbers(gold, answer) == Decision(True, "number")

    def _sequences(self, gold: str, answer: str) -> Decision | None:
        """Tuples in order; lists and sets in any order."""
        gold_items, answer_items = items(gold), items(answer)
        if gold_items is None and answer_items is None:
            return None
        if gold_items is None or answer_items is None:
            if gold_items is None and answer_items and len(answer_items.values) == 1:
                return self.decide(gold, answer_items.values[0])
            if gold_items and len(gold_items.values) == 1:
                return self.decide(gold_items.values[0], answer)
            if _is_equation(answer if answer_items is None else gold):
                return None
            return Decision(False, "count")
        gold_named, answer_named = named_values(gold_items.values), named_values(answer_items.values)
        if gold_named and answer_named and gold_named.keys() != answer_named.keys():
            return Decision(False, "tuple")
        if gold_items.bracket in ("(", "[") or gold_named or answer_named:
            if not (answer_named or _order_is_known(gold_items, answer_items)):
                return Decision(False, "tuple")
            return self._in_order(_members(gold_items), _members(answer_items), "tuple")
        gold_values, answer_values = written_out(gold_items.values), written_out(answer_items.values)
        if answer_items.bracket == "(":
            if gold_items.bracket == "{":
                return Decision(False, "list")
            return self._in_order(gold_values, answer_values, "list")
        return self._in_any_order(gold_values, answer_values, "list", self.decide)

    def _approximations(self, gold: str, answer: str) -> Decision | None:
        r"""Of `2\sqrt{3} \approx 3.46`, the exact side; of `AB \approx 3.46`, what there is; of a gold, either."""
        gold_parts, parts = split_top(gold, APPROXIMATELY), split_top(answer, APPROXIMATELY)
        if len(gold_parts) == len(parts) == 1:
            return None
        answer = parts[1] if len(parts) > 1 and is_name(parts[0]) else parts[0]
        decisions = [self.decide(part, answer) for part in gold_parts]
        return next((decision for decision in decisions if decision.equal), decisions[0])

    def _equations(self, gold: str, answer: str) -> Decision | None:
        """Solved equations by their value; others up to a factor and rearrangement."""
        gold_modulus, gold_sides = without_modulus(split_top(gold, EQUALS))
        answer_modulus, answer_sides = without_modulus(split_top(answer, EQUALS))
        if len(gold_sides) == 1 and len(answer_sides) == 1 and not answer_modulus:
            return None
        if gold_modulus and answer_modulus and squash(gold_modulus) != squash(answer_modulus):
            return Decision(False, "congruence")
        gold_value, answer_value = self._solved_side(gold_sides), self._solved_side(answer_sides)
        if len(gold_sides) > 1 and len(answer_sides) > 1:
            if gold_value and answer_value and _same_name(gold_sides[0], answer_sides[0]):
                return self._by_value(gold_value, answer_value, answer_sides)
            if len(gold_sides) == len(answer_sides) == 2:
                return self._expressions("=".join(gold_sides), "=".join(answer_sides))
            return Decision(False, "equation")
        if gold_value is None or answer_value is None:
            return Decision(False, "equation")
        return self._by_value(gold_value, answer_value, answer_sides)

    def _by_value(self, gold: str, answer: str, sides: Sequence[str]) -> Decision:
        """Compare the values of solved equations; a chain such as `x = 2 + 3 = 5` must agree with itself."""
        agreements = [self.decide(answer, side).equal for side in sides[1:-1]]
        decision = self.decide(gold, answer)
        if decision.equal is False or all(agreements):
            return decision
        return Decision(False if False in agreements else None, "equation")

    def _solved_side(self, sides: Sequence[str]) -> str | None:
        """The value of `x = 5`, `5 = x`, `AB = 2 + 3 = 5` or `8! = 40320`; None if nothing is solved for."""
        if len(sides) == 1 or (len(sides) == 2 and is_name(sides[1]) and not is_name(sides[0])):
            return sides[0]
        if is_name(sides[0]):
            own_name = rf"(?<![A-Za-z\\]){sides[0]}(?![A-Za-z])"
            is_solved = not (sides[0].isalpha() and re.search(own_name, sides[-1]))
            return sides[-1] if is_solved else None
        same = [self._numbers(sides[0], side) for side in sides[1:]]
        return sides[0] if all(decision and decision.equal for decision in same) else None

    def _quantities(self, gold: str, answer: str) -> Decision | None:
        r"""Take units off what is no plain number, such as `2\sqrt{3} \text{ cm}`."""
        gold_side = measured(gold)
        answer_side = measured(answer, gold_side.unit)
        if (gold_side.value, answer_side.value) == (gold, answer):
            return None
        if units_conflict(gold_side, answer_side) or gold_side.scale != answer_side.scale:
            return Decision(False, "unit")
        return self.decide(gold_side.value, answer_side.value)

    def _expressions(self, gold: str, answer: str) -> Decision:
        """What no rule could decide is algebra, or cannot be read and is not the same text."""
        try:
            check_readable(gold)
            check_readable(answer)
        except UnreadableError:
            return Decision(False, "unreadable")
        within = float(PAPER_CONSTANTS) if self._paper_tolerance else 0.0
        if (equal := equal_constants(gold, answer, within)) is not None:
            return Decision(equal, "constant")
        if self._symbolic is None:
            return Decision(None, "symbolic")
        equal = self._symbolic(gold, answer, within)
        return Decision(False, "unreadable") if equal is None else Decision(equal, "symbolic")

    def _in_order(self, gold: list[str], answer: list[str], rule: str) -> Decision:
        if len(gold) != len(answer) or len(gold) > MAX_ITEMS:
            return Decision(False, rule)
        results = {self.decide(g, a).equal for g, a in zip(gold, answer, strict=True)}
        return Decision(False if False in results else None if None in results else True, rule)

    def _in_any_order(
        self, gold: Sequence[Any], answer: Sequence[Any], rule: str, decide: Callable[[Any, Any], Decision]
    ) -> Decision:
        """Each gold value has its own equal in the answer, and no value of the answer is left."""
        if len(gold) != len(answer) or len(gold) > MAX_ITEMS:
            return Decision(False, rule)
        left, undecided = list(answer), False
        for value in gold:
            results = [decide(value, candidate).equal for candidate in left]
            if True in results:
                left.pop(results.index(True))
            elif None in results:
                undecided = True
            else:
                return Decision(False, rule)
        return Decision(None if undecided else True, rule)

    _RULES = (
        _times,
        _numbers,
        _named,
        _several_for_one,
        _choices,
        _numerals,
        _ratios,
        _words,
        _matrices,
        _sets,
        _sequences,
        _approximations,
        _equations,
        _quantities,
    )


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


def _flat(rows: list[list[str]]) -> list[str]:
    return [cell for row in rows for cell in row]


def _vector(text: str, rows: list[list[str]] | None) -> list[str] | None:
    """The entries of a matrix of one row or one column, or of a tuple."""
    if rows is not None:
        return _flat(rows) if len(rows) == 1 or len(rows[0]) == 1 else None
    several = items(text)
    if several is None or several.bracket == "{":
        return None
    return _members(several)


def _members(several: Items) -> list[str]:
    """The values of a tuple, in the order of their names if they have any."""
    named = named_values(several.values)
    return list(named.values()) if named else several.values


def _is_equation(text: str) -> bool:
    return len(split_top(text, EQUALS)) > 1


def _same_name(gold: str, answer: str) -> bool:
    """The same name, or two names for the value of a function."""
    return squash(gold) == squash(answer) or all(
        name == "y" or name.endswith("(x)") for name in (gold, answer)
    )


def _order_is_known(gold: Items, answer: Items) -> bool:
    """Whether an answer without names may stand for an ordered gold: (2, 3) could be an interval, [2, 3] too."""
    if answer.bracket == gold.bracket or gold.bracket == "":
        return True
    if answer.bracket == "{":
        return False
    if len(gold.values) != 2:
        return True
    try:
        low, high = (parse_number(value) for value in gold.values)
    except TooLargeError:
        return False
    return low is not None and high is not None and low.value >= high.value
