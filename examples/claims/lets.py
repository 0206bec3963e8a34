"""LETS: is the radius that it learns the best one? On digits, with wrong and with clean labels.

    python examples/claims/lets.py

LETS (https://arxiv.org/abs/2408.08222) learns SAM's radius rho along with the parameters, so that
F = (L_V - L)^2 / 2 falls. L_V is the loss on held-out examples, L that on the training set. Three
questions:

1. Is the radius with the smallest F a good one? SAM trains with each radius of a grid, to the end.
2. LETS knows one step only. Has its hypergradient the sign that F has after more steps? It is
   compared with F after 1, 5 and 20 steps of SAM with a radius 10% larger and 10% smaller and with
   the same batches, and with the grid: F of the neighbouring radii. The equation has L on the whole
   training set, and a step has a batch. Three forms take L on

       own      the batch of the step itself
       next     the batch of the next step
       whole    all training images

3. Where do starts of 0.1, 1 and 10 times the tuned radius end, and how good is the network then?

Task and network are those of digits.py. Every tenth training image is held out, wrong labels
included. Only LETS uses the held-out images, and the rows of SAM train without them too. Learning
rate and radius of SAM are chosen on the validation images, which are another part, with seeds that
are not reported. LETS has SAM's learning rate. Its own rate is chosen in the same way, for the best
mean over its three starts. All train for 40 epochs; a step of SAM takes 2 gradients, one of LETS 6.
LETS takes the exact hypergradient. The one with a diagonal for the Hessian is a thousand times
smaller; only its sign is compared.

The script prints each claim with its number and the verdict, and writes results.json and lets.png
to --out. It takes two minutes on two CPU cores.
"""

import argparse

from examples.common import arguments

NAME = "lets"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--width", type=int, default=64, help="units of each hidden layer")
    arguments.add_out(parser, NAME)
    args = parser.parse_args(argv)
    arguments.check_range(parser, args, "seeds", "epochs", "width")
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import samx
from examples.claims.claim import Claim, Found, found_of, print_claims, save
from examples.common import digits_task, figures, files
from examples.common.digits_task import BATCH, TRAIN, rows_of
from examples.common.output import choose_folder
from examples.common.registry import BASES
from examples.common.report import Report
from examples.common.training import cosine_decay, make_functions, map_runs, row_of, start_of
from examples.common.tuning import TUNING_SEEDS, edges, runs_of, scores_of

EVERY = 10  # one of this many training images is held out
HELD_OUT_BATCH = 50
STEPS_PER_EPOCH = (TRAIN - TRAIN // EVERY) // BATCH
LABELS = {0.3: "30% wrong labels", 0.0: "clean labels"}
LEARNING_RATES = (0.03, 0.1, 0.3)
RADII = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0)
FACTORS = (0.1, 1.0, 10.0)  # the starts, relative to the tuned radius
RATES = (1.0, 3.0, 10.0, 30.0, 100.0)
FORMS = ("own", "next", "whole")  # where L is taken
TRAINED = ("own", "next")  # whole would take 18 more gradients for each step
HORIZONS, POINTS = (1, 5, 20), 20  # steps after which F is looked at, and places in a training
WIDTH = 0.1  # of central differences, relative to rho

BATCH_OF = {
    "own": "L on the step's own batch",
    "next": "L on the next batch",
    "whole": "L on all training images",
}
UNREAD = "the upper problem; which batch is not said in what we read"
WHEN = {
    1: "after this step",
    HORIZONS[-1]: f"after {HORIZONS[-1]} steps",
    "all": "after the whole training",
}
WHY = {
    "objective": "F is smallest where little or nothing is learned: both losses are equally bad",
    "objective-learned": "F falls as the radius grows, beyond the best radius",
    "objective-clean": "F is smallest at radii at which less is learned",
    ("own", LABELS[0.3]): "a batch that the step has not seen gives the right sign",
    "starts-high": "SAM with this radius learns little or nothing, and F is small there",
    "meet": "validation chose a rate at which the radius hardly moves",
}


