"""Elastic averaging inside a compiled step: workers along a mapped axis, all at the same pace."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.aliases import ScalarOrSchedule, Transformation
from samx.core.closures import evaluate
from samx.core.hyperparams import at_step, check_count, check_number, next_step
from samx.core.transformation import as_transformation, closure_transformation


class AveragingState(NamedTuple):
    """State of `averaging` and `samx.lsam`.

    Attributes:
        step: int32, local steps so far.
        center: The center z, shaped like the parameters, float32 or wider; the same for all
            workers. This is the model to evaluate.
        base: State of the local optimizer, the worker's own.
    """

    step: jax.Array
    center: Any
    base: optax.OptState


def averaging(
    tx: optax.GradientTransformation,
    worker_axis: str | None = None,
    *,
    beta: ScalarOrSchedule = 0.9,
    period: int = 4,
    exchange: Literal["before", "after"] = "before",
    name: str = "averaging",
) -> Transformation:
    """Synchronous elastic averaging around any optimizer: EASGD, and with SAM in it LSAM.

        α = beta / P                                      (P workers along `worker_axis`)
        on every `period`-th local step, all workers at once:
            d_i = α (w_i − z),   z += Σ_i d_i,   w_i −= d_i
        w_i += tx(∇L_i(w_i))

    Each worker has parameters, a state and examples of its own; only the center is common.

    Args:
        tx: The worker's whole optimizer, any variant and base.
        worker_axis: The mapped axis of `jax.shard_map`, `jax.pmap` or `jax.vmap` along which the
            workers are; default none, a single worker with a center.
        beta: Share in [0, 1] of the distance to the mean of the workers that the center moves in an
            exchange, a number or a schedule over the local steps; default 0.9.
        period: Local steps τ ≥ 1 between exchanges; default 4.
        exchange: "before", the default: d is that of w before the step and taken off behind it, as
            in the asynchronous form; the first step begins with one. "after": that of w behind
            every τ-th step, as in Leader SGD's EASGD.
        name: What error messages call it.

    Returns:
        An `optax.GradientTransformationExtraArgs` around `tx`, to be called inside the mapped
        function with the worker's own parameters and state: spread both over the axis, with a
        leading axis of P in `jax.shard_map`. `update` takes what `tx` takes.

    Raises:
        ValueError: If `beta` is outside [0, 1], `period` below 1, `exchange` unknown; in `update`,
            as `tx` does.
        TypeError: If `tx` is no transformation, `worker_axis` no name, `period` no Python int, or
            `beta` neither number nor schedule.

    Example:
        Four workers on one device:

        >>> import functools, jax, jax.numpy as jnp, optax, samx
        >>> tx = samx.elastic.averaging(optax.sgd(0.1), "worker", beta=0.9, period=2)
        >>> @jax.jit
        ... @functools.partial(jax.vmap, axis_name="worker")
        ... def step(w, state, x):
        ...     updates, state = tx.update(2 * (w - x), state, w)
        ...     return optax.apply_updates(w, updates), state
        >>> w, x = jnp.zeros(4), jnp.arange(4.0)  # whose mean is 1.5
        >>> state = jax.vmap(tx.init)(w)
        >>> for _ in range(40):
        ...     w, state = step(w, state, x)
        >>> [round(float(z), 2) for z in optax.tree.get(state, "center")]
        [1.5, 1.5, 1.5, 1.5]

    References:
        Zhang, Choromanska, LeCun, "Deep Learning with Elastic Averaging SGD", NeurIPS 2015,
        https://arxiv.org/abs/1412.6651

    Notes:
        Cost: that of `tx`, one more copy of the parameters, and one all-reduce of them on every
        `period`-th step, none on the others. `beta=0` is `tx` on each worker.
        Fidelity: "before" is the paper's synchronous rule; "after" matches what Leader SGD's code
        does by an independent loop. `static_args`: `tx`, `worker_axis`, `period`, `exchange`,
        `name`.
    """
    check_number("beta", beta, 0, 1)
    check_count("period", period)
    if exchange not in ("before", "after"):
        raise ValueError(f"{name}: `exchange` must be 'before' or 'after', got {exchange!r}")
    if worker_axis is not None and not isinstance(worker_axis, str):
        raise TypeError(f"{name}: `worker_axis` must be the name of an axis, got {worker_axis!r}")
    tx = as_transformation(name, "tx", tx)

    def init_fn(params):
        center = jax.tree.map(lambda w: jnp.array(tree.widen(w), copy=True), params)
        return AveragingState(jnp.zeros((), jnp.int32), center, tx.init(params))

    def update_fn(g, state, params, **keywords):
        num_workers = 1 if worker_axis is None else jax.lax.axis_size(worker_axis)
        weight = at_step(beta, state.step) / num_workers

        def total(moves):
            return moves if worker_axis is None else jax.lax.psum(moves, worker_axis)

        def nothing(moves):
            """Zeros that are nobody's own, as sums are, unless there is nobody else."""
            make = jnp.zeros_like if worker_axis is None else lambda d: jnp.zeros(d.shape, d.dtype)
            return jax.tree.map(make, moves)

        def exchanged(w, steps):
            """The center behind it, and what each worker takes off: nothing, where none is due."""
            is_due = steps % period == 0
            moves = jax.tree.map(
                lambda d: jnp.where(is_due, weight * d, 0), tree.subtract(w, state.center)
            )
            moves = tree.keep_floating(moves, params)
            added = jax.lax.cond(is_due, total, nothing, moves)
            return optax.tree.add(state.center, added), moves

        if exchange == "before":
            center, moves = exchanged(params, state.step)
        updates, base = tx.update(g, state.base, params, **keywords)
        if exchange == "after":
            center, moves = exchanged(optax.apply_updates(params, updates), state.step + 1)
        updates = jax.tree.map(lambda u, d: (u - d).astype(u.dtype), updates, moves)
        return updates, AveragingState(next_step(state.step), center, base)

    return closure_transformation(init_fn, update_fn, name=name)


