"""A comparison of two answers by a list of rules: the first that applies decides.

The rules are in `mtpo.value_rules`, `mtpo.collection_rules` and `mtpo.equation_rules`. Those on tuples, sets or
equations ask for the equality of their parts by the same list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from mtpo.answer_text import squash
from mtpo.constant_equality import equal_constants
from mtpo.symbolic_equality import UnreadableError, check_readable

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


class Comparison:
    """The rules, and what they have in common.

    Args:
        symbolic: the rule of last resort; without it, the decision on what reaches it is None.
        paper_tolerance: numbers may differ by `PAPER_DECIMALS` or `PAPER_CONSTANTS`.
    """

    def __init__(self, rules: Sequence[Rule], symbolic: Symbolic | None, paper_tolerance: bool) -> None:
        self._rules = rules
        self._symbolic = symbolic
        self.paper_tolerance = paper_tolerance
        self._depth = 0

    def decide(self, gold: str, answer: str) -> Decision:
        """By the first rule that applies; what none decides is an expression."""
        gold, answer = gold.strip(), answer.strip()
        if squash(gold) == squash(answer):
            return Decision(True, "same_text")
        if not answer or self._depth > MAX_DEPTH:
            return Decision(False, "unreadable")
        self._depth += 1
        try:
            for rule in self._rules:
                decision = rule(self, gold, answer)
                if decision is not None:
                    return decision
        finally:
            self._depth -= 1
        return self.expressions(gold, answer)

    def expressions(self, gold: str, answer: str) -> Decision:
        """What no rule could decide is algebra, or cannot be read and is not the same text."""
        try:
            check_readable(gold)
            check_readable(answer)
        except UnreadableError:
            return Decision(False, "unreadable")
        within = float(PAPER_CONSTANTS) if self.paper_tolerance else 0.0
        if (equal := equal_constants(gold, answer, within)) is not None:
            return Decision(equal, "constant")
        if self._symbolic is None:
            return Decision(None, "symbolic")
        equal = self._symbolic(gold, answer, within)
        return Decision(False, "unreadable") if equal is None else Decision(equal, "symbolic")

    def in_order(self, gold: list[str], answer: list[str], rule: str) -> Decision:
        """Each value has its equal in the same place; `rule` names the decision."""
        if len(gold) != len(answer) or len(gold) > MAX_ITEMS:
            return Decision(False, rule)
        results = {self.decide(g, a).equal for g, a in zip(gold, answer, strict=True)}
        return Decision(False if False in results else None if None in results else True, rule)

    def in_any_order(
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


Rule = Callable[[Comparison, str, str], Decision | None]
"""The decision on a gold answer and an answer, both normalised; None where the rule does not apply."""
