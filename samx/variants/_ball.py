"""Helpers shared by variants: build the perturbation from `rho` or `perturbation=`."""

from collections.abc import Callable
from typing import Any

from samx.core.aliases import Transformation
from samx.core.hyperparams import Default
from samx.core.transformation import as_transformation
from samx.perturbations.balls import metric_ball


def ball_of(
    name: str, rho: Any, perturbation: Any, ball: Callable[[Any], Any] = metric_ball
) -> Transformation:
    """Return the given `perturbation`, or the ball of radius `rho`; raise if both are given."""
    if perturbation is None:
        return ball(rho)
    if not isinstance(rho, Default):
        raise ValueError(
            f"{name}: got `rho` together with `perturbation`; leave `rho` out and give the radius "
            "to the perturbation (optax.inject_hyperparams fills in defaults: there also pass "
            "static_args=('rho',))"
        )
    return as_transformation(name, "perturbation", perturbation)
