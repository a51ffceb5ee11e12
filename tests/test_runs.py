import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mtpo.errors import InputError
from mtpo.runs import RunFolder, read_json, write_json


@dataclass(frozen=True)
class Config:
    out: str = "run"
    seed: int = 0
    kernels: int = 4
    resume: bool = False


def test_config_json_holds_options_commit_and_versions(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "run", Config(seed=3), resume=False)
    record = read_json(folder.path / "config.json")
    assert record["options"] == {"out": "run", "seed": 3, "kernels": 4, "resume": False}
    assert record["versions"]["python"].startswith("3.")
    assert "git_commit" in record


def test_existing_run_is_refused_without_resume(tmp_path: Path) -> None:
    RunFolder.open(tmp_path / "run", Config(), resume=False)
    with pytest.raises(InputError, match="already holds a run"):
        RunFolder.open(tmp_path / "run", Config(), resume=False)
    RunFolder.open(tmp_path / "run", Config(resume=True), resume=True)


def test_folder_of_something_else_is_never_taken(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for resume in (False, True):
        with pytest.raises(InputError, match="holds no run of mtpo"):
            RunFolder.open(tmp_path, Config(), resume=resume)


def test_a_run_killed_while_it_wrote_its_config_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / ".config.json.4711").write_text('{"options": {"out"')
    RunFolder.open(tmp_path, Config(seed=5), resume=True)
    assert read_json(tmp_path / "config.json")["options"]["seed"] == 5


def test_resuming_with_another_option_names_it(tmp_path: Path) -> None:
    RunFolder.open(tmp_path / "run", Config(), resume=False)
    with pytest.raises(InputError, match="was made with seed = 0, not 1"):
        RunFolder.open(tmp_path / "run", Config(seed=1), resume=True)
    changed = replace(Config(), kernels=8)
    RunFolder.open(tmp_path / "run", changed, resume=True, may_change=frozenset({"kernels"}))


def test_summary_marks_a_complete_run(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "run", Config(), resume=False)
    assert folder.summary is None
    folder.finish({"accuracy": 0.5})
    assert folder.summary == {"accuracy": 0.5}


def test_metrics_are_one_object_a_line(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "run", Config(), resume=False)
    folder.log({"step": 1})
    folder.log({"step": 2})
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_failed_write_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["summary.json"]


def test_broken_json_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": 1,\n oops}')
    with pytest.raises(InputError, match=r"config.json, line 2: not JSON"):
        read_json(path)


def test_of_many_processes_the_first_writes_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in ("1", "0", "2"):  # in whatever order they come
        monkeypatch.setenv("RANK", rank)
        folder = RunFolder.open(tmp_path / "run", Config(), resume=False)
        folder.finish({"rank": rank})
    assert folder.summary == {"rank": "0"}
