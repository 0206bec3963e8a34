"""Short trainings that are compared with one another, in float64."""

import functools

import chex
import jax
import numpy as np
import optax
import problem

import samx

STEPS = 14

MOMENTUM = optax.sgd(0.1, momentum=0.9)


def assert_same(a, b, atol=1e-10):
    """Compare trajectories: two programs that do the same may round differently."""
    chex.assert_trees_all_close(a, b, rtol=0, atol=atol)


def ball_step(ball, g, params):
    return ball.update(g, ball.init(params), params)[0]


@functools.cache
def gradient():
    """Return the gradient of the first batch, and the parameters."""
    data, params = problem.make()
    batch = problem.batch_at(data, 0)
    return jax.jit(jax.grad(lambda p: problem.losses_fn(p, batch).mean()))(params), params


def batch_like():
    return problem.batch_at(problem.make()[0], 0)


@functools.cache
def trained(make, steps=STEPS):
    return problem.train(optax.chain(make(), MOMENTUM), steps)


def runner(build):
    """Compile the step of `build(**numbers)`; return a function of the numbers that trains."""

    @jax.jit
    def step(params, state, batch, numbers):
        return problem.make_step(build(**numbers))(params, state, batch)

    def run(steps=STEPS, **numbers):
        data, params = problem.make()
        state, trajectory = build(**numbers).init(params), []
        for t in range(steps):
            params, state = step(params, state, problem.batch_at(data, t), numbers)
            trajectory.append(params)
        return jax.tree.map(lambda *leaves: np.stack(leaves), *trajectory)

    return run


def sam():
    return samx.sam(0.2)
