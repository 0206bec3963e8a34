"""Training with `pipelined` that stops keeps its last step, and continues from it."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samx

BEFORE, STEPS = 3, 5  # steps before training stops, and in all
PARAMS = {"w": jnp.array([1.0, -2.0])}
TX = optax.chain(samx.async_sam(0.1), optax.adam(0.1))


def loss(params, x):
    return jnp.mean((x @ params["w"] - 1.0) ** 2)


def descend(params, state, x, ascent_grad):
    updates, state = TX.update(ascent_grad, state, params, value_fn=lambda p: loss(p, x))
    return optax.apply_updates(params, updates), state, None


def pipeline(pairs, params=PARAMS, state=None):
    state = TX.init(params) if state is None else state
    one, other = jax.devices()[:2]
    devices = {"descent_device": one, "ascent_device": other}
    return samx.asynchronous.pipelined(descend, jax.grad(loss), params, state, pairs, **devices)


def pairs(first=0):
    batches = np.random.default_rng(0).normal(size=(STEPS, 4, 2)).astype(np.float32)
    return [(x, x[:2]) for x in batches[first:]]


def copied(step):
    return jax.tree.map(np.array, (step.params, step.opt_state))


@functools.cache
def uninterrupted():
    return [copied(step) for step in pipeline(pairs())]


class Preempted(BaseException):
    pass


def fails(error):
    raise error
    yield


WIDE = np.ones((4, 3), np.float32)  # the loss cannot take it: tracing fails


@pytest.mark.parametrize(
    ("then", "error"),
    [
        (fails(OSError("disk")), OSError),
        (fails(Preempted()), Preempted),
        ([np.ones(2)], TypeError),
        ([(WIDE, np.ones((2, 2)))], TypeError),
        ([(np.ones((4, 2)), WIDE)], TypeError),
    ],
    ids=["error", "signal", "no pair", "descend", "ascend"],
)
def test_what_fails_leaves_the_last_step(then, error):
    steps = pipeline(itertools.chain(pairs()[:BEFORE], then))
    *_, last = itertools.islice(steps, BEFORE)
    with pytest.raises(error):
        next(steps)
    chex.assert_trees_all_equal(copied(last), uninterrupted()[BEFORE - 1])


def test_training_continues_from_the_last_step():
    steps = pipeline(pairs())
    *_, last = itertools.islice(steps, BEFORE)
    steps.close()
    continued = [copied(step) for step in pipeline(pairs(BEFORE), last.params, last.opt_state)]
    chex.assert_trees_all_equal(continued, uninterrupted()[BEFORE:])
