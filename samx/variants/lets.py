"""LETS: a perturbation radius that is learned along with the parameters.

Wang, Jiang, Fu, Zhang. "Enhancing Sharpness-Aware Minimization by Learning Perturbation Radius",
ECML-PKDD 2024. https://arxiv.org/abs/2408.08222
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from samx.core import tree
from samx.core.aliases import DType, Perturbation, ScalarOrSchedule, Transformation
from samx.core.closures import Closure
from samx.core.hyperparams import (
    at_step,
    check_choice,
    check_hyperparam,
    check_number,
    check_static_number,
    next_step,
)
from samx.core.readings import UNKNOWN, Readings, no_readings
from samx.core.sharp import ascend, sharp_gradient
from samx.core.slopes import values_and_slopes
from samx.core.transformation import as_transformation, base_keywords, closure_transformation
from samx.perturbations.balls import metric_ball


class LETSState(NamedTuple):
    """State of `lets`.

    Attributes:
        step: int32, optimizer steps so far; the schedule of `rho_learning_rate` runs on it.
        rho: Radius of the next step, float32 or wider.
        gap: L_V − L_T after the last step.
        hypergradient: dF/dρ of the last step.
        base: State of the base optimizer.
        perturbation: State of the perturbation.
        readings: Readings of the last step.
    """

    step: jax.Array
    rho: jax.Array
    gap: jax.Array
    hypergradient: jax.Array
    base: optax.OptState
    perturbation: optax.OptState
    readings: Readings


def lets(
    base: optax.GradientTransformation,
    rho: float = 0.05,
    rho_learning_rate: ScalarOrSchedule = 1.0,
    *,
    hessian: Literal["exact", "diag_sq"] = "exact",
    bounds: tuple[float, float] = (1e-4, 100.0),
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """SAM with a learned radius (LETS).

        g   = ∇L(w)                                    (the incoming updates)
        v   = g / ‖g‖
        g_s = ∇L(w + ρ v)
        w'  = w + base(g_s)                            (the step)
        F   = ½ (L_V(w') − L_T(w'))²                   (`validation_fn`, `training_fn`)
        dF/dρ = (L_V(w') − L_T(w')) ⟨∇L_V(w') − ∇L_T(w'), dw'/dρ⟩
        "exact":    dw'/dρ = base'(g_s) ∇²L(w + ρ v) v
        "diag_sq":  dw'/dρ = base'(g_s) (g_s² v)
        log ρ = log ρ − β ρ dF/dρ                      (that of the next step)

    Args:
        base: The optimizer that takes the step, including weight decay and clipping.
        rho: Initial radius ρ > 0; default 0.05.
        rho_learning_rate: Learning rate β ≥ 0 of log ρ; default 1, for "exact"; "diag_sq" needs a
            thousand times as much. It depends on the scale of the loss. 0 keeps ρ.
        hessian: Two forms of this one paper's derivative. "exact", the default: the derivative of
            the gradient along `v`, forward over reverse. "diag_sq": the squares of `g_s` replace
            the Hessian, without a further pass. The sign is mostly the same (on 40 of 40 steps of a
            small problem, on 9 of 10 on the digits), but the size is a sixtieth to a thousandth.
        bounds: Smallest and largest radius; default 1e-4 and 100.
        perturbation: Replaces the ball. It must have a radius of 1, which ρ multiplies:
            `metric_ball(1.0, magnitude())` makes it LETS-ASAM.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that wraps `base`. `update` needs `value_fn` and two more losses, each
        `params -> scalar` and on other examples on each step: `training_fn`, L_T, on training
        examples that are not in the batch of the step, such as the next batch; and `validation_fn`,
        L_V, on held-out examples. Read the radius with `optax.tree.get(state, "rho")`.

    Raises:
        ValueError: If a number is out of range (`rho` outside `bounds` included), `bounds` are not
            0 < least ≤ largest, or `hessian` is unknown.
        TypeError: If `rho` is a schedule, `rho_learning_rate` is neither a number nor a schedule,
            or `base` or `perturbation` is not a transformation.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> tx = samx.lets(optax.sgd(0.1), rho=0.5, rho_learning_rate=0.1)
        >>> w, loss = jnp.array([1.0, 2.0]), lambda w, x: jnp.mean((x @ w - 1) ** 2)
        >>> state, data = tx.init(w), jnp.array([[1.0, 1.0], [0.0, 1.0]])
        >>> for t in range(3):
        ...     batch, following, held_out = data[t % 2], data[(t + 1) % 2], jnp.array([1.0, 0.0])
        ...     value_fn, training_fn, validation_fn = (
        ...         lambda w, x=x: loss(w, x) for x in (batch, following, held_out))
        ...     g = jax.grad(value_fn)(w)
        ...     updates, state = tx.update(g, state, w, value_fn=value_fn,
        ...                                training_fn=training_fn, validation_fn=validation_fn)
        ...     print(round(float(state.rho), 3), round(float(state.gap), 3))
        0.499 0.083
        0.55 -2.891
        0.548 0.111

    References:
        Wang, Jiang, Fu, Zhang, ECML-PKDD 2024, https://arxiv.org/abs/2408.08222

    Notes:
        `rho_learning_rate=0` is SAM in front of `base`. F is the upper problem of the paper, and
        the exact dF/dρ is its derivative by the chain rule. The update of log ρ, the form of
        "diag_sq", `rho_learning_rate` and `bounds` are inferred: no code was published, and only
        the head of the text was read.
        The equation has L_T on the whole training set. A batch that the step has not used estimates
        it; the step's own batch does not: on digits with 30% wrong labels dF/dρ had the sign of F
        after 20 steps on 68% of the steps with the next batch, on 63% with all training examples,
        and on 19% with the step's own. With clean labels it was half of the steps with each.
        Even so no good radius was found. F after a whole training falls as the radius grows, and is
        smallest where nothing is learned. Starts 100 times apart stayed apart, and from the tuned
        radius the accuracy was that of SAM (`examples/claims/lets.py`).
        The direction `v` does not depend on ρ. Where `base` has no derivative, as Adam where both
        moments are 0, the parameter is taken not to move with ρ. A hypergradient that is not finite
        leaves ρ unchanged. If the loss does not depend on ρ through `base`, as after a sign, ρ
        stays.
        Cost: 6 gradients per step, "diag_sq" 4: g, g_s, its derivative along v, which takes as many
        products as two, and both other losses at w'. These losses and their slopes along dw'/dρ
        take one forward pass with as many products as two gradients. Devices then exchange numbers
        only, so they send 3 gradients per step, "diag_sq" 2. A loss with a custom VJP has no
        forward derivative: there two gradients take the place of that pass, which are sent too
        under `jax.jit` with a sharded batch. State: that of `base`, and numbers. `training_fn` and
        `validation_fn` are evaluated once per step; do not collect statistics of normalization in
        them. Inside `data_parallel` their means over the devices have equal shares. `static_args`:
        `base`, `rho`, `hessian`, `bounds`.
    """
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(f"lets: `bounds` must be two numbers, got {bounds!r}")
    least, largest = bounds
    check_static_number("bounds", least, 0, excluded=0)
    check_static_number("bounds", largest, 0, excluded=0)
    if largest < least:
        raise ValueError(f"lets: `bounds` must be 0 < least <= largest, got {bounds}")
    check_number("rho", rho, least, largest)
    check_hyperparam("rho_learning_rate", rho_learning_rate, 0)
    check_choice("hessian", hessian, ("exact", "diag_sq"))
    base = as_transformation("lets", "base", base)
    perturbation = metric_ball(1.0) if perturbation is None else perturbation
    perturbation = as_transformation("lets", "perturbation", perturbation)
    cost, differentiate = (6, _exact) if hessian == "exact" else (4, _diagonal)
    sharp = partial(sharp_gradient, gradients=cost, perturb_dtype=perturb_dtype)

    def init_fn(params):
        readings = no_readings(params)
        return LETSState(
            step=jnp.zeros((), jnp.int32),
            rho=jnp.asarray(rho, readings.loss.dtype),
            gap=jnp.zeros_like(readings.loss),
            hypergradient=jnp.zeros_like(readings.loss),
            base=base.init(params),
            perturbation=perturbation.init(params),
            readings=readings,
        )

    def update_fn(
        g, state, params, *, value_fn, training_fn, validation_fn, value=UNKNOWN, **extra
    ):
        v, g_a, ball = ascend(value_fn, perturbation, g, state.perturbation, params, **extra)
        given = {} if value is UNKNOWN else {"value": value}
        keywords = base_keywords("lets", {"value_fn": value_fn, **given, **extra})

        def sharp_at(rho):
            eps, last = tree.scaled(rho, v), state.readings
            return sharp(value_fn, params, eps, last, loss=value, g=g_a, ball=ball)

        def base_step(g_s):
            return base.update(g_s, state.base, params, **keywords)

        g_s, g_s_along_v, readings = differentiate(sharp_at, state.rho, v)
        updates, moved, base_state = jax.jvp(base_step, (g_s,), (g_s_along_v,), has_aux=True)
        after = optax.apply_updates(params, updates)
        gap, hypergradient = _hypergradient(training_fn, validation_fn, after, moved)
        moves = at_step(rho_learning_rate, state.step) * state.rho * hypergradient
        rho = jnp.clip(state.rho * jnp.exp(-_finite_or_zero(moves)), least, largest)
        step, dtype = next_step(state.step), state.rho.dtype
        rho, gap, hypergradient = (x.astype(dtype) for x in (rho, gap, hypergradient))
        return updates, LETSState(step, rho, gap, hypergradient, base_state, ball, readings)

    return closure_transformation(init_fn, update_fn, name="lets")


def _exact(sharp_at: Any, rho: jax.Array, v: Any) -> tuple[Any, Any, Readings]:
    """Differentiate the sharp gradient with respect to the radius: forward over reverse."""
    del v
    return jax.jvp(sharp_at, (rho,), (jnp.ones_like(rho),), has_aux=True)


def _diagonal(sharp_at: Any, rho: jax.Array, v: Any) -> tuple[Any, Any, Readings]:
    """Approximate the same derivative: the squares of the gradient replace the Hessian."""
    g_s, readings = sharp_at(rho)
    return g_s, jax.tree.map(_square_along, g_s, v), readings


def _hypergradient(
    training_fn: Closure, validation_fn: Closure, after: Any, moved: Any
) -> tuple[jax.Array, jax.Array]:
    """Return the gap L_V - L_T at the new point, and dF/dρ; `moved` is its derivative by ρ."""
    moved = _without_nans(moved, after)
    held_out, train = values_and_slopes((validation_fn, training_fn), after, moved)
    gap = held_out[0] - train[0]
    return gap, gap * (held_out[1] - train[1])


def _finite_or_zero(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, 0)


def _square_along(g_s: jax.Array, v: jax.Array) -> Any:
    """Return `g_s² v` as a tangent of `g_s`."""
    if not tree.is_inexact(g_s):
        return np.zeros(g_s.shape, jax.dtypes.float0)
    square = jnp.abs(tree.widen(g_s)) ** 2
    return (square * tree.widen(v)).astype(g_s.dtype)


def _without_nans(moved: Any, like: Any) -> Any:
    """Put zeros where the base has no derivative, and at integers."""
    return jax.tree.map(
        lambda m, x: jnp.where(jnp.isnan(m), 0, m) if tree.is_inexact(x) else jnp.zeros_like(x),
        moved,
        like,
    )
