"""Compare sharpness-aware training with its base optimizer, on digits with wrong labels.

    python examples/digits.py
    python examples/digits.py --variants base sam --base adamw --seeds 5 --noise 0.5
    python examples/digits.py --variants sam looksam ae-sam vsam
    python examples/digits.py --variants all

A small Flax network learns scikit-learn's digits (1797 real images of 8x8 pixels) twice: once with
a share of the training labels flipped, and once with clean labels. Every method trains for the same
number of epochs. `base2x` is the base optimizer with twice as many epochs, so that it spends as
many gradients as SAM. The lead of SAM is its lead over the better of these two.

The learning rate and rho of each method are chosen on a validation split, with eight separate
seeds. The test split is used once, with the chosen values. Every seed has its own split, flipped
labels, initialization, batches, and random numbers of the method.

Every method is tuned by the same rule. Learning rates and rho are 1, 2 or 5 times a power of ten. A
method without rho has one number to tune, and its learning rates are closer together (1, 1.5, 2, 3,
5, 7). The search tries a candidate and its neighbours, then the neighbours of the best one so far,
at most five at a time. It ends when everything up to a factor of 2 (or 2.5) away from the best
candidate has been tried (all eight neighbours of a pair, two learning rates on each side of a
single one), and the scores do not rise towards an end of what was tried. So the chosen values are
not at an edge of what was tried. Where they are, the table marks them with a star: with `--rho`,
which gives all candidates, or at the end of the axis. The rho axis begins with 0, its natural end,
which is not marked: there a method is its base optimizer.
Standard errors are over the reported seeds; they do not contain the luck of a search.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from examples.common import arguments, choices

BASELINES = ("base", "base2x")
DEFAULT = (*BASELINES, "sam", "asam", "sampa", "momentum-sam")
# Each row of the tables: the variant, and the factor on the number of epochs.
ROWS = {"base": ("base", 1), "base2x": ("base", 2)} | {
    name: (name, 1) for name in choices.VARIANTS if name not in ("base", "sampa-separate")
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    text = f", or all; default: those of {', '.join(DEFAULT)} that accept the base"
    arguments.add_names(parser, "--variants", [*ROWS, "all"], text, nargs="+")
    arguments.add_settings(parser, seeds=20, name="digits")
    where = "on all training images, at the end of an epoch of 10 steps and after the last one"
    arguments.add_monitor(parser, where)
    args = parser.parse_args(argv)
    arguments.check_settings(parser, args)
    arguments.check_range(parser, args, "monitor", low=0)
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import numpy as np
from tqdm import tqdm

from examples.common import figures, files
from examples.common.digits_task import BATCH, STEPS_PER_EPOCH, describe
from examples.common.output import choose_folder
from examples.common.registry import VARIANTS, check_base
from examples.common.report import (
    MARK,
    Report,
    as_summary,
    marked,
    mean_and_error,
    without_nans,
)
from examples.common.training import PLANNED, SHARPNESS_RADIUS, axes_of, measure, runs_to_try


def work_of(row: str, runs: int) -> float:
    """Return about how many gradients `runs` runs need for an epoch."""
    return STEPS_PER_EPOCH * runs * VARIANTS[ROWS[row][0]].gradients


def print_table(results: list[dict], noise: float, seeds: int) -> None:
    """Print one line per method."""
    print(f"\n{describe(noise)}, {seeds} seeds (mean ± standard error)")
    mine = [result for result in results if result["noise"] == noise]
    best = better_baseline(mine)
    width = max(len("method"), *(len(result["row"]) for result in mine))
    minus = f"minus {best}" if best else ""
    head = f"{'method':<{width}} {'test acc. %':>13} {minus:>13} {'train acc. %':>12}"
    head += f" {'loss incr.':>10} {'gradients':>9} {'ms/step':>8} {'lr':>7} {'rho':>6}"
    is_monitored = any("monitored" in result for result in mine)
    head += " top eig." * is_monitored
    print(head + "\n" + "-" * len(head))
    for result in mine:
        is_compared = best and result["row"] != best
        lead = with_error(*lead_of(mine, result["row"], best)) if is_compared else ""
        test = with_error(*mean_and_error([100 * a for a in result["test_accuracy"]]), sign="")
        train_accuracy, _ = mean_and_error([100 * a for a in result["train_accuracy"]])
        increase, _ = mean_and_error(result["loss_increase"])
        top = f" {top_at_end(result):>8.3g}" if is_monitored else ""
        print(
            f"{result['row']:<{width}} {test:>13} {lead:>13} {train_accuracy:>12.2f}"
            f" {increase:>10.4f} {result['gradients']:>9.0f}"
            f" {1e3 * result['seconds_per_step']:>8.3f} {marked(result, 'learning_rate'):>7}"
            f" {marked(result, 'rho'):>6}{top}"
        )
    if best:
        print(f"{minus}: in points, paired by seed")
    print(
        f"loss incr.: L(w + eps) - L(w), |eps| = {SHARPNESS_RADIUS}, mean over training batches "
        f"of {BATCH}, with eps along the gradient of each batch"
    )
    if is_monitored:
        worst = max(np.max(result["monitored"]["top_eigenvalue_error"][-1]) for result in mine)
        print(
            "top eig.: largest eigenvalue of the Hessian of the loss on all training images, mean "
            f"over the seeds; error of each at most {worst:.1g}"
        )
    if any(result["row"] == "base2x" for result in mine):
        print("base2x: the base optimizer with twice as many epochs, so as many gradients as SAM")
    if any(result["edges"] for result in mine):
        print(MARK)


def with_error(mean: float, error: float, sign: str = "+") -> str:
    """Format a mean with its standard error."""
    return f"{mean:{sign}.2f} ± {error:.2f}"


def top_at_end(result: dict) -> float:
    """Return the top eigenvalue after the last step, the mean over the seeds."""
    return float(np.mean(result["monitored"]["top_eigenvalue"][-1]))


def better_baseline(results: list[dict]) -> str:
    """Return the base optimizer's row with the highest test accuracy, "" if there is none.

    The baselines compete on the test split itself. If that favours anybody, it favours them.
    """
    means = {r["row"]: np.mean(r["test_accuracy"]) for r in results if r["row"] in BASELINES}
    return max(means, key=lambda row: means[row], default="")


def lead_of(results: list[dict], row: str, other: str) -> tuple[float, float]:
    """Return the mean and error of the lead of one row over another, paired by seed, in points."""
    accuracies = {r["row"]: 100 * np.asarray(r["test_accuracy"]) for r in results}
    return mean_and_error((accuracies[row] - accuracies[other]).tolist())


def compare(results: list[dict], noise: float) -> None:
    """Print SAM's lead over the better of its baselines, then over the other ones."""
    mine = [result for result in results if result["noise"] == noise]
    rows = [result["row"] for result in mine]
    best = better_baseline(mine)
    if "sam" not in rows or not best:
        return
    others = [row for row in BASELINES if row in rows and row != best]
    for row in (best, *others):
        lead, error = lead_of(mine, "sam", row)
        text = f"sam - {row}: {with_error(lead, error)} points"
        if error > 0:
            text += f", {lead / error:+.1f} standard errors"
        if row == best and others:
            text += f" ({best}: the better baseline)"
        print(text)


