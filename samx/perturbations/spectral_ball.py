"""Balls in the spectral norm of each matrix. Public in `samx.perturbations`."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from samx.core import tree
from samx.core.aliases import Radius, Transformation
from samx.core.devices import ONE_DEVICE
from samx.core.hyperparams import check_choice, check_hyperparam
from samx.perturbations.balls import along, climbing
from samx.perturbations.filters import as_filter_axis, axis_of
from samx.perturbations.metrics import identity


def spectral_ball(
    rho: Radius,
    *,
    norm: Literal["leaf", "global"] = "leaf",
    vectors: Literal["l2", "sign", "zero"] = "l2",
    polar: Literal["svd", "newton_schulz"] = "svd",
    filter_axis: int = -1,
) -> Transformation:
    """Climb to the edge of the ball in which no matrix has a spectral norm above ρ.

        G_l = U S Vᵀ                             (each leaf l with two axes or more, as a matrix)
        D_l = U Vᵀ                               (its singular values are 1)
        D_l = g_l / ‖g_l‖, sign(g_l) or 0        (leaves with one axis, as `vectors` says)
        ε   = ρ D                                "leaf":  ⟨g, ε⟩ is the largest in the ball
        ε   = ρ D / ‖D‖                          "global": L2 length ρ

    The step of "leaf" is the linear minimization oracle of the norm, with the opposite sign: what
    Muon and Scion descend.

    Args:
        rho: Radius ρ ≥ 0 of each leaf, a number or a schedule over the optimizer's steps.
        norm: "leaf", the default, or "global", whose radii are those of SAM.
        vectors: How leaves with one axis move: "l2", the default, "sign" (each entry by ρ), or
            "zero".
        polar: How U Vᵀ is computed: "svd", the default, exactly; "newton_schulz", by the five
            iterations of Muon, in matrix products alone: singular values lie between about 0.7 and
            1.2, and those that are far below the largest one stay smaller.
        filter_axis: The output axis of kernels; default -1, Flax's. The other axes of a kernel,
            such as `[h, w, in]` of a convolution, are the rows of its matrix.

    Returns:
        An optax transformation `g -> ε`. Half-precision gradients give a float32 step.

    Raises:
        ValueError: If `rho` is a negative number, or `norm`, `vectors` or `polar` is unknown; in
            `update`, if a kernel has no axis `filter_axis`.
        TypeError: If `rho` is neither a number nor a schedule, or `filter_axis` is not an integer.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.perturbations import spectral_ball
        >>> ball, g = spectral_ball(rho=0.5), {"kernel": jnp.array([[3.0, 0.0], [0.0, -0.1]])}
        >>> ball.update(g, ball.init(g), g)[0]["kernel"].round(4).tolist()
        [[0.5, 0.0], [0.0, -0.5]]

    References:
        Pethick, Xie, Antonakopoulos, Zhu, Silveti-Falls, Cevher, "Training Deep Learning Models
        with Norm-Constrained LMOs", ICML 2025, https://arxiv.org/abs/2502.07529 (the oracle);
        Jordan et al., "Muon", 2024, https://kellerjordan.github.io/posts/muon (the iterations)

    Notes:
        Spectral radii are shorter than L2 radii: a matrix of rank r moves by ρ √r in L2. No factor
        √(rows / columns) is included. Where a singular value is 0, as for a batch of one example,
        U Vᵀ is not unique; ⟨g, ε⟩ is. For kernels that `nnx.scan` stacks, `[layers, in, out]`, use
        `per_layer`. Cost: one thin singular value decomposition per matrix, which is slow on
        accelerators, or 15 matrix products. On a CPU that several trainings share, set the
        environment variable `OPENBLAS_NUM_THREADS=1`: LAPACK's own threads wait for each other, and
        a training took nine times as long with them. Each device needs whole matrices.
        `static_args`: all but `rho`.
    """
    check_hyperparam("rho", rho, 0)
    check_choice("norm", norm, ("leaf", "global"))
    check_choice("vectors", vectors, ("l2", "sign", "zero"))
    check_choice("polar", polar, ("svd", "newton_schulz"))
    axis = as_filter_axis(filter_axis)

    def climb(g, params, radius):
        del params
        corner = jax.tree_util.tree_map_with_path(lambda path, g: direction(path, g), g)
        if norm == "global":
            return along(corner, identity()(corner), radius)
        return tree.scaled(radius, corner)

    def direction(path, g):
        if not tree.is_inexact(g):
            return g
        g = tree.widen(g)
        if g.ndim > 1:
            return _on_matrix(_POLAR[polar], g, axis_of("spectral_ball", path, g, axis))
        return _OF_VECTORS[vectors](g)

    return climbing(climb, rho)


_OF_VECTORS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "l2": lambda g: along(g, 1.0, 1.0),
    "sign": lambda g: jnp.sign(g) + 0 * g,  # an overflow has no direction: inf gives NaN
    "zero": lambda g: 0 * g,
}


def _on_matrix(polar: Callable[[Any], Any], g: jax.Array, output_axis: Any) -> jax.Array:
    """Return U Vᵀ of a kernel, 0 if the kernel is; each device needs the whole kernel."""
    moved = jnp.moveaxis(ONE_DEVICE.all_gather(g), output_axis, -1)
    rows = int(np.prod(moved.shape[:-1]))
    largest = jnp.max(jnp.abs(moved), initial=0)
    matrix = tree.ratio(moved.reshape(rows, -1), largest)  # its squares are in range
    found = polar(jnp.where(largest > 0, matrix, 0)).reshape(moved.shape)
    found = jnp.where(largest > 0, found, largest)  # NaN stays NaN
    return jnp.moveaxis(found, -1, output_axis) + jnp.zeros_like(g)


def _svd(matrix: jax.Array) -> jax.Array:
    u, _, v = jnp.linalg.svd(matrix, full_matrices=False)
    return u @ v


def _newton_schulz(matrix: jax.Array) -> jax.Array:
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = jnp.conj(matrix.T) if is_tall else matrix
    x = tree.ratio(x, tree.plain_norm(x))
    for _ in range(5):
        square = x @ jnp.conj(x.T)
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return jnp.conj(x.T) if is_tall else x


_POLAR = {"svd": _svd, "newton_schulz": _newton_schulz}
