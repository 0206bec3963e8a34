"""Combinations: what the base optimizer gets of the gradient and the sharp gradient."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from samx import _tree
from samx._base import as_transformation, check_in_front, closure_transformation
from samx._hyper import at_step, check_count, check_number, next_step

__all__ = ["decaying", "mix"]

Mixing: TypeAlias = Callable[[jax.Array, jax.Array], Any]


class MixState(NamedTuple):
    """State of `mix`.

    Attributes:
        step: int32, optimizer steps so far; the schedule of `weight` runs on it.
        inner: State of the transformation.
    """

    step: jax.Array
    inner: optax.OptState


def mix(
    inner: optax.GradientTransformation, weight: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    """More or less of the sharp gradient: a straight line through both gradients.

        return g + weight (inner(g) − g)

    Args:
        inner: A sharpness-aware transformation that stands first in a chain, such as `samx.sam`.
        weight: γ ≥ 0, a number or a schedule over the optimizer's steps: 0 is the gradient, 1 the
            sharp gradient, more than 1 goes beyond it.

    Returns:
        An `optax.GradientTransformationExtraArgs`, to stand first in a chain. `update` needs what
        `inner` needs.

    Raises:
        ValueError: If `weight` is a negative number; in `init`, if `inner` wraps a base.
        TypeError: If `weight` is neither number nor schedule, or `inner` no transformation.

    Example:
        G-RST, randomized training with the expected gradient of SAM:

        >>> import samx
        >>> p = 0.5
        >>> sam = samx.combinations.mix(samx.sam(0.05), 1 / p)
        >>> tx = samx.perturb_if(samx.policies.random(p), sam)

    References:
        Zhao, Zhang, Hu, "Randomized Sharpness-Aware Training for Boosting Computational Efficiency
        in Deep Learning", AAAI 2023, https://arxiv.org/abs/2203.09962 (G-RST); Zhao, Zhang, Hu,
        "Penalizing Gradient Norm for Efficiently Improving Generalization in Deep Learning", ICML
        2022, https://arxiv.org/abs/2202.03599 (the same line, as a penalty of the gradient norm).

    Notes:
        Cost: that of `inner`, and elementwise work. G-RST's line is inferred from its abstract.
        `static_args`: `inner`.
    """
    check_number("weight", weight, 0)
    inner = as_transformation("mix", "inner", inner)

    def init_fn(params):
        inner_state = inner.init(params)
        check_in_front("mix", inner_state)
        return MixState(jnp.zeros((), jnp.int32), inner_state)

    def update_fn(g, state, params, *, value_fn, **extra):
        g_s, inner_state = inner.update(g, state.inner, params, value_fn=value_fn, **extra)
        mixed = _tree.on_line(g, g_s, at_step(weight, state.step))
        return mixed, MixState(next_step(state.step), inner_state)

    return closure_transformation(init_fn, update_fn, name="mix")


def decaying(decay: optax.ScalarOrSchedule = 0.7, last: int | None = None) -> Mixing:
    """How much of a reused part a step takes: less from step to step, for `samx.arsam`.

        weight(age, step) = decay ^ age  if  age ≤ last  else  0

    Args:
        decay: β in [0, 1]; default 0.7, vSAM's.
        last: The last age at which the part is used, a number of steps ≥ 0; default no last one.
            vSAM: 6.

    Returns:
        A function `(age, step) -> weight` of the int32 steps since the part was taken (0 where it
        is taken) and since the beginning.

    Raises:
        ValueError: If `decay` is outside [0, 1] or `last` below 0.
        TypeError: If `decay` is no number, or `last` no Python int.

    Example:
        >>> from samx.combinations import decaying
        >>> weight = decaying(0.5, last=2)
        >>> [float(weight(age, 0)) for age in range(4)]
        [1.0, 0.5, 0.25, 0.0]

    References:
        Deng, Pang, Zhang, Wang, 2024, https://arxiv.org/abs/2403.08821 (ajiaaa/vSAM).

    Notes:
        Cost: none. `static_args`: `last`.
    """
    check_number("decay", decay, 0, 1)
    if last is not None:
        check_count("last", last, 0)

    def weight(age, step):
        power = jnp.asarray(at_step(decay, jnp.asarray(step)), float) ** age
        return power if last is None else jnp.where(age <= last, power, 0)

    return weight
