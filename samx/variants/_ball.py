"""Helpers shared by variants: build the perturbation from `rho` or `perturbation=`."""

from collections.abc import Callable
from typing import Any

from samx.core.aliases import Transformation
from samx.core.hyperparams import Default
from samx.core.transformation import as_transformation
from samx.perturbations.balls import metric_ball


def ball_of(
    name: str,
    rho: Any,
    perturbation: Any,
    ball: Callable[[Any], Any] = metric_ball,
    keyword: str = "rho",
    replaced_by: str = "perturbation",
) -> Transformation:
    """Return the given `perturbation`, or the ball of radius `rho`; raise if both are given.

    `keyword` and `replaced_by` are the names of the two arguments.
    """
    if perturbation is None:
        return ball(rho)
    if not isinstance(rho, Default):
        raise ValueError(
            f"{name}: got `{keyword}` together with `{replaced_by}`; leave `{keyword}` out and "
            f"give the radius to the {replaced_by} (optax.inject_hyperparams fills in defaults: "
            f"there also pass static_args=('{keyword}',))"
        )
    return as_transformation(name, replaced_by, perturbation)