def claims_for(labels: str) -> dict[str, Claim]:
    """Return the claims for one kind of labels; which numbers agree was fixed before the runs."""
    best = (
        f"test accuracy of SAM at the radius with the smallest F{{}}, over SAM's, points; {labels}"
    )
    found = {
        "objective": Claim(
            ("lets",),
            "The radius at which validation and training loss differ least is the best one.",
            "the upper problem",
            best.format(""),
            low=-0.5,
            why=WHY["objective"],
        ),
        "objective-learned": Claim(
            ("lets",),
            "Of the radii at which the network learns, the one at which validation and training "
            "loss differ least is the best one.",
            "the upper problem",
            best.format(" of those that have half of the best training accuracy"),
            low=-0.5,
            why=WHY["objective-learned"],
        ),
        "objective-clean": Claim(
            ("lets",),
            "The same radius is the best one if all held-out labels are right.",
            "the upper problem",
            best.format(" of those, held-out labels right"),
            low=-0.5,
            why=WHY["objective-clean"],
        ),
    }
    for form, batch in BATCH_OF.items():
        for name, when in WHEN.items():
            found[f"sign-{form}-{name}"] = Claim(
                ("lets",),
                f"The hypergradient of one step, with {batch}, tells which radius has the smaller "
                f"F {when}.",
                UNREAD,
                f"share of steps; of our reconstruction; {labels}",
                low=0.5,
                why=WHY.get((form, labels), ""),
            )
    found["sign-diagonal"] = Claim(
        ("lets",),
        "A diagonal is good enough for the Hessian: the hypergradient keeps its sign.",
        "abstract",
        f"share of steps; of our reconstruction, {BATCH_OF['next']}; {labels}",
        low=0.5,
    )
    for form in TRAINED:
        of = f"of our reconstruction, {BATCH_OF[form]}; {labels}"
        found |= {
            f"better-{form}": Claim(
                ("lets",),
                f"A learned radius is better than a fixed one ({BATCH_OF[form]}).",
                "abstract; with wrong labels: secondary source",
                f"test accuracy from the tuned start over SAM's, points; {of}",
                low=0,
            ),
            **{
                f"starts-{name}-{form}": Claim(
                    ("lets",),
                    f"The accuracy hardly depends on the initial radius: {factor:g} times the "
                    f"tuned one ({BATCH_OF[form]}).",
                    "secondary source",
                    f"test accuracy over that from the tuned start, points; {of}",
                    low=-0.5,
                    why=WHY.get(f"starts-{name}", ""),
                )
                for name, factor in (("low", FACTORS[0]), ("high", FACTORS[-1]))
            },
            f"meet-{form}": Claim(
                ("lets",),
                f"The final radius hardly depends on the initial one ({BATCH_OF[form]}).",
                "secondary source",
                f"log10 of the largest over the smallest, from three starts 2 apart; {of}",
                high=math.log10(2),
                why=WHY["meet"],
            ),
            f"flatter-{form}": Claim(
                ("lets",),
                f"The solution is flatter than that of a fixed radius ({BATCH_OF[form]}).",
                "secondary source",
                f"log10 of the top eigenvalue over SAM's, from the tuned start; {of}",
                high=0,
            ),
        }
    return {f"{name}, {labels}": claim for name, claim in found.items()}


LEFT_OUT = ("objective-clean, clean labels",)  # all labels are right there
CLAIMS = {
    name: claim
    for labels in LABELS.values()
    for name, claim in claims_for(labels).items()
    if name not in LEFT_OUT
}


class Data(NamedTuple):
    """The images of a run; each part has `x` and `y`."""

    train: dict[str, Any]
    held_out: dict[str, Any]
    clean: dict[str, Any]  # the held-out images with their right labels
    validation: dict[str, Any]
    test: dict[str, Any]


class Run(NamedTuple):
    """The settings of a run, or vectors of them."""

    seed: Any
    learning_rate: Any
    rho: Any  # for LETS, the initial radius
    rate: Any  # used by LETS only


