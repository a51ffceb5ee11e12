r"""Sets of real numbers in all their spellings: intervals, unions and solved inequalities.

`[46, \infty)`, `x \ge 46` and `Interval(46, oo)` are one set; so are `x \ne 3` and
`(-\infty, 3) \cup (3, \infty)`. A set is a list of pieces whose ends are still text: whether two ends are
equal is asked of whoever compares.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from mtpo.answer_forms import written_out
from mtpo.answer_text import closing, split_top
from mtpo.exact_numbers import TooLargeError, parse_number

INFINITY, MINUS_INFINITY = r"\infty", r"-\infty"
_ALL_REALS = re.compile(
    r"\\mathbb\{R\}|\\text\{(?:all )?real(?: numbers?|s)?\}|Reals|S\.Reals", re.IGNORECASE
)
_RELATION = re.compile(r"\\le(?![A-Za-z])|\\ge(?![A-Za-z])|<|>")
_RELATIONS = re.compile(r"\\(?:le|ge|ne|in)(?![A-Za-z])|<|>")
_COMMA = re.compile(",")
_UNION = re.compile(r"\\cup(?![A-Za-z])")
_OR = re.compile(r"\\lor(?![A-Za-z])|,|;")
_POINT_SEPARATOR = re.compile(r"\\l(?:or|and)(?![A-Za-z])|,|;")
_AND = re.compile(r"\\land(?![A-Za-z])")
_NE = re.compile(r"\\ne(?![A-Za-z])")
_IN = re.compile(r"\\in(?![A-Za-z])")
_SETMINUS = re.compile(r"\\setminus(?![A-Za-z])|(?<=\})\s*-(?=\s*\\\{)")
_VARIABLE = re.compile(r"(?:[A-Za-z]|\\[a-z]+)(?:_\{?\w\}?)?(?:\([a-z]\))?")
_BUILDER = re.compile(r"\\\{\s*[A-Za-z](?:\s*\\in\s*\\mathbb\{R\})?\s*[|:](.*)\\\}")
_IS_REAL = re.compile(r"[A-Za-z]\s*\\in\s*\\mathbb\{R\}")
_ALL_REALS_BUT = re.compile(
    r"\\text\{(?:all )?real(?: number)?s? (?:except|but|other than)(?: for)?\}\s*(?:[A-Za-z]\s*=)?(.*)"
)
_PYTHON_INTERVAL = re.compile(r"Interval(?:\.(open|Lopen|Ropen))?\((.*)\)$")


class Piece(NamedTuple):
    """One interval; an end is closed if it belongs to the set."""

    low: str
    low_closed: bool
    high: str
    high_closed: bool


REALS = Piece(MINUS_INFINITY, False, INFINITY, False)


def looks_like_set(text: str) -> bool:
    """The text can be nothing but a set of reals; `(1, 2)` could be a point too."""
    return bool(
        _RELATIONS.search(text)
        or re.search(r"\\cup(?![A-Za-z])|\\infty|Interval|Union\(|\\setminus", text)
        or _ALL_REALS.match(text)
        or _ALL_REALS_BUT.match(text)
        or (text[:1] == "(" and text[-1:] == "]")
        or (text[:1] == "[" and text[-1:] == ")")
    )


def parse_set(text: str) -> list[Piece] | None:
    """The pieces of the set in no particular order, or None if the text is no set that is known here."""
    text = _unwrap(text.strip())
    if _ALL_REALS.fullmatch(text):
        return [REALS]
    if found := _ALL_REALS_BUT.fullmatch(text):
        return _without(REALS, _points(found.group(1)))
    if text.startswith("Union(") and closing(text, 5) == len(text) - 1:
        return _union(split_top(text[6:-1], _COMMA))
    for separator in (_UNION, _OR):
        parts = split_top(text, separator)
        if separator is _OR and len(parts) > 1 and _IS_REAL.fullmatch(parts[0]):
            return parse_set(",".join(parts[1:]))
        if len(parts) > 1 and (separator is _UNION or all(_is_statement(part) for part in parts)):
            return _intersection(parts) if any(_NE.search(part) for part in parts) else _union(parts)
    parts = split_top(text, _AND)
    if len(parts) > 1:
        return _intersection(parts)
    if len(parts := split_top(text, _IN)) == 2 and _VARIABLE.fullmatch(parts[0]):
        return parse_set(parts[1])
    if len(parts := split_top(text, _SETMINUS)) == 2:
        return _difference(*parts)
    if (points := _excluded(text)) is not None:
        return _without(REALS, points)
    return _inequality(text) or _interval(text)


def _unwrap(text: str) -> str:
    """Take off parentheses, and `{x | ...}`, that enclose everything."""
    if builder := _BUILDER.fullmatch(text):
        text = builder.group(1).strip()
    while text[:1] == "(" and closing(text, 0) == len(text) - 1 and len(split_top(text[1:-1], _COMMA)) == 1:
        text = text[1:-1].strip()
    return text


def _is_statement(text: str) -> bool:
    return bool(_RELATIONS.search(text))


def _union(parts: list[str]) -> list[Piece] | None:
    pieces: list[Piece] = []
    for part in parts:
        found = parse_set(part)
        if found is None:
            return None
        pieces += found
    return pieces


def _intersection(parts: list[str]) -> list[Piece] | None:
    """A lower and an upper bound that both hold, without some points."""
    low, high, points = (MINUS_INFINITY, False), (INFINITY, False), []
    for part in parts:
        if (excluded := _excluded(part)) is not None:
            points += excluded
            continue
        found = parse_set(part)
        if found is None or len(found) != 1:
            return None
        piece = found[0]
        if piece.low != MINUS_INFINITY:
            if low[0] != MINUS_INFINITY:
                return None
            low = (piece.low, piece.low_closed)
        if piece.high != INFINITY:
            if high[0] != INFINITY:
                return None
            high = (piece.high, piece.high_closed)
    return _without(Piece(*low, *high), points)


def _excluded(text: str) -> list[str] | None:
    r"""The points of `x \ne 1, 2`; None if the text says anything else."""
    sides = split_top(text, _NE)
    return _points(sides[1]) if len(sides) == 2 and _VARIABLE.fullmatch(sides[0]) else None


def _points(text: str) -> list[str]:
    return written_out(split_top(text, _POINT_SEPARATOR))


def _difference(base: str, removed: str) -> list[Piece] | None:
    r"""An interval without points, or the reals without an interval."""
    pieces = parse_set(base)
    if pieces is None or len(pieces) != 1:
        return None
    if removed.startswith("\\{"):
        return _without(pieces[0], _points(removed.removeprefix("\\{").removesuffix("\\}")))
    gap = parse_set(removed)
    if gap is None or len(gap) != 1 or pieces != [REALS]:
        return None
    low, low_closed, high, high_closed = gap[0]
    below = [] if low == MINUS_INFINITY else [Piece(MINUS_INFINITY, False, low, not low_closed)]
    above = [] if high == INFINITY else [Piece(high, not high_closed, INFINITY, False)]
    return [*below, *above] or None


def _without(piece: Piece, points: list[str]) -> list[Piece] | None:
    """An interval without points inside it; unless it is the reals without one point, all must be rational."""
    if not points:
        return [piece]
    if piece != REALS or len(points) > 1:
        try:
            inside = sorted(points, key=_value)
            values = [_value(end) for end in (piece.low, *inside, piece.high)]
        except (TooLargeError, _NoValueError):
            return None
        if any(low >= high for low, high in pairwise(values)):
            return None
        points = inside
    lows = [(piece.low, piece.low_closed), *((point, False) for point in points)]
    highs = [*((point, False) for point in points), (piece.high, piece.high_closed)]
    return [Piece(*low, *high) for low, high in zip(lows, highs, strict=True)]


class _NoValueError(Exception):
    """The end of an interval is no rational number."""


def _value(end: str) -> Fraction | float:
    if end in (INFINITY, MINUS_INFINITY):
        return math.inf if end == INFINITY else -math.inf
    number = parse_number(end)
    if number is None:
        raise _NoValueError
    return number.value


def _inequality(text: str) -> list[Piece] | None:
    """`x > 1`, `1 < x \\le 2`, `|x| < 3` and `|x| > 3`, solved for a variable that stands alone."""
    operands = split_top(text, _RELATION)
    relations = [match.strip() for match in _RELATION.findall(text)]
    if len(operands) not in (2, 3) or len(relations) != len(operands) - 1:
        return None
    if relations[0] in (">", r"\ge"):  # read it from the small end to the large one
        operands.reverse()
        relations = [relation.replace(">", "<").replace("ge", "le") for relation in reversed(relations)]
    if any(relation not in ("<", r"\le") for relation in relations):
        return None
    closed = [relation == r"\le" for relation in relations]
    if len(operands) == 3:
        low, variable, high = operands
        if not _VARIABLE.fullmatch(variable):
            return None
        return [_piece(low, closed[0], high, closed[1])]
    left, right = operands
    if _VARIABLE.fullmatch(left):
        return [_piece(MINUS_INFINITY, False, right, closed[0])]
    if _VARIABLE.fullmatch(right):
        return [_piece(left, closed[0], INFINITY, False)]
    if absolute := re.fullmatch(r"\|([A-Za-z])\|", left):
        return [_piece(f"-({right})", closed[0], right, closed[0])] if absolute else None
    if re.fullmatch(r"\|([A-Za-z])\|", right):
        return [
            _piece(MINUS_INFINITY, False, f"-({left})", closed[0]),
            _piece(left, closed[0], INFINITY, False),
        ]
    return None


def _interval(text: str) -> list[Piece] | None:
    if python := _PYTHON_INTERVAL.fullmatch(text):
        kind, inside = python.groups()
        ends = split_top(inside, _COMMA)
        if len(ends) not in (2, 3, 4):
            return None
        flags = [flag.strip() == "True" for flag in ends[2:]] + [False, False]
        low_open, high_open = kind in ("open", "Lopen") or flags[0], kind in ("open", "Ropen") or flags[1]
        return [_piece(ends[0], not low_open, ends[1], not high_open)]
    if text[:1] not in "([" or text[-1:] not in ")]" or closing(text, 0) != len(text) - 1:
        return None
    ends = split_top(text[1:-1], re.compile("[,;]"))
    if len(ends) != 2 or not all(ends):
        return None
    return [_piece(ends[0], text[0] == "[", ends[1], text[-1] == "]")]


def _piece(low: str, low_closed: bool, high: str, high_closed: bool) -> Piece:
    """A piece whose infinite ends are spelled alike and open, however they were written."""
    low, high = low.strip(), high.strip().removeprefix("+").strip()
    if low.replace(" ", "") == MINUS_INFINITY:
        low, low_closed = MINUS_INFINITY, False
    if high == INFINITY:
        high_closed = False
    return Piece(low, low_closed, high, high_closed)
