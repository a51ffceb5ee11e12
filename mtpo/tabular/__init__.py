"""Small games solved exactly: what the online methods aim at, computed without a network and without sampling.

Games of one turn take the policy as an (n,) probability vector; games of several turns are a `TreeGame`, whose
policies are (S, A), a row a state. The Nash policy that both are judged by comes from `solve_nash` and
`solve_tree_nash`, and the distance to it in units of the preference is the exploitability.
"""

from mtpo.tabular.flat import (
    best_response,
    exploitability,
    geometric_policy,
    ipo_md_step,
    mtpo_step,
    nash_md_step,
    rlhf_step,
)
from mtpo.tabular.games import additive_preference, cyclic_preference, reference_for
from mtpo.tabular.nash import solve_nash, solve_tree_nash
from mtpo.tabular.random_tools import fit_dpo
from mtpo.tabular.theory import (
    contraction_limit,
    decreasing_step,
    mtpo_bound,
    mtpo_gap_bound,
    nash_md_bound,
)
from mtpo.tabular.trees import (
    TreeGame,
    mtpo_tau_tree_step,
    mtpo_tree_step,
    rlhf_tree_step,
    tree_action_values,
    tree_best_response,
    tree_divergence,
    tree_exploitability,
    tree_outcomes,
    tree_soft_optimum,
)

__all__ = [
    "TreeGame",
    "additive_preference",
    "best_response",
    "contraction_limit",
    "cyclic_preference",
    "decreasing_step",
    "exploitability",
    "fit_dpo",
    "geometric_policy",
    "ipo_md_step",
    "mtpo_bound",
    "mtpo_gap_bound",
    "mtpo_step",
    "mtpo_tau_tree_step",
    "mtpo_tree_step",
    "nash_md_bound",
    "nash_md_step",
    "reference_for",
    "rlhf_step",
    "rlhf_tree_step",
    "solve_nash",
    "solve_tree_nash",
    "tree_action_values",
    "tree_best_response",
    "tree_divergence",
    "tree_exploitability",
    "tree_outcomes",
    "tree_soft_optimum",
]