class Rows(NamedTuple):
    """Indices of the images that a step sees."""

    batch: Any  # among the training images
    following: Any  # the batch of the next step; the last one of an epoch gets the first
    held_out: Any  # among the held-out images


class End(NamedTuple):
    """What is measured of a run."""

    params: Any  # None after the last measurement
    rho: Any  # at the end of each epoch
    gap: Any  # L_V - L on all held-out and all training images
    clean_gap: Any  # the same with right labels of the held-out images
    train: Any  # accuracies
    validation: Any
    test: Any
    eigenvalue: Any  # the top one of the Hessian, on the training images; NaN if not measured


@functools.lru_cache(maxsize=100)
def data_of(seed: int, noise: float) -> Data:
    """Return the images of a seed: those of digits.py, with some training images held out."""

    def parts(noise):
        return row_of(jax.device_get(digits_task.split(np.array([seed]), noise)), 0)

    train, validation, test = parts(noise)
    # The order is random, except that images with wrong labels come first.
    is_held_out = np.arange(TRAIN) % EVERY == 0
    train, held_out, clean = (
        {name: part[name][rows] for name in ("x", "y")}
        for part, rows in (
            (train, ~is_held_out),
            (train, is_held_out),
            (parts(0.0)[0], is_held_out),
        )
    )
    return Data(train, held_out, clean, validation, test)


