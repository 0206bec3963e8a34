"""Short trainings that are compared with one another, in float64."""

import functools

import chex
import jax
import optax
import problem

import samx

STEPS = 8

MOMENTUM = optax.sgd(0.1, momentum=0.9)


def assert_same(a, b, atol=1e-12):
    """Two programs that do the same may round differently on another processor."""
    chex.assert_trees_all_close(a, b, rtol=0, atol=atol)


def ball_step(ball, g, params):
    return ball.update(g, ball.init(params), params)[0]


def gradient():
    data, params = problem.make()
    batch = problem.batch_at(data, 0)
    return jax.grad(lambda p: problem.losses_fn(p, batch).mean())(params), params


def batch_like():
    return problem.batch_at(problem.make()[0], 0)


@functools.cache
def trained(make, steps=STEPS):
    return problem.train(optax.chain(make(), MOMENTUM), steps)


def sam():
    return samx.sam(0.2)
