"""Elastic averaging of the tiny problem: simulated, in threads, and by an independent loop."""

import functools
import itertools

import jax
import numpy as np
import optax
import problem
import reference

import samx
from samx import elastic

ROUNDS = 12
PLAIN, SHARP = optax.sgd(0.1), optax.chain(samx.sam(0.05), optax.sgd(0.1))


def make_step(tx):
    def step(params, state, batch):
        def value_fn(params):
            return problem.losses_fn(params, batch).mean()

        value, grads = jax.value_and_grad(value_fn)(params)
        tx_update = optax.with_extra_args_support(tx).update
        updates, state = tx_update(grads, state, params, value=value, value_fn=value_fn)
        return optax.apply_updates(params, updates), state, value

    return step


@functools.cache
def compiled_step(tx):
    """Compile the step of an optimizer once, for simulations and for threads."""
    return jax.jit(make_step(tx), donate_argnums=(0, 1))


def make_worker(tx, num_workers):
    """Worker i takes batch n·P + i at its n-th local step, as in the recorded runs."""
    data, params = problem.make()

    def make(i):
        return elastic.Worker(
            params,
            tx.init,
            compiled_step(tx),
            lambda n: (problem.batch_at(data, m * num_workers + i) for m in itertools.count(n)),
        )

    return make


def simulated(tx, rule, order, num_rounds=ROUNDS):
    """Return the center and the workers after every round of `order`."""
    num_workers = max(order) + 1
    make = make_worker(tx, num_workers)
    workers = [make(i) for i in range(num_workers)]
    simulation, history = elastic.Simulation(workers, problem.make()[1], rule), []
    for event in elastic.in_order(order * num_rounds, rule.period):
        simulation.apply(event)
        if event.kind == "finish" and (event.time + 1) % len(order) == 0:
            locals_ = [jax.tree.map(np.asarray, local.params) for local in simulation.workers]
            history.append((jax.tree.map(np.asarray, simulation.center), locals_))
    return history


RECORDED = {
    "lsam_INFERRED__sgd_p2_tau4_a0.45_rho0.05": SHARP,
    "aeasgd__sgd_p2_tau4_a0.45": PLAIN,
}


class Eamsgd:
    """The loop of the authors' file; the pull does not enter the velocity."""

    def __init__(self, num_workers, weight, period, rho=0.0, momentum=0.0, decay=0.0, lr=0.1):
        self.data, self.z = problem.make()
        self.z = {k: np.asarray(x) for k, x in self.z.items()}
        self.w = [dict(self.z) for _ in range(num_workers)]
        self.v = [{k: np.zeros_like(x) for k, x in self.z.items()} for _ in range(num_workers)]
        self.n = [0] * num_workers
        self.num_workers, self.weight, self.period = num_workers, weight, period
        self.rho, self.momentum, self.decay, self.lr = rho, momentum, decay, lr

    def call(self, i):
        w, n = self.w[i], self.n[i]
        move = dict.fromkeys(w, 0.0)
        if n % self.period == 0:
            move = {k: self.weight * (w[k] - self.z[k]) for k in w}
            self.z = {k: self.z[k] + move[k] for k in w}
        batch = problem.batch_at(self.data, n * self.num_workers + i)
        u = {k: w[k] + self.momentum * self.v[i][k] for k in w}
        h = gradient(u, batch)
        if self.rho:
            eps = reference.ball(self.rho)(u, h)
            h = gradient({k: u[k] + eps[k] for k in u}, batch)
        h = {k: h[k] + self.decay * u[k] for k in h}
        self.v[i] = {k: self.momentum * self.v[i][k] - self.lr * h[k] for k in h}
        self.w[i] = {k: u[k] - self.lr * h[k] - move[k] for k in h}
        self.n[i] += 1


@jax.jit
def _gradient(params, batch):
    return jax.grad(lambda p: problem.losses_fn(p, batch).mean())(params)


def gradient(params, batch):
    return {k: np.asarray(g) for k, g in _gradient(params, batch).items()}


@jax.jit
def _loss(params, batch):
    return problem.losses_fn(params, batch).mean()


def loss_of(params, batch=None):
    """Return the loss of a batch, or of all examples."""
    return float(_loss(params, problem.make()[0] if batch is None else batch))


def train(tx, rule, num_exchanges, num_workers=2, make=None, **keywords):
    return elastic.train(
        make or make_worker(tx, num_workers),
        problem.make()[1],
        num_workers=num_workers,
        num_exchanges=num_exchanges,
        rule=rule,
        **keywords,
    )
