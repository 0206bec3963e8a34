"""The second-order part of SAM's gradient: how large it is, and what it saves to sample it.

    python examples/claims/second_order.py
    python examples/claims/second_order.py --variants looksam ae-sam rst --seeds 10 --noise 0

SAM's gradient is g + h, where g is the gradient at the parameters and h = g_s - g is a second-order
part. The abstract of ARSAM (https://arxiv.org/abs/2510.03763) says that h matters more and more
during training, and that sampling, reusing and mixing it speeds SAM up by about 40%. This script
measures both on the task of digits.py. It trains `base`, `sam` and the chosen variants. Runs train
one at a time, not vmapped, so that a step without a sharp gradient saves its time. For each epoch
the script records ||h|| / ||g|| on the sharp steps, the fraction of sharp steps, and the test
accuracy.

The times come from the same training runs. All variants of a seed take turns, one epoch each, in
random order, so that a temporary slowdown of the machine affects all of them. The total times of a
seed's training runs are compared, and the median over the seeds is printed. All variants share one
learning rate and one rho: this script compares cost, digits.py compares accuracies fairly. In
narrow networks most of a step's time is not spent on the gradient: see --width.
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from examples.common import arguments, choices

REFERENCES = ("base", "sam")
DEFAULT = ("looksam", "vsam", "arsam")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    text = f"; base and sam are always there; default: {', '.join(DEFAULT)}"
    names, default = choices.VARIANTS, [*DEFAULT]
    arguments.add_names(parser, "--variants", names, text, nargs="+", default=default)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--noise", type=float, default=0.3, help="fraction of flipped labels")
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--rho", type=float, default=0.2)
    parser.add_argument("--width", type=int, default=256, help="units of each hidden layer")
    arguments.add_out(parser, "second_order")
    args = parser.parse_args(argv)
    args.rows = list(dict.fromkeys((*REFERENCES, *args.variants)))
    arguments.check_range(parser, args, "seeds", "epochs", "width")
    arguments.check_share(parser, args, "noise")
    arguments.check_finite(parser, args, "rho")
    arguments.check_finite(parser, args, "learning_rate", above_zero=True)
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import samx
from examples.common import figures, files
from examples.common.digits_task import (
    STEPS_PER_EPOCH,
    describe,
    initialize,
    rows_of,
    shuffled,
    split,
)
from examples.common.output import choose_folder
from examples.common.registry import VARIANTS, Variant
from examples.common.report import Report, mean_and_error
from examples.common.training import Trainer, make_trainer
from examples.common.tuning import Runs, runs_of

# For these variants the ratio cannot be computed from the readings. Their perturbation is not along
# the gradient at the parameters, or their two gradients use different examples or some layers only.
WITHOUT_RATIO = (
    *("base", "asam", "sampa", "sampa-separate", "look-layer-sam", "momentum-sam"),
    *("ksam", "esam", "ausam", "sl-sam"),
)
CLAIM = 0.4  # ARSAM's speed-up: SAM's time / its time - 1
PARTS = ("start", "middle", "end")
LINES = ("-", "--", ":", "-.")  # curves of variants with the same policy overlap


class Seen(NamedTuple):
    """Measurements of one step."""

    ratio: jax.Array
    is_sharp: jax.Array


class Row(NamedTuple):
    """One variant over all seeds; all arrays are [seeds, epochs]."""

    ratio: np.ndarray  # ||h|| / ||g||, mean over the sharp steps; NaN without sharp steps
    sharp_fraction: np.ndarray
    test_accuracy: np.ndarray
    gradients: np.ndarray  # computed so far
    seconds: np.ndarray  # per epoch


def second_order_ratio(readings: samx.Readings) -> jax.Array:
    """Compute ||g_s - g|| / ||g|| by the law of cosines; the perturbation must be along g."""
    g_norm = jnp.where(readings.grad_norm == 0, 1, readings.grad_norm)
    relative = readings.sharp_grad_norm / g_norm
    return jnp.sqrt(jnp.maximum(1 + relative**2 - 2 * relative * readings.cosine, 0))


def with_all_readings(name: str) -> Variant:
    """Return the variant of this name, whose states hold what `seen` reads."""
    variant = VARIANTS[name]
    if name == "base":
        return variant
    return variant._replace(make=lambda *args: samx.all_readings(variant.make(*args)))


def seen(state: Any) -> Seen:
    """Return the measurements of the last step; zeros for the base, which has no readings."""
    readings = optax.tree.get(state, "readings")
    if readings is None:
        return Seen(jnp.zeros(()), jnp.zeros((), bool))
    return Seen(second_order_ratio(readings), readings.is_sharp)


def make_epoch(trainer: Trainer) -> Callable[..., Any]:
    """Return a function, compiled once, that trains one run for one epoch.

    It returns params, state and the `Seen` of all steps.
    """

    @jax.jit
    def epoch(params, state, run, images, index):
        def body(carry, rows):
            params, state = trainer.step(*carry, run, rows_of(images, rows))
            return (params, state), seen(state)

        (params, state), steps = jax.lax.scan(body, (params, state), shuffled(run.seed, index))
        return params, state, steps

    return epoch


def measure(args: argparse.Namespace) -> dict[str, Row]:
    """Train every variant with every seed; the variants take turns, one epoch each."""
    runs = Runs(*runs_of(range(args.seeds), [(args.learning_rate, args.rho)]))
    data, params = split(runs.seed, args.noise), initialize(runs.seed, args.width)
    trainers = {
        name: make_trainer(with_all_readings(name), "momentum", args.width, args.epochs)
        for name in args.rows
    }
    starts = {name: jax.vmap(trainer.init)(runs, params) for name, trainer in trainers.items()}
    epochs = {name: make_epoch(trainer) for name, trainer in trainers.items()}
    shape = (args.seeds, args.epochs)
    rows = {name: Row(*np.full((len(Row._fields), *shape), np.nan)) for name in args.rows}
    shuffle = random.Random(0)

    def of_seed(seed, tree):
        return jax.tree.map(lambda leaf: leaf[seed], tree)

    def train_epoch(name, now, run, images, index):
        start = time.perf_counter()
        out = jax.block_until_ready(epochs[name](*now, run, images, index))
        return out, time.perf_counter() - start

    first = of_seed(0, (runs, data[0]))
    for name in tqdm(args.rows, desc="compile", unit="variant", disable=None):
        train_epoch(name, of_seed(0, (params, starts[name])), *first, index=0)
    with tqdm(
        total=args.seeds * args.epochs * len(rows), desc="train", unit="epoch", disable=None
    ) as bar:
        for seed in range(args.seeds):
            run, (train, _, test) = of_seed(seed, (runs, data))
            now = {name: of_seed(seed, (params, starts[name])) for name in rows}
            for index in range(args.epochs):
                for name in shuffle.sample(args.rows, len(rows)):
                    (*now[name], steps), seconds = train_epoch(name, now[name], run, train, index)
                    accuracy = trainers[name].accuracy(now[name][0], test)
                    row, at = rows[name], (seed, index)
                    row.ratio[at], row.sharp_fraction[at] = over_epoch(name, steps)
                    row.test_accuracy[at], row.seconds[at] = accuracy, seconds
                    spent = optax.tree.get(now[name][1], "gradients_spent")
                    row.gradients[at] = (index + 1) * STEPS_PER_EPOCH if spent is None else spent
                    bar.update()
    return rows


def over_epoch(name: str, steps: Seen) -> tuple[float, float]:
    """Return the mean ratio over the sharp steps (NaN without any), and their fraction."""
    is_sharp = np.asarray(steps.is_sharp)
    has_ratio = name not in WITHOUT_RATIO and is_sharp.any()
    ratio = np.asarray(steps.ratio)[is_sharp].mean() if has_ratio else np.nan
    return ratio, is_sharp.mean()


def mean_over_seeds(values: np.ndarray) -> list[float | None]:
    """Return the mean of each epoch over the seeds that have a finite value."""
    columns = [column[np.isfinite(column)] for column in values.T]
    return [float(column.mean()) if column.size else None for column in columns]


def fifths(ratio: np.ndarray) -> np.ndarray:
    """Return the means over the first, middle and last fifth of the epochs, [seeds, 3]."""
    epochs = ratio.shape[1]
    length = max(1, epochs // 5)
    starts = (0, (epochs - length) // 2, epochs - length)
    parts = [ratio[:, start : start + length] for start in starts]
    return np.stack([masked_mean(part) for part in parts], axis=1)


def masked_mean(part: np.ndarray) -> np.ndarray:
    """Return the mean of the finite values in each row; NaN for a row without any."""
    count = np.isfinite(part).sum(axis=1)
    return np.where(count, np.nansum(part, axis=1) / np.maximum(count, 1), np.nan)


def summarize(rows: dict[str, Row]) -> list[dict[str, Any]]:
    """Compute what is printed, drawn and saved of every variant."""
    totals = {name: row.seconds.sum(axis=1) for name, row in rows.items()}
    steps = rows["base"].seconds.shape[1] * STEPS_PER_EPOCH
    results = []
    for name, row in rows.items():
        to_plain, to_sam = (totals[name] / totals[reference] for reference in REFERENCES)
        results.append(
            {
                "row": name,
                "test_accuracy": row.test_accuracy[:, -1].tolist(),
                "gradients_per_step": float(row.gradients[:, -1].mean()) / steps,
                "time_to_plain": np.percentile(to_plain, [25, 50, 75]).tolist(),
                "time_to_sam": np.percentile(to_sam, [25, 50, 75]).tolist(),
                "speed_up": float(np.median(1 / to_sam) - 1),
                "ratio": dict(zip(PARTS, mean_over_seeds(fifths(row.ratio)), strict=True)),
                "ratio_by_epoch": mean_over_seeds(row.ratio),
                "sharp_fraction": float(row.sharp_fraction.mean()),
                "sharp_fraction_by_epoch": mean_over_seeds(row.sharp_fraction),
                "test_accuracy_by_epoch": mean_over_seeds(row.test_accuracy),
                "seconds": totals[name].tolist(),
            }
        )
    return results


def table(results: list[dict]) -> str:
    width = max(len(result["row"]) for result in results)
    head = f"{'':<{width}} {'test acc. %':>14} {'gradients':>10} {'time':>6} {'time':>6}"
    head += f" {'speed-up':>9} {'||h|| / ||g|| at the':>22}"
    second = f"{'method':<{width}} {'':>14} {'per step':>10} {'/plain':>6} {'/SAM':>6}"
    second += f" {'of SAM':>9} " + "".join(f"{part:>8}" for part in PARTS)
    lines = [head, second, "-" * len(second)]
    for result in results:
        accuracy, error = mean_and_error([100 * a for a in result["test_accuracy"]])
        ratios = [result["ratio"][part] for part in PARTS]
        lines.append(
            f"{result['row']:<{width}} {accuracy:>7.2f} ± {error:4.2f}"
            f" {result['gradients_per_step']:>10.3f} {result['time_to_plain'][1]:>6.2f}"
            f" {result['time_to_sam'][1]:>6.2f} {speed_up(result):>9} "
            + "".join(f"{'-' if ratio is None else f'{ratio:.3f}':>8}" for ratio in ratios)
        )
    lines.append(
        "speed-up: SAM's time / its time - 1; of ARSAM its paper claims about "
        f"{CLAIM:.0%}, elsewhere.\nstart, middle, end: the first, middle and last fifth of the "
        "epochs, sharp steps only."
    )
    return "\n".join(lines)


def speed_up(result: dict) -> str:
    """Format the speed-up over SAM; empty for the base and SAM."""
    return "" if result["row"] in REFERENCES else f"{result['speed_up']:+.0%}"


def verdict(ratio: np.ndarray) -> str:
    """Say whether the second-order part of SAM's gradient grew, paired by seed."""
    start, middle, end = fifths(ratio).T
    growth, error = mean_and_error((end - start).tolist())
    is_clear = abs(growth) > 2 * error  # false for a single seed: its error is NaN
    word = ("grew" if growth > 0 else "fell") if is_clear else "did not clearly change"
    return (
        f"In this run the second-order part of SAM's gradient {word}: from {start.mean():.3f} of "
        f"||g|| (middle {middle.mean():.3f}) to {end.mean():.3f}, by {growth:+.3f} ± {error:.3f} "
        "over the seeds; the paper of ARSAM says that it grows."
    )


