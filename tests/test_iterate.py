"""What the loop does before it samples: its problem sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from data.problems import MATH_SUBJECTS
from mtpo.cli import parse_config
from recipes.iterate import Config, load_sets, main

PAPER = Path(__file__).resolve().parents[1] / "recipes" / "configs" / "paper"


def worked_out(name: str, numbers: range) -> list[dict[str, Any]]:
    """Rows in the field names of the set, the answer of question n being n."""
    if name == "openai/gsm8k":
        return [{"question": f"gsm {n}?", "answer": f"So.\n#### {n}"} for n in numbers]
    if name == "EleutherAI/hendrycks_math":
        return [{"problem": f"math {n}?", "solution": f"It is $\\boxed{{{n}}}$."} for n in numbers]
    if name == "meta-math/MetaMathQA":
        return [{"query": f"new {n}?", "response": f"So.\nThe answer is: {n}", "type": "X"} for n in numbers]
    return [{"question": f"new {n}?", "solution": f"It is\n#### {n}", "type": "gsm8k"} for n in numbers]


def test_the_papers_prompts_are_three_parts_that_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dev has the first two of them; the second and the third set begin with a prompt of the one before."""
    numbers = {"meta-math/MetaMathQA": range(0, 40), "RLHF4MATH/prompt_iter1": range(0, 10)}
    numbers |= {"RLHF4MATH/prompt_iter2": range(9, 20), "RLHF4MATH/prompt_iter3": range(19, 30)}

    def hub(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        start = 100 * MATH_SUBJECTS.index(config) if config in MATH_SUBJECTS else 0
        return datasets.Dataset.from_list(worked_out(name, numbers.get(name, range(start, start + 3))))

    monkeypatch.setattr(datasets, "load_dataset", hub)
    argv = [
        "--config",
        str(PAPER / "gemma2_9b_mdpo.yaml"),
        "--out",
        "o",
        "--prompts",
        "12",
        "--dev_limit",
        "2",
    ]
    sets = load_sets(parse_config(Config, "recipes.iterate", argv))
    asked = [problem.question for iteration in (1, 2, 3) for problem in sets.part(iteration, 12)]
    assert asked == [f"new {n}?" for n in range(2, 38)]
    assert [p.question for p in sets.dev] == ["new 0?", "new 1?"]
    assert sets.train[0].id == "RLHF4MATH/prompt_iter1:train/2"
    assert sets.train[-1].id == "meta-math/MetaMathQA:train/37"
    assert all(p.answer == p.question.split()[1].rstrip("?") for p in sets.train)
    assert [p.id.rpartition("/")[0] for p in sets.test] == ["gsm8k:test"] * 3 + ["math:test"] * 21


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--launcher", "no-such-program"], "--launcher 'no-such-program': no such program"),
        (["--published", "Gemma 2 9B"], "--published 'Gemma 2 9B' is no row of arXiv 2409.02392"),
        (["--test_dtype", "int8"], "--test_dtype is 'int8'; expected one of float32, bfloat16"),
    ],
)
def test_what_would_fail_after_hours_is_told_at_once(
    option: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "--config",
        str(PAPER / "gemma2_9b_mdpo.yaml"),
        "--problems",
        "nowhere",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main([*argv, *option]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
