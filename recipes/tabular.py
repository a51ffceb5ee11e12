"""Run the online methods on small games whose Nash policy is known, and plot how fast each gets there.

    python -m recipes.tabular --out runs/tabular

Expectations are exact: no network, no sampling. OUT/convergence.png has exploitability and KL to the Nash policy
against steps, with the bounds that are proved; OUT/convergence.jsonl has the numbers. Printed are the gaps, and the
table of `recipes.random_tools`: what tools that answer at random do to DPO on whole trajectories.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mtpo.cli import run_recipe
from mtpo.errors import InputError
from mtpo.runs import RunFolder, write_jsonl
from mtpo.tabular import (
    TreeGame,
    cyclic_preference,
    decreasing_step,
    ipo_md_step,
    mtpo_bound,
    mtpo_gap_bound,
    mtpo_tau_tree_step,
    mtpo_tree_step,
    nash_md_bound,
    reference_for,
    rlhf_tree_step,
    solve_tree_nash,
    tree_divergence,
    tree_exploitability,
    tree_outcomes,
)
from recipes.random_tools import random_tools_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[np.float64]
Step = Callable[[Array, int], Array]
"""From the policy after t steps, and t, to the next policy."""

IPO_MD_REF_COEF = 0.125
COLORS = {
    "MTPO": "#0072b2",
    "MTPO, constant step": "#56b4e9",
    "Nash-MD": "#d55e00",
    "MTPO-tau": "#d55e00",
    "IPO-MD": "#009e73",
    "RLHF": "#777777",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Run the online methods on small games whose Nash policy is known."""

    out: str = field(metadata={"help": "run folder"})
    steps: int = field(default=5000, metadata={"help": "updates of each method on each game"})
    tau: float = field(default=0.1, metadata={"help": "temperature of the KL to the reference"})
    seed: int = field(default=0, metadata={"help": "fixes the random games"})
    resume: bool = field(default=False, metadata={"help": "compute again into the same folder"})

    def __post_init__(self) -> None:
        if self.steps < 10:
            raise InputError(f"--steps must be at least 10, got {self.steps}")
        if not 1e-3 <= self.tau <= 1e2:
            raise InputError(f"--tau must be between 0.001 and 100, got {self.tau}")


@dataclass(frozen=True)
class Arena:
    """A game with a name, and its Nash policy."""

    name: str
    num_turns: int
    game: TreeGame
    nash: Array


@dataclass(frozen=True)
class Curve:
    """How one method came along in one game; entry k is after steps[k] steps."""

    game: str
    method: str
    steps: list[int]
    gap: list[float]
    kl: list[float]
    """KL(Nash || policy) over trajectories, in nats."""


def main(argv: Sequence[str] | None = None) -> int:
    return run_recipe(Config, tabular, "recipes.tabular", argv)


def tabular(config: Config) -> str:
    check_matplotlib()
    folder = RunFolder.open(config.out, config, resume=config.resume)
    arenas = make_arenas(config.seed, config.tau)
    curves = [
        follow(arena, name, step, config)
        for arena in arenas
        for name, step in methods_for(arena, config.tau).items()
    ]
    write_jsonl(folder.path / "convergence.jsonl", map(dataclasses.asdict, curves))
    plot(arenas, curves, config.tau, folder.path / "convergence.png")
    print(gap_table(curves))
    print(random_tools_table(seed=config.seed))
    folder.finish({f"{curve.game}: {curve.method}": curve.gap[-1] for curve in curves})
    return f"{len(curves)} runs of {config.steps} steps in {len(arenas)} games: {folder.path / 'convergence.png'}"


def make_arenas(seed: int, tau: float) -> list[Arena]:
    """A cycle whose Nash policy is (0.5, 0.3, 0.2), a random game, and one of two turns with random tools."""
    rng = np.random.default_rng(seed)
    cycle, chaos = cyclic_preference(), random_tournament(rng, 20)
    transitions = np.zeros((4, 3, 4 + 6))
    transitions[0, :, 1:4] = rng.dirichlet(np.full(3, 0.3), 3)
    transitions[1:, :, 4:] = rng.dirichlet(np.full(6, 0.3), (3, 3))
    games = {
        "cycle of 3": TreeGame.one_turn(cycle, reference_for([0.5, 0.3, 0.2], cycle, tau)),
        "20 random actions": TreeGame.one_turn(chaos, rng.dirichlet(np.ones(20))),
        "two turns, random tools": TreeGame(
            transitions, rng.dirichlet(np.ones(3), 4), random_tournament(rng, 6)
        ),
    }
    return [
        Arena(name, 2 if game.num_states > 1 else 1, game, solve_tree_nash(game, tau))
        for name, game in games.items()
    ]


def random_tournament(rng: np.random.Generator, size: int) -> Array:
    """Of each two options one always wins, in no order."""
    upper = np.triu(rng.integers(2, size=(size, size)), 1)
    return upper + np.tril(1 - upper.T, -1) + np.eye(size) / 2


