"""The same checkpoints, measured in every way: which one is flatter, and by which measure?

    python examples/measure/sharpness.py
    python examples/measure/sharpness.py --variants base sam gsam --measures eigenvalues trace
    python examples/measure/sharpness.py --params runs/sharpness-001/params.npz --measures plane

A small network is trained on scikit-learn's digits by some variants of SAM, from the same start, in
the same order of batches. Each variant trains until it has spent the same number of gradients: the
base optimizer takes twice as many steps as SAM. Learning rate and rho are those that digits.py
chose (compare/results/digits.json). With `--params`, checkpoints are read from files instead. Such
a file holds the arrays NAME/first/kernel, NAME/first/bias, and so on. This script writes one
(params.npz).

Every measure of samx.sharpness is taken of the mean loss over all training images, at the
checkpoint. Measures of --measures:

eigenvalues        the five largest of three matrices, the smallest of the Hessian, error bounds
trace, frobenius   sums over all eigenvalues, estimated from random draws
density            how the eigenvalues of the Hessian are distributed
worst-case         highest rise of the loss in a ball: L2, adaptive L2 and L-infinity
average-case       mean rise of the loss under random noise, as it is or relative to each weight
smoothed           the same mean for plain noise, from pairs of opposite draws
first-order        rise of the loss after one step of SAM on all images
m-sharpness        the same for parts of the images, one step for each part
directional        curvature along the gradient
relative-flatness  curvature in the last kernel, weighted by its weights
sam-gradient       cosine between SAM's gradient and the exact one, with second derivatives
slice, plane       the loss along random directions, whose columns are as long as those of w
barrier            the loss on the straight line between two checkpoints

A measure of curvature, or a rise of the loss, that is lower means flatter. The last column of the
table says how well each measure goes with test accuracy. It is one run for each variant: it shows
that measures disagree, but not which one predicts generalization.

The script prints the tables. It writes results.json, the parameters (params.npz) and sharpness.png
to --out.
"""

import argparse
import itertools
from typing import Any

from examples.common import arguments, choices

