"""LSAM: when do workers around a center beat data-parallel SAM, and do they smooth the loss?

    python examples/claims/lsam.py
    python examples/claims/lsam.py --seeds 3 --gradients 800

The task, the simulated clock and the rows are those of lsam_digits.py. A map over workers, batch
and delay: LSAM against data-parallel SAM, each tuned in the same way for each place of the map, at
equal gradients and at equal time. With a short delay all workers are equally fast, and an exchange
with the center takes a tenth of a gradient; with a long one the last worker is four times slower,
and an exchange takes eight gradients.

Then eight workers train with constant learning rates. Their variance around the center is measured
over learning rate, period and weight of an exchange, and compared with η τ / α, the variance of the
Gaussian in the objective that `samx.lsam` is derived from.
At the end the loss around the center is compared with that around the workers: the largest rise
within a ball, and the mean rise under noise as strong as the workers' own. The largest rise at the
center of the tuned LSAM is compared with that of data-parallel SAM.

`samx.lsam` is a reconstruction: the paper's text was not read, and there is no code. So a verdict
is one of our reconstruction.

The script prints each claim with its number and the verdict, and writes results.json and lsam.png
to --out. It takes about six minutes on two CPU cores.
"""

import argparse

from examples.common import arguments

NAME = "lsam"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--gradients", type=int, default=3200, help="of each training")
    parser.add_argument("--width", type=int, default=64, help="units of each hidden layer")
    arguments.add_out(parser, NAME)
    args = parser.parse_args(argv)
    arguments.check_range(parser, args, "seeds", "width")
    arguments.check_range(parser, args, "gradients", low=2 * max(WORKERS) * max(PERIODS))
    return args


WORKERS, BATCHES = (4, 8), (25, 100)
DELAYS = {"short": (1.0, 0.1), "long": (4.0, 4.0)}  # slowdown of the last worker, latency
PERIODS = (2, 4, 8)

if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import samx
from examples.claims import lsam_digits
from examples.claims.claim import Claim, Found, found_of, print_claims, save
from examples.claims.lsam_digits import DATA_PARALLEL, LSAM, ROWS, SAME_TIME
from examples.common import figures, files
from examples.common.intervals import mean_interval
from examples.common.output import choose_folder
from examples.common.report import Report
from examples.common.training import make_functions, row_of
from examples.common.tuning import Runs, runs_of
from samx import elastic

RADII = (0.1, 0.2, 0.5)
BETA, PERIOD, MANY, LARGE = 0.9, 4, max(WORKERS), max(BATCHES)
RATES, RATE = (0.025, 0.05, 0.1, 0.2), 0.1  # constant learning rates; the one for the others
BETAS = (0.3, 0.9)
RHO, RADIUS = 0.1, 0.2  # of the workers that are measured, and of the ball of the largest rise
LOOKS, FIRST_LOOK = 5, 0.6  # at the variance, in the last part of the training
OURS = " That is measured of our reconstruction."

Place = tuple[int, int, str]  # workers, batch, delay
PLACES: list[Place] = [*itertools.product(WORKERS, BATCHES, DELAYS)]


def told(place: Place) -> str:
    """Describe a place of the map."""
    workers, batch, delay = place
    return f"{workers} workers, batch {batch}, {delay} delay"


