"""A perturbation that takes gradients of its own is counted in the readings of any variant."""

import inspect
from typing import NamedTuple

import jax
import optax
import problem
import pytest
from cases import VARIANTS, first_of_each

import samx
from samx.core.hyperparams import Default
from samx.perturbations import fisher_mask, metric_ball


def test_a_mask_takes_one_more_gradient_on_the_step_that_makes_it():
    mask = fisher_mask(metric_ball(0.1), period=2)
    tx = optax.chain(samx.sam(perturbation=mask), optax.sgd(0.1))
    data, params = problem.make("float32")
    carry, step, spent = (params, tx.init(params)), jax.jit(problem.make_step(tx)), []
    for t in range(3):
        carry = step(*carry, problem.batch_at(data, t))
        spent.append(float(optax.tree.get(carry[1], "gradients_spent")))
    assert spent == [2, 5, 7]


class Costly(NamedTuple):
    extra_gradients: jax.Array


def costly(extra):
    """A ball that says that it took `extra` gradients."""

    def update_fn(g, state, params=None):
        del state
        return jax.tree.map(lambda x: 0.01 * x, g), Costly(extra)

    return optax.GradientTransformation(lambda params: Costly(extra), update_fn)


def takes_a_perturbation(case):
    return "perturbation" in inspect.signature(case.factory).parameters


# The files that take readings: one row for each, besides one of each kind.
TAKERS = {name: case for name, case in VARIANTS.items() if takes_a_perturbation(case)}
ROWS = [
    name
    for name in first_of_each(lambda case: (case.kind, getattr(case.factory.func, "__module__", 0)))
    if name in TAKERS
]


@pytest.mark.parametrize("name", ROWS)
def test_every_variant_counts_what_its_perturbation_says(name):
    case, (data, params) = VARIANTS[name], problem.make("float32")
    batch = problem.batch_at(data, 0)
    parameters = inspect.signature(case.factory).parameters
    replaced = {k for k, p in parameters.items() if isinstance(p.default, Default)}
    hyper = {k: v for k, v in case.hyper.items() if k not in {*case.radii, *replaced}}
    hyper |= {"batch_like": batch} if case.needs_batch_like else {}

    @jax.jit
    def spent(extra):
        tx = case.make(optax.sgd(0.1, momentum=0.9), hyper | {"perturbation": costly(extra)})
        _, state = problem.make_step(tx)(params, tx.init(params), batch)
        readings = optax.tree.get(state, "readings")
        return readings.is_sharp, readings.gradients_spent  # no more: the others are not compiled

    (is_sharp, none), (_, some) = spent(0.0), spent(0.5)
    assert bool(is_sharp)
    climbs = 2 if name == "tsam" else 1  # it climbs from each of its points
    assert float(some - none) == pytest.approx(climbs * 0.5)
