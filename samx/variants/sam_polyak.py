"""SAM-Polyak: SAM that takes its step size from the loss.

Oikonomou, Loizou. "Adaptive Sharpness-Aware Minimization with a Polyak-type Step size: A
Theory-Grounded Scheduler", ICML 2026. https://arxiv.org/abs/2606.01827
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.aliases import DType, Perturbation, Radius, ScalarOrSchedule, Transformation
from samx.core.hyperparams import Default, at_step, check_hyperparam, next_step
from samx.core.readings import UNKNOWN, Readings, no_readings, take_readings
from samx.core.sharp import ascend, evaluate_at, perturbed
from samx.core.transformation import closure_transformation
from samx.perturbations import partly_normalized_step
from samx.variants._ball import ball_of

LOWEST = -float(jnp.finfo(jnp.float32).max)


class SAMPolyakState(NamedTuple):
    """State of `sam_polyak`.

    Attributes:
        step: int32, optimizer steps so far; schedules run on it.
        perturbation: State of the perturbation.
        learning_rate: The step size γ of the last step.
        readings: Readings of the last step.
    """

    step: jax.Array
    perturbation: optax.OptState
    learning_rate: jax.Array
    readings: Readings
    is_optimizer = True


def sam_polyak(
    rho: Radius = Default(0.1),
    max_learning_rate: ScalarOrSchedule = 1.0,
    *,
    lam: ScalarOrSchedule = Default(1.0),
    min_loss: ScalarOrSchedule = 0.0,
    weight_decay: ScalarOrSchedule = 5e-4,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """SAM-Polyak (SAM-SPS): the step that would bring the linear model of the loss to its minimum.

        g   = ∇L(w)                                          (the incoming updates)
        ε   = ρ (1 − λ + λ / ‖g‖) g
        g_s = ∇L(w + ε)
        γ   = clip((L(w + ε) − ⟨g_s, ε⟩ − L*) / ‖g_s‖²,  0,  γ_max)
        return −γ (g_s + weight_decay w)

    Args:
        rho: Radius ρ ≥ 0; default 0.1.
        max_learning_rate: Bound γ_max ≥ 0 of the step size; default 1.
        lam: λ in [0, 1], as in `unified_sam`; default 1, which is SAM's ball. 0 is USAM's step.
        min_loss: A lower bound L* of the loss of each batch; default 0.
        weight_decay: Weight decay ≥ 0, which moves by γ too; default 5e-4.
        perturbation: Replaces ε, with `rho` and `lam`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        An optimizer, without momentum and without a learning rate. `update` needs `value_fn`.

    Raises:
        ValueError: If a number is out of range, or `rho` or `lam` is given together with
            `perturbation`.
        TypeError: If a hyperparameter is neither a number nor a schedule.

    Example:
        A quadratic loss, on which Polyak's step goes half the way, whatever its scale is:

        >>> import jax, jax.numpy as jnp, optax, samx
        >>> tx = samx.sam_polyak(rho=0.0, max_learning_rate=100.0, weight_decay=0.0)
        >>> w = jnp.array([2.0, 4.0])
        >>> for scale in (1.0, 0.1):
        ...     loss = lambda w: 0.5 * scale * w @ w
        ...     updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        ...     print([round(float(u), 3) for u in updates])
        [-1.0, -2.0]
        [-1.0, -2.0]

    References:
        Oikonomou, Loizou, ICML 2026, https://arxiv.org/abs/2606.01827 (PyPI sam-sps)

    Notes:
        `rho=0` is SPS_max. A small `max_learning_rate` is SGD on SAM's gradients with that rate.
        The loss is that of the whole batch, regularizers included: a term that cannot vanish
        belongs into `min_loss`. A gradient of zero gives no step. The published file computes norms
        and γ in float32 for any model; the recorded run has this lifted. Where devices climb
        separately (`data_parallel(..., ascent="local")`), ⟨g_s, ε⟩ is the mean over the devices of
        their own products. Cost: 2 gradients per step, one after the other, and the state of the
        perturbation. Fidelity: matches sam-sps 1.0.0.
    """
    check_hyperparam("max_learning_rate", max_learning_rate, 0)
    check_hyperparam("lam", lam, 0, 1)
    check_hyperparam("min_loss", min_loss, LOWEST)
    check_hyperparam("weight_decay", weight_decay, 0)
    ball_of("sam_polyak", lam, perturbation, lambda lam: partly_normalized_step(0.0, lam), "lam")
    ball = ball_of("sam_polyak", rho, perturbation, lambda r: partly_normalized_step(r, lam))

    def init_fn(params):
        readings = no_readings(params)
        rate = jnp.zeros_like(readings.loss)
        return SAMPolyakState(jnp.zeros((), jnp.int32), ball.init(params), rate, readings)

    def update_fn(g, state, params, *, value_fn, value=UNKNOWN, **extra):
        eps, g_a, ball_state = ascend(value_fn, ball, g, state.perturbation, params, **extra)
        loss, g_s, own_g_s = evaluate_at(value_fn, params, eps, perturb_dtype=perturb_dtype)
        slope = value_fn.mean_of_ascents(tree.dot(own_g_s, eps))
        length = tree.length(g_s)
        lowest, highest = (at_step(x, state.step) for x in (min_loss, max_learning_rate))
        rise = (loss - lowest - slope) * length.scale
        rate = tree.ratio(tree.ratio(rise, length.norm) * length.scale, length.norm)
        rate = jnp.clip(rate, 0, highest).astype(state.learning_rate.dtype)
        decayed = tree.add_scaled(
            jax.tree.map(tree.widen, g_s), at_step(weight_decay, state.step), params
        )
        updates = tree.cast_like(tree.scaled(-rate, decayed), params)
        readings = take_readings(
            *(state.readings, value, loss, g_a, g_s, params),
            point=lambda: perturbed(params, eps, perturb_dtype),
            gradients=2,
            ball=ball_state,
            mean_of_ascents=value_fn.mean_of_ascents,
        )
        return updates, SAMPolyakState(next_step(state.step), ball_state, rate, readings)

    return closure_transformation(init_fn, update_fn, name="sam_polyak")
