"""LPF-SGD: the gradient of a loss that is smoothed by noise.

Bisla, Wang, Choromanska. "Low-Pass Filtering SGD for Recovering Flat Optima in the Deep Learning
Optimization Landscape", AISTATS 2022. https://arxiv.org/abs/2201.08025
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import optax

from samx.core import tree
from samx.core.aliases import DType, Perturbation, ScalarOrSchedule, Transformation
from samx.core.closures import LossesClosure, mean_loss
from samx.core.hyperparams import Default, as_count
from samx.core.microbatches import Parts, check_divides, sums_over
from samx.core.readings import UNKNOWN, Readings, no_readings, of_microbatches
from samx.core.sharp import sharp_gradient
from samx.core.state import first_aux, kept_aux
from samx.core.transformation import closure_transformation
from samx.variants._noise import noise_of


class LPFSGDState(NamedTuple):
    """State of `lpf_sgd`.

    Attributes:
        noise: State of the noise.
        aux: Aux of the last step; `None` without `aux_like`.
        readings: Readings of the last step.
    """

    noise: optax.OptState
    aux: Any
    readings: Readings


def lpf_sgd(
    sigma: ScalarOrSchedule = Default(0.001),
    num_microbatches: int = 1,
    *,
    noise: Perturbation = None,
    key: int | jax.Array = 0,
    aux_like: Any = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Low-pass filtering SGD (LPF-SGD): take each gradient at a point moved by noise.

        for each microbatch j = 1, ..., M:
            n_j ~ N(0, I)
            ε_j = σ ‖w_f‖ n_j              (each filter f: one output of a kernel, or a vector)
        return the mean of ∇L_j(w + ε_j)

    Args:
        sigma: Standard deviation σ ≥ 0 relative to the norm of each filter; default 0.001. A filter
            moves by about σ √(its number of weights) times its norm. For wide ResNets the authors
            let σ grow along a cosine.
        num_microbatches: Number M ≥ 1 of draws per step, each for its own examples; default 1. It
            must divide the examples per device.
        noise: Replaces `sigma` and `key`: `perturbations.gaussian_noise` with any metric, or
            `perturbations.sphere_noise`.
        key: Seed or random key of the noise, the same on all devices; default 0.
        aux_like: What the loss returns as aux, or its shapes; the state then keeps the last aux.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `losses_fn` and `batch`.

    Raises:
        ValueError: If a number is out of range, `noise` is not random, or `sigma` is given together
            with `noise`; in `update`, if `num_microbatches` does not divide the examples.
        TypeError: If `sigma` is neither a number nor a schedule, or `num_microbatches` is not a
            Python int; in `init`, if `key` is neither a seed nor a random key.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.lpf_sgd(sigma=0.0), optax.sgd(0.5))  # no noise: SGD
        >>> w, batch = jnp.array([1.0, 2.0]), jnp.eye(2)
        >>> losses_fn = lambda w, x: (x @ w) ** 2
        >>> updates, state = tx.update(w, tx.init(w), w, losses_fn=losses_fn, batch=batch)
        >>> updates.tolist()
        [-0.5, -1.0]

    References:
        Bisla, Wang, Choromanska, AISTATS 2022, https://arxiv.org/abs/2201.08025

    Notes:
        `update` does not use the incoming gradient, which XLA drops if nothing else uses it. With
        `noise=sphere_noise(rho)` it is the random baseline of SAM. Readings: `loss` and
        `sharp_loss` are both the loss at the moved points, the only one there is; `grad_norm` is
        that of their gradient. aux is that of the moved points too. Inside `data_parallel`, the
        microbatches of all devices share their draws. Cost: 1 gradient per step, in M pieces, and
        one transient copy of the parameters.
        Fidelity: matches devansh20la/LPF-SGD, its draws replayed; its microbatches are contiguous,
        and here they are strided. The authors' script for wide ResNets takes M whole batches per
        step. `static_args`: `num_microbatches`, `noise` (and `sigma` if `noise` is given).
    """
    num_microbatches = as_count("num_microbatches", num_microbatches)
    noise = noise_of("lpf_sgd", sigma, noise, key)
    step_on = partial(_step_on, noise, perturb_dtype)

    def init_fn(params):
        return LPFSGDState(noise.init(params), first_aux(aux_like), no_readings(params))

    def update_fn(_, state, params, *, losses_fn, batch, weights=None):
        check_divides("lpf_sgd", num_microbatches, batch)
        devices = losses_fn.evaluation.devices
        step = partial(step_on, losses_fn, state, params)
        zeros = devices.pcast(optax.tree.zeros_like(jax.tree.map(tree.widen, params)))
        part, readings, aux = sums_over(
            step, num_microbatches, "scan", devices, batch, weights, zeros=zeros
        )
        g_s = devices.sum(tree.cast_like(part, params))
        readings = of_microbatches(state.readings, readings, 1)._replace(grad_norm=tree.norm(g_s))
        _, noise_state = noise.update(params, state.noise, params)
        aux = kept_aux("lpf_sgd", aux, aux_like, state.aux, "losses_fn")
        return g_s, LPFSGDState(noise_state, aux, readings)

    return closure_transformation(init_fn, update_fn, name="lpf_sgd")


def _step_on(
    noise: optax.GradientTransformationExtraArgs,
    perturb_dtype: DType,
    losses_fn: LossesClosure,
    state: LPFSGDState,
    params: Any,
    batch: Any,
    weights: Any,
    draw: jax.Array,
) -> Parts:
    """Take this device's part of the gradient of one microbatch, at a point of its own."""
    devices = losses_fn.evaluation.devices
    eps, _ = noise.update(params, state.noise, params, draw=draw)
    value_fn = mean_loss(losses_fn, batch, weights).alone()
    g_s, readings, aux = sharp_gradient(
        *(value_fn, devices.pcast(params), eps, state.readings),
        loss=UNKNOWN,
        g=eps,
        ball=None,
        gradients=1,
        perturb_dtype=perturb_dtype,
        has_aux=True,
    )
    readings = readings._replace(loss=readings.sharp_loss)
    part = devices.part_of_mean_grad(g_s, weights)
    return Parts(part, readings, devices.mean(aux, devices.share(weights)))
