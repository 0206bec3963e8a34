"""Convolutions inside branches and loops, in the layout that XLA computes fast on the CPU.

Public as `samx.fast_convolutions`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import eval_jaxpr
from jax.lax import ConvDimensionNumbers
from jax.sharding import NamedSharding, PartitionSpec

from samx.core.hyperparams import check_function


def fast_convolutions(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Let convolutions inside branches and loops run at full speed on the CPU.

        fast_convolutions(fn)(...) = fn(...), where on the CPU every convolution is
            transpose(conv([batch, *space, features] × [*space, features in, features out]))

    XLA's CPU backend brings convolutions into this layout, the one that it computes fast, only
    where they stand in no branch and no loop. Inside `jax.lax.cond`, `switch`, `scan`, `while_loop`
    and the like, the two convolutions of a backward pass keep the layouts in which JAX wrote them,
    and take up to a hundred times as long. samx uses this function wherever it branches. Use it
    for your own loops, such as a `scan` over training steps.

    Args:
        fn: Any function that `jax.jit` could trace. `jax.lax.scan` and its relatives may be
            passed themselves: `fast_convolutions(jax.lax.scan)(body, carry, batches)`.

    Returns:
        A function with the arguments and results of `fn`. It works under `jit`, `grad`, `vmap`,
        `pmap` and `shard_map`. Everything but the convolutions stays as it was: effects,
        collectives, shardings, custom derivatives, nested branches and loops.

    Raises:
        TypeError: If `fn` is not a function.

    Example:
        Several training steps in one loop:

        >>> import jax, jax.numpy as jnp, samx
        >>> def loss(kernel, images):
        ...     return jnp.mean(jax.lax.conv(images, kernel, (1, 1), "SAME") ** 2)
        >>> def step(kernel, images):
        ...     value, g = jax.value_and_grad(loss)(kernel, images)
        ...     return kernel - 0.1 * g, value
        >>> @jax.jit
        ... @samx.fast_convolutions
        ... def train(kernel, batches):
        ...     return jax.lax.scan(step, kernel, batches)
        >>> kernel, values = train(jnp.ones((4, 3, 3, 3)), jnp.ones((10, 2, 3, 8, 8)))
        >>> bool(values[-1] < values[0])
        True

    References:
        XLA's pass: `xla/service/cpu/conv_canonicalization.cc`, which walks the entry computation.

    Notes:
        Put it around the gradient, not inside: a derivative of the result is right, but its own
        convolutions are as JAX writes them. Results are equal, to the last bit, to those of the
        same convolutions outside of branches, with one exception: the gradient of a convolution in
        groups of several features with respect to its kernel stays as JAX writes it, because XLA is
        faster with it inside of a branch (10 to 50 times in our measurements) than outside. On
        other devices, programs stay as they were. Under `jax.disable_jit`, `fn` is called as it is.
        Cost: `fn` is traced as before; a function with convolutions is then traced a second time.
    """
    check_function("fn", fn)

    @functools.wraps(fn)
    def with_fast_convolutions(*args: Any, **kwargs: Any) -> Any:
        if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
            return fn(*args, **kwargs)
        others, structure = [], None

        def arrays():
            nonlocal others, structure
            leaves, structure = jax.tree.flatten(fn(*args, **kwargs))
            others = [None if isinstance(x, jax.Array) else x for x in leaves]
            return [x for x in leaves if isinstance(x, jax.Array)]

        jaxpr = _rewrite(jax.make_jaxpr(arrays)(), {})
        results = iter(eval_jaxpr(jaxpr.jaxpr, jaxpr.consts))
        return jax.tree.unflatten(structure, [next(results) if x is None else x for x in others])

    return with_fast_convolutions


def _rewrite(value: Any, seen: dict[Any, Any]) -> Any:
    """Rewrite a jaxpr, or the jaxprs in a parameter of an equation; return the rest as it is.

    `seen` holds the jaxprs done so far, so that equations that share one still share it.
    """
    if hasattr(value, "eqns"):  # a Jaxpr or a ClosedJaxpr
        if value not in seen:
            seen[value] = _rewrite_jaxpr(value, seen)
        return seen[value]
    if isinstance(value, tuple | list):
        parts = [_rewrite(part, seen) for part in value]
        if _differs(parts, value):
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _rewrite_jaxpr(jaxpr: Any, seen: dict[Any, Any]) -> Any:
    if getattr(jaxpr, "jaxpr", jaxpr) is jaxpr:  # no ClosedJaxpr; since jax 0.12 none is
        eqns = [_rewrite_equation(eqn, seen) for eqn in jaxpr.eqns]
        return jaxpr.replace(eqns=eqns) if _differs(eqns, jaxpr.eqns) else jaxpr
    inner = _rewrite(jaxpr.jaxpr, seen)
    return jaxpr if inner is jaxpr.jaxpr else jaxpr.replace(jaxpr=inner)


