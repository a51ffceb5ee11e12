r"""Whether two constants are equal: numbers with roots, $\pi$, $e$ and $i$, such as $2\sqrt{3} + \pi$.

The reader of `mtpo.exact_numbers` computes their values to `DIGITS` digits, without any algebra and without
the parser of LaTeX. A text that holds anything else, a variable or a sine, is left to `mtpo.symbolic_equality`.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

from mtpo.exact_numbers import TOKEN, NoNumberError, Reader, TooLargeError, tokenize, without_separators
from mtpo.symbolic_equality import DIGITS, agree, agreement

MAX_MAGNITUDE = 20_000
"""Bits of the exponent of a value: a power with such an exponent takes a millisecond."""
_TOKEN = re.compile(rf"{TOKEN.pattern}|\s*(?P<letter>[ei](?![A-Za-z_]))")
_CONSTANT = re.compile(
    r"(?:\\(?:frac|sqrt|binom|cdot|pi|overline|bar)(?![A-Za-z])|[-\d.,\s+*/^!(){}\[\]]|[ei](?![A-Za-z_]))+"
)


def equal_constants(gold: str, answer: str, within: float = 0.0) -> bool | None:
    """Whether two normalised constants are equal; None if one is none.

    Args:
        within: relative difference up to which they are equal.
    """
    if not _CONSTANT.fullmatch(gold) or not _CONSTANT.fullmatch(answer):
        return None
    import mpmath

    with mpmath.workdps(DIGITS):
        try:
            first, second = _value(gold), _value(answer)
        except (NoNumberError, TooLargeError, ArithmeticError, ValueError):
            return None
        return agree(first, second, -math.log10(within) if within else agreement(gold, answer))


def _value(text: str) -> Any:
    return _ConstantReader(tokenize(without_separators(text), _TOKEN)).read()


class _ConstantReader(Reader):
    """All values are mpmath's complex numbers."""

    FACTORS = Reader.FACTORS | {"\\pi", "e", "i"}

    def check(self, value: Any) -> None:
        import mpmath

        if value and abs(mpmath.mag(value)) > MAX_MAGNITUDE:
            raise TooLargeError(f"beyond 2^{MAX_MAGNITUDE}")

    def rational(self, value: Fraction) -> Any:
        import mpmath

        return mpmath.mpc(value.numerator) / value.denominator

    def integer(self, value: Any) -> int:
        if value.imag or value.real != int(value.real):
            raise NoNumberError
        return int(value.real)

    def mixed(self, whole: Fraction) -> Any:
        r"""3 + 1/2 for $3\frac{1}{2}$, but a product for $3\frac{\sqrt{2}}{2}$."""
        ahead = "".join(self.tokens[self.position : self.position + 7])
        part = self._atom()
        is_fraction = re.fullmatch(r"\\frac\{\d+\}\{\d+\}", ahead)
        return self.rational(whole) + part if is_fraction else self.rational(whole) * part

    def root(self, value: Any, degree: int) -> Any:
        import mpmath

        if degree > 2 and (value.imag or value.real < 0):
            raise NoNumberError  # the real root, or the principal one?
        return mpmath.root(value, degree)

    def power(self, base: Any, exponent: Any) -> Any:
        import mpmath

        if base == 0 and exponent.real <= 0:
            raise NoNumberError
        return mpmath.power(base, exponent)

    def named(self, token: str) -> Any:
        import mpmath

        names = {"\\pi": mpmath.pi, "e": mpmath.e, "i": mpmath.mpc(0, 1)}
        if token not in names:
            raise NoNumberError
        return mpmath.mpc(names[token])
