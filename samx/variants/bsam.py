"""bSAM: SAM as a Gaussian posterior whose precision is learned.

Möllenhoff, Khan. "SAM as an Optimal Relaxation of Bayes", ICLR 2023.
https://arxiv.org/abs/2210.01620
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import draws, tree
from samx.core.aliases import DType, Radius, ScalarOrSchedule, Transformation
from samx.core.closures import Closure, mean_loss
from samx.core.hyperparams import (
    RandomKey,
    as_count,
    at_step,
    check_hyperparam,
    check_number,
    next_step,
)
from samx.core.microbatches import Parts, check_divides, sums_over
from samx.core.readings import UNKNOWN, Readings, no_readings, of_microbatches
from samx.core.sharp import sharp_gradient, value_and_grad_at
from samx.core.state import first_aux, kept_aux
from samx.core.transformation import closure_transformation


class BSAMState(NamedTuple):
    """State of `bsam`. With the parameters as mean, it is the posterior of `samx.posterior`.

    Attributes:
        step: int32, optimizer steps so far; schedules count them.
        key: uint32, the data of the random key of all draws (`jax.random.key_data`).
        momentum: Moving average m of the sharp gradients, float32 or wider; zeros at first.
        precision: Precision s of each parameter, divided by `num_examples`; float32 or wider.
        num_examples: The number N of training examples.
        aux: Aux of the last step; `None` without `aux_like`.
        readings: Readings of the last step.
    """

    step: jax.Array
    key: jax.Array
    momentum: Any
    precision: Any
    num_examples: jax.Array
    aux: Any
    readings: Readings
    is_optimizer = True


def bsam(
    learning_rate: ScalarOrSchedule,
    num_examples: float,
    rho: Radius = 0.01,
    *,
    prior_precision: float = 40.0,
    b1: float = 0.9,
    b2: float = 0.999,
    damping: float = 0.1,
    init_precision: float = 1.0,
    num_microbatches: int = 8,
    key: int | jax.Array = 0,
    aux_like: Any = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Bayesian SAM (bSAM): learn the mean and the variances of a Gaussian over the parameters.

        δ = prior_precision / N
        for each microbatch j = 1, ..., M:
            n_j ~ N(0, I)
            g_j = ∇L_j(w + n_j / √(N s))
            h_j = ∇L_j(w + ρ g_j / s)            (from the mean w, not from the noisy point)
        m = b1 m + (1 − b1) (mean(h_j) + δ w)    (m = 0 at first, no bias correction)
        w = w − η m / s                          (s before its update)
        s = b2 s + (1 − b2) (√s mean(|g_j|) + γ + δ)

    Args:
        learning_rate: Learning rate η ≥ 0. The authors' runs: 0.5 on CIFAR, 0.25 on TinyImageNet,
            with a linear warm-up over 5 epochs and a cosine.
        num_examples: Number N > 0 of training examples, times a factor for data augmentation (the
            authors: 4 for flips and crops).
        rho: ρ ≥ 0 of the ascent; default 0.01, theirs on CIFAR (TinyImageNet: 5e-5). It is a step
            along g / s, not a radius.
        prior_precision: Precision ≥ 0 of the Gaussian prior around 0, which is also the weight
            decay δ N; default 40, theirs on CIFAR (TinyImageNet: 25).
        b1: Decay of the momentum, in [0, 1]; default 0.9.
        b2: Decay of the precision, in [0, 1]; default 0.999.
        damping: γ ≥ 0; default 0.1. With γ = δ = 0 the precision of a parameter without a gradient
            goes to 0.
        init_precision: s > 0 at first; default 1.
        num_microbatches: Number M ≥ 1 of draws per step, each for its own examples; default 8. It
            must divide the examples per device.
        key: Seed or random key of the noise, the same on all devices; default 0.
        aux_like: What the loss returns as aux, or its shapes; the state then keeps the last aux.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        An optimizer. Put nothing after it that divides by gradients again, and no weight decay:
        it is a part of bSAM. `update` needs `losses_fn` and `batch`.

    Raises:
        ValueError: If a number is out of range; in `update`, if `num_microbatches` does not divide
            the examples.
        TypeError: If `learning_rate` or `rho` is neither a number nor a schedule, another
            hyperparameter is not a number, or `num_microbatches` is not a Python int; in `init`, if
            `key` is neither a seed nor a random key.

    Example:
        >>> import jax, jax.numpy as jnp, samx
        >>> tx = samx.bsam(0.1, num_examples=4, num_microbatches=2)
        >>> w, batch = jnp.zeros(2), (jnp.eye(4, 2), jnp.ones(4))
        >>> def losses_fn(w, batch):
        ...     x, y = batch
        ...     return (x @ w - y) ** 2
        >>> state = tx.init(w)
        >>> for _ in range(3):
        ...     updates, state = tx.update(w, state, w, losses_fn=losses_fn, batch=batch)
        ...     w = w + updates
        >>> samx.posterior.sample(state, w, jax.random.key(0)).shape
        (2,)

    References:
        Möllenhoff, Khan, ICLR 2023, https://arxiv.org/abs/2210.01620

    Notes:
        Predict with `samx.posterior`: the mean of predictions over draws w + n / √(N s); the mean
        alone works too. `update` does not use the incoming gradient, which XLA drops if nothing
        else uses it. Readings: `loss` and `sharp_loss` are both the loss at w + ρ g / s, and
        `grad_norm` is the norm of the gradient at the noisy points. aux is that of the perturbed
        points.
        Inside `data_parallel`, microbatch j of all devices shares its draw, and with
        `ascent="local"` each device climbs its own g_j. The devices send M gradients g_j and one
        sum of h_j; with local ascent that sum and one of |g_j|. Cost: 2 gradients per step, one
        after the other, in M pieces; two copies of the parameters in the state.
        Fidelity: matches team-approx-bayes/bayesian-sam, its draws replayed; its microbatches are
        contiguous, and here they are strided. The PyTorch copy that is used most differs in five
        places: noise of deviation 1 / (N s); the ascent starts at the noisy point; w is never
        restored; the momentum averages g δ in place of g + δ w; s averages a square. Another copy,
        as shipped, adds neither noise nor ascent. `static_args`: `num_microbatches`.
    """
    check_hyperparam("learning_rate", learning_rate, 0)
    check_number("num_examples", num_examples, 0, excluded=0)
    check_hyperparam("rho", rho, 0)
    check_number("prior_precision", prior_precision, 0)
    check_number("b1", b1, 0, 1)
    check_number("b2", b2, 0, 1)
    check_number("damping", damping, 0)
    check_number("init_precision", init_precision, 0, excluded=0)
    num_microbatches, keys = as_count("num_microbatches", num_microbatches), RandomKey(key)
    delta = prior_precision / num_examples

    def init_fn(params):
        zeros = optax.tree.zeros_like(jax.tree.map(tree.widen, params))
        dtype = tree.real_dtype(*jax.tree.leaves(params))
        return BSAMState(
            step=jnp.zeros((), jnp.int32),
            key=keys.data(),
            momentum=zeros,
            precision=jax.tree.map(lambda x: (x.real + init_precision).astype(x.real.dtype), zeros),
            num_examples=jnp.full((), num_examples, dtype),
            aux=first_aux(aux_like),
            readings=no_readings(params),
        )

    def update_fn(_, state, params, *, losses_fn, batch, weights=None):
        check_divides("bsam", num_microbatches, batch)
        state = state._replace(num_examples=jnp.full_like(state.num_examples, num_examples))
        s, rho_t = state.precision, at_step(rho, state.step)

        def both(batch, weights, draw):
            noise = posterior_noise(state, keys.of(state.key), params, draw)
            value_fn = mean_loss(losses_fn, batch, weights)
            return _both_gradients(value_fn, params, state, noise, rho_t, perturb_dtype)

        (h, a), readings, aux = _summed(both, num_microbatches, losses_fn, batch, weights, state)
        w = jax.tree.map(tree.widen, params)
        m = _map(lambda m, h, w: b1 * m + (1 - b1) * (h + delta * w), state.momentum, h, w)
        updates = _map(lambda m, s: -at_step(learning_rate, state.step) * m / s, m, s)
        s = _map(lambda s, a: b2 * s + (1 - b2) * (jnp.sqrt(s) * a + damping + delta), s, a)
        readings = of_microbatches(state.readings, readings, 2)._replace(loss=readings.sharp_loss)
        aux = kept_aux("bsam", aux, aux_like, state.aux, "losses_fn")
        new = state._replace(
            step=next_step(state.step), momentum=m, precision=s, aux=aux, readings=readings
        )
        return tree.cast_like(updates, params), new

    return closure_transformation(init_fn, update_fn, name="bsam")


