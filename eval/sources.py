"""Outputs of others: which problems they are on, and where the sources' own flags of correctness differ from ours."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.contamination import same_question
from eval.evaluate import Rate
from eval.predictions import Prediction
from mtpo.answer_text import normalise
from mtpo.errors import InputError
from mtpo.exact_numbers import parse_number
from mtpo.trajectory import Problem, Trajectory

KNOWN_FLAGS = ("label", "reported_correct", "correct", "is_correct", "report", "score")
"""Fields in which records of others say whether they are correct: true, false, or a list of these, one a sample."""
_DECIMAL = re.compile(r"-?\d*\.(\d+)")


@dataclass(frozen=True)
class Disagreement:
    """A trajectory of which the source says one thing and the grader another."""

    problem_id: str
    sample: int
    gold: str
    answer: str | None
    rule: str
    flag: bool
    verdict: str
    kind: str


@dataclass(frozen=True)
class FlagReport:
    """One field of the source against our verdicts."""

    agreement: Rate
    missing: int
    """Trajectories of which the field says neither true nor false."""
    by_kind: list[dict[str, Any]]
    """`{"flag", "verdict", "kind", "count"}`, the most frequent first."""
    disagreements: list[Disagreement]


@dataclass(frozen=True)
class Sources:
    """Where scored outputs came from, and what their makers say of them."""

    file: str
    num_records: int
    num_not_imported: int
    num_other_problems: int
    """Trajectories on problems that are not in the set: in no figure."""
    flags: dict[str, FlagReport]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def match_problems(
    trajectories: Sequence[Trajectory], own: Sequence[Problem], problems: Sequence[Problem]
) -> list[Trajectory]:
    """The trajectories on problems of a set, under the ids that they have there; samples are counted anew.

    Args:
        own: the problems as the outputs name them.
        problems: the set; a problem is found by its id, if its question is in what the model was asked, or else by
            its question.
    """
    by_id = {problem.id: problem for problem in problems}
    by_question = {same_question(problem.question): problem.id for problem in problems}
    names = {
        p.id: p.id if p.id in by_id and _asks(p, by_id[p.id]) else by_question.get(same_question(p.question))
        for p in own
    }
    samples: Counter[str] = Counter()
    found = []
    for trajectory in trajectories:
        if (problem_id := names[trajectory.problem_id]) is not None:
            found.append(dataclasses.replace(trajectory, problem_id=problem_id, sample=samples[problem_id]))
            samples[problem_id] += 1
    return found


def compare_flags(
    predictions: Sequence[Prediction],
    records: Mapping[tuple[str, int], Mapping[str, Any]],
    equal: Callable[[str, str], bool],
    names: Sequence[str] = (),
) -> dict[str, FlagReport]:
    """What the sources say of their own outputs, against the verdicts.

    Args:
        records: the fields of the source, by problem id and sample.
        equal: whether an answer equals another, for telling what kind a disagreement is of.
        names: fields to compare; without any, those of `KNOWN_FLAGS` that the records have.

    Raises:
        InputError: no record has a field that was named.
    """
    found = {}
    for name in names or KNOWN_FLAGS:
        flags = {key: _flag(record, name) for key, record in records.items()}
        if all(flag is None for flag in flags.values()):
            if names:
                raise InputError(f"--flags {name}: no record has such a field with true or false in it")
            continue
        found[name] = _flag_report(predictions, flags, equal)
    return found


def _asks(asked: Problem, problem: Problem) -> bool:
    """Whether the question is part of what was asked, which may have instructions around it."""
    return " ".join(same_question(problem.question)) in " ".join(same_question(asked.question))


def _flag_report(
    predictions: Sequence[Prediction],
    flags: Mapping[tuple[str, int], bool | None],
    equal: Callable[[str, str], bool],
) -> FlagReport:
    told = [(p, flag) for p in predictions if (flag := flags[p.problem_id, p.sample]) is not None]
    disagreements = [
        Disagreement(p.problem_id, p.sample, p.gold, p.answer, p.rule, flag, p.verdict, _kind(p, equal))
        for p, flag in told
        if p.is_correct != flag
    ]
    counts = Counter((d.flag, d.verdict, d.kind) for d in disagreements)
    return FlagReport(
        Rate.share([p.is_correct == flag for p, flag in told], "flagged trajectories"),
        len(predictions) - len(told),
        [
            {"flag": flag, "verdict": verdict, "kind": kind, "count": count}
            for (flag, verdict, kind), count in counts.most_common()
        ],
        disagreements,
    )


def _flag(record: Mapping[str, Any], name: str) -> bool | None:
    value = record.get(name)
    if isinstance(value, list):
        sample = record.get("sample", 0)
        value = value[sample] if sample < len(value) else None
    return value if isinstance(value, bool) else None


def _kind(prediction: Prediction, equal: Callable[[str, str], bool]) -> str:
    """Of what sort a disagreement is, as far as answer and gold answer tell."""
    answer, gold = prediction.answer, prediction.gold
    if prediction.is_correct:
        return "the gold answer" if prediction.rule == "same_text" else "equal to the gold answer"
    if answer is None or prediction.outcome != "wrong answer":
        return prediction.outcome
    if _is_rounding(answer, gold, equal):
        return "rounding of the gold answer"
    given, wanted = _value(answer), _value(gold)
    if given is not None and wanted is not None and abs(given - wanted) <= 0.05 * abs(wanted):
        return "within 5 % of the gold answer"
    return "another answer"


def _is_rounding(answer: str, gold: str, equal: Callable[[str, str], bool]) -> bool:
    """The one decimal in the answer is the gold answer to so many places: floor(10^d gold + 1/2) = 10^d decimal."""
    decimals = list(_DECIMAL.finditer(answer))
    if len(decimals) != 1:
        return False
    places = len(decimals[0].group(1))
    digits = str(int(decimals[0].group().replace(".", "")))
    return equal(rf"\lfloor {10**places} \cdot ({gold}) + \frac{{1}}{{2}} \rfloor", digits)


def _value(text: str) -> float | None:
    try:
        number = parse_number(normalise(text))
        return None if number is None else float(number.value)
    except (ArithmeticError, ValueError):  # too large, or too complex to normalise
        return None


EXAMPLES_A_KIND = 5


def readme(sources: Sources, table: str, problems: str, grader: Mapping[str, Any]) -> str:
    """The README of a run that scored outputs of others: what was scored, how, and where the sources are wrong.

    Args:
        table: the figures, as lines of text.
        problems: where problems and gold answers are from.
    """
    scored = sources.num_records - sources.num_not_imported - sources.num_other_problems
    options = ", ".join(f"`{name}` = {value!r}" for name, value in grader.items())
    lines = [
        f"# Scores of {sources.file}",
        "",
        f"{scored:,} of {sources.num_records:,} trajectories were scored; {sources.num_not_imported:,} could not be "
        f"imported, {sources.num_other_problems:,} are on other problems. Problems and gold answers: {problems}.",
        "",
        f"An answer is right if it equals the gold answer. Grader: {options}. What has no answer, was cut short or "
        "could not be graded counts as not correct. No model was run.",
        "",
        "```text",
        table,
        "```",
    ]
    for name, flag in sources.flags.items():
        lines += ["", *_flag_lines(name, flag)]
    if not sources.flags:
        lines += ["", "The records have no flags of their own."]
    return "\n".join(lines) + "\n"


def _flag_lines(name: str, report: FlagReport) -> list[str]:
    lines = [
        f"## The sources' own flag `{name}`",
        "",
        f"Agrees with the verdict: {str(report.agreement).strip()}; {report.missing:,} trajectories have no such flag.",
    ]
    for row in report.by_kind:
        said, kind = "right" if row["flag"] else "wrong", row["kind"]
        alike = [
            d
            for d in report.disagreements
            if (d.flag, d.verdict, d.kind) == (row["flag"], row["verdict"], kind)
        ]
        lines += ["", f"- {row['count']:,} flagged {said}, here {row['verdict']}: {kind}"]
        for d in alike[:EXAMPLES_A_KIND]:
            answers = f"answer {_code(d.answer)}, gold answer {_code(d.gold)}"
            lines.append(f"  - `{d.problem_id}` sample {d.sample}: {answers}, rule {d.rule}")
        if len(alike) > EXAMPLES_A_KIND:
            lines.append(f"  - and {len(alike) - EXAMPLES_A_KIND:,} more, all in `metrics.json`")
    return lines


def _code(text: str | None) -> str:
    return "none" if text is None else "`" + " ".join(text.replace("`", "'").split()) + "`"
