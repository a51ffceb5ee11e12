"""What the fork server does once so that no session has to: the first use of a library is its slowest.

sympy imports much of itself, fills its caches and compiles its printers when it is first asked to solve
something; numpy, and the shell's own machinery for values and errors, do so to a lesser degree. Forked
sessions find all that done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from sandbox import syscalls

HUGE_PAGE = 2**21
MADV_COLLAPSE = 25  # <linux/mman.h>

WARM_UPS = {
    "numpy": """
import numpy as np
a = np.array([[2.0, 1.0], [1.0, 3.0]])
np.linalg.solve(a, a[0]), np.linalg.det(a), np.linalg.inv(a), np.linalg.eig(a), a @ a
repr(a), str(a.sum()), repr(np.arange(3)), np.roots([1, -3, 2]), np.linspace(0, 1, 3).mean()
""",
    "sympy": """
import sympy as sp
x, y = sp.symbols("x y")
n = sp.symbols("n", integer=True, positive=True)
str(sp.solve(x**2 - 5 * x + 6, x)), str(sp.solve([x + y - 3, x - y - 1], [x, y])), sp.solveset(x**2 - 4, x)
sp.solve(sp.Eq(2 * x + 3, 7), x), sp.solve(sp.sqrt(x) - 2, x), sp.nsolve(x**2 - 2, 1)
str(sp.integrate(x * sp.sin(x), x)), sp.integrate(x**2, (x, 0, 1)), sp.diff(sp.exp(x) * sp.cos(x), x)
sp.limit(sp.sin(x) / x, x, 0), sp.series(sp.exp(x), x, 0, 4), sp.summation(n**2, (n, 1, 10))
sp.simplify(sp.sin(x) ** 2 + sp.cos(x) ** 2), sp.factor(x**3 - 1), sp.expand((x + 1) ** 3), sp.apart(1 / (x**2 - 1))
sp.factorint(360), sp.isprime(97), sp.gcd(12, 18), sp.binomial(5, 2), sp.Rational(1, 3) + sp.Rational(1, 6)
sp.N(sp.pi, 20), sp.sqrt(8), sp.Matrix([[1, 2], [3, 4]]).inv(), sp.latex(x**2 / y), sp.sympify("x**2 + 1").subs(x, 3)
""",
}
CELLS = (
    "import math, itertools, fractions, collections, decimal, statistics, functools, re, random, string",
    "from fractions import Fraction\nprint([1, 2.5, 'a'], {1: 2})\nFraction(1, 3)",
    "x = [i**2 for i in range(3)]\nx",
    "def f(n):\n    return 1 / n\nf(0)",
    "for i in range(3) print(i)",
)
"""Run as a client would have them run."""


def use(modules: Iterable[str]) -> None:
    """Use the modules that are known here, and leave nothing behind but what they keep for themselves."""
    for name in modules:
        if code := WARM_UPS.get(name):
            exec(code, {})


def merge_pages(maps: str) -> None:
    """Make huge pages of the heap, where Linux can (6.1): a fork then copies, and its end drops, one entry for each
    of them instead of 512.

    Args:
        maps: /proc/self/maps.
    """
    for line in maps.splitlines():
        addresses, rights, _, _, _, *name = line.split()
        if rights.startswith("rw") and name in ([], ["[heap]"]):
            start, end = (int(address, 16) for address in addresses.split("-"))
            for page in range(-(-start // HUGE_PAGE) * HUGE_PAGE, end - HUGE_PAGE + 1, HUGE_PAGE):
                with contextlib.suppress(OSError):  # nothing is there, or no huge page is free
                    syscalls.call("madvise", page, HUGE_PAGE, MADV_COLLAPSE)
