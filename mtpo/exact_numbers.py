r"""Exact rational arithmetic on the text of an answer: most answers are numbers, and this settles them.

A recursive-descent reader for `+ - * / ^ !`, fractions, binomials, exact roots, mixed numbers, decimals,
repeating decimals and scientific notation. Everything is a `Fraction`; sizes are bounded before a value
is computed, so no text can make it slow.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

MAX_BITS = 60_000
MAX_FACTORIAL = 3000
MAX_ROOT = 64
MAX_TOKENS = 400
MAX_DEPTH = 40
FLOAT_DIGITS = 12
"""A decimal with at least so many significant digits is a float that was printed, not a rounding."""
FLOAT_NOISE = Fraction(1, 10**12)
"""Relative error that arithmetic in float64 leaves, generously."""

TOKEN = re.compile(
    r"\s*(?:(?P<repeating>\d*\.\d*\\(?:overline|bar)\{\d+\})"
    r"|(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
    r"|(?P<command>\\[A-Za-z]+)|(?P<symbol>[-+*/^!(){}\[\]]))"
)
_LITERAL = re.compile(
    r"[-+]?\s*(\d*)\.(\d*)\s*(?:[eE]([+-]?\d{1,4})|\\cdot\s*10\s*\^\s*\{\s*([+-]?\d{1,4})\s*\})?"
)
DECIMAL = re.compile(r"[-+]?\s*(?:\d[\d,]*\.?\d*|\.\d+)")
"""A number written without fraction, root or operation."""
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_SPACED_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?: \d{3})+")
_SPACED_MIXED = re.compile(r"([-+]?)\s*(\d+)\s+(\d+)\s*/\s*(\d+)")


class TooLargeError(ArithmeticError):
    """The text is arithmetic, but a value in it is beyond what is computed here."""


@dataclass(frozen=True, slots=True)
class Number:
    """A rational number, and how far a float that printed it may be off."""

    value: Fraction
    last_digit: Fraction | None = None
    """One unit in the last printed place, for a decimal of `FLOAT_DIGITS` or more significant digits."""

    def equals(self, other: Number) -> bool:
        """Exactly equal, or as near as a float that was printed in full is to the value that it holds."""
        if self.value == other.value:
            return True
        slack = [n.last_digit for n in (self, other) if n.last_digit is not None]
        if not slack:
            return False
        difference = abs(self.value - other.value)
        if 0 in (self.value, other.value):
            return difference < FLOAT_NOISE
        return difference < max(slack) or difference <= FLOAT_NOISE * min(abs(self.value), abs(other.value))

    def scaled(self, factor: Fraction | int) -> Number:
        return Number(self.value * factor, self.last_digit and self.last_digit * abs(factor))


class NoNumberError(Exception):
    """Not an arithmetic expression of rational numbers."""


def parse_number(text: str) -> Number | None:
    """The number that a normalised text denotes; None if it denotes none, or none that is rational.

    Raises:
        TooLargeError: it is arithmetic on numbers, but needs more than `MAX_BITS` bits, say.
    """
    if not any(c.isdigit() for c in text) or (text[0] in "([" and "," in text):
        return None
    if mixed := _SPACED_MIXED.fullmatch(text):
        sign, *parts = mixed.groups()
        whole, numerator, denominator = map(int, parts)
        return _mixed_number(whole, Fraction(numerator, denominator), sign) if denominator else None
    text = without_separators(text)
    try:
        value = Reader(tokenize(text)).read()
    except (NoNumberError, ZeroDivisionError):
        return None
    return Number(value, _last_digit(text))


def without_separators(text: str) -> str:
    """Thousands without commas or spaces between them."""
    if _SPACED_THOUSANDS.fullmatch(text):
        text = text.replace(" ", "")
    return _THOUSANDS.sub(lambda match: match.group().replace(",", ""), text)


def _mixed_number(whole: int, part: Fraction, sign: str) -> Number | None:
    if not 0 <= part < 1:
        return None
    return Number(-(whole + part) if sign == "-" else whole + part)


def _last_digit(text: str) -> Fraction | None:
    """The unit of the last place of a printed float; None for anything else."""
    literal = _LITERAL.fullmatch(text.strip().removeprefix("(").removesuffix(")"))
    if literal is None:
        return None
    whole, decimals, *exponents = literal.groups()
    if len((whole + decimals).lstrip("0")) < FLOAT_DIGITS:
        return None
    exponent = int(next(filter(None, exponents), "0"))
    return Fraction(10) ** (exponent - len(decimals))


def tokenize(text: str, pattern: re.Pattern[str] = TOKEN) -> list[str]:
    """The tokens of a text that holds nothing else.

    Raises:
        NoNumberError: it holds something else.
        TooLargeError: there are more than `MAX_TOKENS`.
    """
    found, position, text = [], 0, text.rstrip()
    while position < len(text):
        match = pattern.match(text, position)
        if match is None:
            raise NoNumberError
        found.append(match.group().strip())
        position = match.end()
        if len(found) > MAX_TOKENS:
            raise TooLargeError(f"more than {MAX_TOKENS} numbers and signs")
    return found


class Reader:
    """One pass over the tokens; every method leaves `position` after what it read.

    The values are `Fraction`s here; `mtpo.constant_equality` overrides the methods below for others.
    """

    FACTORS: ClassVar[frozenset[str]] = frozenset({"(", "[", "\\frac", "\\sqrt", "\\binom"})
    """Tokens that multiply what stands before them without a sign."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.position = 0
        self.depth = 0

    def read(self) -> Any:
        value = self._sum()
        if self.position != len(self.tokens):
            raise NoNumberError
        return value

    def _peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def _take(self, *expected: str) -> str:
        token = self._peek()
        if not token or (expected and token not in expected):
            raise NoNumberError
        self.position += 1
        return token

    def check(self, value: Any) -> None:
        """
        Raises:
            TooLargeError: the value is beyond what is computed.
        """
        if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
            raise TooLargeError(f"more than {MAX_BITS} bits")

    def rational(self, value: Fraction) -> Any:
        return value

    def integer(self, value: Any) -> int:
        """
        Raises:
            NoNumberError: the value is none.
        """
        if value.denominator != 1:
            raise NoNumberError
        return int(value)

    def mixed(self, whole: Fraction) -> Any:
        r"""Where a fraction follows a whole number: $3\frac{1}{2}$ is 3 + 1/2."""
        part = self._atom()
        if not 0 <= part < 1:
            raise NoNumberError
        return whole + part

    def root(self, value: Any, degree: int) -> Any:
        return _root(value, degree)

    def power(self, base: Any, exponent: Any) -> Any:
        return _power(base, exponent)

    def named(self, token: str) -> Any:
        """The value of a token that is no number, bracket or operation."""
        raise NoNumberError

    def _sum(self) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooLargeError(f"nested more than {MAX_DEPTH} deep")
        value = self._product()
        while self._peek() in ("+", "-"):
            value = value + self._product() if self._take() == "+" else value - self._product()
            self.check(value)
        self.depth -= 1
        return value

    def _product(self) -> Any:
        value = self._signed()
        divided = False
        while token := self._peek():
            if token in ("*", "\\cdot", "/"):
                self._take()
                factor = self._signed()
                value = value / factor if token == "/" else value * factor
                divided = token == "/"
            elif token in self.FACTORS and not divided:
                value *= self._power()  # after a division, 1/2(3) could mean either
            else:
                break
            self.check(value)
        return value

    def _signed(self) -> Any:
        sign = 1
        while self._peek() in ("+", "-"):
            sign = -sign if self._take() == "-" else sign
        return sign * self._power()

    def _power(self) -> Any:
        value = self._atom()
        if self._peek() == "!":  # n!! is another function, and not read
            self._take()
            value = self.rational(_factorial(self.integer(value)))
        if self._peek() == "^":
            self._take()
            self._take("{")
            exponent = self._sum()
            self._take("}")
            value = self.power(value, exponent)
            self.check(value)
        return value

    def _atom(self) -> Any:
        token = self._take()
        if token in ("(", "[", "{"):
            value = self._sum()
            self._take({"(": ")", "[": "]", "{": "}"}[token])
            return value
        if token == "\\frac":
            numerator = self._group()
            return numerator / self._group()
        if token == "\\binom":
            n, k = self.integer(self._group()), self.integer(self._group())
            return self.rational(_binomial(n, k))
        if token == "\\sqrt":
            degree = 2
            if self._peek() == "[":
                self._take()
                degree = self.integer(self._sum())
                self._take("]")
            if not 2 <= degree <= MAX_ROOT:
                raise NoNumberError
            return self.root(self._group(), degree)
        if token[0].isdigit() or token[0] == ".":
            return self._literal(token)
        return self.named(token)

    def _group(self) -> Any:
        self._take("{")
        value = self._sum()
        self._take("}")
        return value

    def _literal(self, token: str) -> Any:
        if "\\" in token:
            return self.rational(_repeating(token))
        value = _decimal(token)
        is_mixed = self._peek() == "\\frac" and token.isdigit()
        return self.mixed(value) if is_mixed else self.rational(value)


