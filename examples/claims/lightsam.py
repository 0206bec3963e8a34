"""LightSAM over a grid of radii and learning rates, next to SAM with SGD.

    python examples/claims/lightsam.py
    python examples/claims/lightsam.py --points 9 --batch-size 100
    python examples/claims/lightsam.py --points 2 --steps 30000

The task is logistic regression with an L2 penalty on scikit-learn's digits. It is convex and
smooth, and starts from zero. Each method runs at every point of a grid, with rho and learning rate
from 0.01 to 100. All points run at once, vmapped.

According to its abstract (https://arxiv.org/abs/2505.24399), LightSAM converges with any choice of
the two; the rest of the paper was not read. The forms `lightsam_norm` and `lightsam_adagrad` divide
by the root of a sum over all steps, so radius and step shrink. `lightsam_adam` divides by the root
of a moving average. With a constant learning rate, neither its radius nor its step has to shrink,
so there is no reason here why its gradient should vanish. SAM with SGD keeps its radius and its
learning rate.

Every step records the norm of the gradient of the whole loss, without any perturbation. At a grid
point the norm *fell* if its mean over the last tenth of the steps is below the norm at the start
and below the mean over the first tenth. Each condition alone is too weak. A norm that first rises
and then comes down again can meet the second one, and a norm that was high at the start can meet
the first one. A run *diverged* if a value is not finite, or if the mean loss over the last tenth is
above the loss at the start: gradients of this loss grow so slowly that values rarely overflow. Norm
and loss are different, so a point can have fallen and diverged.

The number of steps is limited, so a run that diverged may still be coming down. Therefore the mean
over the last tenth is also divided by the mean over the middle tenth. If this ratio is below 1, the
norm or loss was still falling. If it is near 1, the norm or loss had levelled off. For tiny norms,
that level is the resolution of float32.

With the default settings the norm of `lightsam_norm` falls everywhere. `lightsam_adagrad` is too
slow at learning rate 100, where its first step moves most weights by 100, but its norm keeps
falling. With ten times the steps (the last command above) it falls at those corners too, although
at rho 100 its loss is still above the start. `lightsam_adam` and SAM with SGD level off there, far
above the norm at the start.

How fast the gradient falls, with mini-batches, and which condition `lightsam_adam` needs, is in
convergence.py. The claims on accuracy are compared with the committed results of digits.py, where
every method is tuned in the same way and trains for 40 epochs.

The script prints a table, a line for each method, and the claims. It writes results.json and
lightsam.png to --out. It takes about a minute on two CPU cores.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from examples.common import arguments

NAME = "lightsam"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--points", type=int, default=5, help="values of rho and of learning rate")
    parser.add_argument("--batch-size", type=int, help="random images per step; default: all")
    parser.add_argument("--l2", type=float, default=1e-3, help="strength of the L2 penalty")
    arguments.add_out(parser, NAME)
    args = parser.parse_args(argv)
    arguments.check_range(parser, args, "steps", "batch_size")
    arguments.check_range(parser, args, "points", low=2)
    arguments.check_finite(parser, args, "l2")
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.colors import TwoSlopeNorm
from tqdm import tqdm

import samx
from examples.claims.claim import Claim, found_of, print_claims, save
from examples.common import figures, files
from examples.common.digits_task import load_digits
from examples.common.output import choose_folder
from examples.common.report import Report
from examples.compare.options import RESULTS

METHODS: dict[str, Callable[[Any, Any], optax.GradientTransformationExtraArgs]] = {
    "lightsam_norm": samx.lightsam_norm,
    "lightsam_adagrad": samx.lightsam_adagrad,
    "lightsam_adam": samx.lightsam_adam,
    "sam + sgd": lambda learning_rate, rho: optax.chain(samx.sam(rho), optax.sgd(learning_rate)),
}
DIGITS = RESULTS.parent / "digits.json"
LABELS = {0.3: "30% wrong labels", 0.0: "clean labels"}
LOW, HIGH = -2, 2  # powers of ten: the ends of the grid
CHUNK = 100  # steps in one call
FLOOR, CEILING = -4.0, 1.0  # powers of ten: the ends of the color scale


def of_share(name: str, why: str = "") -> Claim:
    """Return the claim that a form converges wherever it starts to."""
    return Claim(
        (name,),
        "It converges with any radius and any learning rate.",
        "abstract",
        "share of the pairs at which the norm of the gradient falls; 25 pairs from 0.01 to 100, "
        "logistic regression on the digits, 3000 steps with all images",
        low=0.999,
        why=why,
    )


def of_accuracy(name: str, labels: str) -> Claim:
    """Return the claim that a form is level with SAM."""
    return Claim(
        (name,),
        "It is level with a tuned SAM.",
        "secondary source",
        f"test accuracy over SAM's at equal epochs, both tuned, points; digits, {labels}",
        low=-0.5,
    )


CLAIMS = {
    "norm-converges": of_share("lightsam_norm"),
    "adagrad-converges": of_share("lightsam_adagrad", "it is slow there, see the next line"),
    "adagrad-still-falls": Claim(
        ("lightsam_adagrad",),
        "Where it has not fallen yet, it is still falling.",
        "found here",
        "largest norm of the last tenth of the steps, relative to the tenth in the middle, over "
        "the pairs where it has not fallen",
        high=1.0,
    ),
    "adam-converges": of_share(
        "lightsam_adam",
        "radius and rate are constant and are divided by moving averages, so nothing shrinks; with "
        "a radius, a rate and averages that follow the number of steps, see convergence.py",
    ),
    "sam-needs-tuning": Claim(
        ("sam",),
        "SAM with SGD does not converge with any radius and learning rate.",
        "abstract",
        "share of the same pairs, for SAM with SGD",
        high=0.999,
    ),
} | {
    f"{name.removeprefix('lightsam_')}-level, {labels}": of_accuracy(name, labels)
    for name in METHODS
    if name.startswith("lightsam")
    for labels in LABELS.values()
}
DEFINITIONS = """\
fell: the gradient norm's mean over the last tenth of the steps is below the norm at the start and
below the mean over the first tenth. diverged: not finite, or the mean loss over the last tenth is
above the loss at the start; a point can do both. Largest: the worst grid point of the norm's mean
over the last tenth, divided by the norm at the start, by the mean over the first tenth, and by that
over the tenth in the middle."""


class Data(NamedTuple):
    """All images and their labels."""

    x: jax.Array  # [images, 64], from 0 to 1
    y: jax.Array


class Curves(NamedTuple):
    """One method's values before each step and after the last: [grid points, steps + 1]."""

    norm: np.ndarray  # norm of the gradient of the whole loss
    loss: np.ndarray


