import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
    import ctypes, mmap, re
    from pathlib import Path
    from sandbox import syscalls
    from sandbox.warmup import HUGE_PAGE, MADV_COLLAPSE, merge_pages

    def huge_kb():
        return int(re.search(r"AnonHugePages: +(\\d+)", Path("/proc/self/smaps_rollup").read_text())[1])

    room = mmap.mmap(-1, 8 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    room.madvise(mmap.MADV_NOHUGEPAGE)
    room.write(bytes(range(256)) * (8 * HUGE_PAGE // 256))
    room.madvise(mmap.MADV_HUGEPAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(room)) // HUGE_PAGE * HUGE_PAGE + HUGE_PAGE
    try:
        syscalls.call("madvise", start, HUGE_PAGE, MADV_COLLAPSE)
    except OSError as error:
        print("refused:", error)
    else:
        before = huge_kb()
        merge_pages(Path("/proc/self/maps").read_text())
        assert room[:] == bytes(range(256)) * (8 * HUGE_PAGE // 256)
        print("merged:", huge_kb() - before)
"""


def test_pages_of_the_heap_are_merged_and_keep_what_they_hold() -> None:
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    if run.stdout.startswith("refused"):
        pytest.skip(f"no huge pages on this machine: {run.stdout.strip()}")
    [kb] = re.findall(r"merged: (\d+)", run.stdout)
    assert int(kb) >= 6 * 2048  # the first is there already, and one more may lie across the borders
