"""Directions and sizes of gradients: what papers say of them, along trainings, at frozen weights.

    python examples/claims/gradient_directions.py

The task is that of digits.py with 30% wrong labels. Its network trains with SGD with momentum and
with SAM, at the learning rates and the radius that digits.py found; and with Friendly SAM, SAMPa
and Momentum-SAM for the claims on their own trainings. No measured method is tuned here. After some
epochs the weights are frozen. Then everything is computed exactly, on the batches of the epoch that
would follow and on the whole training set: gradients, the way to the maximum in the ball,
eigenvectors, gradients of single examples. What is said of both trainings is the mean over them.
The claim on language models is measured on a small GPT, which AdamW trains.

The script prints each claim with its number and the verdict, and writes results.json,
gradient_directions.json and gradient_directions.png to --out. It takes about five minutes on two
CPU cores.
"""

import argparse

from examples.common import arguments

NAME = "gradient_directions"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--language-seeds", type=int, default=10, help="of the GPT; default: 10")
    parser.add_argument("--width", type=int, default=64, help="units of each hidden layer")
    arguments.add_out(parser, NAME)
    args = parser.parse_args(argv)
    arguments.check_range(parser, args, "seeds", "language_seeds", "width")
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from examples.claims import frozen, language_paths, recorded
from examples.claims.claim import FAILS, HOLDS, Claim, Found, found_of, print_claims, save
from examples.common import figures, files
from examples.common.digits_task import STEPS_PER_EPOCH, rows_of
from examples.common.intervals import spearman
from examples.common.output import choose_folder
from examples.common.report import Report
from examples.common.training import map_runs
from examples.compare.options import RESULTS

NOISE = 0.3
CHECKPOINTS = (1, 5, 10, 20, 40)  # epochs; the training ends after the last one
SEARCHED = 3  # batches on which the maximum in the ball is searched
KINDS = {"sgd": "base", "sam": "sam"}  # rows of the registry
ALONE = ("friendly-sam", "sampa", "momentum-sam")  # measured on their own trainings
NEAR = 5  # steps back

