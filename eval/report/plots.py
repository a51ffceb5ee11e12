"""The report's plots, as SVG that takes its colours and its typeface from the page around it.

matplotlib draws them: it is kept, needs no browser and no network, and its SVG is text. Every colour in a drawing
stands for a variable of the page's style sheet, so that one drawing serves light, dark and print.
"""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.evaluate import Score
from eval.report.sources import TrainingLog
from eval.stages import RATIOS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {
    "ink": "#010101",
    "muted": "#020202",
    "hair": "#030303",
    "paper": "#040404",
    "good": "#050505",
    "bad": "#060606",
    "open": "#070707",
    "cut": "#080808",
    "one": "#090909",
    "two": "#0a0a0a",
    "three": "#0b0b0b",
    "four": "#0c0c0c",
    "five": "#0d0d0d",
    "six": "#0e0e0e",
}
"""Names of the page's colours, and what stands for them while matplotlib draws."""
SERIES = ("one", "two", "three", "four", "five", "six")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mtpo",  # the same drawing gives the same bytes
    "text.parse_math": False,  # names come from data: a `$` is a dollar
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlecolor": COLORS["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLORS["muted"],
    "axes.labelcolor": COLORS["muted"],
    "axes.linewidth": 0.6,
    "text.color": COLORS["ink"],
    "xtick.color": COLORS["muted"],
    "ytick.color": COLORS["muted"],
    "xtick.labelcolor": COLORS["ink"],
    "ytick.labelcolor": COLORS["ink"],
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "grid.color": COLORS["hair"],
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "lines.solid_capstyle": "round",
}
WIDTH = 5.4
"""Inches; half of the page's text."""


@dataclass(frozen=True)
class Curve:
    """Accuracy of policy after policy on one kind of problems."""

    name: str
    points: list[tuple[str, Score]]
    """(policy, accuracy)."""


@dataclass(frozen=True)
class Spread:
    """Numbers of one set, right and wrong trajectories apart."""

    name: str
    correct: Sequence[float]
    wrong: Sequence[float]


def is_available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def learning_curve(curves: Sequence[Curve], policies: Sequence[str]) -> str:
    """Accuracy with its intervals, by policy."""

    def draw(axes: Axes) -> None:
        for index, curve in enumerate(curves):
            color = COLORS[SERIES[index % len(SERIES)]]
            shift = 0.06 * (index - (len(curves) - 1) / 2)
            places = [policies.index(policy) + shift for policy, _ in curve.points]
            shares = [share for _, share in curve.points]
            lows, highs = [100 * s.low for s in shares], [100 * s.high for s in shares]
            axes.vlines(places, lows, highs, color=color, lw=1)
            axes.plot(
                places,
                [100 * s.value for s in shares],
                color=color,
                marker="o",
                ms=4,
                lw=1.4,
                label=curve.name,
            )
        axes.set_xticks(range(len(policies)), policies)
        axes.set_xlim(-0.3, len(policies) - 0.7)
        axes.set_ylabel("correct, %")
        axes.grid(axis="y")

    return _drawing(draw, 3.4, legend_columns=2)


def accuracy_by_group(by_set: Mapping[str, Mapping[str, Score]]) -> str:
    """A line a group, a dot with its interval a set."""
    groups = sorted({group for shares in by_set.values() for group in shares}, reverse=True)
    step = 0.7 / max(1, len(by_set))

    def draw(axes: Axes) -> None:
        for index, (name, shares) in enumerate(by_set.items()):
            color = COLORS[SERIES[index % len(SERIES)]]
            shift = step * (index - (len(by_set) - 1) / 2)
            found = [(place - shift, shares[group]) for place, group in enumerate(groups) if group in shares]
            places = [place for place, _ in found]
            lows, highs = [100 * s.low for _, s in found], [100 * s.high for _, s in found]
            axes.hlines(places, lows, highs, color=color, lw=1)
            axes.plot([100 * s.value for _, s in found], places, "o", color=color, ms=4, label=name)
        axes.set_yticks(range(len(groups)), map(_short, groups))
        axes.set_ylim(-0.6, len(groups) - 0.4)
        axes.set_xlim(-2, 102)
        axes.set_xlabel("correct, %")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")

    height = 0.6 + len(groups) * max(0.24, 0.12 * len(by_set))
    return _drawing(draw, height, legend_columns=3 if len(by_set) > 1 else 0)


def ends(by_set: Mapping[str, Mapping[str, int]], paints: Mapping[str, tuple[str, float]]) -> str:
    """A bar a set, divided by how its trajectories ended.

    Args:
        paints: from each kind of end, in the order of the bar, to one of `COLORS` and how opaque it is.
    """

    def draw(axes: Axes) -> None:
        totals = np.array([max(1, sum(counts.values())) for counts in by_set.values()])
        left = np.zeros(len(by_set))
        for kind, (color, alpha) in paints.items():
            shares = 100 * np.array([counts.get(kind, 0) for counts in by_set.values()]) / totals
            axes.barh(
                range(len(by_set)), shares, left=left, height=0.64, label=kind, color=COLORS[color], alpha=alpha,
            )  # fmt: skip
            left = left + shares
        axes.set_yticks(range(len(by_set)), map(_short, by_set))
        axes.invert_yaxis()
        axes.margins(y=0.01)
        axes.set_xlim(0, 100)
        axes.set_xlabel("trajectories, %")
        _without_scale(axes)

    return _drawing(draw, 0.9 + 0.24 * len(by_set), legend_columns=3)


