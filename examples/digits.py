"""Compare sharpness-aware training with its base optimizer, on digits with wrong labels.

    python examples/digits.py
    python examples/digits.py --variants base sam --base adamw --seeds 5 --noise 0.5
    python examples/digits.py --variants sam looksam ae-sam vsam

A small Flax network learns scikit-learn's digits (1797 real images of 8x8 pixels) twice: once with
a share of the training labels flipped, and once with clean labels. Every method trains for the same
number of epochs. `base2x` is the base optimizer with twice as many epochs, so that it spends as
many gradients as SAM. The learning rate and rho of each method are chosen on a validation split,
with separate seeds. The test split is used once, with the chosen values. Every seed has its own
split, flipped labels, initialization and batches. All seeds and candidates train at the same time,
under `vmap`.
"""

import argparse
import math
from functools import partial
from pathlib import Path

from examples.common import arguments, choices

DEFAULT = ("base", "base2x", "sam", "asam", "sampa", "momentum-sam")
# Each row of the tables: the variant, and the factor on the number of epochs.
ROWS = {"base": ("base", 1), "base2x": ("base", 2)} | {
    name: (name, 1) for name in choices.VARIANTS if name not in ("base", "sampa-separate")
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    text = f"; default: those of {', '.join(DEFAULT)} that accept the base"
    arguments.add_names(parser, "--variants", [*ROWS], text, nargs="+")
    arguments.add_settings(parser, seeds=20, name="digits")
    args = parser.parse_args(argv)
    arguments.check_settings(parser, args)
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import matplotlib
import numpy as np
from tqdm import tqdm

from examples.common import figures, files
from examples.common.digits_task import BATCH, LEARNING_RATES, STEPS_PER_EPOCH, describe
from examples.common.output import choose_folder
from examples.common.registry import VARIANTS, check_base
from examples.common.report import Report, mean_and_error
from examples.common.training import SHARPNESS_RADIUS, measure
from examples.common.tuning import TUNING_SEEDS


def candidates_of(row: str, args: argparse.Namespace) -> list[tuple[float, float]]:
    """Return the (learning rate, rho) pairs to choose from; the base optimizer has no rho."""
    variant, _ = ROWS[row]
    radii = VARIANTS[variant].radii
    if args.rho and variant != "base":
        radii = tuple(args.rho)
    rates = VARIANTS[variant].learning_rates or LEARNING_RATES[args.base]
    return [(rate, rho) for rate in rates for rho in radii]


def work_of(row: str, runs: int) -> int:
    """Return the gradients per epoch of `runs` runs; `vmap` computes both sides of a branch."""
    return STEPS_PER_EPOCH * runs * math.ceil(VARIANTS[ROWS[row][0]].gradients)


def print_table(results: list[dict], noise: float, seeds: int) -> None:
    """Print one line per method."""
    print(f"\n{describe(noise)}, {seeds} seeds (mean ± standard error)")
    width = max(len("method"), *(len(result["row"]) for result in results))
    head = f"{'method':<{width}} {'test acc. %':>14} {'train acc. %':>13} {'loss increase':>14}"
    head += f" {'gradients':>10} {'ms/step':>8} {'lr':>7} {'rho':>6}"
    print(head + "\n" + "-" * len(head))
    for result in (r for r in results if r["noise"] == noise):
        test, error = mean_and_error([100 * a for a in result["test_accuracy"]])
        train_accuracy, _ = mean_and_error([100 * a for a in result["train_accuracy"]])
        increase, _ = mean_and_error(result["loss_increase"])
        print(
            f"{result['row']:<{width}} {test:>7.2f} ± {error:4.2f} {train_accuracy:>13.2f}"
            f" {increase:>14.4f} {result['gradients']:>10.0f}"
            f" {1e3 * result['seconds_per_step']:>8.3f} {result['learning_rate']:>7g}"
            f" {result['rho']:>6g}"
        )
    print(
        f"loss increase: L(w + eps) - L(w), |eps| = {SHARPNESS_RADIUS}, mean over training batches "
        f"of {BATCH}, with eps along the gradient of each batch"
    )
    if any(result["row"] == "base2x" for result in results):
        print("base2x: the base optimizer with twice as many epochs, so as many gradients as SAM")


def compare(results: list[dict], noise: float) -> None:
    """Print SAM's lead over the base optimizer with equally many gradients, in standard errors."""
    rows = {r["row"]: r for r in results if r["noise"] == noise}
    if len(rows.get("sam", {}).get("test_accuracy", ())) < 2 or "base2x" not in rows:
        return
    difference = np.subtract(rows["sam"]["test_accuracy"], rows["base2x"]["test_accuracy"])
    lead, error = mean_and_error(list(100 * difference))
    print(
        f"sam - base2x, the same gradients and seeds: {lead:+.2f} ± {error:.2f} points, "
        f"{lead / error:+.1f} standard errors"
    )


def draw(results: list[dict], noises: list[float], path: Path, title: str) -> None:
    """Draw one row of panels per table: final accuracies left, training curves right."""
    rows = list(dict.fromkeys(r["row"] for r in results))
    palette = matplotlib.colormaps["tab10" if len(rows) <= 10 else "tab20"]
    colors = {row: palette(position) for position, row in enumerate(rows)}
    figure = figures.make_figure(11, 1.2 + 3.2 * len(noises))
    axes = figure.subplots(len(noises), 2, squeeze=False)
    for (left, right), noise in zip(axes, noises, strict=True):
        for position, result in enumerate(r for r in results if r["noise"] == noise):
            color = colors[result["row"]]
            mean, error = mean_and_error([100 * a for a in result["test_accuracy"]])
            left.errorbar(mean, position, xerr=error, fmt="o", color=color, capsize=4)
            left.annotate(
                f"{mean:.1f}", (mean, position), (0, 8), textcoords="offset points", ha="center"
            )
            curve = 100 * np.asarray(result["test_accuracy_by_epoch"])
            right.plot(result["gradients_by_epoch"], curve, color=color, label=result["row"])
        left.set_yticks(range(len(rows)), rows)
        left.set_ylim(len(rows) - 0.4, -0.7)
        left.set_title(describe(noise))
        left.set_xlabel("test accuracy, % (mean ± standard error)")
        left.grid(axis="x", alpha=0.3)
        right.set_title("during training, at equal gradients")
        right.set_xlabel("gradients spent")
        right.set_ylabel("test accuracy, %")
        best = max(max(r["test_accuracy_by_epoch"]) for r in results if r["noise"] == noise)
        right.set_ylim(100 * best - 15, 100 * best + 1)
        right.grid(alpha=0.3)
        right.legend(loc="lower right", ncols=1 + len(rows) // 9)
    figures.save(figure, path, title)


def can_have(variant: str, base: str) -> bool:
    """Return whether the variant accepts the base; Momentum-SAM needs momentum."""
    try:
        check_base(variant, base)
    except ValueError:
        return False
    return True


def check_variants(args: argparse.Namespace) -> None:
    """Choose the default rows; refuse a variant that does not accept the base."""
    if args.variants is None:
        args.variants = [row for row in DEFAULT if can_have(ROWS[row][0], args.base)]
    args.variants = list(dict.fromkeys(args.variants))
    try:
        for row in args.variants:
            check_base(ROWS[row][0], args.base)
    except ValueError as error:
        arguments.refuse(str(error))


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[dict]:
    args = parse(argv)
    check_variants(args)
    choose_folder(args, "digits")
    report = Report(args)
    noises = list(dict.fromkeys([args.noise, 0.0]))
    total = sum(
        work_of(row, len(candidates_of(row, args)) * len(TUNING_SEEDS) + args.seeds)
        * ROWS[row][1]
        * args.epochs
        * len(noises)
        for row in args.variants
    )
    results = []
    with tqdm(total=total, unit=" gradients", unit_scale=True, smoothing=0.1, disable=None) as bar:
        for row in args.variants:
            variant, times = ROWS[row]
            results += measure(
                row,
                VARIANTS[variant],
                candidates_of(row, args),
                args,
                times * args.epochs,
                noises,
                bar,
                partial(work_of, row),
            )

    for noise in noises:
        print_table(results, noise, args.seeds)
        compare(results, noise)

    report.save(results=results)
    title = f"Digits: {args.base} and its sharpness-aware versions, {args.seeds} seeds"
    draw(results, noises, args.folder / "digits.png", title)
    report.end("digits.png")
    return results


if __name__ == "__main__":
    main()
