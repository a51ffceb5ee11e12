"""What each token id looks like, for a view that shows a trajectory token by token."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

Piece = str | list[int]
"""The text of a token; or its bytes, where they are not whole characters."""


def load_local_tokenizer(names: Iterable[str]) -> Any | None:
    """The first tokenizer among these names and folders that is on this machine; nothing is downloaded."""
    from transformers import AutoTokenizer

    for name in filter(None, names):
        try:
            return AutoTokenizer.from_pretrained(name, local_files_only=True)
        except Exception:  # whatever is wrong with it: the next one may do, and so does none
            continue
    return None


def token_pieces(tokenizer: Any, ids: Iterable[int]) -> dict[int, Piece]:
    """Each id's own text, leading space included, as it stands after other text."""
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    before = _decode(tokenizer, anchor)
    return {i: _piece(tokenizer, i, anchor, before) for i in ids}


def joined(pieces: Sequence[Piece]) -> str:
    """The text of consecutive tokens."""
    return b"".join(p.encode() if isinstance(p, str) else bytes(p) for p in pieces).decode(errors="replace")


def fits(tokenizer: Any, actions: Sequence[tuple[Sequence[int], str]]) -> bool:
    """Whether these ids were made with this tokenizer: most actions must read as their text says.

    Args:
        actions: (ids, text without template tokens).
    """
    pieces = token_pieces(tokenizer, {i for ids, _ in actions for i in ids})
    agreeing = sum(text.strip() in joined([pieces[i] for i in ids]) for ids, text in actions)
    return 2 * agreeing >= len(actions)


def _piece(tokenizer: Any, token_id: int, anchor: list[int], before: str) -> Piece:
    text = _decode(tokenizer, [*anchor, token_id]).removeprefix(before)
    if "\ufffd" not in text:
        return text
    name = tokenizer.convert_ids_to_tokens(token_id) or ""
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", name):
        return [int(byte[1], 16)]
    if all(char in _BYTE_OF for char in name):
        return [_BYTE_OF[char] for char in name]
    return text


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _byte_characters() -> dict[str, int]:
    """How byte-level BPE writes bytes: as themselves if they print in Latin-1, the others from U+0100 on."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(0x100) if b not in printing]
    return {chr(b): b for b in printing} | {chr(0x100 + n): b for n, b in enumerate(others)}


_BYTE_OF = _byte_characters()
