"""Lookbehind-SAM: several climbs and several steps on one batch, averaged with the start.

Mordido, Malviya, Baratin, Chandar. "Lookbehind-SAM: k steps back, 1 step forward", ICML 2024.
https://arxiv.org/abs/2307.16704
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.aliases import DType, Perturbation, Radius, ScalarOrSchedule, Transformation
from samx.core.closures import Closure
from samx.core.convolutions import fast_convolutions
from samx.core.hyperparams import (
    Default,
    as_count,
    at_step,
    check_hyperparam,
    next_step,
)
from samx.core.readings import UNKNOWN, Readings, no_readings, take_readings
from samx.core.sharp import ascend, evaluate_at, perturbed
from samx.core.transformation import as_transformation, base_keywords, closure_transformation
from samx.variants._ball import ball_of

NAME = "lookbehind_sam"


class LookbehindSAMState(NamedTuple):
    """State of `lookbehind_sam`.

    Attributes:
        step: int32, optimizer steps so far; schedules of α run on it.
        base: State of the base, which has taken `steps` times as many steps; its schedules have
            not.
        perturbation: State of the perturbation.
        readings: Readings of the last step.
    """

    step: jax.Array
    base: optax.OptState
    perturbation: optax.OptState
    readings: Readings


class _Inner(NamedTuple):
    """After some inner steps: ε, the displacement f − w, and what the last gradient was."""

    eps: Any
    moved: Any
    g: Any
    own_g: Any
    base: optax.OptState
    loss: jax.Array


def lookbehind_sam(
    base: optax.GradientTransformation,
    rho: Radius = Default(0.05),
    steps: int = 5,
    alpha: ScalarOrSchedule | None = 0.5,
    *,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Lookbehind-SAM: climb k times on one batch, and step down from each point.

        p_0 = f_0 = w
        for i = 1, ..., k:
            p_i = p_{i−1} + ρ ∇L(p_{i−1}) / ‖∇L(p_{i−1})‖
            f_i = f_{i−1} + base(∇L(p_i))
        return α (f_k − w)

    Args:
        base: The optimizer that takes the inner steps, including weight decay and clipping. Its
            state runs on through all of them.
        rho: Radius ρ ≥ 0 of each climb; default 0.05.
        steps: Number k ≥ 1 of inner steps; default 5.
        alpha: α ≥ 0 of the average with the start; default 0.5. `None` is the adaptive α: for each
            tensor (1 + c) / 2, where c is the cosine between its first inner step and all of them.
        perturbation: Replaces the ball and `rho`. Lookbehind-ASAM is
            `perturbations.metric_ball(rho, perturbations.magnitude(0.01))`, with T at each p_i.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that wraps `base`. `update` needs `value_fn`.

    Raises:
        ValueError: If a number is out of range, or `rho` is given together with `perturbation`.
        TypeError: If a hyperparameter is neither a number nor a schedule, `steps` is not a Python
            int, or `base` is not a transformation.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> w, loss = jnp.array([3.0, 4.0]), lambda w: 0.5 * w @ w
        >>> for k in (1, 2):
        ...     tx = samx.lookbehind_sam(optax.sgd(0.5), rho=0.1, steps=k, alpha=1.0)
        ...     updates, state = tx.update(w, tx.init(w), w, value_fn=loss)
        ...     print([round(float(u), 2) for u in updates])
        [-1.53, -2.04]
        [-3.09, -4.12]

    References:
        Mordido, Malviya, Baratin, Chandar, ICML 2024, https://arxiv.org/abs/2307.16704

    Notes:
        `steps=1` and `alpha=1` is SAM; `rho=0` is Lookahead with one batch for k steps. The authors
        run ρ = 0.5 with ASAM's metric and k = 5. As we remember the paper, its adaptive α is one
        number; their code has one for each tensor, as here. Cost: k + 1 gradients per step, one
        after the other: the gradient at p_i is both climbed and descended, which the published loop
        takes twice. Transient copies: ε, the displacement and a gradient; with the adaptive α one
        more. Schedules count steps, not inner steps, those inside the base too: of every part of
        optax whose state holds a count alone, such as learning rates and weight decays, and of
        `inject_hyperparams`. Everything else counts inner steps, such as Adam's bias correction and
        Prodigy. Put `optax.MultiSteps` around it, not into the base. Inner steps see the
        perturbation's state at the beginning of the step. Readings: `sharp_loss` is that at p_k.
        Fidelity: matches chandar-lab/Lookbehind-SAM. `static_args`: `base`, `steps` (and `alpha` if
        it is `None`).
    """
    if alpha is not None:
        check_hyperparam("alpha", alpha, 0)
    steps = as_count("steps", steps)
    ball = ball_of(NAME, rho, perturbation)
    base = as_transformation(NAME, "base", base)

    def init_fn(params):
        step = jnp.zeros((), jnp.int32)
        return LookbehindSAMState(step, base.init(params), ball.init(params), no_readings(params))

    def update_fn(g, state, params, *, value_fn, value=UNKNOWN, **extra):
        _, g_a, ball_state = ascend(value_fn, ball, g, state.perturbation, params, **extra)
        climb = partial(ball.update, state=state.perturbation, value_fn=value_fn, **extra)
        descend = partial(base.update, **base_keywords(NAME, {"value_fn": value_fn, **extra}))
        step = partial(_step, value_fn, params, climb, descend, perturb_dtype)
        start = _start(value_fn, params, g, g_a, state)
        if alpha is None:
            first = step(start)
            inner = _repeated(step, steps - 1, first)
            updates = jax.tree.map(_turned, first.moved, inner.moved)
        else:
            inner = _repeated(step, steps, start)
            updates = tree.scaled(at_step(alpha, state.step), inner.moved)
        _, after_one = descend(g, state.base, params, value=inner.loss, grad=g)
        readings = take_readings(
            *(state.readings, value, inner.loss, g_a, inner.g, params),
            point=lambda: perturbed(params, inner.eps, perturb_dtype),
            gradients=1 + steps,
            ball=ball_state,
            mean_of_ascents=value_fn.mean_of_ascents,
        )
        new = LookbehindSAMState(
            next_step(state.step), _held(inner.base, after_one), ball_state, readings
        )
        return tree.cast_like(updates, params), new

    return closure_transformation(init_fn, update_fn, name=NAME)


