r"""The forms that an answer can have: tuples, lists, matrices, choice letters, numerals, words, chains.

Each reader takes a normalised text and returns its parts, still as text, or None if it has another form.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from mtpo.answer_text import closing, split_top, squash

EQUALS = re.compile(r"=|\\(?:equiv|in)(?![A-Za-z])|(?<=[A-Za-z]):(?=\s*-?[\d\\])")
APPROXIMATELY = re.compile(r"\\approx(?![A-Za-z])")
RATIO = re.compile(r"(\d+)\s*(?::|\bto\b)\s*(\d+)")
EMPTY_SETS = frozenset({r"\emptyset", r"\{\}", "emptyset", "EmptySet", "set()", "[]", "{}"})
NO_SOLUTION = frozenset(
    {
        *(
            "no solution",
            "no solutions",
            "no real solution",
            "no real solutions",
            "none",
            "empty set",
            "empty",
        ),
        *(
            "does not exist",
            "dne",
            "undefined",
            "no such number",
            "no value",
            "no values",
            "no solution exists",
            "no solutions exist",
        ),
    }
)
ALL_REALS = frozenset(
    {"s reals", "all real numbers", "real numbers", "all reals", "reals", "all real", "any real number"}
)
_COUNTING = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty"""
NUMBER_WORDS = {word: number for number, word in enumerate(_COUNTING.split())}

_CLOCK_TIME = re.compile(
    r"(\d{1,2})(?:\s*:\s*([0-5]\d)(?:\s*:\s*([0-5]\d))?)?\s*(?:([ap])\.?\s?m\.?)?", re.IGNORECASE
)
_THOUSANDS = re.compile(r"\D*\d{1,3}(?:,\d{3})+(?:\.\d*)?\D*")
_SEPARATOR = re.compile(r"[,;]|\\(?:lor|land)(?![A-Za-z])")
_COMMA = re.compile(",")
_PLUS_MINUS = re.compile(r"\\(mp|pm)(?![A-Za-z])")
_RELATION = re.compile(r"\\(?:le|ge)(?![A-Za-z])|<|>")
_PYTHON_CONTAINER = re.compile(r"(Point(?:2D|3D)?|FiniteSet|set|frozenset|tuple|list|array|Tuple)\(")
_MEMBER_NAME = re.compile(r"[A-Za-z](?:_\{?\w+\}?)?\s*(?:=|:|\\in(?![A-Za-z]))\s*")
_NAMED_VALUE = re.compile(r"'?([A-Za-z](?:_\{?\w+\}?)?|\\[a-z]+)'?\s*[=:]\s*([^=:]+)")
_NAME = re.compile(
    r"(?!\\frac\{\d|\\sqrt|\\infty|\\pi|[ei]$|.*\\cdot)(?:\\[A-Za-z]+|[A-Za-z]|\||\[(?=[A-Z]))[^=+<>-]*"
    r"|\([A-Za-z](?:_\{?\w+\}?)?(?:\s*,\s*[A-Za-z](?:_\{?\w+\}?)?)+\)"
)
_CHOICES = re.compile(r"\(?[A-Z]\)?(?:(?:\s*,?\s*\\land\s*|\s*,\s*|,?\s+and\s+)\(?[A-Z]\)?)*")
_LABELLED_CHOICE = re.compile(
    r"(?:(?:the )?(?:correct )?(?:option|choice|answer)(?: is)?:?\s*)?\(?([A-Z])(?:[).:]+(?:\s.*|\W.*)?|$)",
    re.IGNORECASE,
)
_NUMERAL = re.compile(
    r"\(?(-?[0-9A-Z]*\d[0-9A-Z]*)\)?(?:_\s*\{?\s*(?:base\s*)?\(?(\d+|[a-z]+)\)?\s*\}?|\s*\(?\s*base[\s-]*\{?(\d+|[a-z]+)\}?\)?)"
)
_PYTHON_NUMERAL = re.compile(r"0([box])([0-9a-fA-F]+)")
_PYTHON_BASES = {"b": "2", "o": "8", "x": "16"}
_FILLER = re.compile(r"\b(?:an?|the|there (?:is|are)|it is|they are|answer is)\b")
_NOT_WORDS = frozenset(["sqrt", "frac", "alpha", "beta", "gamma", "theta", "infty", "cdot"])
_LATEX_MATRIX = re.compile(
    r"([^=]*?)[(\[]?\s*\\begin\{([pb]?matrix|smallmatrix|array)\}(?:\{[lcr| ]*\})?"
    r"((?:(?!\\begin).)*)\\end\{\2\}\s*[)\]]?"
)
_PYTHON_MATRIX = re.compile(r"(?:(?:Immutable)?(?:Dense)?Matrix|array)\(\[(.*)\]\)|(?=\[\[)\[(.*)\]")
_MODULUS = re.compile(r"\s*\(?\s*(?:\\[pb]?mod\s*|\\text\{mod\}\s*|\bmod\s*)\{?([^{}()]*)\}?\s*\)?$")


