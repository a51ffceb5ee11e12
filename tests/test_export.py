import dataclasses
from pathlib import Path
from typing import Any

import datasets
import pytest

from data.export import Merge, export_rows, features, from_row, read_parquet, to_row
from data.problems import write_problems
from data.trajectories import Journal
from mtpo.errors import InputError
from mtpo.trajectory import Execution, Problem, Segment, StopReason, Trajectory
from recipes import export

PROBLEM = Problem("set/0", "What is 6 · 7?", "42")
LOGPS = (-0.1, -1e-9, -1 / 3)  # as float32 they would not come back


def attempt(sample: int = 0, **changes: Any) -> Trajectory:
    whole = Trajectory(
        problem_id="set/0",
        sample=sample,
        segments=(
            Segment("prompt", (2, 10, 11), text=PROBLEM.question),
            Segment("action", (20, 21, 1), LOGPS, "```python\nprint(6*7)\n```"),
            Segment("observation", (30,), text="42\n"),
            Segment("action", (255_999, 1), None, "\\boxed{42}"),
        ),
        stop_reason=StopReason.ANSWERED,
        executions=(Execution("print(6*7)", "42\n", "ok", 0.01),),
        bos_id=2,
        policy="toy",
        fingerprint="5f2c",
        iteration=1,
        seed=7,
        generate_s=1.5,
        execute_s=0.01,
        metadata={"epoch": 3, "tags": ["a", None]},
    )
    return dataclasses.replace(whole, **changes)


def broken(sample: int = 0) -> Trajectory:
    """An attempt that met a fault before anything was sampled."""
    fault = {"stop_reason": StopReason.ENVIRONMENT_FAULT, "fault": "SandboxError: gone"}
    return attempt(sample, segments=attempt().segments[:1], executions=(), bos_id=None, metadata={}, **fault)


def wrong(sample: int = 0) -> Trajectory:
    segments = (*attempt().segments[:-1], Segment("action", (22, 1), None, "\\boxed{41}"))
    return attempt(sample, segments=segments)


def write(run: Path, *trajectories: Trajectory) -> Path:
    if not (run / "problems.jsonl").exists():
        write_problems(run / "problems.jsonl", [PROBLEM])
    with Journal(run / "trajectories", max_shard_trajectories=2) as journal:
        for trajectory in trajectories:
            journal.append(trajectory)
    return run


def merge(*runs: Path) -> Merge:
    return Merge([run / "trajectories" for run in runs])


def run_main(*argv: object) -> int:
    return export.main([str(a) for a in argv])


