"""Averages: do averaged parameters generalize better, and does SAM still help then?

    python examples/claims/averages.py
    python examples/claims/averages.py --seeds 3 --epochs 20

The task is that of digits.py: a small network learns 1000 of scikit-learn's digits, once with a
share of the training labels wrong, and once with clean labels. The test split has 500 images.

SGD with momentum, and SAM before it, get equal gradients: SGD trains for twice as many epochs. The
learning rate falls along a cosine to 0, or stays constant. Each training is evaluated with its last
iterate, and with three averages over about its last quarter:

    ema      samx.averages.ema, whose iterates are as old on average as those of the last quarter
    swa      samx.averages.swa, all iterates of the last quarter
    latest   samx.averages.latest, the iterates after the epochs of the last quarter

SAM with swa is WASAM. An average costs no gradient. Every row of the table (optimizer, learning
rate, average) has its own learning rate, and rho, chosen on a validation split, with seeds that are
not reported, until the best candidate is in the interior of what was tried.

The script prints a table, and writes results.json and averages.png to --out. It takes about five
minutes on two CPU cores.
"""

import argparse
from pathlib import Path
from typing import Any

from examples.common import arguments


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=40, help="of SAM; SGD takes twice as many")
    parser.add_argument("--noise", type=float, default=0.3, help="share of wrong labels")
    parser.add_argument("--width", type=int, default=64, help="units of each hidden layer")
    arguments.add_out(parser, "averages")
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
from examples.common.digits_task import (
    STEPS_PER_EPOCH,
    describe,
    initialize,
    rows_of,
    shuffled,
    split,
)
from examples.common.output import choose_folder
from examples.common.report import MARK, Report, aligned, marked, mean_and_error
from examples.common.training import SEARCH_SEEDS, make_functions
from examples.common.tuning import (
    SIXTHS,
    TOGETHER,
    around,
    best_of,
    edges,
    from_zero,
    runs_of,
    scores_of,
    search,
)

DECAY = 5e-4
OPTIMIZERS, RATES = ("sgd", "sam"), ("falling", "constant")
AVERAGES = ("none", "ema", "swa", "latest")
COLORS = dict(zip(AVERAGES, (figures.GREY, figures.BLUE, figures.RED, figures.GREEN), strict=True))
NUMBERS = ("learning_rate", "rho")


def optimizer(name: str, rate: str, learning_rate: Any, rho: Any, epochs: int) -> Any:
    """Build the optimizer of a training, inside the three averages."""
    steps, window = epochs * STEPS_PER_EPOCH, -(-epochs // 4)
    if rate == "falling":
        learning_rate = optax.cosine_decay_schedule(learning_rate, steps)
    base = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(learning_rate, momentum=0.9))
    tx = optax.chain(samx.sam(rho), base) if name == "sam" else base
    tx = samx.averages.latest(tx, window, every=STEPS_PER_EPOCH)
    tx = samx.averages.swa(tx, steps - window * STEPS_PER_EPOCH)
    return samx.averages.ema(tx, 1 - 2 / (window * STEPS_PER_EPOCH))


def averaged(state: Any, params: Any) -> dict[str, Any]:
    """Return the parameters to evaluate, for each average."""
    found = {"none": params}
    for name in AVERAGES[1:]:
        found[name] = samx.averages.params(state._replace(base=()), params)
        state = state.base
    return found


@functools.cache
def trainer(name: str, rate: str, width: int, epochs: int) -> Any:
    """Return the compiled function that trains runs; it gives accuracies on two splits."""
    _, losses_fn, _, accuracy, *_ = make_functions(width)
    epochs *= 1 + (name == "sgd")

    def of_run(seed, learning_rate, rho, params, train, *others):
        tx = optimizer(name, rate, learning_rate, rho, epochs)

        def step(carry, rows):
            params, state = carry
            batch = rows_of(train, rows)
            loss, g = jax.value_and_grad(lambda p: losses_fn(p, batch).mean())(params)
            closures = {} if name == "sgd" else {"losses_fn": losses_fn, "batch": batch}
            updates, state = tx.update(g, state, params, **closures)
            return (optax.apply_updates(params, updates), state), loss

        def epoch(carry, index):
            return jax.lax.scan(step, carry, shuffled(seed, index))

        (params, state), _ = jax.lax.scan(epoch, (params, tx.init(params)), jnp.arange(epochs))
        found = averaged(state, params)
        return {k: jnp.stack([accuracy(p, data) for data in others]) for k, p in found.items()}

    return jax.jit(jax.vmap(of_run))


