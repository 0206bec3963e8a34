"""Steps that compute in half precision, with overflows that the batch causes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from cases import VARIANTS

import samx

# Rows that differ in how they take their passes.
every_program = pytest.mark.parametrize(
    "name",
    ["sam", "two ascent steps", "sampa", "looksam", "momentum_sam", "esam", "sl_sam", "msam"],
)

# Rows that differ in what they compute from the passes.
every_arithmetic = pytest.mark.parametrize(
    "name", ["sam", "sampa", "looksam", "esam", "msam", "gsam"]
)

needs_float16 = pytest.mark.usefixtures("float16")
SAM = optax.chain(samx.sam(0.05), optax.sgd(0.1))
OVERFLOW = {"forward": (1e5, 1), "backward": (1, 2.0**24)}  # float16 ends at 65504
A_GROUP = slice(4, 6)  # examples; every selection takes one of them


def assert_close(a, b, rtol=1e-5, atol=1e-7):
    chex.assert_trees_all_close(*map(problem.as_numbers, (a, b)), rtol=rtol, atol=atol)


assert_same = functools.partial(assert_close, rtol=0, atol=0)  # to the last bit

WRAPPERS = {
    "none": lambda tx: tx,
    "skip": samx.skip_nonfinite,
    "scale": samx.scale_loss,
    "scale, accumulate": lambda tx: samx.scale_loss(samx.accumulate(tx, 4)),
}


@functools.cache
def tiny(dtype):
    """Return the data and the parameters of one layer of the tiny problem, as NumPy arrays."""
    data, params = jax.tree.map(np.asarray, problem.make(dtype))
    return data, {k: params[k] for k in ("W1", "b1")}


def start(dtype=np.float32):
    return jax.tree.map(jnp.asarray, tiny(dtype)[1])


def batch_at(step, dtype=np.float32, example=slice(None), **factors):
    """Return a batch with factors of its activations and its losses in each kind of pass.

    `clean=(activations, losses)`, `sharp=(activations, losses)`; for one `example`, or all.
    """
    batch = problem.batch_at(tiny(dtype)[0], step)
    for kind in ("clean", "sharp"):
        batch[kind] = np.ones((problem.BATCH_SIZE, 2), dtype)
        batch[kind][example] = factors.get(kind, 1)
    return jax.tree.map(jnp.asarray, batch)


def losses_in(dtype):
    """Return the losses, computed in `dtype` whatever the dtype of the parameters is."""

    def losses_fn(params, batch):
        params, x = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, batch["x"]))
        activations, losses = batch["sharp" if samx.is_sharp_pass() else "clean"].T
        logits = jnp.tanh(x @ params["W1"] + params["b1"][None])
        logits = logits * activations.astype(dtype)[:, None]
        logits = logits.astype(jnp.promote_types(dtype, jnp.float32))
        return losses * optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    return losses_fn


@functools.cache
def program(name, wrapper, dtype):
    """Make an optimizer and its step, one program for all tests: the batch causes the overflow."""
    tx = WRAPPERS[wrapper](VARIANTS[name].build(batch_like=batch_at(0)))
    return tx, jax.jit(problem.make_step(tx, losses_in(dtype)))


def train(name, wrapper, dtype, batches, **state):
    """Return `(params, state)` before the first step and after each step."""
    tx, step = program(name, wrapper, dtype)
    params = start()
    history = [(params, optax.tree.set(tx.init(params), **state))]
    for batch in batches:
        history.append(step(*history[-1], batch))
    assert signature(history[-1]) == signature(history[0])
    assert step._cache_size() == 1
    return history


@functools.cache
def four_steps(name, wrapper, dtype):
    return train(name, wrapper, dtype, [batch_at(t) for t in range(4)])


def signature(tree):
    """Return shapes and dtypes. If they change between steps, the program is compiled again."""
    return jax.tree.map(lambda x: (jnp.shape(x), x.dtype, jax.typeof(x).weak_type), tree)


def distance(a, b):
    return float(optax.tree.norm(optax.tree.sub(a, b)))


def roundings(name, state):
    """Count the roundings: LookSAM scales g_v, with its rounding error, by α ‖g‖ / ‖g_v‖."""
    if name != "looksam":
        return 2
    return 2 + VARIANTS[name].hyper["alpha"] / float(optax.tree.get(state, "part_ratio"))


def assert_skipped(state, before):
    """Check that one step was skipped, and that moments, schedules, examples and readings stay."""
    assert_same(state.inner.inner, before.inner.inner)
    assert float(state.loss_scale) == float(before.loss_scale) / 2
    assert int(state.inner.skipped_steps) == int(before.inner.skipped_steps) + 1
    assert int(state.inner.skipped_in_a_row) == int(before.inner.skipped_in_a_row) + 1
    assert int(state.finite_steps) == 0


def infinite_gradient(w):
    """A loss of 2e5 with a gradient of 1e5, in float16: infinite, not NaN."""
    return 1e5 * w.astype(jnp.float16).sum().astype(jnp.float32)