def batches(seed: Any, epoch: Any) -> Rows:
    """Return the batches of an epoch; each array is [steps, batch]."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(2), seed), epoch)
    order, *draws = jax.random.split(key, 1 + STEPS_PER_EPOCH)
    rows = jax.random.permutation(order, STEPS_PER_EPOCH * BATCH).reshape(STEPS_PER_EPOCH, BATCH)
    held_out = jax.vmap(functools.partial(jax.random.permutation, x=TRAIN // EVERY))(
        jnp.stack(draws)
    )
    return Rows(rows, jnp.roll(rows, -1, axis=0), held_out[:, :HELD_OUT_BATCH])


def mean_loss(width: int) -> Callable[[Any, Any], jax.Array]:
    """Return the function for the mean loss of the network on some images."""
    losses_fn = make_functions(width).losses_fn
    return lambda params, data: losses_fn(params, data).mean()


def base_of(learning_rate: Any, epochs: int) -> Any:
    return BASES["momentum"](cosine_decay(learning_rate, epochs * STEPS_PER_EPOCH))


def sam_step(loss: Any, tx: Any, carry: Any, batch: Any) -> Any:
    """Return parameters and state after a step of SAM."""
    params, state = carry
    value, g = jax.value_and_grad(loss)(params, batch)
    fn = functools.partial(loss, data=batch)
    updates, state = tx.update(g, state, params, value=value, value_fn=fn)
    return optax.apply_updates(params, updates), state


def lets_step(loss: Any, tx: Any, form: str, carry: Any, data: Data, rows: Rows) -> Any:
    """Return parameters and state after a step of LETS."""
    (params, state), batch = carry, rows_of(data.train, rows.batch)
    other = {"own": batch, "next": rows_of(data.train, rows.following), "whole": data.train}[form]
    held_out = rows_of(data.held_out, rows.held_out)
    value, g = jax.value_and_grad(loss)(params, batch)
    updates, state = tx.update(
        g,
        state,
        params,
        value=value,
        value_fn=functools.partial(loss, data=batch),
        training_fn=functools.partial(loss, data=other),
        validation_fn=functools.partial(loss, data=held_out),
    )
    return optax.apply_updates(params, updates), state


@functools.cache
def trainer(form: str, epochs: int, width: int) -> Callable[..., End]:
    """Return the compiled training of a run, by SAM or a form of LETS."""
    loss, accuracy = mean_loss(width), make_functions(width).accuracy

    def step(tx, data, carry, rows):
        if form == "sam":
            return sam_step(loss, tx, carry, rows_of(data.train, rows.batch)), None
        return lets_step(loss, tx, form, carry, data, rows), None

    def train(run, params, data):
        base = base_of(run.learning_rate, epochs)
        is_sam = form == "sam"
        tx = optax.chain(samx.sam(run.rho), base) if is_sam else samx.lets(base, run.rho, run.rate)

        def epoch(carry, index):
            rows = batches(run.seed, index)
            carry, _ = jax.lax.scan(functools.partial(step, tx, data), carry, rows)
            return carry, optax.tree.get(carry[1], "rho", default=run.rho)

        (params, _), rho = jax.lax.scan(epoch, (params, tx.init(params)), jnp.arange(epochs))
        of_train = loss(params, data.train)
        return End(
            params,
            rho,
            loss(params, data.held_out) - of_train,
            loss(params, data.clean) - of_train,
            accuracy(params, data.train),
            accuracy(params, data.validation),
            accuracy(params, data.test),
            jnp.nan,
        )

    return jax.jit(train)


@functools.cache
def top_eigenvalue(width: int) -> Callable[[Any, Any], Any]:
    """Return the compiled function for the top eigenvalue of the Hessian on some images."""
    losses_fn = make_functions(width).losses_fn

    def of(params, images):
        f = samx.sharpness.objective(losses_fn=losses_fn, batch=images)
        return samx.sharpness.extreme_eigenvalue(f, params, iterations=10).values[0]

    return jax.jit(of)


class Signs(NamedTuple):
    """Derivatives of F by rho along a training of SAM; each is [points] or a dict of such."""

    one_step: dict[str, Any]  # the hypergradient of each form
    diagonal: Any  # that of "next" with a diagonal for the Hessian
    differences: dict[str, Any]  # after so many steps


@functools.cache
def signs_along(epochs: int, width: int) -> Callable[..., Signs]:
    """Return the compiled function that trains by SAM and differentiates F on the way."""
    loss = mean_loss(width)
    segment, horizon = epochs * STEPS_PER_EPOCH // POINTS, max(HORIZONS)
    more = -(-horizon // STEPS_PER_EPOCH)  # epochs after the last one, of which a point needs steps

    def along(run, params, data):
        base = base_of(run.learning_rate, epochs)
        tx, h = optax.chain(samx.sam(run.rho), base), WIDTH * run.rho
        rows: Any = jax.vmap(functools.partial(batches, run.seed))(jnp.arange(epochs + more))
        rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), rows)

        def objectives(carry, window, rho):
            """Return F after each horizon."""

            def step(carry, batch):
                changed = optax.chain(samx.sam(rho), base)
                carry = sam_step(loss, changed, carry, rows_of(data.train, batch))
                return carry, carry[0]

            _, visited = jax.lax.scan(step, carry, window.batch)
            ends = [row_of(visited, steps - 1) for steps in HORIZONS]
            gaps = [loss(end, data.held_out) - loss(end, data.train) for end in ends]
            return jnp.stack(gaps) ** 2 / 2

        def hypergradient(carry, rows, form, hessian: Any = "exact"):
            lets = samx.lets(base, run.rho, 0.0, hessian=hessian)
            begun: Any = lets.init(carry[0])
            begun = begun._replace(base=carry[1][-1])
            all_held_out = rows._replace(held_out=jnp.arange(TRAIN // EVERY))
            _, state = lets_step(loss, lets, form, (carry[0], begun), data, all_held_out)
            return state.hypergradient

        def point(carry, start):
            take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start)
            window = jax.tree.map(lambda x: take(x, slice_size=horizon), rows)
            first, (low, high) = (
                row_of(window, 0),
                (objectives(carry, window, run.rho + sign * h) for sign in (-1, 1)),
            )
            differences = dict(zip(map(str, HORIZONS), (high - low) / (2 * h), strict=True))
            one_step = {form: hypergradient(carry, first, form) for form in FORMS}
            found = Signs(one_step, hypergradient(carry, first, "next", "diag_sq"), differences)

            def step(carry, batch):
                return sam_step(loss, tx, carry, rows_of(data.train, batch)), None

            carry, _ = jax.lax.scan(step, carry, take(rows.batch, slice_size=segment))
            return carry, found

        starts = segment * jnp.arange(POINTS)
        return jax.lax.scan(point, (params, tx.init(params)), starts)[1]

    compiled = jax.jit(along)

    def in_float64(*arguments):
        with jax.enable_x64(True):
            return jax.device_get(compiled(*jax.tree.map(widened, arguments)))

    return in_float64


def widened(leaf: Any) -> np.ndarray:
    """Return a number or an array in float64 if it is a floating one."""
    leaf = np.asarray(leaf)
    return leaf.astype(float) if np.issubdtype(leaf.dtype, np.floating) else leaf


class Trainings:
    """Trains runs of every form, with the settings of the command line."""

    def __init__(self, args: argparse.Namespace, noise: float, bar: tqdm):
        self.args, self.noise, self.bar = args, noise, bar

    def __call__(self, form: str, seeds: Sequence[int], candidates: Sequence[Any]) -> End:
        """Return what is measured of every candidate with every seed, [candidates, seeds, ...]."""
        compiled = trainer(form, self.args.epochs, self.args.width)

        def trained(run, params, data):
            end = compiled(run, params, data)
            if seeds != TUNING_SEEDS:
                top = top_eigenvalue(self.args.width)(end.params, data.train)
                end = end._replace(eigenvalue=top)
            return end._replace(params=None)

        ends = self._run(trained, seeds, candidates)
        shape = len(candidates), len(seeds)
        return jax.tree.map(lambda x: np.asarray(x, float).reshape(*shape, *x.shape[1:]), ends)

    def signs(self, candidate: Any) -> Signs:
        """Return the derivatives along a training of SAM, [seeds, points]."""
        compiled = signs_along(self.args.epochs, self.args.width)
        return self._run(compiled, range(self.args.seeds), [candidate])

    def _run(self, compiled: Callable[..., Any], seeds: Any, candidates: Any) -> Any:
        def one(run):
            seed = int(run.seed)
            return compiled(run, start_of(seed, self.args.width), data_of(seed, self.noise))

        runs = Run(*runs_of(seeds, candidates))
        return map_runs(one, runs, advance=self.bar.update)


def runs_in_all(args: argparse.Namespace) -> int:
    """Return the number of runs, for the progress bar."""
    searched = len(LEARNING_RATES) * len(RADII) + len(TRAINED) * len(RATES) * len(FACTORS)
    reported = 1 + len(RADII) + len(TRAINED) * len(FACTORS)
    return len(LABELS) * (searched * len(TUNING_SEEDS) + reported * args.seeds)


def measure_labels(trained: Trainings) -> dict[str, Any]:
    """Tune, train and differentiate with one kind of labels; return what is drawn and saved."""
    seeds = range(trained.args.seeds)
    candidates = [(rate, rho, 0.0) for rate in LEARNING_RATES for rho in RADII]
    scores = scores_of(trained("sam", TUNING_SEEDS, candidates).validation, candidates)
    learning_rate, tuned, _ = best = candidates[int(scores.argmax())]
    at = edges(best[:2], [each[:2] for each in candidates], ["learning_rate", "rho"])
    found = {
        "noise": trained.noise,
        "sam": {"learning_rate": learning_rate, "rho": tuned, "edges": at},
        "grid": trained("sam", seeds, [(learning_rate, rho, 0.0) for rho in RADII]),
        "signs": trained.signs(best),
        "lets": {},
    }
    for form in TRAINED:
        starts = [factor * tuned for factor in FACTORS]
        tried = [(learning_rate, rho, rate) for rate in RATES for rho in starts]
        scores = scores_of(trained(form, TUNING_SEEDS, tried).validation, tried)
        rate = RATES[int(scores.reshape(len(RATES), -1).mean(axis=1).argmax())]
        ends = trained(form, seeds, [(learning_rate, rho, rate) for rho in starts])
        at = edges([rate], [[rate] for rate in RATES], ["rate"])
        found["lets"][form] = {"rate": rate, "edges": at, "starts": starts, "ends": ends}
    return found


def values_of(found: dict[str, Any]) -> dict[str, list[float]]:
    """Return the numbers of every claim with one kind of labels."""
    grid, signs, tuned = found["grid"], found["signs"], RADII.index(found["sam"]["rho"])
    sam_accuracy, sam_eigenvalue = 100 * grid.test[tuned], grid.eigenvalue[tuned]
    is_learned = grid.train >= grid.train.max(axis=0) / 2
    chosen = {
        "objective": smallest(grid.gap**2),
        "objective-learned": smallest(np.where(is_learned, grid.gap**2, np.inf)),
        "objective-clean": smallest(np.where(is_learned, grid.clean_gap**2, np.inf)),
    }
    values = {name: 100 * at_each_seed(grid.test, i) - sam_accuracy for name, i in chosen.items()}
    around = [min(max(tuned + move, 0), len(RADII) - 1) for move in (1, -1)]
    whole = np.subtract(*(grid.gap[i] ** 2 for i in around))
    truths = {**signs.differences, "all": np.asarray(whole)[:, None]}
    for form, one_step in signs.one_step.items():
        for name, truth in truths.items():
            values[f"sign-{form}-{name}"] = share_of_equal_signs(one_step, truth)
    values["sign-diagonal"] = share_of_equal_signs(signs.diagonal, signs.one_step["next"])
    for form, trained in found["lets"].items():
        low, middle, high = 100 * trained["ends"].test
        final = np.log10(trained["ends"].rho[..., -1])
        values[f"better-{form}"] = middle - sam_accuracy
        values[f"starts-low-{form}"] = low - middle
        values[f"starts-high-{form}"] = high - middle
        values[f"meet-{form}"] = final.max(axis=0) - final.min(axis=0)
        values[f"flatter-{form}"] = np.log10(trained["ends"].eigenvalue[1] / sam_eigenvalue)
    labels = LABELS[found["noise"]]
    return {f"{name}, {labels}": np.round(x, 6).tolist() for name, x in values.items()}


def sums_agree(signs: Signs) -> dict[str, float]:
    """Return the share of trainings in which sums over the points have the sign of those of F."""
    truth = signs.differences[str(HORIZONS[-1])].sum(axis=1)
    return {
        form: float(np.mean(np.sign(x.sum(axis=1)) == np.sign(truth)))
        for form, x in signs.one_step.items()
    }


def smallest(numbers: np.ndarray) -> np.ndarray:
    """Return for each seed the index of the radius with the smallest number; NaN is the largest."""
    return np.where(np.isnan(numbers), np.inf, numbers).argmin(axis=0)


def at_each_seed(numbers: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.take_along_axis(numbers, index[None], axis=0)[0]


def share_of_equal_signs(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return for each seed the share of points at which two numbers have the same sign."""
    return (np.sign(one) == np.sign(other)).mean(axis=1)


