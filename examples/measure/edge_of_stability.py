"""The edge of stability: does the top eigenvalue of the Hessian stop where theory says?

    python examples/measure/edge_of_stability.py
    python examples/measure/edge_of_stability.py --cases sam --radii 0.003 0.01 0.03 0.1
    python examples/measure/edge_of_stability.py --loss cross_entropy

In training with full batches, the largest eigenvalue of the Hessian of the loss, lambda, often goes
to the edge of stability and stays there. Below the edge it rises. Above the edge the steps of the
optimizer overshoot along the sharpest direction, until lambda has fallen. For gradient descent with
the learning rate eta the edge is 2 / eta. For sharpness-aware training it is lower, and it moves
with the gradient: `samx.sharpness.edge` solves

    lambda (1 + a r lambda) = 2 (1 + beta) / eta

    r     how far the perturbation goes along the gradient: rho / |gradient| for SAM, rho for
          un-normalized SAM, 0 for gradient descent
    a     weight of SAM in a mixture with the gradient; 1 for SAM alone
    beta  momentum (heavy ball)

This script trains a small network on 300 digits with the optimizers of samx. Every 100 steps it
measures lambda, and the edge at the same parameters. It compares them from step 1300 on, or over
the second half of a shorter run: lambda / edge should be 1.

Two of the cases show where the law does not hold. Un-normalized SAM with a large rho starts so far
above the edge that training diverges, here from about 0.09 on. With cross-entropy, lambda falls
when the examples are fitted, and ends far below the edge, which is then only an upper bound. With a
small learning rate lambda needs more steps to get to the edge.

The script prints a table. It writes results.json and edge_of_stability.png to --out. It takes about
40 seconds on two CPU cores.
"""

import argparse
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

from examples.common import arguments

CASES = (
    *("gd", "sam", "mixture", "momentum", "usam"),
    *("usam-large", "cross-entropy"),  # where the law does not hold
)
LOSSES = {"squared": "squared error", "cross_entropy": "cross-entropy"}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    default = [*CASES]
    arguments.add_names(parser, "--cases", CASES, "; default: all", nargs="+", default=default)
    text = "steps of each case; default: 3000; rounded down to a multiple of 100"
    parser.add_argument("--steps", type=int, default=3000, help=text)
    text = "radii of the case sam; default: 0.01 0.05 0.1"
    parser.add_argument("--radii", type=float, nargs="+", default=[0.01, 0.05, 0.1], help=text)
    parser.add_argument("--learning-rate", type=float, default=0.2, help="default: 0.2")
    text = "of all cases but cross-entropy; default: squared"
    parser.add_argument("--loss", choices=[*LOSSES], default="squared", help=text)
    arguments.add_out(parser, "edge_of_stability")
    args = parser.parse_args(argv)
    arguments.check_range(parser, args, "steps", low=100)
    arguments.check_finite(parser, args, "radii")
    arguments.check_finite(parser, args, "learning_rate", above_zero=True)
    args.steps -= args.steps % 100
    args.cases, args.radii = list(dict.fromkeys(args.cases)), list(dict.fromkeys(args.radii))
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import numpy as np
from tqdm import tqdm

from examples.common import figures, files
from examples.common.output import choose_folder
from examples.common.report import Report, aligned
from examples.measure.edge_training import EVERY, EXAMPLES, Case, ratios, train

RHO, LARGE_RHO, WEIGHT, BETA = 0.05, 0.15, 0.5, 0.5
SETTLED = 1300  # the eigenvalue and the edge are compared from this step on, in a long run
CLOSE = 0.1  # the law holds if the mean ratio is that close to 1
HELD, ABOVE = "at the edge", "above the edge"
MEASURED = {
    **{"label": "λ, the largest eigenvalue of the Hessian: measured", "color": figures.BLUE},
    **{"linestyle": "", "marker": "o", "markersize": 3.5},
}
EDGE = {"label": "its edge of stability: predicted", "color": figures.ORANGE}
PLAIN = {"label": "the edge without SAM: 2 (1 + β) / η", "color": figures.GREY, "linestyle": ":"}
NOTE = {"color": figures.RED, "ha": "center", "va": "center", "fontsize": 10}
CAPTION = """\
The same network, trained on {examples} digits with {loss}, full batches and the learning rate
η = {eta:g}.
Above the edge, the steps of the optimizer overshoot in the sharpest direction, further every time.
The edge solves λ (1 + a r λ) = 2 (1 + β) / η. Here r is ρ / ‖gradient‖ for SAM and ρ for
un-normalized SAM, a is the weight of SAM in a mixture, and β is the momentum. λ / edge: the mean
from step {first} on."""


def cases_of(args: argparse.Namespace) -> dict[str, Case]:
    """Return the cases that were chosen, by their names in the table."""
    case = partial(Case, loss_name=args.loss)
    found = {
        "gd": case("gradient descent"),
        **{f"sam {rho:g}": case(f"SAM, ρ = {rho:g}", rho) for rho in args.radii},
        "mixture": case(f"half SAM (ρ = {RHO:g}), half gradient", RHO, weight=WEIGHT),
        "momentum": case(f"SAM, ρ = {RHO:g}, momentum {BETA:g}", RHO, momentum=BETA),
        "usam": case(f"un-normalized SAM, ρ = {RHO:g}", RHO, False),
        "usam-large": case(f"un-normalized SAM, ρ = {LARGE_RHO:g}", LARGE_RHO, False),
        "cross-entropy": Case(f"SAM, ρ = {RHO:g}, cross-entropy", RHO, loss_name="cross_entropy"),
    }
    return {name: case for name, case in found.items() if name.split()[0] in args.cases}


