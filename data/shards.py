"""The files of a journal: sealed lines in numbered shards.

    FOLDER/00000.jsonl.gz, ...    closed shards: gzip, never changed again
    FOLDER/00007.jsonl            the open shard, which is the last one; or a full one that is yet to be compressed

A sealed line is one JSON object whose last key, `"crc32"`, is the CRC-32 of the bytes before `, "crc32"`, as 8 hex
digits. A line that ends in a newline was written completely; anything after the last newline of the last shard is
what a crash left behind. A gzip file is renamed into place when it is complete; where the plain file is still beside
it, a crash came between, and both hold the same.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from mtpo.errors import InputError
from mtpo.trajectory import Trajectory

logger = logging.getLogger(__name__)

GZIP_LEVEL = 3
"""On token ids and log-probs 6 times as fast as level 9, for 8 % more bytes."""
BLOCK = 1 << 20
_SHARD = re.compile(r"(\d{5})\.jsonl(\.gz)?")
_CRC = b', "crc32": "%08x"}'
_CRC_LENGTH = len(_CRC % 0)


def seal(row: Mapping[str, Any]) -> bytes:
    """The line that holds a JSON object, with its newline.

    Raises:
        ValueError: a number in it is not finite.
    """
    body = json.dumps(row, allow_nan=False).encode()[:-1]
    return body + _CRC % zlib.crc32(body) + b"\n"


def unseal(line: bytes) -> dict[str, Any]:
    """The inverse of `seal`.

    Raises:
        InputError: the checksum is missing or does not fit.
    """
    body, tail = line[: -_CRC_LENGTH - 1], line[-_CRC_LENGTH - 1 :]
    if tail != _CRC % zlib.crc32(body) + b"\n":
        raise InputError("corrupt: the checksum does not fit")
    return json.loads(body + b"}")


def plain_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.jsonl"


def closed_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.jsonl.gz"


def shard_numbers(folder: Path, known: int = 0) -> range:
    """The numbers of the shards that are there, of which there must be at least `known`.

    Raises:
        InputError: one of them is missing.
    """
    names = (_SHARD.fullmatch(path.name) for path in folder.glob("*.jsonl*"))
    found = {int(name[1]) for name in names if name}
    for number in range(max(known, *(n + 1 for n in found)) if found else known):
        if number not in found:
            raise InputError(f"{closed_path(folder, number)} is missing: {_mend(folder, number)}")
    return range(len(found))


def read_shard(folder: Path, number: int, *, is_last: bool) -> Iterator[tuple[str, Trajectory]]:
    """The trajectories of a shard, each with its place for messages: `FILE, line N`.

    Args:
        is_last: a torn line at its end is left out with a warning, rather than an error.

    Raises:
        InputError: the shard is corrupt.
    """
    path, file = _open(folder, number)
    mend = _mend(folder, number)
    if path.suffix != ".gz":
        mend = "restore the file, or delete the line and resume the run to sample it again"
    with file:
        for line_number, line in enumerate(_unpacked(path, file, mend), start=1):
            place = f"{path}, line {line_number}"
            if is_last and not line.endswith(b"\n"):
                logger.warning("%s: left out %d bytes of a torn line", place, len(line))
                return
            try:
                trajectory = Trajectory.from_json(unseal(line))
            except InputError as error:
                raise InputError(f"{place}: {error}: {mend}") from None
            yield place, trajectory


def compress_shard(folder: Path, number: int) -> Path:
    """Put the closed shard beside the plain one, which is the caller's to delete. The whole file or nothing.

    Raises:
        OSError: it cannot be written.
    """
    closed = closed_path(folder, number)
    partial = closed.with_name(f".{closed.name}.partial")
    try:
        with plain_path(folder, number).open("rb") as plain, partial.open("wb") as file:
            with gzip.GzipFile("", "wb", GZIP_LEVEL, file, mtime=0) as packed:
                shutil.copyfileobj(plain, packed, BLOCK)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(closed)
    finally:
        partial.unlink(missing_ok=True)
    fsync_folder(folder)
    return closed


def cut_torn_line(shard: Path) -> None:
    """Cut off what follows the last newline."""
    with shard.open("r+b") as file:
        size = position = file.seek(0, os.SEEK_END)
        newline = -1
        while position and newline < 0:
            position = max(0, position - BLOCK)
            file.seek(position)
            newline = file.read(BLOCK).rfind(b"\n")
        keep = position + newline + 1
        if keep < size:
            logger.warning("%s: cut off %d bytes of a torn line", shard, size - keep)
            file.truncate(keep)


def fsync_folder(folder: Path) -> None:
    """Make the entry of a new file survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open(folder: Path, number: int) -> tuple[Path, IO[bytes]]:
    """The plain shard if there is one, else the closed one, which a writer makes before it deletes the former."""
    for path in (plain_path(folder, number), closed_path(folder, number)):
        with contextlib.suppress(FileNotFoundError):
            return path, gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # pyright: ignore[reportReturnType]
    raise InputError(f"{closed_path(folder, number)} is missing: {_mend(folder, number)}")


def _unpacked(path: Path, file: IO[bytes], mend: str) -> Iterator[bytes]:
    if path.suffix == ".gz" and not os.fstat(file.fileno()).st_size:  # which gzip itself would not mind
        raise InputError(f"{path}: corrupt: it is empty: {mend}")
    try:
        yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: corrupt: {error}: {mend}") from None


def _mend(folder: Path, number: int) -> str:
    plain = plain_path(folder, number).name
    return f"restore it, or put an empty {plain} in its place and resume the run to sample its trajectories again"
