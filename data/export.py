"""Trajectories for others: several runs as one stream, a row a trajectory, a Parquet file or a set on the hub.

A row holds all of a trajectory. Its segments are not columns of their own, because actions and what is inserted
between them alternate: a segment is a run of equal values in `completion_mask`, and its text is a message.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from data.journal_index import Keys, key_of, name_of, summarize
from data.trajectories import read_trajectories
from mtpo.errors import InputError
from mtpo.trajectory import Execution, Segment, SegmentKind, StopReason, Trajectory

if TYPE_CHECKING:
    from datasets import Features

Row = dict[str, Any]
MergeKey = tuple[str, int, int, str]
"""(problem id, sample, iteration, policy): identifies a trajectory among several runs."""

ROWS_AT_ONCE = 256
_KINDS: dict[str, SegmentKind] = {"user": "prompt", "assistant": "action", "tool": "observation"}
_AS_THEY_ARE = ("problem_id", "sample", "iteration", "policy", "fingerprint", "seed", "bos_id", "fault")
_SECONDS = ("generate_s", "execute_s")
GRADE_COLUMNS = ("gold_answer", "answer", "verdict")
"""What a grader adds to a row; None without a gold answer."""


class Merge:
    """The trajectories of several journals, each once, those with environment faults last.

    Of trajectories with the same `MergeKey` that differ in nothing but times the first is given. A fault gives way
    to any other attempt. Only keys that more than one journal has are remembered.

    Iterating raises InputError: two journals hold different trajectories under one key, or one of them is damaged.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders
        self.num_duplicates = 0
        """Trajectories left out so far, because an equal one came before."""
        self.num_replaced_faults = 0

    def __iter__(self) -> Iterator[Trajectory]:
        self.num_duplicates = self.num_replaced_faults = 0
        shared = _shared_keys(self.folders)
        first: dict[MergeKey, tuple[bytes, Path]] = {}
        for folder, trajectory in self._faults_last():
            if key_of(trajectory) not in shared:
                yield trajectory
                continue
            key, digest = _merge_key(trajectory), _digest(trajectory)
            if key not in first:
                first[key] = digest, folder
                yield trajectory
            elif trajectory.fault is not None:
                self.num_replaced_faults += 1
            elif first[key][0] == digest:
                self.num_duplicates += 1
            else:
                raise InputError(
                    f"{first[key][1]} and {folder} hold different trajectories of {name_of(key[:2])}, iteration "
                    f"{key[2]}, policy {key[3]!r}: export them one by one, or sample one again with another "
                    "--first_sample"
                )

    def _faults_last(self) -> Iterator[tuple[Path, Trajectory]]:
        rest: list[tuple[Path, Iterator[Trajectory]]] = []
        for folder in self.folders:
            trajectories = read_trajectories(folder)
            for trajectory in trajectories:
                if trajectory.fault is not None:  # and so are all that follow
                    rest.append((folder, itertools.chain([trajectory], trajectories)))
                    break
                yield folder, trajectory
        for folder, faults in rest:
            yield from ((folder, fault) for fault in faults)


def to_row(trajectory: Trajectory) -> Row:
    """The columns of a trajectory, see `features`; the grade's are None."""
    segments = trajectory.segments
    logps = (segment.logps or itertools.repeat(None, len(segment.ids)) for segment in segments)
    return {
        **{name: getattr(trajectory, name) for name in (*_AS_THEY_ARE, *_SECONDS)},
        "messages": trajectory.messages,
        "input_ids": trajectory.input_ids,
        "completion_mask": trajectory.completion_mask,
        "logps": [logp for each in logps for logp in each],
        "stop_reason": trajectory.stop_reason.value,
        "executions": [
            {"code": e.code, "text": e.text, "status": e.status, "seconds": e.seconds}
            for e in trajectory.executions
        ],
        "metadata": json.dumps(dict(trajectory.metadata)),
        **dict.fromkeys(GRADE_COLUMNS),
    }


def from_row(row: Mapping[str, Any]) -> Trajectory:
    """The inverse of `to_row`; grades are left out.

    Raises:
        InputError: the row is not a trajectory.
    """
    try:
        columns = zip(row["completion_mask"], row["input_ids"], row["logps"], strict=True)
        runs = [list(run) for _, run in itertools.groupby(columns, key=lambda column: column[0])]
        segments = tuple(
            _segment(_KINDS[message["role"]], run, message["content"])
            for message, run in zip(row["messages"], runs, strict=True)
        )
        return Trajectory(
            segments=segments,
            stop_reason=StopReason(row["stop_reason"]),
            executions=tuple(Execution(**execution) for execution in row["executions"]),
            metadata=json.loads(row["metadata"]),
            **{name: row[name] for name in (*_AS_THEY_ARE, *_SECONDS)},
        )
    except InputError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"not a row of a trajectory: {type(error).__name__}: {error}") from error