CLAIMS = {
    "xsam-nearer": Claim(
        ("xsam",),
        "The gradient after one ascent step points nearer to the maximum in the ball than the "
        "gradient at the weights.",
        "abstract",
        "cosine with the way to the maximum: that of SAM's gradient minus that of the gradient",
        low=0,
    ),
    "xsam-steps": Claim(
        ("xsam",),
        "With more ascent steps the approximation may get worse.",
        "abstract",
        "the same cosine after 5 steps of a fifth of the radius minus that after one step",
        high=0,
        why="only steps that leave the ball together make it worse; see the next line",
    ),
    "xsam-far": Claim(
        ("sharpness_aware",),
        "The same, for steps that are not shortened.",
        "abstract",
        "the same cosine after 5 steps of the whole radius minus that after one step",
        high=0,
        why="such an ascent leaves the ball",
    ),
    "xsam-wide": Claim(
        ("xsam",),
        "The same in a ball of five times the radius.",
        "abstract",
        "the same, for the maximum in the wide ball: after 5 steps of a fifth of its radius minus "
        "that after one step",
        high=0,
    ),
    "xsam-direction": Claim(
        ("xsam",),
        "XSAM estimates the direction of the maximum, which SAM's gradient often misses.",
        "abstract",
        "the same cosine of XSAM's direction, searched in the same ball, minus SAM's",
        low=0,
    ),
    "xsam-range": Claim(
        ("xsam",),
        "The best direction lies inside of the range that is searched, α from 0 to 2.",
        "authors' code",
        "share of the searches that end at the limit, α = 2; searched at the radius of the ascent",
        high=0.5,
    ),
    "xsam-range-default": Claim(
        ("xsam",),
        "The same, searched at twice the radius of the ascent.",
        "authors' code",
        "the same, radii 0.15 and 0.3",
        high=0.5,
    ),
    "friendly-full": Claim(
        ("friendly_sam",),
        "The part of the gradient that belongs to all data raises the loss of all data.",
        "abstract",
        "rise of the training loss along it, relative to the rise along SAM's step; equal lengths, "
        "radius 0.2",
        low=1,
    ),
    "friendly-batch": Claim(
        ("friendly_sam",),
        "The batch-specific part does not.",
        "abstract",
        "the same along the gradient of the batch minus that of all data",
        high=0.1,
        why="the curvature raises the loss, whatever the direction; see the next line",
    ),
    "friendly-batch-small": Claim(
        ("friendly_sam",),
        "The same, where the loss is linear.",
        "abstract",
        "the same at radius 0.01",
        high=0.1,
    ),
    "friendly-ema": Claim(
        ("friendly_sam",),
        "The method climbs the batch-specific part.",
        "abstract",
        "the same along the method's own direction, the gradient minus the moving average; 0.2",
        high=0.1,
    ),
    "friendly-estimate": Claim(
        ("friendly_sam",),
        "The moving average of gradients estimates the gradient of all data.",
        "abstract",
        "cosine with the gradient of all data: that of the average minus that of one batch",
        low=0,
    ),
    "fisher-spread": Claim(
        ("fisher_sam",),
        "A Euclidean ball goes too near or too far; the Fisher ball measures what the model does.",
        "abstract",
        "spread over batches and checkpoints of the KL divergence of the predictions, relative to "
        "its mean; that of Fisher SAM divided by SAM's, at equal means; η = 1",
        high=1,
        why="by less than a thousandth: where gradients are small, 1 + g² is 1",
    ),
    "fisher-spread-strong": Claim(
        ("fisher_sam",),
        "The same, with a metric far from the Euclidean one.",
        "abstract",
        "the same, η = 10,000",
        high=1,
    ),
    "fisher-spread-examples": Claim(
        ("fisher_sam",),
        "The same, with the Fisher information of examples.",
        "abstract",
        "the same, with 1 + F / mean F for F the mean squared gradient of examples",
        high=1,
    ),
    "eigen-alignment": Claim(
        ("eigen_sam",),
        "SAM's step is poorly aligned with the top eigenvector of the Hessian.",
        "abstract",
        "|cosine| of SAM's step on a batch and the top eigenvector of the training loss; at random "
        "0.01",
        high=0.5,
    ),
    "eigen-alignment-batch": Claim(
        ("eigen_sam",),
        "The same, with the Hessian of the batch that is climbed.",
        "abstract",
        "the same, eigenvector of the batch's loss",
        high=0.5,
    ),
    "cr-linear": Claim(
        ("cr_sam",),
        "The loss becomes less linear as training goes on.",
        "abstract",
        "slope over the logarithm of the epochs (base 10) of (rise − ⟨g, ε⟩) / ⟨g, ε⟩; SAM's "
        "training",
        low=0,
    ),
    "cr-linear-sgd": Claim(
        ("cr_sam",),
        "The same without SAM.",
        "abstract",
        "the same, SGD's training",
        low=0,
    ),
    "cr-linear-late": Claim(
        ("cr_sam",),
        "The same after the first epoch.",
        "abstract",
        "the same from epoch 5 on, SAM's training",
        low=0,
    ),
    "cr-linear-late-sgd": Claim(
        ("cr_sam",),
        "The same after the first epoch, without SAM.",
        "abstract",
        "the same, SGD's training",
        low=0,
    ),
    "cr-one-step": Claim(
        ("cr_sam",),
        "So one step of ascent finds less of the maximum.",
        "abstract",
        "slope of the rise of one step divided by the maximum in the ball; SAM's training",
        high=0,
    ),
    "cr-one-step-sgd": Claim(
        ("cr_sam",),
        "The same without SAM.",
        "abstract",
        "the same, SGD's training",
        high=0,
    ),
    "ausam-order": Claim(
        ("ausam",),
        "By how much an example's loss changes under the perturbation goes with the length of its "
        "gradient.",
        "abstract",
        "rank correlation of both within a batch",
        low=0.5,
    ),
    "ssam-rise": Claim(
        ("fisher_sparse_sam", "dynamic_sparse_sam"),
        "Only about 5% of the weights are sharp and rise steeply.",
        "introduction",
        "share of the weights that carry 90% of the first-order rise",
        high=0.1,
        published="5%",
    ),
    "ssam-change": Claim(
        ("fisher_sparse_sam", "dynamic_sparse_sam"),
        "The same, measured by what the perturbation changes.",
        "introduction",
        "share of the weights that carry 90% of ‖g_s − g‖²",
        high=0.1,
        published="5%",
    ),
    "le-norm": Claim(
        ("le_sam",),
        "What is learned from the ascent does not go with the length of the gradient, as SAM's "
        "does.",
        "abstract",
        "|rank correlation| of ‖g_s − g‖ and ‖g‖ over batches and checkpoints, minus SAM's",
        high=0,
    ),
    "le-curvature": Claim(
        ("le_sam",),
        "It goes with the curvature.",
        "abstract",
        "rank correlation of ‖g_s − g‖ and the curvature along the gradient, minus SAM's",
        low=0,
    ),
    "le-direction": Claim(
        ("le_sam",),
        "It does not shorten the gradient, as SAM does.",
        "abstract",
        "cosine of g_s − g and the slope of ‖g‖; SAM's is in the next line",
        high=0.5,
        why="both take the derivative at a fixed step along g, so both have the direction of H g",
    ),
    "le-direction-sam": Claim(
        ("sam",),
        "What SAM learns from the ascent shortens the gradient.",
        "the paper of LE-SAM, abstract",
        "the same, SAM",
        low=0.5,
    ),
    "looksam-slow": Claim(
        ("looksam",),
        "The part of the sharp gradient orthogonal to the gradient changes more slowly than the "
        "gradient.",
        "the idea of the method; the text was not read",
        "cosine with its own past, 5 steps ago, minus that of the gradient; SAM's training",
        low=0,
    ),
    "looksam-slow-sgd": Claim(
        ("looksam",),
        "The same without SAM.",
        "the idea of the method; the text was not read",
        "the same, SGD's training",
        low=0,
    ),
    "looksam-kept": Claim(
        ("looksam",),
        "So a part that is 5 steps old still helps.",
        "the idea of the method; the text was not read",
        "cosine of the part with its own past, 5 steps ago; SAM's training",
        low=0.5,
        why="the batch decides what is orthogonal to its gradient",
    ),
    "gcsam-variance": Claim(
        ("gcsam",),
        "Centralized gradients vary less.",
        "abstract",
        "variance over batches, divided by that of the gradients",
        high=1,
        why="a projection cannot add variance",
    ),
    "gcsam-relative": Claim(
        ("gcsam",),
        "The same, relative to what all batches have in common.",
        "abstract",
        "variance divided by the squared mean, divided by that of the gradients",
        high=1,
        why="what is removed is common to the batches in part",
    ),
    "sampa-cosine": Claim(
        ("sampa",),
        "The gradient at the trial point y stays near that at the weights.",
        "appendix, by a secondary source",
        "cosine of both, same batch, mean over SAMPa's training",
        low=0.99,
        published="above 0.99",
        why="y is a whole step of the base away; see the end, where steps are small",
    ),
    "sampa-cosine-late": Claim(
        ("sampa",),
        "The same, when the learning rate is small.",
        "appendix, by a secondary source",
        "the same, last quarter of the training",
        low=0.99,
        published="above 0.99",
    ),
    "functional-language": Claim(
        ("functional_sam",),
        "In language models the path through the logits dominates what SAM changes.",
        "abstract",
        "its share of g_s − g; GPT, radius 0.2",
        low=0.5,
    ),
    "functional-language-small": Claim(
        ("functional_sam",),
        "The same at a small radius.",
        "abstract",
        "the same, radius 0.05",
        low=0.5,
    ),
    "functional-difference": Claim(
        ("functional_sam",),
        "It is larger there than in vision.",
        "abstract",
        "the share of the GPT minus that of the digits; radius 0.2",
        low=0,
    ),
    "functional-difference-sgd": Claim(
        ("functional_sam",),
        "The same, neither of both trained with SAM.",
        "abstract",
        "the same, minus the share in SGD's training of the digits",
        low=0,
    ),
    "functional-digits": Claim(
        ("functional_sam",),
        "In vision it does not dominate.",
        "abstract",
        "its share; digits, radius 0.2",
        high=0.5,
        why="the logits dominate here too, but in the first epochs",
    ),
    "bisam-error": Claim(
        ("bisam",),
        "Its perturbation raises the error more than SAM's.",
        "abstract",
        "rise of the error of a batch minus that of SAM, points; equal radius; logarithmic bound",
        low=0,
        why="this bound is steepest for the examples that are surest to be right",
    ),
    "bisam-error-tanh": Claim(
        ("bisam",),
        "The same with the other bound.",
        "abstract",
        "the same, tanh bound",
        low=0,
    ),
    "gsam-order": Claim(
        ("gsam",),
        "The gap between the perturbed loss and the loss goes with the top eigenvalue.",
        "secondary source",
        "rank correlation over checkpoints of both trainings; all training images",
        low=0.5,
    ),
    "gsam-size": Claim(
        ("gsam",),
        "Near minima it is the top eigenvalue times half of the squared radius.",
        "secondary source",
        "the gap at the end of SGD's training, divided by that",
        low=0.5,
        high=2,
        why="SAM's step does not go along the top eigenvector",
    ),
    "gsam-size-highest": Claim(
        ("gsam",),
        "The same, for the true maximum in the ball.",
        "secondary source",
        "the maximum of the training loss in the ball minus the loss, divided by that",
        low=0.5,
        high=2,
    ),
    "async-successive": Claim(
        ("async_sam",),
        "Successive gradients are similar, so that of the last step may set the ascent.",
        "abstract",
        "cosine of the gradients of two successive steps; both trainings",
        low=0.5,
        why="the batch changes it, not the step: see the next two lines",
    ),
    "async-same": Claim(
        ("async_sam",),
        "The same, if the batch is the same.",
        "abstract",
        "cosine of the gradients of one batch before and after a step",
        low=0.5,
    ),
    "async-other": Claim(
        ("async_sam",),
        "The same, if the weights are the same.",
        "abstract",
        "cosine of the gradients of two batches at the same weights",
        low=0.5,
    ),
    "arsam-growth": Claim(
        ("arsam",),
        "The second-order part of the gradient matters more as training goes on.",
        "abstract",
        "slope of ‖g_s − g‖ / ‖g‖ over the logarithm of the steps; SAM's training",
        low=0,
        why="SAM's own training keeps it small; see the next line",
    ),
    "arsam-growth-sgd": Claim(
        ("arsam",),
        "The same without SAM.",
        "abstract",
        "the same, SGD's training",
        low=0,
    ),
    "arsam-growth-late": Claim(
        ("arsam",),
        "The same after the first quarter of the training.",
        "abstract",
        "the same from epoch 10 on, SAM's training",
        low=0,
    ),
    "arsam-growth-late-sgd": Claim(
        ("arsam",),
        "The same after the first quarter of the training, without SAM.",
        "abstract",
        "the same, SGD's training",
        low=0,
    ),
    "vsam-variation": Claim(
        ("vsam",),
        "The second-order part varies more as training goes on.",
        "abstract",
        "slope of the deviation of ‖g_s − g‖ within an epoch over the logarithm of the epochs, "
        "relative to its mean; SAM's training",
        low=0,
        why="SAM's own training keeps it small; see the next line",
    ),
    "vsam-variation-sgd": Claim(
        ("vsam",),
        "The same without SAM.",
        "abstract",
        "the same, SGD's training",
        low=0,
    ),
    "tsam-smooth": Claim(
        ("tsam",),
        "Its objective is smoother than SAM's.",
        "abstract",
        "largest second difference along random lines, divided by that of SAM's objective; t = 1, "
        "8 points that are held fixed",
        high=1,
    ),
    "tsam-limit": Claim(
        ("tsam",),
        "The same against the worst of its points, t = ∞.",
        "abstract",
        "the same, divided by that of the largest loss of the same points",
        high=1,
    ),
    "momentum-ascent": Claim(
        ("momentum_sam",),
        "The step along the momentum takes the place of the ascent.",
        "abstract",
        "cosine of its step and the gradient of the batch; its own training",
        low=0,
        why="hardly: it descends in the first 50 steps, and is almost orthogonal later",
    ),
    "momentum-rise": Claim(
        ("momentum_sam",),
        "It raises the loss of the new batch.",
        "the paper's text",
        "rise of the batch's loss from w to w + ε; its own training, radius 1",
        low=0,
        why="the curvature raises it, not the slope; see the next line",
    ),
    "momentum-linear": Claim(
        ("momentum_sam",),
        "So it climbs along the gradient.",
        "abstract",
        "share of the rise that ⟨g, ε⟩ explains, sums over the training",
        low=0.5,
    ),
}


