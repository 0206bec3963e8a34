"""How a variant takes its perturbation: from `rho` or as an argument, and up which gradient."""

from collections.abc import Callable
from typing import Any

import optax

from samx._balls import metric_ball
from samx._base import as_transformation


class Default(float):
    """A number that nobody chose: tells a default apart from the same number passed."""


def ball_of(
    name: str, rho: Any, perturbation: Any, ball: Callable[[Any], Any] = metric_ball
) -> optax.GradientTransformationExtraArgs:
    """The perturbation that a factory was given, or the ball of radius `rho`: never both."""
    if perturbation is None:
        return ball(rho)
    if not isinstance(rho, Default):
        raise ValueError(
            f"{name}: got `rho` together with `perturbation`, but the radius has one home; leave "
            "`rho` out and give the radius to the perturbation (under optax.inject_hyperparams, "
            "which fills in defaults, also pass static_args=('rho',))"
        )
    return as_transformation(name, "perturbation", perturbation)


def ascend(
    perturb: Callable[..., Any], g: Any, ascent_grad: Any, state: Any, params: Any
) -> tuple[Any, Any]:
    """The step up `ascent_grad`, and the new state of the perturbation, which `g` determines.

    The two gradients differ where devices climb on their own: each along its own gradient, but with
    a state that all of them share.
    """
    eps, new_state = perturb(ascent_grad, state, params)
    if ascent_grad is not g:
        _, new_state = perturb(g, state, params)
    return eps, new_state


def own_gradients(state: Any) -> Any:
    """Gradients that a perturbation took in its last step, in passes over one batch."""
    return sum(spent for _, spent in optax.tree.get_all_with_path(state, "own_gradients"))
