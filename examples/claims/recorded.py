"""Trainings of the digits with the weights of every step, and the gradients along them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

import samx
from examples.common.digits_task import rows_of, shuffled
from examples.common.registry import VARIANTS
from examples.common.training import (
    data_of,
    loss_on_logits,
    make_functions,
    make_trainer,
    row_of,
    start_of,
)
from examples.common.tuning import Runs, runs_of

LAGS = 10  # steps back, for the cosine with the past
KEPT = {"sampa": "g_y", "friendly-sam": "average"}  # what is kept of the state, beside the weights


class Net(NamedTuple):
    """The functions of a network whose parameters are one vector: programs compile much faster."""

    logits: Callable[..., Any]  # params, x -> logits
    losses_fn: Callable[..., Any]  # params, batch -> the loss of each example
    loss_on_logits: Callable[..., Any]  # logits, batch -> the same


class Recorded(NamedTuple):
    """A training.

    Attributes:
        images: The training images.
        batches: Rows of the images, int[steps, batch].
        weights: [steps + 1, P], before the first step and after each one.
        kept: [steps, P], the entry of the state after each step that `KEPT` names, or `None`.
    """

    images: dict[str, jax.Array]
    batches: jax.Array
    weights: jax.Array
    kept: Any


def flat(tree: Any) -> jax.Array:
    """Return all numbers of a tree as a vector."""
    return ravel_pytree(tree)[0]


@functools.cache
def tree_of(width: int) -> Callable[[Any], Any]:
    """Return the function that makes parameters of a vector."""
    return ravel_pytree(start_of(0, width))[1]


@functools.cache
def functions_of(width: int) -> Net:
    """Return the functions of the digits' network."""
    net, tree = make_functions(width), tree_of(width)
    return Net(
        lambda w, x: net.logits(tree(w), x),
        lambda w, batch: net.losses_fn(tree(w), batch),
        loss_on_logits,
    )


@functools.cache
def recorder(row: str, width: int, epochs: int) -> Callable[..., Any]:
    """Return the compiled training of a row of the registry."""
    trainer = make_trainer(VARIANTS[row], "momentum", width, epochs)

    @jax.jit
    def record(run, params, images, batches):
        def body(carry, rows):
            params, state = trainer.step(*carry, run, rows_of(images, rows))
            kept = optax.tree.get(state, KEPT[row]) if row in KEPT else ()
            return (params, state), (flat(params), flat(kept))

        _, (weights, kept) = jax.lax.scan(body, (params, trainer.init(run, params)), batches)
        return jnp.concatenate([flat(params)[None], weights]), kept

    return record


@functools.partial(jax.jit, static_argnums=1)
def all_batches(seed: Any, epochs: int) -> jax.Array:
    """Return the batches of a training, [steps, batch]."""
    batches = jax.lax.map(functools.partial(shuffled, seed), jnp.arange(epochs))
    return batches.reshape(-1, batches.shape[-1])


def record(
    row: str, seed: int, learning_rate: float, rho: float, noise: float, width: int, epochs: int
) -> Recorded:
    """Train one run and keep its weights."""
    images, batches = data_of(seed, noise)[0], all_batches(seed, epochs)
    run = row_of(Runs(*runs_of([seed], [(learning_rate, rho)])), 0)
    weights, kept = recorder(row, width, epochs)(run, start_of(seed, width), images, batches)
    return Recorded(jax.device_put(images), batches, weights, kept)


@functools.partial(jax.jit, static_argnums=2)
def along(recorded: Recorded, rho: Any, width: int) -> dict[str, jax.Array]:
    """Measure the gradients of a training at each step, without changing it.

    g is the gradient of the step's batch, g_s SAM's, and h = g_s − g.

    Returns:
        "norm", "change", "ratio": ‖g‖, ‖h‖ and ‖h‖ / ‖g‖ of each step. "successive", "same",
        "other": the cosine of g with that of the step before; with that of the same batch at the
        weights of the step before; with that of the batch before at the same weights. "lag_g",
        "lag_part": the mean cosine of g, and of the part of g_s orthogonal to g, with its own past,
        1 to `LAGS` steps ago.
    """
    losses_fn, sam = functions_of(width).losses_fn, samx.sam(rho)

    def loss(w, rows):
        return losses_fn(w, rows_of(recorded.images, rows)).mean()

    gradient = jax.grad(loss)

    def of_step(inputs):
        w, w_before, rows, rows_before = inputs
        g = gradient(w, rows)
        g_s, _ = sam.update(g, sam.init(w), w, value_fn=lambda w: loss(w, rows))
        return g, g_s, gradient(w_before, rows), gradient(w, rows_before)

    def before(x):
        return jnp.concatenate([x[:1], x[:-1]])

    w, rows = recorded.weights[:-1], recorded.batches
    g, g_s, older, other = jax.lax.map(of_step, (w, before(w), rows, before(rows)))
    share = jnp.sum(g * g_s, axis=1) / jnp.sum(g * g, axis=1)
    norm, change = (jnp.linalg.norm(x, axis=1) for x in (g, g_s - g))
    return {
        "norm": norm,
        "change": change,
        "ratio": change / norm,
        "successive": cosines(g[1:], g[:-1]),
        "same": cosines(g, older)[1:],
        "other": cosines(g, other)[1:],
        "lag_g": with_past(g),
        "lag_part": with_past(g_s - share[:, None] * g),
    }


def cosines(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the cosines of the rows of two matrices."""
    lengths = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.sum(a * b, axis=-1) / lengths


def with_past(x: jax.Array) -> jax.Array:
    """Return the mean cosine of the rows with those 1, 2, ..., `LAGS` rows before."""
    return jnp.stack([cosines(x[lag:], x[:-lag]).mean() for lag in range(1, LAGS + 1)])


@functools.partial(jax.jit, static_argnums=1)
def trial_points(recorded: Recorded, width: int) -> jax.Array:
    """Return the cosine of the gradient at SAMPa's y with that at w, the same batch, each step.

    The first step is left out: there y is w.
    """
    losses_fn = functions_of(width).losses_fn

    def of_step(inputs):
        w, rows, g_y = inputs
        batch = rows_of(recorded.images, rows)
        g = jax.grad(lambda w: losses_fn(w, batch).mean())(w)
        return cosines(g, g_y)

    inputs = recorded.weights[:-1], recorded.batches, recorded.kept
    return jax.lax.map(of_step, inputs)[1:]


@functools.partial(jax.jit, static_argnums=2)
def along_momentum(recorded: Recorded, rho: Any, width: int) -> dict[str, jax.Array]:
    """Compare Momentum-SAM's step ε = −ρ v / ‖v‖ with the gradient of the batch, at each step.

    The base is SGD with momentum, so −v is the direction of the last step.

    Returns:
        "cosine" of ε and g, "rise" of the batch's loss from w to w + ε, and "slope" ⟨g, ε⟩.
    """
    losses_fn, ball = functions_of(width).losses_fn, samx.perturbations.metric_ball(rho)

    def of_step(inputs):
        before, w, rows = inputs
        batch = rows_of(recorded.images, rows)
        value, g = jax.value_and_grad(lambda w: losses_fn(w, batch).mean())(w)
        eps: Any = ball.update(w - before, ball.init(w), w)[0]
        return {
            "cosine": cosines(eps, g),
            "rise": losses_fn(w + eps, batch).mean() - value,
            "slope": jnp.vdot(eps, g),
        }

    inputs = recorded.weights[:-2], recorded.weights[1:-1], recorded.batches[1:]
    return jax.lax.map(of_step, inputs)
