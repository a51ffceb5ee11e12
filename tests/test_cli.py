from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from mtpo.cli import parse_config, run_recipe
from mtpo.errors import InputError


@dataclass(frozen=True)
class Config:
    """Count things."""

    out: str = field(metadata={"help": "run folder"})
    samples: int = field(default=8, metadata={"help": "trajectories per problem"})
    method: Literal["dpo", "kto"] = field(default="dpo", metadata={"help": "loss"})
    mask: bool = field(default=True, metadata={"help": "mask tool output"})
    resume: bool = field(default=False, metadata={"help": "go on"})
    limit: int | None = field(default=None, metadata={"help": "first problems only"})

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(f"--samples must be at least 1, got {self.samples}")


def parse(*argv: str) -> Config:
    return parse_config(Config, "recipes.count", argv)


def run(*argv: str) -> int:
    return run_recipe(Config, lambda config: f"made {config.out}", "recipes.count", argv)


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("samples: 3\nmethod: kto\nout: from-file\n")
    assert parse("--config", str(file)) == Config("from-file", 3, "kto")
    assert parse("--config", str(file), "--samples", "5", "--out", "o") == Config("o", 5, "kto")


def test_dashes_negations_and_optionals() -> None:
    assert parse("--out", "o", "--no-mask", "--resume", "--limit", "4") == Config(
        "o", mask=False, resume=True, limit=4
    )


def test_last_line_is_what_was_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--out", "o") == 0
    assert capsys.readouterr().out == "made o\n"


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("sample: 3", "recipes.count has no option 'sample'"),
        ("- 3", "expected a mapping"),
        ("a: [", "not YAML"),
        ("method: ppo", "method is 'ppo', expected one of"),
    ],
)
def test_bad_config_file_is_one_line(tmp_path: Path, capsys, yaml: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml)
    assert run("--out", "o", "--config", str(file)) == 1
    error = capsys.readouterr().err
    assert message in error and str(file) in error and error.count("\n") == 1


def test_bad_value_is_one_line(capsys) -> None:
    assert run("--out", "o", "--samples", "0") == 1
    assert capsys.readouterr().err == "error: --samples must be at least 1, got 0\n"


def test_a_config_file_begins_with_the_values_of_its_base(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "all.yaml").write_text("samples: 3\nmethod: kto\nlimit: 7\n")
    (tmp_path / "shared" / "model.yaml").write_text("base: all.yaml\nout: model\nlimit: 8\n")
    file = tmp_path / "run.yaml"
    file.write_text("base: shared/model.yaml\nsamples: 4\n")
    assert parse("--config", str(file)) == Config("model", 4, "kto", limit=8)
    assert parse("--config", str(file), "--limit", "9") == Config("model", 4, "kto", limit=9)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("none.yaml", "{0}/c.yaml: base {0}/none.yaml: no such file"),
        ("c.yaml", "{0}/c.yaml: base is 'c.yaml', expected another file of options"),
        ("d.yaml", "{0}/c.yaml: base {0}/d.yaml: base is 'c.yaml', expected another file"),
        ("3", "{0}/c.yaml: base is 3, expected another file"),
    ],
)
def test_a_bad_base_is_one_line_that_names_the_files(tmp_path: Path, capsys, base: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(f"base: {base}\n")
    (tmp_path / "d.yaml").write_text("base: c.yaml\n")
    assert run("--out", "o", "--config", str(tmp_path / "c.yaml")) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message.format(tmp_path) in error


def test_missing_config_file_is_named(capsys) -> None:
    assert run("--out", "o", "--config", "absent.yaml") == 1
    assert "absent.yaml: no such file" in capsys.readouterr().err


def test_unknown_and_abbreviated_flags_are_refused() -> None:
    for flag in ("--sample", "--nonsense"):
        with pytest.raises(SystemExit, match="2"):
            parse("--out", "o", flag, "1")


def test_system_error_is_one_line_naming_the_file(capsys) -> None:
    def recipe(config: Config) -> str:
        return Path(config.out, "absent").read_text()

    assert run_recipe(Config, recipe, "recipes.count", ["--out", "nowhere"]) == 1
    assert capsys.readouterr().err == "error: nowhere/absent: No such file or directory\n"


def test_interrupt_says_how_to_go_on(capsys) -> None:
    def recipe(config: Config) -> str:
        raise KeyboardInterrupt

    assert run_recipe(Config, recipe, "recipes.count", ["--out", "o"]) == 130
    assert "--resume" in capsys.readouterr().err


def test_the_option_that_may_come_first_needs_no_flag() -> None:
    @dataclass(frozen=True)
    class View:
        """Look at a run."""

        FIRST: ClassVar = "run"
        run: str = field(metadata={"help": "run folder"})
        port: int = field(default=0, metadata={"help": "port"})

    for argv in (["runs/a", "--port", "1"], ["--port", "1", "--run", "runs/a"]):
        assert parse_config(View, "recipes.view", argv) == View("runs/a", 1)


def test_of_many_processes_the_first_prints_the_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in "012":
        monkeypatch.setenv("RANK", rank)
        assert (
            run_recipe(Config, lambda config, rank=rank: f"by {rank}", "recipes.count", ["--out", "x"]) == 0
        )
    assert capsys.readouterr().out == "by 0\n"


def test_the_end_of_another_process_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def recipe(config: Config) -> str:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:54981.")

    assert run_recipe(Config, recipe, "recipes.count", ["--out", "x"]) == 1
    assert capsys.readouterr().err == (
        "error: another process of this run has ended: its own message says why\n"
    )
