"""AsyncSAM: does it become SAM when trainings are longer and steps are smaller?

    python examples/claims/async_long.py
    python examples/claims/async_long.py --seeds 5

AsyncSAM climbs the gradient of the last step, on the argument that successive gradients are
similar. If so, smaller steps should bring it nearer to SAM. But it also climbs the gradient of
another batch, which smaller steps do not change. Two arms between AsyncSAM and SAM tell these apart
(see which_batch.py): "older point" climbs the gradient of the step's own batch, one step old;
"previous batch" climbs a fresh gradient of the last step's batch.

A small network learns the digits with 30% wrong labels for 40, 80, 160 and 320 epochs, at learning
rates 0.1, 0.05, 0.025 and 0.0125: the rate that every arm chose for 40 epochs, halved whenever the
epochs double. All arms train with the rho of SAM for 40 epochs, and with a rho that is chosen for
each arm and length on validation images, with seeds that are not reported: with wrong labels, long
trainings need a larger rho.

The script prints each claim with its number and the verdict, and writes results.json and
async_long.png to --out. It takes about four minutes on two CPU cores.
"""

import argparse

from examples.common import arguments

NAME = "async_long"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=40, help="of the shortest trainings")
    parser.add_argument("--width", type=int, default=64, help="units of each hidden layer")
    arguments.add_out(parser, NAME)
    args = parser.parse_args(argv)
    arguments.check_range(parser, args, "seeds", "epochs", "width")
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from examples.claims.claim import Claim, Found, found_of, print_claims, save, shown
from examples.claims.climbing import ARMS
from examples.common import figures, files
from examples.common.intervals import Interval, mean_interval
from examples.common.output import choose_folder
from examples.common.report import MARK, Report, aligned
from examples.common.training import (
    SEARCH_SEEDS,
    data_of,
    make_trainer,
    map_runs,
    start_of,
    train_run,
)
from examples.common.tuning import Runs, runs_of

NOISE, BASE = 0.3, "momentum"
LEARNING_RATE, RHO = 0.1, 0.2  # that which_batch.py chooses for SAM; the rate for all arms
RADII = (0.1, 0.2, 0.5, 1.0)
LONGER = (1, 2, 4, 8)  # times the epochs; the learning rate is divided by it
ROWS = ("sam", "older point", "previous batch", "async-sam")
COLORS = {"older point": figures.GREEN, "previous batch": figures.BLUE, "async-sam": figures.RED}
GIVEN, CHOSEN = "SAM's rho", "rho chosen"
HOW = {GIVEN: f"all with rho {RHO}", CHOSEN: "each with a rho chosen for this length"}
MARGIN = 0.5  # points; less than that below SAM is level with it
ANY = np.inf


class Said(NamedTuple):
    """What is said about the accuracy of two rows after the longest training.

    Attributes:
        system: Name in `samx.catalog`.
        row: A row.
        other: The row that it is compared with.
        low: The claim holds above this difference, in points.
        high: And below this one.
        text: The claim.
        source: Where it stands.
        why: What was found.
    """

    system: str
    row: str
    other: str
    low: float
    high: float
    text: str
    source: str
    why: str = ""


SIMILAR = "secondary source: successive gradients are similar"
SAID = {
    "async": Said(
        *("async_sam", "async-sam", "sam", -MARGIN, ANY),
        "SAM's accuracy, in a longer training with smaller steps.",
        SIMILAR,
        "smaller steps make the older gradient as good as a new one, and leave the other batch; a "
        "larger rho makes up for most of that",
    ),
    "older point": Said(
        *("async_sam", "older point", "sam", -MARGIN, ANY),
        "An ascent gradient that is one step old does what a fresh one does.",
        SIMILAR,
    ),
    "previous batch": Said(
        *("sampa", "previous batch", "sam", -ANY, 0.0),
        "SAM with two batches, one to climb and one to descend, is worse than SAM.",
        "secondary source: caption of Table 10",
    ),
    "limit": Said(
        *("async_sam", "async-sam", "previous batch", -MARGIN, MARGIN),
        "With small steps it becomes SAM with two batches.",
        "follows from the rule",
    ),
}
SETTING = "digits, 30% wrong labels, 320 epochs at an eighth of the learning rate"
CLAIMS = {
    f"{name}, {how}": Claim(
        (said.system,),
        said.text,
        said.source,
        f"test accuracy of '{said.row}' over '{said.other}', points; {SETTING}, {what}",
        said.low,
        said.high,
        why=said.why,
    )
    for how, what in HOW.items()
    for name, said in SAID.items()
} | {
    f"trend, {how}": Claim(
        ("async_sam",),
        "The smaller the steps, the nearer it is to SAM.",
        SIMILAR,
        "slope of the test accuracy of 'async-sam' over 'sam', points for each doubling of 40 "
        f"epochs to 320; digits, 30% wrong labels, {what}",
        low=0.0,
        why="it comes nearer to SAM with two batches",
    )
    for how, what in HOW.items()
}

Points = dict[tuple[str, int, str], list[float]]  # row, times the epochs, how: one for each seed