MEASURES = (
    *("eigenvalues", "trace", "frobenius", "density", "worst-case", "average-case", "smoothed"),
    *("first-order", "m-sharpness", "directional", "relative-flatness", "sam-gradient", "slice"),
    *("plane", "barrier"),
)
DEFAULT = [name for name in MEASURES if name != "plane"]
VARIANTS = ["base", "sam", "asam", "msam"]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    add = parser.add_argument
    text = f"; default: {' '.join(VARIANTS)}, or none with --params"
    arguments.add_names(parser, "--variants", choices.VARIANTS, text, nargs="+")
    add("--params", nargs="+", default=[], metavar="FILE", help="checkpoints to measure, .npz")
    text = "; default: all but plane"
    arguments.add_names(parser, "--measures", MEASURES, text, nargs="+", default=DEFAULT)
    text = "epochs of a variant with two gradients for each step; default: 40"
    add("--epochs", type=int, default=40, help=text)
    add("--noise", type=float, default=0.3, help="share of flipped labels; default: 0.3")
    add("--seed", type=int, default=0, help="of the start, of the split and of the batches")
    add("--width", type=int, default=64, help="units of each hidden layer; default: 64")
    many: dict[str, Any] = {"type": float, "nargs": "+"}
    text = (
        "radii of L2 balls; default: 0.2 0.5. One step of SAM for parts of the images has the first"
    )
    add("--l2", default=[0.2, 0.5], help=text, **many)
    add("--adaptive", default=[1.0], help="radii of adaptive L2 balls; default: 1", **many)
    add("--linf", default=[0.005], help="radii of L-infinity balls; default: 0.005", **many)
    text = "standard deviation of the noise of each weight; default: 0.03"
    add("--sigma", type=float, default=0.03, help=text)
    text = "the same, relative to the size of the weight; default: 0.2"
    add("--adaptive-sigma", type=float, default=0.2, help=text)
    add("--draws", type=int, default=100, help="random draws of an estimate; default: 100")
    add("--steps", type=int, default=100, help="steps of a worst case; default: 100")
    add("--restarts", type=int, default=8, help="starts of a worst case; default: 8")
    text = "into how many batches the training images are split; default: 4"
    add("--batches", type=int, default=4, help=text)
    arguments.add_out(parser, "sharpness")
    args = parser.parse_args(argv)
    arguments.check_range(parser, args, "epochs", "width", "steps", "restarts")
    arguments.check_range(parser, args, "batches", high=choices.TRAIN)
    arguments.check_range(parser, args, "draws", low=2)
    arguments.check_range(parser, args, "seed", low=0, high=2**31 - 1)
    arguments.check_share(parser, args, "noise")
    above_zero = ("l2", "adaptive", "linf", "sigma", "adaptive_sigma")
    arguments.check_finite(parser, args, *above_zero, above_zero=True)
    if args.variants is None:
        args.variants = [] if args.params else VARIANTS
    for name in ("variants", "measures", "l2", "adaptive", "linf"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import math
from collections.abc import Collection, Mapping, Sequence

from tqdm import tqdm

from examples.common import files
from examples.common.digits_task import describe
from examples.common.output import choose_folder
from examples.common.report import Report, aligned
from examples.measure import sharpness_checkpoints, sharpness_figure
from examples.measure.sharpness_checkpoints import Checkpoint
from examples.measure.sharpness_measures import (
    Row,
    barrier,
    basics,
    grid_of,
    number_of,
    problem_of,
    programs_of,
    rows_of,
    run_all,
)

COLUMNS = 5  # checkpoints side by side in a table
SMALL = 1e-3  # of a value: smaller errors are not shown
NOTES = """\
Lower means flatter in the rows with a number in the last column. Losses are in nats. Worst and
average cases, steps of SAM, noise and random directions: the rise of the loss over the training
loss. A worst case is the best of {restarts} ascents, a lower bound. Eigenvalues and traces: nats
per squared length.
± is a standard error over draws or images; for eigenvalues, the bound of the error. Errors below
{small:.1%} of a value are not shown.
pairs: of the pairs of checkpoints that differ by more than two standard errors in this measure,
those in which the flatter one has the higher test accuracy."""
CAPTION = """\
Networks with {size} parameters, trained on {images} images of digits, {labels}, each at the cost of
{gradients} gradients. Every measure is of the mean loss over all training images. Bars: standard
errors."""
READ = """\
Networks with {size} parameters, from files. Every measure is of the mean loss over {images} images
of digits, {labels}. Bars: standard errors."""


def with_error(value: float, error: float = math.nan) -> str:
    """Format a number, with the error if it matters; as many digits as the error allows."""
    if not math.isfinite(value):
        return "-"
    if not math.isfinite(error) or error <= SMALL * abs(value):
        return f"{value:.4g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def agreement(checkpoints: Sequence[Mapping[str, Any]], row: Row) -> tuple[int, int]:
    """Count the pairs that differ in a measure, and those in which the flatter one tests better."""
    right = clear = 0
    for a, b in itertools.combinations(checkpoints, 2):
        (x, dx), (y, dy) = (number_of(c["measured"], row) for c in (a, b))
        gain = b["measured"]["basics"]["test_accuracy"] - a["measured"]["basics"]["test_accuracy"]
        if abs(x - y) > 2 * math.hypot(dx, dy) and gain:
            clear += 1
            right += (x > y) == (gain > 0)
    return right, clear


def flattest(checkpoints: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the measures by which each checkpoint is the flattest."""
    found: dict[str, list[Row]] = {checkpoint["name"]: [] for checkpoint in checkpoints}
    for row in rows:
        if row.is_flatness:
            values = {c["name"]: number_of(c["measured"], row)[0] for c in checkpoints}
            found[min(values, key=lambda name: values[name])].append(row)
    return found


def print_table(
    checkpoints: Sequence[Mapping[str, Any]], rows: Sequence[Row], restarts: int
) -> None:
    """Print a row per measure and a column per checkpoint, at most so many side by side."""
    for first in range(0, len(checkpoints), COLUMNS):
        some = checkpoints[first : first + COLUMNS]
        is_compared = len(checkpoints) > 1 and first + COLUMNS >= len(checkpoints)
        grid = [["", *(c["name"] for c in some), *["pairs"] * is_compared]]
        for name, title in (("learning_rate", "learning rate"), ("rho", "rho"), ("epochs",) * 2):
            if all(name in c for c in some):
                grid.append([title, *(f"{c[name]:g}" for c in some), *[""] * is_compared])
        for row in rows:
            line = [row.title, *(with_error(*number_of(c["measured"], row)) for c in some)]
            if is_compared:
                right, clear = agreement(checkpoints, row)
                line.append(f"{right} of {clear}" if row.is_flatness and clear else "")
            grid.append(line)
        lines = aligned(grid)
        print("\n" + "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]]))
    print(NOTES.format(small=SMALL, restarts=restarts))


def print_pairs(pairs: Sequence[Mapping[str, Any]]) -> None:
    grid = [["line between", "barrier", "at"]]
    for pair in pairs:
        where = f"{pair['t']:.2f}" if pair["value"] > 0 else ""
        grid.append([" and ".join(pair["names"]), with_error(pair["value"]), where])
    print("\n" + "\n".join(aligned(grid)))
    print("barrier: how far the loss rises above the straight line between the losses at the ends")


def claims(checkpoints: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> list[str]:
    """State which checkpoint is flattest by how many measures, and what went with accuracy."""
    measures = [row for row in rows if row.is_flatness]
    if len(checkpoints) < 2 or not measures:
        return []
    by_name = {name: found for name, found in flattest(checkpoints, rows).items() if found}
    counts = sorted(by_name, key=lambda name: -len(by_name[name]))
    listed = ", ".join(f"{name} by {len(by_name[name])}" for name in counts)
    found = [f"Flattest of {len(checkpoints)} checkpoints, by {many(measures)}: {listed}."]
    if len(by_name) > 1:
        for name in counts[1:]:
            found.append(f"  {name}: {'; '.join(row.title.strip() for row in by_name[name])}")
    else:
        found.append("  The measures agree on it.")
    judged = {row.title: agreement(checkpoints, row) for row in measures}
    judged = {title: pairs for title, pairs in judged.items() if pairs[1]}
    whole = [title for title, (right, clear) in judged.items() if right == clear]
    wrong = [title for title, (right, clear) in judged.items() if 2 * right < clear]
    found.append(
        f"The flatter of two checkpoints always has the higher test accuracy by {len(whole)} of "
        f"{many(judged)}"
        + (f", and in less than half of the pairs by: {'; '.join(wrong)}." if wrong else ".")
    )
    found.append(doubt(checkpoints))
    return found


def many(measures: Collection[Any]) -> str:
    return f"{len(measures)} measure{'s' * (len(measures) != 1)}"


def doubt(checkpoints: Sequence[Mapping[str, Any]]) -> str:
    """Say how far the test accuracies can be told apart."""
    basics_of = [c["measured"]["basics"] for c in checkpoints]
    pairs = [*itertools.combinations(basics_of, 2)]
    clear = sum(
        abs(a["test_accuracy"] - b["test_accuracy"])
        > 2 * math.hypot(a["test_accuracy_error"], b["test_accuracy_error"])
        for a, b in pairs
    )
    return (
        f"The test accuracies of {clear} of {len(pairs)} pairs differ by more than two standard "
        "errors. Each checkpoint is one run, and some measures are nearly the same."
    )


def title_of(checkpoints: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> str:
    """Return the title of the figure: who is the flattest, by how many measures."""
    measures = [row for row in rows if row.is_flatness]
    if len(checkpoints) < 2 or not measures:
        return "The loss around the checkpoints"
    by_name = {name: len(found) for name, found in flattest(checkpoints, rows).items() if found}
    counts = sorted(by_name, key=lambda name: -by_name[name])
    if len(counts) == 1:
        return f"{counts[0]} is the flattest by all measures ({len(measures)})"
    others = ", ".join(f"{name} by {by_name[name]}" for name in counts[1:4])
    more = f" and {len(counts) - 4} others" if len(counts) > 4 else ""
    return (
        f"Which checkpoint is the flattest depends on the measure: {counts[0]} by "
        f"{by_name[counts[0]]} of {len(measures)}, {others}{more}"
    )


def caption_of(args: argparse.Namespace, checkpoints: Sequence[Checkpoint]) -> str:
    size = sum(x.size for layer in checkpoints[0].params.values() for x in layer.values())
    known = {"size": f"{size:,}", "images": f"{choices.TRAIN:,}", "labels": describe(args.noise)}
    spent = {round(c.about["gradients"]) for c in checkpoints if "gradients" in c.about}
    if args.params or not spent:
        return READ.format(**known)
    low, high = min(spent), max(spent)
    return CAPTION.format(gradients=f"{low} to {high}" if low < high else low, **known)


def measure(args: argparse.Namespace, checkpoints: Sequence[Checkpoint]) -> dict[str, list]:
    """Measure the checkpoints, and the lines between them."""
    params = {checkpoint.name: checkpoint.params for checkpoint in checkpoints}
    problem, programs, pairs = problem_of(args), programs_of(args), {}
    if "barrier" in args.measures:
        pairs = {(a, b): (params[a], params[b]) for a, b in itertools.combinations(params, 2)}
    total = (1 + len(programs)) * len(params) + len(pairs)
    with tqdm(total=total, desc="measure", unit="measure", disable=None) as bar:
        found = run_all({"basics": basics}, problem, params, bar)
        problem = problem._replace(grid=grid_of(r["basics"]["top"] for r in found.values()))
        for name, results in run_all(programs, problem, params, bar).items():
            found[name] |= results
        lines = run_all({"barrier": barrier}, problem, pairs, bar) if pairs else {}
    return {
        "checkpoints": [
            {"name": c.name, **c.about, "measured": found[c.name]} for c in checkpoints
        ],
        "pairs": [{"names": list(names), **result["barrier"]} for names, result in lines.items()],
    }


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> dict[str, list]:
    args = parse(argv)
    checkpoints = sharpness_checkpoints.read(args.params)
    if checkpoints:
        args.width = sharpness_checkpoints.width_of(checkpoints[0])
    choose_folder(args, "sharpness")
    report = Report(args)
    bar = tqdm(args.variants, desc="train", unit="run", disable=not args.variants or None)
    checkpoints += sharpness_checkpoints.train(bar, args)
    files.write(args.folder / "params.npz", sharpness_checkpoints.archive(checkpoints))

    found = measure(args, checkpoints)
    programs = found["checkpoints"][0]["measured"]
    rows = [row for row in rows_of(args) if row.program in programs]
    print(f"\nMeasured on {choices.TRAIN} training images, {describe(args.noise)}.")
    print_table(found["checkpoints"], rows, args.restarts)
    if found["pairs"]:
        print_pairs(found["pairs"])
    said = claims(found["checkpoints"], rows)
    if said:
        print("\n" + "\n".join(said))

    report.save(**found, claims=said)
    plots = []
    if not sharpness_figure.is_empty(found["checkpoints"], found["pairs"], rows):
        title, caption = title_of(found["checkpoints"], rows), caption_of(args, checkpoints)
        path = args.folder / "sharpness.png"
        sharpness_figure.draw(found["checkpoints"], found["pairs"], rows, path, title, caption)
        plots.append(path.name)
    report.end(*plots)
    print(f"Parameters: {args.folder / 'params.npz'}")
    return found


if __name__ == "__main__":
    main()
