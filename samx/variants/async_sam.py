"""AsyncSAM: climb the ascent gradient of the previous step, taken in parallel on another device.

Jo, Lim, Lee. "Asynchronous Sharpness-Aware Minimization For Fast and Accurate Deep Learning", 2025.
https://arxiv.org/abs/2503.11147
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.aliases import DType, Perturbation, Radius, Transformation
from samx.core.closures import Closure, evaluate, local_loss_and_grad
from samx.core.convolutions import fast_convolutions
from samx.core.hyperparams import Default, check_choice, check_number, next_step
from samx.core.readings import UNKNOWN, Readings, no_readings, take_readings, with_loss
from samx.core.sharp import perturbed, value_and_grad_at
from samx.core.state import first_aux, kept_aux
from samx.core.transformation import closure_transformation
from samx.parallel.pairs import evaluate_roles, with_axis
from samx.variants._ball import ball_of


class AsyncSAMState(NamedTuple):
    """State of `async_sam`.

    Attributes:
        step: int32, optimizer steps so far.
        ascent_grad: Ascent gradient of the last step, which the next step climbs; shaped like the
            parameters.
        perturbation: State of the perturbation.
        aux: Aux of the descent pass, shaped like `aux_like`.
        readings: Readings of the last step.
    """

    step: jax.Array
    ascent_grad: optax.Updates
    perturbation: optax.OptState
    aux: Any
    readings: Readings


def async_sam(
    rho: Radius = Default(0.05),
    *,
    first: Literal["plain", "sam"] = "plain",
    ascent_share: float = 1.0,
    role_axis: str | None = None,
    aux_like: Any = None,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Asynchronous SAM: both gradients are taken at known points, so neither waits for the other.

        ε   = ρ a / ‖a‖                       (a: ascent gradient of the step before, at its w)
        g_s = ∇L(w + ε)                       (descent, the whole batch)
        a   = ∇L_ascent(w)                    (meanwhile, for the next step; a smaller batch)
        return g_s

    `a` starts at 0, so the first step is the base optimizer's. With `first="sam"` it climbs the
    ascent gradient at its own w, as SAM does. If `a` is zero or not finite, nothing is perturbed.

    Args:
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters; default 0.05, as in SAM; the paper's
            value was not readable.
        first: "plain", the default, or "sam": two forms of the first step of this one method. Which
            one the paper has is inferred.
        ascent_share: Cost of a gradient of `ascent_fn` relative to one of `value_fn`: b′/b for a
            batch of b′ of the b examples; default 1. Only the reading `gradients_spent` uses it.
        role_axis: Name of a mapped axis of size 2 of `jax.shard_map` or `jax.pmap`, for devices of
            one kind in one program. Devices with index 0 take the descent gradient, those with
            index 1 the ascent gradient. The batch is not sharded over this axis, but may be sharded
            over other axes, inside `data_parallel`. Default: one device takes both.
        aux_like: Arrays or `jax.ShapeDtypeStruct`s shaped like the aux of `value_fn`. The state
            then holds the aux of the descent pass (for example BatchNorm statistics) and, before
            the first step, these arrays, or zeros for shapes. Read it with
            `optax.tree.get(state, "aux")`. Default: aux is dropped.
        perturbation: Replaces the ball and `rho`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`. The ascent
        gradient is that of `ascent_fn` if given, otherwise the incoming gradient (with a
        `role_axis`, that of `value_fn`).

    Raises:
        ValueError: If a number is out of range, or `first` is unknown; in `update`, if `role_axis`
            is not mapped or not of size 2, or aux differs in shape from `aux_like`.
        TypeError: If a hyperparameter is neither a number nor a schedule, or `role_axis` is not a
            name.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.async_sam(rho=0.1, ascent_share=0.5), optax.sgd(0.5))
        >>> x, w = jnp.eye(2), jnp.array([3.0, 4.0])
        >>> loss = lambda w, x: ((x @ w) ** 2).sum() / 2
        >>> state = tx.init(w)
        >>> for _ in range(2):
        ...     updates, state = tx.update(
        ...         w, state, w, value_fn=lambda w: loss(w, x), ascent_fn=lambda w: loss(w, x[:1]))
        ...     print([round(float(u), 3) for u in updates])
        ...     w = optax.apply_updates(w, updates)
        [-1.5, -2.0]
        [-0.8, -1.0]

    References:
        Jo, Lim, Lee, 2025, https://arxiv.org/abs/2503.11147

    Notes:
        `rho=0` is the base optimizer. Cost: 2 gradients per step (1 + b′/b) that do not wait for
        each other, and one more copy of the parameters in the state. On one device that is SAM's
        time. The variant is meant for two devices, see `samx.asynchronous.pipelined` and
        `role_axis`: there a step takes the time of the descent alone. With a `role_axis` one
        all-reduce of 2P exchanges the gradients. `ascent` of `data_parallel` has no effect: the
        climbed gradient was averaged one step ago.
        Accuracy: `a` is a gradient of another batch. On the digits with 30% wrong labels that cost
        0.7 points of SAM's gain of 1.5; the age of `a` cost nothing that showed. Gradients of the
        same batch in successive steps have a cosine of 0.97, those of successive batches 0.1. So
        smaller steps make it SAM with two batches, not SAM: in a training 8 times as long, at an
        eighth of the learning rate, both were 2 points below SAM with its ρ, and 0.4 with a larger
        one (`examples/claims/async_long.py`).
        With `first="sam"` and an `ascent_fn` (or a `role_axis`) the first step takes that gradient
        twice: once to climb it, and once for the next step.
        Readings: `grad_norm` is the norm of the climbed gradient. `loss` is the ascent loss at w:
        that of `ascent_fn`, on its examples only; without an `ascent_fn`, the caller's, and with a
        `role_axis` that of `value_fn`.
        `gradients_spent` grows by 1 + `ascent_share` on every step, whichever device takes the
        gradients. A gradient that the first step takes twice counts once.
        Fidelity: **partly reconstructed**; there is no public code, and the text was not read. The
        abstract has a smaller ascent batch on the slower device. Two secondary summaries agree on a
        delay of one step and a fresh descent gradient. A third party's collection of the equations
        of 28 SAM papers has a normalized climb with that delay. Inferred: that the norm is global,
        the first step, ρ, and that the ascent batch is a part of the descent batch. Matches an
        independent loop of that reading. The abstract of a later version, in a Korean journal,
        claims 1 to 4% over SGD at about 1.02 times its time (ResNet-20 on CIFAR-10).
        `static_args`: `first`, `ascent_share`, `role_axis`.
    """
    check_choice("first", first, ("plain", "sam"))
    check_number("ascent_share", ascent_share, 0, 1, excluded=0)
    if role_axis is not None and not isinstance(role_axis, str):
        raise TypeError(f"async_sam: `role_axis` must be the name of an axis, got {role_axis!r}")
    ball = ball_of("async_sam", rho, perturbation)

    def init_fn(params):
        return AsyncSAMState(
            step=jnp.zeros((), jnp.int32),
            ascent_grad=optax.tree.zeros_like(params),
            perturbation=ball.init(params),
            aux=first_aux(aux_like),
            readings=no_readings(params),
        )

    def update_fn(g, state, params, *, value_fn, ascent_fn=None, value=UNKNOWN, **extra):
        is_given = ascent_fn is None and role_axis is None  # the incoming gradient is climbed
        ascent_fn = value_fn if ascent_fn is None else ascent_fn

        def fresh():
            return (value, g) if is_given else _loss_and_grad(ascent_fn, params)

        stale, is_known = _ascent_gradient(state, first, fresh)
        keywords = extra | {"value_fn": value_fn, "ascent_fn": ascent_fn}
        eps, ball_state = ball.update(stale, state.perturbation, params, **keywords)
        eps = tree.where(is_known, eps, optax.tree.zeros_like(eps))
        sharp = partial(value_and_grad_at, eps=eps, has_aux=True, perturb_dtype=perturb_dtype)
        if role_axis is None:
            (loss, a), ((sharp_loss, aux), g_s) = fresh(), sharp(value_fn, params)
        else:
            both = _by_role(role_axis, ascent_fn, value_fn, sharp, params)
            (loss, a), ((sharp_loss, aux), g_s) = both
        point, spent = partial(perturbed, params, eps, perturb_dtype), 1 + ascent_share
        on_same = loss if is_given else UNKNOWN  # the loss of the same examples at w
        readings = take_readings(
            state.readings, on_same, sharp_loss, stale, g_s, params, point, spent, ball_state
        )
        readings = with_loss(readings, loss)
        aux = kept_aux("async_sam", aux, aux_like, state.aux)
        return g_s, AsyncSAMState(next_step(state.step), a, ball_state, aux, readings)

    return closure_transformation(init_fn, update_fn, name="async_sam")


