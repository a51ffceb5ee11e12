"""Training problems that stand, whole or in part, in an evaluation set.

Two measures, both blind to case, spacing and Unicode variants:

- **duplicate**: the same words, numbers and signs (`+ - * / ^ = < > ! % |` and brackets) in the same order, whatever
  the punctuation, the dollars and the braces around them;
- **overlap**: 13-grams of words in common, as in GPT-3 (arXiv 2005.14165, appendix C). A word is a run of letters and
  digits; all else only separates words. A problem of fewer than 13 words has no 13-gram and can only be a duplicate.

An overlap is a hint and no proof: problems of one kind share their phrases, and figures their code.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from eval.evaluate import Rate
from mtpo.trajectory import Problem

N = 13
_WORD = re.compile(r"[^\W_]+")
_WORD_OR_SIGN = re.compile(r"[^\W_]+|[-+*/^=<>!%|()\[\]]")

Tokens = tuple[str, ...]


@dataclass(frozen=True)
class Overlap:
    """A problem of the evaluation set that a training set has, whole or in part."""

    problem_id: str
    train_id: str
    """The training problem that has the most of it."""
    kind: Literal["duplicate", "overlap"]
    share: float
    """Of the problem's 13-grams, those that occur in any training problem; 1 for a duplicate."""


@dataclass(frozen=True)
class Contamination:
    """How much of an evaluation set the training problems hold."""

    duplicates: Rate
    any_overlap: Rate
    """Problems that share at least one 13-gram, of those that have one."""
    half_overlap: Rate
    """Problems that share at least half of theirs."""
    num_train: int
    num_eval: int
    pairs: list[Overlap]
    """All duplicates and overlaps, the largest share first."""
    compared_with: list[dict[str, Any]] = field(default_factory=list)
    """Name and size of each set of training problems."""
    unknown: list[str] = field(default_factory=list)
    """What the policy was trained on that could not be looked into."""
    n: int = N

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def table(self) -> str:
        """The figures as lines of text, with what they do not cover."""
        names = (
            ", ".join(f"{s['name']} ({s['num_problems']:,})" for s in self.compared_with) or "nothing known"
        )
        lines = [f"{'compared with training problems':32} {names}"]
        if self.compared_with:
            rows = [
                ("  also in training", self.duplicates),
                (f"  sharing a {N}-gram", self.any_overlap),
                (f"  sharing half of their {N}-grams", self.half_overlap),
            ]
            lines += [f"{name:32} {rate}" for name, rate in rows]
        return "\n".join([*lines, *(f"{'  not compared':32} {text}" for text in self.unknown)])


def find_contamination(
    evaluation: Sequence[Problem],
    training: Mapping[str, Sequence[Problem]],
    unknown: Sequence[str] = (),
) -> Contamination:
    """Look for training problems in an evaluation set.

    Args:
        training: sets by name; a problem may be in several.
        unknown: what else the policy was trained on, in words.
    """
    problems = list({(p.id, p.question): p for part in training.values() for p in part}.values())
    overlaps = {o.problem_id: o for o in _overlaps(evaluation, problems)}
    num_long = sum(len(_words(problem.question)) >= N for problem in evaluation)
    shares = [o.share for o in overlaps.values() if o.kind == "overlap"]
    duplicates = {o.problem_id: o for o in _duplicates(evaluation, problems)}
    unit = f"problems of at least {N} words"
    return Contamination(
        Rate.count_of(len(duplicates), len(evaluation) if problems else 0, "problems"),
        Rate.count_of(len(shares), num_long if problems else 0, unit),
        Rate.count_of(sum(share >= 0.5 for share in shares), num_long if problems else 0, unit),
        len(problems),
        len(evaluation),
        sorted((overlaps | duplicates).values(), key=lambda o: (-o.share, o.kind)),
        [{"name": name, "num_problems": len(part)} for name, part in training.items()],
        list(unknown),
    )


def same_question(text: str) -> Tokens:
    """What two questions have in common if they are one: words, numbers and signs, in order."""
    return tuple(_WORD_OR_SIGN.findall(unicodedata.normalize("NFKC", text).casefold()))


def _duplicates(evaluation: Sequence[Problem], training: Sequence[Problem]) -> list[Overlap]:
    first: dict[Tokens, str] = {}
    for problem in training:
        first.setdefault(same_question(problem.question), problem.id)
    keys = ((problem, same_question(problem.question)) for problem in evaluation)
    return [Overlap(problem.id, first[key], "duplicate", 1.0) for problem, key in keys if key in first]


def _overlaps(evaluation: Sequence[Problem], training: Sequence[Problem]) -> list[Overlap]:
    wanted = {gram for problem in evaluation for gram in _grams(problem.question)}
    holders: defaultdict[Tokens, list[str]] = defaultdict(list)
    for problem in training:
        for gram in dict.fromkeys(_grams(problem.question)):
            if gram in wanted:
                holders[gram].append(problem.id)
    found = []
    for problem in evaluation:
        grams = _grams(problem.question)
        shared = [gram for gram in grams if gram in holders]
        if shared:
            most = Counter(train_id for gram in shared for train_id in holders[gram]).most_common(1)[0][0]
            found.append(Overlap(problem.id, most, "overlap", len(shared) / len(grams)))
    return found


def _grams(text: str) -> list[Tokens]:
    words = _words(text)
    return [tuple(words[i : i + N]) for i in range(len(words) - N + 1)]


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
