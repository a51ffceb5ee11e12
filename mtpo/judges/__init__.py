"""Which of two trajectories is better: the preference P(first > second) of a judge, in [0, 1].

All judges are symmetrised: prefer(a, b) + prefer(b, a) is exactly 1. A judge that cannot tell gives None, which
callers drop; it counts why in `counts`, and never guesses.
"""

from mtpo.judges.interface import CallableJudge, Judge, PairFunction
from mtpo.judges.llm import INSTRUCTION, LLMJudge
from mtpo.judges.verifier import EfficiencyJudge, VerifierJudge

__all__ = [
    "INSTRUCTION",
    "CallableJudge",
    "EfficiencyJudge",
    "Judge",
    "LLMJudge",
    "PairFunction",
    "VerifierJudge",
]