def sizes_of(signs: Signs) -> dict[str, list[float]]:
    """Return for each seed the median of |hypergradient / central difference after 1 step|."""
    exact = signs.differences["1"]
    sizes = {**signs.one_step, "diagonal": signs.diagonal}
    return {k: np.median(np.abs(x / exact), axis=1).tolist() for k, x in sizes.items()}


def saved(found: dict[str, Any]) -> dict[str, Any]:
    """Return what results.json gets, as lists."""
    return {
        "noise": found["noise"],
        "sam": found["sam"],
        "grid": {"radii": RADII, **as_lists(found["grid"])},
        "sizes": sizes_of(found["signs"]),
        "sums_agree": sums_agree(found["signs"]),
        "signs": as_lists(found["signs"]),
        "lets": {
            form: {**one, "ends": as_lists(one["ends"])} for form, one in found["lets"].items()
        },
    }


def as_lists(fields: Any) -> dict[str, Any]:
    return jax.tree.map(lambda x: np.asarray(x, float).tolist(), fields._asdict())


def draw(measured: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw three panels for each kind of labels: the grid, the signs, and the learned radii."""
    figure = figures.make_figure(3, [figures.height_of()] * len(measured))
    panels = figure.subplots(len(measured), 3, squeeze=False)
    for found, (left, middle, right) in zip(measured, panels, strict=True):
        labels = LABELS[found["noise"]]
        draw_grid(left, found, labels)
        draw_signs(middle, found, labels)
        draw_radii(right, found)
    figures.save(figure, path, "LETS on the digits: its objective, its hypergradient, its radius")


def draw_grid(axes: Any, found: dict[str, Any], labels: str) -> None:
    """Draw accuracy and F after whole trainings of SAM, by radius; each from 0 to 1."""
    grid = found["grid"]
    accuracy, objective = grid.test.mean(axis=1), (grid.gap**2).mean(axis=1) / 2
    for name, numbers, color in (
        ("accuracy", accuracy, figures.BLUE),
        (f"F / {objective.max():.2g}", objective / objective.max(), figures.RED),
    ):
        axes.plot(RADII, numbers, "o-", color=color, label=name, markersize=4)
    best = RADII[int(accuracy.argmax())]
    least = RADII[int(objective.argmin())]
    axes.axvline(found["sam"]["rho"], color=figures.GREY, linewidth=1)
    axes.set(xscale="log", xlabel="rho (line: the tuned one)", ylim=(-0.03, 1.08))
    axes.set_title(f"{labels}: best at {best:g}, smallest F at {least:g}")
    axes.grid(alpha=0.3)
    figures.label_ends(axes)


def draw_signs(axes: Any, found: dict[str, Any], labels: str) -> None:
    """Draw the share of right signs of each form, by the steps after which F is compared."""
    values = values_of(found)
    for form, color in zip(FORMS, (figures.RED, figures.GREEN, figures.BLUE), strict=True):
        shares = [
            np.mean(values[f"sign-{form}-{horizon}, {labels}"]) for horizon in (*HORIZONS, "all")
        ]
        axes.plot(range(len(shares)), shares, "o-", color=color, label=form, markersize=4)
    axes.axhline(0.5, color=figures.GREY, linewidth=1)
    axes.set_xticks(range(1 + len(HORIZONS)), [*map(str, HORIZONS), "all"])
    axes.set(ylim=(-0.03, 1.03), xlabel="F after so many steps")
    axes.set_title("share of steps with the right sign, by the batch of L")
    axes.grid(alpha=0.3)
    figures.label_ends(axes)


def draw_radii(axes: Any, found: dict[str, Any]) -> None:
    """Draw the radius over the epochs, geometric means over the seeds, from three starts."""
    ratios = []
    for form, color in zip(TRAINED, (figures.RED, figures.GREEN), strict=True):
        trained = found["lets"][form]
        radii = np.exp(np.log(trained["ends"].rho).mean(axis=1))
        ratios.append(f"{radii[:, -1].max() / radii[:, -1].min():.3g} ({form})")
        for start, mine in zip(trained["starts"], radii, strict=True):
            label = form if start == trained["starts"][1] else None
            axes.plot([start, *mine], color=color, linewidth=1.6, label=label)
    axes.axhline(found["sam"]["rho"], color=figures.GREY, linewidth=1)
    apart = FACTORS[-1] / FACTORS[0]
    axes.set(yscale="log", xlabel="epoch", ylabel="rho")
    axes.set_title(f"starts {apart:g} times apart end {' and '.join(ratios)} times apart")
    axes.grid(alpha=0.3)
    figures.label_ends(axes)


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[Found]:
    args = parse(argv)
    choose_folder(args, NAME)
    report = Report(args)
    with tqdm(total=runs_in_all(args), unit=" runs", smoothing=0.1, disable=None) as bar:
        measured = [measure_labels(Trainings(args, noise, bar)) for noise in LABELS]
    values = {name: each for found in measured for name, each in values_of(found).items()}
    values = {name: values[name] for name in CLAIMS}
    found = found_of(CLAIMS, values)
    print_claims(found)
    save(report, NAME, found, values, trainings=[saved(each) for each in measured])
    draw(measured, args.folder / "lets.png")
    report.end("lets.png")
    return found


if __name__ == "__main__":
    main()
