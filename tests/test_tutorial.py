"""The commands of docs/tutorial.md run, one after the other, as they stand there."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from tests.coin import write_problems_file

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
COMMANDS = re.findall(r"^python -m (recipes\.\w+) (.*)$", PAGE, re.MULTILINE)


@pytest.mark.slow
def test_the_tutorial_runs_as_it_stands(
    coin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a model and problems that are smaller than its own."""
    names = {
        "runs/quickstart/sft/model": str(coin),
        "generated:train": str(write_problems_file(tmp_path / "train.jsonl", "train", 8)),
        "generated:dev": str(write_problems_file(tmp_path / "dev.jsonl", "dev", 8)),
        "generated:train/0": "train/0",
    }
    monkeypatch.chdir(tmp_path)
    done = []
    for name, line in COMMANDS:
        argv = [names.get(word, word) for word in shlex.split(line)]
        argv = [str(ROOT / word) if word.startswith("recipes/configs/") else word for word in argv]
        if name == "recipes.view" or "--dry_run" in argv:  # waits for Ctrl-C; has tests of its own
            continue
        assert importlib.import_module(name).main(argv) == 0, (name, capsys.readouterr().err)
        done.append(name.removeprefix("recipes."))
    assert done == ["generate", "label", "show", "train", "evaluate", "evaluate"]
    assert "improved" in capsys.readouterr().out
