"""Wrong input to elastic averaging gets an error that names the argument."""

import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from elastic_runs import PLAIN, SHARP, make_worker, train

import samx
from samx import elastic

pytestmark = pytest.mark.usefixtures("float64")


def train_from(params, **options):
    """Train, although the workers must never be made."""

    def make(index):
        raise AssertionError("a worker was made")

    return elastic.train(make, params, num_workers=1, num_exchanges=1, **options)


BAD = {
    "beta": (lambda: elastic.Rule(beta=1.1), ValueError, "`beta` must be in"),
    "period": (lambda: elastic.Rule(period=0), ValueError, "`period` must be at least 1"),
    "smoothing": (lambda: elastic.Rule(smoothing="median"), ValueError, "'elastic' or 'gaussian'"),
    "deviation": (lambda: elastic.Rule(deviation=0.1), ValueError, "belongs to smoothing"),
    "leader": (
        lambda: elastic.Rule(leader=1.0),
        ValueError,
        r"`leader` must be in \[0, 1\)",
    ),
    "schedule": (lambda: elastic.Rule(beta=lambda t: 0.9), TypeError, "`beta` must be a number"),
    "staleness": (
        lambda: train(SHARP, elastic.Rule(), 4, num_workers=3, max_staleness=1),
        ValueError,
        "`max_staleness` must be at least num_workers − 1 = 2",
    ),
    "exchanges": (lambda: train(SHARP, elastic.Rule(), 0), ValueError, "`num_exchanges`"),
    "resume": (
        lambda: train(
            SHARP, elastic.Rule(), 4, resume=elastic.Checkpoint(None, np.array([1, 2, 3]))
        ),
        ValueError,
        "`resume` must be of num_workers=2",
    ),
    "params": (
        lambda: elastic.train(lambda i: None, {"n": jnp.arange(3)}, num_workers=1, num_exchanges=1),
        TypeError,
        "`params` must have real floating leaves",
    ),
    "params that are not finite": (
        lambda: train_from({"w": jnp.ones(2), "b": jnp.array([1.0, jnp.inf])}),
        ValueError,
        r"`params`\['b'\] must be finite",
    ),
    "params above center_dtype": (
        lambda: train_from({"w": jnp.full(2, 1e6)}, center_dtype="float16"),
        ValueError,
        "`params` must be finite in `center_dtype`, float16",
    ),
    "resume that is not finite": (
        lambda: train_from(
            {"w": jnp.ones(2)},
            resume=elastic.Checkpoint({"w": np.array([1.0, np.nan])}, np.array([3])),
        ),
        ValueError,
        r"`resume.params`\['w'\] must be finite",
    ),
    "resume of another shape": (
        lambda: train_from(
            {"w": jnp.ones(2)}, resume=elastic.Checkpoint({"w": np.ones(3)}, np.array([3]))
        ),
        ValueError,
        r"`resume.params`\['w'\] must have the shape of `params`, \(2,\), got \(3,\)",
    ),
    "resume of another structure": (
        lambda: train_from(
            {"w": jnp.ones(2)}, resume=elastic.Checkpoint([np.ones(2)], np.array([3]))
        ),
        ValueError,
        "`resume.params` must have the structure of `params`",
    ),
    "resume of a negative count": (
        lambda: train_from(
            {"w": jnp.ones(2)}, resume=elastic.Checkpoint({"w": np.ones(2)}, np.array([-3]))
        ),
        ValueError,
        "`resume.exchanges` must be at least 0",
    ),
    "worker_timeout": (
        lambda: train_from({"w": jnp.ones(2)}, worker_timeout=-1.0),
        ValueError,
        "`worker_timeout` must be at least 0",
    ),
    "a stream that has ended": (
        lambda: [
            simulation.apply(elastic.Event(0.0, 0, kind))
            for simulation in [
                elastic.Simulation(
                    [make_worker(PLAIN, 1)(0)._replace(batches=lambda n: [])],
                    problem.make()[1],
                    elastic.Rule(),
                )
            ]
            for kind in ("begin", "exchange", "finish")
        ],
        ValueError,
        "worker 0 cannot take a step: its stream of batches has ended after 0 local steps",
    ),
    "event": (
        lambda: elastic.Simulation(
            [make_worker(PLAIN, 1)(0)], problem.make()[1], elastic.Rule()
        ).apply(elastic.Event(0.0, 1, "begin")),
        ValueError,
        "a worker index below 1",
    ),
    "workers": (
        lambda: elastic.Simulation([], None, elastic.Rule()),
        ValueError,
        "`workers` must be one Worker or more, got none",
    ),
    "seconds": (
        lambda: list(elastic.timeline([1.0, 0.0], period=1, num_exchanges=1)),
        ValueError,
        "`seconds_per_step` must be above 0, got 0.0",
    ),
    "changes": (
        lambda: list(elastic.timeline([1.0], period=1, num_exchanges=1, changes=[(0.0, 1, "die")])),
        ValueError,
        "`changes` has",
    ),
    "worker_axis": (
        lambda: samx.lsam(optax.sgd(0.1), worker_axis=3),
        TypeError,
        "lsam: `worker_axis` must be the name",
    ),
    "exchange": (
        lambda: samx.lsam(optax.sgd(0.1), exchange="never"),
        ValueError,
        "`exchange` must be 'before' or 'after'",
    ),
    "momentum": (
        lambda: elastic.nesterov(optax.sgd(0.1), 1.5),
        ValueError,
        "`momentum` must be in",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()
