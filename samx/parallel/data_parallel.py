"""Data parallelism as a wrapper, so that no variant needs to name an axis."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from samx.core.aliases import Transformation
from samx.core.closures import as_weights, evaluate, local_value_and_grad, scalar_closure
from samx.core.devices import Devices, as_axes, check_mapped
from samx.core.hyperparams import check_flag, check_function
from samx.core.state import HeldBatch
from samx.core.transformation import SCALAR_CLOSURES, as_transformation, closure_transformation
from samx.core.tree import check_arrays

REPLICATED = PartitionSpec()


def data_parallel(
    tx: optax.GradientTransformation,
    axis_name: str | Sequence[str],
    ascent: Literal["global", "local"] | Sequence[str] = "global",
) -> Transformation:
    """Run any optimizer over the devices of `jax.shard_map` or `jax.pmap`, each with its examples.

        L  = Σ_d share_d L_d                     (share_d = 1/D, or by `weights`)
        "global":  every gradient is ∇L: the step of one device on the whole batch
        "local":   ε_d = perturbation(∇L_d(w)),  g_s = Σ_d share_d ∇L_d(w + ε_d)

    Do not use it under `jax.jit` with a sharded batch: there every mean is over the whole batch.

    Args:
        tx: The whole optimizer: sharpness-aware transformation and base together.
        axis_name: The mapped axis, or several axes, along which the examples are sharded.
        ascent: The ascent gradient. "global", the default: all devices climb the mean gradient.
            "local": each device climbs its own gradient, so that the examples of one device are the
            "m" of m-sharpness; the paper's experiments do this. A sequence of axis names: devices
            along these axes climb together, and each group of them climbs separately.

    Returns:
        A transformation; call it inside the mapped function. `updates` and state are equal on all
        devices, except for the examples that a state holds (see `state_specs`). `update` needs
        `value_fn`, or `losses_fn` and `batch`, over the device's own examples. It respects
        `weights`: the device's share is the sum of its weights.

    Raises:
        TypeError: If `axis_name` or `ascent` has the wrong type.
        ValueError: If `ascent` has another value; in `update`, if an axis is not mapped, or if
            `data_parallel` is inside another `data_parallel` or inside `accumulate`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> from jax.sharding import NamedSharding, PartitionSpec as P
        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> tx = samx.data_parallel(optax.chain(samx.sam(0.1), optax.sgd(0.5)), "data")
        >>> @jax.jit
        ... @jax.shard_map(mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
        ... def step(w, state, x):
        ...     value_fn = lambda w: jnp.mean((x @ w) ** 2)
        ...     value, grads = samx.value_and_grad(value_fn, "data")(w)
        ...     updates, state = tx.update(grads, state, w, value_fn=value_fn)
        ...     return optax.apply_updates(w, updates), state, value
        >>> w, x = jnp.ones(2), jax.device_put(jnp.eye(2), NamedSharding(mesh, P("data")))
        >>> w, state, value = step(w, tx.init(w), x)
        >>> [round(float(i), 3) for i in w], float(value)
        ([0.465, 0.465], 1.0)

    References:
        Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412, section 4.1 (m-sharpness).

    Notes:
        The incoming gradient, `value` and `grad` are ignored and computed again from the closure:
        in `shard_map` with `check_vma`, a gradient may arrive summed over the devices, and its type
        does not show this. XLA merges or drops duplicate computations. Parameters and state must be
        equal on all devices; for sharded parameters use `jax.jit`. Floating leaves of an aux that a
        variant keeps are averaged too. Compute second derivatives inside a variant as `jax.jvp` of
        a gradient.
        Communication per step, for P parameters: one all-reduce of P per gradient, plus scalars.
        That is 2P for `sam`, P for `sam` with `ascent="local"`, (K + 1)P for `msam` with K
        microbatches, and one all-reduce of 2P for `sampa`. `ascent` has no effect on `sampa` and
        `momentum_sam`: they climb what earlier steps have already averaged.
        `static_args`: all arguments.
    """
    axes = as_axes("data_parallel", "axis_name", axis_name)
    devices = Devices(axes, _local_axes(ascent, axes))
    inner = as_transformation("data_parallel", "tx", tx)

    def update_fn(_, state, params, *, value_fn, weights=None, **extra):
        if value_fn.evaluation.devices.axes:
            raise ValueError(
                "data_parallel: stands inside another data_parallel; wrap once and name all axes"
            )
        if "losses_fn" in extra and extra["losses_fn"].evaluation.num_microbatches > 1:
            raise ValueError(
                "data_parallel: stands inside accumulate; put it around: "
                "samx.data_parallel(samx.accumulate(tx, num_microbatches), axis_name)"
            )
        check_mapped("data_parallel", "axis_name", axes)
        for keyword in SCALAR_CLOSURES:
            if keyword in extra:  # `weights` belong to the batch, not to other examples
                is_other = keyword in ("training_fn", "validation_fn")
                extra[keyword] = extra[keyword].on(devices, None if is_other else weights)
        if "losses_fn" in extra:
            extra["losses_fn"] = extra["losses_fn"].evaluated(devices=devices)
        extra |= evaluate(value_fn.on(devices, weights), params)[0]
        return inner.update(extra["grad"], state, params, weights=weights, **extra)

    return closure_transformation(inner.init, update_fn, name="data_parallel")


def value_and_grad(
    value_fn: Callable[..., Any],
    axis_name: str | Sequence[str],
    *,
    has_aux: bool = False,
    weights: Any = None,
) -> Callable[..., tuple[Any, Any]]:
    """Take `jax.value_and_grad` as a mean over the devices of `jax.shard_map` or `jax.pmap`.

        L(w) = Σ_d share_d L_d(w),   ∇L(w)       (share_d = 1/D, or by `weights`)

    Args:
        value_fn: `(params, ...) -> scalar`, the mean loss over the device's own examples; with
            `has_aux`, `(scalar, aux)`.
        axis_name: The mapped axis, or several axes, along which the examples are sharded.
        has_aux: As in `jax.value_and_grad`; default False.
        weights: `float[B]` of the device's examples, 0 for padding. The device's share is the sum
            of its weights. Default: equal shares.

    Returns:
        A function `(params, ...) -> (loss, gradient)`; with `has_aux`, `((loss, aux), gradient)`.
        Loss and gradient are equal on all devices; aux is that of the device.

    Raises:
        TypeError: If `axis_name` is not a name or a sequence of names.
        ValueError: When called, if an axis is not mapped or the loss is not a scalar.

    Example:
        >>> import jax, jax.numpy as jnp, samx
        >>> from jax.sharding import PartitionSpec as P
        >>> @jax.shard_map(mesh=jax.make_mesh((1,), ("data",)), in_specs=(P(), P()), out_specs=P())
        ... def mean(w, x):
        ...     return samx.value_and_grad(lambda w: jnp.mean(w * x), "data")(w)
        >>> value, grad = mean(jnp.ones(()), jnp.ones(4))
        >>> float(value), float(grad)
        (1.0, 1.0)

    References:
        The keywords of `jax.value_and_grad`.

    Notes:
        `jax.value_and_grad` alone gives the device's own gradient in `pmap` and in `shard_map` with
        `check_vma=False`. With `check_vma=True` it gives the sum over the devices. Cost: one
        gradient and one all-reduce of it.
    """
    devices = Devices(as_axes("value_and_grad", "axis_name", axis_name))
    check_function("value_fn", value_fn)
    check_flag("has_aux", has_aux)
    if weights is not None:
        weights = as_weights("value_and_grad", weights)

    def mean_value_and_grad(params, *args):
        check_mapped("value_and_grad", "axis_name", devices.axes)
        check_function("value_fn", value_fn, 1 + len(args))
        closure = scalar_closure("value_and_grad", "value_fn", lambda p: value_fn(p, *args))
        (loss, aux), grads = local_value_and_grad(closure.on(devices, weights), params)
        loss, grads = devices.mean(loss, devices.share(weights)), devices.mean_grad(grads, weights)
        return (loss, aux) if has_aux else loss, grads

    return mean_value_and_grad


def axis_mean(tree: Any, axis_name: str | Sequence[str], *, weights: Any = None) -> Any:
    """Return the mean of a pytree over the devices of `jax.shard_map` or `jax.pmap`.

        x = Σ_d share_d x_d                      (share_d = 1/D, or by `weights`)

    Use it for side results of a pass: normalization statistics, dropout counters, metrics.

    Args:
        tree: Pytree of the device's own arrays.
        axis_name: The mapped axis, or several axes, along which the examples are sharded.
        weights: `float[B]` of the device's examples, 0 for padding. The device's share is the sum
            of its weights. Default: equal shares.

    Returns:
        The tree with the same dtypes, equal on all devices. Integers and booleans must be equal on
        all devices that have examples, and do not change.

    Raises:
        TypeError: If `axis_name` is not a name or a sequence of names.
        ValueError: If an axis is not mapped.

    Example:
        >>> import jax, jax.numpy as jnp, samx
        >>> from jax.sharding import PartitionSpec as P
        >>> @jax.shard_map(mesh=jax.make_mesh((1,), ("data",)), in_specs=P(), out_specs=P())
        ... def mean(tree):
        ...     return samx.axis_mean(tree, "data")
        >>> mean({"batch_stats": jnp.ones(2), "count": jnp.ones(1, int)})
        {'batch_stats': Array([1., 1.], dtype=float32), 'count': Array([1], dtype=int32)}

    References:
        `jax.lax.pmean`, which turns integers into floats and has no weights.

    Notes:
        A device without examples is ignored, and so are its NaNs. Cost: one all-reduce.
    """
    devices = Devices(as_axes("axis_mean", "axis_name", axis_name))
    check_mapped("axis_mean", "axis_name", devices.axes)
    check_arrays("tree", tree)
    if weights is not None:
        weights = as_weights("axis_mean", weights)
    tree = jax.tree.map(jnp.asarray, tree)
    return devices.mean(tree, devices.share(weights))


def state_specs(
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    batch_specs: Any = REPLICATED,
    param_specs: Any = REPLICATED,
) -> Any:
    """Return how to shard the state of an optimizer: the `PartitionSpec` of each leaf.

        leaves shaped like a parameter   as that parameter
        several of these, stacked        as that parameter, the leading axes replicated
        examples held for a later step   as the batch
        everything else                  replicated

    Use the specs as `in_specs` and `out_specs` of `jax.shard_map`. As `NamedSharding`s, use them as
    `out_shardings` of `jax.jit(tx.init)`.

    Args:
        tx: The whole optimizer.
        params: The parameters, as arrays or `jax.ShapeDtypeStruct`s.
        batch_specs: `PartitionSpec`s of a batch: a tree like the batch, or one for all its leaves;
            default replicated.
        param_specs: `PartitionSpec`s of the parameters, in the same form; default replicated.

    Returns:
        A pytree of `PartitionSpec`s with the structure of `tx.init(params)`.

    Raises:
        ValueError: If a tree of specs does not match, or if `tx.init` rejects the parameters.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> from jax.sharding import PartitionSpec as P
        >>> tx = samx.sampa(optax.sgd(0.1, momentum=0.9), batch_like=jnp.ones((4, 2)))
        >>> specs = samx.state_specs(tx, jnp.ones(2), batch_specs=P("data"), param_specs=P("model"))
        >>> specs.previous.batch, specs.g_y, specs.step
        (P('data',), P('model',), P())

    References:
        `optax.tree.map_params`, which finds the leaves that are shaped like parameters.

    Notes:
        Cost: none, nothing is computed. A leaf whose shape differs from that of its parameter, such
        as the factored moments of `optax.adafactor`, is replicated.
    """
    tx = as_transformation("state_specs", "tx", tx)
    check_arrays("params", params, has_shapes=True)
    state = jax.eval_shape(tx.init, params)
    param_specs = _like("param_specs", param_specs, params)

    def spec_of(leaf, param, spec):
        stacked = leaf.ndim - jnp.ndim(param)
        if stacked < 0 or leaf.shape[stacked:] != jnp.shape(param):
            return REPLICATED
        return PartitionSpec(*[None] * stacked, *spec) if stacked and any(spec) else spec

    specs = optax.tree.map_params(
        tx, spec_of, state, params, param_specs, transform_non_params=lambda _: REPLICATED
    )

    def held(node, specs):
        if not isinstance(node, HeldBatch):
            return specs
        batch = _like("batch_specs", batch_specs, node.batch)
        return node._replace(batch=batch, weights=PartitionSpec(*jax.tree.leaves(batch)[0][:1]))

    return jax.tree.map(held, state, specs, is_leaf=lambda node: isinstance(node, HeldBatch))


def _like(name, specs, tree):
    try:
        return jax.tree.broadcast(specs, tree, is_leaf=lambda x: isinstance(x, PartitionSpec))
    except ValueError as error:
        raise ValueError(
            f"state_specs: `{name}` must be one PartitionSpec or a tree of them like "
            f"{jax.tree.structure(tree)}, got {specs}"
        ) from error


def _local_axes(ascent: Any, axes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the axes along which devices climb separately."""
    if ascent == "global":
        return ()
    if ascent == "local":
        return axes
    if isinstance(ascent, str) or not set(as_axes("data_parallel", "ascent", ascent)) <= set(axes):
        raise ValueError(
            f"data_parallel: `ascent` must be 'global', 'local' or some of the axes {axes}, "
            f"got {ascent!r}"
        )
    return tuple(axis for axis in axes if axis not in ascent)
