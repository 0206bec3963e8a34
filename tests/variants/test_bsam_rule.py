"""bSAM: recorded runs of its authors' code, and the units in which it computes."""

import functools

import jax
import numpy as np
import problem
import pytest
import recorded
from cases import VARIANTS

import samx

pytestmark = pytest.mark.usefixtures("float64")

RUNS = [name for name, run in recorded.RECORDED.items() if run.entry == "bsam"]


@pytest.mark.slow  # the checks of `test_rows.py` run them by default
@pytest.mark.parametrize("name", RUNS)
def test_recorded_runs(name):
    run = recorded.RECORDED[name]
    recorded.check(name, VARIANTS["bsam"].make(run.base, run.arguments))


NUMBERS = {
    "learning_rate": 0.1,
    "num_examples": 64.0,
    "rho": 0.2,
    "prior_precision": 6.4,
    "b2": 0.9,
    "damping": 0.1,
    "init_precision": 2.0,
}


@jax.jit
def step(params, state, batch, factor, unit, numbers):
    def losses_fn(params, batch):
        return factor * problem.losses_fn(jax.tree.map(lambda w: unit * w, params), batch)

    tx = samx.bsam(num_microbatches=2, **numbers)
    return problem.make_step(tx, losses_fn)(params, state, batch)


def trained(factor=1.0, unit=1.0, **changes):
    """Train on `factor` times the loss, on weights in another unit; return weights in the old."""
    data, params = problem.make()
    params, numbers = jax.tree.map(lambda w: w / unit, params), NUMBERS | changes
    state, found = samx.bsam(**numbers).init(params), []
    for t in range(4):
        params, state = step(params, state, problem.batch_at(data, t), factor, unit, numbers)
        found.append(jax.tree.map(lambda w: unit * w, params))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *found)


def assert_equal(found, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-13), found, expected)


@pytest.mark.parametrize("a", [4.0, 0.25])
def test_the_unit_of_the_weights_does_not_matter(a):
    """The precision has the unit of weights to the power of -2: s, γ and the prior have it too."""
    names = ("init_precision", "damping", "prior_precision")
    found = trained(unit=a, **{name: NUMBERS[name] * a**2 for name in names})
    assert_equal(found, trained())


def test_the_scale_of_the_loss_does_not_matter_without_a_prior():
    """The loss times c: s and γ times c², N over c², ρ and the learning rate times c."""
    c = 8.0
    changes = {"learning_rate": c, "rho": c, "num_examples": 1 / c**2}
    changes |= {"init_precision": c**2, "damping": c**2}
    changes = {name: NUMBERS[name] * x for name, x in changes.items()}
    expected = trained(prior_precision=0.0)
    assert_equal(trained(c, prior_precision=0.0, **changes), expected)


def test_the_scale_of_the_loss_does_not_matter_if_the_precision_stays():
    """With b2 = 1: the loss and s times c, N over c; δ, the prior over N, grows with c."""
    c = 16.0
    changes = {"init_precision": 2.0 * c, "num_examples": 64.0 / c}
    assert_equal(trained(c, b2=1.0, **changes), trained(b2=1.0))
