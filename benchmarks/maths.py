"""Maths trajectories with known answers, as cells that a code interpreter runs.

Every cell prints, and only prints, so that all interpreters show the same text; every cell but the first
needs the state that the cells before it left. The answers are worked out here with integers and fractions.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import cycle, islice
from math import comb, gcd

from mtpo.errors import MtpoError


class WrongAnswerError(MtpoError):
    """An interpreter showed something else than the known answer."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell and what it prints, without the last newline."""

    code: str
    text: str


@dataclass(frozen=True, slots=True)
class MathsTrajectory:
    kind: str
    """ "plain", "numpy" or "sympy": what its first cell imports."""
    cells: tuple[Cell, ...]


def maths_trajectories(num: int, turns: int, seed: int) -> list[MathsTrajectory]:
    """`num` trajectories of `turns` cells, the kinds in turn. The same seed gives the same ones."""
    rng = random.Random(seed)
    kinds = {"plain": _counting, "numpy": _matrices, "sympy": _polynomials}
    return [
        MathsTrajectory(kind, tuple(islice(kinds[kind](rng), turns))) for kind in islice(cycle(kinds), num)
    ]


def check_answers(shown: Sequence[Sequence[str]], trajectories: Sequence[MathsTrajectory]) -> None:
    """Compare what each cell of each trajectory showed with the known answers.

    Raises:
        WrongAnswerError: one differs.
    """
    for texts, trajectory in zip(shown, trajectories, strict=True):
        for text, cell in zip(texts, trajectory.cells, strict=True):
            if text != cell.text:
                raise WrongAnswerError(f"{cell.code!r} showed {text!r}, but the answer is {cell.text!r}")


def _counting(rng: random.Random) -> Iterator[Cell]:
    """Binomial coefficients, remainders and divisors in plain Python."""
    n, k = rng.randint(10, 40), rng.randint(2, 6)
    ways = comb(n, k)
    yield Cell(
        f"from math import comb, gcd\n\nn, k = {n}, {k}\nways = comb(n, k)\nprint('ways:', ways)",
        f"ways: {ways}",
    )
    while True:
        a, b = rng.randint(2, 99), rng.randint(1, 99)
        ways = (ways * a + b) % 1_000_003
        yield Cell(
            f"def step(value):\n    return (value * {a} + {b}) % 1_000_003\n\n"
            "ways = step(ways)\nprint(ways, gcd(ways, 360))",
            f"{ways} {gcd(ways, 360)}",
        )
        m = rng.randint(100, 999)
        divisors = [d for d in range(1, m + 1) if m % d == 0]
        ways += sum(divisors)
        yield Cell(
            f"divisors = [d for d in range(1, {m + 1}) if {m} % d == 0]\nways += sum(divisors)\n"
            "for d in divisors:\n    print(d, end=' ')\nprint(f'{ways=}')",
            " ".join(map(str, divisors)) + f" ways={ways}",
        )


def _matrices(rng: random.Random) -> Iterator[Cell]:
    """A vector that a 2 x 2 matrix moves about, in numpy."""
    (a, b), (c, d) = [[rng.randint(1, 9) for _ in range(2)] for _ in range(2)]
    x, y = rng.randint(1, 9), rng.randint(1, 9)
    yield Cell(
        f"import numpy as np\n\nA = np.array([[{a}, {b}], [{c}, {d}]])\nv = np.array([{x}, {y}])\n"
        "print(round(float(np.linalg.det(A))), A.trace())",
        f"{a * d - b * c} {a + d}",
    )
    while True:
        x, y = (a * x + b * y) % 10_007, (c * x + d * y) % 10_007
        yield Cell("v = (A @ v) % 10_007\nprint(v.tolist(), v.sum())", f"[{x}, {y}] {x + y}")
        m = rng.randint(20, 90)
        squares = [n * n for n in range(1, m + 1) if n % 3 == x % 3]
        yield Cell(
            f"n = np.arange(1, {m + 1})\nsquares = n[n % 3 == v[0] % 3] ** 2\nprint(squares.sum(), len(squares))",
            f"{sum(squares)} {len(squares)}",
        )


def _polynomials(rng: random.Random) -> Iterator[Cell]:
    """A quadratic with integer roots: solved, integrated and shifted, in sympy."""
    r, s = sorted(rng.sample(range(1, 20), 2))
    yield Cell(
        "from sympy import expand, integrate, solve, symbols\n\nx = symbols('x')\n"
        f"p = expand((x - {r}) * (x - {s}))\nprint(p, solve(p, x))",
        f"x**2 - {r + s}*x + {r * s} [{r}, {s}]",
    )
    while True:
        m = rng.randint(1, 9)
        area = Fraction(m**3, 3) - Fraction((r + s) * m**2, 2) + r * s * m
        yield Cell(
            f"area = integrate(p, (x, 0, {m}))\nprint(area, p.subs(x, {m}))", f"{area} {(m - r) * (m - s)}"
        )
        r, s = r - m, s - m
        yield Cell(f"p = expand(p.subs(x, x + {m}))\nprint(solve(p, x))", f"[{r}, {s}]")
