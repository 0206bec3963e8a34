"""SAMPa: the two gradients of a sharpness-aware step, computed at the same time.

Xie, Pethick, Cevher. "SAMPa: Sharpness-aware Minimization Parallelized", NeurIPS 2024.
https://arxiv.org/abs/2410.10683
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from samx.core import tree
from samx.core.aliases import DType, Perturbation, Radius, ScalarOrSchedule, Transformation
from samx.core.closures import batch_size, mean_loss, unit_weights
from samx.core.hyperparams import Default, at_step, check_choice, check_hyperparam, next_step
from samx.core.readings import UNKNOWN, Readings, no_readings, take_readings, with_loss
from samx.core.sharp import perturbed, value_and_grad_at
from samx.core.state import HeldBatch, as_like, first_aux, kept_aux
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
        readings: Readings of the last step.
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
    """SAM Parallelized: compute both gradients of a step at once, at points known beforehand.

        x̃   = x + ρ g_y / ‖g_y‖
        y   = x + base(g_y)                            (trial step, its state discarded)
        g_s, g_y′ = ∇L(x̃; B_prev), ∇L(y; B)            (in parallel)
        x   = x + base((1 − λ) g_s + λ g_y′)
        g_y, B_prev = g_y′, B

    `g_y` starts at 0 and `B_prev` at the first batch, so the first step is a step of the base.

    Args:
        base: The optimizer that takes the step, including weight decay and clipping.
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters; default 0.1.
        lam: Share λ in [0, 1] of the gradient at `y`; default 0.2.
        batch_like: Arrays or `jax.ShapeDtypeStruct`s with the shapes and dtypes of a batch,
            leading axis `B`. The state holds a batch of this shape.
        aux_like: Arrays or `jax.ShapeDtypeStruct`s shaped like the aux of `losses_fn`. The state
            then holds the aux of the pass at `y` on the current batch (BatchNorm statistics, for
            example); read it with `optax.tree.get(state, "aux")`. Before the first step it holds
            these arrays, or zeros. Default: aux is dropped.
        gradients: "vmap" computes both gradients in one vectorized call. "separate" uses two calls
            of the same program, which is faster where batched products are slow. Both give the same
            numbers.
        pair_sharding: Two groups of devices, one for each gradient: a mesh axis of size 2, for
            example `PartitionSpec("pair")`. Inside `jax.shard_map` or `jax.pmap` this is a mapped
            axis. Under `jax.jit` it is an axis of the current mesh (`jax.set_mesh`), or of the
            `NamedSharding` given instead. The batch may be sharded over other axes, but not over
            this one. Default: no groups.
        perturbation: Replaces the ball and `rho`.
        perturb_dtype: For both points, see `sharpness_aware`.

    Returns:
        A transformation that wraps `base`. `update` needs `losses_fn` and `batch`, and respects
        `weights`. It ignores the incoming gradient, so XLA drops that computation.

    Raises:
        ValueError: If a number is out of range, `rho` is given together with `perturbation`,
            `gradients` is unknown, or `pair_sharding` is not over one named axis. In `update`, if
            `batch` or aux differ from `batch_like` or `aux_like` in shape, or if the axis of
            `pair_sharding` does not exist or is not of size 2.
        TypeError: If a hyperparameter is neither a number nor a schedule, `pair_sharding` is not a
            sharding, or `base` is not a transformation.

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
        Xie, Pethick, Cevher, NeurIPS 2024, https://arxiv.org/abs/2410.10683

    Notes:
        Cost: 2 gradients per step that do not wait for each other, and the trial step. The state
        holds one more copy of the parameters and one batch. In both forms the activations of both
        passes are held at the same time. "vmap" turns a dense layer into a batched product and a
        convolution into a grouped one. On the CPU "separate" is faster, for a convolutional net
        almost three times. With `pair_sharding` each device computes one gradient, and one
        all-reduce of twice the parameters exchanges them. Inside `data_parallel` the same
        all-reduce averages over devices; under `jax.jit` another one of the parameters does.
        Readings: `loss` is the loss at `y` on the current batch. The other readings compare
        x̃ with the gradient `g_y` that set its perturbation, both on the previous batch.
        Fidelity: matches LIONS-EPFL/SAMPa with SGD, momentum, weight decay and schedules. In its
        published script, `lam=0` degenerates to the base optimizer on the previous batch, `y`
        lacks weight decay when there is no momentum, and unrelated batches are paired from the
        second epoch on. Here `lam=0` is the paper's SAMPa, and the batches are the ones you pass.
        With Adam there is no published code: the trial step through the base is our reading.
        `static_args`: `base`, `gradients`, `pair_sharding`.
    """
    check_hyperparam("lam", lam, 0, 1)
    check_choice("gradients", gradients, ("vmap", "separate"))
    check_pair_sharding("sampa", pair_sharding)
    if pair_sharding is not None and gradients == "separate":
        raise ValueError("sampa: `pair_sharding` needs gradients='vmap', got 'separate'")
    ball = ball_of("sampa", rho, perturbation)
    base = as_transformation("sampa", "base", base)
    batch_size("sampa", batch_like, "batch_like")

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
        group = losses_fn.evaluation.devices
        devices = with_pair_axis(group, pair_sharding)

        def gradient(delta, held):
            value_fn = mean_loss(losses_fn, *held).alone()
            (loss, aux), grads = value_and_grad_at(
                value_fn, devices.pcast(params), delta, has_aux=True, perturb_dtype=perturb_dtype
            )
            aux = None if aux_like is None else aux
            return (loss, aux), group.part_of_mean_grad(grads, held.weights)

        shares = [group.share(held.weights) for _, held in pair]
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

        pair = (eps, previous), (tree.cast_like(trial, eps), current)
        ((sharp_loss, _), g_s), ((loss, aux), g_y) = both_gradients(losses_fn, params, pair)
        mixed = jax.tree.map(lambda s, y: ((1 - lam_t) * s + lam_t * y).astype(s.dtype), g_s, g_y)
        updates, base_state = base.update(mixed, state.base, params, **keywords)

        point = partial(perturbed, params, eps, perturb_dtype)
        readings = take_readings(
            *(state.readings, UNKNOWN, sharp_loss, state.g_y, g_s, params, point, 2, ball_state)
        )
        readings = with_loss(readings, loss)  # of another batch than `sharp_loss`
        aux, step = kept_aux("sampa", aux, aux_like, state.aux, "losses_fn"), next_step(state.step)
        return updates, SAMPaState(step, base_state, ball_state, g_y, current, aux, readings)

    return closure_transformation(init_fn, update_fn, name="sampa")


def _held(batch: Any, weights: Any, like: HeldBatch) -> HeldBatch:
    """Return a batch to hold for the next step; without `weights`, its weights are ones."""
    batch = as_like("sampa", "batch", batch, like.batch, "pad ragged batches and pass `weights`")
    dtype = like.weights.dtype
    weights = unit_weights(batch, dtype) if weights is None else jnp.asarray(weights, dtype)
    return HeldBatch(batch, weights)