def test_a_row_has_the_columns_that_others_expect() -> None:
    row = to_row(attempt())
    assert set(row) == set(features())
    assert row["input_ids"] == [2, 10, 11, 20, 21, 1, 30, 255_999, 1]
    assert row["completion_mask"] == [0, 0, 0, 1, 1, 1, 0, 1, 1]
    assert row["logps"] == [None, None, None, *LOGPS, None, None, None]
    assert [m["role"] for m in row["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert row["messages"][2]["content"] == "42\n"
    assert (row["stop_reason"], row["executions"][0]["status"]) == ("answered", "ok")


def test_a_parquet_file_reads_back_as_the_trajectories_that_were_written(tmp_path: Path) -> None:
    written = [attempt(), broken(1), wrong(2), *(attempt(sample) for sample in range(3, 700))]
    assert export_rows(map(to_row, written), parquet=tmp_path / "t.parquet") == 700
    assert list(read_parquet(tmp_path / "t.parquet")) == written
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]


def test_what_is_no_trajectory_is_an_error_that_names_file_and_row(tmp_path: Path) -> None:
    rows = [to_row(attempt()), to_row(attempt()) | {"completion_mask": [0] * 9}]
    export_rows(rows, parquet=tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"t\.parquet, row 1: not a row of a trajectory"):
        list(read_parquet(tmp_path / "t.parquet"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR0")
    with pytest.raises(InputError, match=r"bad\.parquet: not a Parquet file"):
        list(read_parquet(tmp_path / "bad.parquet"))
    with pytest.raises(InputError, match=r"none\.parquet: no such file"):
        list(read_parquet(tmp_path / "none.parquet"))
    with pytest.raises(InputError, match="not a row of a trajectory"):
        from_row({})


def test_equal_trajectories_of_several_runs_come_once_whatever_their_times(tmp_path: Path) -> None:
    again = attempt(0, generate_s=9.0, executions=(Execution("print(6*7)", "42\n", "ok", 0.7),))
    both = merge(write(tmp_path / "a", attempt(0), attempt(1)), write(tmp_path / "b", again, attempt(2)))
    assert list(both) == [attempt(0), attempt(1), attempt(2)]
    assert (both.num_duplicates, both.num_replaced_faults) == (1, 0)
    twice = merge(tmp_path / "a", tmp_path / "a")
    assert list(twice) == [attempt(0), attempt(1)] and twice.num_duplicates == 2


def test_runs_that_differ_in_a_trajectory_are_refused_with_their_names(tmp_path: Path) -> None:
    runs = write(tmp_path / "a", attempt(0)), write(tmp_path / "b", wrong(0))
    with pytest.raises(
        InputError, match=r"a/trajectories and .*b/trajectories .* 'set/0' sample 0, iteration 1"
    ):
        list(merge(*runs))


@pytest.mark.parametrize("other", [{"iteration": 2}, {"policy": "another"}])
def test_iterations_and_policies_are_kept_apart(tmp_path: Path, other: dict[str, Any]) -> None:
    later = dataclasses.replace(wrong(0), **other)
    runs = write(tmp_path / "a", attempt(0)), write(tmp_path / "b", later)
    assert list(merge(*runs)) == [attempt(0), later]


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_fault_gives_way_to_an_attempt_of_another_run_and_else_comes_last(
    tmp_path: Path, order: str
) -> None:
    write(tmp_path / "a", broken(0), broken(3), attempt(1))
    write(tmp_path / "b", attempt(0), attempt(2))
    both = merge(*(tmp_path / name for name in order))
    found = list(both)
    assert {t.sample for t in found[:-1]} == {0, 1, 2} and found[-1] == broken(3)
    assert all(t.fault is None for t in found[:-1]) and len(found) == 4
    assert (both.num_duplicates, both.num_replaced_faults) == (0, 1)


def test_the_recipe_writes_graded_rows_that_the_datasets_library_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write(tmp_path / "a", attempt(0), wrong(1), broken(2))
    again = write(tmp_path / "b", attempt(0))
    out = tmp_path / "made" / "t.parquet"
    assert run_main("--trajectories", run, again, "--out", out) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"3 trajectories in {out} (1 duplicates and 0 replaced faults left out)"
    options: dict[str, Any] = {"data_files": str(out), "split": "train", "cache_dir": str(tmp_path / "cache")}
    rows = datasets.load_dataset("parquet", **options)
    assert rows["verdict"][:2] == ["correct", "wrong"] and rows["gold_answer"][0] == "42"
    assert rows["answer"][:] == ["42", "41", None]
    assert rows["input_ids"][0] == attempt().input_ids
    assert list(read_parquet(out)) == [attempt(0), wrong(1), broken(2)]


def test_the_recipe_needs_no_problems_without_grades(tmp_path: Path) -> None:
    run = write(tmp_path / "a", attempt(0))
    (run / "problems.jsonl").unlink()
    assert run_main("--trajectories", run, "--out", tmp_path / "a.parquet") == 1
    assert run_main("--trajectories", run, "--out", tmp_path / "a.parquet", "--no_grade") == 0
    assert list(read_parquet(tmp_path / "a.parquet")) == [attempt(0)]


def test_the_recipe_pushes_the_same_rows_to_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pushed: list[tuple[str, bool | None, list[Trajectory]]] = []

    def push(self: datasets.Dataset, repo_id: str, *, private: bool | None = None) -> None:
        pushed.append((repo_id, private, [from_row(row) for row in self.to_list()]))

    monkeypatch.setattr(datasets.Dataset, "push_to_hub", push)
    run = write(tmp_path / "a", attempt(0), attempt(1))
    common = "--trajectories", run, "--push_to_hub", "me/mine"
    assert run_main(*common) == 0
    assert run_main(*common, "--private", "--out", tmp_path / "a.parquet") == 0
    assert pushed == [("me/mine", is_private, [attempt(0), attempt(1)]) for is_private in (False, True)]
    assert list(read_parquet(tmp_path / "a.parquet")) == [attempt(0), attempt(1)]
    assert "in https://huggingface.co/datasets/me/mine (0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "expected --out FILE, --push_to_hub OWNER/NAME, or both"),
        (("--out", "rows.csv"), "--out must end in .parquet, got 'rows.csv'"),
        (("--out", "there.parquet"), "--out there.parquet exists"),
        (("--out", "new.parquet", "--private"), "--private has no effect without --push_to_hub"),
    ],
)
def test_the_recipe_refuses_what_it_cannot_do(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.parquet").touch()
    assert run_main("--trajectories", write(tmp_path / "a", attempt(0)), *argv) == 1
    captured = capsys.readouterr().err.splitlines()
    assert len(captured) == 1 and message in captured[0]


def test_runs_that_mean_other_problems_by_one_id_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, answer in (("a", "42"), ("b", "43")):
        write_problems(tmp_path / name / "problems.jsonl", [dataclasses.replace(PROBLEM, answer=answer)])
        write(tmp_path / name, attempt(0))
    argv = "--trajectories", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "t.parquet"
    assert run_main(*argv) == 1
    assert "b/problems.jsonl: problem 'set/0' is another one" in capsys.readouterr().err
    assert not (tmp_path / "t.parquet").exists()
