import errno
import json
import logging
import os
import random
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import data.trajectories
from data.trajectories import Journal, decode_line, read_trajectories
from mtpo.errors import InputError, MtpoError
from mtpo.trajectory import Execution, Segment, StopReason, Trajectory

ROOT = Path(__file__).resolve().parents[1]


def attempt(problem_id: str = "set/0", sample: int = 0, *, fault: str | None = None) -> Trajectory:
    return Trajectory(
        problem_id=problem_id,
        sample=sample,
        segments=(
            Segment("prompt", (2, 10, 11), text="What is 6 · 7?"),
            Segment("action", (20, 21, 1), (-0.25, -1e-9, -3.0), "```python\nprint(6*7)\n```"),
            Segment("observation", (30,), text='"42"\n'),
            Segment("action", (22, 1), (-0.5, -0.125), "\\boxed{42}"),
        ),
        stop_reason=StopReason.ENVIRONMENT_FAULT if fault else StopReason.ANSWERED,
        executions=(Execution("print(6*7)", "42\n", "ok", 0.01),),
        bos_id=2,
        policy="toy",
        fault=fault,
        metadata={"epoch": 3},
    )


def write(folder: Path, *trajectories: Trajectory) -> Path:
    with Journal(folder) as journal:
        for trajectory in trajectories:
            journal.append(trajectory)
    return folder / "00000.jsonl"


def test_what_is_appended_is_read_back_unchanged_and_in_order(tmp_path: Path) -> None:
    written = [attempt(sample=1), attempt("other/3", 0), attempt(sample=0)]
    write(tmp_path, *written)
    assert list(read_trajectories(tmp_path)) == written


def test_a_line_is_json_whose_last_key_is_the_crc_of_the_bytes_before_it(tmp_path: Path) -> None:
    line = write(tmp_path, attempt()).read_bytes()
    row = json.loads(line)
    body, crc_key, _ = line.partition(b', "crc32"')
    assert crc_key and list(row)[-1] == "crc32"
    assert row["crc32"] == f"{zlib.crc32(body):08x}"
    assert row["problem_id"] == "set/0"


def test_the_line_in_the_readme_is_one_that_the_journal_reads() -> None:
    (line,) = (s for s in (ROOT / "data" / "README.md").read_text().splitlines() if '"crc32": "' in s)
    assert decode_line(line.encode() + b"\n").executions[0].text == "42"


def test_a_new_journal_goes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    write(tmp_path, attempt(sample=0))
    with Journal(tmp_path) as journal:
        assert journal.done() == {("set/0", 0)}
        journal.append(attempt(sample=1))
        assert journal.done() == {("set/0", 0), ("set/0", 1)}
    assert [t.sample for t in read_trajectories(tmp_path)] == [0, 1]


def test_shards_roll_at_their_size_and_are_read_in_order(tmp_path: Path) -> None:
    with Journal(tmp_path, max_shard_bytes=1500) as journal:
        for sample in range(5):
            journal.append(attempt(sample=sample))
    sizes = [shard.stat().st_size for shard in sorted(tmp_path.glob("*.jsonl"))]
    assert len(sizes) > 1 and all(size >= 1500 for size in sizes[:-1])
    assert [t.sample for t in read_trajectories(tmp_path)] == [0, 1, 2, 3, 4]
    with Journal(tmp_path, max_shard_bytes=1500) as journal:
        assert len(journal.done()) == 5


def test_a_line_torn_at_any_byte_costs_only_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = write(tmp_path, attempt(sample=0), attempt(sample=1))
    whole = shard.read_bytes()
    second = whole.index(b"\n") + 1
    for end in range(second + 1, len(whole), 37):
        shard.write_bytes(whole[:end])
        assert [t.sample for t in read_trajectories(tmp_path)] == [0]
        with caplog.at_level(logging.WARNING), Journal(tmp_path) as journal:
            journal.append(attempt(sample=1))
        assert f"cut off {end - second} bytes" in caplog.text
        assert shard.read_bytes() == whole


def test_a_changed_byte_is_an_error_that_names_file_and_line(tmp_path: Path) -> None:
    shard = write(tmp_path, *(attempt(sample=s) for s in range(3)))
    lines = shard.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b"22", b"23", 1)
    shard.write_bytes(b"".join(lines))
    with pytest.raises(InputError, match=r"00000\.jsonl, line 2: corrupt"):
        list(read_trajectories(tmp_path))
    with pytest.raises(InputError, match=r"00000\.jsonl, line 2: corrupt"):
        Journal(tmp_path)
    shard.write_bytes(lines[0] + lines[2])
    assert [t.sample for t in read_trajectories(tmp_path)] == [0, 2]
    Journal(tmp_path).close()  # the refusal above held no lock