def methods_for(arena: Arena, tau: float) -> dict[str, Step]:
    """MTPO-tau in one turn is Nash-MD. The reward of RLHF is the preference over the reference policy."""
    game = arena.game
    constant = tau / (tau**2 + 1 / 4)  # half of the contraction limit for the fastest rotation there can be
    reward = game.preference @ tree_outcomes(game.mu, game)
    steps: dict[str, Step] = {
        "MTPO": lambda pi, t: mtpo_tree_step(pi, game, tau, decreasing_step(t, tau)),
        "MTPO, constant step": lambda pi, t: mtpo_tree_step(pi, game, tau, constant),
        "Nash-MD" if arena.num_turns == 1 else "MTPO-tau": lambda pi, t: mtpo_tau_tree_step(
            pi, game, tau, decreasing_step(t, tau)
        ),
        "RLHF": lambda pi, t: rlhf_tree_step(pi, game, reward, tau, decreasing_step(t, tau)),
    }
    if arena.num_turns == 1:
        ipo_md = partial(ipo_md_step, preference=game.preference, mu=game.mu[0], tau=tau)
        steps["IPO-MD"] = lambda pi, t: ipo_md(pi[0], eta=constant, ref_coef=IPO_MD_REF_COEF)[None]
    return steps


def follow(arena: Arena, method: str, step: Step, config: Config) -> Curve:
    """Run one method from the reference on, looking at it after about 60 numbers of steps, 10, 100, ... among them."""
    decades = [10**k for k in range(9) if 10**k <= config.steps]
    spaced = np.geomspace(1, config.steps, 60).round().astype(int)
    marks = sorted({*decades, *spaced.tolist()})
    curve, pi = Curve(arena.name, method, marks, [], []), arena.game.mu
    for t in range(config.steps):
        pi = step(pi, t)
        if t + 1 in marks:
            curve.gap.append(tree_exploitability(pi, arena.game, config.tau))
            curve.kl.append(tree_divergence(arena.nash, pi, arena.game))
    return curve


def gap_table(curves: Sequence[Curve]) -> str:
    """A markdown table: the gap after 10, 100, ... steps and at the end."""
    ends = curves[0].steps[-1]
    columns = [10**k for k in range(1, 9) if 10**k < ends] + [ends]
    header = ["game", "method", *(f"{steps} steps" for steps in columns)]
    rows = [
        [curve.game, curve.method, *(f"{curve.gap[curve.steps.index(steps)]:.1e}" for steps in columns)]
        for curve in curves
    ]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("the plot needs matplotlib: pip install -e '.[report]'") from None


def plot(arenas: Sequence[Arena], curves: Sequence[Curve], tau: float, path: Path) -> None:
    """A column a game: the exploitability above, the KL to the Nash policy below, both log-log."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(4 * len(arenas), 6.4), layout="constrained")
    axes = figure.subplots(2, len(arenas), sharex=True, sharey=True, squeeze=False)
    for (top, bottom), arena in zip(axes.T, arenas, strict=True):
        for curve in (c for c in curves if c.game == arena.name):
            top.plot(curve.steps, curve.gap, color=COLORS[curve.method], label=curve.method)
            bottom.plot(curve.steps, curve.kl, color=COLORS[curve.method])
        draw_bounds(top, bottom, arena, tau, curves[0].steps)
        top.set_title(arena.name, fontsize=11)
        bottom.set_xlabel("steps")
    axes[0, 0].set_ylabel("exploitability")
    axes[1, 0].set_ylabel("KL(Nash || policy), nats")
    axes[0, 0].set(xscale="log", yscale="log", ylim=(1e-17, 1e5))
    entries = {}
    for each in axes.flat:
        each.yaxis.set_major_locator(LogLocator(base=1e4, numticks=8))
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
        handles, labels = each.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=len(entries), frameon=False
    )
    figure.suptitle(f"Distance to the Nash policy at temperature {tau:g}")
    figure.savefig(path, dpi=150)


def draw_bounds(top: Axes, bottom: Axes, arena: Arena, tau: float, steps: Sequence[int]) -> None:
    """What is proved for the decreasing steps; of the exploitability, and of Nash-MD, in one turn only."""
    smallest = arena.game.mu[arena.game.mu > 0].min()
    largest_value = max(1.0, -tau * (arena.num_turns - 1) * np.log(smallest))
    kl = [mtpo_bound(t, tau, arena.num_turns, largest_value) for t in steps]
    bottom.plot(steps, kl, "--", color=COLORS["MTPO"], label="bound, MTPO")
    if arena.num_turns == 1:
        top.plot(steps, [mtpo_gap_bound(t, tau) for t in steps], "--", color=COLORS["MTPO"])
        nash_md = [nash_md_bound(t, tau) for t in steps]
        bottom.plot(steps, nash_md, "--", color=COLORS["Nash-MD"], label="bound, Nash-MD")


if __name__ == "__main__":
    raise SystemExit(main())
