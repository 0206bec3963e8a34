"""--monitor: what is measured, and which steps have measured it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from measured import REFERENCE, net_loss, net_params

import samx
from examples.common import monitoring


@pytest.mark.usefixtures("float64")
def test_the_measures_of_a_network():
    found = jax.jit(lambda w: monitoring.measure(net_loss(), w, 0.1))(net_params())
    top, error, rise = (found[name] for name in monitoring.NAMES)
    assert abs(top - REFERENCE["net/hessian/top5"][0]) < error < 0.01
    np.testing.assert_allclose(rise, 0.0075113, rtol=1e-4)


def test_a_skipped_step_has_measured_nothing(monkeypatch, cheap_measure):
    """The third step is due and is skipped, so the fourth is due."""
    monkeypatch.setattr(monitoring, "measure", cheap_measure)
    tx = monitoring.monitored(optax.chain(samx.sam(0.05), optax.sgd(0.1)), every=2)
    tx = samx.skip_nonfinite(tx)

    @jax.jit
    def step(w, state, factor):
        def value_fn(w):
            return factor * w @ w

        updates, new = tx.update(jax.grad(value_fn)(w), state, w, value_fn=value_fn)
        return optax.apply_updates(w, updates), new, monitoring.measured(new, state)

    w, rows = jnp.ones(2), []
    state = tx.init(w)
    for factor in (1.0, 2.0, np.nan, 3.0, 4.0):
        loss = factor * w @ w
        w, state, row = step(w, state, factor)
        rows.append({name: float(x) for name, x in row.items()} | {"loss": float(loss)})
    assert [row["is_measured"] for row in rows] == [1, 0, 0, 1, 0]
    wanted = [rows[0]["loss"]] * 3 + [rows[3]["loss"]] * 2
    assert [row["top_eigenvalue"] for row in rows] == pytest.approx(wanted)


def test_without_a_monitor():
    base = optax.sgd(0.1)
    assert monitoring.monitored(base, 0) is base
    assert monitoring.measured(base.init(0.0), base.init(0.0)) == {}