class NesterovState(NamedTuple):
    """State of `nesterov`.

    Attributes:
        velocity: The velocity v, shaped like the parameters.
        base: State of the optimizer inside.
    """

    velocity: optax.Updates
    base: optax.OptState


def nesterov(tx: optax.GradientTransformation, momentum: ScalarOrSchedule = 0.9) -> Transformation:
    """Nesterov's momentum where the gradient really is taken ahead: the local rule of EAMSGD.

        u = w + momentum v
        v = momentum v + tx(∇L(u))                       (all of tx at u: weight decay, SAM)
        w = w + v

    `optax.sgd(nesterov=True)` keeps u instead of w. Alone that is the same; beside a center, which
    pulls at w and not at v, it is not.

    Args:
        tx: The optimizer that takes the step, without a momentum of its own: any variant and base.
        momentum: Share in [0, 1] of the velocity that is kept, a number; default 0.9.

    Returns:
        An `optax.GradientTransformationExtraArgs` around `tx`. `update` needs `value_fn` (or
        `losses_fn` and `batch`) and ignores the incoming gradient.

    Raises:
        ValueError: If `momentum` is outside [0, 1]; in `update`, as `closure_transformation` says.
        TypeError: If `tx` is no transformation, or `momentum` no number.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = samx.elastic.nesterov(optax.sgd(0.1), momentum=0.5)
        >>> w, loss = jnp.array(1.0), lambda w: 0.5 * w**2
        >>> state = tx.init(w)
        >>> for _ in range(3):
        ...     updates, state = tx.update(w, state, w, value_fn=loss)
        ...     w = optax.apply_updates(w, updates)
        >>> round(float(w), 4)
        0.6277

    References:
        Zhang, Choromanska, LeCun, "Deep Learning with Elastic Averaging SGD", NeurIPS 2015,
        https://arxiv.org/abs/1412.6651, algorithm 2

    Notes:
        `momentum=0` is `tx`. Cost: one gradient of its own in place of the incoming one, and two
        copies of the parameters. Fidelity: follows `sixin-zh/mpiT`, whose weight decay and SAM's
        perturbation are taken at u too. `static_args`: `tx`.
    """
    check_number("momentum", momentum, 0, 1)
    tx = as_transformation("nesterov", "tx", tx)

    def init_fn(params):
        return NesterovState(optax.tree.zeros_like(params), tx.init(params))

    def update_fn(g, state, params, *, value_fn, **keywords):
        del g
        carried = tree.scaled(momentum, state.velocity)
        ahead = optax.apply_updates(params, carried)
        keywords |= evaluate(value_fn, ahead)[0]
        step, base = tx.update(keywords["grad"], state.base, ahead, **keywords)
        velocity = jax.tree.map(jnp.add, carried, step)
        return velocity, NesterovState(velocity, base)

    return closure_transformation(init_fn, update_fn, name="nesterov")
