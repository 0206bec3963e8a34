"""Combinations: what the base optimizer gets of the gradient and the sharp gradient."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.aliases import ScalarOrSchedule, Transformation
from samx.core.hyperparams import at_step, check_count, check_number, next_step
from samx.core.transformation import as_transformation, check_in_front, closure_transformation

__all__ = ["decaying", "mix", "renormalized", "surrogate_gap"]

Mixing: TypeAlias = Callable[[jax.Array, jax.Array], Any]


class CombinationState(NamedTuple):
    """State of a combination.

    Attributes:
        step: int32, optimizer steps so far; schedules run on it.
        inner: State of the transformation.
    """

    step: jax.Array
    inner: optax.OptState


def mix(
    inner: optax.GradientTransformation, weight: ScalarOrSchedule, *, name: str = "mix"
) -> Transformation:
    """More or less of the sharp gradient: a straight line through both gradients.

        return g + weight (inner(g) − g)

    Args:
        inner: A sharpness-aware transformation that stands first in a chain, such as `samx.sam`.
        weight: γ ≥ 0, a number or a schedule over the optimizer's steps: 0 is the gradient, 1 the
            sharp gradient, more than 1 goes beyond it.
        name: What error messages call it.

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
        `static_args`: `inner`, `name`.
    """
    check_number("weight", weight, 0)

    def combine(g, g_s, step):
        return tree.on_line(g, g_s, at_step(weight, step))

    return _combination(name, inner, combine)


def surrogate_gap(
    inner: optax.GradientTransformation,
    alpha: ScalarOrSchedule,
    descend: Literal["sharp", "clean"] = "sharp",
    *,
    name: str = "surrogate_gap",
) -> Transformation:
    """Descend one of both losses, and, across its gradient, also the gap between them: GSAM's.

        g_s = inner(g)
        "sharp":  return g_s − α (g − (⟨g, g_s⟩ / ‖g_s‖²) g_s)
        "clean":  return g + α (g_s − (⟨g_s, g⟩ / ‖g‖²) g)

    Args:
        inner: A sharpness-aware transformation that stands first in a chain, such as `samx.sam`.
        alpha: α ≥ 0, a number or a schedule over the optimizer's steps; 0 is `inner`, with "clean"
            the base optimizer.
        descend: Which loss is descended along its own gradient; default "sharp".
        name: What error messages call it.

    Returns:
        An `optax.GradientTransformationExtraArgs`, to stand first in a chain. `update` needs what
        `inner` needs.

    Raises:
        ValueError: If `alpha` is a negative number, or `descend` unknown; in `init`, if `inner`
            wraps a base.
        TypeError: If `alpha` is neither number nor schedule, or `inner` no transformation.

    Example:
        The gap of ASAM, on every second step:

        >>> import samx
        >>> gap = samx.combinations.surrogate_gap(samx.asam(0.5), alpha=0.2)
        >>> tx = samx.perturb_if(samx.policies.every(2), gap)

    References:
        Zhuang et al., "Surrogate Gap Minimization Improves Sharpness-Aware Training", ICLR 2022,
        https://arxiv.org/abs/2203.08065 (google-research/big_vision)

    Notes:
        The gap falls without a first-order change of the loss that is descended. Cost:
        that of `inner`, and two inner products.
        `static_args`: `inner`, `descend`, `name`.
    """
    check_number("alpha", alpha, 0)
    if descend not in ("sharp", "clean"):
        raise ValueError(f"{name}: `descend` must be 'sharp' or 'clean', got {descend!r}")

    def combine(g, g_s, step):
        if descend == "clean":
            return tree.add_scaled(g, at_step(alpha, step), tree.reject(g_s, g))
        return tree.add_scaled(g_s, -1 * at_step(alpha, step), tree.reject(g, g_s))

    return _combination(name, inner, combine)


def renormalized(
    inner: optax.GradientTransformation, *, name: str = "renormalized"
) -> Transformation:
    """The direction of the sharp gradient, as long as the gradient: Stable SAM's.

        g_s = inner(g)
        return (‖g‖ / ‖g_s‖) g_s

    Args:
        inner: A sharpness-aware transformation that stands first in a chain, such as `samx.sam`.
        name: What error messages call it.

    Returns:
        An `optax.GradientTransformationExtraArgs`, to stand first in a chain. `update` needs what
        `inner` needs.

    Raises:
        ValueError: In `init`, if `inner` wraps a base.
        TypeError: If `inner` is no transformation.

    Example:
        >>> import samx
        >>> tx = samx.combinations.renormalized(samx.friendly_sam(0.1))

    References:
        Tan et al., "Stabilizing Sharpness-aware Minimization Through A Simple Renormalization
        Strategy", JMLR 2025, https://arxiv.org/abs/2401.07250 (cltan023/stablesam2024)

    Notes:
        1e-12 is added to the norm of the sharp gradient. Optimizers that divide by the size of
        gradients, such as Adam, undo most of it. Cost: that of `inner`, and two norms.
        `static_args`: `inner`, `name`.
    """

    def combine(g, g_s, step):
        del step
        ratio = tree.norm(g) / (tree.norm(g_s) + 1e-12)
        return jax.tree.map(lambda x: tree.widen(x) * jnp.asarray(ratio, tree.real_dtype(x)), g_s)

    return _combination(name, inner, combine)


def _combination(
    name: str, inner: Any, combine: Callable[[Any, Any, jax.Array], Any]
) -> Transformation:
    """`combine(g, inner(g), step)`, in the dtypes of the parameters."""
    inner = as_transformation(name, "inner", inner)

    def init_fn(params):
        inner_state = inner.init(params)
        check_in_front(name, inner_state)
        return CombinationState(jnp.zeros((), jnp.int32), inner_state)

    def update_fn(g, state, params, *, value_fn, **extra):
        g_s, inner_state = inner.update(g, state.inner, params, value_fn=value_fn, **extra)
        updates = tree.cast_like(combine(g, g_s, state.step), params)
        return updates, CombinationState(next_step(state.step), inner_state)

    return closure_transformation(init_fn, update_fn, name=name)


def decaying(decay: ScalarOrSchedule = 0.7, last: int | None = None) -> Mixing:
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
