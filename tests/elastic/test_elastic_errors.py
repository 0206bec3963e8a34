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
