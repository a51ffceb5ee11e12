r"""Whether two normalised answers are equal.

Values are compared, not forms: `26/36` is `13/18`, `x=5` is 5, `x > 8` is `(8, \infty)`. The form counts only
where the gold answer is one: a base-n numeral, a choice letter, a time, a word.
"""

from __future__ import annotations

from mtpo.answer_comparison import Comparison, Decision, Rule, Symbolic
from mtpo.collection_rules import matrices, sequences, sets, several_for_one
from mtpo.equation_rules import approximations, equations, named
from mtpo.value_rules import choices, numbers, numerals, quantities, ratios, same_words, times

RULES: tuple[Rule, ...] = (
    times,
    numbers,
    named,
    several_for_one,
    choices,
    numerals,
    ratios,
    same_words,
    matrices,
    sets,
    sequences,
    approximations,
    equations,
    quantities,
)
"""In this order; the first that applies decides."""


def compare(
    gold: str, answer: str, symbolic: Symbolic | None = None, *, paper_tolerance: bool = False
) -> Decision:
    """Compare two normalised answers.

    Args:
        symbolic: the rule of last resort; without it, the decision on what reaches it is None.
        paper_tolerance: let numbers differ as in the grader of arXiv 2409.02392, see `mtpo.answer_comparison`, and
            decimals by a factor of 100 for percent.
    """
    return Comparison(RULES, symbolic, paper_tolerance).decide(gold, answer)