def summary_of(results: list[dict], settings: dict[str, Any]) -> str:
    """Return what tables and figures need of the results, as JSON with one row on each line."""
    settings = {name: value for name, value in settings.items() if name != "variants"}
    return as_summary("examples/digits.py", settings, map(summary_of_row, results))


def summary_of_row(result: dict) -> dict[str, Any]:
    """Return a row of the summary; accuracies in %, but for each seed as a share."""
    mean, error = mean_and_error([100 * a for a in result["test_accuracy"]])
    train_accuracy, _ = mean_and_error([100 * a for a in result["train_accuracy"]])
    increase, _ = mean_and_error(result["loss_increase"])
    top = {"top_eigenvalue": round(top_at_end(result), 3)} if "monitored" in result else {}
    return without_nans(
        {
            **{name: result[name] for name in ("row", "noise", "learning_rate", "rho", "edges")},
            "trials": len(result["candidates"]),
            "gradients": round(result["gradients"], 1),
            "mean": round(mean, 3),
            "error": round(error, 3),
            "train_accuracy": round(train_accuracy, 2),
            "loss_increase": round(increase, 4),
            **top,
            "test_accuracy": [round(accuracy, 4) for accuracy in result["test_accuracy"]],
        }
    )


def draw(results: list[dict], noises: list[float], path: Path, title: str) -> None:
    """Draw one column of panels per table: final accuracies at the top, training curves below.

    What --monitor measured is at the bottom.
    """
    order = sorted(
        (r for r in results if r["noise"] == noises[0]), key=lambda r: np.mean(r["test_accuracy"])
    )
    rows = [result["row"] for result in order]
    is_monitored = any("monitored" in result for result in results)
    heights = [figures.height_of(len(rows))] + [figures.height_of()] * (1 + is_monitored)
    figure = figures.make_figure(len(noises), heights)
    panels = figure.subplots(len(heights), len(noises), squeeze=False, height_ratios=heights)
    for (dots, curves, *tops), noise in zip(panels.T, noises, strict=True):
        mine = {result["row"]: result for result in results if result["noise"] == noise}
        draw_accuracies(dots, rows, mine)
        dots.set_title(claim(list(mine.values()), noise))
        draw_curves(curves, mine, highlighted(rows))
        for axes in tops:
            draw_top_eigenvalues(axes, mine, highlighted(rows))
    for dots in panels[0, 1:]:
        dots.tick_params(labelleft=False)
    panels[1, 0].set_ylabel("test accuracy, %")
    if is_monitored:
        panels[2, 0].set_ylabel("top eigenvalue of the Hessian")
    figures.save(figure, path, title)


