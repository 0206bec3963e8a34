"""A small GPT in training, and how much of SAM's change of its gradient comes from the logits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree

from examples.claims import frozen
from examples.claims.recorded import Net, flat
from examples.common.digits_task import rows_of
from examples.common.gpt import losses_of
from examples.common.training import cosine_decay
from examples.compare import language

RADII = (0.05, 0.2)
TASK = language.TASKS["language"]


def loss_on_logits(logits: jax.Array, batch: Any) -> jax.Array:
    return losses_of(logits, batch["y"])


def start_of(key: Any) -> Any:
    """Return the initial parameters, a tree."""
    return nnx.state(TASK.network(nnx.Rngs(key)), nnx.Param)


@functools.cache
def network() -> Net:
    """Return the functions of the model, of parameters that are one vector."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: TASK.network(nnx.Rngs(0))))
    shapes = jax.eval_shape(start_of, jax.random.key(0))
    _, tree = ravel_pytree(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes))

    def logits(params, x):
        return nnx.merge(graph, tree(params))(x)

    def losses_fn(params, batch):
        return loss_on_logits(logits(params, batch["x"]), batch)

    return Net(logits, losses_fn, loss_on_logits)


def batches_of(seed: int, epochs: int) -> np.ndarray:
    """Return the batches of a training, [epochs, steps, batch]; every epoch has its own order."""
    rng, shape = np.random.default_rng(seed), (TASK.steps_per_epoch, TASK.batch)
    orders = [rng.permutation(TASK.num_train) for _ in range(epochs)]
    return np.stack([order[: np.prod(shape)].reshape(shape) for order in orders])


@jax.jit
def train(key: Any, images: Any, batches: Any) -> Any:
    """Train with AdamW; return the parameters after each epoch, [epochs, P]."""
    net, params = network(), flat(start_of(key))
    tx = optax.adamw(cosine_decay(TASK.learning_rate, batches.shape[0] * batches.shape[1]))

    def step(carry, rows):
        params, state = carry
        batch = rows_of(images, rows)
        g = jax.grad(lambda p: net.losses_fn(p, batch).mean())(params)
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry, rows):
        carry, _ = jax.lax.scan(step, carry, rows)
        return carry, carry[0]

    return jax.lax.scan(epoch, (params, tx.init(params)), batches)[1]


@jax.jit
def shares(params: Any, images: Any, batches: Any) -> jax.Array:
    """Return the share of the path through the logits, [checkpoints, radii]: means over batches."""
    net = network()

    def of_checkpoint(inputs):
        params, rows = inputs

        def of_batch(rows):
            batch = rows_of(images, rows)
            places = (frozen.place_of(net, params, batch, rho) for rho in RADII)
            return jnp.stack([frozen.paths(place)["logit_share"] for place in places])

        return jax.lax.map(of_batch, rows).mean(axis=0)

    return jax.lax.map(of_checkpoint, (params, batches))


def of_seed(seed: int, checkpoints: tuple[int, ...], searched: int) -> np.ndarray:
    """Train a GPT, and return the shares at the checkpoints, [checkpoints, radii]."""
    images = jax.device_put(TASK.data(seed).train)
    batches = batches_of(seed, checkpoints[-1] + 1)
    params = train(jax.random.key(seed), images, batches[:-1])
    there = params[np.array(checkpoints) - 1]
    return np.asarray(shares(there, images, batches[list(checkpoints), :searched]))
