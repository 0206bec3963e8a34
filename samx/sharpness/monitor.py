"""Measure during training. Public in `samx.sharpness`."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.aliases import Transformation
from samx.core.convolutions import fast_convolutions
from samx.core.hyperparams import as_count, check_function, next_step
from samx.core.order import never_after
from samx.core.readings import UNKNOWN, Monitored, stored_number
from samx.core.transformation import checked_transformation, missing, no_params, unify
from samx.sharpness.objective import Objective

Measure = Callable[[Objective, Any], Any]


class MonitorState(NamedTuple):
    """State of `monitor`.

    Attributes:
        step: int32, optimizer steps so far.
        monitored: What was measured last.
    """

    step: jax.Array
    monitored: Monitored


def monitor(
    measures: Mapping[str, Measure], every: int, *, values_like: Mapping[str, Any] | None = None
) -> Transformation:
    """Measure every so many steps, and keep the last values in the state.

        if step % every == 0:   values = {name: measure(f, params)}
        updates                 pass through

    Put it into the chain, anywhere: `optax.chain(samx.sam(0.05), optax.sgd(0.1), monitor(...))`. A
    variant that wraps its base stands in a chain too: `optax.chain(samx.sampa(base, ...),
    monitor(...))`. The chain hands the closures of `update` to all its parts; `f` is made of them.
    So `f` is the loss on the batch of this step, with the weights, devices and microbatches of the
    step. Losses of examples and logits are there if `update` got `losses_fn` and `batch`, or
    `apply_fn`, `loss_on_logits` and `batch`. To measure on other examples, ignore `f` and use an
    `objective` of your own.

    Args:
        measures: From names to functions `(f, params) -> value`, for example
            `{"top": lambda f, w: samx.sharpness.eigenvalues(f, w, k=1).values[0]}`.
        every: Steps from one measurement to the next; the first step measures.
        values_like: For measures that return more than one number: from their names to arrays or
            `jax.ShapeDtypeStruct`s like the value. Default: one number for each.

    Returns:
        A transformation that does not change the updates. Find what it measured like readings:
        `optax.tree.get(state, "monitored").values["top"]`, or `optax.tree.get(state, "top")` if no
        other state has a field of that name (`optax.trace` has one called "trace"). Values are
        those at the parameters before the step.

    Raises:
        ValueError: If `measures` is empty, `every` is below 1, or `values_like` has a name that
            `measures` lacks; in `update`, if `params` or `value_fn` is missing, or a value is not
            like `values_like`.
        TypeError: If a measure is not a function, or a name is not text.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> measures = {"top": lambda f, w: samx.sharpness.eigenvalues(f, w, k=1).values[0]}
        >>> tx = optax.chain(
        ...     samx.sam(0.1), optax.sgd(0.1), samx.sharpness.monitor(measures, every=2)
        ... )
        >>> w, loss = jnp.array([1.0, 1.0]), lambda w: jnp.sum(w ** 4)
        >>> update = jax.jit(lambda *args: tx.update(*args, value_fn=loss))
        >>> state = tx.init(w)
        >>> for _ in range(3):
        ...     updates, state = update(jax.grad(loss)(w), state, w)
        ...     print(round(float(optax.tree.get(state, "top")), 2))
        ...     w = optax.apply_updates(w, updates)
        12.0
        12.0
        2.23

    References:
        None; the values are found as `samx.Readings` are.

    Notes:
        A real branch: steps that do not measure compute nothing for it. The program holds more
        temporaries, which made steps on a CPU up to 9% slower. Under `jax.vmap` the branch stays a
        real one if the optimizer is initialized inside the mapped function, so that all lanes share
        one step.
        Inside `data_parallel`, put the monitor into the chain that `data_parallel` wraps.
        `skip_nonfinite` does not look at the values. `static_args`: all arguments.
    """
    every = as_count("every", every)
    if not isinstance(measures, Mapping) or not measures:
        raise ValueError(f"monitor: `measures` must name at least one measure, got {measures!r}")
    for name, measure in measures.items():
        if not isinstance(name, str):
            raise TypeError(f"monitor: names in `measures` must be text, got {name!r}")
        check_function(f"measures[{name!r}]", measure, 2)
    if values_like is not None and not isinstance(values_like, Mapping):
        kind = type(values_like).__name__
        raise TypeError(f"monitor: `values_like` must map names to arrays or shapes, got a {kind}")
    shapes = dict(values_like or {})
    tree.check_arrays("values_like", shapes, has_shapes=True)
    unknown = sorted(map(str, shapes.keys() - measures.keys()))
    if unknown:
        raise ValueError(
            f"monitor: `values_like` must name measures, {sorted(measures)}, got {unknown}"
        )

    def init_fn(params):
        _check_whole(params)
        number = jax.ShapeDtypeStruct((), tree.real_dtype(*jax.tree.leaves(params)))
        values = {name: jax.tree.map(_unknown, shapes.get(name, number)) for name in measures}
        return MonitorState(
            jnp.zeros((), jnp.int32), Monitored(values, jnp.full((), -1, jnp.int32))
        )

    def update_fn(updates, state, params=None, **extra):
        if params is None:
            raise ValueError(no_params("monitor"))
        _check_whole(params)
        f = _objective(extra)

        def measure():
            values, w, nothing = {}, params, optax.tree.zeros_like(params)
            for name, fn in measures.items():
                values[name] = _like(name, fn(f, w), state.monitored.values[name])
                w = tree.where(never_after(values[name]), nothing, w)  # one by one
            return Monitored(values, state.step)

        is_due = state.step % every == 0
        if f.closure("monitor").evaluation.devices.axes:
            is_due &= ~never_after([jnp.ravel(x)[:1] for x in jax.tree.leaves(updates)])
        monitored = fast_convolutions(jax.lax.cond)(is_due, measure, lambda: state.monitored)
        return updates, MonitorState(next_step(state.step), monitored)

    return checked_transformation("monitor", init_fn, update_fn)


def _objective(extra: dict[str, Any]) -> Objective:
    """Return the loss of this step from the keywords of `update`."""
    closures = unify("monitor", extra)
    if "value_fn" not in closures:
        raise ValueError(missing("monitor", "value_fn", extra))
    if "batch" not in closures or "losses_fn" not in closures:
        return Objective(value_fn=closures["value_fn"])
    f = Objective(closures["batch"], closures.get("weights"), losses_fn=closures["losses_fn"])
    if "apply_fn" not in closures or "loss_on_logits" not in closures:
        return f
    return replace(f, apply_fn=closures["apply_fn"], loss_on_logits=closures["loss_on_logits"])


def _check_whole(params: Any) -> None:
    nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    if any(isinstance(node, optax.MaskedNode) for node in nodes):
        raise ValueError(
            "monitor: `params` holds optax.MaskedNode leaves, so optax.masked or optax.partition "
            "wraps it. The loss cannot run on a part of the parameters. Put the monitor into the "
            "chain around: optax.chain(optax.masked(...), monitor(...))."
        )


def _unknown(like: Any) -> jax.Array:
    unknown = stored_number(UNKNOWN) if tree.is_inexact(like) else 0
    return jnp.full_like(like, unknown)


def _like(name: str, value: Any, old: Any) -> Any:
    """Return a value in the dtypes that the state holds; require its shapes."""
    tree.check_arrays(f"measures[{name!r}](f, params)", value)
    got, wanted = (jax.tree.map(jnp.shape, x) for x in (value, old))
    if got != wanted:
        raise ValueError(
            f"monitor: the measure {name!r} must return a value of shape {wanted}, got {got}; pass "
            "`values_like` for a measure that returns more than one number"
        )
    dtypes = [
        (jnp.result_type(x), o.dtype)
        for x, o in zip(jax.tree.leaves(value), jax.tree.leaves(old), strict=True)
    ]
    if not all(_fits(dtype, into) for dtype, into in dtypes):
        raise TypeError(
            f"monitor: the measure {name!r} must return values of the dtypes "
            f"{[str(into) for _, into in dtypes]}, got {[str(dtype) for dtype, _ in dtypes]}; pass "
            "`values_like` for a measure that returns others"
        )
    return jax.tree.map(lambda x, o: jnp.asarray(x).astype(o.dtype), value, old)


def _fits(dtype: Any, into: Any) -> bool:
    """Return whether numbers of a dtype may be stored in another one, perhaps rounded."""
    kinds = [jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating]
    rank, most = (
        next((i for i, kind in enumerate(kinds) if jnp.issubdtype(x, kind)), None)
        for x in (dtype, into)
    )
    return dtype == into or (rank is not None and most is not None and rank <= most)
