"""Draw the figure of the front page from committed results: what SAM does, and what it gains.

    python examples/compare/front_figure.py
    python examples/compare/front_figure.py --task digits-clean

Left: a loss of two parameters with a sharp and a flat minimum. Gradient descent ends in the sharp
one. SAM starts at the same point and walks past it; the arrows are its perturbations. Start,
learning rate and rho were chosen to show this; the notebook sam_in_five_minutes says what happens
from other starts.

Right: test accuracy in one task of the comparison, one dot for each method, over the gradients of
a step. All methods spend the same number of gradients in all; `base` spends half of it. The numbers
are read from --results, by default the committed ones. compare.py makes them.

The figure is written to --out.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from examples.common import arguments
from examples.compare.options import RESULTS

TASK = "digits-noisy"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    text = "folder with TASK/ROW.json; default: the committed results"
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help=text)
    parser.add_argument("--task", default=TASK, metavar="NAME", help=f"default: {TASK}")
    parser.add_argument("--out", type=Path, default=Path("front.png"), metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.patheffects import withStroke

import samx
from examples.common import figures, files
from examples.compare.cells import Cells, better_baseline, read_or_refuse
from examples.compare.comparison_figures import title_of
from examples.compare.rows import BASELINES
from examples.compare.tables import Summary, summarize

START, LEARNING_RATE, RHO, STEPS = (-1.7, 1.5), 0.15, 0.5, 80
PIT, FLAT = (-0.5, 0.8), (1.0, 0.0)  # near the sharp minimum, and the flat minimum
ARROWS = 20  # as many steps show their perturbation
NAMED = 10  # methods with a name, the baselines included
ALWAYS = ("base", "base2x", "sam", "asam", "looksam", "ausam", "momentum-sam")
ALIKE, STEP = 0.03, 0.06  # costs that differ by less share a place, where dots stand side by side
TICKS = (1, 1.5, 2, 3, 4, 6)
HALO = [withStroke(linewidth=2.5, foreground="white")]  # around text on lines


def surface(w: jax.Array) -> jax.Array:
    """Return the loss: a long valley, with a narrow pit in its wall."""
    x, y = w
    valley = (x - 1) ** 2 / 10 + y**2 / 2
    return valley - jnp.exp(-8 * (x + 0.5) ** 2 - 8 * (y - 0.8) ** 2) / 2


def path_of(
    tx: optax.GradientTransformationExtraArgs, begin: tuple[float, float] = START
) -> jax.Array:
    """Return the path of an optimizer on the surface."""

    def step(carry, _):
        w, state = carry
        value, grad = jax.value_and_grad(surface)(w)
        updates, state = tx.update(grad, state, w, value=value, grad=grad, value_fn=surface)
        return (optax.apply_updates(w, updates), state), w

    start = jnp.array(begin)
    _, path = jax.lax.scan(step, (start, tx.init(start)), length=STEPS)
    return path


class Paths(NamedTuple):
    """What the left panel shows."""

    plain: np.ndarray  # of gradient descent
    sam: np.ndarray
    eps: np.ndarray  # SAM's perturbations
    sharp: np.ndarray  # the sharp minimum


def paths() -> Paths:
    """Compute both paths."""
    sgd = optax.with_extra_args_support(optax.sgd(LEARNING_RATE))
    plain, sam = path_of(sgd), path_of(optax.chain(samx.sam(RHO), sgd))
    g = jax.vmap(jax.grad(surface))(sam)
    eps = RHO * g / jnp.linalg.norm(g, axis=1, keepdims=True)
    sharp = path_of(optax.with_extra_args_support(optax.sgd(0.1)), PIT)[-1]
    return Paths(*map(np.asarray, (plain, sam, eps, sharp)))


def draw_paths(axes: Any) -> None:
    """Draw both paths on the surface."""
    plain, sam, eps, sharp = paths()
    x, y = np.meshgrid(np.linspace(-2.3, 1.9, 161), np.linspace(-0.85, 2.15, 117))
    height = jax.vmap(jax.vmap(surface))(jnp.stack([x, y], axis=-1))
    levels = np.linspace(0, 1.7, 14) ** 2  # dense where the loss is low, so that the pit shows
    axes.contourf(x, y, height, levels=levels, cmap="Greys", alpha=0.3, extend="max")
    axes.contour(x, y, height, levels=levels, colors=figures.GREY, linewidths=0.5)
    arrows = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.005}
    axes.quiver(*sam[:ARROWS].T, *eps[:ARROWS].T, color=figures.BLUE, alpha=0.4, **arrows)
    for path, color in ((plain, figures.RED), (sam, figures.BLUE)):
        axes.plot(*path.T, "o-", color=color, markersize=3.5, linewidth=1.4)
    axes.plot(*START, "o", color=figures.INK, markersize=8)
    axes.plot(*np.stack([sharp, np.array(FLAT)]).T, "+", color=figures.INK, ms=11, mew=2)
    for text, place, color, align in (
        ("start", (-1.58, 1.68), figures.INK, "left"),
        ("sharp minimum", (-0.3, 1.2), figures.INK, "left"),
        ("flat minimum", (1.05, 0.22), figures.INK, "center"),
        ("gradient descent", (-0.28, 0.72), figures.RED, "left"),
        ("SAM", (0.1, -0.33), figures.BLUE, "left"),
        ("its perturbations ε", (-2.2, -0.62), figures.BLUE, "left"),
    ):
        axes.text(*place, text, color=color, ha=align, path_effects=HALO)
    axes.set(xticks=[], yticks=[], xlim=(-2.3, 1.9), ylim=(-0.85, 2.15), aspect="equal")
    axes.set_title(ends(plain[-1], sam[-1], sharp))


def ends(plain: np.ndarray, sam: np.ndarray, sharp: np.ndarray) -> str:
    """State where the two paths end."""
    names = [
        "sharp" if np.hypot(*(end - sharp)) < np.hypot(*(end - np.array(FLAT))) else "flat"
        for end in (plain, sam)
    ]
    return "Gradient descent ends in the {} minimum, SAM in the {} one".format(*names)


def check(tasks: dict[str, dict[str, Any]], task: str) -> None:
    """Refuse a task without both baselines, or one that is not about accuracy."""
    cells = tasks.get(task, {})
    if missing := [row for row in BASELINES if row not in cells]:
        arguments.refuse(f"--task {task}: no results of {' and '.join(missing)}")
    if cells["base"].main != "accuracy":
        arguments.refuse(f"--task {task}: its main result is no accuracy")


def named(rows: list[Summary]) -> list[str]:
    """Choose the rows that get a name: some always, the least accurate one, the most accurate."""
    by_accuracy = [each.row for each in sorted(rows, key=lambda each: -each.result.value)]
    chosen = [each.row for each in rows if each.row in ALWAYS]
    return list(dict.fromkeys([*chosen, by_accuracy[-1], *by_accuracy]))[:NAMED]


def side_by_side(costs: dict[str, float]) -> dict[str, float]:
    """Return where each dot stands on the axis of gradients for each step, which is logarithmic.

    Many dots of (almost) equal cost stand in three columns, so that neighbours are apart.

    Args:
        costs: The gradients of a step by row, the most accurate row first.
    """
    places: dict[str, float] = {}
    left = sorted(costs, key=lambda row: costs[row])  # equal ones stay in their order
    while left:
        limit = costs[left[0]] * (1 + ALIKE)
        group = [row for row in costs if row in left and costs[row] <= limit]
        left = left[len(group) :]
        middle = np.mean([costs[row] for row in group])
        for rank, row in enumerate(group):
            column = rank % 3 - 1 if len(group) > 3 else 0
            places[row] = float(middle * (1 + column * STEP))
    return places


def draw_results(axes: Any, rows: list[Summary], better: Summary) -> None:
    """Draw accuracy over the gradients of a step, with the names of some methods."""
    rows = sorted(rows, key=lambda each: -each.result.value)
    names, points = named(rows), []
    places = side_by_side({each.row: each.cell.gradients_per_step for each in rows})
    best, level = rows[0].result.value, better.result.value
    low = level - 2 * max(best - level, 1)
    for each in sorted(rows, key=lambda each: each.row in names):
        is_named, x, y = each.row in names, places[each.row], each.result.value
        color = figures.RED if each.row in BASELINES else figures.BLUE
        style = {"color": color, "alpha": 1.0 if is_named else 0.35, "zorder": 2 + is_named}
        label = each.row
        if y < low:  # what is far below stays at the edge
            label, y = f"{label}: {y:.1f}", low
            axes.plot(x, y, "v", ms=5, **style)
        else:
            bars = np.nan_to_num([[y - max(each.result.low, low)], [each.result.high - y]])
            axes.errorbar(x, y, np.maximum(bars, 0), fmt="o", ms=4.5, lw=1, **style)
        if is_named:
            points.append((x, y, label, color))
    axes.axhline(level, color=figures.RED, linewidth=0.8, linestyle=":")
    axes.margins(x=0.2, y=0.1)
    axes.set_xscale("log")
    ticks = [tick for tick in TICKS if tick <= 1.2 * max(places.values())]
    axes.set_xticks(ticks, map("{:g}".format, ticks))
    axes.set_xticks([], minor=True)
    task = f"{better.cell.budget} in all; {title_of(better.cell.task)}"
    axes.set(xlabel=f"gradients for each step\n{task}", ylabel="test accuracy, %")
    axes.grid(alpha=0.25)
    axes.set_title(claim(rows))
    figures.label_points(axes, points)


def claim(rows: list[Summary]) -> str:
    """State how many methods beat the better baseline, by their whole interval, and by how much."""
    methods = {each.row: each.gain for each in rows if each.row not in BASELINES}
    ahead = sum(gain.is_above for gain in methods.values())
    text = f"At equal gradients {ahead} of {len(methods)} methods beat the base"
    best = max(methods, key=lambda name: methods[name].value, default=None)
    told = [
        f"{name if name != 'sam' else 'SAM'} by {methods[name].value:.1f} points"
        for name in dict.fromkeys(["sam", best])
        if name in methods
    ]
    return f"{text}: {', '.join(told)}" if told else text


def draw(cells: Cells, path: Path) -> None:
    """Draw both panels."""
    rows = [each for each in summarize(cells) if np.isfinite(each.result.value)]
    [better] = [each for each in rows if each.row == better_baseline(cells)]
    figure = figures.make_figure(1.75, [figures.height_of(10)])
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    draw_paths(left)
    draw_results(right, rows, better)
    figures.save(figure, path)


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    tasks = read_or_refuse(args.results)
    check(tasks, args.task)
    draw(tasks[args.task], args.out)
    print(f"Plot: {args.out}")


if __name__ == "__main__":
    main()
