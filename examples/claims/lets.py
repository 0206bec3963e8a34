"""LETS: does a learned radius end where a tuned one is? On digits with wrong labels.

    python examples/claims/lets.py
    python examples/claims/lets.py --seeds 5 --rate 0.1 1 10
    python examples/claims/lets.py --asam

LETS (https://arxiv.org/abs/2408.08222) learns SAM's radius rho along with the parameters. It takes
gradient steps on F = (L_V - L)^2 / 2 with respect to log rho. L_V is the loss on held-out examples
and L is the loss on the training batch, both after the step: F is half of the squared gap between
them. This script starts LETS at 0.1, 1 and 10 times a tuned radius. It reports where rho and F end,
next to SAM with the same radii fixed. The forms of LETS:

    exact       the exact hypergradient
    diag_sq     squared gradients in place of the Hessian
    exact-next  the exact hypergradient, but L uses the training batch of the next step. This form
                is not in the paper: `validation_fn` adds the difference of the two training losses

Task and network are those of digits.py. Every tenth training image is held out, wrong labels
included. Only LETS uses the held-out images. SAM's rows train without them too, so that all rows
see the same training images. Each step of LETS draws its own batch of held-out images.

Hyperparameters are chosen on the validation images, which are another part: first the learning rate
and rho of SAM, which give the tuned start; then the rate of each form, from that start. Both
choices use tuning seeds, which are not reported. The test images are used for no choice. F is
reported over all held-out and all training images of a run.

With the default settings the three starts do not meet. SAM with a larger radius has a smaller F.
At ten times the tuned radius nothing is learned and there is no gap. But exact and diag_sq make rho
smaller, and the larger the rate, the smaller rho becomes. From the tuned start, F ends larger than
SAM's, and accuracy drops by half a point. The reason: both forms compute L on the same batch as
the step. A longer perturbation lowers the loss of this batch further, so the gap after this one
step grows with rho. With exact-next, rho grows and F falls, a little at the chosen rate. At 10
times that rate, rho grows in some runs beyond the largest radius at which anything is learned.

The hypergradient of diag_sq is about a thousand times smaller than the exact one, so its rates are
a thousand times larger. For example, rho starts at 0.2 and the rate is 1, samx's default: rho ends
at 0.16 with exact, and does not change with diag_sq.

First, the exact hypergradient of one step is compared with central differences, in float64. The
script prints tables and where each start ended. It writes results.json and lets.png to --out. It
takes about two minutes on two CPU cores.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from examples.common import arguments, choices

RATES = {  # candidates: the smallest move rho visibly, the largest move it far
    "exact": (3.0, 10.0, 30.0, 100.0),
    "diag_sq": (3e3, 1e4, 3e4, 1e5),
    "exact-next": (3.0, 10.0, 30.0, 100.0),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    names, text = [*RATES], ": forms of LETS; default: all"
    arguments.add_names(parser, "--methods", names, text, nargs="+", default=names)
    parser.add_argument(
        "--rate",
        type=float,
        nargs="+",
        help="candidate rates for all methods; default, for each method: "
        + "; ".join(f"{name} {' '.join(f'{r:g}' for r in rates)}" for name, rates in RATES.items()),
    )
    parser.add_argument("--asam", action="store_true", help="SAM and LETS use ASAM's perturbation")
    parser.add_argument("--base", choices=choices.BASES, default="momentum")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--noise", type=float, default=0.3, help="fraction of flipped labels")
    parser.add_argument("--width", type=int, default=64, help="units of each hidden layer")
    arguments.add_out(parser, "lets")
    args = parser.parse_args(argv)
    args.methods = list(dict.fromkeys(args.methods))
    arguments.check_range(parser, args, "seeds", "epochs", "width")
    arguments.check_share(parser, args, "noise")
    arguments.check_finite(parser, args, "rate")
    args.rate = list(dict.fromkeys(args.rate)) if args.rate else None
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import samx
from examples.common import digits_task, figures, files
from examples.common.digits_task import (
    BATCH,
    TRAIN,
    describe,
    graph_of,
    initialize,
    rows_of,
)
from examples.common.output import choose_folder
from examples.common.registry import BASES, VARIANTS, Setting
from examples.common.report import MARK, Report, marked, mean_and_error
from examples.common.tuning import TUNING_SEEDS, edges, runs_of, scores_of

EVERY = 10  # one of this many training images is held out
HELD_OUT_BATCH = 50
STEPS_PER_EPOCH = (TRAIN - TRAIN // EVERY) // BATCH
FACTORS = (0.1, 1.0, 10.0)  # the starts, relative to the tuned radius
LEARNING_RATES = {
    "sgd": (0.1, 0.3, 1.0),
    "momentum": (0.01, 0.03, 0.1, 0.3),
    "adamw": (3e-4, 1e-3, 3e-3, 1e-2),
}
RADII = {"sam": (0.1, 0.2, 0.5, 1.0), "asam": (0.5, 1.0, 2.0, 4.0)}
GRADIENTS = {"sam": 2, "exact": 6, "diag_sq": 4, "exact-next": 8}  # per step
LINES = dict(zip(FACTORS, (":", "-", "--"), strict=True))
DEFINITIONS = """\
rho: geometric mean. F: (loss on all held-out images - loss on all training images)^2 / 2 at the
end. - tuned SAM: difference to SAM with the tuned radius fixed, seed by seed."""


class Data(NamedTuple):
    """The images of every run, in four parts; each part has `x` and `y`."""

    train: dict[str, jax.Array]
    held_out: dict[str, jax.Array]
    validation: dict[str, jax.Array]
    test: dict[str, jax.Array]


class Runs(NamedTuple):
    """Settings of the runs that train together: vectors of equal length."""

    seed: np.ndarray
    learning_rate: np.ndarray
    rho: np.ndarray  # for LETS, the initial radius
    rate: np.ndarray  # used by LETS only


class Rows(NamedTuple):
    """Indices of the images that a step sees."""

    batch: jax.Array  # among the training images
    following: jax.Array  # the batch of the next step; the last step gets the first batch
    held_out: jax.Array  # among the held-out images


class Seen(NamedTuple):
    """Measurements of a run, before the first epoch and after every epoch."""

    rho: jax.Array
    gap: jax.Array  # loss on the held-out images - loss on the training images
    validation: jax.Array  # accuracies
    test: jax.Array


class Trainer(NamedTuple):
    """A method's compiled functions over a vector of runs."""

    init: Callable[..., Any]  # runs, params -> state
    look: Callable[..., Any]  # params, state, runs, data -> Seen
    epoch: Callable[..., Any]  # params, state, runs, data, epoch -> params, state, Seen


