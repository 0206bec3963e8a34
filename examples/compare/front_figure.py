"""Draw the figure of the front page from committed results: what SAM does, and what it gains.

    python examples/compare/front_figure.py
    python examples/compare/front_figure.py --results runs/digits-001/summary.json

Left: a loss of two parameters with a sharp and a flat minimum. Gradient descent ends in the sharp
one. SAM starts at the same point and walks past it; the arrows are its perturbations. Start,
learning rate and rho were chosen to show this; the notebook sam_in_five_minutes says what happens
from other starts.

Right: test accuracy against gradients spent, one dot for each method of examples/digits.py, where
30% of the training labels are wrong. The numbers are read from --results, by default the committed
ones. `python examples/digits.py --variants all` makes them again, as summary.json.

The figure is written to --out.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from examples.common import arguments

RESULTS = Path(__file__).parent / "results" / "digits.json"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
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
from examples import digits
from examples.common import figures, files
from examples.common.digits_task import describe

START, LEARNING_RATE, RHO, STEPS = (-1.7, 1.5), 0.15, 0.5, 80
PIT, FLAT = (-0.5, 0.8), (1.0, 0.0)  # near the sharp minimum, and the flat minimum
ARROWS = 20  # as many steps show their perturbation
NAMED = 10  # methods with a name, the baselines included
ALWAYS = ("base", "base2x", "sam", "asam", "looksam", "ausam", "momentum-sam")
ALIKE, STEP = 0.03, 0.06  # costs that differ by less share a place, where dots stand side by side
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


def rows_of(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the first table, which has wrong labels, with the lead of each.

    Raises:
        ValueError: If the summary is not one of digits.py with both baselines.
    """
    try:
        noise = summary["settings"]["noise"]
        rows = [dict(row) for row in summary["rows"] if row["noise"] == noise]
        if not {*digits.BASELINES} <= {row["row"] for row in rows}:
            raise KeyError("a baseline is missing")
        better = digits.better_baseline(rows)
        for row in rows:
            row["lead"], row["lead_error"] = digits.lead_of(rows, row["row"], better)
            row["better"] = better
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"no summary of digits.py with {' and '.join(digits.BASELINES)}"
        ) from error
    return rows


def named(rows: list[dict[str, Any]]) -> list[str]:
    """Choose the rows that get a name: some always, the least accurate one, the most accurate."""
    by_accuracy = [row["row"] for row in sorted(rows, key=lambda row: -row["mean"])]
    chosen = [row["row"] for row in rows if row["row"] in ALWAYS]
    return list(dict.fromkeys([*chosen, by_accuracy[-1], *by_accuracy]))[:NAMED]


def side_by_side(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return where each dot stands on the axis of gradients, which is logarithmic.

    Many dots of (almost) equal cost stand in three columns, so that neighbours are apart.
    """
    places: dict[str, float] = {}
    left = sorted(rows, key=lambda row: row["gradients"])
    while left:
        first = left[0]["gradients"]
        group = [row for row in left if row["gradients"] <= first * (1 + ALIKE)]
        left = left[len(group) :]
        group.sort(key=lambda row: -row["mean"])
        middle = np.mean([row["gradients"] for row in group])
        for rank, row in enumerate(group):
            column = rank % 3 - 1 if len(group) > 3 else 0
            places[row["row"]] = float(middle * (1 + column * STEP))
    return places


def draw_results(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw accuracy against gradients, with the names of some methods."""
    names, places, points = named(rows), side_by_side(rows), []
    better = next(row for row in rows if row["row"] == row["better"])
    low = better["mean"] - 2 * max(max(row["mean"] for row in rows) - better["mean"], 1)
    for row in sorted(rows, key=lambda row: row["row"] in names):
        is_named, x = row["row"] in names, places[row["row"]]
        color = figures.RED if row["row"] in digits.BASELINES else figures.BLUE
        pale = {"alpha": 1.0 if is_named else 0.35, "zorder": 2 + is_named}
        label, y = row["row"], row["mean"]
        if y < low:  # what is far below stays at the edge
            label, y = f"{label}: {y:.1f}", low
            axes.plot(x, y, "v", ms=5, color=color, **pale)
        else:
            axes.errorbar(x, y, row["error"], fmt="o", ms=4.5, lw=1, color=color, **pale)
        if is_named:
            points.append((x, y, label, color))
    axes.axhline(better["mean"], color=figures.RED, linewidth=0.8, linestyle=":")
    axes.margins(x=0.2, y=0.1)
    axes.set_xscale("log")
    ticks = [400 * 2**i for i in range(4) if 400 * 2**i <= 2 * max(places.values())]
    axes.set_xticks(ticks, map(str, ticks))
    axes.set_xticks([], minor=True)
    axes.set(xlabel="gradients spent", ylabel="test accuracy, %")
    axes.grid(alpha=0.25)
    axes.set_title(claim(rows))
    figures.label_points(axes, points)


def claim(rows: list[dict[str, Any]]) -> str:
    """State how many methods lead the better baseline by two standard errors, and by how much."""
    methods = {row["row"]: row for row in rows if row["row"] not in digits.BASELINES}
    ahead = sum(row["lead"] > 2 * row["lead_error"] for row in methods.values())
    text = f"{ahead} of {len(methods)} methods beat the base"
    best = max(methods, key=lambda name: methods[name]["lead"], default=None)
    told = [
        f"{name if name != 'sam' else 'SAM'} by {row['lead']:.1f} ± {row['lead_error']:.1f}"
        for name, row in methods.items()
        if name in ("sam", best)
    ]
    return f"{text}: {', '.join(told)} points" if told else text


def draw(summary: dict[str, Any], path: Path) -> None:
    """Draw both panels."""
    rows = rows_of(summary)
    figure = figures.make_figure(1.75, [figures.height_of(10)])
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    draw_paths(left)
    settings = summary["settings"]
    draw_results(right, rows)
    right.set_xlabel(f"gradients spent ({describe(settings['noise'])})")
    figures.save(figure, path)


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        summary = files.read_json(args.results)
        rows_of(summary)
    except (OSError, ValueError) as error:
        arguments.refuse(f"--results {args.results}: {files.reason(error)}")
    draw(summary, args.out)
    print(f"Plot: {args.out}")


if __name__ == "__main__":
    main()
