"""SASSHA and M-SASSHA: a sharp gradient, divided by the curvature at the perturbed point.

Shin, Lee, Chung, Lee. "Sassha: Sharpness-aware Adaptive Second-order Optimization with Stable
Hessian Approximation", ICML 2025. https://arxiv.org/abs/2502.18153
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import draws, tree
from samx.core.aliases import DType, Perturbation, Radius, ScalarOrSchedule, Transformation
from samx.core.closures import Closure
from samx.core.convolutions import fast_convolutions
from samx.core.hyperparams import (
    Default,
    RandomKey,
    as_count,
    at_step,
    check_hyperparam,
    check_number,
    next_step,
)
from samx.core.order import after
from samx.core.readings import UNKNOWN, Readings, no_readings
from samx.core.sharp import ascend, perturbed, sharp_gradient
from samx.core.state import first_aux, kept_aux
from samx.core.transformation import closure_transformation
from samx.sharpness import hvp
from samx.variants._ball import ball_of
from samx.variants._eigenvector import HESSIAN_PRODUCT


class SASSHAState(NamedTuple):
    """State of `sassha` and `msassha`.

    Attributes:
        step: int32, optimizer steps so far.
        key: uint32, the data of the random key of the signs (`jax.random.key_data`).
        perturbation: State of the perturbation.
        momentum: Moving average m of the sharp gradients, float32 or wider; zeros at first.
        hessian: Moving average D of |diagonal of the Hessian|, float32 or wider; zeros at first.
        extra_gradients: float32, the cost of the last step's refresh, in gradients over one batch.
        aux: In `msassha`, the aux of the last step; else `None`.
        readings: Readings of the last step.
    """

    step: jax.Array
    key: jax.Array
    perturbation: optax.OptState
    momentum: Any
    hessian: Any
    extra_gradients: jax.Array
    aux: Any
    readings: Readings
    is_optimizer = True


def sassha(
    learning_rate: ScalarOrSchedule,
    rho: Radius = Default(0.05),
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    every: int = 10,
    samples: int = 1,
    power: ScalarOrSchedule = 0.5,
    eps: float = 1e-4,
    weight_decay: ScalarOrSchedule = 0.0,
    key: int | jax.Array = 0,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """SASSHA: divide the sharp gradient by the curvature at the perturbed point.

        g   = ∇L(w)                                            (the incoming updates)
        ε   = ρ g / ‖g‖
        g_s = ∇L(w + ε)
        on the steps 0, every, 2 every, ...:
            z random signs;  h = |mean over the samples of z · (H(w + ε) z)|
            D = β₂ D + (1 − β₂) h;  c = (1 − β₂ᵗ)^q            (t counts all steps, from 1)
        m   = β₁ m + (1 − β₁) g_s
        return −η (m / (1 − β₁ᵗ)) / (D^q / c + eps) − η weight_decay w

    Args:
        learning_rate: Learning rate η ≥ 0. The authors: 0.15 for ResNets on CIFAR.
        rho: Radius ρ ≥ 0; default 0.05, of the authors' scripts. Their class has 0.
        b1: Decay β₁ of the momentum, in [0, 1); default 0.9.
        b2: Decay β₂ of the curvature, in [0, 1); default 0.999.
        every: Steps from one refresh of D to the next; default 10.
        samples: Number ≥ 1 of random signs of a refresh; default 1.
        power: q ≥ 0; default 0.5. The authors also let it rise to 1. With 0 it is SAM with
            momentum.
        eps: Added to the root, > 0; default 1e-4, the authors'. Where D is about 0, a step is as
            long as the learning rate divided by eps: if trainings fail, try 0.01.
        weight_decay: Decoupled weight decay ≥ 0; default 0.
        key: Seed or random key of the signs, the same on all devices; default 0.
        perturbation: Replaces the ball and `rho`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        An optimizer. Put nothing after it that divides by gradients again. `update` needs
        `value_fn`.

    Raises:
        ValueError: If a number is out of range, or `rho` is given together with `perturbation`.
        TypeError: If a hyperparameter is not what it must be, or a count is not a Python int; in
            `init`, if `key` is neither a seed nor a random key.

    Example:
        A diagonal Hessian, which every draw finds: with q = 1 a step of Newton's method.

        >>> import jax, jax.numpy as jnp, samx
        >>> tx = samx.sassha(0.5, rho=0.0, power=1.0, eps=1e-8)
        >>> w, loss = jnp.array([2.0, 4.0]), lambda w: 50 * w[0] ** 2 + 0.5 * w[1] ** 2
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(u), 3) for u in updates]
        [-1.0, -2.0]

    References:
        Shin, Lee, Chung, Lee, ICML 2025, https://arxiv.org/abs/2502.18153

    Notes:
        `rho=0` is close to AdaHessian without its spatial average. The bias correction counts
        optimizer steps, and D counts refreshes, as in the published code: between the first
        refreshes D^q / c is too small. If q is a schedule, c keeps that of the last refresh. The
        published code takes its Hessian product with activations of w + ε and weights of w in the
        later layers, because it moves the weights back in place between both derivatives. Here H is
        the Hessian at w + ε, as in the paper. A refresh that is not finite is left out. Where
        devices climb separately (`data_parallel(..., ascent="local")`), H is the mean of the
        devices' Hessians, each at its own point. A complex parameter has one curvature, the mean of
        its two. Cost: 2 gradients per step, one after the other; on steps that refresh, one Hessian
        product for each sample, of about 2 gradients. State: two copies of the parameters.
        Fidelity: matches LOG-postech/Sassha with its Hessian product at w + ε, its draws replayed.
        `static_args`: `every`, `samples`.
    """
    ball = ball_of("sassha", rho, perturbation)
    rule = _Rule(learning_rate, b1, b2, every, samples, power, eps, weight_decay, key)
    sharp = partial(sharp_gradient, perturb_dtype=perturb_dtype)

    def init_fn(params):
        return rule.first_state(params, ball.init(params), None)

    def update_fn(g, state, params, *, value_fn, value=UNKNOWN, **extra):
        move, g_a, ball_state = ascend(value_fn, ball, g, state.perturbation, params, **extra)
        new, move = rule.refreshed(state, value_fn, params, move, perturb_dtype)
        new = new._replace(perturbation=ball_state)
        g_s, readings = sharp(value_fn, params, move, state.readings, loss=value, g=g_a, ball=new)
        updates, new = rule.step(new, g_s, params)
        return updates, new._replace(readings=readings)

    return closure_transformation(init_fn, update_fn, name="sassha")


def msassha(
    learning_rate: ScalarOrSchedule,
    rho: Radius = Default(0.3),
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    every: int = 10,
    samples: int = 1,
    power: ScalarOrSchedule = 1.0,
    eps: float = 1e-4,
    weight_decay: ScalarOrSchedule = 0.01,
    key: int | jax.Array = 0,
    aux_like: Any = None,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """M-SASSHA: SASSHA that climbs against its momentum, at the cost of one gradient.

        ε = −ρ m / ‖m‖                                         (0 at first)
        everything else as in `sassha`, with the Hessian at w + ε

    Args:
        learning_rate: Learning rate η ≥ 0.
        rho: Radius ρ ≥ 0; default 0.3, of the published class.
        b1: Decay β₁ of the momentum, in [0, 1); default 0.9.
        b2: Decay β₂ of the curvature, in [0, 1); default 0.999.
        every: Steps from one refresh of D to the next; default 10.
        samples: Number ≥ 1 of random signs of a refresh; default 1.
        power: q ≥ 0; default 1, of the published class.
        eps: Added to the root, > 0; default 1e-4.
        weight_decay: Decoupled weight decay ≥ 0; default 0.01, of the published class.
        key: Seed or random key of the signs, the same on all devices; default 0.
        aux_like: What the loss returns as aux, or its shapes; the state then keeps the last aux.
        perturbation: Replaces the ball and `rho`; it gets −m.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        An optimizer. `update` needs `value_fn`. It ignores the incoming gradient, so XLA drops that
        computation.

    Raises:
        ValueError: If a number is out of range, or `rho` is given together with `perturbation`; in
            `update`, if aux differs from `aux_like` in shape.
        TypeError: If a hyperparameter is not what it must be, or a count is not a Python int; in
            `init`, if `key` is neither a seed nor a random key.

    Example:
        >>> import jax, jax.numpy as jnp, samx
        >>> tx = samx.msassha(0.5, eps=1e-8, weight_decay=0.0)
        >>> w, loss = jnp.array([2.0, 4.0]), lambda w: 50 * w[0] ** 2 + 0.5 * w[1] ** 2
        >>> updates, state = tx.update(w, tx.init(w), w, value_fn=loss)
        >>> [round(float(u), 3) for u in updates]  # no momentum yet: no ascent
        [-1.0, -2.0]

    References:
        Shin, Lee, Chung, Lee, ICML 2025, https://arxiv.org/abs/2502.18153

    Notes:
        Its point is that of `momentum_sam`. Readings: `loss` and `sharp_loss` are both the loss at
        w + ε, the only one there is, and `grad_norm` is ‖m‖. aux is that of w + ε too. Cost: 1
        gradient per step, and refreshes as in `sassha`. State: two copies of the parameters.
        Fidelity: **reconstructed** from LOG-postech/Sassha. The published code cannot run, because
        two names are missing. We read it, and have no recorded run. `static_args`: `every`,
        `samples`.
    """
    ball = ball_of("msassha", rho, perturbation)
    rule = _Rule(learning_rate, b1, b2, every, samples, power, eps, weight_decay, key)
    sharp = partial(sharp_gradient, gradients=1, perturb_dtype=perturb_dtype, has_aux=True)

    def init_fn(params):
        return rule.first_state(params, ball.init(params), first_aux(aux_like))

    def update_fn(_, state, params, *, value_fn, **extra):
        climbed = optax.tree.scale(-1, state.momentum)
        move, ball_state = ball.update(climbed, state.perturbation, params, **extra)
        new, move = rule.refreshed(state, value_fn, params, move, perturb_dtype)
        new = new._replace(perturbation=ball_state)
        last = state.readings
        g_s, readings, aux = sharp(value_fn, params, move, last, loss=UNKNOWN, g=climbed, ball=new)
        readings = readings._replace(loss=readings.sharp_loss)
        updates, new = rule.step(new, g_s, params)
        aux = kept_aux("msassha", aux, aux_like, state.aux)
        return updates, new._replace(aux=aux, readings=readings)

    return closure_transformation(init_fn, update_fn, name="msassha")


class _Rule:
    """What both share: the refresh of the curvature, and the step."""

    def __init__(
        self, rate: Any, b1: Any, b2: Any, every: Any, samples: Any, power: Any, eps: Any, wd: Any,
        key: Any,
    ):  # fmt: skip
        check_hyperparam("learning_rate", rate, 0)
        check_number("b1", b1, 0, 1, excluded=1)
        check_number("b2", b2, 0, 1, excluded=1)
        check_hyperparam("power", power, 0)
        check_number("eps", eps, 0, excluded=0)
        check_hyperparam("weight_decay", wd, 0)
        self.rate, self.b1, self.b2, self.power, self.eps, self.wd = rate, b1, b2, power, eps, wd
        self.every, self.samples = as_count("every", every), as_count("samples", samples)
        self.keys = RandomKey(key)

    def first_state(self, params: Any, perturbation: Any, aux: Any) -> SASSHAState:
        """Return the state before the first step."""
        zeros = optax.tree.zeros_like(jax.tree.map(tree.widen, params))
        return SASSHAState(
            step=jnp.zeros((), jnp.int32),
            key=self.keys.data(),
            perturbation=perturbation,
            momentum=zeros,
            hessian=jax.tree.map(lambda x: x.real, zeros),
            extra_gradients=jnp.zeros((), jnp.float32),
            aux=aux,
            readings=no_readings(params),
        )

    def refreshed(
        self, state: SASSHAState, value_fn: Closure, params: Any, move: Any, dtype: DType
    ) -> tuple[SASSHAState, Any]:
        """Return the state with this step's D, refreshed at w + ε if that is due, and then ε."""
        is_due, nothing = state.step % self.every == 0, jnp.zeros_like(state.readings.loss)

        def refresh():
            h = self._curvature(state, value_fn, params, move, dtype)
            new = tree.if_finite(_average(self.b2, state.hessian, h), state.hessian)
            return new, tree.plain_norm(new).astype(nothing.dtype)

        hessian, known = fast_convolutions(jax.lax.cond)(
            is_due, refresh, lambda: (state.hessian, nothing)
        )
        spent = jnp.where(is_due, self.samples * HESSIAN_PRODUCT, 0).astype(jnp.float32)
        return state._replace(hessian=hessian, extra_gradients=spent), after(move, known)

    def _curvature(
        self, state: SASSHAState, value_fn: Closure, params: Any, move: Any, dtype: DType
    ) -> Any:
        """Estimate |diagonal of the Hessian| at w + ε (Hutchinson)."""
        times = hvp(value_fn.compose(lambda w: perturbed(w, move, dtype)), params)
        key = self.keys.of(state.key)

        def add(i, total):
            z = draws.signs_like(key, state.step, state.momentum, i)
            return jax.tree.map(_add_diagonal, total, z, times(z))

        zeros = optax.tree.zeros_like(state.hessian)
        total = fast_convolutions(jax.lax.fori_loop)(0, self.samples, add, zeros)
        return jax.tree.map(lambda h: jnp.abs(h) / self.samples if tree.is_inexact(h) else h, total)

    def step(self, state: SASSHAState, g_s: Any, params: Any) -> tuple[Any, SASSHAState]:
        """Return the updates, and the state of the next step; readings and aux are still old."""
        rate, wd, power = (at_step(x, state.step) for x in (self.rate, self.wd, self.power))
        m = _average(self.b1, state.momentum, jax.tree.map(tree.widen, g_s))
        dtype = state.readings.loss.dtype
        t = (state.step + 1).astype(dtype)
        refreshed = state.step // self.every * self.every  # the step of the last refresh
        correction = 1 - self.b2 ** (refreshed + 1).astype(dtype)
        correction = correction ** at_step(self.power, refreshed)
        m_correction = 1 - self.b1**t

        def update(m, d, w):
            if not tree.is_inexact(w):
                return jnp.zeros_like(w)
            m_hat, root = m / m_correction.astype(d.dtype), d**power / correction.astype(d.dtype)
            return (-rate * (m_hat / (root + self.eps) + wd * tree.widen(w))).astype(w.dtype)

        updates = jax.tree.map(update, m, state.hessian, params)
        return updates, state._replace(step=next_step(state.step), momentum=m)


def _average(decay: Any, old: Any, new: Any) -> Any:
    return jax.tree.map(
        lambda x, y: (decay * x + (1 - decay) * y).astype(x.dtype) if tree.is_inexact(x) else x,
        *(old, new),
    )


def _add_diagonal(total: jax.Array, z: jax.Array, product: jax.Array) -> jax.Array:
    """Add z · (H z); a complex parameter adds the mean of its two curvatures."""
    if not tree.is_inexact(total):
        return total
    parts = 2 if jnp.iscomplexobj(z) else 1
    return total + ((jnp.conj(z) * product).real / parts).astype(total.dtype)