def first_of(steps: int) -> int:
    """Return the first step at which the eigenvalue and the edge are compared."""
    return min(SETTLED, steps // 2)


def summarize(name: str, case: Case, run: dict[str, Any], args: argparse.Namespace) -> dict:
    """Compute what is printed, drawn and saved of a case."""
    result = {"case": name, **case._asdict(), "diverged_at": None, "ratio": None}
    if run["step"][-1] < args.steps:
        result["diverged_at"] = run["step"][-1] + EVERY
    else:
        ratio = ratios(run, first_of(args.steps))
        result["ratio"] = [float(f(ratio)) for f in (np.mean, np.min, np.max)]
    plain = 2 * (1 + case.momentum) / args.learning_rate
    return {**result, "plain_edge": plain, **run}


def verdict(result: dict[str, Any]) -> str:
    """Say in a few words where the eigenvalue is."""
    if result["diverged_at"] is not None:
        return f"diverges before step {result['diverged_at']}"
    distance = result["ratio"][0] - 1
    if abs(distance) <= CLOSE:
        return HELD
    return ABOVE if distance > 0 else "below the edge"


def table(results: list[dict[str, Any]]) -> str:
    """Format one line per case."""
    head = ["case", "λ / edge", "[min, max]", "last λ", "its edge", "2 (1 + β) / η", "loss"]
    grid = [[*head, "verdict"]]
    for result in results:
        mean, spread = "", ""
        if result["ratio"] is not None:
            mean, low, high = (f"{ratio:.3f}" for ratio in result["ratio"])
            spread = f"[{low}, {high}]"
        last = [f"{result[name][-1]:.2f}" for name in ("eigenvalue", "edge")]
        numbers = [*last, f"{result['plain_edge']:.1f}", f"{result['loss'][-1]:.4f}"]
        grid.append([result["title"], mean, spread, *numbers, verdict(result)])
    return "\n".join(aligned(grid))


def why_not(result: dict[str, Any]) -> str:
    """Say why the eigenvalue is not at the edge."""
    if result["diverged_at"] is not None:
        start, edge = result["eigenvalue"][0], result["edge"][0]
        return f"it starts too far above the edge: λ is {start:.1f}, and the edge {edge:.1f}"
    if verdict(result) == ABOVE:
        return "the quadratic model of the loss is too coarse here"
    if result["loss_name"] == "cross_entropy":
        return (
            "cross-entropy gets flat when the examples are fitted; the edge is only an upper bound"
        )
    return "λ may still rise: try more steps"


def limits(results: list[dict[str, Any]]) -> str:
    """Say where the law held in this run, and where it did not and why."""
    others = [result for result in results if verdict(result) != HELD]
    count = f"{len(results) - len(others)} of {len(results)}"
    lines = [f"In {count} cases the eigenvalue is {HELD}, within {CLOSE:.0%}."]
    for result in others:
        lines.append(f"Not for {result['title']}: {verdict(result)}; {why_not(result)}.")
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], path: Path, caption: str) -> None:
    """Plot the eigenvalue and the edge over the steps, one panel per case."""
    columns = min(3, len(results))
    rows = -(-len(results) // columns)
    figure = figures.make_figure(columns, [*[figures.height_of(5)] * rows, 0.8 + 1.2 / columns])
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    steps = max(result["step"][-1] for result in results)
    for panel, result in zip(grid.flat, results, strict=False):
        panel.plot(result["step"], result["edge"], **EDGE)
        panel.plot([0, steps], [result["plain_edge"]] * 2, **PLAIN)
        panel.plot(result["step"], result["eigenvalue"], **MEASURED)
        is_held = verdict(result) == HELD
        panel.set_title(title_of(result), color=figures.INK if is_held else figures.RED)
        if not is_held:
            panel.text(
                0.5, 0.75, textwrap.fill(why_not(result), 38), **NOTE, transform=panel.transAxes
            )
        panel.set_ylim(bottom=0)
        panel.grid(axis="y", alpha=0.3)
    for panel in grid.flat[len(results) :]:
        panel.axis("off")
    for panel in grid[:, 0]:
        panel.set_ylabel("eigenvalue")
    for panel in grid[-1]:
        panel.set_xlabel("step")
    edge, plain, measured = grid.flat[0].get_lines()
    figure.legend(
        handles=[measured, edge, plain],
        loc="outside lower left",
        ncols=columns,
        title=textwrap.fill(caption, int(12 * figure.get_figwidth())),
        alignment="left",
    )
    held = sum(verdict(result) == HELD for result in results)
    title = (
        f"In {held} of {len(results)} cases the largest eigenvalue of the Hessian settles within "
    )
    figures.save(figure, path, f"{title}{CLOSE:.0%} of the predicted edge of stability")


def title_of(result: dict[str, Any]) -> str:
    """Return the title of a panel: the case, and how far from the edge its eigenvalue is."""
    mean = result["ratio"]
    return f"{result['title']}: " + (f"λ / edge = {mean[0]:.2f}" if mean else verdict(result))


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(argv)
    choose_folder(args, "edge_of_stability")
    report, cases, results = Report(args), cases_of(args), []
    with tqdm(total=args.steps * len(cases), desc="train", unit="step", disable=None) as bar:
        for name, case in cases.items():
            run = train(case, args.learning_rate, args.steps, bar)
            results.append(summarize(name, case, run, args))
    print(f"\n{table(results)}\n\n{limits(results)}")

    report.save(results=results)
    first = first_of(args.steps)
    caption = CAPTION.format(
        examples=EXAMPLES, loss=LOSSES[args.loss], eta=args.learning_rate, first=first
    )
    draw(results, args.folder / "edge_of_stability.png", caption)
    report.end("edge_of_stability.png")
    return results


if __name__ == "__main__":
    main()
