"""Training of the tiny problem by Ray, and waits that end."""

import contextlib
import itertools
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import psutil

import samx
from samx import elastic

LONG = 60  # seconds, for a busy machine


@contextlib.contextmanager
def bounded():
    """Raise a TimeoutError instead of hanging forever."""

    def give_up(number, frame):
        raise TimeoutError("not in time")

    handler = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(2 * LONG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def maker(delay=0.0, hurry=None):
    """`make_worker` for the tiny problem in float32, SAM and SGD.

    If `hurry` is given, worker 1 is slow until this file exists.
    """
    precision = jnp.result_type(float)

    def make_worker(index):
        assert jnp.result_type(float) == precision  # the same jax.enable_x64 as in the driver
        data, params = problem.make(np.float32)
        tx = optax.chain(samx.sam(0.05), optax.sgd(0.1))

        @jax.jit
        def move(params, state, batch):
            def value_fn(params):
                return problem.losses_fn(params, batch).mean()

            value, grads = jax.value_and_grad(value_fn)(params)
            updates, state = tx.update(grads, state, params, value=value, value_fn=value_fn)
            return optax.apply_updates(params, updates), state, value

        def step(params, state, batch):
            is_slow = hurry is not None and index == 1 and not hurry.exists()
            time.sleep(0.2 if is_slow else delay)
            return move(params, state, batch)

        def batches(start):
            return (problem.batch_at(data, n + index) for n in itertools.count(start))

        return elastic.Worker(params, tx.init, step, batches)

    return make_worker


@jax.jit
def _loss(params, batch):
    return problem.losses_fn(params, batch).mean()


def loss_of(params):
    return float(_loss(params, problem.make(np.float32)[0]))


def is_alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(is_true, seconds=LONG):
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)
