"""Short trainings that are compared with one another, in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
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


def one_layer(params, batch):
    return problem.cross_entropy(one_layer.logits_of(params, batch), batch["y"])


one_layer.logits_of = lambda params, batch: batch["x"] @ params["W"] + params["b"][None]


def assert_same_updates(pairs, tolerance=1e-10, steps=STEPS, layers=1):
    """Compare the updates of each pair at every step of one training, in one program.

    All take the steps of the first pair: while the pairs agree, this is everyone's own training.
    A network of one layer has half the leaves of one with two, and compiles in two thirds of the
    time.
    """
    makes = dict.fromkeys(make for pair in pairs.values() for make in pair)
    txs = {make: optax.with_extra_args_support(make()) for make in makes}
    leader = next(iter(pairs.values()))[1]
    data, params = problem.make()
    losses_fn = problem.losses_fn
    if layers == 1:
        losses_fn, params = one_layer, {"W": params["W1"][:, :3], "b": params["b2"]}

    @jax.jit
    def start(params):
        return [tx.init(params) for tx in txs.values()]

    @jax.jit
    def step(params, momentum, states, batch):
        def value_fn(params):
            return losses_fn(params, batch).mean()

        value, g = jax.value_and_grad(value_fn)(params)
        closures = {"value_fn": value_fn, "losses_fn": losses_fn, "batch": batch}
        closures |= {"value": value, **problem.further(batch, losses_fn)}
        found, after = zip(
            *(
                tx.update(g, state, params, **closures)
                for tx, state in zip(txs.values(), states, strict=True)
            ),
            strict=True,
        )
        found = dict(zip(txs, found, strict=True))
        apart = {
            name: optax.tree.norm(optax.tree.sub(*(found[make] for make in pair)), ord=jnp.inf)
            for name, pair in pairs.items()
        }
        updates, momentum = MOMENTUM.update(found[leader], momentum, params)
        return optax.apply_updates(params, updates), momentum, [*after], apart

    carry = params, MOMENTUM.init(params), start(params)
    for t in range(steps):
        *carry, apart = step(*carry, problem.batch_at(data, t))
        assert {name: x for name, x in apart.items() if not x <= tolerance} == {}, t