def split(seeds: jax.Array | np.ndarray, noise: float) -> Data:
    """Return the images of each seed: those of digits.py, with some training images held out."""
    train, validation, test = digits_task.split(seeds, noise)
    # The order is random, except that images with wrong labels come first.
    is_held_out = np.arange(TRAIN) % EVERY == 0
    train, held_out = (
        {name: train[name][:, rows] for name in ("x", "y")} for rows in (~is_held_out, is_held_out)
    )
    return Data(train, held_out, validation, test)


@jax.jit
def batches(seed: jax.Array, epoch: jax.Array | int) -> Rows:
    """Return the batches of an epoch; each array is [steps, batch]."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(2), seed), epoch)
    order, *draws = jax.random.split(key, 1 + STEPS_PER_EPOCH)
    rows = jax.random.permutation(order, STEPS_PER_EPOCH * BATCH).reshape(STEPS_PER_EPOCH, BATCH)
    held_out = jax.vmap(partial(jax.random.permutation, x=TRAIN // EVERY))(jnp.stack(draws))
    return Rows(rows, jnp.roll(rows, -1, axis=0), held_out[:, :HELD_OUT_BATCH])


def make_losses(width: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return functions for the mean loss and the accuracy of the network on some images."""
    graph = graph_of(width)

    def logits(params, data):
        return nnx.merge(graph, params)(data["x"])

    def loss(params, data):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, data), data["y"])
        return losses.mean()

    def accuracy(params, data):
        return jnp.mean(logits(params, data).argmax(-1) == data["y"])

    return loss, accuracy


