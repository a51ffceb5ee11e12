"""What a judge has answered before, kept in a file that a crash cannot spoil."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from mtpo.errors import InputError

logger = logging.getLogger(__name__)


class AnswerLog:
    """Answers by key. With a path, each is appended to that file as soon as it is known.

    A line is one JSON object and reaches the operating system in one write, so `kill -9` loses at most the line that
    is being written; that one is cut off when the file is opened again.

    Args:
        path: made, with its folders, with the first answer; None keeps answers in memory alone.

    Raises:
        InputError: a whole line of the file is no answer.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self._path = None if path is None else Path(path)
        self._answers: dict[str, str] = {}
        if self._path is not None and self._path.exists():
            self._read(self._path)

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> str | None:
        return self._answers.get(key)

    def add(self, key: str, answer: str) -> None:
        self._answers[key] = answer
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps({"key": key, "answer": answer}, ensure_ascii=False) + "\n"
            with self._path.open("ab", buffering=0) as file:
                file.write(line.encode(errors="replace"))

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        whole, _, torn = content.rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
            try:
                row = json.loads(line)
                self._answers[str(row["key"])] = str(row["answer"])
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"{path}, line {number}: expected a judge's answer, got {line[:60]!r}: delete the line"
                ) from None
        if torn:
            logger.warning("%s: cut off %d bytes of a torn line", path, len(torn))
            os.truncate(path, len(content) - len(torn))
