"""Combinations of the gradient and the sharp gradient, for the base optimizer."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.aliases import ScalarOrSchedule, Transformation
from samx.core.hyperparams import as_count, at_step, check_choice, check_hyperparam, next_step
from samx.core.transformation import as_transformation, check_in_front, closure_transformation

__all__ = ["decaying", "mix", "renormalized", "surrogate_gap"]

Mixing: TypeAlias = Callable[[jax.Array, jax.Array], Any]


class CombinationState(NamedTuple):
    """State of a combination.

    Attributes:
        step: int32, optimizer steps so far, the argument of schedules.
        inner: State of the inner transformation.
    """

    step: jax.Array
    inner: optax.OptState


def mix(
    inner: optax.GradientTransformation, weight: ScalarOrSchedule, *, name: str = "mix"
) -> Transformation:
    """Mix the gradient and the sharp gradient: a point on the line through both.

        return g + weight (inner(g) − g)

    Args:
        inner: A sharpness-aware transformation that stands first in a chain, such as `samx.sam`.
        weight: γ ≥ 0. 0 gives the gradient, 1 the sharp gradient, and more than 1 goes beyond it.
        name: Name of the transformation in error messages.

    Returns:
        A transformation that stands first in a chain. `update` needs what `inner` needs.

    Raises:
        ValueError: If `weight` is negative; in `init`, if `inner` wraps a base.
        TypeError: If a hyperparameter is neither a number nor a schedule, or `inner` is not a
            transformation.

    Example:
        G-RST, randomized training whose expected gradient is that of SAM:

        >>> import samx
        >>> p = 0.5
        >>> sam = samx.combinations.mix(samx.sam(0.05), 1 / p)
        >>> tx = samx.perturb_if(samx.policies.random(p), sam)

    References:
        Zhao, Zhang, Hu, "Randomized Sharpness-Aware Training for Boosting Computational Efficiency
        in Deep Learning", AAAI 2023, https://arxiv.org/abs/2203.09962 (G-RST); Zhao, Zhang, Hu,
        "Penalizing Gradient Norm for Efficiently Improving Generalization in Deep Learning", ICML
        2022, https://arxiv.org/abs/2202.03599 (the same line, as a penalty on the gradient norm).

    Notes:
        Cost: that of `inner`, and elementwise work. G-RST's line is inferred from its abstract.
        `static_args`: `inner`.
    """
    check_hyperparam("weight", weight, 0)

    def combine(g, g_s, step):
        return tree.on_line(g, g_s, at_step(weight, step))

    return combination(name, inner, combine)


def surrogate_gap(
    inner: optax.GradientTransformation,
    alpha: ScalarOrSchedule,
    descend: Literal["sharp", "clean"] = "sharp",
    *,
    name: str = "surrogate_gap",
) -> Transformation:
    """Descend one of the two losses, and also the surrogate gap between them, as GSAM does.

        g_s = inner(g)
        "sharp":  return g_s − α (g − (⟨g, g_s⟩ / ‖g_s‖²) g_s)
        "clean":  return g + α (g_s − (⟨g_s, g⟩ / ‖g‖²) g)

    The first term descends one loss. The second term is the orthogonal component of the other
    gradient, and descends the gap.

    Args:
        inner: A sharpness-aware transformation that stands first in a chain, such as `samx.sam`.
        alpha: α ≥ 0. 0 is `inner`, or with "clean" the base optimizer.
        descend: Which loss is descended along its own gradient: "sharp", the default, or "clean".
        name: Name of the transformation in error messages.

    Returns:
        A transformation that stands first in a chain. `update` needs what `inner` needs.

    Raises:
        ValueError: If `alpha` is negative, or `descend` is unknown; in `init`, if `inner` wraps a
            base.
        TypeError: If a hyperparameter is neither a number nor a schedule, or `inner` is not a
            transformation.

    Example:
        The gap of ASAM, on every second step:

        >>> import samx
        >>> gap = samx.combinations.surrogate_gap(samx.asam(0.5), alpha=0.2)
        >>> tx = samx.perturb_if(samx.policies.every(2), gap)

    References:
        Zhuang et al., "Surrogate Gap Minimization Improves Sharpness-Aware Training", ICLR 2022,
        https://arxiv.org/abs/2203.08065 (google-research/big_vision)

    Notes:
        The second term decreases the gap without a first-order change of the loss that is
        descended. Cost: that of `inner`, and two inner products. `static_args`: `inner`, `descend`.
    """
    check_hyperparam("alpha", alpha, 0)
    check_choice("descend", descend, ("sharp", "clean"))

    def combine(g, g_s, step):
        length = tree.length(g)
        if descend == "clean":
            return tree.add_scaled(g, at_step(alpha, step), tree.reject(g_s, g, length))
        length = length._replace(norm=tree.scaled_norm(length.scale, g_s))  # of g_s
        return tree.add_scaled(g_s, -1 * at_step(alpha, step), tree.reject(g, g_s, length))

    return combination(name, inner, combine)


def renormalized(
    inner: optax.GradientTransformation, *, name: str = "renormalized"
) -> Transformation:
    """Rescale the sharp gradient to the norm of the gradient, as Stable SAM does.

        g_s = inner(g)
        return (‖g‖ / ‖g_s‖) g_s

    Args:
        inner: A sharpness-aware transformation that stands first in a chain, such as `samx.sam`.
        name: Name of the transformation in error messages.

    Returns:
        A transformation that stands first in a chain. `update` needs what `inner` needs.

    Raises:
        ValueError: In `init`, if `inner` wraps a base.
        TypeError: If `inner` is not a transformation.

    Example:
        >>> import samx
        >>> tx = samx.combinations.renormalized(samx.friendly_sam(0.1))

    References:
        Tan et al., "Stabilizing Sharpness-aware Minimization Through A Simple Renormalization
        Strategy", JMLR 2025, https://arxiv.org/abs/2401.07250 (cltan023/stablesam2024)

    Notes:
        A sharp gradient of zero stays zero. Optimizers that divide by the size of
        gradients, such as Adam, undo most of the rescaling. Cost: that of `inner`, and two norms.
        `static_args`: `inner`.
    """

    def combine(g, g_s, step):
        del step
        length = tree.length(g)
        ratio = tree.ratio(length.norm, tree.scaled_norm(length.scale, g_s))
        return jax.tree.map(lambda x: tree.widen(x) * jnp.asarray(ratio, tree.real_dtype(x)), g_s)

    return combination(name, inner, combine)


def combination(
    name: str,
    inner: Any,
    combine: Callable[[Any, Any, jax.Array], Any],
    clean: Callable[[Any], Any] | None = None,
) -> Transformation:
    """Return the transformation `combine(g, inner(g), step)`, in the dtypes of the parameters.

    With `clean`, `clean(g)` takes the place of g: where devices climb separately, each device's.
    """
    inner = as_transformation(name, "inner", inner)

    def init_fn(params):
        inner_state = inner.init(params)
        check_in_front(name, inner_state)
        return CombinationState(jnp.zeros((), jnp.int32), inner_state)

    def update_fn(g, state, params, *, value_fn, **extra):
        g_s, inner_state = inner.update(g, state.inner, params, value_fn=value_fn, **extra)
        g = g if clean is None else value_fn.of_ascents(clean, g)
        updates = tree.cast_like(combine(g, g_s, state.step), params)
        return updates, CombinationState(next_step(state.step), inner_state)

    return closure_transformation(init_fn, update_fn, name=name)


def decaying(decay: ScalarOrSchedule = 0.7, last: int | None = None) -> Mixing:
    """Return the weight of a reused component for `samx.arsam`: it decays from step to step.

        weight(age, step) = decay ^ age  if  age ≤ last  else  0

    Args:
        decay: β in [0, 1]; default 0.7, as in vSAM.
        last: The last age at which the component is used, a number of steps ≥ 0; default none.
            vSAM: 6.

    Returns:
        A function `(age, step) -> weight`. `age` is int32, the steps since the component was taken
        (0 in the step that takes it). `step` is int32, the steps since the beginning.

    Raises:
        ValueError: If `decay` is outside [0, 1] or `last` is below 0.
        TypeError: If `decay` is neither a number nor a schedule, or `last` is not a Python int.

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
    check_hyperparam("decay", decay, 0, 1)
    if last is not None:
        last = as_count("last", last, 0)

    def weight(age, step):
        power = jax.lax.pow(jnp.asarray(at_step(decay, jnp.asarray(step)), float), jnp.asarray(age))
        return power if last is None else jnp.where(age <= last, power, 0)

    return weight
