"""Trajectories of others: from their records to message lists that `mtpo.chat` can render into ids.

    turns                 question, gold, turns: [{role: assistant or tool, content}] (or that list as a JSON text)
    chosen / rejected     two message lists, as in RLHF4MATH/Gemma-7B-1.1-it-iter1-random-pairs; `prompt` in front if
                          they lack it
    prompt, completion    two message lists, as TRL has them
    messages              one message list, as in RLHF4MATH/SFT_510K
    code, response, ...   a question and flat text with ```python and ```output fences, as ToRA's and MathCoder's;
                          a list of texts is several samples

Contents are kept as they are, but for one thing: an assistant's answer in `<solution>` tags, as in MINT, becomes a box.
A fence around tool output is taken off, and roles are checked to alternate, where `mtpo.chat` renders them.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.export import parquet_rows
from data.problems import file_lines, gold_answer, hub_rows, parse_object
from mtpo.chat import ChatFormat, messages_from_flat_text
from mtpo.errors import InputError
from mtpo.trajectory import Problem, Trajectory

logger = logging.getLogger(__name__)

QUESTION_KEYS = ("question", "problem", "prompt", "input")
FLAT_TEXT_KEYS = ("code", "response", "completion", "generation", "output")
GOLD_KEYS = ("gold", "gt", "ground_truth", "answer")
_HUB_SET = re.compile(r"(\w[\w.-]*/[\w.-]+):([\w.-]+)")
_SOLUTION = re.compile(r"<solution>(.*?)</solution>", re.DOTALL)
ROLES = frozenset({"system", "user", "assistant", "tool"})
_NOT_METADATA = {"turns", "chosen", "rejected", "messages", *QUESTION_KEYS, *FLAT_TEXT_KEYS}

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class ForeignTrajectory:
    """One finished conversation of another program."""

    problem: Problem
    """Its answer is "" where the record has no gold answer."""
    messages: list[Message]
    """Role and content, beginning with the question."""
    metadata: dict[str, Any]
    """The record's other fields; `side` is `chosen` or `rejected` for a pair, `sample` counts texts of a list."""
    place: str = ""
    """Where its record stands, for messages: `FILE, line N`."""


def read_foreign(source: str | Path) -> Iterator[ForeignTrajectory]:
    """The trajectories of a .jsonl, .jsonl.gz or .parquet file, or of `OWNER/NAME:SPLIT` on the hub, in order.

    A problem's id is `DATASET:SPLIT/INDEX` if the record has these fields, as in `load_problems`, else its
    `problem_id`, else `FILE/INDEX` with the line's index from 0.

    Raises:
        InputError: there is no such file or data set, or a record is broken; names file and line.
    """
    name, rows = _source_rows(source)
    for index, (place, row) in enumerate(rows):
        if isinstance(row, bytes) and not row.strip():
            continue
        try:
            fields = parse_object(row) if isinstance(row, bytes) else row
            yield from _from_row(fields, f"{name}/{index}", place)
        except InputError as error:
            raise InputError(f"{place}: {error}") from None


@dataclass(frozen=True)
class Imported:
    """What could be imported of a file, and what could not."""

    problems: list[Problem]
    """As the file names them, in its order."""
    trajectories: list[Trajectory]
    """Samples of a problem are counted in the file's order; `metadata` is the record's."""
    refused: list[str]
    """One line for each conversation that cannot be rendered: its problem, and why."""


def import_file(path: str | Path, chat: ChatFormat) -> Imported:
    """The trajectories of a file in any of the forms above, with ids.

    Raises:
        InputError: there is no such file, a record is broken, or none of them can be imported.
    """
    problems: dict[str, Problem] = {}
    samples: Counter[str] = Counter()
    trajectories, refused = [], []
    for foreign in tqdm(read_foreign(path), desc="importing", unit="traj", delay=2):
        problem = problems.setdefault(foreign.problem.id, foreign.problem)
        names: dict[str, Any] = {"sample": samples[problem.id], "metadata": foreign.metadata}
        try:
            trajectories.append(chat.import_trajectory(problem, foreign.messages, **names))
            samples[problem.id] += 1
        except InputError as error:
            refused.append(f"a trajectory of problem {problem.id}: {error}")
            logger.warning("left out: %s, %s", path, refused[-1])
    if not trajectories:
        reason = f": {refused[0]}" if refused else ""
        raise InputError(f"{path}: none of its {len(refused)} trajectories can be imported{reason}")
    return Imported(list(problems.values()), trajectories, refused)