MAP_CLAIMS = {
    f"{at}, {told(place)}": Claim(
        ("lsam",),
        text + OURS,
        "abstract",
        f"test accuracy over data-parallel SAM at {where}, points; digits, 30% wrong labels, "
        f"{told(place)}",
        low=0.0,
    )
    for at, text, where in (
        ("time", "Faster: no barrier, so a higher accuracy in the same time.", "equal time"),
        ("gradients", "A higher final accuracy than data-parallel SAM.", "equal gradients"),
    )
    for place in PLACES
}
MORE_WORKERS = {
    f"workers, batch {batch}": Claim(
        ("lsam",),
        "Data-parallel SAM gets worse with more workers, each with a batch of its own.",
        "secondary source",
        f"its test accuracy with {max(WORKERS)} workers over that with {min(WORKERS)}, at equal "
        f"gradients, points; batch {batch} of a worker",
        high=0.0,
    )
    for batch in BATCHES
}
FORMULA = "Workers are samples around the center with the variance η τ / α."
LANGEVIN = "it holds for the noise of Langevin dynamics; that of batches is far weaker"
LANDSCAPE = "The loss that the center sees is smoothed, so the center is in a flatter place."
OTHER_CLAIMS = {
    "variance": Claim(
        ("lsam",),
        FORMULA + OURS,
        "our derivation",
        "log10 of the workers' variance around the center over η τ / α; 8 workers, constant η 0.1, "
        "momentum 0.9; within a factor of 2",
        low=-0.3,
        high=0.3,
        why=LANGEVIN,
    ),
    "variance over rate": Claim(
        ("lsam",),
        FORMULA + OURS,
        "our derivation",
        f"power of η with which the variance grows, η from {RATES[0]} to {RATES[-1]}",
        low=0.8,
        high=1.2,
        why="the noise of batches has a fixed strength, for which the power is 2",
    ),
    "variance over period": Claim(
        ("lsam",),
        FORMULA + OURS,
        "our derivation",
        f"power of τ with which the variance grows, τ from {PERIODS[0]} to {PERIODS[-1]}",
        low=0.8,
        high=1.2,
    ),
    "variance over weight": Claim(
        ("lsam",),
        FORMULA + OURS,
        "our derivation",
        f"power of α with which the variance grows, β = 8 α from {BETAS[0]} to {BETAS[-1]}",
        low=-1.2,
        high=-0.8,
    ),
    "largest rise": Claim(
        ("lsam",),
        LANDSCAPE + OURS,
        "secondary source",
        f"log10 of the largest rise of the training loss within {RADIUS} of the center over that "
        "around its workers; constant learning rate",
        high=0.0,
    ),
    "mean rise": Claim(
        ("lsam",),
        LANDSCAPE + OURS,
        "secondary source",
        "log10 of the mean rise of the training loss under Gaussian noise with the workers' own "
        "variance, at the center over that at the workers; constant learning rate",
        high=0.0,
        why="the curvature is that around the workers; the gradient may be what is smaller",
    ),
    "largest rise, data-parallel": Claim(
        ("lsam",),
        "The center is flatter than what data-parallel SAM finds." + OURS,
        "secondary source",
        f"log10 of the largest rise within {RADIUS} of the center over that of data-parallel SAM "
        "at equal gradients, both tuned; 8 workers, batch 100, short delay",
        high=0.0,
    ),
}
CLAIMS = MAP_CLAIMS | MORE_WORKERS | OTHER_CLAIMS


def settings_of(
    place: Place, args: argparse.Namespace, period: int = PERIOD, beta: float = BETA
) -> argparse.Namespace:
    """Return the settings of lsam_digits.py for a place of the map."""
    workers, batch, delay = place
    slow, latency = DELAYS[delay]
    options = {
        **{"workers": workers, "batch": batch, "slow": slow, "latency": latency},
        **{"period": period, "beta": beta, "gradients": args.gradients},
        **{"seeds": args.seeds, "width": args.width},
    }
    found = lsam_digits.parse([f"--{name}={value}" for name, value in options.items()])
    found.rho = RADII
    return found


