"""RWP: random weight perturbation on half of the batch.

Li, Yan, Lei, Wu, Fang, Yang, Huang. "Efficient Generalization Improvement Guided by Random Weight
Perturbation", 2022. https://arxiv.org/abs/2211.11489
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.aliases import DType, Perturbation, ScalarOrSchedule, Transformation
from samx.core.closures import evaluate
from samx.core.hyperparams import Default, at_step, check_hyperparam, next_step
from samx.core.readings import UNKNOWN, Readings, no_readings, with_loss
from samx.core.sharp import sharp_gradient
from samx.core.state import first_aux, kept_aux
from samx.core.transformation import closure_transformation
from samx.variants._noise import halves, noise_of


class RWPState(NamedTuple):
    """State of `rwp`.

    Attributes:
        step: int32, optimizer steps so far; schedules count them.
        noise: State of the noise.
        aux: Aux of the last step; `None` without `aux_like`.
        readings: Readings of the last step.
    """

    step: jax.Array
    noise: optax.OptState
    aux: Any
    readings: Readings


def rwp(
    sigma: ScalarOrSchedule = Default(0.01),
    alpha: ScalarOrSchedule = 0.5,
    *,
    noise: Perturbation = None,
    key: int | jax.Array = 0,
    aux_like: Any = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Random weight perturbation (RWP), mixed: a clean half of the batch, and a half under noise.

        A, B: the even and the odd examples of the batch
        n ~ N(0, I)
        ε = σ ‖w_f‖ n                      (each filter f: one output of a kernel, or a vector)
        return (1 − α) ∇L_A(w) + α ∇L_B(w + ε)

    Args:
        sigma: Standard deviation σ ≥ 0 relative to the norm of each filter, the authors' gamma;
            default 0.01.
        alpha: Weight α in [0, 1] of the half under noise; default 0.5. 0 is SGD on A.
        noise: Replaces `sigma` and `key`: `perturbations.gaussian_noise` with any metric, or
            `perturbations.sphere_noise`.
        key: Seed or random key of the noise, the same on all devices; default 0.
        aux_like: What the loss returns as aux, or its shapes; the state then keeps the aux of A.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `losses_fn` and `batch`, an
        even number of examples per device.

    Raises:
        ValueError: If a number is out of range, `noise` is not random, or `sigma` is given together
            with `noise`; in `update`, if the batch has an odd number of examples.
        TypeError: If a hyperparameter is neither a number nor a schedule; in `init`, if `key` is
            neither a seed nor a random key.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.rwp(alpha=0.0), optax.sgd(0.5))
        >>> w, batch = jnp.array([1.0, 2.0]), jnp.eye(2)
        >>> losses_fn = lambda w, x: (x @ w) ** 2
        >>> updates, state = tx.update(w, tx.init(w), w, losses_fn=losses_fn, batch=batch)
        >>> updates.tolist()  # of the first example alone
        [-1.0, -0.0]

    References:
        Li et al., 2022, https://arxiv.org/abs/2211.11489

    Notes:
        `update` does not use the incoming gradient, which XLA drops if nothing else uses it. The
        two gradients do not wait for each other; the authors compute them on two devices. `weights`
        count within each half. Readings: `loss` and `grad_norm` are those of A, `sharp_loss` and
        what is on request those of B. Cost: 1 gradient per step, in two halves, and one transient
        copy of the parameters.
        Fidelity: matches nblt/RWP, run on two processes, its draws replayed; its halves are
        contiguous. `static_args`: `noise` (and `sigma` if `noise` is given).
    """
    check_hyperparam("alpha", alpha, 0, 1)
    noise = noise_of("rwp", sigma, noise, key)
    sharp = partial(sharp_gradient, gradients=1, perturb_dtype=perturb_dtype)

    def init_fn(params):
        step, aux = jnp.zeros((), jnp.int32), first_aux(aux_like)
        return RWPState(step, noise.init(params), aux, no_readings(params))

    def update_fn(_, state, params, *, losses_fn, batch, weights=None):
        clean, noisy = halves("rwp", losses_fn, batch, weights)
        eps, noise_state = noise.update(params, state.noise, params)
        seen, aux = evaluate(clean, params)
        g, last = seen["grad"], state.readings
        g_s, readings = sharp(noisy, params, eps, last, loss=UNKNOWN, g=g, ball=noise_state)
        readings = with_loss(readings, seen["value"])
        updates = tree.cast_like(tree.on_line(g, g_s, at_step(alpha, state.step)), params)
        aux = kept_aux("rwp", aux, aux_like, state.aux, "losses_fn")
        return updates, RWPState(next_step(state.step), noise_state, aux, readings)

    return closure_transformation(init_fn, update_fn, name="rwp")
