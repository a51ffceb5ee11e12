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
        tokenizers: of the two, where they are not one and the same.
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
    for special in SPECIAL_IDS:
        own_id, other_id = getattr(ours, special, None), getattr(theirs, special, None)
        if own_id != other_id:
            raise InputError(
                f"{purpose} needs one tokenizer, but {special} is {own_id} to the {name} and {other_id} to the "
                f"{other_name}"
            )
    if tokenizers is None:
        return
    own_tokens, other_tokens = (tokenizer.get_vocab() for tokenizer in tokenizers)
    if differing := own_tokens.items() ^ other_tokens.items():
        token, token_id = min(differing, key=lambda item: (item[1], item[0]))
        raise InputError(
            f"{purpose} needs one tokenizer, but those of {name} and {other_name} differ in {len(differing)} "
            f"entries: {token!r} with id {token_id} is in one alone"
        )
