"""Two processes that train together in a test."""

import os
import time
from pathlib import Path
from typing import NoReturn


def leave_together(folder: str, rank: int) -> NoReturn:
    """End this process once both are done, without gloo's teardown, which hangs or aborts now and then."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"done-{rank}").touch()
    while not all((Path(folder) / f"done-{other}").exists() for other in (0, 1)):
        time.sleep(0.01)
    os._exit(0)
