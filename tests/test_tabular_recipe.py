import json
import sys
from pathlib import Path

import pytest

from mtpo.runs import read_json
from recipes import tabular


def test_the_recipe_prints_its_table_and_writes_the_plot_and_its_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert tabular.main(["--out", str(out), "--steps", "120"]) == 0
    shown = capsys.readouterr().out
    assert "| game | method | 10 steps | 100 steps | 120 steps |" in shown
    assert "| beta 0.1 | 0.0784 | 0.5000 |" in shown and "| beta 1.0 | 0.4387 | 0.5000 |" in shown
    assert shown.splitlines()[-1] == f"14 runs of 120 steps in 3 games: {out / 'convergence.png'}"
    assert (out / "convergence.png").read_bytes().startswith(b"\x89PNG")

    curves = [json.loads(line) for line in (out / "convergence.jsonl").read_text().splitlines()]
    assert len(curves) == len(read_json(out / "summary.json")) == 14
    for curve in curves:
        assert curve["steps"][0] == 1 and curve["steps"][-1] == 120
        assert len(curve["steps"]) == len(curve["gap"]) == len(curve["kl"])
        nash_is_its_aim = curve["method"] in ("MTPO", "MTPO, constant step", "Nash-MD", "MTPO-tau")
        assert (curve["gap"][-1] < 1e-3) == nash_is_its_aim, (curve["game"], curve["method"])

    assert tabular.main(["--out", str(out), "--steps", "120"]) == 1
    assert "already holds a run" in capsys.readouterr().err


def test_without_matplotlib_the_recipe_names_the_extra_and_makes_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what makes `import matplotlib` fail
    assert tabular.main(["--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "error: the plot needs matplotlib: pip install -e '.[report]'\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "value", "complaint"),
    [
        ("--tau", "0", "--tau must be between 0.001 and 100, got 0.0"),
        ("--steps", "3", "--steps must be at le"),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str, complaint: str
) -> None:
    assert tabular.main(["--out", str(tmp_path / "run"), flag, value]) == 1
    assert capsys.readouterr().err.startswith(f"error: {complaint}")