def test_a_torn_line_that_is_not_at_the_very_end_is_corrupt(tmp_path: Path) -> None:
    shard = write(tmp_path, attempt(sample=0))
    (tmp_path / "00001.jsonl").write_bytes(shard.read_bytes())
    shard.write_bytes(b'{"problem_id"')
    with pytest.raises(InputError, match=r"00000\.jsonl, line 1: corrupt"):
        list(read_trajectories(tmp_path))


def test_the_same_pair_is_refused_twice(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.append(attempt())
        with pytest.raises(InputError, match="'set/0' sample 0 is already in the journal"):
            journal.append(attempt())
        with pytest.raises(InputError, match="already"):
            journal.append(attempt(fault="kernel died"))
    shard = tmp_path / "00000.jsonl"
    shard.write_bytes(shard.read_bytes() * 2)
    with pytest.raises(InputError, match=r"line 2: .* already in the journal"):
        list(read_trajectories(tmp_path))


def test_a_fault_is_tried_again_and_replaced(tmp_path: Path) -> None:
    fault = attempt(sample=1, fault="kernel died")
    write(tmp_path, fault, attempt(sample=0), attempt(sample=2, fault="engine died"))
    with Journal(tmp_path) as journal:
        assert journal.done() == {("set/0", 0)}
        assert journal.done(retry_faults=False) == {("set/0", 0), ("set/0", 1), ("set/0", 2)}
        journal.append(attempt(sample=1, fault="kernel died again"))
        journal.append(attempt(sample=1))
        assert journal.done() == {("set/0", 0), ("set/0", 1)}
    found = [(t.sample, t.fault) for t in read_trajectories(tmp_path)]
    assert found == [(0, None), (1, None), (2, "engine died")]


def test_only_one_writer_at_a_time(tmp_path: Path) -> None:
    with Journal(tmp_path), pytest.raises(InputError, match=f"process {os.getpid()} is writing"):
        Journal(tmp_path)
    Journal(tmp_path).close()


def test_a_folder_without_a_journal_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing-here: holds no trajectories"):
        read_trajectories(tmp_path / "nothing-here")


def test_a_number_that_json_cannot_hold_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    segments = (Segment("prompt", (1,)), Segment("action", (2,), (float("nan"),)))
    with Journal(tmp_path) as journal:
        with pytest.raises(InputError, match="'p' sample 0 cannot be written"):
            journal.append(Trajectory("p", 0, segments, StopReason.ANSWERED))
        journal.append(attempt())
    assert list(read_trajectories(tmp_path)) == [attempt()]


def test_a_full_disk_takes_the_line_back_and_keeps_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, real_write = 100, os.write

    def write_until_full(descriptor: int, content: bytes) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real_write(descriptor, content[:room])
        room -= written
        return written

    shard = write(tmp_path, attempt(sample=0))
    before = shard.read_bytes()
    with Journal(tmp_path) as journal:
        monkeypatch.setattr(data.trajectories.os, "write", write_until_full)
        with pytest.raises(MtpoError, match=r"sample 1: No space left on device; the 1 trajectories"):
            journal.append(attempt(sample=1))
        assert shard.read_bytes() == before
        with pytest.raises(MtpoError, match="closed"):
            journal.append(attempt(sample=2))
    monkeypatch.undo()
    with Journal(tmp_path) as journal:
        journal.append(attempt(sample=1))
    assert [t.sample for t in read_trajectories(tmp_path)] == [0, 1]


WRITER = """
import os, sys
from data.trajectories import Journal
from mtpo.trajectory import Segment, StopReason, Trajectory

write = os.write
os.write = lambda descriptor, content: write(descriptor, content[:16])  # many chances to die in mid-line
journal = Journal(sys.argv[1], max_shard_bytes=1 << 20)
done = journal.done()
sample = 0
while True:
    if ("p", sample) not in done:
        segments = (Segment("prompt", (1,)), Segment("action", (sample,) * 40_000))
        journal.append(Trajectory("p", sample, segments, StopReason.ANSWERED))
        print(sample, flush=True)
    sample += 1
"""


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    rng, acknowledged = random.Random(0), []
    for _ in range(20):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            acknowledged.append(int(writer.stdout.readline()))
            with pytest.raises(subprocess.TimeoutExpired):
                writer.wait(rng.uniform(0.0, 0.1))
            writer.send_signal(signal.SIGKILL)
            acknowledged += [int(line) for line in writer.stdout]
    found = [t.sample for t in read_trajectories(tmp_path)]
    assert len(acknowledged) == len(set(acknowledged)) >= 20
    assert found == list(range(len(found)))  # nothing twice, nothing out of order
    assert set(acknowledged) <= set(found)