def load() -> Data:
    """Load all 1797 of scikit-learn's digits."""
    x, y = load_digits()
    return Data(jnp.asarray(x / 16, jnp.float32), jnp.asarray(y, jnp.int32))


def loss_of(w: jax.Array, data: Data, l2: float) -> jax.Array:
    """Return the cross-entropy of the ten classes plus the penalty."""
    losses = optax.softmax_cross_entropy_with_integer_labels(data.x @ w, data.y)
    return losses.mean() + 0.5 * l2 * jnp.vdot(w, w)


def grid(points: int) -> tuple[np.ndarray, np.ndarray]:
    """Return learning rate and rho of every grid point; rho varies fastest."""
    values = 10.0 ** np.linspace(LOW, HIGH, points)
    learning_rate, rho = np.meshgrid(values, values, indexing="ij")
    return learning_rate.ravel(), rho.ravel()


def train(name: str, args: argparse.Namespace, advance: Callable[[int], Any]) -> Curves:
    """Run one method at all grid points; call `advance` with the number of steps taken."""
    data = load()
    learning_rates, rhos = (jnp.asarray(values, jnp.float32) for values in grid(args.points))

    def init(learning_rate, rho):
        w = jnp.zeros((data.x.shape[1], 10))
        return w, METHODS[name](learning_rate, rho).init(w)

    def step(learning_rate, rho, carry, index):
        w, state = carry
        whole, whole_grad = jax.value_and_grad(loss_of)(w, data, args.l2)
        value, grad, batch = whole, whole_grad, data
        if args.batch_size is not None:  # the same batches for all methods and grid points
            key = jax.random.fold_in(jax.random.key(0), index)
            rows = jax.random.randint(key, (args.batch_size,), 0, len(data.x))
            batch = Data(data.x[rows], data.y[rows])
            value, grad = jax.value_and_grad(loss_of)(w, batch, args.l2)
        updates, state = METHODS[name](learning_rate, rho).update(
            *(grad, state, w),
            value=value,
            grad=grad,
            value_fn=lambda w: loss_of(w, batch, args.l2),
        )
        return (optax.apply_updates(w, updates), state), (jnp.linalg.norm(whole_grad), whole)

    @jax.jit
    def run_chunk(carry, start):
        def of_point(learning_rate, rho, carry):
            return jax.lax.scan(
                lambda carry, index: step(learning_rate, rho, carry, index),
                carry,
                start + jnp.arange(chunk),
            )

        return jax.vmap(of_point)(learning_rates, rhos, carry)

    # One more measurement shows where the last step led. If the last chunk is too long, its results
    # are cut: a shorter chunk would have to be compiled.
    measured = args.steps + 1
    chunk = min(CHUNK, measured)
    carry = jax.jit(jax.vmap(init))(learning_rates, rhos)
    chunks = []
    for start in range(0, measured, chunk):
        carry, seen = run_chunk(carry, start)
        chunks.append([np.asarray(part) for part in seen])
        advance(min(chunk, args.steps - start))
    norm, loss = (np.concatenate(parts, axis=1) for parts in zip(*chunks, strict=True))
    return Curves(norm[:, :measured], loss[:, :measured])


