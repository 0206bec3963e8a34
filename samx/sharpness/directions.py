"""Curvature along directions and in one layer. Public in `samx.sharpness`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from samx.core import tree
from samx.core.convolutions import fast_convolutions
from samx.core.devices import ONE_DEVICE
from samx.core.hyperparams import as_count, check_flag, check_function
from samx.perturbations.metrics import LeafPredicate
from samx.sharpness.coordinates import Coordinates, sharded_like, signs
from samx.sharpness.estimates import Estimate, mean_over, random_key
from samx.sharpness.objective import as_objective
from samx.sharpness.products import Operator, of_finite, product_with


def directional(
    f: Any, params: Any, direction: Any, *, operator: Operator = "hessian"
) -> jax.Array:
    """Measure the curvature along a direction, the Rayleigh quotient of a curvature matrix.

        dᵀ A d / ‖d‖²

    Along the gradient it is the directional sharpness, which decides how far a gradient step may
    go. Along `params` with "ggn", and times ‖w‖², it is the Fisher-Rao norm.

    Args:
        f: The loss, `params -> scalar`, or `samx.sharpness.objective(...)`.
        params: The parameters w, any pytree.
        direction: The direction d, a tree like `params`; its length does not matter.
        operator: The matrix A: "hessian", "ggn" or "empirical_fisher"; default "hessian".

    Returns:
        The curvature, one number; 0 for a direction of zeros.

    Raises:
        ValueError: If `direction` is not a tree like `params`, `operator` is none of the three, or
            `f` lacks what the matrix needs.
        TypeError: If `f` is not a function, or a tree holds something other than arrays.

    Example:
        >>> import jax, jax.numpy as jnp, samx
        >>> def loss(w):
        ...     return w[0] ** 2 + 5 * w[1] ** 2
        >>> w = jnp.array([1.0, 0.0])
        >>> float(samx.sharpness.directional(loss, w, jax.grad(loss)(w)))
        2.0

    References:
        Pan, Li, "Toward Understanding Why Adam Converges Faster Than SGD for Transformers", 2023,
        https://arxiv.org/abs/2306.00204 (directional sharpness);
        Liang, Poggio, Rakhlin, Stokes, "Fisher-Rao Metric, Geometry, and Complexity of Neural
        Networks", AISTATS 2019, https://arxiv.org/abs/1711.01530

    Notes:
        Complex directions are those of `update`: conjugate the gradient of `jax.grad`. Cost: one
        product with the matrix.
    """
    space, times = product_with("directional", f, params, operator)
    d = space.of("direction", direction)
    unit = tree.with_length(d, 1.0, tree.length(d))
    return tree.dot(unit, times(unit))


def alignment(vectors: Any, g: Any) -> jax.Array:
    """Measure how much of a gradient lies along each of several vectors.

        a_i = ⟨v_i, g⟩² / (‖v_i‖² ‖g‖²)

    For orthogonal vectors the sum of all a_i is the part of ‖g‖² in their span.

    Args:
        vectors: k vectors, a tree like `g` with one more axis in front, for example the `vectors`
            of `samx.sharpness.eigenvalues`. Their lengths and signs do not matter.
        g: The gradient, or any other vector.

    Returns:
        `float[k]`, from 0 to 1; 0 for a vector of zeros.

    Raises:
        ValueError: If `vectors` is not a tree like `g` with one more axis in front.
        TypeError: If a tree holds something other than arrays.

    Example:
        >>> import jax.numpy as jnp, samx
        >>> found = samx.sharpness.alignment(2 * jnp.eye(2), jnp.array([3.0, 4.0]))
        >>> [round(float(a), 3) for a in found]
        [0.36, 0.64]

    References:
        Gur-Ari, Roberts, Dyer, "Gradient Descent Happens in a Tiny Subspace", 2018,
        https://arxiv.org/abs/1812.04754

    Notes:
        Complex gradients are those of `update`: conjugate the gradient of `jax.grad`. Cost: k inner
        products.
    """
    space = Coordinates("alignment", g, "g")
    unit = tree.with_length(space.start, 1.0, tree.length(space.start))

    def squared_cosine(v):
        return tree.dot(tree.with_length(v, 1.0, tree.length(v)), unit) ** 2

    return jax.vmap(squared_cosine)(space.stack("vectors", vectors))


def relative_flatness(
    f: Any,
    params: Any,
    is_chosen: LeafPredicate,
    *,
    normalize: bool = False,
    draws: int | None = None,
    key: int | jax.Array = 0,
) -> Estimate:
    """Measure the relative flatness of one layer: its curvature, weighted by its weights.

        Σ_{s,s'} ⟨w_s, w_s'⟩ tr H(s, s')

    w_s are the weights into neuron s: column s of a kernel `[..., in, out]`. H(s, s') is the
    `[in, in]` block of the Hessian for w_s and w_s'. All axes of a kernel but the last are inputs.
    Scaling the layer down and the next one up by the same factor does not change the value.

    Args:
        f: The loss, `params -> scalar`, or `samx.sharpness.objective(...)`.
        params: The parameters, any pytree.
        is_chosen: `(path, leaf) -> bool`, true for the kernel of one layer; `path` is the key path
            of `jax.tree_util.tree_map_with_path`.
        normalize: Whether each trace is divided by the number of inputs, as the authors of FAM do
            in their code (read, not run); default False, the definition of the paper.
        draws: The number of random draws, at least 2; `None`, the default, computes the value.
        key: Seed or random key of the draws; default 0.

    Returns:
        An `Estimate`: the value and its standard error, which is 0 without draws.

    Raises:
        ValueError: If `is_chosen` does not choose one leaf, the leaf is no kernel of real numbers
            with at least 2 axes, or `draws` is below 2.
        TypeError: If an argument has a wrong type.

    Example:
        >>> import jax.numpy as jnp, samx
        >>> def loss(params):
        ...     return jnp.sum((jnp.ones((1, 2)) @ params["kernel"]) ** 2) + params["bias"][0]
        >>> params = {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}
        >>> def is_kernel(path, leaf):
        ...     return leaf.ndim == 2
        >>> found = samx.sharpness.relative_flatness(loss, params, is_kernel)
        >>> float(found.mean), float(found.stderr)
        (8.0, 0.0)

    References:
        Petzka, Kamp, Adilova, Sminchisescu, Boley, "Relative Flatness and Generalization",
        NeurIPS 2021, https://arxiv.org/abs/2001.00939;
        Adilova et al., "FAM: Relative Flatness Aware Minimization", 2023,
        https://arxiv.org/abs/2307.02337 (normalized)

    Notes:
        With R from the QR decomposition of the kernel (or R = W), RᵀR = WᵀW, and the value is
        Σ uᵀHu over all u = Z R with a single 1 in Z. That takes in · min(in, out) products with the
        Hessian of this layer. For random signs Z, E uᵀHu is the same value: one product for each
        draw.
    """
    name = "relative_flatness"
    found, space, start = as_objective(name, f), Coordinates(name, params), random_key(key)
    check_flag("normalize", normalize)
    index = _chosen(space, is_chosen)
    kernel = space.start[index]

    loss = found.closure(name).compose(space.point)

    @jax.value_and_grad
    def value_and_grad(kernel):
        return loss([*space.start[:index], kernel, *space.start[index + 1 :]])

    def curvature(u):
        u = sharded_like(kernel, u.reshape(kernel.shape))
        (value, _), (_, product) = jax.jvp(value_and_grad, (kernel,), (u,))
        return tree.dot([u], of_finite(value, [product]))

    rows = _rows(kernel)
    num_inputs, rank = kernel.size // kernel.shape[-1], len(rows)
    scale = 1 / num_inputs if normalize else 1.0
    if draws is None:

        def of_one(i):
            is_input = jnp.arange(num_inputs) == i // rank
            return curvature(jnp.where(is_input[:, None], rows[i % rank][None], 0))

        parts = fast_convolutions(jax.lax.map)(of_one, jnp.arange(num_inputs * rank))
        value = scale * jnp.sum(parts)
        return Estimate(value, jnp.zeros_like(value))

    count = as_count("draws", draws, 2)

    def of_draw(i):
        z = signs(jax.random.fold_in(start, i), (num_inputs, rank), rows.dtype)
        return scale * curvature(jnp.matmul(z, rows, precision="highest"))

    return mean_over(count, of_draw)


def _chosen(space: Coordinates, is_chosen: Any) -> int:
    """Return the index, among the coordinates, of the one kernel that the predicate chooses."""
    check_function("is_chosen", is_chosen, 2)
    leaves = jax.tree_util.tree_leaves_with_path(space.params)
    answers = [is_chosen(path, leaf) for path, leaf in leaves]
    for answer in answers:
        if isinstance(answer, jax.Array | np.ndarray):
            check_flag("is_chosen(path, leaf)", answer)
    found = [i for i, answer in enumerate(answers) if answer]
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    if len(found) != 1:
        chosen = [names[i] for i in found] or "none"
        raise ValueError(
            "relative_flatness: `is_chosen` must choose one of the leaves of `params`, "
            f"{names}, got {chosen}"
        )
    leaf = leaves[found[0]][1]
    dtype, shape = jnp.result_type(leaf), jnp.shape(leaf)
    if not jnp.issubdtype(dtype, jnp.floating) or len(shape) < 2 or 0 in shape:
        raise ValueError(
            "relative_flatness: `is_chosen` must choose a kernel of real numbers, shape "
            f"[..., in, out], got {names[found[0]]} with the dtype {dtype} and the shape {shape}"
        )
    before = [leaf for _, leaf in leaves[: found[0]] if tree.is_inexact(leaf)]
    return sum(2 if jnp.iscomplexobj(leaf) else 1 for leaf in before)


def _rows(kernel: jax.Array) -> jax.Array:
    """Return R with RᵀR = WᵀW, with as few rows as possible, for W the kernel as a matrix."""
    matrix = ONE_DEVICE.all_gather(kernel).reshape(-1, kernel.shape[-1])
    return matrix if matrix.shape[0] <= matrix.shape[1] else jnp.linalg.qr(matrix, mode="r")
