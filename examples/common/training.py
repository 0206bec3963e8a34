"""Train many runs of the digits task at once, choose their hyperparameters, and measure them."""

import functools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import samx
from examples.common.digits_task import (
    BATCH,
    LEARNING_RATE,
    STEPS_PER_EPOCH,
    TRAIN,
    Network,
    describe,
    initialize,
    rows_of,
    shuffled,
    split,
)
from examples.common.registry import BASES, Setting, Variant
from examples.common.tuning import (
    SIXTHS,
    THIRDS,
    TOGETHER,
    TUNING_SEEDS,
    Axis,
    Runs,
    around,
    best_of,
    edges,
    fixed,
    from_zero,
    runs_of,
    scores_of,
    search,
)

SHARPNESS_RADIUS = 0.2  # for the reported loss increase; the same for every method
TIMED_STEPS = 100
# Twice as many seeds as the other scripts use: neighbours in a search differ by less. The halves
# train at the same time, each in a thread, with as many runs as are reported by default: a program
# of these small networks keeps one core busy.
HALVES = TUNING_SEEDS, range(TUNING_SEEDS.stop, TUNING_SEEDS.stop + len(TUNING_SEEDS))
PLANNED = 10  # candidates of a search, for the progress bar


class Functions(NamedTuple):
    """Functions of the network, the same for all methods; the last three are compiled."""

    logits: Callable[..., Any]  # params, images -> [images, 10]
    losses_fn: Callable[..., Any]  # params, batch -> [images]
    accuracy: Callable[..., Any]  # params, one split -> share of correct predictions
    accuracies: Callable[..., Any]  # the same for a vector of runs
    loss_increase: Callable[..., Any]  # params, training images -> [runs]


@functools.cache
def make_functions(width: int) -> Functions:
    """Build the functions of a network; they compile once for all methods."""
    graph = nnx.graphdef(Network(width, rngs=nnx.Rngs(0)))

    def logits(params, x):
        return nnx.merge(graph, params)(x)

    def losses_fn(params, batch):
        return optax.softmax_cross_entropy_with_integer_labels(
            logits(params, batch["x"]), batch["y"]
        )

    def accuracy(params, data):
        return jnp.mean(logits(params, data["x"]).argmax(-1) == data["y"])

    def loss_increase(params, images):
        batches = jax.tree.map(lambda leaf: leaf.reshape(BATCH, -1, *leaf.shape[1:]), images)
        ball = samx.perturbations.metric_ball(SHARPNESS_RADIUS)

        def of_batch(batch):
            loss, g = jax.value_and_grad(lambda p: losses_fn(p, batch).mean())(params)
            eps, _ = ball.update(g, ball.init(params), params)
            return losses_fn(optax.apply_updates(params, eps), batch).mean() - loss

        return jax.vmap(of_batch, in_axes=1)(batches).mean()

    of_runs = [jax.jit(jax.vmap(function)) for function in (accuracy, loss_increase)]
    return Functions(logits, losses_fn, jax.jit(accuracy), *of_runs)


class Trainer(NamedTuple):
    """A method's compiled functions. They act on vectors of runs (seed, learning rate, rho)."""

    init: Callable[..., Any]  # runs, params -> state
    epoch: Callable[..., Any]  # params, state, runs, training images, epoch -> params, state
    step: Callable[..., Any]  # one step of one run: params, state, run, batch -> params, state
    accuracy: Callable[..., Any]  # those of `Functions`
    accuracies: Callable[..., Any]
    loss_increase: Callable[..., Any]


