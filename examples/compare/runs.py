"""Train and measure single runs of the comparison: one method on one task, with one seed."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import samx
from examples.common.registry import BASES, Setting
from examples.common.rounding import rounded
from examples.common.training import cosine_decay, rows_of, take_step, with_own_draws
from examples.common.tuning import Runs
from examples.compare.rows import variants_of
from examples.compare.task import Task

BLOCK = 100  # steps that one call trains at most
BINS = 15  # of the calibration error
BITS = (4, 3)  # to which weights are rounded
RADIUS, ADAPTIVE_RADIUS = 0.2, 0.5  # of the balls in which sharpness is measured
LANCZOS, DRAWS, CLIMBS = 15, 20, 15  # products, random draws, and gradients of those measures
ADAPTIVE = samx.perturbations.magnitude(0.0, is_scaled=lambda path, leaf: True)


class Functions(NamedTuple):
    """Functions of a task's network, the same for all methods; the last three are compiled."""

    logits: Callable[..., Any]  # params, x -> logits; BatchNorm uses this batch
    losses_fn: Callable[..., Any]  # params, batch -> [B]
    parts: dict[str, Callable[..., Any]]  # features_fn, head_fn and loss_on_logits
    init: Callable[..., Any]  # seed -> params
    result: Callable[..., Any]  # params, train, split -> "accuracy", "loss", "calibration_error"
    measure: Callable[..., Any]  # params, train, test -> measures by name


def loss_on_logits(logits: jax.Array, batch: Any) -> jax.Array:
    """Return the cross-entropy of each example; for text, the mean over its tokens."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses.reshape(len(losses), -1).mean(axis=1)


@functools.cache
def make_functions(task: Task) -> Functions:
    """Build the functions of a task's network; they compile once for all methods."""
    model = nnx.eval_shape(lambda: task.network(nnx.Rngs(0)))
    graph, _, statistics_like = nnx.split(model, nnx.Param, ...)

    def merged(params, statistics=None) -> Any:
        is_training = statistics is None
        if is_training:
            statistics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), statistics_like)
        model = nnx.merge(graph, params, statistics)
        model.train() if is_training else model.eval()
        return model

    def logits(params, x):
        model = merged(params)
        return model.head(model.features(x))

    def losses_fn(params, batch):
        return loss_on_logits(logits(params, batch["x"]), batch)

    def frozen(params, x):
        """Return the logits, as a function of parameters and inputs, with BatchNorm frozen."""
        model = merged(params)
        model.features(x)
        _, _, statistics = nnx.split(model, nnx.Param, ...)

        def frozen_logits(params, x):
            model = merged(params, statistics)
            return model.head(model.features(x))

        return frozen_logits

    def result(params, train, split):
        return of_logits(frozen(params, train["x"])(params, split["x"]), split)

    def measure(params, train, test):
        logits_fn = frozen(params, train["x"])
        trained = of_logits(logits_fn(params, train["x"]), train)
        tested = of_logits(logits_fn(params, test["x"]), test)
        found = {
            **{f"train_{name}": trained[name] for name in ("accuracy", "loss")},
            **{f"test_{name}": tested[name] for name in ("accuracy", "loss")},
            "calibration_error": tested["calibration_error"],
        }
        if task.input_noise:
            noise = jax.random.normal(jax.random.key(0), test["x"].shape)
            noisy = logits_fn(params, test["x"] + task.input_noise * noise)
            found["test_loss_input_noise"] = of_logits(noisy, test)["loss"]
        for bits in BITS:
            weights = rounded(params, bits)
            deployed = frozen(weights, train["x"])(weights, test["x"])
            found[f"test_loss_{bits}_bits"] = of_logits(deployed, test)["loss"]
        return found | sharpness(task, logits_fn, params, train)

    def init(seed):
        model = task.network(nnx.Rngs(jax.random.key(seed)))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    parts = {
        "features_fn": lambda params, batch: merged(params).features(batch["x"]),
        "head_fn": lambda params, features: merged(params).head(features),
        "loss_on_logits": loss_on_logits,
    }
    start = jax.jit(init) if task.start is None else task.start
    return Functions(logits, losses_fn, parts, start, jax.jit(result), jax.jit(measure))


def of_logits(logits: jax.Array, split: Any) -> dict[str, jax.Array]:
    """Return accuracy, loss and calibration error on a split, with its weights of examples."""
    count = len(split["y"])
    weights = split.get("weight", jnp.ones(count))
    is_right = (logits.argmax(-1) == split["y"]).reshape(count, -1)
    confidence = jax.nn.softmax(logits).max(axis=-1).reshape(count, -1)
    # Σ over bins |Σ weight (is_right − confidence)| / Σ weight
    gaps = weights[:, None] * (is_right - confidence)
    bins = jnp.clip((confidence * BINS).astype(int), 0, BINS - 1)
    sums = jnp.zeros(BINS).at[bins.reshape(-1)].add(gaps.reshape(-1))
    return {
        "accuracy": jnp.mean(weights * is_right.mean(axis=1)),
        "loss": jnp.mean(weights * loss_on_logits(logits, split)),
        "calibration_error": jnp.abs(sums).sum() / confidence.size,
    }


