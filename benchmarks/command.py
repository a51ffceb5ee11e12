"""What the commands of several benchmarks share: the machine in a line, and numbers that make sense."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable


def describe_machine() -> dict[str, object]:
    return {
        "processors": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "kernel": platform.release(),
        "is_root": os.geteuid() == 0,
    }


def at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type: an integer that is not below `minimum`."""

    def integer(text: str) -> int:
        if (value := int(text)) < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        return value

    return integer
