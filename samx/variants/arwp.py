"""ARWP and m-ARWP: random weight perturbation whose noise shrinks where gradients are large.

Li, Tao, Yan, Wu, Lei, Fang, He, Huang. "Revisiting Random Weight Perturbation for Efficiently
Improving Generalization", TMLR 2024. https://arxiv.org/abs/2404.00357
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from samx.core import draws, tree
from samx.core.aliases import DType, ScalarOrSchedule, Transformation
from samx.core.closures import evaluate
from samx.core.hyperparams import RandomKey, at_step, check_hyperparam, next_step
from samx.core.readings import UNKNOWN, Readings, no_readings, with_loss
from samx.core.sharp import sharp_gradient
from samx.core.state import first_aux, kept_aux
from samx.core.transformation import closure_transformation
from samx.perturbations import filterwise
from samx.perturbations.filters import filter_sums
from samx.variants._noise import halves


class ARWPState(NamedTuple):
    """State of `arwp` and `marwp`.

    Attributes:
        step: int32, optimizer steps so far; schedules count them.
        key: uint32, the data of the random key of all draws (`jax.random.key_data`).
        fisher: Decayed sum of squared gradients under noise, float32 or wider; zeros at first.
        aux: Aux of the last step; `None` without `aux_like`.
        readings: Readings of the last step.
    """

    step: jax.Array
    key: jax.Array
    fisher: Any
    aux: Any
    readings: Readings


def arwp(
    sigma: ScalarOrSchedule = 0.01,
    eta: ScalarOrSchedule = 1.0,
    decay: ScalarOrSchedule = 0.9,
    *,
    key: int | jax.Array = 0,
    aux_like: Any = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Adaptive random weight perturbation (ARWP): one gradient per step, under adaptive noise.

        n ~ N(0, I)
        ε   = σ ‖w_f‖ n / √(1 + η Σ_f F)   (each filter f of a kernel; vectors: √(1 + η F))
        g_s = ∇L(w + ε)
        F   = β F + g_s²                   (F = 0 at first)
        return g_s

    Args:
        sigma: Standard deviation σ ≥ 0 relative to the norm of each filter; default 0.01. The
            authors' script: 0.001, rising to 0.011.
        eta: Weight η ≥ 0 of F; default 1, of the authors' class (their script: 0.1). 0 is RWP on
            the whole batch.
        decay: β in [0, 1]; default 0.9, of the authors' class (their script: 0.99).
        key: Seed or random key of the noise, the same on all devices; default 0.
        aux_like: What the loss returns as aux, or its shapes; the state then keeps the last aux.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If a hyperparameter is neither a number nor a schedule; in `init`, if `key` is
            neither a seed nor a random key.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.arwp(sigma=0.0), optax.sgd(0.5))
        >>> w, loss = jnp.array([3.0, 4.0]), lambda w: 0.5 * w @ w
        >>> updates, state = tx.update(w, tx.init(w), w, value_fn=loss)
        >>> updates.tolist(), optax.tree.get(state, "fisher").tolist()
        ([-1.5, -2.0], [9.0, 16.0])

    References:
        Li et al., TMLR 2024, https://arxiv.org/abs/2404.00357

    Notes:
        F is a sum and not an average: with constant gradients it grows to g² / (1 − β). A gradient
        that is not finite does not enter F. `update` does not use the incoming gradient, which XLA
        drops if nothing else uses it. Readings: `loss` and `sharp_loss` are both the loss at w + ε,
        and `grad_norm` is ‖g_s‖; aux is that of w + ε too. Cost: 1 gradient per step, and one
        transient copy of the parameters; one copy in the state.
        Fidelity: matches nblt/mARWP, its draws replayed.
    """
    noise = _Noise("arwp", sigma, eta, decay, key)
    sharp = partial(sharp_gradient, gradients=1, perturb_dtype=perturb_dtype, has_aux=True)

    def init_fn(params):
        return noise.first_state(params, first_aux(aux_like))

    def update_fn(_, state, params, *, value_fn):
        eps = noise.drawn(state, params)
        g_s, readings, aux = sharp(
            value_fn, params, eps, state.readings, loss=UNKNOWN, g=eps, ball=None
        )
        readings = readings._replace(loss=readings.sharp_loss, grad_norm=tree.norm(g_s))
        aux = kept_aux("arwp", aux, aux_like, state.aux)
        return g_s, noise.next_state(state, g_s)._replace(aux=aux, readings=readings)

    return closure_transformation(init_fn, update_fn, name="arwp")


