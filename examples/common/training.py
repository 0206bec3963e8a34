"""Train many runs of the digits task, choose their hyperparameters, and measure them."""

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import samx
from examples.common import monitoring
from examples.common.digits_task import (
    BATCH,
    LEARNING_RATE,
    STEPS_PER_EPOCH,
    TRAIN,
    describe,
    graph_of,
    initialize,
    rows_of,
    shuffled,
    split,
)
from examples.common.registry import BASES, Setting, Variant
from examples.common.tuning import (
    SIXTHS,
    THIRDS,
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
TIMED_TRAININGS = 2
# Twice as many seeds as the other scripts use: neighbours in a search differ by less.
SEARCH_SEEDS = range(TUNING_SEEDS.start, TUNING_SEEDS.start + 2 * len(TUNING_SEEDS))
PLANNED = 10  # candidates of a search, for the progress bar
BLOCK = 10  # epochs that one call trains at most


class Functions(NamedTuple):
    """Functions of the network, the same for all methods; the last four are compiled."""

    logits: Callable[..., Any]  # params, images -> [images, 10]
    losses_fn: Callable[..., Any]  # params, batch -> [images]
    parts: dict[str, Callable[..., Any]]  # features_fn, head_fn and loss_on_logits
    accuracy: Callable[..., Any]  # params, one split -> share of correct predictions
    accuracies: Callable[..., Any]  # the same for a vector of parameters and one split
    loss_increase: Callable[..., Any]  # params, training images -> mean over their batches
    measures: Callable[..., Any]  # a vector of parameters, index, images -> `monitoring.measure`


def loss_on_logits(logits: jax.Array, batch: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


@functools.cache
def make_functions(width: int) -> Functions:
    """Build the functions of a network; they compile once for all methods."""
    graph = graph_of(width)

    def logits(params, x):
        return nnx.merge(graph, params)(x)

    def features_fn(params, batch):
        return nnx.merge(graph, params).features(batch["x"])

    def head_fn(params, features):
        return nnx.merge(graph, params).head(features)

    def losses_fn(params, batch):
        return loss_on_logits(logits(params, batch["x"]), batch)

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

    def measures(params, index, images):
        f = samx.sharpness.objective(losses_fn=losses_fn, batch=images)
        return monitoring.measure(f, row_of(params, index), SHARPNESS_RADIUS)

    compiled = accuracy, jax.vmap(accuracy, in_axes=(0, None)), loss_increase, measures
    parts = {"features_fn": features_fn, "head_fn": head_fn, "loss_on_logits": loss_on_logits}
    return Functions(logits, losses_fn, parts, *map(jax.jit, compiled))


class Trainer(NamedTuple):
    """A method's compiled functions. They act on one run (seed, learning rate, rho)."""

    init: Callable[..., Any]  # run, params -> state
    train_block: Callable[..., Any]  # params, state, run, images, batches, epochs -> `Block`
    step: Callable[..., Any]  # params, state, run, batch -> params, state
    accuracy: Callable[..., Any]  # those of `Functions`
    accuracies: Callable[..., Any]
    loss_increase: Callable[..., Any]
    measures: Callable[..., Any]


class Block(NamedTuple):
    """A run after at most `BLOCK` epochs of training, and what it was after each of them."""

    params: Any
    state: Any
    seen: "Seen"  # [BLOCK, ...]; zeros for epochs that were not trained


class Seen(NamedTuple):
    """What is looked at after an epoch."""

    params: Any
    gradients: Any  # spent since the start; `None` for an optimizer without readings


def make_trainer(variant: Variant, base: str, width: int, epochs: int) -> Trainer:
    """Build the functions that train a run; trainings of different length share their programs."""
    init, train, step = make_steps(variant, base, width)
    total = epochs * STEPS_PER_EPOCH
    _, _, _, *compiled = make_functions(width)
    return Trainer(
        *(functools.partial(function, total) for function in (init, train, step)), *compiled
    )


@functools.lru_cache(maxsize=2)  # `base2x` follows `base`
def make_steps(variant: Variant, base: str, width: int) -> list[Callable[..., Any]]:
    """Compile the first three functions of a `Trainer`, with the number of all steps in front."""
    logits, losses_fn, parts, *_ = make_functions(width)
    batch_like = {
        "x": jax.ShapeDtypeStruct((BATCH, 64), jnp.float32),
        "y": jax.ShapeDtypeStruct((BATCH,), jnp.int32),
        "index": jax.ShapeDtypeStruct((BATCH,), jnp.int32),
    }
    setting = Setting(batch_like, batch_size=BATCH, num_examples=TRAIN)

    def optimizer(total, run):
        schedule = cosine_decay(run.learning_rate, total)
        here = setting._replace(learning_rate=schedule)
        tx = variant.make(run.rho, BASES[base](schedule), here)
        return optax.with_extra_args_support(tx)

    def init(total, run, params):
        return with_own_draws(optimizer(total, run).init(params), run.seed)

    def step(total, params, state, run, batch):
        return take_step(optimizer(total, run), logits, losses_fn, parts, params, state, batch)

    def train(total, params, state, run, images, batches, count):
        def body(carry, rows):
            params, state = carry
            return step(total, params, state, run, rows_of(images, rows)), None

        def epoch(index, block):
            carry = block.params, block.state
            (params, state), _ = jax.lax.scan(body, carry, batches[index])
            now = see(params, state)
            seen = jax.tree.map(lambda x, now: x.at[index].set(now), block.seen, now)
            return Block(params, state, seen)

        seen = jax.tree.map(lambda x: jnp.zeros((BLOCK, *x.shape), x.dtype), see(params, state))
        return jax.lax.fori_loop(0, count, epoch, Block(params, state, seen))

    def see(params, state):
        return Seen(params, optax.tree.get(state, "gradients_spent"))

    return [jax.jit(init), jax.jit(train, donate_argnums=2), jax.jit(step)]


def with_own_draws(state: Any, seed: Any) -> Any:
    """Fold a seed into the random keys of a state: all runs of a variant begin with the same ones.

    A variant keeps the data of its keys in fields of the name `key`. What `init` has drawn already
    stays: the first mask of `dynamic-sparse-sam` is the same in all runs.
    """

    def fold(path, leaf):
        if not path or getattr(path[-1], "name", None) != "key":
            return leaf
        return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(leaf), seed))

    return jax.tree_util.tree_map_with_path(fold, state)


