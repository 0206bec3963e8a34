"""Helpers shared by variants that move by noise: LPF-SGD, RWP and ARWP."""

from typing import Any

import jax

from samx.core.aliases import Transformation
from samx.core.closures import Closure, LossesClosure, batch_size, mean_loss
from samx.core.microbatches import strided
from samx.core.transformation import as_transformation, checked_transformation
from samx.perturbations import filterwise, gaussian_noise
from samx.perturbations.noise import NoiseState
from samx.variants._ball import ball_of


def noise_of(name: str, sigma: Any, noise: Any, key: Any) -> Transformation:
    """Return the given `noise`, or filter-wise Gaussian noise; raise if both are given."""
    if noise is not None:
        noise = _checked(name, as_transformation(name, "noise", noise))

    def make(sigma):
        return gaussian_noise(sigma, filterwise(), key=key)

    return ball_of(name, sigma, noise, make, keyword="sigma", replaced_by="noise")


def _checked(name: str, noise: Transformation) -> Transformation:
    """Return the noise; its `init` raises where no part of it is random.

    A ball would climb the incoming gradient, which these variants do not have.
    """

    def is_noise(node):
        return isinstance(node, NoiseState)

    def init_fn(params):
        state = noise.init(params)
        if not any(map(is_noise, jax.tree.leaves(state, is_leaf=is_noise))):
            raise ValueError(
                f"{name}: `noise` must be random, such as samx.perturbations.gaussian_noise or "
                "sphere_noise, got a perturbation that needs a gradient"
            )
        return state

    return checked_transformation(name, init_fn, noise.update)


def halves(
    name: str, losses_fn: LossesClosure, batch: Any, weights: Any
) -> tuple[Closure, Closure]:
    """Return the mean losses of the even and of the odd examples."""
    size = batch_size(name, batch)
    if size % 2:
        raise ValueError(f"{name}: `batch` must hold an even number of examples, got {size}")
    parts = strided(2, (batch, weights))
    even, odd = (jax.tree.map(lambda x, i=i: x[i], parts) for i in range(2))
    return mean_loss(losses_fn, *even), mean_loss(losses_fn, *odd)