def draw(results: list[dict], path: Path, title: str) -> None:
    """Plot the ratio and the fraction of sharp steps over the epochs, and the times as bars."""
    figure = figures.make_figure(3, [figures.height_of(max(len(results), figures.ROWS))])
    ratio, sharp, bars = figure.subplots(1, 3)
    longest = max(result["time_to_plain"][2] for result in results)
    colors = [*figures.COLORS, *["0.8"] * len(results)]  # only the first rows have names in curves
    for position, (result, color) in enumerate(zip(results, colors, strict=False)):
        name = result["row"]
        for axes, values in (
            (ratio, result["ratio_by_epoch"]),
            (sharp, result["sharp_fraction_by_epoch"]),
        ):
            points = [(epoch, y) for epoch, y in enumerate(values, 1) if y is not None]
            if points and name != "base":
                style = {"linestyle": LINES[position % len(LINES)], "linewidth": 1.6}
                style |= {"color": color, "zorder": 2 - position / len(results)}
                style |= {"label": name} if position < len(figures.COLORS) else {}
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, **style)
        low, median, high = result["time_to_plain"]
        spread = [[median - low], [high - median]]
        bars.barh(position, median, xerr=spread, color=color, capsize=3)
        text = " ".join(filter(None, (f"{median:.2f}", speed_up(result))))
        bars.annotate(text, (1.45 * longest, position), ha="right", va="center")
    bars.set_yticks(range(len(results)), [result["row"] for result in results])
    bars.set_ylim(len(results) - 0.4, -1.4)
    sam = next(result for result in results if result["row"] == "sam")["time_to_plain"][1]
    bars.axvline(sam, color=figures.INK, linewidth=1, linestyle="--")
    bars.axvline(sam / (1 + CLAIM), color=figures.GREY, linewidth=1, linestyle=":")
    shift = {"xytext": (3, 0), "textcoords": "offset points", "va": "center"}
    bars.annotate("SAM", (sam, -0.95), **shift)
    shift |= {"xytext": (-3, 0), "ha": "right"}
    bars.annotate(f"{CLAIM:.0%} faster", (sam / (1 + CLAIM), -0.95), color=figures.GREY, **shift)
    bars.set_xlim(0, 1.47 * longest)
    bars.set(title="time of a step / plain step", xlabel="median over the seeds, quartiles")
    ratio.set(title=claim(results), xlabel="epoch")
    ratio.set_ylim(bottom=0)
    sharp.set(title="share of sharp steps", xlabel="epoch", ylim=(-0.03, 1.05))
    for axes in (ratio, sharp):
        axes.grid(alpha=0.3, axis="y")
        axes.xaxis.get_major_locator().set_params(integer=True)
        figures.label_ends(axes)
    bars.grid(alpha=0.3, axis="x")
    figures.save(figure, path, title)


def claim(results: list[dict]) -> str:
    """State how the second-order part of SAM's gradient went, from the first epoch to the last."""
    sam = next(result for result in results if result["row"] == "sam")["ratio_by_epoch"]
    known = [value for value in sam if value is not None]
    text = "second-order part of SAM's gradient, ||g_s - g|| / ||g||"
    return f"{text}: {known[0]:.2f} to {known[-1]:.2f}" if known else text


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[dict]:
    args = parse(argv)
    choose_folder(args, "second_order")
    report = Report(args)
    rows = measure(args)
    results = summarize(rows)
    print(f"\n{describe(args.noise)}, {args.seeds} seeds (mean ± standard error)")
    print(f"{table(results)}\n\n{verdict(rows['sam'].ratio)}")

    report.save(results=results)
    title = f"Digits, {describe(args.noise)}: {args.seeds} seeds, width {args.width}"
    draw(results, args.folder / "second_order.png", title)
    report.end("second_order.png")
    return results


if __name__ == "__main__":
    main()