def _decimal(token: str) -> Fraction:
    mantissa, _, exponent = token.lower().partition("e")
    if exponent and abs(int(exponent)) > 9999:
        raise TooLargeError(f"exponent {exponent}")
    whole, _, decimals = mantissa.partition(".")
    value = Fraction(int(whole + decimals or "0"), 10 ** len(decimals))
    return value * Fraction(10) ** int(exponent or 0)


def _repeating(token: str) -> Fraction:
    fixed, _, period = token.rstrip("}").partition("\\")
    period = period.partition("{")[2]
    whole, _, decimals = fixed.partition(".")
    nines = (10 ** len(period) - 1) * 10 ** len(decimals)
    return Fraction(int(whole + decimals or "0"), 10 ** len(decimals)) + Fraction(int(period), nines)


def _factorial(value: int) -> Fraction:
    if value < 0:
        raise NoNumberError
    if value > MAX_FACTORIAL:
        raise TooLargeError(f"the factorial of more than {MAX_FACTORIAL}")
    return Fraction(math.factorial(value))


def _binomial(n: int, k: int) -> Fraction:
    if not 0 <= k <= n:
        raise NoNumberError
    if n > MAX_FACTORIAL:
        raise TooLargeError(f"a binomial of more than {MAX_FACTORIAL}")
    return Fraction(math.comb(n, k))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        if exponent.denominator > MAX_ROOT:
            raise NoNumberError
        base = _root(base, exponent.denominator)
    if base == 0 and exponent <= 0:
        raise NoNumberError
    power = exponent.numerator
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(base) != 1 and base != 0 and bits * abs(power) > MAX_BITS:
        raise TooLargeError(f"a power of more than {MAX_BITS} bits")
    return base**power if abs(base) != 1 else base ** (power % 2)


def _root(value: Fraction, degree: int) -> Fraction:
    """The root if it is rational; a negative number has none here."""
    if value < 0:
        raise NoNumberError
    return Fraction(_integer_root(value.numerator, degree), _integer_root(value.denominator, degree))


def _integer_root(value: int, degree: int) -> int:
    if degree == 2:
        root = math.isqrt(value)
    else:
        low, high = 0, 1 << (value.bit_length() // degree + 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle**degree <= value else (low, middle - 1)
        root = low
    if root**degree != value:
        raise NoNumberError
    return root
