"""A perturbation that takes gradients of its own is counted in the readings of any variant."""

from functools import partial

import jax
import optax
import problem
import pytest

import samx
from samx.perturbations import fisher_mask, metric_ball

# A factory, and the gradients of one of its steps.
TAKERS = {
    "sam": (samx.sam, 2),
    "looksam": (lambda perturbation: samx.looksam(period=1, perturbation=perturbation), 2),
    "vsam": (samx.vsam, 2),  # in its warm-up
    "async_sam": (samx.async_sam, 2),
    "bisam": (samx.bisam, 2),
    "sl_sam": (
        lambda perturbation: samx.sl_sam(optax.sgd(0.1), groups=1, perturbation=perturbation),
        2,
    ),
    "lets": (partial(samx.lets, optax.sgd(0.1)), 6),
    "wsam": (partial(samx.wsam, optax.sgd(0.1), 0.1), 2),
}


@pytest.mark.parametrize("name", TAKERS)
def test_a_mask_takes_one_more_gradient_on_the_step_that_makes_it(name):
    make, each = TAKERS[name]
    tx = make(perturbation=fisher_mask(metric_ball(0.1), period=2))
    data, params = problem.make("float32")
    batch = problem.batch_at(data, 0)

    @jax.jit
    def spent(params):
        def step(carry, _):
            after = problem.make_step(tx)(*carry, batch)
            return after, optax.tree.get(after[1], "gradients_spent")

        return jax.lax.scan(step, (params, tx.init(params)), length=3)[1]

    assert spent(params).tolist() == [each, 2 * each + 1, 3 * each + 1]
