r"""One spelling for the many that mean the same: the text of an answer, normalised.

The result is LaTeX of a small dialect: `\frac{a}{b}`, `\sqrt{a}`, `\cdot`, `\le`, `\infty`, `\lor`, `\text{...}`.
Unicode symbols and Python's spelling (`x**2`, `sqrt(3)`, `Rational(3, 4)`, `oo`) become the same dialect by
rewriting text; nothing is ever evaluated. Values are not touched: `0.50` and `1/2` stay what they are.
"""

# ruff: noqa: RUF001  the characters that look like others are what is replaced here
from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache

MAX_CHARS = 2000
"""Longer answers are not read: no gold comes near, and every pass below stays cheap."""
MAX_NESTING = 50
"""Nor are those with more brackets inside each other, so that no reader recurses deeper."""

_FUNCTION_NAMES = """arcsin arccos arctan arccot asin acos atan sinh cosh tanh sin cos tan cot sec csc ln log exp
    det gcd lcm max min sqrt"""
FUNCTIONS = tuple(_FUNCTION_NAMES.split())
_TRIG = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)(?![a-z])")

_UNICODE = {
    **dict.fromkeys("\u2212\u2013\u2014\u2010\u2011", "-"),
    **dict.fromkeys("×⋅·∙∗", r"\cdot "),
    **dict.fromkeys("°º", r"^\circ "),
    **dict.fromkeys("∅⌀", r"\emptyset "),
    **{
        "÷": "/",
        "⁄": "/",
        "√": r"\sqrt ",
        "∛": r"\sqrt[3]",
        "∞": r"\infty ",
        "π": r"\pi ",
        "±": r"\pm ",
        "∓": r"\mp ",
        "θ": r"\theta ",
    },
    **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "≡": r"\equiv ", "∈": r"\in "},
    **{"∪": r"\cup ", "∩": r"\cap ", "∧": r" \land ", "∨": r" \lor ", "ℝ": r"\mathbb{R}", "∖": r"\setminus "},
    **{"α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ", "φ": r"\phi ", "ω": r"\omega "},
    **{"⟨": r"\langle ", "⟩": r"\rangle ", "“": '"', "”": '"', "‘": "'", "’": "'", "′": "'", "％": "%"},
}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")

_Rule = tuple[re.Pattern[str], str]


