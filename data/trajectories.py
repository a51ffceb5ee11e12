"""The journal: finished trajectories on disk, one checksummed JSON line each, safe against crashes.

    FOLDER/00000.jsonl, 00001.jsonl, ...    shards; only the last one grows
    FOLDER/.lock                            held by the one process that writes

The last key of a line, `"crc32"`, is the CRC-32 of the bytes before `, "crc32"`, as 8 hex digits. A line that
ends in a newline was written completely; anything after the last newline is what a crash left behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from mtpo.errors import InputError, MtpoError
from mtpo.trajectory import StopReason, Trajectory

logger = logging.getLogger(__name__)

Key = tuple[str, int]
"""(problem id, sample): identifies a trajectory in its journal."""

_CRC = b', "crc32": "%08x"}'
_CRC_LENGTH = len(_CRC % 0)


class Journal:
    """Appends trajectories to a folder, from one process and one thread at a time.

    When `append` returns, the line is with the operating system and survives the death of this process; every
    `fsync_every_s` seconds, when a shard is full and on closing it is also forced to disk and survives a power cut.
    Opening reads the whole folder: it cuts off what a crash left behind, and knows what is done.

    Raises:
        InputError: another process writes this journal, or a line in it is corrupt.
    """

    def __init__(
        self, folder: str | Path, *, max_shard_bytes: int = 64 << 20, fsync_every_s: float = 5.0
    ) -> None:
        self.folder = Path(folder)
        self._max_shard_bytes = max_shard_bytes
        self._fsync_every_s = fsync_every_s
        self._last_fsync = time.monotonic()
        self._shard = -1  # no shard open
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.folder)
        try:
            shards = _shards(self.folder)
            if shards:
                _cut_torn_line(shards[-1])
            self._is_fault = {_key(t): _is_fault(t) for t in _read(shards)}
            self._number = int(shards[-1].stem) if shards else 0
        except BaseException:
            os.close(self._lock)
            raise

    def append(self, trajectory: Trajectory) -> None:
        """Write one trajectory.

        Raises:
            InputError: the journal already has this (problem, sample), and not as a fault; or a number in the
                trajectory is not finite, which JSON cannot hold.
            MtpoError: the line could not be written, say because the disk is full: it is taken back, everything
                written before is kept, and the journal is closed. Or the journal was closed before.
        """
        if self._lock < 0:
            raise MtpoError(f"{self.folder}: the journal is closed")
        key = _key(trajectory)
        if self._is_fault.get(key) is False:
            raise InputError(f"{self.folder}: {_name(key)} is already in the journal")
        line = encode_line(trajectory)
        try:
            self._write(line)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.close()
            raise MtpoError(
                f"{self._path}: cannot write {_name(key)}: {error.strerror}; the {len(self._is_fault)} "
                "trajectories written before it are kept, and resuming goes on from there"
            ) from error
        self._is_fault[key] = _is_fault(trajectory)

    def done(self, *, retry_faults: bool = True) -> set[Key]:
        """The (problem, sample) pairs that need no further attempt.

        Args:
            retry_faults: leave out environment faults, so that resuming tries them again.
        """
        return {key for key, is_fault in self._is_fault.items() if not (is_fault and retry_faults)}

    def close(self) -> None:
        """Force everything to disk and let another process write. Closing twice is fine."""
        if self._lock < 0:
            return
        try:
            self._close_shard()
        finally:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _path(self) -> Path:
        return self.folder / f"{self._number:05d}.jsonl"

    def _close_shard(self) -> None:
        if self._shard >= 0:
            shard, self._shard = self._shard, -1
            try:
                os.fsync(shard)
            finally:
                os.close(shard)

    def _write(self, line: bytes) -> None:
        """Write the whole line, or take back what was written of it."""
        if self._shard >= 0 and os.fstat(self._shard).st_size >= self._max_shard_bytes:
            self._close_shard()
            self._number += 1
        if self._shard < 0:
            self._shard = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            _fsync_folder(self.folder)
        before, rest = os.fstat(self._shard).st_size, memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._shard, rest) :]
            if time.monotonic() - self._last_fsync >= self._fsync_every_s:
                os.fsync(self._shard)
                self._last_fsync = time.monotonic()
        except BaseException:
            with contextlib.suppress(OSError):  # if this fails too, the next opening cuts off the torn line
                os.ftruncate(self._shard, before)
            raise


def read_trajectories(folder: str | Path) -> Iterator[Trajectory]:
    """The trajectories of a journal, also while another process writes it; no (problem, sample) twice.

    They come in the order written, except that faults come last: only then is it known that no later attempt
    replaced them. A torn last line is left out with a warning.

    Raises:
        InputError: the folder holds no shard, or a line is corrupt; names file and line.
    """
    shards = _shards(Path(folder))
    if not shards:
        raise InputError(f"{folder}: holds no trajectories (no 00000.jsonl)")
    return _read(shards)


def encode_line(trajectory: Trajectory) -> bytes:
    """The line of a journal that holds this trajectory, with its newline.

    Raises:
        InputError: a number is not finite.
    """
    try:
        body = json.dumps(trajectory.to_json(), allow_nan=False).encode()[:-1]
    except ValueError as error:
        raise InputError(f"{_name(_key(trajectory))} cannot be written: {error}") from None
    return body + _CRC % zlib.crc32(body) + b"\n"


def decode_line(line: bytes) -> Trajectory:
    """The inverse of `encode_line`.

    Raises:
        InputError: the checksum is missing or does not fit, or the content is not a trajectory.
    """
    body, tail = line[: -_CRC_LENGTH - 1], line[-_CRC_LENGTH - 1 :]
    if tail != _CRC % zlib.crc32(body) + b"\n":
        raise InputError("corrupt: the checksum does not fit")
    return Trajectory.from_json(json.loads(body + b"}"))


def _read(shards: list[Path]) -> Iterator[Trajectory]:
    seen: set[Key] = set()
    faults: dict[Key, Trajectory] = {}
    for shard in shards:
        for place, line in _complete_lines(shard, is_last=shard == shards[-1]):
            try:
                trajectory = decode_line(line)
            except InputError as error:
                raise InputError(f"{place}: {error}") from None
            key = _key(trajectory)
            if key in seen:
                raise InputError(f"{place}: {_name(key)} is already in the journal")
            if _is_fault(trajectory):
                faults[key] = trajectory
            else:
                seen.add(key)
                faults.pop(key, None)
                yield trajectory
    yield from faults.values()


def _complete_lines(shard: Path, *, is_last: bool) -> Iterator[tuple[str, bytes]]:
    with shard.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                yield f"{shard}, line {number}", line
            elif is_last:
                logger.warning("%s, line %d: left out %d bytes of a torn line", shard, number, len(line))
            else:
                raise InputError(f"{shard}, line {number}: corrupt: the line has no end")


def _cut_torn_line(shard: Path) -> None:
    """Cut off what follows the last newline."""
    content = shard.read_bytes()
    keep = content.rfind(b"\n") + 1
    if keep < len(content):
        logger.warning("%s: cut off %d bytes of a torn line", shard, len(content) - keep)
        os.truncate(shard, keep)


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]" * 5 + ".jsonl"))


def _lock(folder: Path) -> int:
    """A descriptor that holds the journal's lock until it is closed, by us or by the end of the process."""
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(lock, 20).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise InputError(f"{folder}: process {owner} is writing this journal") from None
    os.truncate(lock, 0)
    os.write(lock, b"%d\n" % os.getpid())
    return lock


def _fsync_folder(folder: Path) -> None:
    """Make the entry of a new file survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _key(trajectory: Trajectory) -> Key:
    return trajectory.problem_id, trajectory.sample


def _is_fault(trajectory: Trajectory) -> bool:
    return trajectory.stop_reason == StopReason.ENVIRONMENT_FAULT


def _name(key: Key) -> str:
    return f"trajectory {key[0]!r} sample {key[1]}"
