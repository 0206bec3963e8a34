"""Products with curvature matrices, which are never formed. Public in `samx.sharpness`."""

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any, Literal

import jax
import jax.numpy as jnp

from samx.core import tree
from samx.core.hyperparams import check_choice
from samx.sharpness.coordinates import Coordinates, Vector
from samx.sharpness.objective import Objective, as_objective

Operator = Literal["hessian", "ggn", "empirical_fisher"]
Product = Callable[[Vector], Vector]


def hvp(f: Any, params: Any) -> Callable[[Any], Any]:
    """Return the product of the Hessian of a loss with a vector.

        hvp(f, w)(v) = ∇²L(w) v

    Args:
        f: The loss, `params -> scalar`, or `samx.sharpness.objective(...)`.
        params: The parameters w, any pytree.

    Returns:
        A function `v -> ∇²L(w) v` of trees like `params`, in float32 or wider. A complex parameter
        is two real ones: ⟨u, Hv⟩ is the real part of Σ conj(u) Hv.

    Raises:
        TypeError: If `f` is not a function, or `params` or `v` hold something other than arrays.
        ValueError: If `v` is not a tree like `params`.

    Example:
        >>> import jax.numpy as jnp, samx
        >>> product = samx.sharpness.hvp(lambda w: w["a"] ** 2 * w["b"], {"a": 1.0, "b": 3.0})
        >>> {name: float(x) for name, x in product({"a": 1.0, "b": 0.0}).items()}
        {'a': 6.0, 'b': 2.0}

    References:
        Pearlmutter, "Fast Exact Multiplication by the Hessian", Neural Computation 1994.

    Notes:
        Forward over reverse: the derivative of the gradient along `v`. Cost in matrix products: 1.5
        gradients for one hidden layer, 2.3 for three, up to 2.7 for many. In a loop over vectors at
        the same parameters, XLA computes what does not depend on `v` once; then a product costs 1.1
        to 2.0. With several batches it cannot. Memory of a gradient twice.
    """
    return _product("hvp", f, params, "hessian")


def ggn_vp(f: Any, params: Any) -> Callable[[Any], Any]:
    """Return the product of the generalized Gauss-Newton matrix with a vector.

        G = Σ_i weight_i J_iᵀ H_i J_i / Σ_i weight_i
        J_i = ∂ logits_i / ∂w,   H_i = ∂²ℓ_i / ∂ logits_i²

    It is the part of the Hessian that comes from the curvature of the loss on the logits, and it is
    positive semidefinite if that loss is convex. For cross-entropy it is the Fisher information,
    with labels drawn from the model; the empirical Fisher is another matrix.

    Args:
        f: `samx.sharpness.objective(apply_fn=..., loss_on_logits=..., batch=...)`.
        params: The parameters w, any pytree.

    Returns:
        A function `v -> G v` of trees like `params`, in float32 or wider.

    Raises:
        TypeError: If `params` or `v` hold something other than arrays.
        ValueError: If `f` has no logits, or `v` is not a tree like `params`.

    Example:
        >>> import jax.numpy as jnp, samx
        >>> f = samx.sharpness.objective(
        ...     apply_fn=lambda w, x: x * w ** 2,
        ...     loss_on_logits=lambda z, x: z ** 2 / 2,
        ...     batch=jnp.array([1.0]),
        ... )
        >>> w = jnp.array(1.0)
        >>> float(samx.sharpness.ggn_vp(f, w)(w)), float(samx.sharpness.hvp(f, w)(w))
        (4.0, 6.0)

    References:
        Schraudolph, "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent",
        Neural Computation 2002; Martens, "New Insights and Perspectives on the Natural Gradient
        Method", JMLR 2020, https://arxiv.org/abs/1412.1193

    Notes:
        One forward derivative of the model, one product on the logits, one backward pass. Cost:
        about 1.6 gradients in floating-point operations.
    """
    return _product("ggn_vp", f, params, "ggn")


def _product(name: str, f: Any, params: Any, operator: Operator) -> Callable[[Any], Any]:
    space, times = product_with(name, f, params, operator)
    return lambda v: space.vector(times(space.of("v", v)))


def product_with(name: str, f: Any, params: Any, operator: Operator) -> tuple[Coordinates, Product]:
    """Return the coordinates of the parameters, and the product with a matrix in them."""
    check_choice("operator", operator, ("hessian", "ggn", "empirical_fisher"))
    found, space = as_objective(name, f), Coordinates(name, params)
    of = {"hessian": _hessian, "ggn": _ggn, "empirical_fisher": _empirical_fisher}[operator]
    return space, of(name, found, space)


def gradient_at(name: str, f: Objective, space: Coordinates) -> Product:
    """Return the function from a point to the gradient of the loss there, in coordinates."""
    return jax.grad(f.closure(name).compose(space.point))


def _hessian(name: str, f: Objective, space: Coordinates) -> Product:
    gradient = gradient_at(name, f, space)
    return lambda v: jax.jvp(gradient, (space.start,), (v,))[1]


def _ggn(name: str, f: Objective, space: Coordinates) -> Product:
    """Return the product as the gradient of Σ ⟨H_i J_i v, logits_i(w)⟩, a mean of losses.

    So batches, weights and devices are treated as in every other mean.
    """
    (apply_fn, loss_on_logits), losses_fn = f.two_parts(name), f.losses(name)
    apply_at, pcast = apply_fn.compose(space.point), losses_fn.evaluation.devices.pcast

    def times(v):
        def losses(x, batch):
            fixed = jax.lax.stop_gradient(x)
            logits, moved = jax.jvp(lambda x: apply_at(x, batch), (fixed,), (pcast(v),))

            def total(logits):
                return jnp.sum(tree.widen(loss_on_logits(logits, batch)))

            cotangents = jax.lax.stop_gradient(jax.jvp(jax.grad(total), (logits,), (moved,))[1])
            return _per_example(cotangents, apply_at(x, batch))

        return jax.grad(f.mean(replace(losses_fn, fn=losses)))(space.start)

    return times


def _empirical_fisher(name: str, f: Objective, space: Coordinates) -> Product:
    """Return the product as the gradient of Σ ⟨g_i, v⟩ ℓ_i(w), a mean of losses."""
    losses_fn = f.losses(name)
    losses_at, pcast = losses_fn.compose(space.point), losses_fn.evaluation.devices.pcast

    def times(v):
        def losses(x, batch):
            fixed = jax.lax.stop_gradient(x)
            _, slopes = jax.jvp(lambda x: losses_at(x, batch), (fixed,), (pcast(v),))
            return jax.lax.stop_gradient(slopes) * losses_at(x, batch)

        return jax.grad(f.mean(replace(losses_fn, fn=losses)))(space.start)

    return times


def _per_example(a: Any, b: Any) -> jax.Array:
    """Return the inner products `[B]` of two trees of logits, `[B, ...]`."""

    def product(x, y):
        z = tree.widen(x) * tree.widen(y)
        return jnp.sum(z, axis=tuple(range(1, z.ndim)))

    return reduce(jnp.add, jax.tree.leaves(jax.tree.map(product, a, b)))
