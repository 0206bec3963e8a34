"""Elastic averaging inside one program: all workers exchange at once, along a mapped axis."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import reference
import regimes
from elastic_runs import SHARP, compiled_step, gradient, make_step, simulated
from jax.sharding import PartitionSpec as P

import samx
from samx import elastic

pytestmark = pytest.mark.usefixtures("float64")


STEPS = 7  # two whole periods of three steps, and one step more


def synchronous(regime, tx, num_workers):
    """Run `tx` with workers along a mapped axis; return the center and the workers at the end."""
    data, params = problem.make()
    step = without_loss(make_step(tx))
    params = jax.tree.map(lambda x: np.stack([x] * num_workers), params)
    state = jax.jit(jax.vmap(tx.init))(params)
    if regime == "vmap":
        step = jax.jit(functools.partial(jax.vmap, axis_name="worker")(step))
    elif regime == "pmap":
        step = jax.pmap(step, axis_name="worker")
    else:
        step = on_mesh(step, regimes.mesh_of((num_workers,), ("worker",)), False)
    for t in range(STEPS):
        batches = [problem.batch_at(data, t * num_workers + i) for i in range(num_workers)]
        params, state = step(params, state, jax.tree.map(lambda *x: np.stack(x), *batches))
    centers, params = jax.tree.map(np.asarray, (optax.tree.get(state, "center"), params))
    first, last = (jax.tree.map(lambda x, i=i: x[i], centers) for i in (0, -1))
    # Every device runs the same program; `vmap` may compute its first and last row differently.
    chex.assert_trees_all_close(first, last, rtol=0, atol=1e-12 if regime == "vmap" else 0)
    return jax.tree.map(lambda x: x[0], centers), params


def without_loss(step):
    return lambda *args: step(*args)[:2]


def on_mesh(step, mesh, check_vma):
    def own(params, state, batch):
        first = functools.partial(jax.tree.map, lambda x: x[0])
        return jax.tree.map(lambda x: x[None], step(first(params), first(state), first(batch)))

    spec = P("worker")
    return jax.jit(
        jax.shard_map(own, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
    )


def synchronous_loop(num_workers, beta, period, rho, momentum, exchange):
    """All workers exchange at once; "after" as in Leader SGD: first the mean, then both pulls."""
    data, z = problem.make()
    z = {k: np.asarray(x) for k, x in z.items()}
    w = [dict(z) for _ in range(num_workers)]
    bases = [reference.SGD(0.1, momentum) for _ in range(num_workers)]
    for t in range(STEPS):
        stepped = []
        for i in range(num_workers):
            batch = problem.batch_at(data, t * num_workers + i)
            g = gradient(w[i], batch)
            eps = reference.ball(rho)(w[i], g)
            g = gradient({k: w[i][k] + eps[k] for k in g}, batch) if rho else g
            stepped.append(bases[i].step(w[i], g))
        seen, is_due = (
            (w, t % period == 0) if exchange == "before" else (stepped, (t + 1) % period == 0)
        )
        w = stepped
        if is_due:
            mean = {k: sum(x[k] for x in seen) / num_workers for k in z}
            alpha = beta / num_workers
            w = [
                {k: s[k] - alpha * (x[k] - z[k]) for k in z}
                for s, x in zip(stepped, seen, strict=True)
            ]
            z = {k: (1 - beta) * z[k] + beta * mean[k] for k in z}
    return z, w


SYNCHRONOUS = [  # `shard_map` is below, beside an axis of data
    ("vmap", "before", 4, 0.1),
    ("shard_map, check_vma=False", "after", 2, 0.0),
    ("pmap", "before", 2, 0.1),
]


@pytest.mark.parametrize(("regime", "exchange", "num_workers", "rho"), SYNCHRONOUS)
def test_synchronous_form(regime, exchange, num_workers, rho):
    base = optax.sgd(0.1, momentum=0.9)
    tx = samx.lsam(base, rho, beta=0.43, period=3, worker_axis="worker", exchange=exchange)
    center, params = synchronous(regime, tx, num_workers)
    z, w = synchronous_loop(num_workers, 0.43, 3, rho, 0.9, exchange)
    chex.assert_trees_all_close(center, z, rtol=0, atol=1e-10)
    for i, expected in enumerate(w):
        own = jax.tree.map(lambda x, i=i: x[i], params)
        chex.assert_trees_all_close(own, expected, rtol=0, atol=1e-10)


def test_synchronous_form_beside_an_axis_of_data():
    """Two workers of four devices each; a worker's batch is split over its devices."""
    tx = samx.lsam(optax.sgd(0.1), 0.1, beta=0.43, period=2, worker_axis="worker")
    data, params = problem.make()
    mesh = regimes.mesh_of((2, 4), ("worker", "data"))
    inner = without_loss(make_step(samx.data_parallel(tx, "data")))

    def own(params, state, batch):
        first = functools.partial(jax.tree.map, lambda x: x[0])
        return jax.tree.map(lambda x: x[None], inner(first(params), first(state), first(batch)))

    specs = (P("worker"), P("worker"), P("worker", "data"))
    step = jax.jit(jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=P("worker")))
    params = jax.tree.map(lambda x: np.stack([x] * 2), params)
    state = jax.jit(jax.vmap(tx.init))(params)
    for t in range(STEPS):
        batches = [problem.batch_at(data, t * 2 + i) for i in range(2)]
        params, state = step(params, state, jax.tree.map(lambda *x: np.stack(x), *batches))
    center = jax.tree.map(lambda x: np.asarray(x)[0], optax.tree.get(state, "center"))
    z, w = synchronous_loop(2, 0.43, 2, 0.1, 0.0, "before")
    w = jax.tree.map(lambda *x: np.stack(x), *w)
    chex.assert_trees_all_close((center, params), (z, w), rtol=0, atol=1e-10)


