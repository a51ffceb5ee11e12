"""Put a report on one page that runs nothing but its own script, and opens no connection.

Whatever comes from a run reaches the page in one of three ways: escaped into the text of the overview, as the text
of a drawing, which matplotlib escapes, or as base64, which the script unpacks and sets as `textContent`. The security
policy in the page allows that one script and that one style sheet by their hashes and forbids everything else,
handing strings to HTML parsers included.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from eval.evaluate import Score
from eval.published import SETS, published_accuracies
from eval.report.figures import MISSING_PLOTS, Figure
from eval.report.records import pack
from eval.report.sources import Run
from eval.report.tally import Tally, paired
from eval.report.tokens import Piece
from mtpo.runs import read_json

HERE = Path(__file__).parent


def page(
    runs: Sequence[Run],
    tallies: Sequence[Tally],
    figures: Sequence[Figure],
    index: Mapping[str, Any],
    chunks: Sequence[str],
    pieces: Mapping[int, Piece] | None,
    notes: Sequence[str],
) -> list[str]:
    """The page in parts, to be written one after the other."""
    script, style = ((HERE / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    values = {
        "policy": policy,
        "title": escape(" and ".join(run.name for run in runs)),
        "made": _made(runs[0]),
        "num_trajectories": f"{len(index['rows']['set']):,}",
        "num_pairs": f"{len(index['pairs']):,}",
        "table": "".join(_table(tallies)),
        "paired": "".join(_paired(runs, tallies)),
        "published": "".join(_published(runs[0])),
        "figures": "".join(map(_figure, figures)) or f"<p>{MISSING_PLOTS}</p>",
        "tables": "".join(_tables(runs)),
        "notes": "".join(f"<li>{escape(note)}</li>" for note in notes),
        "config": escape(json.dumps(runs[0].config, indent=2, ensure_ascii=False)),
        "style": style,
        "script": script,
    }
    head, tail = (HERE / "page.html").read_text(encoding="utf-8").split("{{data}}")
    return [_filled(head, values), *_data(index, chunks, pieces), _filled(tail, values)]


def _filled(template: str, values: Mapping[str, str]) -> str:
    """In one pass, so that nothing filled in is filled in again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template)


def _data(
    index: Mapping[str, Any], chunks: Sequence[str], pieces: Mapping[int, Piece] | None
) -> Iterator[str]:
    named = [("index", pack(index)), ("pieces", pack(pieces))]
    named += [(f"{('text', 'tokens')[n % 2]}-{n // 2}", chunk) for n, chunk in enumerate(chunks)]
    for name, content in named:
        yield f'<script type="application/gzip" id="{name}">{content}</script>\n'


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _made(run: Run) -> str:
    """Who made the run, in one line."""
    path = run.folder / "config.json"
    record = read_json(path) if path.exists() else {}
    model, method = run.config.get("model"), run.config.get("method")
    commit, versions = record.get("git_commit"), record.get("versions", {})
    parts = [method, model, commit and f"commit {commit[:12]}"]
    parts += [f"{name} {versions[name]}" for name in ("torch", "transformers", "vllm") if name in versions]
    return " · ".join(escape(str(part)) for part in parts if part)


def _table(tallies: Sequence[Tally]) -> Iterator[str]:
    """The headline table."""
    measured = [(t, t.accuracy) for t in tallies if t.accuracy is not None]
    if not measured:
        return
    columns = ["", "correct", "95 % interval", "problems", "trajectories", "pass@k", "used the tool"]
    columns += ["tool errors", "correct after one", "turns", "tokens"]
    columns += ["faults"] if (has_faults := any(t.num_faults for t, _ in measured)) else []
    yield f"<table><thead><tr>{''.join(f'<th scope=col>{c}</th>' for c in columns)}</tr></thead><tbody>"
    runs = list(dict.fromkeys(tally.run for tally, _ in measured))
    is_several = len(runs) > 1
    for tally, accuracy in measured:
        if is_several and tally.run in runs:
            runs.remove(tally.run)
            yield f'<tr class="run"><th scope="rowgroup" colspan="{len(columns)}">{escape(tally.run)}</th></tr>'
        cells = "".join(f"<td>{cell}</td>" for cell in _cells(tally, accuracy, has_faults))
        yield f'<tr><th scope="row">{escape(tally.name)}</th>{cells}</tr>'
    yield "</tbody></table>"


