"""The journal: finished trajectories on disk, one checksummed JSON line each, safe against crashes.

FOLDER/00000.jsonl.gz, ..., 00007.jsonl    shards: closed ones, and the open one, which grows (`data.shards`)
FOLDER/index.jsonl                         what is in the closed ones (`data.journal_index`)
FOLDER/.lock                               held by the one process that writes
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from data.journal_index import (
    Key,
    Keys,
    Summary,
    add_to_index,
    extend_by_shard,
    key_of,
    name_of,
    shards_of,
    summaries,
    summarize,
)
from data.shards import closed_path, compress_shard, cut_torn_line, fsync_folder, plain_path, read_shard, seal
from mtpo.errors import InputError, MtpoError
from mtpo.trajectory import Trajectory

__all__ = ["Journal", "Key", "read_trajectories", "summarize"]

logger = logging.getLogger(__name__)


class Journal:
    """Appends trajectories to a folder, from one process and one thread at a time.

    When `append` returns, the line is with the operating system and survives the death of this process; every
    `fsync_every_s` seconds, when a shard is full and on closing it is also forced to disk and survives a power cut.
    A shard that is full is compressed by a thread of the journal while the next one grows.
    Opening cuts off what a crash left behind, and learns what is done, from the index as far as that fits the shards.

    Raises:
        InputError: another process writes this journal, a line in it is corrupt, or a shard is missing.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_shard_bytes: int = 64 << 20,
        max_shard_trajectories: int = 4096,
        fsync_every_s: float = 5.0,
    ) -> None:
        self.folder = Path(folder)
        self._max_shard_bytes = max_shard_bytes
        self._max_shard_trajectories = max_shard_trajectories
        self._fsync_every_s = fsync_every_s
        self._last_fsync = time.monotonic()
        self._shard = -1  # no shard open
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.folder)
        self._closing = ThreadPoolExecutor(1, "journal")
        try:
            self._open()
        except BaseException:
            self._closing.shutdown()
            os.close(self._lock)
            raise

    def append(self, trajectory: Trajectory) -> None:
        """Write one trajectory.

        Raises:
            InputError: the journal already has this (problem, sample), and not as a fault; the sample is negative;
                or a number in the trajectory is not finite, which JSON cannot hold.
            MtpoError: the line could not be written, say because the disk is full: it is taken back, everything
                written before is kept, and the journal is closed. Or the journal was closed before.
        """
        if self._lock < 0:
            raise MtpoError(f"{self.folder}: the journal is closed")
        name = name_of(key_of(trajectory))
        try:
            self._all.check_new(key_of(trajectory))
        except InputError as error:
            raise InputError(f"{self.folder}: {error}") from None
        try:
            line = seal(trajectory.to_json())
        except ValueError as error:
            raise InputError(f"{name} cannot be written: {error}") from None
        try:
            self._write(line)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.close()
            raise MtpoError(
                f"{self._path}: cannot write {name}: {error.strerror}; the {self._all.num_trajectories} "
                "trajectories written before it are kept, and resuming goes on from there"
            ) from error
        self._all.add(trajectory)
        self._here.add(trajectory)

    def done(self, *, retry_faults: bool = True) -> Keys:
        """The (problem, sample) pairs that need no further attempt, as they are now.

        Args:
            retry_faults: leave out environment faults, so that resuming tries them again.
        """
        done = self._all.done.copy()
        if not retry_faults:
            done |= self._all.faults.keys()
        return done

    def close(self) -> None:
        """Force everything to disk and let another process write. Closing twice is fine."""
        if self._lock < 0:
            return
        try:
            self._close_shard()
        finally:
            self._closing.shutdown()
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
        return plain_path(self.folder, self._number)

    def _open(self) -> None:
        """Mend what a crash left behind, and learn what is there."""
        numbers = shards_of(self.folder)
        for number in numbers:
            if closed_path(self.folder, number).exists():
                plain_path(self.folder, number).unlink(missing_ok=True)
        self._number = len(numbers)
        self._all, self._here = Summary(), Summary()
        if numbers and plain_path(self.folder, numbers[-1]).exists():
            self._number = numbers[-1]
            cut_torn_line(self._path)
        for number, summary, is_indexed in summaries(self.folder):
            extend_by_shard(self._all, summary, self.folder, number)
            if number == self._number:
                self._here = summary
            elif not is_indexed:
                self._closing.submit(_finish_shard, self.folder, number, summary)

    def _close_shard(self) -> None:
        if self._shard >= 0:
            shard, self._shard = self._shard, -1
            try:
                os.fsync(shard)
            finally:
                os.close(shard)

    def _write(self, line: bytes) -> None:
        """Write the whole line, or take back what was written of it."""
        if self._shard < 0:
            self._open_shard()
        if self._is_full():
            self._close_shard()
            self._closing.submit(_finish_shard, self.folder, self._number, self._here)
            self._number, self._here = self._number + 1, Summary()
            self._open_shard()
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

    def _open_shard(self) -> None:
        self._shard = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        fsync_folder(self.folder)

    def _is_full(self) -> bool:
        size = os.fstat(self._shard).st_size
        return size >= self._max_shard_bytes or self._here.num_lines >= self._max_shard_trajectories


def read_trajectories(folder: str | Path) -> Iterator[Trajectory]:
    """The trajectories of a journal, also while another process writes it; no (problem, sample) twice.

    They come in the order written, except that faults come last: only then is it known that no later attempt
    replaced them. A torn last line is left out with a warning. What is kept in memory grows with the number of
    problems, and of faults, by some 200 bytes each, not with the number of trajectories.

    Raises:
        InputError: the folder holds no shard, a line is corrupt, or a shard is missing; names file and line.
    """
    folder = Path(folder)
    numbers = shards_of(folder)
    if not numbers:
        raise InputError(f"{folder}: holds no trajectories (no 00000.jsonl)")
    return _read(folder, numbers)


def _read(folder: Path, numbers: range) -> Iterator[Trajectory]:
    done = Keys()
    faults: dict[Key, tuple[int, int]] = {}  # the shard and the line of the latest attempt
    for number, index, place, trajectory in _attempts(folder, numbers, last=numbers[-1]):
        key = key_of(trajectory)
        if key in done:
            raise InputError(f"{place}: {name_of(key)} is already in the journal")
        if trajectory.fault is not None:
            faults[key] = number, index
        else:
            done.add(key)
            faults.pop(key, None)
            yield trajectory
    wanted = set(faults.values())
    with_faults = sorted({number for number, _ in wanted})
    for number, index, _, trajectory in _attempts(folder, with_faults, last=numbers[-1]):
        if (number, index) in wanted:
            yield trajectory


def _attempts(
    folder: Path, numbers: Iterable[int], *, last: int
) -> Iterator[tuple[int, int, str, Trajectory]]:
    """(shard, index in it, place for messages, trajectory)."""
    for number in numbers:
        for index, (place, trajectory) in enumerate(read_shard(folder, number, is_last=number == last)):
            yield number, index, place, trajectory


def _finish_shard(folder: Path, number: int, summary: Summary) -> None:
    """Compress a full shard and enter it into the index. If that fails, it stays as it is, and nothing is lost."""
    plain = plain_path(folder, number)
    try:
        if plain.exists():
            compress_shard(folder, number)
        add_to_index(folder, number, summary)
        plain.unlink(missing_ok=True)
    except Exception as error:  # whatever it is: nobody else would hear of it from this thread
        logger.warning("%s: not compressed: %s: %s", plain, type(error).__name__, error)


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
