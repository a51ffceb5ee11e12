"""Pure loss functions over log-probs: no model, no sampling, no state.

Token arrays are (B, T); entry t is log p(token t | tokens before it) in nats, and a mask marks the tokens
that the policy sampled. float64 stays float64. Values off the mask, whatever they are, change nothing and
get a gradient of exactly 0. Positive log-probs are accepted. Everything raises InputError on shapes that
do not fit, on nan, and on a batch without a single action token.

S(tau) is the sum of log-probs over the action tokens of a trajectory, rho(tau) = S_policy - S_reference its
log-ratio, and the margin of a pair is D = rho(chosen) - rho(rejected). Observations cancel in rho, so a sum
over action tokens is the log-ratio of whole trajectories (Xiong et al. 2024, "Building Math Agents with
Multi-Turn Iterative Preference Learning").
"""

from mtpo.losses.checks import LossOut
from mtpo.losses.distributions import Divergence, geometric_mixture, token_divergence
from mtpo.losses.paired import GPO, gpo_f, paired_loss
from mtpo.losses.sequences import masked_sum, sampled_kl, sft_loss, token_logps
from mtpo.losses.turns import policy_gradient_loss, reward_to_go, turn_gae, turn_sums, value_loss
from mtpo.losses.unpaired import dro_policy_loss, dro_value_loss, kto_baseline, kto_loss, pmpo_loss

__all__ = [
    "GPO",
    "Divergence",
    "LossOut",
    "dro_policy_loss",
    "dro_value_loss",
    "geometric_mixture",
    "gpo_f",
    "kto_baseline",
    "kto_loss",
    "masked_sum",
    "paired_loss",
    "pmpo_loss",
    "policy_gradient_loss",
    "reward_to_go",
    "sampled_kl",
    "sft_loss",
    "token_divergence",
    "token_logps",
    "turn_gae",
    "turn_sums",
    "value_loss",
]