def tuned(row: str) -> tuple[float, float]:
    """Return the learning rate and rho of a row of the digits' table."""
    rows = files.read_json(RESULTS.parent / "digits.json")["rows"]
    [found] = [each for each in rows if each["row"] == row and each["noise"] == NOISE]
    return found["learning_rate"], found["rho"]


def checkpoints_of(run: recorded.Recorded, seed: int) -> tuple[jax.Array, jax.Array]:
    """Return the weights after the epochs of `CHECKPOINTS`, and the next epoch's batches."""
    batches = recorded.all_batches(seed, CHECKPOINTS[-1] + 1)
    batches = batches.reshape(-1, STEPS_PER_EPOCH, batches.shape[-1])
    ends = STEPS_PER_EPOCH * np.array(CHECKPOINTS)
    return run.weights[ends], batches[np.array(CHECKPOINTS)]


@functools.partial(jax.jit, static_argnums=5)
def at_checkpoints(weights, batches, images, rho, sigma, width):
    """Return all measures of `frozen` at each checkpoint of a training: [checkpoints, batches]."""
    net = recorded.functions_of(width)

    def of_checkpoint(inputs):
        params, rows = inputs
        whole = frozen.whole_set(lambda p: net.losses_fn(p, images).mean(), params, rho)
        vectors = whole.pop("vectors")

        def of_batch(rows):
            place = frozen.place_of(net, params, rows_of(images, rows), rho)
            found = frozen.ascent(place) | frozen.errors(place) | frozen.paths(place)
            found |= frozen.loss_rise(place, sigma)
            found["along_top"] = frozen.alignment(place, vectors)
            return found, place.g

        def of_searched(rows):
            return frozen.maximum(frozen.place_of(net, params, rows_of(images, rows), rho))

        found, gradients = jax.lax.map(of_batch, rows)
        found |= jax.lax.map(of_searched, rows[:SEARCHED]) | whole
        found |= frozen.variances(gradients, recorded.tree_of(width))
        return found | frozen.smoothness(
            frozen.place_of(net, params, rows_of(images, rows[0]), rho)
        )

    return jax.lax.map(of_checkpoint, (weights, batches))


