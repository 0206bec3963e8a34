"""Late SAM: does SAM in the last part of the training do what SAM in all of it does?

    python examples/claims/late_sam.py
    python examples/claims/late_sam.py --seeds 5 --noise 0

The task is that of digits.py: a small network learns 1000 of scikit-learn's digits, once with a
share of the training labels wrong, and once with clean labels. The test split has 500 images.

All schedules of use spend equal gradients: SGD with momentum trains for twice as many steps as SAM,
and whoever takes a sharp gradient on some steps only, for a number of steps between. The learning
rate is constant, and falls in a line to 0 over the last quarter. The rows are

    sgd, sam                 no sharp step; all of them
    last 10%, 25%, 50%       SAM in the last part only; rho rises in a line over a fifth of it
    last 25%, no ramp        the same with a constant rho
    every 5                  SAM on every fifth step
    every 5, then always     SAM on every fifth step, and on every step of the last quarter

Every row has its own learning rate and rho, chosen on a validation split, with seeds that are not
reported, until the best candidate is in the interior of what was tried. Two kinds of pairs may be
good: a low learning rate, which does not yet fit the wrong labels, with a small rho, and a higher
one with a large rho. So a search starts at a large rho, and tries two values of rho on each side.

The script prints a table, and writes results.json and late_sam.png to --out. It takes about two
minutes on two CPU cores.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from examples.common import arguments


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=40, help="of SAM; SGD takes twice as many")
    parser.add_argument("--noise", type=float, default=0.3, help="share of wrong labels")
    parser.add_argument("--width", type=int, default=64, help="units of each hidden layer")
    arguments.add_out(parser, "late_sam")
    args = parser.parse_args(argv)
    arguments.check_range(parser, args, "seeds", "epochs", "width")
    arguments.check_share(parser, args, "noise")
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import samx
from examples.common import figures, files
from examples.common.digits_task import BATCH, STEPS_PER_EPOCH, describe, rows_of, shuffled
from examples.common.output import choose_folder
from examples.common.report import MARK, Report, aligned, marked, mean_and_error
from examples.common.training import SEARCH_SEEDS, data_of, make_functions, map_runs, start_of
from examples.common.tuning import (
    SIXTHS,
    Runs,
    around,
    best_of,
    edges,
    from_zero,
    runs_of,
    scores_of,
    search,
)
from samx import policies

DECAY = 5e-4
FALL = 0.25  # of the steps, over which the learning rate falls
RAMP = 0.2  # of the late steps, over which rho rises
NUMBERS = ("learning_rate", "rho")
PLANNED = 18  # candidates of a search, for the progress bar


class Use(NamedTuple):
    """A schedule of use of SAM.

    Attributes:
        share: Share of the steps, the last ones, that are all sharp.
        period: Every so many of the steps before are sharp; 0: none.
        has_ramp: Whether rho rises from 0 at the beginning of the late steps.
    """

    share: float
    period: int = 0
    has_ramp: bool = False

    def start(self, steps: int) -> int:
        """Return the first of the late steps."""
        return steps - round(self.share * steps)

    def policy(self, steps: int) -> policies.Policy:
        """Return what decides which of so many steps are sharp."""
        start = self.start(steps)
        if not self.period:
            return policies.between(start)
        early_and_late = [policies.every(self.period), policies.every(1)]
        return policies.join_policies(early_and_late, [start])

    def gradients(self, steps: int) -> int:
        """Return the gradients that so many steps spend."""
        start = self.start(steps)
        early = -(-start // self.period) if self.period else 0
        return steps + early + steps - start

    def steps(self, gradients: int) -> int:
        """Return the largest number of steps that spend at most so many gradients."""
        return max(n for n in range(gradients + 1) if self.gradients(n) <= gradients)


USES = {
    "sgd": Use(0.0),
    "sam": Use(1.0),
    "last 10%": Use(0.1, has_ramp=True),
    "last 25%": Use(0.25, has_ramp=True),
    "last 50%": Use(0.5, has_ramp=True),
    "last 25%, no ramp": Use(0.25),
    "every 5": Use(0.0, period=5),
    "every 5, then always": Use(0.25, period=5),
}
COLORS = dict.fromkeys(USES, figures.BLUE) | {"sgd": figures.GREY, "sam": figures.RED}


def learning_rates(peak: Any, steps: int) -> optax.Schedule:
    """Return the schedule of the learning rate: constant, then falling in a line to 0."""
    fall = round(FALL * steps)
    return lambda step: peak * jnp.minimum(1.0, (steps - step) / max(fall, 1))


def optimizer(use: Use, steps: int, learning_rate: Any, rho: Any) -> Any:
    """Build the optimizer of a training of so many steps."""
    schedule = learning_rates(learning_rate, steps)
    base = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(schedule, momentum=0.9))
    if not use.share and not use.period:
        return optax.with_extra_args_support(base)
    start = use.start(steps)
    ramp = round(RAMP * (steps - start))
    if use.has_ramp and ramp:
        rho = optax.linear_schedule(0.0, rho, ramp, transition_begin=start)
    return optax.chain(samx.perturb_if(use.policy(steps), samx.sam(rho)), base)


@functools.lru_cache(maxsize=2)
def trainer(use: Use, steps: int, width: int) -> Any:
    """Return the compiled function that trains a run; it gives accuracies, and gradients spent."""
    functions = make_functions(width)

    def of_run(run, params, train, *others):
        tx = optimizer(use, steps, run.learning_rate, run.rho)

        def step(carry, rows):
            params, state = carry
            batch = rows_of(train, rows)

            def value_fn(params):
                return functions.losses_fn(params, batch).mean()

            value, g = jax.value_and_grad(value_fn)(params)
            updates, state = tx.update(g, state, params, value=value, value_fn=value_fn)
            return (optax.apply_updates(params, updates), state), None

        epochs = jnp.arange(-(-steps // STEPS_PER_EPOCH))
        batches = jax.lax.map(functools.partial(shuffled, run.seed), epochs)
        batches = batches.reshape(-1, BATCH)[:steps]
        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
        spent = optax.tree.get(state, "gradients_spent", steps)
        return jnp.stack([functions.accuracy(params, data) for data in others]), spent

    return jax.jit(of_run)


def measure(row: str, noise: float, args: argparse.Namespace, bar: tqdm) -> dict[str, Any]:
    """Choose the numbers of a row, repeat it with the reported seeds, and measure it."""
    use = USES[row]
    steps = use.steps(2 * args.epochs * STEPS_PER_EPOCH)
    train = trainer(use, steps, args.width)

    def trained(seeds, candidates):
        """Return the accuracies [runs, splits], and the gradients spent by each run."""

        def of_run(run):
            seed = int(run.seed)
            return train(run, start_of(seed, args.width), *data_of(seed, noise))

        seed, *numbers = runs_of(seeds, candidates)
        numbers = numbers if len(numbers) == 2 else [*numbers, np.zeros_like(numbers[0])]
        return map_runs(of_run, Runs(seed, *numbers), advance=bar.update)

    def evaluate(candidates):
        accuracies, _ = trained(SEARCH_SEEDS, candidates)
        return scores_of(accuracies[:, 0], candidates).tolist()

    rhos = from_zero(around(0.5))._replace(reach=2)
    axes = [around(0.1, SIXTHS)] if row == "sgd" else [around(0.1), rhos]
    tried = search(axes, evaluate)
    bar.total += (len(tried) - PLANNED) * len(SEARCH_SEEDS)
    best = best_of(tried)
    accuracies, spent = trained(range(args.seeds), [best])
    return {
        **{"row": row, "noise": noise, "steps": steps, "gradients": float(np.mean(spent))},
        **dict(zip(NUMBERS, (*best, 0.0), strict=False)),
        "edges": edges(best, tried, NUMBERS[: len(best)]),
        "accuracy": np.round(100 * accuracies[:, 1].astype(float), 4).tolist(),
    }


def lead_of(result: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Return the mean and error of the lead over another row, paired by seed, in points."""
    return mean_and_error(np.subtract(result["accuracy"], other["accuracy"]).tolist())