class Items(NamedTuple):
    """Several values: the bracket before them ("" for a bare list, "{" for a set), and the values."""

    bracket: str
    values: list[str]


class Chain(NamedTuple):
    """Inequalities in a row, such as f(2) < f(1) < f(4), read from the small end to the large one."""

    operands: list[str]
    relations: list[str]


class Numeral(NamedTuple):
    """Digits in a base other than what the value would be written in."""

    digits: str
    base: str


class ClockTime(NamedTuple):
    """A time of day; `half` is "a" or "p", or None if the text does not say."""

    hour: int
    minute: int
    second: int
    half: str | None


def plain(text: str) -> str:
    r"""Without the commands of `\text{...}`."""
    return re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip()


def is_name(text: str) -> bool:
    r"""What an equation can be solved for: `x`, `AB`, `f(x)`, `z^3`, `\angle A`; not `2x`, `x+y` or `\pi`."""
    return bool(_NAME.fullmatch(text.replace("^{-1}", "")))


def is_equation(text: str) -> bool:
    return len(split_top(text, EQUALS)) > 1


def choice_letters(text: str) -> list[str] | None:
    """The letters of `B`, `(B)` or `A, C`, sorted."""
    letters = plain(text)
    if letters[:1] in ("[", "\\"):
        letters = re.sub(r"[\[\]'\"]|\\[{}]", "", letters).strip()
    return sorted(re.findall(r"[A-Z]", letters)) if _CHOICES.fullmatch(letters) else None


def labelled_choice(text: str) -> str | None:
    """The letter of a choice that is written out, such as `(C) Plane`, `C. 12` or `option C`."""
    match = _LABELLED_CHOICE.fullmatch(plain(text))
    return match.group(1).upper() if match else None


def clock_time(text: str, *, bare: bool = False) -> ClockTime | None:
    """`9:24`, `4:51:06 p.m.`, `9 a.m.`; a `bare` hour, `9`, only if that is asked for."""
    match = _CLOCK_TIME.fullmatch(plain(text))
    if match is None:
        return None
    hour, minute, second, half = match.groups()
    if minute is None and half is None and not bare:
        return None
    return ClockTime(int(hour), int(minute or 0), int(second or 0), half and half.lower())


def numeral(text: str) -> Numeral | None:
    r"""`4210_{5}` or `4210 \text{ base } 5`."""
    if python := _PYTHON_NUMERAL.fullmatch(text):
        return Numeral(python.group(2).upper().lstrip("0"), _PYTHON_BASES[python.group(1)])
    match = _NUMERAL.fullmatch(plain(text))
    if match is None:
        return None
    base = match.group(2) or match.group(3)
    return Numeral(match.group(1).lstrip("0"), str(NUMBER_WORDS.get(base, base)))


def words(text: str) -> str | None:
    r"""The words of a text without mathematics: lower case, without articles and "there is".

    Plain letters that could be a product, such as `ab`, are words only inside `\text{...}`.
    """
    joined = text.replace(r"\lor", "or").replace(r"\land", "and")
    outside = re.sub(r"\\text\{[^{}]*\}", " ", joined)
    has_spans = outside != joined
    if has_spans:
        if re.search(r"[A-Za-z\d\\=<>^_{}+*/|]", outside):
            return None
    elif not re.fullmatch(r"[A-Za-z][A-Za-z' .,:!-]*", joined):
        return None
    letters = re.sub(r"[^a-z0-9:/ ]", " ", plain(joined).lower())
    found = " ".join(_FILLER.sub(" ", letters).split())
    if not has_spans and (
        (len(found) < 4 and found not in ("yes", "no", "odd", "dne")) or found in _NOT_WORDS
    ):
        return None
    return found or None


def items(text: str) -> Items | None:
    r"""The values of a tuple, set or list. `1 \pm 2` is a list of two; `[5]` and `\{5\}` have one value."""
    bracket, inside = _open(text)
    if not bracket and _THOUSANDS.fullmatch(text):
        return None
    values = [value for part in split_top(inside, _SEPARATOR) if (value := part.strip("'\" "))]
    if len(values) > 1 or (len(values) == 1 and bracket == "(" and inside.rstrip().endswith(",")):
        return Items(bracket, values)
    if len(values) == 1 and bracket in ("[", "{"):
        inner = items(values[0])
        return inner if inner and inner.bracket else Items(bracket, written_out(values))
    if not bracket and _PLUS_MINUS.search(text):
        return Items("", written_out(values))
    return None


