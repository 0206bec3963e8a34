"""Treat the layers of a stacked leaf one by one. Public in `samx.perturbations`."""

from typing import Any

import jax
import jax.numpy as jnp

from samx.core.aliases import Transformation
from samx.core.hyperparams import check_function
from samx.core.transformation import (
    CLOSURES_OF_PARAMS,
    as_transformation,
    checked_transformation,
    unify,
)
from samx.perturbations.metrics import LeafPredicate


def per_layer(perturbation: Any, is_stacked: LeafPredicate) -> Transformation:
    """Let a perturbation see each layer of a stacked leaf as a leaf of its own.

        w_l = w[l]                     for each layer l of a stacked leaf w: [layers, ...]
        ε   = perturbation(g_1, g_2, ..., g_layers, and all other leaves)

    `nnx.scan` and `nn.scan` stack the kernels of their layers, `[layers, in, out]`. A geometry that
    treats leaves or kernels apart, such as `layerwise`, `layer_steps`, `spectral_ball`,
    `z_score_ball` or `centralized_ball`, would take them for one kernel.

    Args:
        perturbation: An optax transformation `g -> ε`.
        is_stacked: `(path, leaf) -> bool`, whether the first axis of a leaf counts layers; `path`
            is the key path of `jax.tree_util.tree_map_with_path`.

    Returns:
        An optax transformation `g -> ε`. Inside it, a stacked leaf is a list of layers: predicates
        see paths with one index more. Norms over all leaves do not change.

    Raises:
        ValueError: If `is_stacked` chooses a leaf without axes.
        TypeError: If `perturbation` is not a transformation, or `is_stacked` is not a function.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.perturbations import layerwise, metric_ball, per_layer
        >>> params = {"blocks": jnp.array([[[1.0]], [[3.0]]]), "head": jnp.array([[1.0]])}
        >>> ball = per_layer(metric_ball(1.0, layerwise()), lambda path, leaf: leaf.ndim == 3)
        >>> eps, _ = ball.update(params, ball.init(params), params)
        >>> bool(eps["blocks"][1, 0, 0] > eps["blocks"][0, 0, 0])  # the longer layer moves further
        True

    References:
        None; a loop over the layers that PyTorch's code has as separate parameters.

    Notes:
        The compiled program grows with the number of layers. Cost: beyond that of the perturbation,
        the stacked leaves are cut and joined, two passes over them. `static_args`: `is_stacked`.
    """
    check_function("is_stacked", is_stacked, 2)
    perturbation = as_transformation("per_layer", "perturbation", perturbation)

    def cut(params, like):
        return jax.tree.map(lambda stacked, x: [*x] if stacked else x, _stacked(like), params)

    def joined(layers, like):
        return jax.tree.map(
            lambda stacked, x: jnp.stack(x) if stacked else x, _stacked(like), layers
        )

    def _stacked(params):
        return jax.tree_util.tree_map_with_path(_checked, params)

    def _checked(path, leaf):
        if not is_stacked(path, leaf):
            return False
        if not jnp.ndim(leaf):
            where = f"params{jax.tree_util.keystr(path)}"
            raise ValueError(
                f"per_layer: `is_stacked` must choose leaves [layers, ...], got {where}"
            )
        return True

    def init_fn(params):
        return perturbation.init(cut(params, params))

    def update_fn(updates, state, params, **extra):
        extra = unify("per_layer", extra)
        inside = {
            name: extra[name].compose(lambda layers: joined(layers, params))
            for name in CLOSURES_OF_PARAMS
            if name in extra
        }
        eps, state = perturbation.update(
            cut(updates, params), state, cut(params, params), **extra | inside
        )
        return joined(eps, params), state

    return checked_transformation("per_layer", init_fn, update_fn)