def take_step(
    tx: optax.GradientTransformationExtraArgs,
    logits: Callable[..., Any],
    losses_fn: Callable[..., Any],
    parts: dict[str, Callable[..., Any]],
    params: Any,
    state: Any,
    batch: dict[str, jax.Array],
) -> tuple[Any, Any]:
    """Take one step of any variant; the functions are those of `Functions`."""

    def value_fn(params):
        return losses_fn(params, batch).mean()

    def ascent_fn(params):
        return samx.losses.log_lower_bound(logits(params, batch["x"]), batch["y"]).mean()

    value, grads = jax.value_and_grad(value_fn)(params)
    updates, state = tx.update(
        grads,
        state,
        params,
        value=value,
        grad=grads,
        value_fn=value_fn,
        losses_fn=losses_fn,
        **parts,
        batch=batch,
        index=batch["index"],
        labels=batch["y"],
        ascent_fn=ascent_fn,
    )
    return optax.apply_updates(params, updates), state


def cosine_decay(peak: Any, steps: Any) -> Callable[[Any], Any]:
    """Return the schedule of `optax.cosine_decay_schedule`; its length may be an array."""
    return lambda count: peak * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(count, steps) / steps))


@functools.lru_cache(maxsize=100)
def start_of(seed: int, width: int) -> Any:
    """Return the initial parameters of a run."""
    return row_of(jax.device_get(initialize(np.array([seed]), width)), 0)


@functools.lru_cache(maxsize=100)
def data_of(seed: int, noise: float) -> Any:
    """Return the training, validation and test split of a run."""
    return row_of(jax.device_get(split(np.array([seed]), noise)), 0)


@functools.lru_cache(maxsize=1000)
def batches_of(seed: int, first: int) -> jax.Array:
    """Return the batches of `BLOCK` epochs, as indices of training images [epoch, step, batch]."""
    return shuffle(seed, first)