def shown(mean: float, error: float, sign: str = "") -> str:
    return f"{mean:{sign}.2f} ± {error:.2f}"


def leads_of(result: dict[str, Any], results: list[dict[str, Any]]) -> list[str]:
    """Return the leads over SGD and over SAM; none over the row itself."""
    by_row = {r["row"]: r for r in results}
    others = [by_row["sgd"], by_row["sam"]]
    return ["" if result is r else shown(*lead_of(result, r), sign="+") for r in others]


def print_table(results: list[dict[str, Any]], noise: float, seeds: int) -> None:
    """Print one line per row, with its leads over SGD and over SAM."""
    print(f"\n{describe(noise)}, {seeds} seeds (mean ± standard error)")
    grid = [["SAM", "accuracy, %", "over sgd", "over sam", "steps", "gradients", "lr", "rho"]]
    for result in results:
        leads = leads_of(result, results)
        counts = [f"{result['steps']}", f"{result['gradients']:.0f}"]
        ends = [marked(result, number) for number in NUMBERS]
        accuracy = shown(*mean_and_error(result["accuracy"]))
        grid.append([result["row"], accuracy, *leads, *counts, *ends])
    print("\n".join(aligned(grid)))
    print("leads: in points, paired by seed")
    if any(result["edges"] for result in results):
        print(MARK)