def _loss_and_grad(ascent_fn: Closure, params: Any) -> tuple[Any, Any]:
    seen, _ = evaluate(ascent_fn, params)
    return seen["value"], seen["grad"]


def _ascent_gradient(state: AsyncSAMState, first: str, fresh: Any) -> tuple[Any, jax.Array]:
    """Return the ascent gradient to climb, and whether it can be climbed."""
    is_first, stale = state.step == 0, state.ascent_grad
    if first == "sam":
        stale = fast_convolutions(jax.lax.cond)(
            is_first, lambda: fresh()[1], lambda: state.ascent_grad
        )
    is_known = jnp.isfinite(tree.norm(stale)) & (~is_first | (first == "sam"))
    return tree.where(is_known, stale, optax.tree.zeros_like(stale)), is_known


def _by_role(axis: str, ascent_fn: Closure, value_fn: Closure, sharp: Any, params: Any) -> Any:
    """Take the ascent gradient on one half of the devices, the sharp gradient on the other."""
    group = value_fn.evaluation.devices
    devices = with_axis("async_sam", "role_axis", group, axis)

    def descent():
        values, g_s = sharp(value_fn.alone(), devices.pcast(params))
        return values, group.part_of_mean_grad(g_s, value_fn.weights)

    def ascent():
        loss, a = local_loss_and_grad(ascent_fn, devices.pcast(params))
        return loss, group.part_of_mean_grad(a, ascent_fn.weights)

    descent, ascent = evaluate_roles(
        *(descent, ascent),
        [group.share(fn.weights) for fn in (value_fn, ascent_fn)],
        devices=devices,
        axis=axis,
    )
    return ascent, descent
