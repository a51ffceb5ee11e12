"""Rules for equations: solved ones by their value, others up to a factor and rearrangement."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mtpo.answer_comparison import Comparison, Decision
from mtpo.answer_forms import APPROXIMATELY, EQUALS, is_name, without_modulus
from mtpo.answer_text import split_top, squash
from mtpo.value_rules import numbers


def named(comparison: Comparison, gold: str, answer: str) -> Decision | None:
    """`D = (-1, 0]` and `N = 7602_8`, where the gold answer has no name."""
    if answer.count("=") != 1 or "=" in gold:
        return None
    sides = split_top(answer, EQUALS)
    value = _solved_side(comparison, sides) if len(sides) == 2 and is_name(sides[0]) else None
    return comparison.decide(gold, value) if value else None


def approximations(comparison: Comparison, gold: str, answer: str) -> Decision | None:
    r"""Of `2\sqrt{3} \approx 3.46`, the exact side; of `AB \approx 3.46`, what there is; of a gold, either."""
    gold_parts, parts = split_top(gold, APPROXIMATELY), split_top(answer, APPROXIMATELY)
    if len(gold_parts) == len(parts) == 1:
        return None
    answer = parts[1] if len(parts) > 1 and is_name(parts[0]) else parts[0]
    decisions = [comparison.decide(part, answer) for part in gold_parts]
    return next((decision for decision in decisions if decision.equal), decisions[0])


def equations(comparison: Comparison, gold: str, answer: str) -> Decision | None:
    """Solved equations by their value; others up to a factor and rearrangement."""
    gold_modulus, gold_sides = without_modulus(split_top(gold, EQUALS))
    answer_modulus, answer_sides = without_modulus(split_top(answer, EQUALS))
    if len(gold_sides) == 1 and len(answer_sides) == 1 and not answer_modulus:
        return None
    if gold_modulus and answer_modulus and squash(gold_modulus) != squash(answer_modulus):
        return Decision(False, "congruence")
    gold_value, answer_value = _solved_side(comparison, gold_sides), _solved_side(comparison, answer_sides)
    if len(gold_sides) > 1 and len(answer_sides) > 1:
        if gold_value and answer_value and _same_name(gold_sides[0], answer_sides[0]):
            return _by_value(comparison, gold_value, answer_value, answer_sides)
        if len(gold_sides) == len(answer_sides) == 2:
            return comparison.expressions("=".join(gold_sides), "=".join(answer_sides))
        return Decision(False, "equation")
    if gold_value is None or answer_value is None:
        return Decision(False, "equation")
    return _by_value(comparison, gold_value, answer_value, answer_sides)


def _by_value(comparison: Comparison, gold: str, answer: str, sides: Sequence[str]) -> Decision:
    """Compare the values of solved equations; a chain such as `x = 2 + 3 = 5` must agree with itself."""
    agreements = [comparison.decide(answer, side).equal for side in sides[1:-1]]
    decision = comparison.decide(gold, answer)
    if decision.equal is False or all(agreements):
        return decision
    return Decision(False if False in agreements else None, "equation")


def _solved_side(comparison: Comparison, sides: Sequence[str]) -> str | None:
    """The value of `x = 5`, `5 = x`, `AB = 2 + 3 = 5` or `8! = 40320`; None if nothing is solved for."""
    if len(sides) == 1 or (len(sides) == 2 and is_name(sides[1]) and not is_name(sides[0])):
        return sides[0]
    if is_name(sides[0]):
        own_name = rf"(?<![A-Za-z\\]){sides[0]}(?![A-Za-z])"
        is_solved = not (sides[0].isalpha() and re.search(own_name, sides[-1]))
        return sides[-1] if is_solved else None
    same = [numbers(comparison, sides[0], side) for side in sides[1:]]
    return sides[0] if all(decision and decision.equal for decision in same) else None


def _same_name(gold: str, answer: str) -> bool:
    """The same name, or two names for the value of a function."""
    return squash(gold) == squash(answer) or all(
        name == "y" or name.endswith("(x)") for name in (gold, answer)
    )
