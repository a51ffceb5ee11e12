import dataclasses
import errno
import gzip
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.shards
import data.trajectories
from data.journal_index import Keys, summaries
from data.shards import seal, unseal
from data.trajectories import Journal, read_trajectories, summarize
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
    assert Trajectory.from_json(unseal(line.encode() + b"\n")).executions[0].text == "42"


def test_a_new_journal_goes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    write(tmp_path, attempt(sample=0))
    with Journal(tmp_path) as journal:
        assert journal.done() == {("set/0", 0)}
        journal.append(attempt(sample=1))
        assert journal.done() == {("set/0", 0), ("set/0", 1)}
    assert [t.sample for t in read_trajectories(tmp_path)] == [0, 1]


def fill(folder: Path, num: int, *, shard: int = 2, first: int = 0) -> Path:
    """A journal of `num` samples, `shard` of them in each shard."""
    with Journal(folder, max_shard_trajectories=shard) as journal:
        for sample in range(first, first + num):
            journal.append(attempt(sample=sample))
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.jsonl*"))


def samples(folder: Path) -> list[int]:
    return [t.sample for t in read_trajectories(folder)]


@pytest.mark.parametrize("limit", [{"max_shard_bytes": 1000}, {"max_shard_trajectories": 2}])
def test_full_shards_are_closed_by_bytes_or_by_number_and_read_in_order(
    tmp_path: Path, limit: dict[str, int]
) -> None:
    assert 500 < len(seal(attempt().to_json())) < 1000  # so that both limits close after two
    for first in (0, 3):
        with Journal(tmp_path, **limit) as journal:
            for sample in range(first, first + 3):
                journal.append(attempt(sample=sample))
    assert names(tmp_path) == ["00000.jsonl.gz", "00001.jsonl.gz", "00002.jsonl", "index.jsonl"]
    assert samples(tmp_path) == [0, 1, 2, 3, 4, 5]
    with Journal(tmp_path) as journal:
        assert journal.done() == {("set/0", sample) for sample in range(6)}


def test_a_closed_shard_is_a_gzip_file_of_the_lines(tmp_path: Path) -> None:
    lines = write(tmp_path / "plain", *(attempt(sample=s) for s in range(2))).read_bytes()
    fill(tmp_path / "closed", 3)
    assert gzip.decompress((tmp_path / "closed" / "00000.jsonl.gz").read_bytes()) == lines


def test_with_a_good_index_no_closed_shard_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, 7)
    index = (tmp_path / "index.jsonl").read_bytes()

    def refuse(path: Path, _: str) -> None:
        path.stat()
        raise AssertionError("a closed shard was unpacked")

    with monkeypatch.context() as patched:
        patched.setattr(data.shards.gzip, "open", refuse)
        with Journal(tmp_path) as journal:
            assert len(journal.done()) == 7
        # An attempt at `test_trajectories.attempt` calls a tool once and samples 3 + 2 tokens.
        counts = {"stop_reasons": {"answered": 7}, "tool_calls": 7, "sampled_tokens": 35}
        assert summarize(tmp_path).counts() == {"trajectories": 7, **counts}
        (tmp_path / "index.jsonl").unlink()
        with pytest.raises(AssertionError, match="unpacked"):
            Journal(tmp_path)
    Journal(tmp_path).close()
    assert (tmp_path / "index.jsonl").read_bytes() == index  # made again


def test_an_index_that_does_not_fit_its_shard_is_not_believed(tmp_path: Path) -> None:
    fill(tmp_path / "a", 5)
    fill(tmp_path / "b", 5, first=10)
    shutil.copy(tmp_path / "b" / "00000.jsonl.gz", tmp_path / "a")
    with Journal(tmp_path / "a") as journal:
        assert journal.done() == {("set/0", sample) for sample in (10, 11, 2, 3, 4)}
    index = tmp_path / "a" / "index.jsonl"
    index.write_bytes(index.read_bytes().replace(b"[2, 3]", b"[2, 9]") + b'{"shard": "00001.jsonl.gz", "torn')
    assert summarize(tmp_path / "a").done == {("set/0", sample) for sample in (10, 11, 2, 3, 4)}


def test_a_torn_index_costs_only_its_last_line(tmp_path: Path) -> None:
    index = fill(tmp_path, 5) / "index.jsonl"
    index.write_bytes(index.read_bytes()[:-20])
    assert [is_indexed for *_, is_indexed in summaries(tmp_path)] == [
        True,
        False,
        False,
    ]  # the last one is open
    fill(tmp_path, 2, first=5)
    assert [is_indexed for *_, is_indexed in summaries(tmp_path)] == [True, True, True, False]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole: whole[:-9], "00001.jsonl.gz: corrupt: Compressed file ended"),
        (lambda whole: whole[:30] + bytes([whole[30] ^ 1]) + whole[31:], "00001.jsonl.gz"),
        (lambda whole: b"", "00001.jsonl.gz: corrupt: it is empty"),
        (lambda whole: b"\0" + whole, "00001.jsonl.gz: corrupt: Not a gzipped file"),
        (None, "00001.jsonl.gz is missing"),
    ],
)
@pytest.mark.parametrize("with_index", [True, False])
def test_a_damaged_or_missing_shard_is_an_error_that_says_what_to_do(
    tmp_path: Path, damage: Callable[[bytes], bytes] | None, message: str, with_index: bool
) -> None:
    shard = fill(tmp_path, 5) / "00001.jsonl.gz"
    whole = shard.read_bytes()
    shard.unlink()
    if damage:
        shard.write_bytes(damage(whole))
    if not with_index:
        (tmp_path / "index.jsonl").unlink()
    for act in (lambda: samples(tmp_path), lambda: Journal(tmp_path), lambda: summarize(tmp_path)):
        with pytest.raises(InputError) as caught:
            act()
        assert str(caught.value).startswith(f"{tmp_path}/{message}")
        assert re.search(r"restore .*, or .* resume the run", str(caught.value))
        assert "\n" not in str(caught.value)
    shard.unlink(missing_ok=True)
    (tmp_path / "00001.jsonl").touch()  # the mend that the message proposes
    assert samples(fill(tmp_path, 2, first=2)) == [0, 1, 4, 2, 3]


