"""Scalings of LightSAM and AdaSAM: optax's accumulators without bias correction, starting at ε².

Each returns `numerator / √u`. `u` starts at `eps²`, in place of the ε that other optimizers add to
the denominator. Accumulators and results are in float32 or wider. All memory is in the state, so
the same scaling can be used for the ascent and for the descent.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.aliases import Transformation
from samx.core.hyperparams import check_hyperparam, check_number, map_schedule
from samx.core.transformation import closure_transformation


def adagrad_norm(eps: Any) -> optax.GradientTransformation:
    """Scale like AdaGrad-Norm: `u = u + ‖g‖²;  g / √u`, with one number √u, which is in range."""
    _check_eps(eps)

    def init_fn(params):
        return jnp.full((), eps, tree.real_dtype(*jax.tree.leaves(params)))

    def update_fn(updates, state, params=None):
        del params
        g = jax.tree.map(tree.widen, updates)
        scale, norm = tree.length(g)
        root = jnp.hypot(scale * state, norm)
        return tree.with_length(g, 1.0, tree.Length(scale, root)), root / scale

    return optax.GradientTransformation(init_fn, update_fn)


def adagrad(eps: Any) -> optax.GradientTransformation:
    """Scale like AdaGrad: `u = u + g²;  g / √u`, elementwise."""
    _check_eps(eps)

    def init_fn(params):
        return _filled(params, eps)

    def update_fn(updates, state, params=None):
        del params
        g = jax.tree.map(tree.widen, updates)
        u = optax.tree.add(state, _squares(g))
        return _over_root(g, u), u

    return optax.GradientTransformation(init_fn, update_fn)


class Moments(NamedTuple):
    """State of `adam`: moving averages of the gradient and of its square."""

    mean: Any
    square: Any


def adam(b1: Any, b2: Any, eps: Any) -> optax.GradientTransformation:
    """Scale like Adam: `r = b1 r + (1 − b1) g;  u = b2 u + (1 − b2) g²;  r / √u`."""
    _check_decays(b1, b2)
    _check_eps(eps)

    def init_fn(params):
        return Moments(_zeros(params), _filled(params, eps))

    def update_fn(updates, state, params=None):
        del params
        moments = _averaged(state, updates, b1, b2)
        return _over_root(moments.mean, moments.square), moments

    return optax.GradientTransformation(init_fn, update_fn)


class LargestMoments(NamedTuple):
    """State of `amsgrad`: the moments of `adam`, and the largest average square so far."""

    moments: Moments
    largest: Any


def amsgrad(b1: Any, b2: Any, eps: Any) -> optax.GradientTransformation:
    """Scale like `adam`, but divide by the root of the largest `u` so far."""
    _check_decays(b1, b2)
    _check_eps(eps)

    def init_fn(params):
        moments = Moments(_zeros(params), _filled(params, eps))
        return LargestMoments(moments, _filled(params, eps))

    def update_fn(updates, state, params=None):
        del params
        moments = _averaged(state.moments, updates, b1, b2)
        largest = jax.tree.map(jnp.maximum, state.largest, moments.square)
        return _over_root(moments.mean, largest), LargestMoments(moments, largest)

    return optax.GradientTransformation(init_fn, update_fn)


class OptimizerState(NamedTuple):
    """State of a variant that is an optimizer.

    Attributes:
        sharp: State of the transformation that takes the sharp gradient.
        base: State of the transformation that turns it into a step.
    """

    sharp: optax.OptState
    base: optax.OptState


def optimizer(
    name: str,
    sharp: optax.GradientTransformationExtraArgs,
    moments: optax.GradientTransformation,
    learning_rate: Any,
) -> Transformation:
    """Make the optimizer `w − η moments(sharp(g))`, in the dtypes of the parameters.

    It is a chain whose state has a field `base`, which shows that it contains a base optimizer.
    """
    check_hyperparam("learning_rate", learning_rate, 0)
    learning_rate = map_schedule(learning_rate, lambda rate: rate)
    base = optax.chain(
        moments, optax.scale_by_learning_rate(learning_rate), optax.stateless(tree.cast_like)
    )

    def init_fn(params):
        return OptimizerState(sharp.init(params), base.init(params))

    def update_fn(g, state, params, **extra):
        g_s, sharp_state = sharp.update(g, state.sharp, params, **extra)
        updates, base_state = base.update(g_s, state.base, params)
        return updates, OptimizerState(sharp_state, base_state)

    return closure_transformation(init_fn, update_fn, name=name)


def _check_eps(eps: Any) -> None:
    check_number("eps", eps, 0, excluded=0)  # a zero gradient would give 0 / 0


def _check_decays(b1: Any, b2: Any) -> None:
    check_number("b1", b1, 0, 1)
    check_number("b2", b2, 0, 1)


def _zeros(params: Any) -> Any:
    return optax.tree.zeros_like(jax.tree.map(tree.widen, params))


def _filled(params: Any, eps: Any) -> Any:
    return jax.tree.map(lambda x: x.real + eps**2, _zeros(params))


def _squares(g: Any) -> Any:
    return jax.tree.map(lambda x: (jnp.conj(x) * x).real, g)


def _averaged(old: Moments, g: Any, b1: Any, b2: Any) -> Moments:
    def average(decay, old, new):
        return jax.tree.map(lambda m, x: (decay * m + (1 - decay) * x).astype(m.dtype), old, new)

    g = jax.tree.map(tree.widen, g)
    return Moments(average(b1, old.mean, g), average(b2, old.square, _squares(g)))


def _over_root(numerator: Any, u: Any) -> Any:
    return jax.tree.map(lambda x, u: x / jnp.sqrt(u), numerator, u)
