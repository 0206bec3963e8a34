"""Parameters of two precisions: some layers in float32, some in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import problem
import pytest
from cases import VARIANTS

import samx

pytestmark = pytest.mark.usefixtures("float64")
FAST = ("sam", "looksam", "friendly_sam", "momentum_sam")


def mixed():
    data, params = problem.make()
    return data, params | {"W1": params["W1"].astype(jnp.float32)}


@pytest.mark.parametrize(
    "name",
    [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS],
)
def test_a_step_is_that_of_one_precision(name, monkeypatch):
    """From a zero gradient on, and in ordinary steps. Both get the same draws."""
    ends, normal_like = [], samx.core.draws.normal_like

    def same(key, step, like, draw=0):
        wide = normal_like(key, step, jax.tree.map(lambda x: x.astype(float), like), draw)
        return jax.tree.map(lambda n, x: n.astype(x.dtype), wide, like)

    monkeypatch.setattr(samx.core.draws, "normal_like", same)
    for data, params in (mixed(), problem.make()):
        tx = VARIANTS[name].build(batch_like=problem.batch_at(data, 0))
        state, dtypes = tx.init(params), jax.tree.map(jnp.result_type, params)
        for at, factor in enumerate((0.0, 1.0, 1.0)):

            def losses_fn(params, batch, factor=factor):
                return factor * problem.losses_fn(params, batch)

            step = problem.make_step(tx, losses_fn)
            params, state = step(params, state, problem.batch_at(data, at))
        assert jax.tree.map(jnp.result_type, params) == dtypes
        ends.append(params)
    for name, found in ends[0].items():
        np.testing.assert_allclose(found, ends[1][name], rtol=0, atol=1e-4)