def spreads(panels: Mapping[str, Sequence[Spread]]) -> str:
    """Median, quartiles and the middle 80 %, of correct and of other trajectories of each set.

    Args:
        panels: from what is measured to its numbers, set by set.
    """

    def draw(*panes: Axes) -> None:
        for axes, (label, sets) in zip(panes, panels.items(), strict=True):
            for place, spread in enumerate(sets):
                _spread(axes, place - 0.14, spread.correct, "good", "correct")
                _spread(axes, place + 0.14, spread.wrong, "bad", "not correct")
            axes.set_yticks(range(len(sets)), [spread.name for spread in sets])
            axes.set_ylim(len(sets) - 0.5, -0.5)
            axes.set_xlim(left=0)
            axes.set_xlabel(label)
            axes.grid(axis="x")
            _without_scale(axes)

    num_sets = max(map(len, panels.values()))
    return _drawing(draw, len(panels) * (0.55 + 0.3 * num_sets) + 0.3, rows=len(panels), legend_columns=2)


def _spread(axes: Axes, place: float, values: Sequence[float], color: str, name: str) -> None:
    if len(values):
        p10, p25, p50, p75, p90 = np.percentile(values, [10, 25, 50, 75, 90])
        axes.hlines(place, p10, p90, color=COLORS[color], lw=1)
        axes.hlines(place, p25, p75, color=COLORS[color], lw=4, alpha=0.5)
        axes.plot([p50], [place], "o", color=COLORS[color], ms=4, label=name)


def _short(name: str) -> str:
    """A name that leaves room for what it names."""
    return name if len(name) <= 32 else name[:31] + "\u2026"


def _without_scale(axes: Axes) -> None:
    """For names instead of numbers on the vertical axis."""
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


PANELS: dict[str, dict[str, str]] = {
    "loss": {"loss": "ink"},
    "margin": {"margin": "ink"},
    "share of pairs in order": {"accuracy": "ink"},
    "log-ratio to reference, nats": dict.fromkeys(RATIOS[0], "good") | dict.fromkeys(RATIOS[1], "bad"),
    "gradient norm": {"grad_norm": "ink"},
}
"""What is drawn of a training run, where it was logged: panels, and their figures with their colours."""


def training(log: TrainingLog) -> tuple[str, bool]:
    """Loss, margin, log-ratios and gradients of one run, step by step.

    Returns:
        The drawing, and whether it needs the whole width.
    """
    panels = {
        title: lines
        for title, names in PANELS.items()
        if (lines := {name: color for name, color in names.items() if log.series(name)[0]})
    }

    def draw(*panes: Axes) -> None:
        for axes, (title, lines) in zip(panes, panels.items(), strict=True):
            for name, color in lines.items():
                steps, values = log.series(name)
                axes.plot(steps, values, color=COLORS[color], lw=0.7, alpha=0.35)
                label = name.rpartition("/")[2] if len(lines) > 1 else None
                axes.plot(*_smooth(steps, values), color=COLORS[color], lw=1.6, label=label)
            axes.set_title(title, pad=6)
            axes.set_xlabel("step")
            axes.grid(axis="y")
            axes.margins(x=0.02)
            if len(lines) > 1:
                axes.axhline(0, color=COLORS["muted"], lw=0.6)
                axes.legend(loc="best")

    is_wide = len(panels) > 2
    return _drawing(draw, 2.1, columns=len(panels), width=2.2 * WIDTH if is_wide else WIDTH), is_wide


def _smooth(steps: Sequence[float], values: Sequence[float]) -> tuple[Any, Any]:
    """A running mean over a twentieth of the steps, without the ends that it cannot fill."""
    window = max(1, len(values) // 20)
    return (
        np.convolve(steps, np.ones(window) / window, "valid"),
        np.convolve(values, np.ones(window) / window, "valid"),
    )


def _drawing(
    draw: Callable[..., None],
    height: float,
    *,
    rows: int = 1,
    columns: int = 1,
    width: float = WIDTH,
    legend_columns: int = 0,
) -> str:
    """What `draw` puts on the axes that it is called with; a legend below, of so many columns, if any."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        panes = figure.subplots(rows, columns, squeeze=False).flat
        draw(*panes)
        if legend_columns:
            handles, names = panes[0].get_legend_handles_labels()
            named = {name: handle for handle, name in zip(handles, names, strict=True)}
            figure.legend(
                named.values(), named, loc="outside lower left", ncol=legend_columns, handlelength=1.2
            )
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _for_page(file.getvalue())


SVG = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}"


def _for_page(svg: str) -> str:
    """A drawing without styles of its own, which the page's security policy would refuse."""
    root = ET.fromstring(svg)
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag in (f"{SVG}metadata", f"{SVG}style")]:
            parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        if (link := element.attrib.pop(f"{XLINK}href", None)) is not None:
            element.set("href", link)
        for declaration in element.attrib.pop("style", "").split(";"):
            name, _, value = declaration.partition(":")
            if value and name.strip() != "font-family":
                element.set(name.strip(), value.strip())
        for name, value in element.items():
            if value in _VARIABLE:
                element.set(name, _VARIABLE[value])
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    return ET.tostring(root, encoding="unicode")


_VARIABLE = {value: f"var(--{name})" for name, value in COLORS.items()}
