"""What is in a journal, without its contents: keys and counts, a line a closed shard.

    FOLDER/index.jsonl    sealed lines: {"shard", "sha256", "lines", "first", "last", "samples", "faults", ...}

The index only saves time. A line counts if the closed shard still has its SHA-256; a shard without such a line is
read instead, so that the file may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, MutableSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.shards import closed_path, plain_path, read_shard, seal, shard_numbers, unseal
from mtpo.errors import InputError
from mtpo.trajectory import StopReason, Trajectory

logger = logging.getLogger(__name__)

Key = tuple[str, int]
"""(problem id, sample): identifies a trajectory in its journal."""

INDEX = "index.jsonl"
_NAME = re.compile(rb'\{"shard": "(\d{5})\.jsonl\.gz"')


class Keys(MutableSet[Key]):
    """A set of keys that takes about 200 bytes a problem, whatever the number of samples."""

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        self._samples: dict[str, int] = {}  # one bit a sample
        self._length = 0
        for key in keys:
            self.add(key)

    def __contains__(self, key: Any) -> bool:
        problem_id, sample = key
        return sample >= 0 and bool(self._samples.get(problem_id, 0) >> sample & 1)

    def __iter__(self) -> Iterator[Key]:
        for problem_id, bits in self._samples.items():
            yield from ((problem_id, sample) for sample in range(bits.bit_length()) if bits >> sample & 1)

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"Keys({list(self)})"

    def add(self, value: Key) -> None:
        problem_id, sample = value
        if value not in self:
            self._samples[problem_id] = self._samples.get(problem_id, 0) | 1 << sample
            self._length += 1

    def discard(self, value: Key) -> None:
        problem_id, sample = value
        if value in self:
            self._samples[problem_id] ^= 1 << sample
            self._length -= 1

    def copy(self) -> Keys:
        twin = Keys()
        twin._samples, twin._length = self._samples.copy(), self._length
        return twin


@dataclass
class Summary:
    """Keys and counts of a shard, or of a whole journal."""

    done: Keys = field(default_factory=Keys)
    faults: dict[Key, tuple[int, int]] = field(default_factory=dict)
    """Attempts that met an environment fault, unless replaced: their tool calls and sampled tokens."""
    stop_reasons: Counter[str] = field(default_factory=Counter)
    """Of what is done; so are the next two."""
    tool_calls: int = 0
    sampled_tokens: int = 0
    num_lines: int = 0
    first: Key | None = None
    last: Key | None = None

    @property
    def num_trajectories(self) -> int:
        return len(self.done) + len(self.faults)

    def counts(self) -> dict[str, Any]:
        """For the summary of a run: trajectories, stop reasons, tool calls and sampled tokens, faults included."""
        reasons = dict(self.stop_reasons)
        if self.faults:
            reasons[StopReason.ENVIRONMENT_FAULT.value] = len(self.faults)
        return {
            "trajectories": self.num_trajectories,
            "stop_reasons": dict(sorted(reasons.items())),
            "tool_calls": self.tool_calls + sum(calls for calls, _ in self.faults.values()),
            "sampled_tokens": self.sampled_tokens + sum(tokens for _, tokens in self.faults.values()),
        }

    def check_new(self, key: Key) -> None:
        """
        Raises:
            InputError: there is a trajectory with this key, and not as a fault; or the sample is negative.
        """
        if key in self.done:
            raise InputError(f"{name_of(key)} is already in the journal")
        if key[1] < 0:
            raise InputError(f"{name_of(key)}: the sample must not be negative")

    def add(self, trajectory: Trajectory) -> None:
        """Count the next trajectory of the journal.

        Raises:
            InputError: as `check_new`.
        """
        key = key_of(trajectory)
        self.check_new(key)
        if trajectory.fault is not None:
            self.faults[key] = len(trajectory.executions), trajectory.num_action_tokens
        else:
            self.faults.pop(key, None)
            self.done.add(key)
            self.stop_reasons[trajectory.stop_reason.value] += 1
            self.tool_calls += len(trajectory.executions)
            self.sampled_tokens += trajectory.num_action_tokens
        self.num_lines += 1
        self.first, self.last = self.first or key, key

    def extend(self, later: Summary) -> None:
        """Count the trajectories of a later shard.

        Raises:
            InputError: it has one of the same key, and not in place of a fault.
        """
        for key in itertools.chain(later.done, later.faults):
            self.check_new(key)
            self.faults.pop(key, None)
        for key in later.done:
            self.done.add(key)
        self.faults |= later.faults
        self.stop_reasons += later.stop_reasons
        self.tool_calls += later.tool_calls
        self.sampled_tokens += later.sampled_tokens
        self.num_lines += later.num_lines
        self.first, self.last = self.first or later.first, later.last or self.last

    def to_json(self) -> dict[str, Any]:
        samples: dict[str, list[int]] = {}
        for problem_id, sample in self.done:
            samples.setdefault(problem_id, []).append(sample)
        return {
            "lines": self.num_lines,
            "first": self.first,
            "last": self.last,
            "samples": samples,
            "faults": [[*key, *counts] for key, counts in self.faults.items()],
            "stop_reasons": self.stop_reasons,
            "tool_calls": self.tool_calls,
            "sampled_tokens": self.sampled_tokens,
        }

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Summary:
        return cls(
            done=Keys((problem_id, s) for problem_id, samples in row["samples"].items() for s in samples),
            faults={(problem_id, s): (calls, tokens) for problem_id, s, calls, tokens in row["faults"]},
            stop_reasons=Counter(row["stop_reasons"]),
            tool_calls=row["tool_calls"],
            sampled_tokens=row["sampled_tokens"],
            num_lines=row["lines"],
            first=row["first"] and tuple(row["first"]),
            last=row["last"] and tuple(row["last"]),
        )


def key_of(trajectory: Trajectory) -> Key:
    return trajectory.problem_id, trajectory.sample


def name_of(key: Key) -> str:
    return f"trajectory {key[0]!r} sample {key[1]}"


def shards_of(folder: Path) -> range:
    """The numbers of a journal's shards.

    Raises:
        InputError: one is missing, also the last one where the index knows of it.
    """
    return shard_numbers(folder, known=max(_index_lines(folder), default=-1) + 1)


def summaries(folder: Path) -> Iterator[tuple[int, Summary, bool]]:
    """(shard number, what is in it, whether the index knew), shard by shard.

    Raises:
        InputError: a shard that has to be read is corrupt, or a shard is missing.
    """
    numbers, lines = shards_of(folder), _index_lines(folder)
    for number in numbers:
        row = _index_row(folder, lines[number]) if number in lines else None
        if row is not None and row["sha256"] == _sha256(closed_path(folder, number)):
            yield number, Summary.from_json(row), True
            continue
        summary = Summary()
        for place, trajectory in read_shard(folder, number, is_last=number == numbers[-1]):
            try:
                summary.add(trajectory)
            except InputError as error:
                raise InputError(f"{place}: {error}") from None
        yield number, summary, False


def summarize(folder: str | Path) -> Summary:
    """What is in a journal, also while another process writes it. Opens only shards that the index does not cover.

    Raises:
        InputError: a shard that has to be read is corrupt, or a shard is missing.
    """
    total = Summary()
    for number, summary, _ in summaries(Path(folder)):
        extend_by_shard(total, summary, Path(folder), number)
    return total


def extend_by_shard(total: Summary, summary: Summary, folder: Path, number: int) -> None:
    """`total.extend`, with the shard's name in the message of the error."""
    try:
        total.extend(summary)
    except InputError as error:
        raise InputError(f"{plain_path(folder, number)}: {error}") from None


def add_to_index(folder: Path, number: int, summary: Summary) -> None:
    """Append the line of a closed shard; the latest line of a shard counts."""
    closed = closed_path(folder, number)
    line = seal({"shard": closed.name, "sha256": _sha256(closed), **summary.to_json()})
    with (folder / INDEX).open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # torn by a crash
                line = b"\n" + line
        file.write(line)


def _index_lines(folder: Path) -> dict[int, int]:
    """Where in the index the latest line of each closed shard begins."""
    found, start = {}, 0
    with contextlib.suppress(FileNotFoundError), (folder / INDEX).open("rb") as file:
        for line in file:
            if name := _NAME.match(line):
                found[int(name[1])] = start
            start += len(line)
    return found


def _index_row(folder: Path, start: int) -> dict[str, Any] | None:
    """The line of the index that begins there, or None if it is torn or was changed."""
    with (folder / INDEX).open("rb") as file:
        file.seek(start)
        try:
            return unseal(file.readline())
        except InputError as error:
            logger.warning("%s: left out a line: %s", folder / INDEX, error)
            return None


def _sha256(path: Path) -> str | None:
    """Of the file, or None if there is none."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