def make_trainer(variant: Variant, base: str, width: int, epochs: int) -> Trainer:
    """Build the functions that train a vector of runs for one epoch; each compiles once."""
    logits, losses_fn, *compiled = make_functions(width)
    batch_like = {
        "x": jax.ShapeDtypeStruct((BATCH, 64), jnp.float32),
        "y": jax.ShapeDtypeStruct((BATCH,), jnp.int32),
        "index": jax.ShapeDtypeStruct((BATCH,), jnp.int32),
    }
    setting = Setting(batch_like, batch_size=BATCH, num_examples=TRAIN)

    def optimizer(run):
        schedule = optax.cosine_decay_schedule(run.learning_rate, epochs * STEPS_PER_EPOCH)
        here = setting._replace(learning_rate=schedule)
        tx = variant.make(run.rho, BASES[base](schedule), here)
        return optax.with_extra_args_support(tx)

    def init(run, params):
        return optimizer(run).init(params)

    def step(params, state, run, batch):
        def value_fn(params):
            return losses_fn(params, batch).mean()

        def ascent_fn(params):
            return samx.losses.log_lower_bound(logits(params, batch["x"]), batch["y"]).mean()

        value, grads = jax.value_and_grad(value_fn)(params)
        updates, state = optimizer(run).update(
            grads,
            state,
            params,
            value=value,
            grad=grads,
            value_fn=value_fn,
            losses_fn=losses_fn,
            batch=batch,
            index=batch["index"],
            ascent_fn=ascent_fn,
        )
        return optax.apply_updates(params, updates), state

    def epoch(params, state, run, images, epoch):
        def body(carry, rows):
            params, state = carry
            return step(params, state, run, rows_of(images, rows)), None

        (params, state), _ = jax.lax.scan(body, (params, state), shuffled(run.seed, epoch))
        return params, state

    return Trainer(
        jax.jit(jax.vmap(init)),
        jax.jit(jax.vmap(epoch, in_axes=(0, 0, 0, 0, None)), donate_argnums=(0, 1)),
        jax.jit(step),
        *compiled,
    )


class Trained(NamedTuple):
    """The final parameters of all runs, and what was seen after each epoch."""

    params: Any
    accuracies: np.ndarray  # [epochs, runs] on the watched split; [epochs] without one
    gradients: np.ndarray  # [epochs, runs], spent since the start


def train(
    trainer: Trainer, params, runs: Runs, images, epochs: int, advance, watched: Any = None
) -> Trained:
    """Train all runs.

    After each epoch `advance` is called with them, and their accuracies on the split `watched`
    are measured, if there is one.
    """
    state = trainer.init(runs, params)
    history, gradients = [], []
    for index in range(epochs):
        params, state = jax.block_until_ready(trainer.epoch(params, state, runs, images, index))
        history.append(np.nan if watched is None else trainer.accuracies(params, watched))
        spent = optax.tree.get(state, "gradients_spent")
        if spent is None:  # the base optimizer keeps no readings: one gradient per step
            spent = np.full(len(runs.seed), (index + 1) * STEPS_PER_EPOCH)
        gradients.append(np.asarray(spent))
        advance(runs)
    return Trained(params, np.asarray(history), np.stack(gradients))


def axes_of(variant: Variant, base: str, radii: Sequence[float] | None) -> list[Axis]:
    """Return the axes of learning rate and rho that are searched for a variant.

    Args:
        variant: The variant, which says where its search begins.
        base: Name of its base optimizer.
        radii: The only radii to try, if not `None`.
    """
    rho = fixed([0.0])
    if variant.start:
        rho = fixed(radii) if radii else from_zero(around(variant.start, decades=2))
    decade = THIRDS if len(rho.values) > 1 else SIXTHS
    return [around(variant.learning_rate or LEARNING_RATE[base], decade), rho]


def runs_to_try(candidates: int) -> int:
    """Return how many runs train so many candidates."""
    return math.ceil(candidates / TOGETHER) * TOGETHER * sum(map(len, HALVES))


def choose(
    trainer: Trainer, axes: Sequence[Axis], noise: float, width: int, epochs: int, advance
) -> dict[tuple[float, ...], float]:
    """Search for the best learning rate and rho; return the score of each candidate tried.

    A score is the mean validation accuracy over the tuning seeds.
    """

    def accuracies_of(runs):
        params, data = initialize(runs.seed, width), split(runs.seed, noise)
        trained = train(trainer, params, runs, data[0], epochs, advance)
        return trainer.accuracies(trained.params, data[1])

    def evaluate(candidates):
        # Always equally many runs: the functions compile once.
        padded = candidates + candidates[-1:] * (TOGETHER - len(candidates))
        halves = [Runs(*runs_of(seeds, padded)) for seeds in HALVES]
        with ThreadPoolExecutor(len(HALVES)) as pool:
            scores = [scores_of(found, padded) for found in pool.map(accuracies_of, halves)]
        return np.mean(scores, axis=0)[: len(candidates)]

    return search(axes, evaluate)