def posterior_noise(state: BSAMState, key: jax.Array, params: Any, draw: Any = 0) -> Any:
    """Return a draw of the posterior, without its mean: n / √(N s)."""
    n = draws.normal_like(key, state.step, params, draw)
    return _map(lambda n, s: n / jnp.sqrt(state.num_examples * s), n, state.precision)


def _summed(
    both: Any, num_microbatches: int, losses_fn: Any, batch: Any, weights: Any, state: BSAMState
) -> Parts:
    """Return the means of both gradients over the microbatches; the devices send them once."""
    devices = losses_fn.evaluation.devices
    zeros, zero = (optax.tree.zeros_like(x) for x in (state.momentum, state.precision))
    (h, a), readings, aux = sums_over(
        *(both, num_microbatches, "scan", devices, batch, weights),
        zeros=(devices.pcast(zeros), devices.pcast(zero) if devices.local_axes else zero),
    )
    return Parts((devices.sum(h), devices.sum(a) if devices.local_axes else a), readings, aux)


def _both_gradients(
    value_fn: Closure, params: Any, state: BSAMState, noise: Any, rho: Any, perturb_dtype: DType
) -> Parts:
    """Take both gradients of one microbatch: this device's part of the sharp one, and of |g|.

    Only g is averaged over the devices. If they climb separately, nothing is.
    """
    devices, weights = value_fn.evaluation.devices, value_fn.weights
    _, g = value_and_grad_at(value_fn.ascent, params, noise, perturb_dtype=perturb_dtype)
    eps = _map(lambda g, s: rho * g / s, jax.tree.map(tree.widen, g), state.precision)
    own_h, readings, aux = sharp_gradient(
        *(value_fn.alone(), devices.pcast(params), eps, state.readings),
        loss=UNKNOWN,
        g=g,
        ball=None,
        perturb_dtype=perturb_dtype,
        has_aux=True,
    )
    share = devices.share(weights) if devices.local_axes else 1.0
    a = jax.tree.map(lambda g: share * jnp.abs(tree.widen(g)), g)
    part = devices.part_of_mean_grad(own_h, weights)
    return Parts((part, a), readings, devices.mean(aux, devices.share(weights)))


def _map(fn: Any, x: Any, *others: Any) -> Any:
    """Map over the floating leaves; the others are those of `x`."""
    return jax.tree.map(
        lambda x, *others: fn(x, *others).astype(x.dtype) if tree.is_inexact(x) else x, x, *others
    )
