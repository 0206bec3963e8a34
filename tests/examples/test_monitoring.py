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


def test_the_step_that_measured(monkeypatch, cheap_measure):
    """Also a step that float16 would skip, because it overflows."""
    monkeypatch.setattr(monitoring, "measure", cheap_measure)
    inner = samx.skip_nonfinite(optax.chain(samx.sam(0.05), optax.sgd(0.1)))
    tx = monitoring.monitored(inner, every=2, num_batches=2)

    def losses_fn(w, x):
        sizes.add(len(x))
        return x * (w @ w)

    def loss(w, x):
        return losses_fn(w, x).mean()

    @jax.jit
    def step(w, state, number, x):
        g = jax.grad(loss)(w, x)
        updates, state = tx.update(g, state, w, losses_fn=losses_fn, batch=x)
        return optax.apply_updates(w, updates), state, monitoring.measured(state, number)

    w, rows, losses, sizes = jnp.ones(2), [], [], set()
    state = tx.init(w)
    for number, factor in enumerate((1.0, 2.0, np.inf, 3.0, 4.0)):
        x = jnp.array([1.0, 2.0, 3.0, factor])
        losses.append(float(loss(w, x)))
        w, state, row = step(w, state, number, x)
        rows.append({name: float(x) for name, x in row.items()})
    assert sizes == {4, 2}  # the monitor's are microbatches
    assert int(optax.tree.get(state, "skipped_steps")) == 1
    assert [row["is_measured"] for row in rows] == [1, 0, 1, 0, 1]
    wanted = [losses[0], losses[0], losses[2], losses[2], losses[4]]
    assert [row["top_eigenvalue"] for row in rows] == pytest.approx(wanted)


def test_without_a_monitor():
    base = optax.sgd(0.1)
    assert monitoring.monitored(base, 0) is base
    assert monitoring.measured(base.init(0.0), 0) == {}