def seconds_per_step(trainer: Trainer, params, runs: Runs, data, gradients: float) -> float:
    """Return the mean seconds per step of one run, without `vmap`.

    Sharp and plain steps are timed separately. The result is the mean of their two medians,
    weighted by how often each kind occurred in training. This weight follows from `gradients`, the
    mean number of gradients per step. One median over all steps would be the median of the more
    frequent kind.
    """
    state = trainer.init(runs, params)
    params, state, run, images = jax.tree.map(lambda x: x[0], (params, state, runs, data[0]))
    batches = [rows_of(images, rows) for rows in shuffled(run.seed, 0)]
    jax.block_until_ready(trainer.step(params, state, run, batches[0]))
    seconds: dict[bool, list[float]] = {}
    for index in range(TIMED_STEPS):
        start = time.perf_counter()
        params, state = trainer.step(params, state, run, batches[index % STEPS_PER_EPOCH])
        jax.block_until_ready((params, state))
        stop = time.perf_counter()
        is_sharp = bool(optax.tree.get(state, "is_sharp", default=False))
        seconds.setdefault(is_sharp, []).append(stop - start)
    medians = {kind: float(np.median(times)) for kind, times in seconds.items()}
    if len(medians) == 1:
        return next(iter(medians.values()))
    return (2 - gradients) * medians[False] + (gradients - 1) * medians[True]


def measure(
    row: str,
    variant: Variant,
    axes: Sequence[Axis],
    settings: Any,
    epochs: int,
    noises: list[float],
    bar: tqdm,
    work: Callable[[int], float],
) -> list[dict]:
    """Choose the hyperparameters of one row, then train and measure it, for every table.

    Args:
        row: Name of the row.
        variant: How its optimizer is built.
        axes: Those of the learning rate and of rho, where the search begins.
        settings: `base`, `width` and `seeds` of the command line.
        epochs: Epochs of the row.
        noises: Shares of wrong labels, one for each table.
        bar: The progress bar. Its total expects `PLANNED` candidates for each search,
            and is corrected when the search has ended.
        work: Gradients in one epoch of so many runs, for the progress bar.

    Returns:
        One result for each share of wrong labels.
    """
    trainer = make_trainer(variant, settings.base, settings.width, epochs)
    results = []
    for noise in noises:
        bar.set_description(f"{row}, {describe(noise)}")

        def advance(runs: Runs) -> None:
            bar.update(work(len(runs.seed)))

        tried = choose(trainer, axes, noise, settings.width, epochs, advance)
        learning_rate, rho = chosen = best_of(tried)
        bar.total += work(runs_to_try(len(tried)) - runs_to_try(PLANNED)) * epochs
        runs = Runs(*runs_of(range(settings.seeds), [(learning_rate, rho)]))
        data = split(runs.seed, noise)
        params = initialize(runs.seed, settings.width)
        trained = train(trainer, params, runs, data[0], epochs, advance, watched=data[2])
        accuracies, gradients = trained.accuracies, trained.gradients.mean(axis=1)
        per_step = float(gradients[-1]) / (epochs * STEPS_PER_EPOCH)
        params = initialize(runs.seed, settings.width)  # training donated the others
        results.append(
            {
                "row": row,
                "noise": noise,
                "learning_rate": learning_rate,
                "rho": rho,
                "edges": edges(chosen, tried),
                "candidates": [
                    {"learning_rate": rate, "rho": radius, "validation_accuracy": score}
                    for (rate, radius), score in tried.items()
                ],
                "train_accuracy": trainer.accuracies(trained.params, data[0]).tolist(),
                "test_accuracy": accuracies[-1].tolist(),
                "test_accuracy_by_epoch": accuracies.mean(axis=1).tolist(),
                "loss_increase": trainer.loss_increase(trained.params, data[0]).tolist(),
                "gradients": float(gradients[-1]),
                "gradients_by_epoch": gradients.tolist(),
                "seconds_per_step": seconds_per_step(trainer, params, runs, data, per_step),
            }
        )
    return results