def marwp(
    sigma: ScalarOrSchedule = 0.01,
    eta: ScalarOrSchedule = 1.0,
    decay: ScalarOrSchedule = 0.9,
    lam: ScalarOrSchedule = 0.5,
    *,
    key: int | jax.Array = 0,
    aux_like: Any = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Mixed ARWP (m-ARWP): a clean half of the batch, and a half under adaptive noise.

        A, B: the even and the odd examples of the batch
        ε, F as in `arwp`, with the gradient of B
        return (1 − λ) ∇L_A(w) + λ ∇L_B(w + ε)

    Args:
        sigma: Standard deviation σ ≥ 0 relative to the norm of each filter; default 0.01 (the
            authors' script: 0.015).
        eta: Weight η ≥ 0 of F; default 1. 0 is `rwp`.
        decay: β in [0, 1]; default 0.9.
        lam: Weight λ in [0, 1] of the half under noise; default 0.5.
        key: Seed or random key of the noise, the same on all devices; default 0.
        aux_like: What the loss returns as aux, or its shapes; the state then keeps the aux of A.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `losses_fn` and `batch`, an
        even number of examples per device.

    Raises:
        ValueError: If a number is out of range; in `update`, if the batch has an odd number of
            examples.
        TypeError: If a hyperparameter is neither a number nor a schedule; in `init`, if `key` is
            neither a seed nor a random key.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.marwp(sigma=0.0), optax.sgd(0.5))
        >>> w, batch = jnp.array([1.0, 2.0]), jnp.eye(2)
        >>> losses_fn = lambda w, x: (x @ w) ** 2
        >>> updates, state = tx.update(w, tx.init(w), w, losses_fn=losses_fn, batch=batch)
        >>> updates.tolist()
        [-0.5, -1.0]

    References:
        Li et al., TMLR 2024, https://arxiv.org/abs/2404.00357

    Notes:
        The authors' loader gives the two batches one after the other, two gradients for one step:
        join them to one batch of twice the size, so that their first is A and their second B. Their
        `--incstd` schedules the noise by the weight decay, surely without intent. Readings as in
        `rwp`. Cost: 1 gradient per step, in two halves, and one transient copy of the parameters;
        one copy in the state.
        Fidelity: matches nblt/mARWP, its draws replayed.
    """
    check_hyperparam("lam", lam, 0, 1)
    noise = _Noise("marwp", sigma, eta, decay, key)
    sharp = partial(sharp_gradient, gradients=1, perturb_dtype=perturb_dtype)

    def init_fn(params):
        return noise.first_state(params, first_aux(aux_like))

    def update_fn(_, state, params, *, losses_fn, batch, weights=None):
        clean, noisy = halves("marwp", losses_fn, batch, weights)
        eps = noise.drawn(state, params)
        seen, aux = evaluate(clean, params)
        g, last = seen["grad"], state.readings
        g_s, readings = sharp(noisy, params, eps, last, loss=UNKNOWN, g=g, ball=None)
        readings = with_loss(readings, seen["value"])
        updates = tree.cast_like(tree.on_line(g, g_s, at_step(lam, state.step)), params)
        aux = kept_aux("marwp", aux, aux_like, state.aux, "losses_fn")
        return updates, noise.next_state(state, g_s)._replace(aux=aux, readings=readings)

    return closure_transformation(init_fn, update_fn, name="marwp")


class _Noise:
    """The noise of both, and its part of the state."""

    def __init__(self, name: str, sigma: Any, eta: Any, decay: Any, key: Any):
        check_hyperparam("sigma", sigma, 0)
        check_hyperparam("eta", eta, 0)
        check_hyperparam("decay", decay, 0, 1)
        self.name, self.sigma, self.eta, self.decay = name, sigma, eta, decay
        self.keys = RandomKey(key)

    def first_state(self, params: Any, aux: Any) -> ARWPState:
        fisher = jax.tree.map(lambda w: jnp.zeros_like(tree.widen(w).real), params)
        step = jnp.zeros((), jnp.int32)
        return ARWPState(step, self.keys.data(), fisher, aux, no_readings(params))

    def drawn(self, state: ARWPState, params: Any) -> Any:
        """Return the noise ε of a step."""
        sigma, eta = (at_step(x, state.step) for x in (self.sigma, self.eta))
        n = draws.normal_like(self.keys.of(state.key), state.step, params)

        def scaled(n, norms, fisher):
            if not tree.is_inexact(n):
                return n
            return sigma * norms * n / jnp.sqrt(1 + eta * filter_sums(fisher))

        return jax.tree.map(scaled, n, filterwise()(params), state.fisher)

    def next_state(self, state: ARWPState, g_s: Any) -> ARWPState:
        """Return the state after a step whose gradient under noise was `g_s`."""
        decay = at_step(self.decay, state.step)
        fisher = jax.tree.map(
            lambda f, g: (decay * f + jnp.abs(tree.widen(g)) ** 2).astype(f.dtype),
            *(state.fisher, g_s),
        )
        fisher = tree.if_finite(fisher, state.fisher)
        return state._replace(step=next_step(state.step), fisher=fisher)
