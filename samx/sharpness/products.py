"""Products with curvature matrices, which are never formed. Public in `samx.sharpness`."""

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any, Literal

import jax
import jax.numpy as jnp

from samx.core import tree
from samx.core.closures import batch_size
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
    value_and_grad = jax.value_and_grad(f.closure(name).compose(space.point))
    return lambda x: of_finite(*value_and_grad(x))


def of_finite(loss: jax.Array, x: Vector) -> Vector:
    """Return `x`, or NaN if the loss is not finite: its derivatives may look right even so."""
    factor = jnp.where(jnp.isfinite(loss), 1.0, jnp.nan)
    return [factor.astype(y.dtype) * y for y in x]


def _hessian(name: str, f: Objective, space: Coordinates) -> Product:
    value_and_grad = jax.value_and_grad(f.closure(name).compose(space.point))

    def times(v):
        (loss, _), (_, product) = jax.jvp(value_and_grad, (space.start,), (v,))
        return of_finite(loss, product)

    return times


def _ggn(name: str, f: Objective, space: Coordinates) -> Product:
    """Return the product as the gradient of Σ ⟨H_i J_i v, logits_i(w)⟩, a mean of losses.

    So batches, weights and devices are treated as in every other mean.
    """
    (apply_fn, loss_on_logits), losses_fn = f.two_parts(name), f.losses(name)
    apply_at, pcast = apply_fn.compose(space.point), losses_fn.evaluation.devices.pcast
    check = replace(losses_fn, keyword="loss_on_logits").check

    def times(v):
        def losses(x, batch):
            fixed = jax.lax.stop_gradient(x)
            logits, moved = jax.jvp(lambda x: apply_at(x, batch), (fixed,), (pcast(v),))
            _check_logits(name, logits, batch)

            def total(logits):
                losses = loss_on_logits(logits, batch)
                check(losses, batch)
                return jnp.sum(tree.widen(losses))

            gradient = jax.value_and_grad(total, allow_int=True)
            (value, _), (_, slopes) = jax.jvp(gradient, (logits,), (moved,))
            slopes = [jax.lax.stop_gradient(s) for s in _floating(logits, slopes)]
            at_x = apply_at(x, batch)
            return _per_example(of_finite(value, slopes), _floating(at_x, at_x))

        mean = f.mean(replace(losses_fn, fn=losses))
        return of_finite(*jax.value_and_grad(mean)(space.start))

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

        mean = f.mean(replace(losses_fn, fn=losses))
        return of_finite(*jax.value_and_grad(mean)(space.start))

    return times


def _check_logits(name: str, logits: Any, batch: Any) -> None:
    """Require floating logits with the leading axis of the batch; integers are ignored."""
    size, shapes = batch_size(name, batch), [jnp.shape(x) for x in _floating(logits, logits)]
    if not shapes or any(shape[:1] != (size,) for shape in shapes):
        got = f"the shapes {shapes}" if shapes else "no floating numbers"
        raise ValueError(
            f"{name}: `apply_fn` must return floating logits [B, ...], one row per example, here "
            f"[{size}, ...], got {got}"
        )


def _floating(logits: Any, x: Any) -> list[Any]:
    """Return the leaves of `x` at floating logits."""
    pairs = zip(jax.tree.leaves(logits), jax.tree.leaves(x), strict=True)
    return [leaf for z, leaf in pairs if tree.is_inexact(z)]


def _per_example(a: list[Any], b: list[Any]) -> jax.Array:
    """Return the inner products `[B]` of logits `[B, ...]`, real for complex ones."""

    def product(x, y):
        z = tree.widen(x) * tree.widen(y)
        return jnp.sum(jnp.real(z), axis=tuple(range(1, z.ndim)))

    return reduce(jnp.add, map(product, a, b))