def make_optimizer(method: str, asam: bool, base: Any, rho: Any, rate: Any) -> Any:
    """Return SAM before the base, or LETS around the base; with `asam`, both use ASAM's ball."""
    if method == "sam":
        variant = VARIANTS["asam" if asam else "sam"]
        return variant.make(rho, base, Setting(batch=None, batch_size=BATCH, num_examples=0))
    geometry = samx.perturbations.magnitude() if asam else None
    ball = samx.perturbations.metric_ball(1.0, geometry) if asam else None
    hessian = "diag_sq" if method == "diag_sq" else "exact"
    return samx.lets(base, rho, rate, hessian=hessian, perturbation=ball)


def make_trainer(method: str, args: argparse.Namespace) -> Trainer:
    """Return functions that train a vector of runs for one epoch; each is compiled once."""
    loss, accuracy = make_losses(args.width)

    def optimizer(run):
        schedule = optax.cosine_decay_schedule(run.learning_rate, args.epochs * STEPS_PER_EPOCH)
        base = BASES[args.base](schedule)
        return make_optimizer(method, args.asam, base, run.rho, run.rate)

    def init(run, params):
        return optimizer(run).init(params)

    def step(params, state, run, data, rows):
        batch, following = (rows_of(data.train, of) for of in (rows.batch, rows.following))
        held_out = rows_of(data.held_out, rows.held_out)

        def validation_fn(params):
            held_out_loss = loss(params, held_out)
            if method != "exact-next":
                return held_out_loss
            return held_out_loss - loss(params, following) + loss(params, batch)

        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer(run).update(
            grads,
            state,
            params,
            value=value,
            value_fn=lambda params: loss(params, batch),
            validation_fn=validation_fn,
        )
        return optax.apply_updates(params, updates), state

    def look(params, state, run, data):
        return Seen(
            optax.tree.get(state, "rho", default=run.rho),
            loss(params, data.held_out) - loss(params, data.train),
            accuracy(params, data.validation),
            accuracy(params, data.test),
        )

    def epoch(params, state, run, data, index):
        def body(carry, rows):
            params, state = carry
            return step(params, state, run, data, rows), None

        (params, state), _ = jax.lax.scan(body, (params, state), batches(run.seed, index))
        return params, state, look(params, state, run, data)

    return Trainer(
        jax.jit(jax.vmap(init)),
        jax.jit(jax.vmap(look)),
        jax.jit(jax.vmap(epoch, in_axes=(0, 0, 0, 0, None)), donate_argnums=(0, 1)),
    )


def train(
    trainer: Trainer, args: argparse.Namespace, runs: Runs, advance: Callable[[int], Any]
) -> Seen:
    """Train all runs; the returned arrays are [runs, 1 + epochs]."""
    data, params = split(runs.seed, args.noise), initialize(runs.seed, args.width)
    state = trainer.init(runs, params)
    history = [trainer.look(params, state, runs, data)]
    for index in range(args.epochs):
        params, state, seen = trainer.epoch(params, state, runs, data, index)
        history.append(jax.tree.map(np.asarray, seen))
        advance(len(runs.seed))
    return jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *history)


def tune_start(trainer: Trainer, args: argparse.Namespace, advance: Callable[[int], Any]) -> dict:
    """Choose SAM's learning rate and rho by the best mean validation accuracy."""
    candidates = [(rate, rho, 0.0) for rate, rho in start_candidates(args)]
    seen = train(trainer, args, Runs(*runs_of(TUNING_SEEDS, candidates)), advance)
    accuracy = scores_of(seen.validation[:, -1], candidates)
    best = int(accuracy.argmax())
    learning_rate, rho, _ = candidates[best]
    return {
        "learning_rate": learning_rate,
        "rho": rho,
        "edges": edges((learning_rate, rho), [candidate[:2] for candidate in candidates]),
        "validation_accuracy": float(accuracy[best]),
    }