def _differs(new: Any, old: Any) -> bool:
    return any(a is not b for a, b in zip(new, old, strict=True))


def _rewrite_equation(eqn: Any, seen: dict[Any, Any]) -> Any:
    if eqn.primitive.name == "conv_general_dilated":
        return _rewrite_convolution(eqn)
    if eqn.primitive.name == "shard_map":
        return _rewrite_shard_map(eqn)
    if eqn.params.get("name") == "samx_fast_convolution":  # one that is rewritten already
        return eqn
    params = {name: _rewrite(value, seen) for name, value in eqn.params.items()}
    is_same = not _differs(params.values(), eqn.params.values())
    return eqn if is_same else eqn.replace(params=params)


def _rewrite_shard_map(eqn: Any) -> Any:
    """Rewrite a mapped function where its axes are mapped: only there are the types of its arrays.

    Outside, a convolution would lose the axes along which its result varies.
    """
    params, jaxpr = eqn.params, eqn.params["jaxpr"]
    (axes,) = (value for name, value in params.items() if name.endswith("manual_axes"))
    mapped = jax.shard_map(
        fast_convolutions(lambda *xs: tuple(eval_jaxpr(jaxpr, (), *xs))),
        mesh=params["mesh"],
        in_specs=params["in_specs"],
        out_specs=params["out_specs"],
        axis_names=axes,
        check_vma=params["check_vma"],
    )
    (call,) = _trace(mapped, eqn)
    return eqn.replace(params=params | {"jaxpr": call.params["jaxpr"]})


def _trace(fn: Callable[..., Any], eqn: Any) -> list[Any]:
    """Return the equations of `fn` on arguments like those of `eqn`, with its mesh and settings."""
    with eqn.ctx.manager:
        return jax.make_jaxpr(fn)(*(var.aval for var in eqn.invars)).eqns


def _rewrite_convolution(eqn: Any) -> Any:
    """Return an equation that calls the same convolution, on the CPU in the fast layout.

    The fast layout is [batch, *space, features] for images, and [*space, features in, features out]
    for kernels. Batch groups of several features stay as they are: XLA makes another convolution of
    them, and is faster with it inside of a branch than outside.
    """
    params: dict[str, Any] = eqn.params
    lhs, rhs, out = params["dimension_numbers"]  # axes: batch or features out, features in, space
    avals: list[Any] = [var.aval for var in eqn.invars]
    rank = len(out)
    images, kernel = (0, rank - 1, *range(1, rank - 1)), (rank - 1, rank - 2, *range(rank - 2))
    num_features = avals[1].shape[rhs[0]]
    is_fast = (lhs, rhs, out) == (images, kernel, images)
    if is_fast or params["batch_group_count"] not in (1, num_features):
        return eqn

    def to_images(axes):
        return axes[0], *axes[2:], axes[1]

    params = params | {"dimension_numbers": ConvDimensionNumbers(images, kernel, images)}
    if (sharding := params.get("out_sharding")) is not None:
        spec = PartitionSpec(*(sharding.spec[axis] for axis in to_images(out)))
        params["out_sharding"] = NamedSharding(sharding.mesh, spec)

    def fast(x, w):
        x = jax.lax.transpose(x, to_images(lhs))
        w = jax.lax.transpose(w, (*rhs[2:], rhs[1], rhs[0]))
        y = eqn.primitive.bind(x, w, **params)
        return jax.lax.transpose(y, [to_images(out).index(axis) for axis in range(rank)])

    def unchanged(x, w):
        return eqn.primitive.bind(x, w, **eqn.params)

    @jax.jit
    def samx_fast_convolution(x, w):
        return jax.lax.platform_dependent(x, w, cpu=fast, default=unchanged)

    (call,) = _trace(samx_fast_convolution, eqn)
    is_same = call.outvars[0].aval == eqn.outvars[0].aval  # not where a setting of JAX has changed
    return eqn.replace(primitive=call.primitive, params=call.params) if is_same else eqn