def color_of(row: str) -> str:
    """Return the colour of a row: the base optimizer's differs from that of all methods."""
    return figures.RED if row in BASELINES else figures.BLUE


def draw_accuracies(axes: Any, rows: list[str], results: dict[str, dict]) -> None:
    """Draw a point with its standard error for each row, and a line at the better baseline."""
    best = better_baseline(list(results.values()))
    points = {row: mean_and_error([100 * a for a in results[row]["test_accuracy"]]) for row in rows}
    top = max(mean + np.nan_to_num(error) for mean, error in points.values())
    low = min(mean - np.nan_to_num(error) for mean, error in points.values())
    reference = points[best][0] if best else low
    low = max(low, reference - 2 * max(top - reference, 1))  # what is far below stays at the edge
    span = top - low
    for position, row in enumerate(rows):
        mean, error = points[row]
        color = color_of(row)
        if mean < low:
            axes.plot(low, position, "<", color=color)
        else:
            axes.errorbar(mean, position, xerr=error, fmt="o", ms=5, color=color, capsize=2, lw=1.5)
        axes.annotate(
            f"{mean:.1f}", (top + 0.2 * span, position), ha="right", va="center", color=color
        )
    if best:
        axes.axvline(reference, color=figures.RED, linewidth=1, zorder=0)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlim(low - 0.06 * span, top + 0.22 * span)
    axes.set_xlabel("test accuracy, % (mean ± standard error)")
    axes.grid(axis="x", alpha=0.3)


def highlighted(rows: list[str]) -> dict[str, str]:
    """Choose the rows whose curves have a name and a colour: baselines, SAM, and the best."""
    chosen = [row for row in (*BASELINES, "sam") if row in rows]
    chosen += [row for row in reversed(rows) if row not in chosen][: len(figures.COLORS) - 3]
    first = {"base": figures.RED, "base2x": figures.ORANGE, "sam": figures.BLUE}
    others = iter(color for color in figures.COLORS if color not in first.values())
    return {row: first.get(row) or next(others) for row in chosen}


