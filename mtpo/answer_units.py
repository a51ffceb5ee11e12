r"""What stands around the value of an answer: `\$`, a unit, a percent sign, "thousand".

A unit that only one side names is ignored; two known units that differ make an answer wrong, for nothing
is converted. Nouns that are no unit of measure (`81 \text{ teachers}`) are ignored.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from mtpo.answer_text import FUNCTIONS

_ALIASES = {
    "metre": "m meter meters metre metres",
    "kilometre": "km kilometer kilometers kilometre kilometres kms",
    "centimetre": "cm centimeter centimeters centimetre centimetres cms",
    "millimetre": "mm millimeter millimeters millimetre millimetres",
    "inch": "in inch inches",
    "foot": "ft foot feet",
    "yard": "yd yard yards yds",
    "mile": "mi mile miles",
    "gram": "g gm gms gram grams",
    "kilogram": "kg kgs kilogram kilograms",
    "milligram": "mg milligram milligrams",
    "pound": "lb lbs pound pounds",
    "ounce": "oz ounce ounces",
    "ton": "ton tons tonne tonnes",
    "litre": "l liter liters litre litres",
    "millilitre": "ml milliliter milliliters millilitre millilitres",
    "gallon": "gal gallon gallons",
    "quart": "qt quart quarts",
    "pint": "pt pint pints",
    "cup": "cup cups",
    "second": "s sec secs second seconds",
    "minute": "min mins minute minutes",
    "hour": "h hr hrs hour hours",
    "day": "day days",
    "week": "week weeks",
    "month": "month months",
    "year": "yr yrs year years",
    "dollar": "dollar dollars usd bucks",
    "cent": "cent cents",
    "euro": "euro euros eur",
    "pound sterling": "gbp",
    "yen": "yen",
    "rupee": "rupee rupees rs inr",
    "degree": "degree degrees deg",
    "radian": "radian radians rad",
    "acre": "acre acres",
    "celsius": "celsius",
    "fahrenheit": "fahrenheit",
    "volt": "volt volts",
    "watt": "watt watts",
    "joule": "joule joules",
    "newton": "newton newtons",
    "mile/hour": "mph",
    "kilometre/hour": "kph kmh",
}
_UNITS = {alias: unit for unit, aliases in _ALIASES.items() for alias in aliases.split()}
_SCALES = {
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_CURRENCY = {
    r"\$": "dollar",
    "€": "euro",
    r"\euro": "euro",
    "£": "pound sterling",
    r"\pounds": "pound sterling",
}

_PREFIX = re.compile(
    r"([-+]?)\s*(\\\$|€|£|\\euro|\\pounds|\\text\{(?:Rs\.?|USD)\}|USD|Rs\.?)\s*(?=[-\d.\\(])"
)
_SUFFIX = re.compile(
    r"(?:\s*(?:\\text\{[^{}]*\}|\\%|\\\$|€|£))"
    r"(?:\s*(?:\\text\{[^{}]*\}|\\%|/|\\cdot|\^\{-?\d\}))*$"
)
_WORDS = re.compile(r"(?<=[\d)}])\s*((?:[A-Za-z]+\.?)(?:(?:\s*/\s*|\s+)[A-Za-z]+\.?)*(?:\^\{\d\})?)$")
_PIECE = re.compile(r"[A-Za-z]+|/|\^\{(-?\d)\}|\\%")


class Measured(NamedTuple):
    """A value with what stood around it."""

    value: str
    unit: str | None = None
    """A known unit such as `inch^2` or `mile/hour`; None also where the unit is no known one."""
    is_percent: bool = False
    scale: int = 1
    """What "thousand" and its like multiply the value by."""


def measured(text: str, expected: str | None = None) -> Measured:
    """Take the unit, currency and percent sign off a normalised answer.

    Args:
        expected: the unit of the other side; only then is `g` in `12g` the unit and no variable.
    """
    unit = None
    if prefix := _PREFIX.match(text):
        sign, currency = prefix.groups()
        unit = _CURRENCY.get(currency) or _UNITS.get(re.sub(r"\\text|[^A-Za-z]", "", currency).lower())
        text = sign + text[prefix.end() :]
    start = _suffix_start(text, expected)
    if start is None:
        return Measured(text, unit)
    suffix, value = text[start:], text[:start].strip()
    if not value:
        return Measured(text, unit)
    scale = 1
    words = [
        match.group().lower() for match in _PIECE.finditer(re.sub(r"\\text\{([^{}]*)\}", r" \1 ", suffix))
    ]
    for word in [w for w in words if w in _SCALES]:
        scale *= _SCALES[word]
        words.remove(word)
    is_percent = "\\%" in words or words[:1] == ["percent"] or words[:1] == ["pct"]
    if r"\$" in suffix:
        unit = unit or "dollar"
    return Measured(value, unit or _unit(words), is_percent, scale)


def units_conflict(first: Measured, second: Measured) -> bool:
    """Both name a known unit, and not the same; a percent sign is one beside the others."""
    units = [side.unit or ("percent" if side.is_percent else None) for side in (first, second)]
    return None not in units and units[0] != units[1]


def _suffix_start(text: str, expected: str | None) -> int | None:
    """Where the unit at the end begins; plain words count if known, or long enough to be nouns."""
    if match := _SUFFIX.search(text):
        return match.start()
    if match := _WORDS.search(text):
        words = re.findall(r"[A-Za-z]+", match.group())
        known = _UNITS.keys() | _SCALES.keys() | _POWERS.keys() | {"per", "percent", "units", "unit"}
        if all(w.lower() in known and (len(w) > 1 or "/" in match.group()) for w in words):
            return match.start()
        if expected and _unit([m.group() for m in _PIECE.finditer(match.group())]) == expected:
            return match.start()
        if text[match.start()] == " " and all(len(w) >= 4 and w not in FUNCTIONS for w in words):
            return match.start()
    return None


def _unit(words: list[str]) -> str | None:
    """The canonical name of `square inches` or `miles per hour`; None if a word of it is unknown."""
    names: list[str] = []
    power = 1
    for word in words:
        if word in ("per", "/"):
            names.append("/")
        elif word in _POWERS:
            power = _POWERS[word]
        elif word.startswith("^"):
            power = int(word[2:-1])
        elif word in _UNITS:
            names.append(_UNITS[word])
        elif word not in ("of", "a", "an", "the"):
            return None
    if not names:
        return None
    return "".join(names) + (f"^{power}" if power != 1 else "")