def sharpness(task: Task, logits_fn: Any, params: Any, train: Any) -> dict[str, jax.Array]:
    """Measure the sharpness of the training loss, on examples in a random order.

    m-sharpness takes shards of neighbours, and some tasks keep examples of a kind together.
    """
    rows = np.random.default_rng(0).permutation(task.num_train)[: task.measured]
    batch = {name: leaf[rows] for name, leaf in train.items()}
    f = samx.sharpness.objective(
        apply_fn=lambda params, batch: logits_fn(params, batch["x"]),
        loss_on_logits=loss_on_logits,
        batch=batch,
    )
    ball = samx.perturbations.metric_ball(RADIUS)
    adaptive = samx.perturbations.metric_ball(ADAPTIVE_RADIUS, ADAPTIVE)
    climb = functools.partial(samx.sharpness.worst_case, f, params, steps=CLIMBS, restarts=1)
    m = min(task.batch, task.measured)
    return {
        "top_eigenvalue": samx.sharpness.eigenvalues(f, params, k=1, iterations=LANCZOS).values[0],
        "trace": samx.sharpness.trace(f, params, draws=DRAWS).mean,
        "worst_case": climb(ball).value,
        "adaptive_worst_case": climb(adaptive).value,
        "m_sharpness": samx.sharpness.m_sharpness(f, params, ball, shard_size=m),
    }


class Trainer(NamedTuple):
    """A method's compiled functions; the number of all steps comes first."""

    init: Callable[..., Any]  # total, run, params -> state
    train: Callable[..., Any]  # total, params, state, run, train, batches, count -> params, state


def make_trainer(task: Task, row: str) -> Trainer:
    """Compile the training of a method on a task."""
    functions = make_functions(task)
    variant = variants_of(task)[row]
    like = {
        name: jax.ShapeDtypeStruct((task.batch, *leaf.shape[1:]), leaf.dtype)
        for name, leaf in task.data(0).train.items()
    }
    logits_like = jax.eval_shape(functions.logits, functions.init(0), like["x"])
    setting = Setting(
        like,
        batch_size=task.batch,
        num_examples=task.num_train,
        logits=jax.ShapeDtypeStruct(logits_like.shape[1:], logits_like.dtype),
    )

    def optimizer(total, run):
        schedule = cosine_decay(run.learning_rate, total)
        here = setting._replace(learning_rate=schedule)
        return optax.with_extra_args_support(
            variant.make(run.rho, BASES[task.base](schedule), here)
        )

    def init(total, run, params):
        return with_own_draws(optimizer(total, run).init(params), run.seed)

    def train(total, params, state, run, data, batches, count):
        tx, (logits, losses_fn, parts, *_) = optimizer(total, run), functions

        def step(i, carry):
            params, state = carry
            batch = rows_of(data, batches[i])
            return take_step(tx, logits, losses_fn, parts, params, state, batch)

        return jax.lax.fori_loop(0, count, step, (params, state))

    return Trainer(jax.jit(init), jax.jit(train))


@functools.lru_cache(maxsize=64)
def batches_of(task: Task, seed: int, steps: int) -> np.ndarray:
    """Return the batches of a run, as numbers of training examples [steps, batch]."""
    rng = np.random.default_rng((2, seed))
    size = task.steps_per_epoch * task.batch
    epochs = math.ceil(steps / task.steps_per_epoch)
    orders = [rng.permutation(task.num_train)[:size] for _ in range(epochs)]
    return np.concatenate(orders).reshape(-1, task.batch)[:steps].astype(np.int32)


def train_run(task: Task, trainer: Trainer, run: Runs, steps: int) -> tuple[Any, Any]:
    """Train one run; return the final parameters and the state of the optimizer."""
    params = make_functions(task).init(int(run.seed))
    state = trainer.init(steps, run, params)
    data, batches = task.data(int(run.seed)).train, batches_of(task, int(run.seed), steps)
    for first in range(0, steps, BLOCK):
        block = batches[first : first + BLOCK]
        padded = np.concatenate([block, np.zeros((BLOCK - len(block), task.batch), np.int32)])
        params, state = trainer.train(steps, params, state, run, data, padded, len(block))
    return params, state


def spent_by(state: Any, steps: int) -> float:
    """Return the gradients that a run spent; an optimizer without readings spends one per step."""
    spent = optax.tree.get(state, "gradients_spent")
    return float(steps if spent is None else spent)