def claim(results: list[dict[str, Any]]) -> str:
    """State the lead of the best late row over SGD, and over SAM."""
    by_row = {result["row"]: result for result in results}
    late = [r for r in results if r["row"] not in ("sgd", "sam")]
    best = max(late, key=lambda r: np.mean(r["accuracy"]))
    over = {name: shown(*lead_of(best, by_row[name]), sign="+") for name in ("sgd", "sam")}
    return f"best is {best['row']}: {over['sgd']} over sgd, {over['sam']} over sam"


def draw(results: list[dict[str, Any]], noises: list[float], path: Path, title: str) -> None:
    """Draw the accuracy of each row, with errors."""
    figure = figures.make_figure(len(noises), [figures.height_of(len(USES))])
    (panels,) = figure.subplots(1, len(noises), squeeze=False)
    for axes, noise in zip(panels, noises, strict=True):
        mine = [result for result in results if result["noise"] == noise][::-1]
        for position, result in enumerate(mine):
            mean, error = mean_and_error(result["accuracy"])
            color = COLORS[result["row"]]
            axes.errorbar(mean, position, xerr=error, fmt="o", color=color, capsize=2)
        axes.set_yticks(range(len(mine)), [result["row"] for result in mine])
        axes.set_ylim(-0.7, len(mine) - 0.3)
        axes.set_xlabel("test accuracy, %")
        axes.set_title(f"{describe(noise)}: {claim(mine)}")
        axes.grid(axis="x", alpha=0.3)
    for axes in panels[1:]:
        axes.tick_params(labelleft=False)
    figures.save(figure, path, title)


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(argv)
    choose_folder(args, "late_sam")
    report = Report(args)
    noises, results = list(dict.fromkeys([args.noise, 0.0])), []
    planned = len(USES) * len(noises) * (PLANNED * len(SEARCH_SEEDS) + args.seeds)
    with tqdm(total=planned, unit=" runs", smoothing=0.1, disable=None) as bar:
        for row in USES:
            for noise in noises:
                bar.set_description(f"{row}, {describe(noise)}")
                results.append(measure(row, noise, args, bar))
    for noise in noises:
        print_table([r for r in results if r["noise"] == noise], noise, args.seeds)
    report.save(results=results)
    title = f"Digits: SAM on some steps at equal gradients, {args.seeds} seeds"
    draw(results, noises, args.folder / "late_sam.png", title)
    report.end("late_sam.png")
    return results


if __name__ == "__main__":
    main()
