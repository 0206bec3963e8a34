"""Metrics: how far each parameter may move. Public as `samx.perturbations.<name>`.

A metric is a function `params -> T`. `T` is a tree like `params` of elementwise scales (a leaf may
be a scalar).
"""

import re
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from samx.core import tree
from samx.core.hyperparams import check_function, check_number

Metric: TypeAlias = Callable[[Any], Any]
LeafPredicate: TypeAlias = Callable[[Any, Any], bool]


def identity() -> Metric:
    """Return the Euclidean metric of plain SAM.

        T = 1

    Returns:
        A metric, `params -> T`.

    Raises:
        Nothing.

    Example:
        >>> from samx.perturbations import identity
        >>> identity()({"kernel": 3.0, "bias": -1.0})
        {'bias': 1.0, 'kernel': 1.0}

    References:
        Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412

    Notes:
        Cost: none; the compiler removes the factor.
    """
    return lambda params: jax.tree.map(lambda _: 1.0, params)


def is_not_bias(path: Any, leaf: Any) -> bool:
    """Return whether a leaf is not a bias, by its name: the leaves that ASAM scales.

        last name in path  is not  "bias", "b", or either with a prefix "..._" or a number after it

    The authors' PyTorch code scales the parameters whose names contain "weight": kernels,
    embeddings and the scales of normalization layers.

    Args:
        path: Key path of the leaf, as `jax.tree_util.tree_map_with_path` passes it.
        leaf: The leaf; not used.

    Returns:
        `False` for `bias`, `b`, `b1`, `in_proj_bias`; `True` for every other name.

    Raises:
        Nothing.

    Example:
        >>> import jax
        >>> from samx.perturbations import is_not_bias
        >>> params = {"kernel": 1.0, "bias": 0.0, "b1": 0.0, "scale": 1.0}
        >>> jax.tree_util.tree_map_with_path(is_not_bias, params)
        {'b1': False, 'bias': False, 'kernel': True, 'scale': True}

    References:
        Kwon et al., ICML 2021, https://arxiv.org/abs/2102.11600 (SamsungLabs/ASAM, asam.py).

    Notes:
        Cost: none; it runs at trace time. The `.value` of an `nnx.Variable` is skipped in the path.
    """
    del leaf
    names = names_of(path)
    return not (names and re.search(r"(^|_)b(ias)?\d*$", names[-1]))


def is_normalization(path: Any, leaf: Any) -> bool:
    """Return whether a leaf belongs to a normalization layer, by its names: the leaves of SAM-ON.

        some name in path  contains "norm",  or is "bn" or "ln", also followed by a number or "_..."

    Args:
        path: Key path of the leaf, as `jax.tree_util.tree_map_with_path` passes it.
        leaf: The leaf; not used.

    Returns:
        `True` for `LayerNorm_0/scale`, `bn1/bias`, `block/norm/scale`; `False` for `Dense_0/bias`.

    Raises:
        Nothing.

    Example:
        >>> import jax
        >>> from samx.perturbations import is_normalization
        >>> params = {"BatchNorm_0": {"scale": 1.0}, "bn1": {"bias": 0.0}, "subnet": {"bias": 0.0}}
        >>> jax.tree_util.tree_map_with_path(is_normalization, params)
        {'BatchNorm_0': {'scale': True}, 'bn1': {'bias': True}, 'subnet': {'bias': False}}

    References:
        Müller et al., NeurIPS 2023, https://arxiv.org/abs/2306.04226 (mueller-mp/SAM-ON), which
        looks for "norm" and "bn" anywhere.

    Notes:
        Cost: none; it runs at trace time. Upper and lower case count as the same. If the name of a
        layer does not show that it normalizes (for example an attribute of an nnx module), write
        your own predicate.
    """
    del leaf
    names = [name.lower() for name in names_of(path)]
    return any("norm" in name or re.match(r"[bl]n(\d|_|$)", name) for name in names)


def names_of(path: Any) -> list[str]:
    """Return the names along a key path, without indices and a `value` of nnx at its end."""
    if not isinstance(path, tuple | list):
        raise TypeError(f"`path` must be the key path of a leaf, a tuple, got {path!r}")
    names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
    while names and names[-1] in ("value", "raw_value", ""):
        names.pop()
    return names


def magnitude(eta: float = 0.01, *, is_scaled: LeafPredicate = is_not_bias) -> Metric:
    """Return the elementwise adaptive metric of ASAM.

        T = |w| + η   on the scaled leaves,   T = 1   on the others

    Args:
        eta: η ≥ 0, in units of the parameters; default 0.01. With 0, a parameter that is zero is
            never perturbed.
        is_scaled: `(path, leaf) -> bool`; default every leaf except biases.

    Returns:
        A metric, `params -> T`.

    Raises:
        ValueError: If `eta` is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.perturbations import magnitude
        >>> metric = magnitude(eta=0.5)
        >>> metric({"kernel": jnp.array([-2.0, 1.0]), "bias": jnp.zeros(2)})
        {'bias': 1.0, 'kernel': Array([2.5, 1.5], dtype=float32)}

    References:
        Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of
        Deep Neural Networks", ICML 2021, https://arxiv.org/abs/2102.11600

    Notes:
        Cost: elementwise work. `eta` may be a traced array.
    """
    check_number("eta", eta, 0)
    check_function("is_scaled", is_scaled, 2)
    return _scaled(lambda w: jnp.abs(tree.widen(w)) + eta, is_scaled)


