"""Rules for answers of several values: matrices, sets of reals, tuples, lists and sets."""

from __future__ import annotations

from functools import partial

from mtpo.answer_comparison import Comparison, Decision
from mtpo.answer_forms import (
    Items,
    chain,
    choice_letters,
    is_equation,
    items,
    matrix,
    named_values,
    words,
    written_out,
)
from mtpo.answer_text import squash
from mtpo.exact_numbers import TooLargeError, parse_number
from mtpo.real_sets import Piece, looks_like_set, parse_set
from mtpo.value_rules import numbers


def several_for_one(comparison: Comparison, gold: str, answer: str) -> Decision | None:
    """A bare list for a single value is right only if it spells that value in different ways: 1/2 or 0.5."""
    several = items(answer)
    if several is None or several.bracket or len(several.values) < 2:
        return None
    if len(set(map(squash, several.values))) < len(several.values):
        return None
    if items(gold) is not None or matrix(gold) or words(gold) or looks_like_set(gold) or choice_letters(gold):
        return None
    if looks_like_set(answer):
        return None
    return comparison.in_order([gold] * len(several.values), several.values, "list")


def matrices(comparison: Comparison, gold: str, answer: str) -> Decision | None:
    """Matrices elementwise; a single column or row is also a tuple."""
    gold_rows, answer_rows = matrix(gold), matrix(answer)
    if gold_rows is None and answer_rows is None:
        return None
    if gold_rows is not None and answer_rows is not None:
        if [len(row) for row in gold_rows] != [len(row) for row in answer_rows]:
            return Decision(False, "matrix")
        return comparison.in_order(_flat(gold_rows), _flat(answer_rows), "matrix")
    if answer_rows is not None and len(answer_rows) == len(answer_rows[0]) == 1:
        return comparison.decide(gold, answer_rows[0][0])
    gold_vector, answer_vector = _vector(gold, gold_rows), _vector(answer, answer_rows)
    if gold_vector is None or answer_vector is None:
        return None if is_equation(gold) or is_equation(answer) else Decision(False, "matrix")
    return comparison.in_order(gold_vector, answer_vector, "vector")


def sets(comparison: Comparison, gold: str, answer: str) -> Decision | None:
    """Intervals, unions and solved inequalities; other inequalities link by link."""
    is_closed_interval = gold[:1] == "[" and (several := items(gold)) and len(several.values) == 2
    if not (is_closed_interval or looks_like_set(gold) or looks_like_set(answer)):
        return None
    gold_set, answer_set = parse_set(gold), parse_set(answer)
    if gold_set is not None and answer_set is not None:
        return comparison.in_any_order(gold_set, answer_set, "interval", partial(_pieces, comparison))
    gold_chain, answer_chain = chain(gold), chain(answer)
    if gold_chain is None or answer_chain is None:
        return None if gold_set is None and gold_chain is None else Decision(False, "interval")
    if gold_chain.relations != answer_chain.relations:
        return Decision(False, "inequality")
    same = map(partial(_same_link, comparison), gold_chain.operands, answer_chain.operands)
    return Decision(all(same), "inequality")


def _pieces(comparison: Comparison, gold: Piece, answer: Piece) -> Decision:
    if (gold.low_closed, gold.high_closed) != (answer.low_closed, answer.high_closed):
        return Decision(False, "interval")
    return comparison.in_order([gold.low, gold.high], [answer.low, answer.high], "interval")


def _same_link(comparison: Comparison, gold: str, answer: str) -> bool:
    return squash(gold) == squash(answer) or numbers(comparison, gold, answer) == Decision(True, "number")


def sequences(comparison: Comparison, gold: str, answer: str) -> Decision | None:
    """Tuples in order; lists and sets in any order."""
    gold_items, answer_items = items(gold), items(answer)
    if gold_items is None and answer_items is None:
        return None
    if gold_items is None or answer_items is None:
        if gold_items is None and answer_items and len(answer_items.values) == 1:
            return comparison.decide(gold, answer_items.values[0])
        if gold_items and len(gold_items.values) == 1:
            return comparison.decide(gold_items.values[0], answer)
        if is_equation(answer if answer_items is None else gold):
            return None
        return Decision(False, "count")
    gold_named, answer_named = named_values(gold_items.values), named_values(answer_items.values)
    if gold_named and answer_named and gold_named.keys() != answer_named.keys():
        return Decision(False, "tuple")
    if gold_items.bracket in ("(", "[") or gold_named or answer_named:
        if not (answer_named or _order_is_known(gold_items, answer_items)):
            return Decision(False, "tuple")
        return comparison.in_order(_members(gold_items), _members(answer_items), "tuple")
    gold_values, answer_values = written_out(gold_items.values), written_out(answer_items.values)
    if answer_items.bracket == "(":
        if gold_items.bracket == "{":
            return Decision(False, "list")
        return comparison.in_order(gold_values, answer_values, "list")
    return comparison.in_any_order(gold_values, answer_values, "list", comparison.decide)


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
