"""SAM: how much does it gain with more wrong labels, and do more ascent steps help?

    python examples/claims/wrong_labels.py

The task is that of digits.py: a small network learns 1000 of scikit-learn's digits, of which a
share has wrong labels. SGD with momentum and SAM train for the same number of epochs. At the
middle share, SAM also climbs in 2, 3 and 5 steps, each as long as its radius. Learning rate and rho
of each row are chosen on a validation split, with seeds that are not reported.

The script prints a table and the claims, and writes results.json, wrong_labels.json and
wrong_labels.png to --out. It takes about three minutes on two CPU cores.
"""

import argparse

from examples.common import arguments

NAME = "wrong_labels"
NOISES = (0.2, 0.4, 0.6, 0.8)
SWEEP = 0.4  # share of wrong labels at which the ascent steps are compared
ASCENT_STEPS = (2, 3, 5)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--width", type=int, default=64, help="units of each hidden layer")
    arguments.add_out(parser, NAME)
    args = parser.parse_args(argv)
    arguments.check_range(parser, args, "seeds", "epochs", "width")
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import samx
from examples.claims.arms import points, train_arms
from examples.claims.claim import Claim, found_of, print_claims, save
from examples.common import figures, files
from examples.common.intervals import Interval, mean_interval
from examples.common.output import choose_folder
from examples.common.registry import RADIUS, VARIANTS, Variant, in_front
from examples.common.report import MARK, Report, aligned, marked

PUBLISHED = {  # test accuracy on CIFAR-10, SGD and SAM, ResNet-32
    0.2: "84.8 and 95.1",
    0.4: "68.8 and 93.4",
    0.6: "48.2 and 90.5",
    0.8: "26.2 and 77.9",
}
MARGIN = 0.5  # points
CLAIMS = {
    **{
        f"gain-{noise:.0%}": Claim(
            ("sam",),
            f"More accurate than SGD with {noise:.0%} wrong labels.",
            "Table 4",
            f"test accuracy of SAM minus SGD, points; digits, {noise:.0%} wrong labels",
            low=0.0,
            published=f"{PUBLISHED[noise]} % for SGD and SAM on CIFAR-10",
        )
        for noise in NOISES
    },
    "gain-grows": Claim(
        ("sam",),
        "The more labels are wrong, the more it gains.",
        "Table 4",
        "slope of the gain over the share of wrong labels, 20% to 60%, points for each 10%",
        low=0.0,
        published="+10, +25, +42 and +52 points at 20%, 40%, 60% and 80%",
    ),
    **{
        f"ascent-{count}": Claim(
            ("sharpness_aware", "sam"),
            f"{count} ascent steps are not better than one.",
            "appendix",
            f"test accuracy minus SAM's, points; {SWEEP:.0%} wrong labels, equal epochs",
            high=MARGIN,
            published="test error 2.77, 2.76, 2.73 and 2.77 % with 1, 2, 3 and 5 steps",
        )
        for count in ASCENT_STEPS
    },
}


def climbing(count: int) -> Variant:
    """Return SAM with several ascent steps."""

    def several(rho: Any) -> Any:
        return samx.sharpness_aware(samx.perturbations.metric_ball(rho), count)

    return Variant(in_front(several), RADIUS / 4, 1 + count, 0.05)


def values_of(results: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the numbers of each claim, one for each seed."""
    gains = {
        noise: points(results, "sam", noise) - points(results, "sgd", noise) for noise in NOISES
    }
    found = {f"gain-{noise:.0%}": gain.tolist() for noise, gain in gains.items()}
    low = [noise for noise in NOISES if noise <= 0.6]
    slopes, _ = np.polyfit(10 * np.array(low), np.stack([gains[noise] for noise in low]), 1)
    found["gain-grows"] = slopes.tolist()
    for count in ASCENT_STEPS:
        others = points(results, f"{count} steps", SWEEP)
        found[f"ascent-{count}"] = (others - points(results, "sam", SWEEP)).tolist()
    return found


def print_table(results: Sequence[dict[str, Any]]) -> None:
    """Print one line per row and share of wrong labels."""
    grid = [["wrong, row", "test accuracy, %", "train accuracy, %", "lr", "rho"]]
    for result in results:
        mean, low, high = accuracy_of(result)
        trained = f"{100 * np.mean(result['train_accuracy']):.1f}"
        numbers = [marked(result, name) for name in ("learning_rate", "rho")]
        first = f"{result['noise']:.0%} {result['row']}"
        grid.append([first, f"{mean:.2f} [{low:.2f}, {high:.2f}]", trained, *numbers])
    print("\n".join(aligned(grid)))
    if any(result["edges"] for result in results):
        print(MARK)


def accuracy_of(result: dict[str, Any]) -> Interval:
    """Return the mean test accuracy in percent, with its interval."""
    return mean_interval(result["test_accuracy"]).scaled(100)


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw accuracy over the share of wrong labels, and over the ascent steps."""
    figure = figures.make_figure(2)
    left, right = figure.subplots(1, 2)
    for row, color in (("sgd", figures.RED), ("sam", figures.BLUE)):
        mine = [result for result in results if result["row"] == row]
        means, lows, highs = np.transpose([accuracy_of(result) for result in mine])
        shares = [100 * result["noise"] for result in mine]
        left.plot(shares, means, "o-", color=color, label=row)
        left.fill_between(shares, lows, highs, color=color, alpha=0.2, linewidth=0)
    left.set_xlabel("wrong training labels, %")
    left.set_ylabel("test accuracy, %")
    left.grid(alpha=0.3)
    figures.label_ends(left)
    rows = {result["row"]: result for result in results if result["noise"] == SWEEP}
    steps = {1: "sam"} | {count: f"{count} steps" for count in ASCENT_STEPS}
    for count, row in steps.items():
        mean, low, high = accuracy_of(rows[row])
        right.plot([count, count], [low, high], color=figures.BLUE)
        right.plot(count, mean, "o", color=figures.BLUE)
    right.set_xlabel("ascent steps")
    right.set_ylabel("test accuracy, %")
    right.set_title(f"{SWEEP:.0%} wrong labels")
    right.grid(alpha=0.3)
    figures.save(figure, path, "SAM with wrong labels, digits, equal epochs; 95% intervals")


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(argv)
    choose_folder(args, NAME)
    report = Report(args)
    args.base, args.rho = "momentum", None
    results = train_arms({"sgd": VARIANTS["base"], "sam": VARIANTS["sam"]}, args, NOISES)
    several = {f"{count} steps": climbing(count) for count in ASCENT_STEPS}
    results += train_arms(several, args, [SWEEP])
    print_table(results)
    values = values_of(results)
    found = found_of(CLAIMS, values)
    print_claims(found)
    save(report, NAME, found, values, results=results)
    draw(results, args.folder / "wrong_labels.png")
    report.end("wrong_labels.png")
    return results


if __name__ == "__main__":
    main()
