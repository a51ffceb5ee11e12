"""Problem sets: from a spec to `Problem`s with their gold answers.

    gsm8k:test  math:train  math500     the hub's data sets, loaded through `datasets`
    math:test@PATH                      the same set from a local file or folder; the ids stay the same
    generated:test                      word problems made here, no download
    file.jsonl  file.jsonl.gz           one JSON object a line
    folder:test                         `folder/test.jsonl`, or a downloaded copy of a hub repository
    owner/name:test  owner/name:config:test     any other set on the hub
    gsm8k:test,math:test                several sets, one after the other

A row is recognised by its field names (`FORMS`), so a local file in the hub's field names and the hub's data
set give the same problems.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtpo.answers import gold_from_gsm8k, gold_from_solution
from mtpo.errors import InputError
from mtpo.runs import write_jsonl
from mtpo.trajectory import Problem

logger = logging.getLogger(__name__)

FORMS = (
    ("problem", "answer"),
    ("problem", "solution"),
    ("question", "answer"),
    ("question", "final_answer"),
    ("question", "gold"),
    ("question", "solution"),
    ("query", "response"),
    ("instruction", "output"),
    ("input", "target"),
    ("Question", "Answer"),
)
"""Fields that hold question and gold answer; the first pair that a row has, not null, counts."""
WORKED_OUT = frozenset({"solution", "response", "output"})
"""Those of them with a worked solution, which ends in the answer."""
NUM_NAMED = 5
"""Problems that a warning names, of those that it is about."""

Row = tuple[str, bytes | Mapping[str, Any]]
"""Where a row stands, for messages, and the row: parsed, or a line of JSON."""


@dataclass(frozen=True)
class HubSet:
    """A data set on the hub; its configs are joined in the order given."""

    name: str
    configs: tuple[str | None, ...]
    splits: Mapping[str, int]
    """With the number of problems in each, those with an empty box as gold answer left out."""


MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
NAMED_SETS = {
    "gsm8k": HubSet("openai/gsm8k", ("main",), {"train": 7473, "test": 1319}),
    "math": HubSet("EleutherAI/hendrycks_math", MATH_SUBJECTS, {"train": 7498, "test": 5000}),
    "math500": HubSet("HuggingFaceH4/MATH-500", (None,), {"test": 500}),
}


def load_problems(spec: str, limit: int | None = None, *, strict: bool = True) -> list[Problem]:
    """The problems of a set, in the set's order, or of several sets that commas join, in theirs.

    A problem's id is the row's own `id`, `unique_id` or `ID`, else `SET/INDEX` with the row's index from 0:
    `gsm8k:test/17`, `math:train/0`, `svamp/3` for the fourth line of svamp.jsonl. One that a set before has taken
    is put after the set's spec. A row whose gold answer is an empty box is left out with a warning.

    Args:
        spec: see the module's docstring.
        limit: keep the first `limit` problems.
        strict: raise on the first broken row; otherwise warn of the broken rows and keep the others.

    Raises:
        InputError: the spec names nothing, the set cannot be loaded or holds no problem, or a row is broken.
    """
    if limit is not None and limit < 1:
        raise InputError(f"{spec}: the number of problems must be at least 1, got {limit}")
    if len(parts := _parts(spec)) > 1:
        return _joined(parts, strict=strict)[:limit]
    if spec.startswith("generated:"):
        from data.generated import problems as generated_problems

        return generated_problems(spec.removeprefix("generated:"), limit)  # pyright: ignore[reportArgumentType]
    problems, errors = _collect(*_resolve(spec))
    if errors and strict:
        more = f" ({len(errors) - 1} more broken rows)" if len(errors) > 1 else ""
        raise InputError(errors[0] + more)
    for error in errors[:NUM_NAMED]:
        logger.warning("left out: %s", error)
    if len(errors) > NUM_NAMED:
        logger.warning("%s: left out %d more broken rows", spec, len(errors) - NUM_NAMED)
    if not problems:
        raise InputError(f"{spec}: holds no problem" + (f"; {errors[0]}" if errors else ""))
    return problems[:limit]


def num_problems(spec: str, limit: int | None = None) -> int:
    """How many problems `load_problems` gives; of a named set on the hub without loading it.

    Raises:
        InputError: as `load_problems`.
    """
    if len(parts := _parts(spec)) > 1:
        count = sum(map(num_problems, parts))
    elif (found := _named(spec)) and "@" not in spec:
        known, split = found
        count = known.splits[split]
    else:
        count = len(load_problems(spec, limit, strict=False))
    return count if limit is None else min(count, limit)


def read_problem_file(path: str | Path, set_name: str | None = None) -> tuple[list[Problem], list[str]]:
    """The good rows of a .jsonl or .jsonl.gz file, and one line for each broken one, naming file and line.

    Args:
        set_name: what ids of rows without one begin with; by default the file's name without its endings.

    Raises:
        InputError: there is no such file.
    """
    path = Path(path)
    return _collect(set_name or path.name.split(".")[0], _file_rows(path))


def write_problems(path: Path, problems: Sequence[Problem]) -> None:
    """The problems of a run, one JSON object a line.

    Raises:
        InputError: the file is there and holds other problems.
    """
    if not path.exists():
        write_jsonl(path, [problem.to_json() for problem in problems])
    elif read_problems(path) != list(problems):
        raise InputError(f"{path} holds other problems than were asked for: take another --out")


def read_problems(path: Path) -> list[Problem]:
    """The problems that `write_problems` wrote.

    Raises:
        InputError: there is no such file.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file; is {path.parent} the --out of recipes.generate?")
    with path.open(encoding="utf-8") as file:
        return [Problem.from_json(json.loads(line)) for line in file]