def test_synchronous_form_sends_nothing_between_exchanges():
    """Every all-reduce is inside a branch."""
    tx = samx.lsam(optax.sgd(0.1), 0.1, worker_axis="worker")
    data, params = problem.make()
    mesh = regimes.mesh_of((2,), ("worker",))
    step = on_mesh(without_loss(make_step(tx)), mesh, True)
    params = jax.tree.map(lambda x: np.stack([x] * 2), params)
    state = jax.jit(jax.vmap(tx.init))(params)
    batch = jax.tree.map(lambda x: np.stack([x] * 2), problem.batch_at(data, 0))
    text = step.lower(params, state, batch).as_text()
    before, _, after = text.partition("stablehlo.case")
    assert "all_reduce" in after
    assert "all_reduce" not in before
    assert after.count("all_reduce") <= 2 * len(jax.tree.leaves(problem.make()[1]))


def test_one_worker_with_a_center():
    """Without a worker axis, `beta` is the pull of the center."""
    tx = samx.lsam(optax.sgd(0.1), 0.05, beta=0.5, period=2)
    state = problem.train(tx, 4)
    center, (params,) = simulated(SHARP, elastic.Rule(beta=0.5, period=2), [0], 4)[-1]
    del center
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[-1], state), params, rtol=0, atol=1e-12)


def test_nesterov_takes_the_gradient_ahead():
    """optax keeps the look-ahead parameters w + 0.9 v; both take the same steps."""
    ahead = problem.train(optax.sgd(0.1, momentum=0.9, nesterov=True), 6)
    tx = elastic.nesterov(optax.sgd(0.1), 0.9)
    data, params = problem.make()
    state, step = tx.init(params), compiled_step(tx)
    for t in range(6):
        params, state, _ = step(params, state, problem.batch_at(data, t))
    found = jax.tree.map(lambda w, v: w + 0.9 * v, params, state.velocity)
    chex.assert_trees_all_close(found, jax.tree.map(lambda x: x[-1], ahead), rtol=0, atol=1e-12)


def test_a_worker_that_skips_what_is_not_finite_does_not_reach_the_center():
    tx = elastic.averaging(samx.skip_nonfinite(optax.sgd(0.1)), "worker", period=1)

    @jax.jit
    @functools.partial(jax.vmap, axis_name="worker")
    def step(w, state, x):
        updates, state = tx.update(2 * (w - x), state, w)
        return optax.apply_updates(w, updates), state

    w, x = jnp.zeros(4), jnp.arange(4.0)
    state = jax.vmap(tx.init)(w)
    for number in range(40):
        w, state = step(w, state, x.at[1].set(jnp.nan) if number == 5 else x)
    np.testing.assert_allclose(optax.tree.get(state, "center"), 1.5, atol=0.05)
    assert optax.tree.get(state, "skipped_steps").tolist() == [0, 1, 0, 0]