@functools.partial(jax.jit, static_argnums=4)
def spreads(weights, batches, images, rho, width):
    """Return for each ball the spread of the KL divergence over its mean, at SAM's mean."""
    net = recorded.functions_of(width)

    def steps(inputs):
        w, rows = inputs
        return frozen.fisher_steps(frozen.place_of(net, w, rows_of(images, rows), rho))

    many = batches.reshape(-1, batches.shape[-1])
    where = jnp.repeat(weights, batches.shape[1], axis=0)
    found = jax.lax.map(steps, (where, many))

    def divergences(steps, radius):
        def of(inputs):
            w, rows, step = inputs
            batch = rows_of(images, rows)
            return frozen.divergence(net, w, radius * step, batch)

        return jax.lax.map(of, (where, many, steps))

    goal = divergences(found["ball"], rho).mean()

    def spread(steps):
        def nearer(_, radius):
            return radius * jnp.sqrt(goal / divergences(steps, radius).mean())

        radius = jax.lax.fori_loop(0, 8, nearer, jnp.asarray(rho, jnp.float32))
        seen = divergences(steps, radius)
        return seen.std() / seen.mean()

    return {name: spread(steps) for name, steps in found.items()}


@functools.partial(jax.jit, static_argnums=5)
def at_friendly(weights, averages, batches, images, rho, width):
    """Return what parts of the gradient do at the checkpoints of a training of Friendly SAM."""
    net = recorded.functions_of(width)

    def whole(w):
        return net.losses_fn(w, images).mean()

    def of_checkpoint(inputs):
        w, average, rows = inputs

        def of_batch(rows):
            place = frozen.place_of(net, w, rows_of(images, rows), rho)
            return frozen.friendly(place, whole, average)

        return jax.lax.map(of_batch, rows)

    return jax.lax.map(of_checkpoint, (weights, averages, batches))