def assert_disjoint(*named_sets: tuple[str, Sequence[Problem]]) -> None:
    """Check that no question is in two of the sets, ignoring case, spacing and Unicode variants.

    Raises:
        InputError: names two sets, the number of questions that they share, and one of them.
    """
    seen: dict[str, tuple[str, Problem]] = {}
    for name, problems in named_sets:
        own = {_normal_text(problem.question): problem for problem in problems}
        if shared := [text for text in own if text in seen]:
            other, theirs = seen[shared[0]]
            raise InputError(
                f"{other} and {name} must be disjoint but share {len(shared)} questions, for example "
                f"{theirs.id} = {own[shared[0]].id}: {shared[0][:80]!r}"
            )
        seen |= {text: (name, problem) for text, problem in own.items()}


def drop_shared(problems: Sequence[Problem], others: Sequence[Problem]) -> list[Problem]:
    """The problems whose question is not among the others' (compared as in `assert_disjoint`); logs the rest.

    The published splits need it: MATH has one question both in train and in test.
    """
    taken = {_normal_text(problem.question) for problem in others}
    dropped = [problem for problem in problems if _normal_text(problem.question) in taken]
    _warn_of("that another set shares", dropped)
    return [problem for problem in problems if _normal_text(problem.question) not in taken]


def drop_repeated(problems: Sequence[Problem]) -> list[Problem]:
    """The problems without those whose question an earlier one asks (compared as in `assert_disjoint`); logs the rest.

    Sets of solutions need it: MetaMathQA has many a question several times, with an answer worked out anew.
    """
    kept: dict[str, Problem] = {}
    repeated = [p for p in problems if kept.setdefault(_normal_text(p.question), p) is not p]
    _warn_of("that ask what another one asks", repeated)
    return list(kept.values())