def measure_map(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Tune and train every place; data-parallel SAM at equal gradients does not see the delay."""
    results, alone = [], {}
    with tqdm(unit=" gradients", unit_scale=True, smoothing=0.1, disable=None) as bar:
        for place in PLACES:
            settings = settings_of(place, args)
            for name in (DATA_PARALLEL, LSAM, SAME_TIME):
                key = (name, *place[:2], None if name == DATA_PARALLEL else place[2])
                if key not in alone:
                    alone[key] = lsam_digits.measure(name, settings, bar)
                found = {key: value for key, value in alone[key].items() if key != "curve"}
                results.append({"place": told(place), **found})
    return results


def points(results: Sequence[dict[str, Any]], place: Place, row: str) -> np.ndarray:
    """Return the test accuracies of a row at a place, one for each seed, in percent."""
    return 100 * np.asarray(result_of(results, place, row)["test_accuracy"])


def result_of(results: Sequence[dict[str, Any]], place: Place, row: str) -> dict[str, Any]:
    """Return the result of a row at a place."""
    [found] = [each for each in results if (each["place"], each["row"]) == (told(place), row)]
    return found


def values_of_map(results: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the numbers of the claims on the map, one for each seed."""
    values = {}
    for place in PLACES:
        lsam = points(results, place, LSAM)
        values[f"time, {told(place)}"] = lsam - points(results, place, SAME_TIME)
        values[f"gradients, {told(place)}"] = lsam - points(results, place, DATA_PARALLEL)
    for batch in BATCHES:
        few, many = (
            points(results, (workers, batch, next(iter(DELAYS))), DATA_PARALLEL)
            for workers in (min(WORKERS), max(WORKERS))
        )
        values[f"workers, batch {batch}"] = many - few
    return {name: each.tolist() for name, each in values.items()}


class Around(NamedTuple):
    """Workers and their center after a training, of all runs.

    Attributes:
        center: The center.
        workers: The parameters of each worker.
        variance: Variance of a coordinate of the workers around the center, one for each run.
    """

    center: Any
    workers: list[Any]
    variance: np.ndarray


def train_workers(settings: argparse.Namespace, runs: Runs, is_constant: bool) -> Around:
    """Train LSAM; with a constant learning rate, or one that falls as in lsam_digits.py."""
    functions = lsam_digits.make_functions(ROWS[LSAM].front, settings.workers, settings.width)
    data, params = lsam_digits.load(runs, settings)

    def worker(index: int) -> elastic.Worker:
        if not is_constant:
            return lsam_digits.worker_of(LSAM, functions, data, params, runs, settings, index)

        def batches(step: int) -> Any:
            images = lsam_digits.stream(data[0], runs, settings, index, step)
            return lsam_digits.with_rates(images, runs, math.inf, step)

        return elastic.Worker(params, functions.init, functions.step, batches)

    simulation = elastic.Simulation(
        [worker(index) for index in range(settings.workers)],
        params,
        elastic.Rule(beta=settings.beta, period=settings.period),
    )
    steps, done, seen = settings.gradients // ROWS[LSAM].gradients, 0, []
    looks = {round(steps * share) for share in np.linspace(FIRST_LOOK, 1, LOOKS)}
    for event in lsam_digits.events_of(LSAM, settings):
        simulation.apply(event)
        done += event.kind == "finish"
        if event.kind == "finish" and done in looks:
            workers = [local.params for local in simulation.workers]
            seen.append(variance(simulation.center, workers))
    workers = [local.params for local in simulation.workers]
    return Around(simulation.center, workers, np.mean(seen, axis=0))


@jax.jit
def variance(center: Any, workers: list[Any]) -> Any:
    """Return the mean square of a coordinate's distance from the center, for each run."""

    def square(z, *w):
        return sum(jnp.square(each - z).sum(range(1, z.ndim)) for each in w) / len(w)

    squares = jax.tree.map(square, center, *workers)
    size = sum(leaf[0].size for leaf in jax.tree.leaves(center))
    return sum(jax.tree.leaves(squares)) / size


def train_together(settings: argparse.Namespace, runs: Runs) -> Any:
    """Train data-parallel SAM at equal gradients; return its parameters."""
    functions = lsam_digits.make_functions(ROWS[LSAM].front, settings.workers, settings.width)
    data, params = lsam_digits.load(runs, settings)
    state, steps = functions.init(params), lsam_digits.num_steps(DATA_PARALLEL, settings)
    batches = lsam_digits.batches_together(data[0], runs, settings, settings.workers)
    for batch in itertools.islice(lsam_digits.with_rates(batches, runs, steps), steps):
        params, state, _ = functions.step(params, state, batch)
    return params


@functools.cache
def rises(width: int) -> Any:
    """Return the compiled function for the largest rise in a ball and the mean rise under noise."""
    losses_fn = make_functions(width).losses_fn
    ball = samx.perturbations.metric_ball(RADIUS)

    def of_point(params, images, deviation):
        f = samx.sharpness.objective(losses_fn=losses_fn, batch=images)
        largest = samx.sharpness.worst_case(f, params, ball, steps=20, restarts=1).value
        mean = samx.sharpness.smoothed(f, params, deviation, draws=20).mean
        return largest, mean - losses_fn(params, images).mean()

    return jax.jit(of_point)


def rises_of(params: Any, runs: Runs, settings: argparse.Namespace, deviation: Any) -> np.ndarray:
    """Return both rises of all runs, [2, runs]."""
    images = lsam_digits.load(runs, settings)[0][0]
    of_point = rises(settings.width)
    each = [
        of_point(row_of(params, index), row_of(images, index), deviation[index])
        for index in range(len(runs.seed))
    ]
    return np.array(jax.device_get(each)).T


def measure_around(args: argparse.Namespace) -> dict[tuple[float, int, float], Around]:
    """Train workers with constant learning rates, for each η, τ and β; see `knobs`."""
    place = MANY, LARGE, next(iter(DELAYS))
    found = {}
    for rate, period, beta in dict.fromkeys(itertools.chain(*knobs().values())):
        runs = Runs(*runs_of(range(args.seeds), [(rate, RHO)]))
        settings = settings_of(place, args, period, beta)
        found[rate, period, beta] = train_workers(settings, runs, True)
    return found


def knobs() -> dict[str, list[tuple[float, int, float]]]:
    """Return η, τ and β of the trainings in which one of them changes."""
    return {
        "rate": [(rate, PERIOD, BETA) for rate in RATES],
        "period": [(RATE, period, BETA) for period in PERIODS],
        "weight": [(RATE, PERIOD, beta) for beta in BETAS],
    }


def spread_of(around: Mapping[tuple[float, int, float], Around]) -> dict[str, list[list[float]]]:
    """Return the variance of the workers over each knob; [values, seeds]."""
    return {
        name: [around[each].variance.tolist() for each in several]
        for name, several in knobs().items()
    }


def powers_of(spread: dict[str, list[list[float]]]) -> dict[str, list[float]]:
    """Return the numbers of the claims on the variance, one for each seed."""
    several = {"rate": RATES, "period": PERIODS, "weight": BETAS}
    values = {
        f"variance over {name}": np.polyfit(np.log(several[name]), np.log(each), 1)[0].tolist()
        for name, each in spread.items()
    }
    formula = RATE * PERIOD / (BETA / MANY)
    measured = np.array(spread["rate"])[RATES.index(RATE)]
    return values | {"variance": np.log10(measured / formula).tolist()}


def measure_rises(
    args: argparse.Namespace, results: Sequence[dict[str, Any]], around: Around
) -> dict[str, list[float]]:
    """Return the numbers of the claims on flatness, one for each seed."""
    place = MANY, LARGE, next(iter(DELAYS))
    settings, seeds = settings_of(place, args), range(args.seeds)
    runs = Runs(*runs_of(seeds, [(RATE, RHO)]))
    deviation = np.sqrt(around.variance)
    center = rises_of(around.center, runs, settings, deviation)
    workers = [rises_of(params, runs, settings, deviation) for params in around.workers]
    largest, mean = np.log10(center / np.mean(workers, axis=0))
    tuned = [
        Runs(*runs_of(seeds, [(found["learning_rate"], found["rho"])]))
        for found in (result_of(results, place, row) for row in (LSAM, DATA_PARALLEL))
    ]
    of_lsam, together = (
        rises_of(params, runs, settings, deviation)[0]
        for params in (
            train_workers(settings, tuned[0], False).center,
            train_together(settings, tuned[1]),
        )
    )
    return {
        "largest rise": largest.tolist(),
        "mean rise": mean.tolist(),
        "largest rise, data-parallel": np.log10(of_lsam / together).tolist(),
    }


def draw(
    values: dict[str, list[float]], spread: dict[str, list[list[float]]], path: Path, title: str
) -> None:
    """Draw the map at equal time and at equal gradients, and the variance of the workers."""
    figure = figures.make_figure(3, [figures.height_of(len(PLACES))])
    panels = figure.subplots(1, 3)
    for axes, at in zip(panels, ("time", "gradients"), strict=False):
        for position, place in enumerate(PLACES[::-1]):
            value, low, high = mean_interval(values[f"{at}, {told(place)}"])
            color = figures.RED if place[2] == "long" else figures.BLUE
            axes.plot(value, position, "o", color=color)
            axes.plot([low, high], [position, position], color=color)
        axes.axvline(0, color=figures.INK, linewidth=1)
        axes.set_yticks(range(len(PLACES)), [told(place) for place in PLACES[::-1]])
        axes.set_xlabel(f"points over data-parallel SAM, equal {at}")
        ahead = [mean_interval(values[f"{at}, {told(place)}"]).is_above for place in PLACES]
        axes.set_title(f"Ahead at {sum(ahead)} of {len(PLACES)} places")
        axes.grid(axis="x", alpha=0.3)
    panels[1].tick_params(labelleft=False)
    measured = np.mean(spread["rate"], axis=1)
    formula = np.array(RATES) * PERIOD * MANY / BETA
    panels[2].loglog(RATES, formula, "--", color=figures.GREY, label="η τ / α")
    panels[2].loglog(RATES, measured, "o-", color=figures.BLUE, label="measured")
    panels[2].set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    panels[2].set_xticks([], minor=True)
    panels[2].set_xlabel("learning rate η, constant")
    panels[2].set_ylabel("variance of a worker's coordinate")
    power = np.polyfit(np.log(RATES), np.log(measured), 1)[0]
    panels[2].set_title(f"The variance grows with the power {power:.2f} of η")
    panels[2].grid(alpha=0.3)
    figures.label_ends(panels[2])
    figures.save(figure, path, title)


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[Found]:
    args = parse(argv)
    choose_folder(args, NAME)
    report = Report(args)
    results = measure_map(args)
    around = measure_around(args)
    spread, middle = spread_of(around), around[RATE, PERIOD, BETA]
    values = values_of_map(results) | powers_of(spread) | measure_rises(args, results, middle)
    found = found_of(CLAIMS, values)
    print_claims(found)
    save(report, NAME, found, values, results=results, spread=spread)
    title = f"LSAM on digits, {args.seeds} seeds, 95% intervals"
    draw(values, spread, args.folder / f"{NAME}.png", title)
    report.end(f"{NAME}.png")
    return found


if __name__ == "__main__":
    main()