def _start(value_fn: Closure, params: Any, g: Any, g_a: Any, state: Any) -> _Inner:
    zeros = optax.tree.zeros_like(jax.tree.map(tree.widen, params))
    g, g_a = (tree.cast_like(x, params) for x in (g, g_a))
    loss = jnp.zeros_like(state.readings.loss)
    return _Inner(value_fn.pcast_ascent(zeros), zeros, g, g_a, state.base, loss)


def _repeated(step: Callable[[_Inner], _Inner], times: int, start: _Inner) -> _Inner:
    return fast_convolutions(jax.lax.fori_loop)(0, times, lambda _, inner: step(inner), start)


def _step(
    value_fn: Closure,
    params: Any,
    climb: Callable[..., Any],
    descend: Callable[..., Any],
    perturb_dtype: DType,
    inner: _Inner,
) -> _Inner:
    """Climb along the last gradient, take the gradient there, and let the base step along it."""
    point = perturbed(params, inner.eps, perturb_dtype)
    eps = optax.tree.add(inner.eps, climb(inner.own_g, params=point)[0])
    loss, g, own_g = evaluate_at(value_fn, params, eps, perturb_dtype=perturb_dtype)
    fast = tree.cast_like(perturbed(params, inner.moved, "float32"), params)
    move, base = descend(g, inner.base, fast, value=loss, grad=g)
    base = jax.tree.map(lambda new, old: new.astype(old.dtype), base, inner.base)
    moved = tree.add_scaled(inner.moved, 1.0, move)
    base = _held(base, inner.base)
    return _Inner(eps, moved, g, own_g, base, loss.astype(inner.loss.dtype))


def _held(state: optax.OptState, other: optax.OptState) -> optax.OptState:
    """Return the base's state with the step counts of another one in its schedules."""
    injected = optax.InjectStatefulHyperparamsState

    def is_clock(node):  # of a schedule: a state that counts, and holds nothing else
        if "count" not in getattr(node, "_fields", ()):
            return False
        integers = (jnp.issubdtype(x.dtype, jnp.integer) for x in jax.tree.leaves(node))
        return isinstance(node, injected) or all(integers)

    def held(node, other):
        if not isinstance(node, injected):
            return other if is_clock(node) else node
        inner = _held(node.inner_state, other.inner_state)
        return other._replace(inner_state=inner, hyperparams=node.hyperparams)

    return jax.tree.map(held, state, other, is_leaf=is_clock)


def _turned(first: jax.Array, moved: jax.Array) -> jax.Array:
    """Return the displacement of a tensor times (1 + its cosine with the first inner step) / 2."""
    if not tree.is_inexact(moved):
        return moved
    first_length, length = tree.length(first), tree.length(moved)
    unit = tree.with_length(first, 1.0, first_length), tree.with_length(moved, 1.0, length)
    return tree.scaled((1 + tree.dot(*unit)) / 2, moved)
