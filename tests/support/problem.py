"""The tiny float64 problem on which every trajectory was recorded, and how to train on it."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

STEPS, BATCH_SIZE = 12, 16
TRAJECTORIES = Path(__file__).parent / "trajectories"


@functools.cache
def drawn():
    """The numbers of `make`, drawn once."""
    rng = np.random.RandomState(0)
    x = rng.randn(64, 10)
    y = np.argmax(x @ rng.randn(10, 3) + 0.5 * rng.randn(64, 3), axis=1)
    params = {
        "W1": 0.5 * rng.randn(10, 16),
        "b1": 0.1 * rng.randn(16),
        "W2": 0.5 * rng.randn(16, 3),
        "b2": 0.1 * rng.randn(3),
    }
    return x, y, params


def make(dtype=np.float64):
    """64 examples of 3 classes, and the parameters of a 10-16-3 tanh network, in new buffers.

    All dtypes are given: without one, a NumPy array that JAX saw in float64 gives int64 again.
    """
    x, y, params = drawn()
    params = {name: jnp.array(value, dtype) for name, value in params.items()}
    return {"x": jnp.array(x, dtype), "y": jnp.array(y, jnp.result_type(int))}, params


def make_layer_norm():
    """The same with a LayerNorm (scale `g`, shift `c`) between the first layer and its tanh."""
    data, params = make()
    rng = np.random.RandomState(1)
    return data, params | {"g": 1 + 0.1 * jnp.asarray(rng.randn(16)), "c": 0.1 * rng.randn(16)}


def batch_at(data, step):
    start = (step % 4) * BATCH_SIZE
    return jax.tree.map(lambda leaf: leaf[start : start + BATCH_SIZE], data)


def losses_fn(params, batch):
    return cross_entropy(logits_of(params, batch), batch["y"])


def logits_of(params, batch):
    return head_on(params, features_of(params, batch))


def features_of(params, batch):
    hidden = batch["x"] @ params["W1"] + params["b1"][None]
    if "g" in params:
        hidden = jax.nn.standardize(hidden, epsilon=1e-5) * params["g"][None] + params["c"][None]
    return jnp.tanh(hidden)


def head_on(params, features):
    return features @ params["W2"] + params["b2"][None]


losses_fn.logits_of, losses_fn.features_of, losses_fn.head_on = logits_of, features_of, head_on


def loss_on_logits(logits, batch):
    return cross_entropy(logits, batch["y"])


def cross_entropy(logits, labels):
    """optax's, for logits of moderate size; a fifth of a step's compilation cheaper."""
    is_label = labels[:, None] == jnp.arange(logits.shape[1])[None]
    return jnp.log(jnp.exp(logits).sum(1)) - jnp.where(is_label, logits, 0).sum(1)


def further(batch, losses_fn=losses_fn, weights=None):
    """The keywords that only some rows need, such as another loss to climb and a held-out loss."""
    held_out = batch | {"x": 0.8 * batch["x"]}
    return {
        "index": jnp.arange(len(batch["y"])),
        "labels": batch["y"],
        **in_two_parts(losses_fn),
        "ascent_fn": lambda params: weighted(losses_of(losses_fn, params, batch) ** 2, weights),
        "training_fn": lambda params: weighted(losses_of(losses_fn, params, batch), weights),
        "validation_fn": lambda params: weighted(losses_of(losses_fn, params, held_out), weights),
    }


def in_two_parts(losses_fn):
    """The losses as `apply_fn` and `loss_on_logits`, and as features and a head.

    Losses without the attribute `logits_of` become "logits" themselves, and features of a head that
    only reads its parameters.
    """
    logits_of = getattr(losses_fn, "logits_of", None)
    if hasattr(losses_fn, "features_of"):
        parts = {"features_fn": losses_fn.features_of, "head_fn": losses_fn.head_on}
        return parts | {"apply_fn": logits_of, "loss_on_logits": loss_on_logits}

    def apply_fn(params, batch):
        if logits_of:
            return logits_of(params, batch)
        result = losses_fn(params, batch)
        losses = result[0] if isinstance(result, tuple) else result
        logits = jnp.stack([losses, -losses, 0 * losses], axis=1)
        return (logits, result[1]) if isinstance(result, tuple) else logits

    def head_fn(params, logits):
        read = (w.real.sum().astype(logits.dtype) for w in jax.tree.leaves(params) if w.ndim > 1)
        return logits + 0 * sum(read)

    parts = {"features_fn": apply_fn, "head_fn": head_fn}
    of_losses = loss_on_logits if logits_of else lambda logits, batch: logits[:, 0]
    return parts | {"apply_fn": apply_fn, "loss_on_logits": of_losses}


def losses_of(losses_fn, params, batch):
    losses = losses_fn(params, batch)
    return losses[0] if isinstance(losses, tuple) else losses


def weighted(losses, weights):
    return losses.mean() if weights is None else (losses * weights).sum() / weights.sum()


def make_step(tx, losses_fn=losses_fn, **keywords):
    """Make the contract's step function, which is the same for every variant."""

    def step(params, state, batch):
        def value_fn(params):
            return losses_fn(params, batch).mean()

        value, grads = jax.value_and_grad(value_fn)(params)
        grads = jax.tree.map(jnp.conj, grads)  # changes complex leaves only
        updates, state = tx.update(
            grads,
            state,
            params,
            value=value,
            grad=grads,
            value_fn=value_fn,
            losses_fn=losses_fn,
            batch=batch,
            **further(batch, losses_fn) | keywords,
        )
        return optax.apply_updates(params, updates), state

    return step


def train(tx, steps=STEPS, problem=make, losses_fn=losses_fn):
    """Return the parameters after every step, one array [steps, ...] for each name."""
    data, params = problem()
    step, state, trajectory = jax.jit(make_step(tx, losses_fn)), tx.init(params), []
    for t in range(steps):
        params, state = step(params, state, batch_at(data, t))
        trajectory.append(params)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trajectory)


def as_numbers(tree):
    """Replace random keys by their integers, so that trees can be compared."""

    def number(x):
        is_key = jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    return jax.tree.map(number, tree)


def load(name):
    """Load a recorded trajectory and the metadata of its file."""
    with np.load(TRAJECTORIES / f"{name}.npz") as file:
        meta = json.loads(str(file["meta"]))
        return {key: file[key] for key in file.files if key != "meta"}, meta
