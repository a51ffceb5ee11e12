r"""Equality of expressions by high-precision evaluation at random points.

math-verify's LaTeX parser makes a tree of a text that was checked first: only known commands, names and
sizes reach it. The tree is then evaluated by mpmath, node by node; nothing is simplified, expanded or
sympified, so the cost is that of one evaluation. Two expressions are equal if their values agree to many
digits at every point, two equations if their sides' differences have one ratio at all points.

`check_readable` needs neither sympy nor math-verify; the rest is for worker processes.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from mtpo.exact_numbers import FLOAT_DIGITS

MAX_CHARS = 600
MAX_NESTING = 24
MAX_EXPONENT_DIGITS = 4
DIGITS = 80
"""Working precision in decimal digits."""
AGREEMENT = 40
"""Two values are equal if they agree to so many digits: far beyond coincidence, far within precision."""
FLOAT_AGREEMENT = 12
"""The same, if one side holds a float that was printed in full."""
POINTS = 6
_SCALES = (49_999, 9_973, 1_009)

_READABLE = """frac sqrt binom cdot pi sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp
    lfloor rfloor lceil rceil max min alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa
    lambda mu nu xi rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega"""
_COMMANDS = frozenset(_READABLE.split())
_DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d+)")
_QUOTIENT_FACTOR = re.compile(
    r"(?<![\w}.)])(\d+)\s*/\s*(\d+)(?=\s*(?:\\pi|\\sqrt|i(?![a-z]))|\s+[A-Za-z(\\])"
)
_LETTER_FACTOR = re.compile(
    r"(?P<function>\\(?!(?:pi|alpha|beta|gamma|theta|lambda|phi|omega)(?![A-Za-z]))[A-Za-z]+)"
    r"|(?:\\[a-z]+|[a-eijk-zA-Z])(?=\s*\()"
)
_FUNCTION_QUOTIENT = re.compile(
    r"(\\(?:sin|cos|tan|cot|sec|csc|ln))\s*(\d*[A-Za-z]|\\[a-z]+)\s*/(?=\s*\\(?:sin|cos|tan|cot|sec|csc|ln))"
)
_LONG_FLOAT = re.compile(rf"(?=[\d.]{{{FLOAT_DIGITS + 1},}})\d+\.\d+")


class UnreadableError(ValueError):
    """The text is no expression that may be given to the parser."""


def check_readable(text: str) -> None:
    """Refuse what is no expression, and what would be slow to parse or evaluate.

    Raises:
        UnreadableError: naming the first reason.
    """
    if len(text) > MAX_CHARS:
        raise UnreadableError(f"more than {MAX_CHARS} characters")
    if re.search(r"[^-\w\s\\{}()\[\]+*/^!|.,=]", text) or "__" in text:
        raise UnreadableError("a character that no expression has")
    for command in re.findall(r"\\([A-Za-z]+|.)", text):
        if command not in _COMMANDS:
            raise UnreadableError(f"the command \\{command}")
    if re.search(r"(?<!\\)(?<![A-Za-z])[A-Za-z]{5,}", text):
        raise UnreadableError("a word")
    if re.search(r"\d\s*_", text):
        raise UnreadableError("a numeral with a base")
    if re.search(r"\d{5,}\s*!|!\s*!", text):
        raise UnreadableError("a large factorial")
    _check_nesting(text)


def _check_nesting(text: str) -> None:
    """Bound the depth, and the exponents: at most one level of powers in an exponent, and no long number."""
    depth, exponents = 0, []
    for match in re.finditer(r"\^\s*\{?|[{(\[]|[})\]]", text):
        token = match.group()
        if token[0] == "^":
            if len(exponents) > 1:
                raise UnreadableError("a tower of powers")
            if re.match(rf"[-+\s(]*\d{{{MAX_EXPONENT_DIGITS + 1},}}", text[match.end() :]):
                raise UnreadableError("a large exponent")
            base = re.search(r"(\d+)\s*$", text[: match.start()])
            power = re.match(r"\s*(\d+)", text[match.end() :])
            digits = len(base.group(1)) * int(power.group(1)) if base and power else 0
            if exponents and digits > MAX_EXPONENT_DIGITS:
                raise UnreadableError("a large exponent")
        if token[-1] in "{([":
            depth += 1
            if token[0] == "^":
                exponents.append(depth)
        elif token[0] in "})]":
            if exponents and exponents[-1] == depth:
                exponents.pop()
            depth -= 1
        if depth > MAX_NESTING or depth < 0:
            raise UnreadableError("brackets nested too deep, or unbalanced")
    if depth:
        raise UnreadableError("brackets that are not closed")


def equal_expressions(gold: str, answer: str, constants_within: float = 0.0) -> bool | None:
    """Whether two expressions, or two equations, are equal; None if one cannot be read or evaluated.

    Args:
        constants_within: relative difference up to which expressions without variables are equal as well.
    """
    import mpmath

    with mpmath.workdps(DIGITS):
        try:
            if "=" in gold or "=" in answer:
                return _same_ratio(_sides(gold), _sides(answer))
            sides = _parse(gold), _parse(answer)
            if constants_within and not any(_has_variables(side) for side in sides):
                digits = -math.log10(constants_within)
            else:
                digits = agreement(gold, answer)
            return _same_values(*sides, digits=digits)
        except UnreadableError:
            return None


def agreement(*texts: str) -> int:
    """To how many digits the values of two texts must agree."""
    return FLOAT_AGREEMENT if any(_LONG_FLOAT.search(text) for text in texts) else AGREEMENT


def _has_variables(expression: Any) -> bool:
    return any(symbol.name != "i" for symbol in getattr(expression, "free_symbols", ()))


def _sides(equation: str) -> tuple[Any, Any]:
    left, equals, right = equation.partition("=")
    if not equals or "=" in right:
        raise UnreadableError("not one equation")
    return _parse(left), _parse(right)


@lru_cache(maxsize=10_000)
def _parse(text: str) -> Any:
    """The sympy tree of a normalised expression.

    Raises:
        UnreadableError: the text was refused, or the parser does not understand it.
    """
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

    check_readable(text)
    try:
        return latex2sympy(
            _for_parser(text),
            normalization_config=None,
            conversion_config=ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False),
        )
    except MemoryError:
        raise
    except Exception as error:  # the parser raises whatever its grammar or sympy raises
        raise UnreadableError(f"{type(error).__name__}: {error}") from error


def warm_up() -> None:
    """Import the parser, and let its tables grow by what most expressions need of them."""
    for text in (r"x^{2} - \frac{2\sqrt{3}y}{5} + 1", r"4 \sin (3x) - \tan (\pi/180)"):
        _parse(text)


def _for_parser(text: str) -> str:
    """Spell out what the parser would read otherwise: decimals (as 53-bit floats), mixed numbers, products."""
    text = _DECIMAL.sub(
        lambda m: rf"\frac{{{int(m.group(1) + m.group(2))}}}{{{10 ** len(m.group(2))}}}", text
    )
    text = _QUOTIENT_FACTOR.sub(r"\\frac{\1}{\2} ", text)
    text = re.sub(r"(?<![\d.}^_{])(\d+)\s*(\\frac\{\d+\}\{\d+\})", r"(\1+\2)", text)
    text = re.sub(r"\\log\s+_", r"\\log_", text)
    text = _FUNCTION_QUOTIENT.sub(r"\1(\2)/", text)
    text = _LETTER_FACTOR.sub(lambda m: m["function"] or rf"{m.group()}\cdot ", text)
    return re.sub(r"\)\s*(?=[(A-Za-z\d]|\\(?!cdot|rfloor|rceil))", r")\\cdot ", text)


def _same_values(gold: Any, answer: Any, digits: float) -> bool | None:
    """Equal at all positive points, and wherever else both are real."""
    compared = 0
    for point, is_positive in _points():
        pair = _evaluate(gold, point), _evaluate(answer, point)
        if pair[0] is None or pair[1] is None:
            continue
        if not is_positive and any(abs(value.imag) > 1e-30 * (1 + abs(value)) for value in pair):
            continue
        if not agree(*pair, digits):
            return False
        compared += 1
    return True if compared > 1 else None


def _same_ratio(gold: tuple[Any, Any], answer: tuple[Any, Any]) -> bool | None:
    """The differences of the sides have the same ratio at all points.

    An equation that always holds, or that holds no variable, has no such ratio and equals no other.
    """
    differences: list[tuple[Any, Any]] = []
    for point, _ in _points():
        values = [_evaluate(side, point) for side in (*gold, *answer)]
        if any(value is None for value in values):
            continue
        if agree(values[0], values[1], AGREEMENT) or agree(values[2], values[3], AGREEMENT):
            return False
        differences.append((values[0] - values[1], values[2] - values[3]))
    if len(differences) < 2:
        return None
    first, *others = differences
    if all(agree(first[0], other[0], AGREEMENT) for other in others):
        return False
    return all(agree(first[0] * other[1], first[1] * other[0], AGREEMENT) for other in others)


def agree(a: Any, b: Any, digits: float) -> bool:
    """Relatively to so many digits, or both vanish: values that cancel leave an error of the working precision."""
    from mpmath import mpf

    size = max(abs(a), abs(b))
    return abs(a - b) <= size * mpf(10) ** -digits or size < mpf(10) ** (10 - DIGITS)


def _points() -> Iterator[tuple[Callable[[str], Any], bool]]:
    """Random rational values for variables by name, always the same: positive at half of the points."""
    from mpmath import mpf

    for index in range(POINTS):
        is_positive, scale = index < POINTS // 2, _SCALES[index % len(_SCALES)]

        def value(name: str, index: int = index, is_positive: bool = is_positive, scale: int = scale) -> Any:
            seed = int.from_bytes(hashlib.sha256(f"{index}/{name}".encode()).digest()[:6], "big")
            magnitude = mpf(seed % 99_991 + 17_011) / scale  # small, middling and large points
            return magnitude if is_positive or seed % 7 < 3 else -magnitude

        yield value, is_positive


def _evaluate(expression: Any, point: Callable[[str], Any]) -> Any:
    """The complex value of a tree at a point; None where it has none.

    Raises:
        UnreadableError: a node of the tree is no function of numbers.
    """
    import mpmath
    from mpmath.libmp import NoConvergence

    try:
        value = mpmath.mpc(_node(expression, point))
    except (ArithmeticError, ValueError, NoConvergence):
        return None
    return value if mpmath.isfinite(value) else None


def _node(node: Any, point: Callable[[str], Any]) -> Any:
    import mpmath
    import sympy
    from sympy.core.function import AppliedUndef

    if isinstance(node, sympy.Rational):
        return mpmath.mpf(node.p) / node.q
    if isinstance(node, sympy.Symbol):
        return mpmath.mpc(0, 1) if node.name == "i" else point(node.name)
    if isinstance(node, sympy.Expr) and not node.args:
        constants: Mapping[Any, Any] = {sympy.pi: mpmath.pi, sympy.E: mpmath.e, sympy.I: mpmath.mpc(0, 1)}
        if node in constants:
            return +constants[node]
    name = node.func.__name__
    if isinstance(node, AppliedUndef) and name not in _FUNCTIONS:
        return mpmath.fsum(mpmath.sin(point(name) * _node(argument, point)) for argument in node.args)
    if name not in _FUNCTIONS:
        raise UnreadableError(f"{name} is no function that is evaluated here")
    return _FUNCTIONS[name](*(_node(argument, point) for argument in node.args))


def _product(*factors: Any) -> Any:
    import mpmath

    result = mpmath.mpf(1)
    for factor in factors:
        result *= factor
    return result


def _mpmath(name: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        import mpmath

        return getattr(mpmath, name)(*arguments)

    return call


def _periodic(name: str) -> Callable[..., Any]:
    """A function whose value at a huge argument would cost as many digits of pi, and be noise without them."""

    def call(argument: Any) -> Any:
        import mpmath

        if abs(argument) > mpmath.mpf(10) ** (DIGITS - AGREEMENT):
            raise ArithmeticError(f"{name} of a huge number")
        return getattr(mpmath, name)(argument)

    return call


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "Add": lambda *terms: sum(terms),
    "Mul": _product,
    "Pow": _mpmath("power"),
    "exp": _mpmath("exp"),
    "log": _mpmath("log"),
    "Abs": abs,
    "factorial": _mpmath("factorial"),
    "binomial": _mpmath("binomial"),
    "floor": _mpmath("floor"),
    "ceiling": _mpmath("ceil"),
    "gamma": _mpmath("gamma"),
    "\\zeta": _mpmath("zeta"),
    "zeta": _mpmath("zeta"),
    "Max": max,
    "Min": min,
    **{name: _periodic(name) for name in ["sin", "cos", "tan", "cot", "sec", "csc"]},
    **{name: _mpmath(name) for name in ["sinh", "cosh", "tanh", "asin", "acos", "atan", "acot"]},
    "UnevaluatedExpr": lambda x: x,
}