def judge(curves: Curves) -> dict[str, np.ndarray]:
    """Compute what is reported of each grid point."""
    norm, loss = curves
    length = max(1, norm.shape[1] // 10)
    before = (norm.shape[1] - length) // 2
    middle = slice(before, before + length)
    start = norm[:, 0]
    first, last = norm[:, :length].mean(axis=1), norm[:, -length:].mean(axis=1)
    last_loss = loss[:, -length:].mean(axis=1)
    is_finite = np.isfinite(norm).all(axis=1) & np.isfinite(loss).all(axis=1)
    return {
        "norm_at_start": start,
        "norm_first_tenth": first,
        "norm_middle_tenth": norm[:, middle].mean(axis=1),
        "norm_last_tenth": last,
        "norm_at_end": norm[:, -1],
        "loss_at_start": loss[:, 0],
        "loss_middle_tenth": loss[:, middle].mean(axis=1),
        "loss_last_tenth": last_loss,
        "loss_at_end": loss[:, -1],
        "fell": is_finite & (last < start) & (last < first),
        "diverged": ~is_finite | (last_loss > loss[:, 0]),
    }


def summarize(name: str, curves: Curves, points: int) -> dict[str, Any]:
    """Return what is printed, drawn and saved of a method; a value that is not finite is None."""
    told = {"learning_rate": grid(points)[0], "rho": grid(points)[1], **judge(curves)}
    columns = {key: [plain(value) for value in values] for key, values in told.items()}
    rows = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    return {
        "method": name,
        "fell": sum(row["fell"] for row in rows),
        "not_fell": sum(not row["fell"] for row in rows),
        "diverged": sum(row["diverged"] for row in rows),
        "largest_last_to_start": largest(rows, "norm_at_start"),
        "largest_last_to_first": largest(rows, "norm_first_tenth"),
        "largest_last_to_middle": largest(rows, "norm_middle_tenth"),
        "points": rows,
    }


def plain(value: Any) -> float | bool | None:
    """Return a number or bool that JSON can hold; None if the number is not finite."""
    if isinstance(value, np.bool_):
        return bool(value)
    return float(value) if np.isfinite(value) else None


def ratio(row: dict, reference: str) -> float | None:
    """Return norm or loss over the last tenth, divided by `reference` at the same grid point."""
    last, other = row[f"{reference.split('_')[0]}_last_tenth"], row[reference]
    return None if last is None or not other else last / other


def largest(rows: list[dict], reference: str) -> float | None:
    """Return the largest ratio; None if a ratio is not finite."""
    ratios = [ratio(row, reference) for row in rows]
    finite = [value for value in ratios if value is not None]
    return max(finite) if len(finite) == len(ratios) else None


def shown(value: float | None) -> str:
    return "inf" if value is None else f"{value:.3g}"


def table(results: list[dict]) -> str:
    """Format one line per method."""
    width = max(len(result["method"]) for result in results)
    head = f"{'':<{width}} {'grid points where the norm':>27} {'':>9} {'largest mean':>12}"
    second = f"{'method':<{width}} {'fell':>13} {'did not fall':>13} {'diverged':>9}"
    second += f" {'last / start':>12} {'/ first':>8} {'/ middle':>9}"
    lines = [head, second, "-" * len(second)]
    for result in results:
        worst = (result[f"largest_last_to_{part}"] for part in ("start", "first", "middle"))
        start, first, middle = map(shown, worst)
        lines.append(
            f"{result['method']:<{width}} {result['fell']:>13} {result['not_fell']:>13}"
            f" {result['diverged']:>9} {start:>12} {first:>8} {middle:>9}"
        )
    return "\n".join([*lines, DEFINITIONS])


def places(rows: list[dict], learning_rates: list[float], rhos: list[float]) -> str:
    """Describe grid points in words, grouped by learning rate."""
    parts = []
    for learning_rate in learning_rates:
        here = [row["rho"] for row in rows if row["learning_rate"] == learning_rate]
        if here:
            which = "any rho" if here == rhos else f"rho {', '.join(f'{rho:.3g}' for rho in here)}"
            parts.append(f"learning rate {learning_rate:.3g} ({which})")
    return "; ".join(parts)


def verdict(result: dict) -> str:
    """Say where the norm of a method did not fall, and where the method diverged."""
    rows = result["points"]
    learning_rates = list(dict.fromkeys(row["learning_rate"] for row in rows))
    rhos = list(dict.fromkeys(row["rho"] for row in rows))
    high = [row for row in rows if not row["fell"]]
    diverged = [row for row in rows if row["diverged"]]
    text = f"{result['method']}: the gradient norm "
    if high:
        text += f"did not fall at {places(high, learning_rates, rhos)}."
        text += f"\n    There its last / middle tenth: {span(high, 'norm_middle_tenth')}."
    else:
        text += f"fell at all {len(rows)} grid points."
    if diverged:
        text += f"\n    Diverged at {places(diverged, learning_rates, rhos)}."
        text += f"\n    There the loss, last / middle tenth: {span(diverged, 'loss_middle_tenth')}."
    return text


def span(rows: list[dict], reference: str) -> str:
    """Format the smallest and the largest ratio of some grid points."""
    ratios = [float("inf") if (r := ratio(row, reference)) is None else r for row in rows]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def draw(results: list[dict], points: int, path: Path, title: str) -> None:
    """Draw one map per method: the norm over the last tenth relative to the start."""
    values = 10.0 ** np.linspace(LOW, HIGH, points)
    shown = range(0, points, math.ceil(points / 5))
    labels = [f"{float(f'{values[index]:.1g}'):g}" for index in shown]
    scale = TwoSlopeNorm(0, FLOOR, CEILING)  # white: the norm is the same as at the start
    figure = figures.make_figure(0.75 * len(results) + 0.3)
    image = None
    for axes, result in zip(figure.subplots(1, len(results), sharey=True), results, strict=True):
        ratios = [ratio(row, "norm_at_start") for row in result["points"]]
        # At the optimum the ratio is 0. A ratio that is not finite stays grey.
        logs = [np.nan if r is None else np.log10(max(r, 1e-38)) for r in ratios]
        field = np.reshape(logs, (points, points))
        axes.set_facecolor(figures.GREY)
        image = axes.imshow(field, cmap="RdBu_r", norm=scale, origin="lower", aspect="equal")
        for index, (row, value) in enumerate(zip(result["points"], ratios, strict=True)):
            y, x = divmod(index, points)
            if row["diverged"]:
                axes.plot(x, y + 0.22, "x", color=color_on(value), markersize=36 / points)
            if points <= 6:
                text = (
                    "inf" if value is None else f"{value:.1g}" if value < 0.01 else f"{value:.2g}"
                )
                place = {"ha": "center", "va": "center", "fontsize": min(9, 40 / points)}
                axes.text(x, y - 0.2, text, color=color_on(value), **place)
        axes.set_xticks(shown, labels)
        axes.set_yticks(shown, labels)
        axes.set_title(f"{result['method']}: fell at {result['fell']} of {points**2}")
        axes.set_xlabel("rho")
    figure.axes[0].set_ylabel("learning rate")
    if image is not None:
        bar = figure.colorbar(image, ax=figure.axes, extend="both", aspect=12, shrink=0.8)
        bar.set_label("log10(norm at the end / start)")
    figures.save(figure, path, f"{title}; cross: diverged")


def color_on(value: float | None) -> str:
    """Return a colour that can be read on the colour of a ratio in the map."""
    is_dark = value is None or not -2.4 < np.log10(max(value, 1e-38)) < 0.6
    return "white" if is_dark else "black"


def measure(args: argparse.Namespace) -> list[dict]:
    """Run and judge every method."""
    results = []
    with tqdm(total=len(METHODS) * args.steps, unit="step", disable=None) as bar:
        for name in METHODS:
            bar.set_description(name)
            results.append(summarize(name, train(name, args, bar.update), args.points))
    return results


def values_of(results: list[dict]) -> dict[str, list[float]]:
    """Return the numbers of each claim; those of the grid are single ones, nothing is random."""
    by_method = {result["method"]: result for result in results}
    shares = {name: found["fell"] / len(found["points"]) for name, found in by_method.items()}
    slow = [row for row in by_method["lightsam_adagrad"]["points"] if not row["fell"]]
    return {
        "norm-converges": [shares["lightsam_norm"]],
        "adagrad-converges": [shares["lightsam_adagrad"]],
        "adagrad-still-falls": [largest(slow, "norm_middle_tenth") or math.nan] if slow else [],
        "adam-converges": [shares["lightsam_adam"]],
        "sam-needs-tuning": [shares["sam + sgd"]],
    } | of_digits()


def of_digits() -> dict[str, list[float]]:
    """Return the leads over SAM in the committed results, one for each seed."""
    rows = {(row["row"], row["noise"]): row for row in files.read_json(DIGITS)["rows"]}
    found = {}
    for form in ("norm", "adagrad", "adam"):
        for noise, labels in LABELS.items():
            mine, sam = (rows[f, noise]["test_accuracy"] for f in (f"lightsam-{form}", "sam"))
            found[f"{form}-level, {labels}"] = (100 * np.subtract(mine, sam)).tolist()
    return found


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[dict]:
    args = parse(argv)
    choose_folder(args, NAME)
    report = Report(args)
    results = measure(args)
    batch = "all images" if args.batch_size is None else f"{args.batch_size} random images"
    title = f"Logistic regression on digits: {args.steps} steps with {batch} each"
    norm = shown(results[0]["points"][0]["norm_at_start"])
    print(f"\n{title}, L2 {args.l2:g}, norm at the start {norm}\n{table(results)}\n")
    print("\n".join(verdict(result) for result in results))

    values = values_of(results)
    found = found_of(CLAIMS, values)
    print_claims(found)
    save(report, NAME, found, values, results=results)
    draw(results, args.points, args.folder / f"{NAME}.png", title)
    report.end(f"{NAME}.png")
    return results


if __name__ == "__main__":
    main()
