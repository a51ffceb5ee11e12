"""Whether the ids of two models mean the same tokens: for mixtures, distillation and KL terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mtpo.errors import InputError
from mtpo.models import unwrapped

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def require_one_vocabulary(
    models: Mapping[str, nn.Module], tokenizers: tuple[Any, Any] | None = None, *, purpose: str
) -> None:
    """
    Args:
        models: two, by what they are to each other, as the message is to name them.
        tokenizers: of the two; without them, the special ids of the configs tell what they can.
        purpose: what needs them to agree, as the message is to begin.

    Raises:
        InputError: an id does not mean the same token to both models, as far as they and their tokenizers tell.
    """
    (name, model), (other_name, other) = models.items()
    ours, theirs = (unwrapped(m).config.get_text_config() for m in (model, other))
    if ours.vocab_size != theirs.vocab_size:
        raise InputError(
            f"{purpose} needs one vocabulary, but the {name} has {ours.vocab_size} tokens and the {other_name} "
            f"{theirs.vocab_size}, padding of the embeddings included"
        )
    if tokenizers is None:
        for special in SPECIAL_IDS:
            own_ids, other_ids = _ids(ours, special), _ids(theirs, special)
            if own_ids and other_ids and own_ids.isdisjoint(other_ids):
                raise InputError(
                    f"{purpose} needs one tokenizer, but {special} is {_either(own_ids)} to the {name} and "
                    f"{_either(other_ids)} to the {other_name}"
                )
        return
    own_tokens, other_tokens = (tokenizer.get_vocab() for tokenizer in tokenizers)
    if differing := own_tokens.items() ^ other_tokens.items():
        token, token_id = min(differing, key=lambda item: (item[1], item[0]))
        raise InputError(
            f"{purpose} needs one tokenizer, but those of {name} and {other_name} differ in {len(differing)} "
            f"entries: {token!r} with id {token_id} is in one alone"
        )


def _ids(config: Any, special: str) -> set[int]:
    """A config may name several, of which fine-tuning may have kept one."""
    value = getattr(config, special, None)
    return set() if value is None else {value} if isinstance(value, int) else set(value)


def _either(ids: set[int]) -> str:
    return " or ".join(map(str, sorted(ids)))