Measured = Mapping[str, Any]  # arrays of one seed, or of all with the seeds in front


def of_seed(seed: int, width: int) -> dict[str, Measured]:
    """Train the digits with one seed, and return all that is measured, by the training."""
    rho, found = tuned("sam")[1], {}

    def train(row: str) -> recorded.Recorded:
        return recorded.record(row, seed, *tuned(row), NOISE, width, CHECKPOINTS[-1])

    for kind, row in KINDS.items():
        run = train(row)
        weights, batches = checkpoints_of(run, seed)
        steps = recorded.along(run, rho, width)
        sigma = rho * steps["norm"].mean()
        there = weights, batches, run.images
        found[kind] = steps | at_checkpoints(*there, rho, sigma, width)
        found[kind] |= {f"kl_{name}": x for name, x in spreads(*there, rho, width).items()}
    friendly, sampa, momentum = map(train, ALONE)
    weights, batches = checkpoints_of(friendly, seed)
    averages = friendly.kept[STEPS_PER_EPOCH * np.array(CHECKPOINTS) - 1]
    found["friendly"] = at_friendly(weights, averages, batches, friendly.images, rho, width)
    found["sampa"] = {"cosine": recorded.trial_points(sampa, width)}
    found["momentum"] = recorded.along_momentum(momentum, tuned("momentum-sam")[1], width)
    return jax.device_get(found)