def layerwise(eta: float = 0.0, *, is_scaled: LeafPredicate = is_not_bias) -> Metric:
    """Return the layer-wise adaptive metric: each tensor may move in proportion to its norm.

        T = ‖w_leaf‖ + η   on the scaled leaves,   T = 1   on the others

    Args:
        eta: η ≥ 0, in units of a tensor's norm; default 0. With 0, a tensor of zeros is never
            perturbed.
        is_scaled: `(path, leaf) -> bool`; default every leaf except biases.

    Returns:
        A metric, `params -> T` with one scalar per leaf.

    Raises:
        ValueError: If `eta` is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.perturbations import layerwise
        >>> float(layerwise()({"kernel": jnp.array([3.0, 4.0])})["kernel"])
        5.0

    References:
        Müller, Vlaar, Rolnick, Hein, "Normalization Layers Are All That Sharpness-Aware
        Minimization Needs", NeurIPS 2023, https://arxiv.org/abs/2306.04226

    Notes:
        The authors' code has `T = ‖w‖·(1 + η)`, where η only rescales `rho`. If every leaf is
        scaled, `eta=0` with the radius `(1 + η)·rho` matches it. Cost: one norm per leaf.
    """
    check_number("eta", eta, 0)
    check_function("is_scaled", is_scaled, 2)
    return _scaled(lambda w: tree.plain_norm(w) + eta, is_scaled)


def constants(scales: Any) -> Metric:
    """Return a metric of fixed scales, one for each leaf (or each element).

        T = scales

    Args:
        scales: Tree like `params`; its leaves are numbers, or arrays that broadcast to the leaf.

    Returns:
        A metric, `params -> scales`.

    Raises:
        TypeError: If a leaf of `scales` is not a real number, nor an array of them.
        ValueError: When used, if `scales` does not have the structure of `params`.

    Example:
        Let one layer move twice as far as the other:

        >>> import jax.numpy as jnp, optax
        >>> from samx.perturbations import constants, metric_ball
        >>> ball = metric_ball(0.1, constants({"a": 2.0, "b": 1.0}))
        >>> g = {"a": jnp.ones(()), "b": jnp.ones(())}
        >>> eps, _ = ball.update(g, ball.init(g), g)
        >>> round(float(eps["a"] / eps["b"]), 3)  # the step scales with T²
        4.0

    References:
        Haas, Xu, Cevher, Vankadara, "µP²: Effective Sharpness Aware Minimization Requires
        Layerwise Perturbation Scaling", NeurIPS 2024, https://arxiv.org/abs/2411.00075

    Notes:
        Cost: elementwise work.
    """
    for path, scale in jax.tree_util.tree_leaves_with_path(scales):
        is_right = tree.is_array(scale) and not jnp.issubdtype(jnp.result_type(scale), bool)
        if not is_right or jnp.iscomplexobj(scale):
            where = f"`scales`{jax.tree_util.keystr(path)}"
            raise TypeError(f"constants: {where} must be a real number, got {scale!r}")

    def metric(params):
        if jax.tree.structure(scales) != jax.tree.structure(params):
            raise ValueError(
                "constants: `scales` must have the structure of `params`, got "
                f"{jax.tree.structure(scales)} for {jax.tree.structure(params)}"
            )
        return scales

    return metric


def checked_metric(name: str, metric: Metric | None) -> Metric:
    """Return a metric whose scales are checked where it is called; `identity()` for `None`."""
    if metric is None:
        return identity()
    check_function("metric", metric, 1)

    def checked(params):
        scales, (leaves, structure) = metric(params), jax.tree_util.tree_flatten_with_path(params)
        try:
            found = structure.flatten_up_to(scales)
        except ValueError as error:
            raise ValueError(
                f"{name}: `metric` must return the structure of `params`, {structure}, "
                f"got {jax.tree.structure(scales)}"
            ) from error
        for (path, w), scale in zip(leaves, found, strict=True):
            _check_scale(f"{name}: `metric(params)`{jax.tree_util.keystr(path)}", scale, w)
        return scales

    return checked


def _check_scale(where: str, scale: Any, w: Any) -> None:
    """Require a real number, or an array of them that broadcasts to the shape of a leaf."""
    if not tree.is_array(scale) or isinstance(scale, jax.ShapeDtypeStruct):
        raise TypeError(f"{where} must be an array, got a {type(scale).__name__}")
    if jnp.iscomplexobj(scale):
        raise TypeError(f"{where} must be real, got complex numbers")
    shape = jnp.shape(w)
    try:
        is_right = jnp.broadcast_shapes(jnp.shape(scale), shape) == shape
    except ValueError:
        is_right = False
    if not is_right:
        raise ValueError(
            f"{where} must be one number or have the shape of `params`, {shape}, "
            f"got {jnp.shape(scale)}"
        )


def _scaled(scale: Callable[[Any], Any], is_scaled: LeafPredicate) -> Metric:
    """Return `T = scale(leaf)` on the floating leaves chosen by `is_scaled`, 1 on the others."""

    def metric(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, w: scale(w) if tree.is_inexact(w) and is_scaled(path, w) else 1.0, params
        )

    return metric