class Trainings:
    """Trainings of one optimizer and one kind of learning rate; none is made twice."""

    def __init__(self, name: str, rate: str, args: Any, noise: float, bar: tqdm):
        self.name, self.rate, self.args, self.noise, self.bar = name, rate, args, noise, bar
        self._size = max(args.seeds, TOGETHER * len(SEARCH_SEEDS))
        self._known: dict[Any, Any] = {}

    def accuracies(self, seeds: Any, candidates: list[tuple[float, ...]]) -> Any:
        """Return for each average the accuracies [candidates, seeds, splits]."""
        new = [c for c in candidates if (seeds, c) not in self._known]
        if new:
            seed, *numbers = (np.resize(column, self._size) for column in runs_of(seeds, new))
            numbers = numbers if len(numbers) == 2 else [*numbers, np.zeros_like(numbers[0])]
            run = trainer(self.name, self.rate, self.args.width, self.args.epochs)
            found = run(seed, *numbers, initialize(seed, self.args.width), *split(seed, self.noise))
            for i, candidate in enumerate(new):
                part = slice(i * len(seeds), (i + 1) * len(seeds))
                self._known[seeds, candidate] = {k: np.asarray(x)[part] for k, x in found.items()}
            self.bar.update(len(new) * len(seeds))
        known = [self._known[seeds, c] for c in candidates]
        return {k: np.stack([one[k] for one in known]) for k in AVERAGES}

    def measure(self, average: str) -> dict[str, Any]:
        """Choose the numbers of a row, repeat it with the reported seeds, and measure it."""
        axes = [around(0.1)] if self.name == "sam" else [around(0.1, SIXTHS)]
        axes += [from_zero(around(0.1))] if self.name == "sam" else []

        def evaluate(candidates):
            found = self.accuracies(SEARCH_SEEDS, candidates)[average][..., 0]
            return scores_of(found, candidates).tolist()

        tried = search(axes, evaluate)
        best = best_of(tried)
        found = self.accuracies(range(self.args.seeds), [best])[average][0, :, 1]
        return {
            **{"optimizer": self.name, "rate": self.rate, "average": average, "noise": self.noise},
            **dict(zip(NUMBERS, (*best, 0.0), strict=False)),
            "edges": edges(best, tried, NUMBERS[: len(best)]),
            "gradients": 2 * self.args.epochs * STEPS_PER_EPOCH,
            "accuracy": np.round(100 * found.astype(float), 4).tolist(),
        }


def name_of(result: dict[str, Any]) -> str:
    """Return the name of a row."""
    average = "" if result["average"] == "none" else f" + {result['average']}"
    return f"{result['optimizer']}{average}, {result['rate']}"


def lead_of(result: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Return the mean and error of the lead over another row, paired by seed, in points."""
    return mean_and_error(np.subtract(result["accuracy"], other["accuracy"]).tolist())


def shown(mean: float, error: float, sign: str = "") -> str:
    return f"{mean:{sign}.2f} ± {error:.2f}"


def leads_of(result: dict[str, Any], results: list[dict[str, Any]]) -> list[str]:
    """Return the leads over SGD and over the same optimizer, both plain with a falling rate."""
    plain = {r["optimizer"]: r for r in results if (r["average"], r["rate"]) == ("none", "falling")}
    others = plain["sgd"], plain[result["optimizer"]]
    return ["" if result is r else shown(*lead_of(result, r), sign="+") for r in others]


def print_table(results: list[dict[str, Any]], noise: float, seeds: int) -> None:
    """Print one line per row, with its leads over plain SGD and over its own optimizer."""
    print(f"\n{describe(noise)}, {seeds} seeds (mean ± standard error)")
    grid = [["method, rate", "accuracy, %", "over sgd", "over its optimizer", "lr", "rho"]]
    for result in results:
        leads = leads_of(result, results)
        ends = [marked(result, number) for number in NUMBERS]
        grid.append([name_of(result), shown(*mean_and_error(result["accuracy"])), *leads, *ends])
    print("\n".join(aligned(grid)))
    print("leads: over the same with a falling rate and without an average")
    if any(result["edges"] for result in results):
        print(MARK)


def claim(results: list[dict[str, Any]]) -> str:
    """State the largest lead of an average over the same optimizer with a falling rate."""
    told = []
    for name in OPTIMIZERS:
        mine = [result for result in results if result["optimizer"] == name]
        plain = next(r for r in mine if (r["average"], r["rate"]) == ("none", "falling"))
        leads = [lead_of(result, plain) for result in mine if result["average"] != "none"]
        told.append(f"{shown(*max(leads), sign='+')} over {name}")
    return f"averages lead by up to {', '.join(told)}"


def draw(results: list[dict[str, Any]], noises: list[float], path: Path, title: str) -> None:
    """Draw the accuracy of each row, with errors."""
    rows = len(OPTIMIZERS) * len(RATES) * len(AVERAGES)
    figure = figures.make_figure(len(noises), [figures.height_of(rows)])
    (panels,) = figure.subplots(1, len(noises), squeeze=False)
    for axes, noise in zip(panels, noises, strict=True):
        mine = [result for result in results if result["noise"] == noise][::-1]
        for position, result in enumerate(mine):
            mean, error = mean_and_error(result["accuracy"])
            color = COLORS[result["average"]]
            axes.errorbar(mean, position, xerr=error, fmt="o", color=color, capsize=2)
        axes.set_yticks(range(len(mine)), [name_of(result) for result in mine])
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
    choose_folder(args, "averages")
    report = Report(args)
    noises, results = list(dict.fromkeys([args.noise, 0.0])), []
    kinds = len(noises) * len(OPTIMIZERS) * len(RATES)
    planned = kinds * (25 * len(SEARCH_SEEDS) + len(AVERAGES) * args.seeds)
    with tqdm(total=planned, unit=" runs", smoothing=0.1, disable=None) as bar:
        for noise in noises:
            for name in OPTIMIZERS:
                for rate in RATES:
                    bar.set_description(f"{name}, {rate}")
                    trainings = Trainings(name, rate, args, noise, bar)
                    results += [trainings.measure(average) for average in AVERAGES]
    for noise in noises:
        print_table([r for r in results if r["noise"] == noise], noise, args.seeds)
    report.save(results=results)
    title = f"Digits: averaged parameters of SGD and SAM at equal gradients, {args.seeds} seeds"
    draw(results, noises, args.folder / "averages.png", title)
    report.end("averages.png")
    return results


if __name__ == "__main__":
    main()
