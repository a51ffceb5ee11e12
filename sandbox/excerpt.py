"""The beginning and the end of a text that arrives in pieces and may never stop."""

from __future__ import annotations

MARKER_ROOM = 40
"""Characters set aside for the line that says how much was cut."""


class Excerpt:
    """Keeps the first and the last half of `limit` characters, in memory that does not grow.

    The kernel uses one a cell, so that a print bomb stays in the kernel; the pool uses another, because it
    does not trust the kernel. Both cut at the same places, so the count is that of the whole output.
    """

    def __init__(self, limit: int) -> None:
        self._head: list[str] = []
        self._head_room = limit - limit // 2
        self._tail = ""
        self._tail_room = limit // 2
        self._num_cut = 0

    def add(self, text: str) -> str:
        """Take in a piece.

        Returns:
            The part of it that belongs to the head, which no later piece can change.
        """
        ahead = text[: self._head_room]
        if ahead:
            self._head.append(ahead)
            self._head_room -= len(ahead)
        if len(text) > len(ahead):
            rest = text[max(len(ahead), len(text) - self._tail_room) :]
            self._num_cut += len(text) - len(ahead) - len(rest)
            self._tail += rest
            if len(self._tail) > 2 * self._tail_room:
                self._trim()
        return ahead

    def skip(self, num_chars: int) -> None:
        """Count characters that the sender cut between its head and its tail."""
        self._num_cut += num_chars

    def take_tail(self) -> tuple[int, str]:
        """How many characters were cut after the head, and what followed them; both are then forgotten."""
        self._trim()
        taken = self._num_cut, self._tail
        self._num_cut, self._tail = 0, ""
        return taken

    def text(self) -> str:
        """At most `limit` characters, with a line in the middle that says how many were cut."""
        self._trim()
        head = "".join(self._head)
        if not self._num_cut:
            return head + self._tail
        num_cut = self._num_cut + min(MARKER_ROOM, len(self._tail))
        return f"{head}\n[... {num_cut} characters cut ...]\n{self._tail[MARKER_ROOM:]}"

    def _trim(self) -> None:
        if excess := max(0, len(self._tail) - self._tail_room):
            self._tail = self._tail[excess:]
            self._num_cut += excess
