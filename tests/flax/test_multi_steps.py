"""`optax.MultiSteps` in a `TrainState`, around the optimizer and around its base; `accumulate`.

By hand, with k microbatches:

    MultiSteps around SAM and base    climb the mean gradient, descend on the last microbatch alone
    MultiSteps around the base        climb each microbatch, descend on the mean of sharp gradients
    accumulate around SAM and base    climb the mean gradient, descend on the whole batch: SAM
"""

import hand
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest

import samx
import samx.flax

pytestmark = pytest.mark.usefixtures("float64")

RHO, STEPS = 0.3, 3
SAM, SGD = samx.sam(RHO), optax.sgd(0.1, momentum=0.9)
losses_fn = jax.jit(problem.losses_fn)


@jax.jit
def grad(params, batch):
    return jax.grad(lambda params: losses_fn(params, batch).mean())(params)


def mean_grad(params, pieces):
    gradients = [grad(params, piece) for piece in pieces]
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *gradients)


def last_alone(params, pieces):
    return grad(hand.add(params, hand.on_sphere(RHO, mean_grad(params, pieces))), pieces[-1])


def each_climbed(params, pieces):
    sharp = [hand.sam_gradient(lambda w, x=piece: grad(w, x), params, RHO) for piece in pieces]
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *sharp)


def whole(params, pieces):
    return hand.sam_gradient(lambda w: mean_grad(w, pieces), params, RHO)


def by_hand(gradient, num_pieces):
    """Yield the parameters after each optimizer step of SGD with momentum."""
    params = problem.make()[1]
    buffer = jax.tree.map(jnp.zeros_like, params)
    for t in range(STEPS):
        buffer = hand.add(gradient(params, pieces_at(t, num_pieces)), buffer, 0.9)
        params = hand.add(params, buffer, -0.1)
        yield params


def pieces_at(t, num_pieces):
    batch = problem.batch_at(problem.make()[0], t)
    return [jax.tree.map(lambda x, i=i: x[i::num_pieces], batch) for i in range(num_pieces)]


def create(tx):
    return samx.flax.TrainState.create(apply_fn=None, params=problem.make()[1], tx=tx)


@jax.jit
def apply_gradients(state, grads, batch):
    """Compiled: outside of a program, `MultiSteps` would compile its branch in every call."""
    return state.apply_gradients(grads=grads, losses_fn=losses_fn, batch=batch)


def multi_steps(tx, num_pieces):
    return optax.MultiSteps(tx, num_pieces, accumulator_dtype=float)


AROUND = {
    "the optimizer": (lambda k: multi_steps(optax.chain(SAM, SGD), k), last_alone),
    "the base": (
        lambda k: optax.chain(SAM, multi_steps(SGD, k).gradient_transformation()),
        each_climbed,
    ),
}


@pytest.mark.parametrize("num_pieces", [1, 2])
@pytest.mark.parametrize("around", AROUND)
def test_one_microbatch_per_call(around, num_pieces):
    build, gradient = AROUND[around]
    state, found = create(build(num_pieces)), []
    for t in range(STEPS):
        before = state.params
        for piece in pieces_at(t, num_pieces):
            np.testing.assert_array_equal(state.params["W1"], before["W1"])  # not yet
            grads = grad(state.params, piece)
            state = apply_gradients(state, grads, piece)
        found.append(state.params)
    hand.assert_same(found, by_hand(gradient, num_pieces))
    assert state.step == STEPS * num_pieces


@pytest.mark.parametrize("num_pieces", [1, 2])
def test_accumulate_takes_all_microbatches_in_a_call(num_pieces):
    state, found = create(samx.accumulate(optax.chain(SAM, SGD), num_pieces)), []
    for t in range(STEPS):
        batch = problem.batch_at(problem.make()[0], t)
        state = apply_gradients(state, state.params, batch)
        found.append(state.params)
    hand.assert_same(found, by_hand(whole, num_pieces))
    assert state.step == STEPS


def test_these_are_three_algorithms():
    params, pieces = problem.make()[1], pieces_at(0, 2)
    kernels = [f(params, pieces)["W1"] for f in (last_alone, each_climbed, whole)]
    for i in range(3):
        assert np.abs(kernels[i] - kernels[i - 1]).max() > 1e-3
