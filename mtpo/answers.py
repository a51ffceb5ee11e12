r"""The final answer of a response: what stands in the last box that the model wrote as prose.

A response is a whole trajectory in flat text, where code stands in ```` ```python ```` fences and what
the interpreter printed in ```` ```output ```` fences. Only the last assistant message counts, which is
the text after the last output fence; a box in an earlier turn, in code or in tool output is no answer.
A last line `#### 18`, as GSM8K's own solutions have it, stands for a box.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_FENCE = re.compile(r"```")
_REOPENING = re.compile(r"(python|py|output|tool_output|text|plaintext)[ \t]*(?:\r?\n|$)")
_INFO = re.compile(r"[\w+-]*")
_OUTPUT_INFO = frozenset({"output", "tool_output"})

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BARE_BOX = re.compile(r"\\[A-Za-z]+|-?[\d.,]*\d%?|[^\s\\{}$]")
_JOINER = re.compile(
    r"[\s$]*(?:\\\)|\\\])?[\s$]*(?:\\(?:text|mbox|textrm|quad|qquad|,|;)\s*\{?\s*)*"
    r"(?:,[\s$]*(?:and|or)\b|,|;|and\b|or\b)"
    r"[\s}$]*(?:\\quad|\\qquad|\\,|\\;|\\\(|\\\[)?[\s$]*(?:[A-Za-z]\s*=\s*)?"
)
_MAX_JOINER_CHARS = 60
_MAX_LINE_CHARS = 2000

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_GSM8K_ANSWER = re.compile(r"####\s*([^\n]*)")
_GSM8K_LAST_LINE = re.compile(r"(?:^|\n)####[ \t]*(-?\$?\d[\d,.]*%?)\s*$")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n")
_STATED_VALUE = re.compile(
    r"\$(?=\(|[^$]*[\\^_])([^$]+)\$|\\\((.+?)\\\)"  # mathematics, but not "$5 and $6"
    r"|((?<![\w.])-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?\s?%?)"
)


class _Fenced(NamedTuple):
    start: int
    end: int
    info: str


class _Box(NamedTuple):
    start: int
    end: int
    content: str


def extract_answer(response: str, *, last_sentence: bool = False) -> str | None:
    """The answer of a whole response: the box of its last assistant message.

    Args:
        last_sentence: without a box, take the last value in the last sentence of that message.

    Returns:
        The content of the box; `a, b` for boxes joined by "and", "or" or a comma; the number after `####` in
        the last line; None without either, with an empty box, or when the response ends in tool output.
    """
    outputs = [fence.end for fence in _fences(response) if fence.info in _OUTPUT_INFO]
    prose = _prose(response[outputs[-1] :] if outputs else response)
    boxed = last_boxed(prose)
    if boxed is not None:
        return boxed.strip() or None
    if marked := _GSM8K_LAST_LINE.search(prose[-_MAX_LINE_CHARS:]):
        return marked.group(1)
    return _value_in_last_sentence(prose) if last_sentence else None


def boxed_in_prose(text: str) -> str | None:
    """The answer in ONE assistant message: its last box outside all fences, or None."""
    return (last_boxed(_prose(text)) or "").strip() or None


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, `\fbox{...}` or `\boxed 5`, wherever it stands.

    Boxes joined by nothing but "and", "or" or a comma are one answer of several values, joined here by a
    comma. A box that is never closed is none; an empty one gives the empty string.
    """
    boxes = _boxes(text)
    if not boxes:
        return None
    joined = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        end = joined[0].start
        if end - box.end > _MAX_JOINER_CHARS or not _JOINER.fullmatch(text, box.end, end):
            break
        joined.insert(0, box)
    return ", ".join(box.content for box in joined)


def gold_from_solution(solution: str, *, joined: bool = False) -> str | None:
    r"""The gold answer of a MATH record, which has only a worked solution.

    Args:
        joined: keep all values of boxes that are joined by "and", "or" or a comma. The default takes the last
            box alone, as MATH-500 and every published number do, though it cuts 22 of the 12,500 short.

    Returns:
        The content of the last box, stripped; the empty string for the two records whose box is empty; None
        without a box.
    """
    if joined:
        answer = last_boxed(solution)
    else:
        boxes = _boxes(solution)
        answer = boxes[-1].content if boxes else None
    return None if answer is None else answer.strip()


def gold_from_gsm8k(answer: str) -> str | None:
    """The gold answer of a GSM8K record: the number after `####`, without separators (`2,125` -> `2125`)."""
    found = _GSM8K_ANSWER.findall(answer)
    return found[-1].strip().replace(",", "") if found else None


def _value_in_last_sentence(prose: str) -> str | None:
    sentences = [s for s in _SENTENCE_END.split(prose[-_MAX_LINE_CHARS:]) if s.strip()]
    values = _STATED_VALUE.findall(sentences[-1]) if sentences else []
    return max(values[-1], key=len).strip() if values else None


def _prose(text: str) -> str:
    """The text without its fenced blocks."""
    prose, position = [], 0
    for fence in _fences(text):
        prose.append(text[position : fence.start])
        position = fence.end
    return "\n".join([*prose, text[position:]])


def _fences(text: str) -> list[_Fenced]:
    """The fenced blocks in order; one that is never closed runs to the end of the text."""
    fences: list[_Fenced] = []
    start, info = 0, None
    for mark in _FENCE.finditer(text):
        if info is not None:
            fences.append(_Fenced(start, mark.end(), info))
            if not _REOPENING.match(text, mark.end()):
                info = None
                continue
        match = _INFO.match(text, mark.end())
        start, info = mark.start(), match.group().lower() if match else ""
    if info is not None:
        fences.append(_Fenced(start, len(text), info))
    return fences


def _boxes(text: str) -> list[_Box]:
    """The outermost boxes in order."""
    closing = _closing_braces(text)
    boxes: list[_Box] = []
    position = 0
    while match := _BOX.search(text, position):
        position = match.end()
        if text.startswith("{", position):
            end = closing.get(position)
            if end is not None:
                boxes.append(_Box(match.start(), end + 1, text[position + 1 : end]))
                position = end + 1
        elif bare := _BARE_BOX.match(text, position):
            boxes.append(_Box(match.start(), bare.end(), bare.group()))
            position = bare.end()
    return boxes


def _closing_braces(text: str) -> dict[int, int]:
    r"""For every brace that is closed, where it is closed; `\{` and `\}` are text."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for match in _BRACE.finditer(text):
        if match.group() == "{":
            opened.append(match.start())
        elif match.group() == "}" and opened:
            closing[opened.pop()] = match.start()
    return closing
