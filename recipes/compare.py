"""Compare evaluations of the same problems: each run with the first one, paired by problem.

    python -m recipes.compare runs/eval-sft runs/eval-dpo runs/eval-kto --out runs/comparison

OUT/comparison.json holds scores, differences with 95 % intervals and p-values (exact McNemar for one trajectory a
problem, else an exact permutation test; corrected by Holm for the number of runs), OUT/comparison.md the problems that
got worse or better. Runs over different problems are refused, unless --common takes the problems that they share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from eval.comparison import Run, compare_runs, comparison_page
from mtpo.cli import run_recipe
from mtpo.errors import InputError
from mtpo.runs import RunFolder, write_json


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compare evaluations of the same problems."""

    FIRST: ClassVar = "runs"
    runs: list[str] = field(
        metadata={
            "help": "folders of recipes.evaluate, each compared with the first; may come without --runs"
        }
    )
    out: str = field(metadata={"help": "run folder"})
    common: bool = field(
        default=False, metadata={"help": "compare runs over different problems on those that they share"}
    )
    resume: bool = field(default=False, metadata={"help": "compare again into the same folder"})

    def __post_init__(self) -> None:
        if len(self.runs) < 2:
            raise InputError(f"--runs needs at least 2 evaluations, got {len(self.runs)}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_recipe(Config, compare, "recipes.compare", argv)


def compare(config: Config) -> str:
    first, *others = (Run.read(folder) for folder in config.runs)
    comparisons = compare_runs([(first, other) for other in others], common=config.common)
    folder = RunFolder.open(config.out, config, resume=config.resume)
    page = folder.path / "comparison.md"
    page.write_text(comparison_page(comparisons, first.problems), encoding="utf-8")
    write_json(folder.path / "comparison.json", [comparison.to_json() for comparison in comparisons])
    print("\n".join(map(str, comparisons)))
    folder.finish({"comparisons": len(comparisons)})
    return f"{len(comparisons)} comparisons with {first.name}; the problems that changed are in {page}"


if __name__ == "__main__":
    raise SystemExit(main())