def features() -> Features:
    """The columns and their types."""
    from datasets import Features, List, Value

    text, whole, real = Value("string"), Value("int64"), Value("float64")
    execution = {"code": text, "text": text, "status": text, "seconds": real}
    return Features(
        {
            "problem_id": text,
            "sample": whole,
            "iteration": whole,
            "policy": text,
            "fingerprint": text,
            "seed": whole,
            "bos_id": whole,
            "messages": List({"role": text, "content": text}),
            "input_ids": List(Value("int32")),
            "completion_mask": List(Value("int8")),
            "logps": List(real),  # null where the engine gave none
            "executions": List(execution),
            "stop_reason": text,
            "fault": text,
            "generate_s": real,
            "execute_s": real,
            "metadata": text,
            **dict.fromkeys(GRADE_COLUMNS, text),
        }
    )


def export_rows(
    rows: Iterable[Row], *, parquet: Path | None = None, hub_name: str | None = None, is_private: bool = False
) -> int:
    """Write rows to a Parquet file, or push them to the hub, or both, a few hundred in memory at a time.

    The file is there when it is complete. For the hub, all rows are on disk first.

    Returns:
        How many there were.
    """
    with tempfile.TemporaryDirectory(dir=parquet and parquet.parent, prefix=".export-") as folder:
        partial = Path(folder) / "rows.parquet"
        num_rows = _write_parquet(rows, partial)
        if hub_name is not None:
            from datasets import Dataset

            dataset = cast(Dataset, Dataset.from_parquet(str(partial), cache_dir=folder))
            dataset.push_to_hub(hub_name, private=is_private)
        if parquet is not None:
            partial.replace(parquet)
        return num_rows


def read_parquet(path: str | Path) -> Iterator[Trajectory]:
    """The trajectories of a file that `export_rows` wrote, in order, a few hundred in memory at a time.

    Raises:
        InputError: there is no such file, it is not Parquet, or a row is not a trajectory.
    """
    for place, row in parquet_rows(Path(path)):
        try:
            yield from_row(row)
        except InputError as error:
            raise InputError(f"{place}: {error}") from None


def parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a Parquet file, each with its place for messages: `FILE, row N`, counted from 0.

    Raises:
        InputError: there is no such file, or it is not Parquet.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: not a Parquet file: {error}") from None
    with file:
        rows = (row for batch in file.iter_batches(batch_size=ROWS_AT_ONCE) for row in batch.to_pylist())
        for index, row in enumerate(rows):
            yield f"{path}, row {index}", row


def _write_parquet(rows: Iterable[Row], path: Path) -> int:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    schema = features().arrow_schema  # it tells the datasets library the features again
    source, num_rows = iter(rows), 0
    with path.open("wb") as file:
        with ParquetWriter(file, schema, compression="zstd") as writer:
            while batch := list(itertools.islice(source, ROWS_AT_ONCE)):
                writer.write_table(pa.Table.from_pylist(batch, schema=schema))
                num_rows += len(batch)
        file.flush()
        os.fsync(file.fileno())
    return num_rows


def _segment(kind: SegmentKind, run: Sequence[tuple[int, int, float | None]], text: str) -> Segment:
    logps = tuple(logp for _, _, logp in run)
    return Segment(kind, tuple(i for _, i, _ in run), None if logps[0] is None else logps, text)  # pyright: ignore[reportArgumentType]


def _shared_keys(folders: Sequence[Path]) -> Keys:
    """The keys that more than one journal has."""
    seen, shared = Keys(), Keys()
    for folder in folders if len(folders) > 1 else ():
        summary = summarize(folder)
        for key in itertools.chain(summary.done, summary.faults):
            (shared if key in seen else seen).add(key)
    return shared


def _merge_key(trajectory: Trajectory) -> MergeKey:
    return trajectory.problem_id, trajectory.sample, trajectory.iteration, trajectory.policy


def _digest(trajectory: Trajectory) -> bytes:
    """Of everything but times."""
    row = trajectory.to_json()
    for name in _SECONDS:
        del row[name]
    for execution in row["executions"]:
        del execution["seconds"]
    return hashlib.blake2b(json.dumps(row).encode(), digest_size=16).digest()