def _open(text: str) -> tuple[str, str]:
    """The bracket that encloses the whole text, and what it encloses."""
    python = _PYTHON_CONTAINER.match(text)
    if python and closing(text, python.end() - 1) == len(text) - 1:
        bracket = "{" if python.group(1).lower().endswith("set") else "("
        inside = text[python.end() : -1]
        is_enclosed = inside[:1] in ("(", "[", "{") and closing(inside, 0) == len(inside) - 1
        return bracket, inside[1:-1] if is_enclosed else inside
    for start, end, bracket in (("\\{", "\\}", "{"), ("\\langle", "\\rangle", "(")):
        if text.startswith(start) and text.find(end) == len(text) - len(end):
            return bracket, text[len(start) : -len(end)]
    for start, end, bracket in (("(", ")", "("), ("[", "]", "["), ("{", "}", "{")):
        if text[:1] == start and text[-1:] == end and closing(text, 0) == len(text) - 1:
            return bracket, text[1:-1]
    return "", text


def written_out(values: Sequence[str]) -> list[str]:
    r"""Each value once, with `\pm` as two values; without the name if all have the same, as in `x = 1, x = 2`."""
    names = {name.group() for value in values if (name := _MEMBER_NAME.match(value))}
    found: dict[str, str] = {}
    for value in values:
        if len({name[0] for name in names}) == 1 and (name := _MEMBER_NAME.match(value)):
            value = value[name.end() :]
        for pm, mp in (("+", "-"), ("-", "+")) if _PLUS_MINUS.search(value) else (("", ""),):
            signed = _PLUS_MINUS.sub(lambda m, pm=pm, mp=mp: pm if m.group(1) == "pm" else mp, value)
            signed = signed.strip().removeprefix("+").strip()
            found.setdefault(squash(signed), signed)
    return list(found.values())


def named_values(values: Sequence[str]) -> dict[str, str] | None:
    r"""The values of `x=2, y=3` or `{x: 2, y: 3}` by name; None unless each has a letter of its own.

    In the order of the names, or as they stand if there are Greek letters, as in `r=4, \theta=\pi`.
    """
    named: dict[str, str] = {}
    for value in values:
        match = _NAMED_VALUE.fullmatch(value)
        if match is None or match.group(1) in named:
            return None
        named[match.group(1)] = match.group(2)
    if len(named) < 2 or len({name.partition("_")[0] for name in named}) == 1:
        return None
    return named if any(name[0] == "\\" for name in named) else dict(sorted(named.items()))


def matrix(text: str) -> list[list[str]] | None:
    r"""The rows of a `pmatrix`, an `array` or Python's `[[1, 2], [3, 4]]`; a factor before it is multiplied in."""
    if latex := _LATEX_MATRIX.fullmatch(text):
        factor = latex.group(1).strip().removesuffix(r"\cdot").strip()
        rows = [
            [c.strip() for c in row.split("&")] for row in latex.group(3).split(r"\newrow") if row.strip()
        ]
    elif python := _PYTHON_MATRIX.fullmatch(text):
        factor = ""
        parts = [part for part in split_top(python.group(1) or python.group(2), _COMMA) if part]
        rows = [split_top(part[1:-1], _COMMA) if part.startswith("[") else [part] for part in parts]
    else:
        return None
    if not rows or any(len(row) != len(rows[0]) for row in rows):
        return None
    return [[rf"({factor})\cdot ({cell})" for cell in row] for row in rows] if factor else rows


def chain(text: str) -> Chain | None:
    """The operands and relations of inequalities that all point the same way."""
    operands = split_top(text, _RELATION)
    relations = [found.strip() for found in _RELATION.findall(text)]
    if len(operands) < 2 or len(relations) != len(operands) - 1:
        return None
    if all(relation in (">", r"\ge") for relation in relations):
        return Chain(operands[::-1], [{">": "<", r"\ge": r"\le"}[r] for r in reversed(relations)])
    return Chain(operands, relations)


def without_modulus(sides: list[str]) -> tuple[str | None, list[str]]:
    """Take `(mod n)` off the last side of a congruence: n, and the sides."""
    found = _MODULUS.search(sides[-1])
    if found is None:
        return None, sides
    return found.group(1).strip(), [*sides[:-1], sides[-1][: found.start()]]