def start_candidates(args: argparse.Namespace) -> list[tuple[float, float]]:
    radii = RADII["asam" if args.asam else "sam"]
    return [(rate, rho) for rate in LEARNING_RATES[args.base] for rho in radii]


def rates_of(method: str, args: argparse.Namespace) -> tuple[float, ...]:
    return tuple(args.rate) if args.rate else RATES[method]


def try_rates(
    method: str,
    trainer: Trainer,
    start: dict,
    args: argparse.Namespace,
    advance: Callable[[int], Any],
) -> list[dict]:
    """Train LETS from the tuned start with each rate; return the results."""
    rates = rates_of(method, args)
    candidates = [(start["learning_rate"], start["rho"], rate) for rate in rates]
    seen = train(trainer, args, Runs(*runs_of(TUNING_SEEDS, candidates)), advance)
    last = jax.tree.map(lambda leaf: leaf[:, -1].reshape(len(rates), -1), seen)
    return [
        {
            "row": method,
            "rate": rate,
            "rho": last.rho[index].tolist(),
            "F": (last.gap[index] ** 2 / 2).tolist(),
            "validation_accuracy": float(last.validation[index].mean()),
        }
        for index, rate in enumerate(rates)
    ]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Tune, check the hypergradient and train; return what is printed, drawn and saved."""
    runs_of_rates = {name: len(rates_of(name, args)) * len(TUNING_SEEDS) for name in args.methods}
    runs_of_start = len(start_candidates(args)) * len(TUNING_SEEDS)
    to_tune = {"sam": runs_of_start, **runs_of_rates}
    reported = len(FACTORS) * args.seeds
    work = sum(GRADIENTS[name] * (runs + reported) for name, runs in to_tune.items())
    total = work * STEPS_PER_EPOCH * args.epochs
    rates, results = [], []
    with tqdm(total=total, unit=" gradients", unit_scale=True, smoothing=0.1, disable=None) as bar:
        start, hypergradient = {}, {}
        for method in to_tune:

            def advance(runs, of_one=GRADIENTS[method] * STEPS_PER_EPOCH):
                bar.update(runs * of_one)

            trainer, rate = make_trainer(method, args), 0.0
            bar.set_description(f"{method}, tuning")
            if method == "sam":
                start = tune_start(trainer, args, advance)
                hypergradient = check(args, start["learning_rate"], start["rho"])
            else:
                tried = try_rates(method, trainer, start, args, advance)
                rate = max(tried, key=lambda of_rate: of_rate["validation_accuracy"])["rate"]
                at = edges([rate], [[of_rate["rate"]] for of_rate in tried], ["rate"])
                for of_rate in tried:
                    is_chosen = of_rate["rate"] == rate
                    rates.append({**of_rate, "chosen": is_chosen, "edges": at * is_chosen})
            bar.set_description(method)
            radii = [factor * start["rho"] for factor in FACTORS]
            candidates = [(start["learning_rate"], radius, rate) for radius in radii]
            seen = train(trainer, args, Runs(*runs_of(range(args.seeds), candidates)), advance)
            seen = jax.tree.map(lambda leaf: leaf.reshape(len(FACTORS), args.seeds, -1), seen)
            results += [
                {
                    "row": method,
                    "factor": factor,
                    "start": radius,
                    "rate": rate,
                    "rho": seen.rho[index].tolist(),
                    "gap": seen.gap[index].tolist(),
                    "F": (seen.gap[index] ** 2 / 2).tolist(),
                    "validation_accuracy": seen.validation[index].tolist(),
                    "test_accuracy": seen.test[index].tolist(),
                }
                for index, (factor, radius) in enumerate(zip(FACTORS, radii, strict=True))
            ]
    return {"hypergradient": hypergradient, "start": start, "rates": rates, "results": results}


def check(args: argparse.Namespace, learning_rate: float, rho: float) -> dict[str, float]:
    """Compare LETS's dF/d rho with central differences over SAM's step, in float64.

    The compared step is the last one of the first epoch. The steps before it are SAM's.
    """
    loss, _ = make_losses(args.width)
    seeds = jnp.zeros(1, jnp.int32)
    inputs = (split(seeds, args.noise), initialize(seeds, args.width))
    data, params = jax.tree.map(lambda leaf: np.asarray(leaf)[0], inputs)
    epoch = jax.tree.map(np.asarray, batches(0, 0))
    base = BASES[args.base](learning_rate)

    def one_step(tx, carry, rows):
        params, state = carry
        batch = rows_of(data.train, rows.batch)
        held_out = rows_of(data.held_out, rows.held_out)
        updates, state = tx.update(
            jax.grad(loss)(params, batch),
            state,
            params,
            value_fn=lambda params: loss(params, batch),
            validation_fn=lambda params: loss(params, held_out),
        )
        after = optax.apply_updates(params, updates)
        return (after, state), loss(after, held_out) - loss(after, batch)

    def sam(rho):
        return make_optimizer("sam", args.asam, base, rho, 0.0)

    @jax.jit
    def of_last_step(params):
        before = jax.tree.map(lambda rows: rows[:-1], epoch)
        last = jax.tree.map(lambda rows: rows[-1], epoch)
        carry = (params, sam(rho).init(params))
        (params, state), _ = jax.lax.scan(partial(one_step, sam(rho)), carry, before)

        def objective(rho):
            _, gap = one_step(sam(rho), (params, state), last)
            return gap**2 / 2

        found = {}
        for hessian in ("exact", "diag_sq"):
            tx = make_optimizer(hessian, args.asam, base, rho, 0.0)
            begun = tx.init(params)._replace(base=state[-1])
            (_, after), _ = one_step(tx, (params, begun), last)
            found[hessian] = after.hypergradient
        low, high = jax.vmap(objective)(rho + width * jnp.array([-1.0, 1.0]))
        return {**found, "differences": (high - low) / (2 * width)}

    width = 1e-6 * rho
    with jax.enable_x64(True):
        data, params = jax.tree.map(in_float64, (data, params))
        found = {name: float(value) for name, value in of_last_step(params).items()}
    error = abs(found["exact"] - found["differences"]) / abs(found["differences"])
    return {**found, "relative_error": error}


def in_float64(leaf: np.ndarray) -> jax.Array:
    return jnp.asarray(leaf, jnp.float64 if np.issubdtype(leaf.dtype, np.floating) else None)


def final(result: dict, name: str) -> np.ndarray:
    """Return the final value of every seed of a row."""
    return np.asarray(result[name])[:, -1]


def geometric(values: np.ndarray) -> tuple[float, float]:
    """Return the geometric mean and its standard error, computed from that of the logarithm."""
    mean, error = mean_and_error(np.log(values).tolist())
    return math.exp(mean), math.exp(mean) * error


def of_row(results: list[dict], row: str, factor: float) -> dict:
    return next(r for r in results if r["row"] == row and r["factor"] == factor)


def table(results: list[dict]) -> str:
    """Format one line per method and start."""
    width = max(len(result["row"]) for result in results)
    head = f"{'method':<{width}} {'start':>7} {'rate':>7} {'final rho':>18} {'final F':>19}"
    head += f" {'test acc. %':>14} {'- tuned SAM':>15}"
    lines = [head, "-" * len(head)]
    tuned = final(of_row(results, "sam", 1.0), "test_accuracy")
    for result in results:
        rho, rho_error = geometric(final(result, "rho"))
        objective, objective_error = mean_and_error(final(result, "F").tolist())
        test = 100 * final(result, "test_accuracy")
        accuracy, error = mean_and_error(test.tolist())
        lead, lead_error = mean_and_error((test - 100 * tuned).tolist())
        rate, radius = f"{result['rate']:g}", f"{rho:>9.4f} ± {rho_error:6.4f}"
        if result["row"] == "sam":
            rate, radius = "fixed", f"{rho:>9.4f}"
        is_tuned = result["row"] == "sam" and result["factor"] == 1
        lines.append(
            f"{result['row']:<{width}} {result['start']:>7.3g} {rate:>7}"
            f" {radius:<18} {objective:>9.5f} ± {objective_error:7.5f}"
            f" {accuracy:>7.2f} ± {error:4.2f}"
            + (f" {'':>15}" if is_tuned else f" {lead:>+8.2f} ± {lead_error:4.2f}")
        )
    return "\n".join([*(line.rstrip() for line in lines), DEFINITIONS])


def table_of_rates(rates: list[dict]) -> str:
    """Format one line per method and rate: where the tuned start ended."""
    width = max(len(result["row"]) for result in rates)
    head = f"{'method':<{width}} {'rate':>8} {'final rho':>10} {'least':>8} {'largest':>8}"
    head += f" {'final F':>9} {'validation acc. %':>18}"
    lines = [head, "-" * len(head)]
    for result in rates:
        rho, _ = geometric(np.asarray(result["rho"]))
        lines.append(
            f"{result['row']:<{width}} {marked(result, 'rate'):>8} {rho:>10.4f}"
            f" {min(result['rho']):>8.4f} {max(result['rho']):>8.4f} {np.mean(result['F']):>9.5f}"
            f" {100 * result['validation_accuracy']:>18.2f}{' chosen' * result['chosen']}"
        )
    return "\n".join(lines)


def verdict(results: list[dict], method: str) -> str:
    """Say where the starts of a method ended, and F relative to SAM with the same start."""
    rows = [of_row(results, method, factor) for factor in FACTORS]
    ends = [geometric(final(row, "rho"))[0] for row in rows]
    starts = [row["start"] for row in rows]
    ratios = [
        final(row, "F").mean() / final(of_row(results, "sam", row["factor"]), "F").mean()
        for row in rows
    ]
    return (
        f"{method}: the starts, a factor of {max(starts) / min(starts):.3g} apart, ended a factor "
        f"of {max(ends) / min(ends):.3g} apart:\n    "
        + ", ".join(f"{a:.3g} -> {b:.3g}" for a, b in zip(starts, ends, strict=True))
        + "; final F / SAM's from the same start: "
        + ", ".join(f"{ratio:.2f}" for ratio in ratios)
    )


def draw(measured: dict[str, Any], path: Path, title: str) -> None:
    """Plot rho and F over the epochs, and the final rho of each rate from the tuned start."""
    methods = list(dict.fromkeys(result["row"] for result in measured["results"]))
    palette = (figures.INK, figures.BLUE, figures.RED, figures.GREEN)
    colors = dict(zip(("sam", *RATES), palette, strict=True))
    figure = figures.make_figure(2.8)
    left, middle, right = figure.subplots(1, 3)
    for result in measured["results"]:
        color, line = colors[result["row"]], LINES[result["factor"]]
        logs = np.log(np.asarray(result["rho"]))
        mean, error = logs.mean(axis=0), spread(logs)
        epochs = range(len(mean))
        style = {"color": color, "linestyle": line, "linewidth": 1.6}
        if result["factor"] == 1:  # the other starts have the same colours
            style["label"] = result["row"]
        left.plot(epochs, np.exp(mean), **style)
        left.fill_between(
            epochs, np.exp(mean - error), np.exp(mean + error), color=color, alpha=0.15, linewidth=0
        )
        middle.plot(epochs, np.mean(result["F"], axis=0), **style)
    left.set(title=claim(measured["results"], methods), xlabel="epoch", ylabel="rho", yscale="log")
    middle.set(title="F = (held-out loss - training loss)² / 2", xlabel="epoch", ylabel="F")

    for method in methods:
        tried = sorted(
            (result for result in measured["rates"] if result["row"] == method and result["rate"]),
            key=lambda result: result["rate"],
        )
        ends = [geometric(np.asarray(result["rho"]))[0] for result in tried]
        rates = [result["rate"] for result in tried]
        right.plot(rates, ends, "o-", color=colors[method], markersize=5, zorder=3, label=method)
        for result, end in zip(tried, ends, strict=True):
            seeds = [result["rate"]] * len(result["rho"])
            right.plot(seeds, result["rho"], ".", color=colors[method], alpha=0.4)
            if result["chosen"]:
                right.plot(result["rate"], end, "o", color=colors[method], mfc="none", ms=12)
    right.axhline(measured["start"]["rho"], color=colors["sam"], linewidth=1.6)
    radii = [measured["start"]["rho"], *(r for tried in measured["rates"] for r in tried["rho"])]
    right.set(yscale="log", ylim=(min(radii) / 1.5, max(radii) * 1.5), xlabel="rate")
    right.set(title="final rho from the tuned start (line); ring: the chosen rate")
    if any(tried["rate"] for tried in measured["rates"]):  # a log axis cannot show 0
        tried = sorted({tried["rate"] for tried in measured["rates"]} - {0})
        right.set_xscale("log")
        right.set_xticks(tried, [f"{rate:g}" for rate in tried], minor=False)
        right.set_xticks([], minor=True)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        figures.label_ends(axes)
    names = ("dotted", "solid", "dashed")
    starts = ", ".join(f"{n} {f:g}" for n, f in zip(names, FACTORS, strict=True))
    figures.save(figure, path, f"{title}. Start, relative to the tuned rho: {starts}")


def claim(results: list[dict], methods: list[str]) -> str:
    """State how far apart the starts of LETS ended, of the form that brings them closest."""
    apart = {}
    for method in methods:
        if method != "sam":
            ends = [geometric(final(r, "rho"))[0] for r in results if r["row"] == method]
            apart[method] = max(ends) / min(ends)
    begun = [r["start"] for r in results if r["row"] == methods[0]]
    closest = min(apart, key=lambda method: apart[method])
    return (
        f"starts {max(begun) / min(begun):.3g} times apart end {apart[closest]:.3g} times apart "
        f"({closest})"
    )


def spread(values: np.ndarray) -> np.ndarray:
    """Return the standard error over the seeds; 0 for a single seed."""
    count = len(values)
    return values.std(axis=0, ddof=1) / np.sqrt(count) if count > 1 else np.zeros(values.shape[1])


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    choose_folder(args, "lets")
    report = Report(args)
    measured = measure(args)
    results, start, found = measured["results"], measured["start"], measured["hypergradient"]
    sam = "ASAM" if args.asam else "SAM"
    print(
        f"\ndF/d rho of one step in float64: exact {found['exact']:.6e}, central differences "
        f"{found['differences']:.6e},\nrelative error {found['relative_error']:.1e}; diag_sq "
        f"{found['diag_sq']:.2e}, that is {found['diag_sq'] / found['exact']:.1e} of the exact one"
    )
    print(
        f"\n{sam} tuned: learning rate {marked(start, 'learning_rate')}, "
        f"rho {marked(start, 'rho')}; "
        f"validation accuracy {100 * start['validation_accuracy']:.2f} %.\nLETS from this start, "
        f"{len(TUNING_SEEDS)} seeds:\n{table_of_rates(measured['rates'])}"
    )
    if any(tuned["edges"] for tuned in (start, *measured["rates"])):
        print(MARK)
    print(f"\n{describe(args.noise)}, {args.seeds} seeds (mean ± standard error)")
    print(f"{table(results)}\n")
    print("\n".join(verdict(results, method) for method in args.methods))

    report.save(**measured)
    title = f"LETS on digits, {describe(args.noise)}: {args.seeds} seeds, {args.base}"
    draw(measured, args.folder / "lets.png", f"{title}{', ASAM' * args.asam}")
    report.end("lets.png")
    return measured


if __name__ == "__main__":
    main()