def _cells(tally: Tally, accuracy: Score, has_faults: bool) -> list[str]:
    pass_at = tally.pass_at
    return [
        f"<strong>{_percent(accuracy.value, 1)}</strong>",
        _interval(accuracy),
        f"{accuracy.num_problems:,}",
        f"{tally.num_trajectories:,}",
        f"{_percent(pass_at[1], 1)} <small>k = {pass_at[0]}</small>" if pass_at else "",
        _percent(tally.num_with_tool, tally.num_counted),
        _percent(tally.num_failed_calls, tally.num_calls),
        _percent(tally.num_recovered, tally.num_with_failed_call),
        f"{tally.num_turns / tally.num_counted:.2f}",
        f"{tally.num_tokens / tally.num_counted:,.0f}",
        *([f"{tally.num_faults:,}"] if has_faults else []),
    ]


def _interval(share: Score) -> str:
    """The interval as numbers, and as a line on a scale from 0 to 100 %."""
    low, value, high = 100 * share.low, 100 * share.value, 100 * share.high
    return (
        f'<svg class="interval" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="scale" d="M0 4H100"/><path class="range" d="M{low:.1f} 4H{high:.1f}"/>'
        f'<path class="value" d="M{value:.1f} 1V7"/></svg>{low:.1f} to {high:.1f}'
    )


def _paired(runs: Sequence[Run], tallies: Sequence[Tally]) -> Iterator[str]:
    """What the run's summary says of two models on the same problems; and the first sets of two runs."""
    path = runs[0].folder / "summary.json"
    summary = read_json(path) if path.exists() else {}
    tests = summary.get("paired") or {}
    if "improved" in tests:
        names = [stage.get("name", "") for stage in summary.get("stages", [{}])]
        tests = {f"{names[-1]} against {names[0]}, greedy": tests}
    else:
        tests = {f"Against {before}": test for before, test in tests.items()}
    after, before = (next((t for t in tallies if t.run == run.name), None) for run in (runs[0], runs[-1]))
    if len(runs) > 1 and after and before and (test := paired(before, after)):
        tests[f"{after.name} against {before.name}"] = dataclasses.asdict(test)
    for name, test in tests.items():
        if {"improved", "worsened", "z", "p"} <= test.keys():
            kind = {"permutation": "permutation test"}.get(test.get("test", ""), "McNemar's test")
            yield (
                f"<p><b>{escape(name)}</b>, problem by problem: {test['improved']} improved, "
                f"{test['worsened']} worsened (exact {kind}: z = {test['z']:.1f}, p = {test['p']:.2g}).</p>"
            )


def _published(run: Run) -> Iterator[str]:
    """The policies of a loop on the paper's test sets, beside the row of the paper that the run names."""
    name, path = run.config.get("published"), run.folder / "summary.json"
    if name is None or not path.exists():
        return
    stages = read_json(path)["stages"]
    heads = "".join(f"<th scope=col>{escape(head)}</th><th scope=col>paper</th>" for head in SETS)
    yield f"<table><caption>{escape(name)}: greedy accuracy, and that of arXiv 2409.02392</caption>"
    yield f"<thead><tr><th></th>{heads}</tr></thead><tbody>"
    for stage, row in zip(stages, published_accuracies(name, len(stages)), strict=True):
        cells = "".join(
            f"<td>{_share(stage.get('by_set', {}).get(head))}</td>"
            f"<td>{'' if row is None else f'{getattr(row, figure):.1f}%'}</td>"
            for head, figure in SETS.items()
        )
        yield f'<tr><th scope="row">{escape(stage["name"])}</th>{cells}</tr>'
    yield "</tbody></table>"


def _share(score: Sequence[float] | None) -> str:
    """A value with both ends of its interval; empty for none."""
    if score is None:
        return ""
    value, low, high = (100 * share for share in score)
    return f"<strong>{value:.1f}%</strong> <small>{low:.1f} to {high:.1f}</small>"


def _tables(runs: Sequence[Run]) -> Iterator[str]:
    """What each evaluation wrote: every figure with its denominator, contamination, comparisons."""
    places = [(found, found.folder / "metrics.json") for run in runs for found in run.sets]
    written = [(found, read_json(path).get("table")) for found, path in places if path.exists()]
    for found, table in written:
        if table:
            name = found.name if found.name == found.run else f"{found.run}, {found.name}"
            is_open = " open" if len(written) == 1 else ""
            title = f"<summary>All figures of {escape(name)}</summary>"
            yield f"<details{is_open}>{title}<pre>{escape(table)}</pre></details>"


def _figure(figure: Figure) -> str:
    wide = ' class="wide"' if figure.is_wide else ""
    drawing = figure.svg.replace("<svg ", f'<svg aria-label="{escape(figure.title)}" ', 1)
    return (
        f"<figure{wide}><figcaption><h3>{escape(figure.title)}</h3><p>{escape(figure.note)}</p></figcaption>"
        f"{drawing}</figure>"
    )


def _percent(part: float, whole: float) -> str:
    """Empty where there is nothing to take a share of."""
    return f"{100 * part / whole:.1f}%" if whole else ""