def slope(numbers: Any, places: Any) -> float:
    """Return the slope of numbers over the logarithm (base 10) of their places."""
    return float(np.polyfit(np.log10(places), np.asarray(numbers, float), 1)[0])


def correlated(one: Any, other: Any) -> float:
    """Return the rank correlation of all numbers of two arrays."""
    one, other = (np.ravel(x).astype(float) for x in (one, other))
    return float(spearman(one, other, np.ones((1, len(one))))[0])


def within(one: Any, other: Any) -> float:
    """Return the mean rank correlation along the last axis."""
    one, other = (np.asarray(x, float).reshape(-1, x.shape[-1]) for x in (one, other))
    return float(spearman(one, other, np.ones((len(one), 1, one.shape[1]))).mean())


def variation(change: np.ndarray) -> float:
    """Return the slope of the deviation within an epoch, divided by the mean over all of them."""
    deviation = change.reshape(-1, STEPS_PER_EPOCH).std(axis=1)
    return slope(deviation / deviation.mean(), np.arange(1, len(deviation) + 1))


def last_quarter(x: np.ndarray) -> np.ndarray:
    """Return the last quarter of a measure of steps."""
    return x[-(len(x) // 4) :]


def over_both(found: Mapping[str, Measured], measure: Callable[[Measured], Any]) -> float:
    """Return the mean of a measure over SGD's and SAM's training."""
    return float(np.mean([np.mean(measure(found[kind])) for kind in KINDS]))


def values_of(found: Mapping[str, Measured]) -> dict[str, float]:
    """Return the number of each claim on the digits, for one seed."""
    both = functools.partial(over_both, found)
    return {
        "xsam-nearer": both(lambda at: at["to_top_1"] - at["to_top_g"]),
        "xsam-steps": both(lambda at: at["to_top_many"] - at["to_top_1"]),
        "xsam-far": both(lambda at: at["to_top_far"] - at["to_top_1"]),
        "xsam-direction": both(lambda at: at["to_top_xsam"] - at["to_top_1"]),
        "xsam-wide": both(lambda at: at["to_wide_many"] - at["to_wide_1"]),
        "xsam-range": both(lambda at: at["at_limit"]),
        "xsam-range-default": both(lambda at: at["at_limit_by_default"]),
        **friendly_values(found["friendly"]),
        **{
            f"fisher-spread{end}": both(lambda at, name=name: at[name] / at["kl_ball"])
            for end, name in (
                ("", "kl_default"),
                ("-strong", "kl_strong"),
                ("-examples", "kl_examples"),
            )
        },
        "eigen-alignment": both(lambda at: at["along_top"]),
        "eigen-alignment-batch": both(lambda at: at["along_own_top"]),
        "ausam-order": both(lambda at: within(at["example_changes"], at["example_norms"])),
        "ssam-rise": both(lambda at: at["carry_rise"]),
        "ssam-change": both(lambda at: at["carry_change"]),
        **loss_rise_values(found),
        "gcsam-variance": both(lambda at: at["central_variance"]),
        "gcsam-relative": both(lambda at: at["central_relative"]),
        "sampa-cosine": float(found["sampa"]["cosine"].mean()),
        "sampa-cosine-late": float(last_quarter(found["sampa"]["cosine"]).mean()),
        "functional-digits": both(lambda at: at["logit_share"]),
        "functional-digits-sgd": float(found["sgd"]["logit_share"].mean()),
        "bisam-error": both(lambda at: at["log_error"] - at["sam_error"]),
        "bisam-error-tanh": both(lambda at: at["tanh_error"] - at["sam_error"]),
        **gap_values(found),
        **{f"async-{name}": both(lambda at, name=name: at[name]) for name in COMPARED},
        "tsam-smooth": both(lambda at: at["tilted_bend"] / at["sam_bend"]),
        "tsam-limit": both(lambda at: at["tilted_bend"] / at["largest_bend"]),
        "momentum-ascent": float(found["momentum"]["cosine"].mean()),
        "momentum-rise": float(found["momentum"]["rise"].mean()),
        "momentum-linear": float(
            found["momentum"]["slope"].sum() / found["momentum"]["rise"].sum()
        ),
        **along_values(found["sam"], ""),
        **along_values(found["sgd"], "-sgd"),
    }


COMPARED = ("successive", "same", "other")  # gradients, see `recorded.along`


def along_values(at: Measured, end: str) -> dict[str, float]:
    """Return the numbers of claims on what changes along one training."""
    past = at["lag_part"][NEAR - 1]
    nonlinear = at["rise"] / at["slope"] - 1
    steps, quarter = np.arange(1, len(at["ratio"]) + 1), len(at["ratio"]) // 4
    found = {
        "cr-linear": slope(nonlinear.mean(axis=1), CHECKPOINTS),
        "cr-linear-late": slope(nonlinear[1:].mean(axis=1), CHECKPOINTS[1:]),
        "cr-one-step": slope(at["one_step_share"].mean(axis=1), CHECKPOINTS),
        "looksam-slow": float(past - at["lag_g"][NEAR - 1]),
        "looksam-kept": float(past),
        "arsam-growth": slope(at["ratio"], steps),
        "arsam-growth-late": slope(at["ratio"][quarter:], steps[quarter:]),
        "vsam-variation": variation(at["change"]),
    }
    return {name + end: value for name, value in found.items() if name + end in CLAIMS}


def friendly_values(at: Measured) -> dict[str, float]:
    """Return the numbers of claims on Friendly SAM, on its own training."""

    def relative(part: str, end: str = "") -> float:
        return float(np.mean(at[part + end].mean(axis=1) / at["sam" + end].mean(axis=1)))

    return {
        "friendly-full": relative("full"),
        "friendly-batch": relative("batch"),
        "friendly-batch-small": relative("batch", "_small"),
        "friendly-ema": relative("ema"),
        "friendly-estimate": float(np.mean(at["ema_cosine"] - at["batch_cosine"])),
    }


def loss_rise_values(found: Mapping[str, Measured]) -> dict[str, float]:
    """Return the numbers of claims on LE-SAM."""
    both = functools.partial(over_both, found)

    def more(at: Measured, name: str, size: Callable[[float], float]) -> float:
        mine, theirs = (size(correlated(at[x], at[name])) for x in ("le_change", "change_at"))
        return mine - theirs

    return {
        "le-norm": both(lambda at: more(at, "norm_at", abs)),
        "le-curvature": both(lambda at: more(at, "curvature", float)),
        "le-direction": both(lambda at: at["le_along_norm"]),
        "le-direction-sam": both(lambda at: at["sam_along_norm"]),
    }


def gap_values(found: Mapping[str, Measured]) -> dict[str, float]:
    """Return the numbers of claims on GSAM's gap and the top eigenvalue."""
    gap, top = (np.stack([found[kind][name] for kind in KINDS]) for name in ("gap", "top"))
    last = {name: float(found["sgd"][name][-1]) for name in ("gap", "highest", "top")}
    expected = last["top"] * tuned("sam")[1] ** 2 / 2
    return {
        "gsam-order": correlated(gap, top),
        "gsam-size": last["gap"] / expected,
        "gsam-size-highest": last["highest"] / expected,
    }


def measure(args: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, Measured]]:
    """Return the numbers of each claim, one for each seed, and all measures, [seeds, ...]."""
    seeds, width = list(range(args.seeds)), args.width
    with tqdm(total=args.seeds + args.language_seeds, unit="run", disable=None) as bar:
        runs = [of_seed(seeds[0], width)]  # the others find its compiled programs
        bar.update()
        if seeds[1:]:
            rest = map_runs(
                lambda seed: of_seed(int(seed), width), np.array(seeds[1:]), advance=bar.update
            )
            runs += [jax.tree.map(lambda x, i=i: x[i], rest) for i in range(len(seeds) - 1)]
        language = []
        for seed in range(args.language_seeds):
            language.append(language_paths.of_seed(seed, CHECKPOINTS, SEARCHED))
            bar.update()
    each = [values_of(run) for run in runs]
    values = {name: [one[name] for one in each] for name in each[0]}
    small, large = np.mean(language, axis=1).T
    values["functional-language"] = large.tolist()
    values["functional-language-small"] = small.tolist()
    for name, digits in (
        ("functional-difference", values["functional-digits"]),
        ("functional-difference-sgd", values.pop("functional-digits-sgd")),
    ):
        values[name] = [a - b for a, b in zip(large.tolist(), digits, strict=False)]
    together = jax.tree.map(lambda *x: np.stack(x), *runs)
    return values, together | {"language": {"logit_share": np.stack(language)}}


def mean_of(measured: Measured, name: str) -> np.ndarray:
    """Return a measure over checkpoints, or steps: the mean over seeds, and over batches if any."""
    x = np.asarray(measured[name])
    return x.mean(axis=(0, *range(2, x.ndim)))


class Panel(NamedTuple):
    """A panel of the figure: lines over the epochs, or over something else."""

    title: str
    lines: Mapping[str, np.ndarray]
    x: Sequence[int]
    label: str = "epoch"


def panels_of(measured: Mapping[str, Measured]) -> list[Panel]:
    """Return what the figure shows, means over seeds."""
    of = {kind: functools.partial(mean_of, measured[kind]) for kind in measured}
    sam, sgd, friendly = of["sam"], of["sgd"], of["friendly"]
    epochs = range(1, CHECKPOINTS[-1] + 1)

    def by_epoch(steps: np.ndarray) -> np.ndarray:
        return steps.reshape(len(epochs), -1).mean(axis=1)

    ways = {
        "gradient": "to_top_g",
        "1 step": "to_top_1",
        f"{frozen.STEPS} short steps": "to_top_many",
        f"{frozen.STEPS} long steps": "to_top_far",
    }
    parts = {"of all data": "full", "of the batch": "batch", "g − average": "ema"}
    language = np.mean(measured["language"]["logit_share"], axis=0).T
    return [
        Panel(
            "Cosine of gradients with the way to the maximum in the ball, SAM's training",
            {name: sam(key) for name, key in ways.items()},
            CHECKPOINTS,
        ),
        Panel(
            "Rise of one step divided by the maximum in the ball",
            {"SAM's training": sam("one_step_share"), "SGD's training": sgd("one_step_share")},
            CHECKPOINTS,
        ),
        Panel(
            "Rise of the training loss along parts of the gradient, divided by that of SAM",
            {name: friendly(part) / friendly("sam") for name, part in parts.items()},
            CHECKPOINTS,
        ),
        Panel(
            "‖g_s − g‖ / ‖g‖",
            {"SAM's training": by_epoch(sam("ratio")), "SGD's training": by_epoch(sgd("ratio"))},
            epochs,
        ),
        Panel(
            "Cosine with its own past: g, and the part of g_s orthogonal to g",
            {"gradient": sam("lag_g"), "part": sam("lag_part")},
            range(1, recorded.LAGS + 1),
            "steps ago",
        ),
        Panel(
            "Share of the path through the logits in g_s − g",
            {"digits, SAM": sam("logit_share"), "digits, SGD": sgd("logit_share")}
            | {
                f"GPT, {rho}": line
                for rho, line in zip(language_paths.RADII, language, strict=True)
            },
            CHECKPOINTS,
        ),
    ]


def draw(measured: Mapping[str, Measured], found: Sequence[Found], path: Path) -> None:
    """Draw some of the measures over the epochs or steps, and count the claims."""
    figure = figures.make_figure(3, [figures.height_of()] * 2)
    places = figure.subplots(2, 3).ravel()
    for axes, panel in zip(places, panels_of(measured), strict=True):
        for name, y in panel.lines.items():
            axes.plot(panel.x, y, label=name)
        axes.set_xscale(figures.scale_of(panel.x))
        axes.set_xlabel(panel.label)
        axes.set_title(panel.title)
        figures.label_ends(axes)
    holds, fails = (sum(one.verdict == word for one in found) for word in (HOLDS, FAILS))
    counted = f"{holds} hold, {fails} do not, {len(found) - holds - fails} are open"
    figures.save(figure, path, f"Claims on directions of gradients on the digits: {counted}")


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[Found]:
    args = parse(argv)
    choose_folder(args, NAME)
    report = Report(args)
    values, measured = measure(args)
    found = found_of(CLAIMS, values)
    print_claims(found)
    save(report, NAME, found, values, means=means_of(measured))
    draw(measured, found, report.folder / f"{NAME}.png")
    report.end(f"{NAME}.png")
    return found


def means_of(measured: Mapping[str, Measured]) -> dict[str, dict[str, Any]]:
    """Return the mean over seeds and batches of all measures, for results.json."""
    return {
        kind: {
            name: mean_of(at, name).tolist() for name, x in at.items() if not name.startswith("ex")
        }
        for kind, at in measured.items()
    }


if __name__ == "__main__":
    main()