@jax.jit
def shuffle(seed, first):
    return jax.lax.map(functools.partial(shuffled, seed), first + jnp.arange(BLOCK))


def row_of(tree: Any, index: int) -> Any:
    """Return one row of every leaf."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def map_runs(function: Callable[..., Any], *trees: Any, advance: Callable[[int], Any]) -> Any:
    """Call `function` with every row of the trees, and return what it returns as rows.

    There is one call for each core at a time: the program of a small network keeps one core busy.
    A network at a time is as fast as many under `vmap`: its numbers stay in the core's cache. And
    a step without a sharp gradient saves its time, because a branch stays a branch. After each
    call, `advance(1)` is called.
    """
    trees = jax.device_get(trees)
    rows = [row_of(trees, index) for index in range(len(jax.tree.leaves(trees)[0]))]
    found = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for result in pool.map(lambda row: jax.device_get(function(*row)), rows):
                found.append(result)
                advance(1)
        finally:  # an interrupt does not wait for the runs that have not begun
            pool.shutdown(cancel_futures=True)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *found)


class Trained(NamedTuple):
    """The final parameters of one run, and what was seen after each epoch; or that of all runs."""

    params: Any
    accuracies: Any  # [epochs, runs] on the watched split, `None` without one
    gradients: Any  # [epochs, runs], spent since the start
    monitored: Any = None  # the measures of the epochs that were asked for, each [measured, runs]


def blocks(trainer: Trainer, params, run: Runs, images, epochs: int) -> Iterator[Block]:
    """Train one run; stop after every `BLOCK` epochs, and after the last one."""
    state, images = trainer.init(run, params), jax.device_put(images)
    for first in range(0, epochs, BLOCK):
        batches = batches_of(int(run.seed), first)
        block = trainer.train_block(params, state, run, images, batches, min(BLOCK, epochs - first))
        yield block
        params, state = block.params, block.state


def train_run(
    trainer: Trainer,
    params,
    run: Runs,
    images,
    epochs: int,
    watched: Any = None,
    monitored: Sequence[int] = (),
) -> Trained:
    """Train one run; after each epoch measure its accuracy on the split `watched`, if any.

    After the epochs `monitored`, counted from 1, take the measures of sharpness too.
    """
    accuracies, gradients, measures = [], [], []
    trained = blocks(trainer, params, run, images, epochs)
    for first, block in zip(range(0, epochs, BLOCK), trained, strict=True):
        params = block.params
        gradients.append(block.seen.gradients)
        if watched is not None:
            accuracies.append(trainer.accuracies(block.seen.params, watched))
        for epoch in monitored:
            if first < epoch <= first + BLOCK:
                now = trainer.measures(block.seen.params, epoch - first - 1, images)
                measures.append(jax.device_get(now))
    if gradients[0] is None:  # the base optimizer keeps no readings: one gradient per step
        gradients = [STEPS_PER_EPOCH * np.arange(1, epochs + 1)]
    return Trained(
        params,
        np.concatenate(accuracies)[:epochs] if accuracies else None,
        np.concatenate(gradients)[:epochs],
        jax.tree.map(lambda *numbers: np.stack(numbers), *measures) if measures else None,
    )


def monitored_epochs(every: int, epochs: int) -> list[int]:
    """Return the epochs, counted from 1, in which a multiple of `every` steps ends, and the last.

    None if `every` is 0.
    """
    if not every:
        return []
    ends = [STEPS_PER_EPOCH * epoch // every for epoch in range(epochs + 1)]
    return [e for e in range(1, epochs + 1) if ends[e] > ends[e - 1] or e == epochs]


def train(
    trainer: Trainer, params, runs: Runs, images, epochs: int, advance, watched: Any = None
) -> Trained:
    """Train all runs; see `train_run` and `map_runs`."""

    def of_run(params, run, images, watched):
        return train_run(trainer, params, run, images, epochs, watched)

    params, *seen = map_runs(of_run, params, runs, images, watched, advance=advance)
    return Trained(params, *jax.tree.map(np.transpose, seen))


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
    return candidates * len(SEARCH_SEEDS)


def choose(
    trainer: Trainer, axes: Sequence[Axis], noise: float, width: int, epochs: int, advance
) -> dict[tuple[float, ...], float]:
    """Search for the best learning rate and rho; return the score of each candidate tried.

    A score is the mean validation accuracy over the tuning seeds.
    """

    def accuracy_of(run):
        seed = int(run.seed)
        images, validation, _ = data_of(seed, noise)
        trained = train_run(trainer, start_of(seed, width), run, images, epochs)
        return trainer.accuracy(trained.params, validation)

    def evaluate(candidates):
        runs = Runs(*runs_of(SEARCH_SEEDS, candidates))
        return scores_of(map_runs(accuracy_of, runs, advance=advance), candidates).tolist()

    return search(axes, evaluate)


def seconds_per_step(trainer: Trainer, params, run: Runs, images, epochs: int) -> float:
    """Return the mean seconds per step of a run that trains alone.

    It trains a few times, and the fastest time of each block counts: the others were disturbed.
    """
    seconds = []
    for _ in range(TIMED_TRAININGS):
        ends = [time.perf_counter()]
        for block in blocks(trainer, params, run, images, epochs):
            jax.block_until_ready(block)
            ends.append(time.perf_counter())
        seconds.append(np.diff(ends))
    return float(np.min(seconds, axis=0).sum()) / (epochs * STEPS_PER_EPOCH)


def measure(
    row: str,
    variant: Variant,
    axes: Sequence[Axis],
    settings: Any,
    epochs: int,
    noises: list[float],
    bar: tqdm,
    work: Callable[[int], float],
    monitor: int = 0,
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
        monitor: Steps between two measurements of sharpness on all training images; 0: none.

    Returns:
        One result for each share of wrong labels.
    """
    trainer = make_trainer(variant, settings.base, settings.width, epochs)
    results, due = [], monitored_epochs(monitor, epochs)
    for noise in noises:
        bar.set_description(f"{row}, {describe(noise)}")

        def advance(runs: int) -> None:
            bar.update(work(runs) * epochs)

        def measure_run(run: Runs, noise: float = noise):
            seed = int(run.seed)
            images, _, test = data_of(seed, noise)
            params = start_of(seed, settings.width)
            trained = train_run(trainer, params, run, images, epochs, test, due)
            accuracy = trainer.accuracy(trained.params, images)
            increase = trainer.loss_increase(trained.params, images)
            seen = trained.accuracies, trained.gradients, trained.monitored
            return *seen, accuracy, increase

        tried = choose(trainer, axes, noise, settings.width, epochs, advance)
        learning_rate, rho = chosen = best_of(tried)
        bar.total += work(runs_to_try(len(tried)) - runs_to_try(PLANNED)) * epochs
        runs = Runs(*runs_of(range(settings.seeds), [(learning_rate, rho)]))
        test, spent, taken, train, increase = map_runs(measure_run, runs, advance=advance)
        first, gradients = row_of(runs, 0), spent.mean(axis=0)
        timed = start_of(0, settings.width), first, data_of(0, noise)[0], epochs
        results.append(
            {
                **monitored_of(due, taken),
                "row": row,
                "noise": noise,
                "learning_rate": learning_rate,
                "rho": rho,
                "edges": edges(chosen, tried),
                "candidates": [
                    {"learning_rate": rate, "rho": radius, "validation_accuracy": score}
                    for (rate, radius), score in tried.items()
                ],
                "train_accuracy": train.tolist(),
                "test_accuracy": test[:, -1].tolist(),
                "test_accuracy_by_epoch": test.mean(axis=0).tolist(),
                "loss_increase": increase.tolist(),
                "gradients": float(gradients[-1]),
                "gradients_by_epoch": gradients.tolist(),
                "seconds_per_step": seconds_per_step(trainer, *timed),
            }
        )
    return results


def monitored_of(epochs: list[int], measures: Any) -> dict[str, Any]:
    """Return the part of a result with what was measured along the runs, if anything was."""
    if not epochs:
        return {}
    steps = [STEPS_PER_EPOCH * epoch for epoch in epochs]
    found = {name: np.transpose(measures[name]).tolist() for name in monitoring.NAMES}
    return {"monitored": {"step": steps, **found}}