def test_a_missing_last_shard_is_noticed_by_the_index(tmp_path: Path) -> None:
    fill(tmp_path, 4)
    fill(tmp_path, 1, first=4)
    (tmp_path / "00002.jsonl").unlink()
    (tmp_path / "00001.jsonl.gz").unlink()
    with pytest.raises(InputError, match=r"00001\.jsonl\.gz is missing"):
        read_trajectories(tmp_path)


def test_a_crash_while_a_shard_is_closed_is_mended(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    closed = tmp_path / "00000.jsonl.gz"
    whole = closed.read_bytes()
    plain = tmp_path / "00000.jsonl"
    plain.write_bytes(gzip.decompress(whole))  # killed after the renaming
    assert samples(tmp_path) == [0, 1, 2, 3, 4]
    Journal(tmp_path).close()
    assert not plain.exists()
    plain.write_bytes(gzip.decompress(whole))  # killed before it
    closed.unlink()
    (tmp_path / ".00000.jsonl.gz.partial").write_bytes(whole[:40])
    assert samples(tmp_path) == [0, 1, 2, 3, 4]
    Journal(tmp_path).close()
    assert (plain.exists(), closed.read_bytes()) == (False, whole)
    assert not list(tmp_path.glob("*.partial"))


def test_a_reader_does_not_mind_that_a_shard_is_closed_meanwhile(tmp_path: Path) -> None:
    reader = read_trajectories(fill(tmp_path, 3))
    assert next(reader).sample == 0
    fill(tmp_path, 4, first=3)
    assert not (tmp_path / "00001.jsonl").exists()
    assert [t.sample for t in reader] == [1, 2, 3]  # the two shards that there were


def test_a_shard_that_cannot_be_compressed_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(data.shards.shutil, "copyfileobj", refuse)
        fill(tmp_path, 5)
    assert "00000.jsonl: not compressed: OSError: [Errno 28] No space left on device" in caplog.text
    assert names(tmp_path) == ["00000.jsonl", "00001.jsonl", "00002.jsonl"]
    assert samples(fill(tmp_path, 1, first=5)) == [0, 1, 2, 3, 4, 5]
    assert names(tmp_path)[:2] == ["00000.jsonl.gz", "00001.jsonl.gz"]


def test_faults_of_closed_shards_are_replaced_and_counted(tmp_path: Path) -> None:
    with Journal(tmp_path, max_shard_trajectories=1) as journal:
        for sample, fault in ((0, "a"), (1, "b"), (0, None), (1, "c"), (2, None)):
            journal.append(attempt(sample=sample, fault=fault))
    found = [(t.sample, t.fault) for t in read_trajectories(tmp_path)]
    assert found == [(0, None), (2, None), (1, "c")]
    counts = {"stop_reasons": {"answered": 2, "environment_fault": 1}, "tool_calls": 3, "sampled_tokens": 15}
    assert summarize(tmp_path).counts() == {"trajectories": 3, **counts}
    with Journal(tmp_path) as journal:
        assert journal.done() == {("set/0", 0), ("set/0", 2)}
        assert len(journal.done(retry_faults=False)) == 3


def test_a_copied_shard_is_refused_by_readers_and_writers(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    (tmp_path / "00002.jsonl").unlink()
    shutil.copy(tmp_path / "00000.jsonl.gz", tmp_path / "00002.jsonl.gz")
    for act in (lambda: samples(tmp_path), lambda: Journal(tmp_path), lambda: summarize(tmp_path)):
        with pytest.raises(InputError, match=r"00002\.jsonl.*'set/0' sample 0 is already in the journal"):
            act()


@settings(max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abc"), st.integers(0, 70))))
def test_keys_behave_as_a_set(changes: list[tuple[bool, str, int]]) -> None:
    keys, known = Keys(), set()
    for is_added, problem_id, sample in changes:
        for each in (keys, known):
            (each.add if is_added else each.discard)((problem_id, sample))
    assert keys == known and len(keys) == len(known) and sorted(keys) == sorted(known)
    assert known - keys == set() and {("z", 0)} - keys == {("z", 0)}


def test_memory_does_not_grow_with_the_number_of_trajectories(tmp_path: Path) -> None:
    def peak(folder: Path) -> int:
        tracemalloc.start()
        try:
            with Journal(folder) as journal:
                assert sum(1 for _ in read_trajectories(folder)) == len(journal.done())
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    for name, num in (("few", 1_000), ("many", 10_000)):
        with Journal(tmp_path / name, max_shard_trajectories=500) as journal:
            for index in range(num):
                journal.append(attempt(f"set/{index % 50}", index // 50))
    assert peak(tmp_path / "many") < 1.5 * peak(tmp_path / "few")


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


def test_a_torn_line_may_be_as_long_as_it_likes(tmp_path: Path) -> None:
    mib = 1 << 20
    shard = write(tmp_path, dataclasses.replace(attempt(), metadata={"long": "x" * (3 * mib // 2)}))
    for content, num_kept in ((shard.read_bytes(), 1), (b"", 0)):
        shard.write_bytes(content + b"x" * (5 * mib // 2))
        with Journal(tmp_path) as journal:
            assert len(journal.done()) == num_kept
        assert shard.read_bytes() == content


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