def _rules(*pairs: tuple[str, str]) -> tuple[_Rule, ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


# In this order: separators of thousands must be known before `\,` and `\!` are taken for spacing.
_MARKUP = _rules(
    (r"^\s*\*\*([^*]*)\*\*\s*$", r"\1"),
    (r"^\s*(?:[Tt]he )?(?:[Ff]inal )?[Aa]nswer(?: is)?\s*:?\s+(?=[-\d\\$(])", ""),
    (
        r"(\d*\.\d{0,9}?)(\d|\d{2,6}?)\2{1,9}(?<=\d{3})(?:\.{3}|…|\s*\\[lc]?dots(?![A-Za-z]))",
        r"\1\\overline{\2}",
    ),
    (r"(\.\d*)\\(?:dot|bar)\{(\d+)\}", r"\1\\overline{\2}"),
    (r"</?s>|<eos>|<pad>|<(?:start|end)_of_turn>|<\|[^|<>]{1,30}\|>", ""),
    (r"(?<=\d)(?:\{,\}|,\s*\\!\s*|\\,|\\!)(?=\d{3}(?!\d))", ""),
    (r"\\(?:q?quad|thinspace|enspace|hfill|allowbreak)(?![A-Za-z])|\\[,;:> ]|~|\\$", " "),
    (
        r"\\!|\\(?:checkmark|blacksquare|square|Box|displaystyle|textstyle|limits|nolimits|hline|strut)(?![A-Za-z])",
        "",
    ),
    (r"\\[hv]space\*?\{[^{}]*\}|\\h?phantom\{[^{}]*\}", " "),
    (r"\\(?:left|right|middle)(?![A-Za-z])\s*\.?|\\[bB]igg?[lrm]?(?![A-Za-z])", ""),
    (r"\\color\{[^{}]*\}|\\textcolor\{[^{}]*\}|(?<!\\)\$|\\[()\[\]]", ""),
    (r"\\overline\{([A-Z]{2})\}", r"\1"),
    (r"\\lbrace(?![A-Za-z])", r"\\{"),
    (r"\\rbrace(?![A-Za-z])", r"\\}"),
    (r"(?<!text)(?<!mbox)(?<!mathrm)\{([:+\-*/=<>!])\}", r"\1"),
)

_SYMBOLS = _rules(
    (r"\\(?:times|cdot|ast|bullet)(?![A-Za-z])", r"\\cdot "),
    (r"\\div(?![A-Za-z])", "/"),
    (r"\\colon(?![A-Za-z])", ":"),
    (r"\\(?:leqslant|leqq|leq|le)(?![A-Za-z])|<=|=<", r"\\le "),
    (r"\\(?:geqslant|geqq|geq|ge)(?![A-Za-z])|>=", r"\\ge "),
    (r"\\(?:neq|ne)(?![A-Za-z])|\\not\s*=|!=", r"\\ne "),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"==|:=", "="),
    (r"\\(?:varnothing|emptyset)(?![A-Za-z])", r"\\emptyset "),
    (r"\\(?:infin|infty)(?![A-Za-z])", r"\\infty "),
    (r"\\(?:backslash|setminus|smallsetminus)(?![A-Za-z])", r"\\setminus "),
    (r"\\(?:R|Reals|reals)(?![A-Za-z])", r"\\mathbb{R}"),
    (
        r"\\(?:degrees?)(?![A-Za-z])|\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![A-Za-z])|(?<=\d)\^\s*\{?o(?![A-Za-z])\}?",
        "°",
    ),
    (r"\\lvert|\\rvert|\\vert|\\mid(?![A-Za-z])", "|"),
    (r"\\(?:wedge|land)(?![A-Za-z])", r" \\land "),
    (r"\\(?:vee|lor)(?![A-Za-z])", r" \\lor "),
    (r"\\(?:[dtc]|nice|s)frac(?![A-Za-z])", r"\\frac"),
    (r"^\\text\{(?![^{}]*\bnot\b)[^{}]{3,}(?:\bis|\bare|:|=)\}\s*(?=[^\s.])", ""),
    (r"\\frac\{\s*\\text\{([^{}]*)\}\s*\}\{\s*\\text\{([^{}]*)\}\s*\}", r"\\text{\1/\2}"),
    (r"\{?\s*(\d+)\s*\\choose\s*(\d+)\s*\}?", r"\\binom{\1}{\2}"),
    (r"(?:\{\})?[\^_]\{?(\d+)\}?\s*C_\{?(\d+)\}?|(?<![A-Za-z\\])C\((\d+),\s*(\d+)\)", r"\\binom{\1\3}{\2\4}"),
    (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
    (r"(?<![\\%])%", r"\\%"),
)

_NAMES = r"(?<![\\A-Za-z_])"
_PYTHON = _rules(
    (_NAMES + r"(?:np|numpy|math|cmath|sympy|sp|mpmath|mp|fractions|decimal)\.", ""),
    (_NAMES + r"(?:Rational|Fraction)\(\s*(-?\d+)\s*,\s*(\d+)\s*\)", r"\\frac{\1}{\2}"),
    (
        _NAMES + r"(?:Rational|Fraction|Integer|Float|Decimal|mpf|float(?:16|32|64|128)|u?int(?:8|16|32|64))"
        r"(?=\()",
        "",
    ),
    (_NAMES + r"(?:array|tensor)(?=\(\s*-?[\d.]+\s*\))", ""),
    (_NAMES + r"log\(\s*([^(),]+),\s*([^(),]+)\)", r"\\frac{\\ln(\1)}{\\ln(\2)}"),
    (_NAMES + r"cbrt(?=\s*[\d({])", r"\\sqrt[3]"),
    (r"(?<=\d)[eE]([-+]?\d{1,4})(?![\d.A-Za-z_])", r"\\cdot 10^{\1}"),
    (r"\(\s*(['\"])([^'\"]*)\1\s*\)", r"(\2)"),
    (r"(?<=\d)[jJ](?![A-Za-z])|(?<=[*])I(?![A-Za-z])|(?<![A-Za-z\\])I(?=\s*\*)", "i"),
    (r"(?<=[*])E(?![A-Za-z])|(?<![A-Za-z\\])E(?=\s*\*)", "e"),
    (r"^\s*Eq\(([^=,]*),([^=,]*)\)\s*$", r"\1=\2"),
    (r"\*\*", "^"),
    (r"\*", r"\\cdot "),
    (_NAMES + r"pi(?![A-Za-z(])", r"\\pi "),
    (_NAMES + r"(alpha|beta|gamma|delta|theta|lambda|mu|phi|omega)(?![A-Za-z])", r"\\\1 "),
    (_NAMES + r"(?:oo|inf|infty|infinity|Infinity)(?![A-Za-z(])", r"\\infty "),
    (_NAMES + r"sqrt(?=\s*[\d({])", r"\\sqrt"),
    (_NAMES + r"log(?=\s*\()", r"\\ln"),
    (_NAMES + rf"({'|'.join(FUNCTIONS)})(?=\s*[(\d]|\s+[a-z]\b)", r"\\\1"),
    (r"\\a(?=(?:sin|cos|tan)h?(?![a-z]))", r"\\arc"),
    (r"(?<=[)\]])\s+U\s+(?=[(\[])", r"\\cup "),
    (r"\)\s*\|\s*\(", r") \\lor ("),
    (r"\)\s*&\s*\(", r") \\land ("),
)

_TEXT_COMMAND = re.compile(
    r"\\(?:text|mbox|textbf|textit|textrm|textnormal|textsf|texttt|textsc|emph|mathrm|mathit|mathsf|mathtt|"
    r"operatorname|rm|bf|it)\*?(?![A-Za-z])\s*(?=\{)"
)
_TRANSPARENT_COMMAND = re.compile(
    r"\\(?:boxed|fbox|underline|mathbf|boldsymbol|bm|pmb|vec|mathord|ensuremath)(?![A-Za-z])\s*(?=\{)"
)


@lru_cache(maxsize=20_000)
def normalise(answer: str) -> str:
    """The normal spelling of an answer. Normalising twice changes nothing more.

    Raises:
        ValueError: the answer is longer than `MAX_CHARS`, not counting zeros at the end of a decimal, or
            nested deeper than `MAX_NESTING`.
    """
    if _PLAIN_NUMBER.fullmatch(answer):
        return answer
    text = answer if len(answer) <= MAX_CHARS else _TRAILING_ZEROS.sub(r"\1", answer)
    if len(text) > MAX_CHARS:
        raise ValueError(f"an answer of {len(text)} characters is not read, only up to {MAX_CHARS}")
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth > MAX_NESTING:
            raise ValueError(f"brackets are nested more than {MAX_NESTING} deep")
    for _ in range(3):  # a rewrite can uncover another; more than two passes are never needed in practice
        before, text = text, _normalise_once(text)
        if text == before:
            break
    return text


def squash(text: str) -> str:
    r"""The text without commands for text and without spaces, except between digits: equal strings are equal."""
    return _SPACE.sub("", re.sub(r"\\text\{([^{}]*)\}", r"\1", text)).replace(r"\cdot", "*")


def closing(text: str, start: int) -> int | None:
    r"""Where the bracket that opens at `start` is closed; any of `)]}` closes any of `([{`."""
    depth = 0
    for index in range(start, len(text)):
        if text[index] in "([{":
            depth += 1
        elif text[index] in ")]}":
            depth -= 1
            if depth == 0:
                return index
    return None


def split_top(text: str, separator: re.Pattern[str]) -> list[str]:
    """The parts between the separators that stand outside all brackets and environments, stripped."""
    parts, depth, start, index = [], 0, 0, 0
    while index < len(text):
        if text.startswith((r"\begin{", r"\end{"), index):
            depth += 1 if text[index + 1] == "b" else -1
            index = text.index("{", index)
            index = (closing(text, index) or index) + 1
        elif text[index] in "([{":
            depth, index = depth + 1, index + 1
        elif text[index] in ")]}":
            depth, index = depth - 1, index + 1
        elif depth == 0 and (match := separator.match(text, index)) and match.end() > index:
            parts.append(text[start:index].strip())
            start = index = match.end()
        elif command := _COMMAND.match(text, index):
            index = command.end() if text[index + 1] not in "{}" else index + 1
        else:
            index += 1
    return [*parts, text[start:].strip()]


_PLAIN_NUMBER = re.compile(r"-?\d{1,20}(?:\.\d{1,20})?")
_TRAILING_ZEROS = re.compile(r"(\.(?:\d*[1-9])?)0{20,}+(?!\d)")
_NUMPY_ARRAY = re.compile(r"\[[-\[\]\d.\s]+\]")
_SPACE = re.compile(r"(?<!\d) +| +(?!\d)")
_COMMAND = re.compile(r"\\(?:[A-Za-z]+|.)", re.DOTALL)


def _normalise_once(text: str) -> str:
    text = _from_unicode(text)
    text = _protect_rows(text)
    text = _substitute(text, _MARKUP)
    text = _rewrite_groups(text, _TRANSPARENT_COMMAND, lambda content: content)
    text = _rewrite_groups(text, _TEXT_COMMAND, _text_span)
    text = _substitute(text, _SYMBOLS)
    if not text.startswith(r"\text{") or text.find("}") != len(text) - 1:
        text = _substitute(text, _PYTHON)
        text = re.sub(r"(?<![A-Za-z])(?:,\s*)?(and|or)(?![A-Za-z}])", _join_word, text)
    if _NUMPY_ARRAY.fullmatch(text):
        text = re.sub(r"(?<=[\d.\]])\s+(?=[-\[\d.])", ", ", text)
    text = _fill_arguments(text)
    text = _degrees(text)
    return _trim(text)


def _substitute(text: str, rules: tuple[_Rule, ...]) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _from_unicode(text: str) -> str:
    if text.isascii():
        return text
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ]+", lambda m: f"^{{{m.group().translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉]+", lambda m: f"_{{{m.group().translate(_SUBSCRIPTS)}}}", text)
    text = "".join(_UNICODE.get(character) or _vulgar_fraction(character) for character in text)
    return unicodedata.normalize("NFKC", text)


def _vulgar_fraction(character: str) -> str:
    numerator, slash, denominator = unicodedata.normalize("NFKC", character).partition("\u2044")
    return rf"\frac{{{numerator}}}{{{denominator}}}" if slash and denominator else character


def _protect_rows(text: str) -> str:
    r"""`\\` ends a row inside an environment, and is a backslash escaped twice elsewhere."""
    if r"\begin" in text:
        return re.sub(r"\\\\(?:\[[^\]]{0,8}\])?|\\(?:newline|cr)(?![A-Za-z])", r" \\newrow ", text)
    return text.replace("\\\\", "\\")


def _rewrite_groups(text: str, command: re.Pattern[str], rewrite: Callable[[str], str]) -> str:
    """Replace each `command{content}` by `rewrite(content)`."""
    position = 0
    while match := command.search(text, position):
        end = closing(text, match.end())
        if end is None:
            return text[: match.start()] + text[match.end() + 1 :]
        replacement = rewrite(text[match.end() + 1 : end])
        text = text[: match.start()] + replacement + text[end + 1 :]
        position = match.start() + (len(replacement) if replacement.startswith("\\text") else 0)
    return text


def _text_span(content: str) -> str:
    word = content.strip()
    if counted := re.match(r"[-\d.,/:]*\d\s+(?=[A-Za-z])", word):
        return rf"{counted.group()}\text{{{word[counted.end() :]}}}"
    if word in FUNCTIONS:
        return f"\\{word} "
    if (len(word) == 1 and word in "eidx") or not re.search(r"[A-Za-z]", word):
        return content
    if power := re.fullmatch(r"([A-Za-z. ]+?)\s*\^\s*\{?(\d)\}?", word):
        return rf"\text{{{power.group(1)}}}^{{{power.group(2)}}}"
    if found := re.fullmatch(r",?\s*(and|or)", word):
        return rf" \l{found.group(1)} "
    return rf"\text{{{' '.join(content.split())}}}"


def _join_word(match: re.Match[str]) -> str:
    return rf" \l{match.group(1)} "


def _fill_arguments(text: str) -> str:
    r"""Give `\frac12`, `\sqrt5`, `\sqrt(5)`, `x^12` and `x^(1/2)` the braces that they lack."""
    text = re.sub(r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}", text)
    text = re.sub(r"^([^{}]*)\\over(?![A-Za-z])([^{}]*)$", r"\\frac{\1}{\2}", text)
    for name, count in ((r"\frac", 2), (r"\binom", 2), (r"\sqrt", 1)):
        position = 0
        while (position := text.find(name, position)) >= 0:
            start = end = position + len(name)
            if name == r"\sqrt" and (root := re.compile(r"\s*\[[^\[\]]*\]").match(text, end)):
                start = end = root.end()
            arguments = []
            for _ in range(count):
                argument, end = _argument(text, end, parentheses=name == r"\sqrt")
                arguments.append(argument)
            text = text[:start] + "".join(f"{{{argument}}}" for argument in arguments) + text[end:]
            position = start
    text = re.sub(r"\^\s*(\\frac\{[^{}]*\}\{[^{}]*\})", r"^{\1}", text)
    text = re.sub(r"\^\s*([+-]?(?:\d*\.)?\d+|[+-][A-Za-z])", r"^{\1}", text)
    position = 0
    while match := re.compile(r"\^\s*\(").search(text, position):
        end = closing(text, match.end() - 1)
        if end is None:
            break
        text = f"{text[: match.start()]}^{{{text[match.end() : end]}}}{text[end + 1 :]}"
        position = match.start() + 1
    return text


def _argument(text: str, start: int, *, parentheses: bool) -> tuple[str, int]:
    """The argument of a command at `start`, without its braces, and where it ends."""
    while start < len(text) and text[start] == " ":
        start += 1
    if start < len(text) and text[start] in ("{(" if parentheses else "{"):
        end = closing(text, start)
        if end is not None:
            return text[start + 1 : end], end + 1
    if parentheses and (number := re.compile(r"\d+").match(text, start)):
        return number.group(), number.end()
    match = _COMMAND.match(text, start)
    end = match.end() if match else min(start + 1, len(text))
    return text[start:end], end


def _degrees(text: str) -> str:
    """Drop the degree sign, except where a trigonometric function needs to know of it."""
    if "°" in text and _TRIG.search(text):
        text = re.sub(r"(\d+(?:\.\d+)?|\\frac\{\d+\}\{\d+\})\s*°", r"(\1 \\cdot \\pi/180)", text)
    return text.replace("°", " ")


def _trim(text: str) -> str:
    """Strip what surrounds an answer: spaces, quotes, markdown, punctuation, braces that match nothing."""
    text = " ".join(text.split())
    while text:
        before = text
        text = text.strip(" `\n").strip(";:,").rstrip(".").strip()
        if text[:2] == text[-2:] == "__":
            text = text[2:-2]
        if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
            text = text[1:-1]
        text = re.sub(r"^(?:=|\\approx(?![A-Za-z])|\\Rightarrow|\\implies)\s*", "", text)
        if text.startswith("{") and closing(text, 0) == len(text) - 1:
            text = text[1:-1]
        if text.endswith("}") and not text.endswith(r"\}") and text.count("{") < text.count("}"):
            text = text[:-1]
        if text == before:
            break
    return text