def _source_rows(source: str | Path) -> tuple[str, Iterator[tuple[str, bytes | Mapping[str, Any]]]]:
    """What ids of a file or data set begin with, and its rows."""
    path = Path(source)
    if path.suffix == ".parquet":
        return path.stem, parquet_rows(path)
    if (hub := _HUB_SET.fullmatch(str(source))) and not path.exists():
        return hub[1], hub_rows(hub[1], (None,), hub[2], "a local copy is loaded by its path: FILE.parquet")
    return path.name.split(".")[0], file_lines(path)


def _from_row(row: Mapping[str, Any], default_id: str, place: str) -> Iterator[ForeignTrajectory]:
    if all(row.get(key) is not None for key in ("dataset", "split", "index")):
        problem_id = f"{row['dataset']}:{row['split']}/{row['index']}"
    else:
        problem_id = str(row.get("problem_id", default_id))
    gold = next((gold_answer(row[key]) for key in GOLD_KEYS if row.get(key) is not None), "")
    metadata = {key: value for key, value in row.items() if key not in _NOT_METADATA}
    for messages, note in _conversations(row):
        question = next((m["content"] for m in messages if m["role"] == "user"), None)
        if question is None:
            raise InputError("the messages hold no question: expected a message with the role 'user'")
        yield ForeignTrajectory(Problem(problem_id, question, gold), messages, metadata | note, place)


def _conversations(row: Mapping[str, Any]) -> Iterator[tuple[list[Message], dict[str, Any]]]:
    """The message lists of one record, each with what tells it from the others."""
    sides = [side for side in ("chosen", "rejected") if row.get(side) is not None]
    text_key = next((key for key in FLAT_TEXT_KEYS if row.get(key) is not None), None)
    if row.get("turns") is not None:
        yield [{"role": "user", "content": _question(row)}, *_messages(row["turns"], "turns")], {}
    elif sides:
        for side in sides:
            messages = _messages(row[side], side)
            if messages[0]["role"] == "assistant":
                messages = [*_prompt(row), *messages]
            yield messages, {"side": side}
    elif isinstance(row.get("completion"), list) and all(isinstance(m, dict) for m in row["completion"]):
        yield [*_prompt(row), *_messages(row["completion"], "completion")], {}
    elif row.get("messages") is not None:
        yield _messages(row["messages"], "messages"), {}
    elif text_key is not None:
        texts = row[text_key] if isinstance(row[text_key], list) else [row[text_key]]
        for sample, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"{text_key!r} must be a text or a list of texts, got {text!r:.80}")
            yield messages_from_flat_text(_question(row), text), {"sample": sample} if len(texts) > 1 else {}
    else:
        known = ", ".join(("turns", "chosen", "rejected", "messages", *FLAT_TEXT_KEYS))
        raise InputError(f"no trajectory among the fields {sorted(row)}; expected one of {known}")


def _prompt(row: Mapping[str, Any]) -> list[Message]:
    if isinstance(row.get("prompt"), list):
        return _messages(row["prompt"], "prompt")
    return [{"role": "user", "content": _question(row)}]


def _question(row: Mapping[str, Any]) -> str:
    question = next((row[key] for key in QUESTION_KEYS if row.get(key) is not None), None)
    if not isinstance(question, str) or not question.strip():
        expected = " or ".join(QUESTION_KEYS)
        raise InputError(f"expected the question as a text in {expected}, got {question!r:.80}")
    return question


def _messages(value: Any, key: str) -> list[Message]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise InputError(f"{key!r} is a text but not JSON: {error}") from None
    if not isinstance(value, list) or not value:
        raise InputError(f"{key!r} must be a list of messages, got {value!r:.80}")
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise InputError(f"{key!r}, message {index}: expected role and content, got {message!r:.80}")
        if message.get("role") not in ROLES:
            raise InputError(
                f"{key!r}, message {index}: unknown role {message.get('role')!r}, expected {sorted(ROLES)}"
            )
    return [{"role": m["role"], "content": _boxed(m)} for m in value]


def _boxed(message: Mapping[str, str]) -> str:
    """The content, with an assistant's `<solution>` tags written as a box, unless they hold one."""

    def box(tags: re.Match[str]) -> str:
        solution = tags.group(1).strip()
        return solution if "\\boxed" in solution else f"\\boxed{{{solution}}}"

    return _SOLUTION.sub(box, message["content"]) if message["role"] == "assistant" else message["content"]