def problem_from_row(row: Mapping[str, Any], default_id: str) -> Problem:
    """One row of any of the `FORMS`; the answer is "" if the solution's last box is empty.

    Raises:
        InputError: no form fits, or the question or the answer is missing or of the wrong type.
    """
    form = next((f for f in FORMS if all(row.get(key) is not None for key in f)), None)
    if form is None:
        known = ", ".join("+".join(f) for f in FORMS)
        raise InputError(f"no question and answer among the fields {sorted(map(str, row))}; expected {known}")
    question_key, answer_key = form
    question = row[question_key]
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{question_key!r} must be a text, got {question!r:.80}")
    if body := row.get("Body"):  # SVAMP tells the story in one field and asks in another
        question = f"{str(body).rstrip()} {question}"
    own_id = next((row[key] for key in ("id", "unique_id", "ID") if row.get(key) is not None), default_id)
    level, subject = row.get("level"), row.get("subject", row.get("type"))
    answer = _gold(row[answer_key], answer_key)
    return Problem(
        id=str(own_id),
        question=question,
        answer=answer,
        level=None if level is None else str(level),
        subject=None if subject is None else str(subject),
        joined_answer=row.get("joined_answer") or _joined_answer(row.get("solution"), answer),
    )


def gold_answer(value: Any) -> str:
    """The gold answer in an answer field: what follows GSM8K's `####`, a number, or the text itself.

    Raises:
        InputError: the value is empty, not finite, or neither a text, a number nor a list of them.
    """
    if isinstance(value, list) and value:
        return ", ".join(gold_answer(item) for item in value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        number = gold_from_gsm8k(value)
        if answer := value.strip() if number is None else number:
            return answer
    raise InputError(f"expected an answer, got {value!r:.80}")


def file_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """The lines of a plain or gzipped file, each with its place for messages: `FILE, line N`.

    Raises:
        InputError: there is no such file, or it is no gzip file in spite of its name.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield f"{path}, line {number}", line
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path}: no such file") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise InputError(f"{path}: broken gzip file: {error}") from None


def parse_object(line: bytes) -> dict[str, Any]:
    """One line of a JSONL file.

    Raises:
        InputError: the line is not a JSON object in UTF-8.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise InputError(f"expected a JSON object, got {type(row).__name__}")
    return row


def _parts(spec: str) -> list[str]:
    """The specs that commas join."""
    return [spec] if Path(spec).exists() else [part.strip() for part in spec.split(",")]


def _joined(specs: Sequence[str], *, strict: bool) -> list[Problem]:
    problems: dict[str, Problem] = {}
    for spec in specs:
        for problem in load_problems(spec, strict=strict):
            if problem.id in problems:
                problem = dataclasses.replace(problem, id=f"{spec}/{problem.id}")
            if problem.id in problems:
                raise InputError(f"{spec}: the id {problem.id!r} is already taken: is a set named twice?")
            problems[problem.id] = problem
    return list(problems.values())


def _named(spec: str) -> tuple[HubSet, str] | None:
    """The set of `NAMED_SETS` that a spec means, and its split; None if it means something else."""
    name, _, split = spec.partition("@")[0].partition(":")
    known = NAMED_SETS.get(name)
    if known is None:
        return None
    if not split and len(known.splits) == 1:
        (split,) = known.splits
    if split not in known.splits:
        choices = " or ".join(f"{name}:{s}" for s in known.splits)
        raise InputError(f"{spec}: {name} has no split {split!r}, expected {choices}")
    return known, split


def _resolve(spec: str) -> tuple[str, Iterator[Row]]:
    """The name of the set that a spec means, and its rows."""
    if found := _named(spec):
        known, split = found
        name, at, path = spec.partition("@")
        name = f"{name.partition(':')[0]}:{split}"
        if at:
            return name, _local_rows(Path(path), split, known.configs)
        hint = f"for a local copy write {name}@FILE.jsonl or {name}@FOLDER"
        return name, hub_rows(known.name, known.configs, split, hint)
    if Path(spec).is_file():
        return Path(spec).name.split(".")[0], _file_rows(Path(spec))
    path, _, split = spec.rpartition(":")
    if path and Path(path).is_dir():
        return f"{Path(path).name}:{split}", _local_rows(Path(path), split, (None,))
    name, *config, split = spec.split(":") if path else (spec, "")
    if name.count("/") == 1 and split and len(config) <= 1 and name[0] not in "./~":
        hint = "a local copy is loaded by its path: FILE.jsonl or FOLDER:SPLIT"
        return spec, hub_rows(name, (config[0] if config else None,), split, hint)
    raise InputError(
        f"{spec}: no such file, and no problem set; expected gsm8k:SPLIT, math:SPLIT, math500, generated:SPLIT, "
        "a .jsonl file, FOLDER:SPLIT or OWNER/NAME:SPLIT"
    )


def _file_rows(path: Path) -> Iterator[Row]:
    yield from file_lines(path)


def _local_rows(path: Path, split: str, configs: tuple[str | None, ...]) -> Iterator[Row]:
    """Rows of a file, of `SPLIT.jsonl` in a folder, or of a folder that `datasets` can read."""
    if not path.is_dir():
        return _file_rows(path)
    for file in (path / f"{split}.jsonl", path / f"{split}.jsonl.gz"):
        if file.exists():
            return _file_rows(file)
    return hub_rows(str(path), configs, split, f"expected {split}.jsonl or a copy of a hub repository there")


def hub_rows(name: str, configs: tuple[str | None, ...], split: str, hint: str) -> Iterator[Row]:
    """The rows of a data set on the hub, or of a local copy of its repository, each with its place for messages.

    Raises:
        InputError: the set cannot be loaded; ends with `hint`.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    for config in configs:
        try:
            table = load_dataset(name, config, split=split)
        except (OSError, ValueError, DatasetsError) as error:
            raise InputError(
                f"cannot load split {split!r} of {name}: {' '.join(str(error).split())}; {hint}"
            ) from error
        for index, row in enumerate(table):
            yield f"{name} {config or ''} row {index}", row  # pyright: ignore[reportReturnType]


def _collect(set_name: str, rows: Iterable[Row]) -> tuple[list[Problem], list[str]]:
    """The problems, and one line for each broken row."""
    problems: list[Problem] = []
    errors: list[str] = []
    empty: list[Problem] = []
    places: dict[str, str] = {}
    for index, (place, row) in enumerate(rows):
        if isinstance(row, bytes) and not row.strip():
            continue
        try:
            fields = parse_object(row) if isinstance(row, bytes) else row
            problem = problem_from_row(fields, f"{set_name}/{index}")
            if problem.id in places:
                raise InputError(f"the id {problem.id!r} is already taken by {places[problem.id]}")
        except InputError as error:
            errors.append(f"{place}: {error}")
            continue
        places[problem.id] = place
        if problem.answer:
            problems.append(problem)
        else:
            empty.append(problem)
    _warn_of("with an empty box as gold answer", empty)
    return problems, errors


def _gold(value: Any, key: str) -> str:
    if key not in WORKED_OUT:
        return gold_answer(value)
    answer = _last_answer(value) if isinstance(value, str) else None
    if answer is None:
        raise InputError(
            f"{key!r} holds no \\boxed answer, no line '#### ...' and no last line 'The answer is: ...'"
        )
    return answer


def _last_answer(solution: str) -> str | None:
    """What a worked solution ends in: MetaMathQA's last line `The answer is: 7`, the last box, or GSM8K's `#### 7`."""
    last_line = solution.rstrip().rpartition("\n")[2]
    _, marker, stated = last_line.rpartition("The answer is: ")
    if marker and stated.strip() and gold_from_solution(stated) is None:
        return stated.strip()
    boxed = gold_from_solution(solution)
    return gold_from_gsm8k(solution) if boxed is None else boxed


def _warn_of(what: str, problems: Sequence[Problem]) -> None:
    """Tell that these were left out, a few of them by name."""
    if problems:
        named = ", ".join(problem.id for problem in problems[:NUM_NAMED])
        more = ", ..." if len(problems) > NUM_NAMED else ""
        logger.warning("left out %d problems %s: %s%s", len(problems), what, named, more)


def _joined_answer(solution: Any, answer: str) -> str | None:
    """All boxes of a solution that ends in several joined ones, of which the answer is the last."""
    if not isinstance(solution, str) or gold_from_solution(solution) != answer:
        return None
    joined = gold_from_solution(solution, joined=True)
    return None if joined == answer else joined


def _normal_text(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
