"""Write the report of a run: read what is there, draw it, put it on one page."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data.problems import file_lines, parse_object
from eval.report.figures import figures
from eval.report.page import page
from eval.report.records import Records, keeps, trajectories_of_row, use_of
from eval.report.sources import Run, TrajectorySet, read_run
from eval.report.tally import Tally
from eval.report.tokens import fits, load_local_tokenizer, token_pieces
from mtpo.batches import Row, check_row, row_kind, sides
from mtpo.errors import InputError
from mtpo.grader import Grade, Grader, shared_grader
from mtpo.trajectory import Problem

logger = logging.getLogger(__name__)


def write_report(
    run: str | Path,
    *,
    compare: str | Path | None = None,
    out: str | Path | None = None,
    tokenizer: str | None = None,
    limit: int = 10_000,
) -> Path:
    """Write one HTML file that shows a run folder of any recipe; it needs no network and no server.

    Args:
        compare: another run, for what changed between the two.
        out: the file; by default `report.html` in the run folder, or `report_against_NAME.html` for a comparison.
        tokenizer: name or folder; by default the run's own, where it is on this machine. Without one the tokens
            of the mask view are not told apart within a segment.
        limit: show about this many trajectories, those of problems drawn by their id, the same in every set. The
            figures are of all.

    Raises:
        InputError: there is nothing to show, or a file of the run is broken.
    """
    if limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    runs = _named_apart([read_run(run), *([read_run(compare)] if compare is not None else [])])
    records, notes = Records(), [note for r in runs for note in r.notes]
    total = sum(s.num_trajectories for r in runs for s in r.sets)
    share = min(1.0, limit / total) if total else 1.0
    tallies = [_add_set(records, s, share, shared_grader()) for r in runs for s in r.sets]
    reader = _tokenizer(runs, records, tokenizer)
    for each in runs:
        notes += _add_rows(records, each, share, reader, limit)
    pieces = token_pieces(reader, sorted(records.used_ids)) if reader is not None else None
    if len(records) and reader is None:
        notes.append("No tokenizer on this machine reads the tokens of this run; --tokenizer may name one.")
    if len(records) < total:
        notes.append(
            f"The page holds {len(records):,} of {total:,} trajectories: all those of the problems that were drawn. "
            "Tables are computed from all, plots of ends, lengths and turns from those on the page."
        )
    index = records.finish()
    path = Path(out) if out is not None else runs[0].folder / _name(runs)
    drawn = figures(runs[0], tallies, index)
    _write(path, page(runs, tallies, drawn, index, records.chunks, pieces, notes))
    logger.info("%s: %d trajectories, %.1f MB", path, len(records), path.stat().st_size / 1e6)
    return path


def _name(runs: Sequence[Run]) -> str:
    return f"report_against_{runs[1].folder.resolve().name}.html" if len(runs) > 1 else "report.html"


def _tokenizer(runs: Sequence[Run], records: Records, name: str | None) -> Any | None:
    """The tokenizer of this name, or the run's; None if none is here, or the one here reads the tokens wrongly.

    Raises:
        InputError: there is none of this name.
    """
    candidates = [name] if name else [*(n for run in runs for n in run.tokenizers), *records.policies]
    found = load_local_tokenizer(candidates)
    if name and found is None:
        raise InputError(f"tokenizer {name}: there is none of this name on this machine")
    return found if found is not None and fits(found, records.some_actions) else None


def _named_apart(runs: list[Run]) -> list[Run]:
    """Two runs of one name get their parent folder's in front."""
    if len({run.name for run in runs}) == len(runs):
        return runs
    names = [f"{run.folder.resolve().parent.name}/{run.name}" for run in runs]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, start=1)]
    renamed = []
    for run, name in zip(runs, names, strict=True):
        sets = [
            dataclasses.replace(s, run=name, name=name if s.name == run.name else s.name) for s in run.sets
        ]
        renamed.append(dataclasses.replace(run, name=name, sets=sets))
    return renamed


def _add_set(records: Records, source: TrajectorySet, share: float, grader: Grader) -> Tally:
    drawn = [problem for problem in source.problems.values() if keeps(problem.id, share)]
    records.begin_set(source.name, source.run, source.num_trajectories, drawn)
    tally = Tally(source.name, source.run)
    for trajectory, grade in source.graded(grader):
        problem = source.problem_of(trajectory)
        tally.add(trajectory, problem, grade)
        if keeps(problem.id, share):
            records.add(trajectory, problem, grade)
    return tally


def _add_rows(records: Records, run: Run, share: float, tokenizer: Any, limit: int) -> list[str]:
    """Link training rows to their trajectories; those whose trajectory is not there stand for themselves.

    Returns:
        Notes on what is missing.
    """
    num_left_out, has_strays = 0, False
    for row in itertools.chain.from_iterable(map(_rows, run.row_files)):
        if not keeps(row["problem_id"], share):
            continue
        places = {side: records.find(row["problem_id"], row[f"{side}input_ids"]) for side in sides(row)}
        if None in places.values():
            if len(records) >= 2 * limit:
                num_left_out += 1
                continue
            if not has_strays:
                records.begin_set("training rows", run.name, 0)
                has_strays = True
        numbers = []
        for side, trajectory in trajectories_of_row(row, tokenizer):
            number = places[side]
            if number is None:
                number = records.add(trajectory, Problem(row["problem_id"], "", ""), _label(row, side))
            records.uses.setdefault(number, set()).add(use_of(row, side))
            numbers.append(number)
        if row_kind(row) == "pair":
            records.pairs.append((numbers[0], numbers[1]))
    if num_left_out:
        return [f"{num_left_out:,} training rows are left out: the page holds {len(records):,} trajectories."]
    return []


def _rows(path: Path) -> Iterable[Row]:
    """Rows as they come; `mtpo.batches.read_rows` would hold the whole file in memory.

    Lines without a mask are no rows but the conversations that recipes.sft makes rows of; they are passed over.

    Raises:
        InputError: a line is not JSON, or a row is broken.
    """
    for place, line in file_lines(path):
        if not line.strip():
            continue
        try:
            row = parse_object(line)
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
        if any(f"{side}completion_mask" in row for side in sides(row)):
            check_row(row, place)
            yield row


def _label(row: Row, side: str) -> Grade:
    """What the row says of a trajectory that nothing else is known of."""
    is_good = use_of(row, side) not in ("rejected", "undesirable")
    return Grade("correct" if is_good else "wrong", None, "training row")


def _write(path: Path, parts: Sequence[str]) -> None:
    """The whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(parts)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
