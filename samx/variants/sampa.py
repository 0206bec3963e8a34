"""SAMPa: the two gradients of a sharpness-aware step, computed at the same time.

Xie, Pethick, Cevher. "SAMPa: Sharpness-aware Minimization Parallelized", NeurIPS 2024.
https://arxiv.org/abs/2410.10683
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from samx.core import tree
from samx.core.aliases import DType, Perturbation, Radius, ScalarOrSchedule, Transformation
from samx.core.closures import batch_size, mean_loss, unit_weights
from samx.core.devices import ONE_DEVICE
from samx.core.hyperparams import Default, at_step, check_number, next_step
from samx.core.readings import Readings, no_readings, take_readings
from samx.core.sharp import perturbed, value_and_grad_at
from samx.core.state import HeldBatch, check_like, first_aux, kept_aux
from samx.core.transformation import as_transformation, base_keywords, closure_transformation
from samx.parallel.pairs import check_pair_sharding, evaluate_pair, with_pair_axis
from samx.variants._ball import ball_of


class SAMPaState(NamedTuple):
    """State of `sampa`.

    Attributes:
        step: int32, optimizer steps so far.
        base: State of the base optimizer.
        perturbation: State of the perturbation.
        g_y: Gradient at `y` on the previous batch, shaped like the parameters.
        previous: The previous batch and its weights.
        aux: The aux of the pass at `y`, shaped like `aux_like`.
        readings: What the last step saw.
    """

    step: jax.Array
    base: optax.OptState
    perturbation: optax.OptState
    g_y: optax.Updates
    previous: HeldBatch
    aux: Any
    readings: Readings


def sampa(
    base: optax.GradientTransformation,
    rho: Radius = Default(0.1),
    lam: ScalarOrSchedule = 0.2,
    *,
    batch_like: Any,
    aux_like: Any = None,
    gradients: Literal["vmap", "separate"] = "vmap",
    pair_sharding: NamedSharding | PartitionSpec | None = None,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """SAM Parallelized: both gradients of a step depend on known points only.

        x̃   = x + ρ g_y / ‖g_y‖
        y   = x + base(g_y)                            (trial step, its state discarded)
        g_s, g_y′ = ∇L(x̃; B_prev), ∇L(y; B)            (in parallel)
        x   = x + base((1 − λ) g_s + λ g_y′)
        g_y, B_prev = g_y′, B

    `g_y` starts at 0 and `B_prev` at the first batch, so that the first step is the base's own.

    Args:
        base: The optimizer that takes the step, weight decay and clipping included.
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters, a number or a schedule over the
            optimizer's steps; default 0.1.
        lam: Share λ in [0, 1] of the gradient at `y`, a number or a schedule; default 0.2.
        batch_like: Arrays or `jax.ShapeDtypeStruct`s with the shapes and dtypes of a batch,
            leading axis `B`. The state holds a batch of this shape.
        aux_like: Arrays or `jax.ShapeDtypeStruct`s shaped like the aux of `losses_fn`. The state
            then holds the aux of the pass at `y` on the current batch (BatchNorm statistics, say),
            to be read with `optax.tree.get(state, "aux")`, and before the first step these arrays,
            or zeros; default none, aux is dropped.
        gradients: "vmap" computes both in one vectorized call; "separate" in two calls of the
            same program, which is faster where batched products are slow. Same numbers.
        pair_sharding: Two groups of devices, each of which computes one of the gradients: a mesh
            axis of size 2, as `PartitionSpec("pair")`. Inside `jax.shard_map` or `jax.pmap` that is
            a mapped axis, under `jax.jit` an axis of the current mesh (`jax.set_mesh`) or of the
            `NamedSharding` given instead. The batch may be sharded over further axes, but not over
            this one. Default: no groups.
        perturbation: Another geometry in place of the ball; then leave `rho` out.
        perturb_dtype: Lowest precision of both points, see `sharpness_aware`.

    Returns:
        An `optax.GradientTransformationExtraArgs` that wraps `base`. `update` needs `losses_fn` and
        `batch`, respects `weights`, and ignores the incoming gradient, so that the compiler
        removes its computation. Keywords that are not samx's own go on to `base`.

    Raises:
        ValueError: If `rho` is negative, `lam` outside [0, 1], `rho` given together with
            `perturbation`, `gradients` unknown, or `pair_sharding` not over one named axis; in
            `update`, if `batch` or aux differ in shape from `batch_like` or `aux_like`, if the axis
            of `pair_sharding` is not there or not of size 2, and as `closure_transformation` says.
        TypeError: If `rho` or `lam` is neither number nor schedule, `pair_sharding` no sharding, or
            `base` no transformation.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> batch = {"x": jnp.ones((4, 2)), "y": jnp.zeros(4)}
        >>> losses_fn = lambda w, b: (b["x"] @ w - b["y"]) ** 2
        >>> tx = samx.sampa(optax.sgd(0.1), rho=0.1, lam=0.2, batch_like=batch)
        >>> w = jnp.ones(2)
        >>> state = tx.init(w)
        >>> for _ in range(3):
        ...     updates, state = tx.update(w, state, w, losses_fn=losses_fn, batch=batch)
        ...     w = optax.apply_updates(w, updates)
        >>> [round(float(x), 3) for x in w]
        [0.205, 0.205]

    References:
        Xie, Pethick, Cevher, "SAMPa: Sharpness-aware Minimization Parallelized", NeurIPS 2024,
        https://arxiv.org/abs/2410.10683

    Notes:
        Cost: 2 gradients per step that do not wait for each other, and the trial step; one more
        copy of the parameters and one batch in the state, and the activations of both passes at a
        time, in either form. "vmap" turns a dense layer into a batched product and a convolution
        into a grouped one: on the CPU "separate" is faster, for a convolutional net almost three
        times. With `pair_sharding` each device computes one gradient, and one all-reduce of twice
        the parameters exchanges them (inside `data_parallel` the same one averages; under `jax.jit`
        another one of the parameters does).
        Readings: `loss` is that at `y` on the current batch; the others compare x̃ with the `g_y`
        that it climbed, both on the previous batch.
        Fidelity: matches LIONS-EPFL/SAMPa with SGD, momentum, weight decay and schedules. Its
        published script degenerates at `lam=0` to the base optimizer on the previous batch, leaves
        weight decay out of `y` when there is no momentum, and pairs unrelated batches from the
        second epoch on; here `lam=0` is the paper's SAMPa, and the batches are the ones passed.
        With Adam there is no published code: the trial step through the base is our reading.
        `static_args`: `base`, `batch_like`, `aux_like`, `gradients`, `pair_sharding`,
        `perturbation`, `perturb_dtype`; `rho` too where `perturbation` is given.
    """
    check_number("lam", lam, 0, 1)
    if gradients not in ("vmap", "separate"):
        raise ValueError(f"sampa: `gradients` must be 'vmap' or 'separate', got {gradients!r}")
    check_pair_sharding("sampa", pair_sharding)
    if pair_sharding is not None and gradients == "separate":
        raise ValueError("sampa: `pair_sharding` needs gradients='vmap': one call, on two groups")
    ball = ball_of("sampa", rho, perturbation)
    base = as_transformation("sampa", "base", base)
    batch_size("sampa: batch_like", batch_like)

    def init_fn(params):
        readings, nothing = no_readings(params), optax.tree.zeros_like(batch_like)
        return SAMPaState(
            step=jnp.zeros((), jnp.int32),
            base=base.init(params),
            perturbation=ball.init(params),
            g_y=optax.tree.zeros_like(params),
            previous=HeldBatch(nothing, unit_weights(nothing, readings.loss.dtype)),
            aux=first_aux(aux_like),
            readings=readings,
        )

    def both_gradients(losses_fn, params, pair):
        devices = with_pair_axis(losses_fn.evaluation.devices, pair_sharding)

        def gradient(delta, held):
            value_fn = mean_loss(losses_fn.evaluated(devices=ONE_DEVICE), *held)
            (loss, aux), grads = value_and_grad_at(
                value_fn, devices.pcast(params), delta, has_aux=True, perturb_dtype=perturb_dtype
            )
            return loss, None if aux_like is None else aux, grads

        shares = [losses_fn.evaluation.devices.share(held.weights) for _, held in pair]
        return evaluate_pair(
            gradient, pair, shares, devices=devices, how=gradients, pair_sharding=pair_sharding
        )

    def update_fn(_, state, params, *, losses_fn, batch, weights=None, **keywords):
        current = _held(batch, weights, like=state.previous)
        keywords = base_keywords("sampa", keywords)
        is_first, lam_t = state.step == 0, at_step(lam, state.step)
        eps, ball_state = ball.update(state.g_y, state.perturbation, params)
        trial, _ = base.update(state.g_y, state.base, params, **keywords)
        trial = tree.where(is_first, optax.tree.zeros_like(trial), trial)
        previous = tree.where(is_first, current, state.previous)

        pair = (eps, previous), (trial, current)
        (sharp_loss, _, g_s), (loss, aux, g_y) = both_gradients(losses_fn, params, pair)
        mixed = jax.tree.map(lambda s, y: ((1 - lam_t) * s + lam_t * y).astype(s.dtype), g_s, g_y)
        updates, base_state = base.update(mixed, state.base, params, **keywords)

        point, last = perturbed(params, eps, perturb_dtype), state.readings
        readings = take_readings(last, loss, sharp_loss, state.g_y, g_s, params, point, gradients=2)
        aux, step = kept_aux("sampa", aux, aux_like, state.aux, "losses_fn"), next_step(state.step)
        return updates, SAMPaState(step, base_state, ball_state, g_y, current, aux, readings)

    return closure_transformation(init_fn, update_fn, name="sampa")


def _held(batch: Any, weights: Any, like: HeldBatch) -> HeldBatch:
    """Hold a batch for the next step; its weights are ones if there are none."""
    check_like("sampa", "batch", batch, like.batch, "pad ragged batches and pass `weights`")
    dtype = like.weights.dtype
    weights = unit_weights(batch, dtype) if weights is None else jnp.asarray(weights, dtype)
    return HeldBatch(batch, weights)
