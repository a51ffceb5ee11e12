"""What every engine that talks to someone else's sampler checks, before it asks and after it is answered."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mtpo.errors import EngineError, InputError
from mtpo.rollout import Generation, Sampling


def tokens_to_sample(prompt_ids: Sequence[int], sampling: Sampling, max_context: int) -> int:
    """`max_tokens`, or what the context leaves of it; at least 1.

    Raises:
        InputError: the prompt is empty or leaves no room, or no token is asked for.
    """
    room = max_context - len(prompt_ids)
    if not prompt_ids or room < 1:
        raise InputError(f"a prompt of {len(prompt_ids)} tokens does not fit a context of {max_context}")
    if sampling.max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, got {sampling.max_tokens}")
    return min(sampling.max_tokens, room)


def checked_generation(
    ids: Sequence[int], logps: Sequence[float | None] | None, stop_ids: Sequence[int], num_asked: int
) -> Generation:
    """A turn as it was sampled, whose end is decided by its ids.

    Args:
        logps: log p of each id, in nats; None if the sampler does not tell.
        num_asked: how many tokens were to be sampled if no stop id came.

    Raises:
        EngineError: there is no token, the turn ended for no reason, or a log-prob is missing or not finite,
            as when the model's activations overflow.
    """
    if not ids:
        raise EngineError("the engine returned no token")
    if any(i in stop_ids for i in ids[:-1]):
        raise EngineError(f"the engine went on after a stop id: it samples past {sorted(stop_ids)}")
    is_stopped = ids[-1] in stop_ids
    if not is_stopped and len(ids) != num_asked:
        raise EngineError(f"the turn ended after {len(ids)} of {num_asked} tokens without a stop id")
    if logps is None:
        return Generation(tuple(ids), None, "stop" if is_stopped else "length")
    if len(logps) != len(ids):
        raise EngineError(f"{len(ids)} tokens came with {len(logps)} log-probs")
    finite = tuple(logp for logp in logps if logp is not None and math.isfinite(logp))
    if len(finite) != len(ids):
        raise EngineError(f"{len(ids) - len(finite)} of {len(ids)} log-probs are not finite")
    return Generation(tuple(ids), finite, "stop" if is_stopped else "length")
