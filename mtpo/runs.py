"""A run folder: what was asked for, with which code and versions, and what came out.

OUT/config.json    the config, the seed, the git commit and the versions, written first
OUT/metrics.jsonl  one object a step
OUT/summary.json   written last: its presence means that the run is complete
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtpo.errors import InputError

PACKAGES = (
    "mtpo",
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "sympy",
    "jupyter_client",
    "vllm",
)
MAY_CHANGE = frozenset({"out", "resume"})
"""Options that may differ between a run and its resumption, whatever the recipe."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    @classmethod
    def open(
        cls, out: str | Path, config: Any, *, resume: bool, may_change: frozenset[str] = frozenset()
    ) -> RunFolder:
        """Make the folder, or reopen it with `resume`.

        Args:
            config: the recipe's dataclass; it is written to `config.json`.
            may_change: fields that change no result (worker counts, say) and so may differ on resuming.

        Raises:
            InputError: the folder exists and `resume` is not set, or it holds a run with another config.
        """
        folder, path = cls(Path(out)), Path(out)
        if not is_main_process():
            return folder  # the first process checks and makes it
        options = json.loads(json.dumps(dataclasses.asdict(config), default=str))
        if (path / "config.json").exists():
            if not resume:
                raise InputError(f"--out {path} already holds a run: take another folder, or add --resume")
            before = read_json(path / "config.json")["options"]
            for key in sorted(set(options) | set(before)):
                if key not in MAY_CHANGE | may_change and options.get(key) != before.get(key):
                    raise InputError(
                        f"--resume: {path} was made with {key} = {before.get(key)!r}, "
                        f"not {options.get(key)!r}: take another --out"
                    )
            return folder
        if path.exists() and (not path.is_dir() or any(map(_is_foreign, path.iterdir()))):
            raise InputError(f"--out {path} exists and holds no run of mtpo: take another folder")
        path.mkdir(parents=True, exist_ok=True)
        record = {"options": options, "git_commit": git_commit(), "versions": versions()}
        write_json(path / "config.json", record)
        return folder

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one object to `metrics.jsonl`."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`: the run is complete."""
        if is_main_process():
            write_json(self.path / "summary.json", summary)

    @property
    def summary(self) -> dict[str, Any] | None:
        """What `finish` wrote, or None while the run is incomplete."""
        return read_json(self.path / "summary.json") if (self.path / "summary.json").exists() else None


def is_main_process() -> bool:
    """Whether this is the first of the processes that torchrun or accelerate has started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def write_json(path: Path, value: Any) -> None:
    """Write the whole file or nothing: a reader, or a crash, never sees half of it. Folders are made."""
    _write_whole(path, [json.dumps(value, indent=2, ensure_ascii=False)])


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON value a line, the whole file or nothing. Folders are made."""
    _write_whole(path, (json.dumps(row, ensure_ascii=False) for row in rows))


def _is_foreign(path: Path) -> bool:
    """Whether it is anything else than what a run leaves that was killed while it wrote its config."""
    return not path.name.startswith(".config.json.")


def _write_whole(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """
    Raises:
        InputError: there is no such file, or it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None


def git_commit() -> str | None:
    """The commit of the checkout that mtpo runs from, with `-dirty` if it has changes; None outside one."""
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, if installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
