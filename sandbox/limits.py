"""What a session may use: memory, CPU, files, output and patience."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mtpo.errors import InputError

MINIMUM = {
    "memory_mb": 64,
    "cpu_s": 1,
    "max_output_chars": 200,
    "scratch_mb": 1,
    "max_file_mb": 1,
    "max_open_files": 64,
    "max_threads": 0,
    "max_processes": 0,
}
"""Below these the kernel itself, without any code of the model, would not run or have nothing to say."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on one session.

    Raises:
        InputError: a value is not a number, or below what a kernel needs to live.
    """

    memory_mb: int = 1024
    """Address space that the code may add to that of the idle kernel, MiB. Beyond it: MemoryError."""
    cpu_s: int = 60
    """CPU seconds over the life of a kernel, all cells together. Beyond it: the kernel is killed."""
    max_output_chars: int = 4000
    """Characters of a cell's output that the model reads: the first half and the last."""
    scratch_mb: int = 64
    """Size of all files together, those of the session's forks included, MiB. Beyond it: OSError."""
    max_file_mb: int = 16
    """Size of the largest file, MiB. Beyond it: OSError."""
    max_open_files: int = 256
    """File descriptors; the kernel itself holds about 20, a stock one 50. Beyond it: OSError."""
    max_threads: int = 256
    """Threads of the code, those of the session's forks included; a fork itself takes 3. Beyond it:
    RuntimeError."""
    max_processes: int = 0
    """Processes that the code may start, each with `memory_mb` of its own. Beyond it: OSError."""
    startup_timeout_s: float = 30.0
    """Wall seconds for one attempt to start a kernel."""
    interrupt_grace_s: float = 0.5
    """Wall seconds between the interrupt at a cell's deadline and the kill of a kernel that ignores it."""

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Limits:
        """Limits as they stand in a configuration file.

        Raises:
            InputError: there is no such field, or its value is not as described.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise InputError(f"there are no limits {unknown}; choose from {names}")
        return cls(**values)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if name in MINIMUM:
                if type(value) is not int or value < MINIMUM[name]:
                    raise InputError(f"{name} must be an integer of at least {MINIMUM[name]}, got {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise InputError(f"{name} must be a positive number of seconds, got {value!r}")