def accuracies(
    row: str, args: argparse.Namespace, longer: int, rho: float, seeds: Iterable[int], split: int
) -> list[float]:
    """Train a row for so many times the epochs; return accuracies in percent, one for each seed.

    Args:
        row: One of `ROWS`.
        args: The arguments of the script.
        longer: Times the epochs; the learning rate is divided by it.
        rho: The radius.
        seeds: The seeds.
        split: On which images: 1 is the validation split, 2 the test split.
    """
    epochs = longer * args.epochs
    trainer = make_trainer(ARMS[row], BASE, args.width, epochs)

    def of_run(run: Runs) -> Any:
        data = data_of(int(run.seed), NOISE)
        trained = train_run(trainer, start_of(int(run.seed), args.width), run, data[0], epochs)
        return trainer.accuracy(trained.params, data[split])

    runs = Runs(*runs_of(seeds, [(LEARNING_RATE / longer, rho)]))
    found = map_runs(of_run, runs, advance=lambda count: None)
    return (100 * np.asarray(found, float)).round(4).tolist()


def measure(args: argparse.Namespace) -> tuple[Points, dict[tuple[str, int], float]]:
    """Train everything; return the test accuracies, and the rho of each row and length."""
    points, radii = {}, {}
    places = [(row, longer) for row in ROWS for longer in LONGER]
    for row, longer in tqdm(places, unit=" lengths", disable=None):
        scores = {
            rho: np.mean(accuracies(row, args, longer, rho, SEARCH_SEEDS, 1)) for rho in RADII
        }
        best = radii[row, longer] = max(scores, key=lambda rho: scores[rho])
        of_rho = {
            rho: accuracies(row, args, longer, rho, range(args.seeds), 2) for rho in {RHO, best}
        }
        points[row, longer, GIVEN], points[row, longer, CHOSEN] = of_rho[RHO], of_rho[best]
    return points, radii


def over(points: Points, row: str, other: str, longer: int, how: str) -> list[float]:
    """Return the differences of two rows, paired by seed."""
    return np.subtract(points[row, longer, how], points[other, longer, how]).round(4).tolist()


def lead(points: Points, row: str, longer: int, how: str) -> Interval:
    """Return what a row is ahead of SAM, with its interval."""
    return mean_interval(over(points, row, "sam", longer, how))


def values_of(points: Points) -> dict[str, list[float]]:
    """Return the numbers of each claim, one for each seed."""
    values = {
        f"{name}, {how}": over(points, said.row, said.other, LONGER[-1], how)
        for how in HOW
        for name, said in SAID.items()
    }
    for how in HOW:
        behind = [over(points, "async-sam", "sam", longer, how) for longer in LONGER]
        values[f"trend, {how}"] = np.polyfit(np.log2(LONGER), behind, 1)[0].tolist()
    return values


def table(points: Points, radii: dict[tuple[str, int], float], epochs: int) -> list[str]:
    """Return the lines of a table: SAM's accuracy, what the others are over it, and the radii."""
    grid = [["points over sam", *(f"{longer * epochs} epochs" for longer in LONGER)]]
    for how in HOW:
        mean = [np.mean(points["sam", longer, how]) for longer in LONGER]
        grid.append([f"sam, {how}, %", *(f"{value:.2f}" for value in mean)])
        for row in ROWS[1:]:
            leads = [lead(points, row, longer, how) for longer in LONGER]
            grid.append([f"{row}, {how}", *map(shown, leads)])
    for row in ROWS:
        chosen = [radii[row, longer] for longer in LONGER]
        marks = ["*" if rho == max(RADII) else "" for rho in chosen]
        each = [f"{rho:g}{mark}" for rho, mark in zip(chosen, marks, strict=True)]
        grid.append([f"{row}, its rho", *each])
    return [*aligned(grid), MARK]


def draw(points: Points, epochs: int, path: Path, title: str) -> None:
    """Draw the differences to SAM over the number of epochs: with SAM's rho, and with a chosen one.

    Args:
        points: The test accuracies.
        epochs: Of the shortest trainings.
        path: The file.
        title: The title over both panels.
    """
    figure = figures.make_figure(2)
    panels: Sequence[Any] = figure.subplots(1, 2, sharey=True)
    ends = [longer * epochs for longer in LONGER]
    for axes, how in zip(panels, HOW, strict=True):
        for row in ROWS[1:]:
            values, low, high = np.array([lead(points, row, longer, how) for longer in LONGER]).T
            axes.plot(ends, values, "o-", color=COLORS[row], label=row)
            axes.fill_between(ends, low, high, color=COLORS[row], alpha=0.15, lw=0)
        axes.axhline(0, color=figures.INK, linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ends, [f"{end}" for end in ends])
        axes.set_xlabel("epochs; the learning rate falls as they rise")
        last = lead(points, "async-sam", LONGER[-1], how).value
        axes.set_title(f"{how}: AsyncSAM {last:+.2f} points over SAM at the end")
        axes.grid(alpha=0.3)
        figures.label_ends(axes)
    panels[0].set_ylabel("test accuracy over sam, points")
    figures.save(figure, path, title)


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[Found]:
    args = parse(argv)
    choose_folder(args, NAME)
    report = Report(args)
    points, radii = measure(args)
    print("\n" + "\n".join(table(points, radii, args.epochs)))
    values = values_of(points)
    found = found_of(CLAIMS, values)
    print_claims(found)
    more = {
        "points": {", ".join(map(str, key)): each for key, each in points.items()},
        "radii": {f"{row}, {longer}": rho for (row, longer), rho in radii.items()},
    }
    save(report, NAME, found, values, **more)
    title = f"Digits, 30% wrong labels: smaller steps, {args.seeds} seeds, 95% intervals"
    draw(points, args.epochs, args.folder / f"{NAME}.png", title)
    report.end(f"{NAME}.png")
    return found


if __name__ == "__main__":
    main()