def draw_curves(axes: Any, results: dict[str, dict], colors: dict[str, str]) -> None:
    """Draw test accuracy over gradients spent; the rows without a colour are grey."""
    for row, result in sorted(results.items(), key=lambda item: item[0] in colors):
        curve = 100 * np.asarray(result["test_accuracy_by_epoch"])
        style = {"color": colors[row], "label": row} if row in colors else {"color": "0.85"}
        axes.plot(result["gradients_by_epoch"], curve, linewidth=1.6, **style)
    best = 100 * max(max(result["test_accuracy_by_epoch"]) for result in results.values())
    axes.set_ylim(best - 15, best + 1)
    axes.set_xlabel("gradients spent")
    axes.set_title("during training")
    axes.grid(alpha=0.3)
    figures.label_ends(axes)


def draw_top_eigenvalues(axes: Any, results: dict[str, dict], colors: dict[str, str]) -> None:
    """Draw the top eigenvalue over the steps; the rows without a colour are grey."""
    drawn = []
    for row, result in sorted(results.items(), key=lambda item: item[0] in colors):
        steps = result["monitored"]["step"]
        drawn.append(np.mean(result["monitored"]["top_eigenvalue"], axis=1))
        style = {"color": colors[row], "label": row} if row in colors else {"color": "0.85"}
        axes.plot(steps, drawn[-1], "o-", markersize=3, linewidth=1.6, **style)
    axes.set_yscale(figures.scale_of(np.concatenate(drawn)))
    axes.set_xlabel("step")
    axes.set_title("sharpness on all training images")
    axes.grid(alpha=0.3)
    figures.label_ends(axes)


def claim(results: list[dict], noise: float) -> str:
    """State how many methods lead the better baseline by two standard errors, and which leads."""
    best = better_baseline(results)
    methods = [result["row"] for result in results if result["row"] not in BASELINES]
    if not best or not methods:
        return describe(noise)
    leads = {row: lead_of(results, row, best) for row in methods}
    ahead = [row for row, (lead, error) in leads.items() if lead > 2 * error]
    text = f"{describe(noise)}: {len(ahead)} of {len(methods)} ahead of {best}"
    if ahead:
        first = max(ahead, key=lambda row: leads[row][0])
        text += f", {first} by {with_error(*leads[first])}"
    return text


def can_have(variant: str, base: str) -> bool:
    """Return whether the variant accepts the base; Momentum-SAM needs momentum."""
    try:
        check_base(variant, base)
    except ValueError:
        return False
    return True


def check_variants(args: argparse.Namespace) -> None:
    """Choose the default rows, or all; refuse a variant that does not accept the base."""
    if not args.variants or "all" in args.variants:
        wanted = ROWS if args.variants else DEFAULT
        args.variants = [row for row in wanted if can_have(ROWS[row][0], args.base)]
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
        work_of(row, runs_to_try(PLANNED) + args.seeds) * ROWS[row][1] * args.epochs * len(noises)
        for row in args.variants
    )
    results = []
    with tqdm(total=total, unit=" gradients", unit_scale=True, smoothing=0.1, disable=None) as bar:
        for row in args.variants:
            variant, times = ROWS[row]
            results += measure(
                row,
                VARIANTS[variant],
                axes_of(VARIANTS[variant], args.base, args.rho),
                args,
                times * args.epochs,
                noises,
                bar,
                partial(work_of, row),
                args.monitor,
            )

    for noise in noises:
        print_table(results, noise, args.seeds)
        compare(results, noise)

    report.save(results=results)
    files.write(args.folder / "summary.json", summary_of(results, report.settings))
    title = f"Digits: {args.base} and its sharpness-aware versions, {args.seeds} seeds; ahead: by "
    title += "two standard errors or more"
    draw(results, noises, args.folder / "digits.png", title)
    report.end("digits.png")
    return results


if __name__ == "__main__":
    main()
