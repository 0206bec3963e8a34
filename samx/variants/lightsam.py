"""LightSAM: adaptive radius and learning rate.

Cheng, Shen, Sun, Yin, Cao, Chen. "LightSAM: Parameter-Agnostic Sharpness-Aware Minimization", 2025.
https://arxiv.org/abs/2505.24399
"""

from typing import Any

import optax

from samx.core.aliases import DType, Radius, ScalarOrSchedule, Transformation
from samx.perturbations import unnormalized_step
from samx.variants import _moments
from samx.variants.sam import sharpness_aware


def lightsam_norm(
    learning_rate: ScalarOrSchedule,
    rho: Radius = 0.05,
    *,
    eps: float = 1e-8,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """LightSAM-I: AdaGrad-Norm for the ascent and for the descent.

        g   = ∇L(w)
        u   = u + ‖g‖²                 (u = ε² at first, ‖·‖ over all parameters)
        g_s = ∇L(w + ρ g / √u)
        v   = v + ‖g_s‖²               (v = ε² at first)
        w   = w − η g_s / √v

    Args:
        learning_rate: Learning rate η ≥ 0.
        rho: Length ρ ≥ 0 of the first perturbation; default 0.05. Step t has about ρ / √t.
        eps: Square root ε > 0 of the initial accumulators; default 1e-8.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        An optimizer. Put nothing after it that divides by gradients again. `update` needs
        `value_fn`.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If a hyperparameter is neither a number nor a schedule.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx, loss = samx.lightsam_norm(learning_rate=1.0, rho=0.1), lambda w: 0.5 * w @ w
        >>> w = jnp.array([3.0, 4.0])
        >>> updates, state = tx.update(w, tx.init(w), w, value_fn=loss)
        >>> [round(float(u), 3) for u in updates]  # the first step is as long as η
        [-0.6, -0.8]

    References:
        Cheng et al., 2025, https://arxiv.org/abs/2505.24399

    Notes:
        `rho=0` is AdaGrad-Norm. By the abstract it converges for any η and ρ. Cost: 2 gradients per
        step, in sequence; two numbers in the state.
        Fidelity: the authors published no code, and the paper's text was not read; matches
        third-party code (dimitris-oik/sam_sps), and a second transcription agrees with it.
    """
    scaled = _moments.adagrad_norm(eps)
    return _lightsam("lightsam_norm", scaled, learning_rate, rho, perturb_dtype)


def lightsam_adagrad(
    learning_rate: ScalarOrSchedule,
    rho: Radius = 0.001,
    *,
    eps: float = 1e-8,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """LightSAM-II: AdaGrad for the ascent and for the descent.

        g   = ∇L(w)
        u   = u + g²                   (elementwise; u = ε² at first)
        g_s = ∇L(w + ρ g / √u)
        v   = v + g_s²                 (v = ε² at first)
        w   = w − η g_s / √v

    Args:
        learning_rate: Learning rate η ≥ 0.
        rho: Factor ρ ≥ 0 of each element; default 0.001. The first perturbation has the length ρ √P
            for P parameters, so values are far smaller than SAM's.
        eps: Square root ε > 0 of the initial accumulators; default 1e-8.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        As `lightsam_norm`.

    Raises:
        ValueError: As `lightsam_norm`.
        TypeError: As `lightsam_norm`.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx, loss = samx.lightsam_adagrad(1.0, 0.1), lambda w: 0.5 * w @ w
        >>> w = jnp.array([3.0, 4.0])
        >>> updates, state = tx.update(w, tx.init(w), w, value_fn=loss)
        >>> [round(float(u), 3) for u in updates]  # the first step is the same everywhere
        [-1.0, -1.0]

    References:
        Cheng et al., 2025, https://arxiv.org/abs/2505.24399

    Notes:
        `rho=0` is AdaGrad. optax's AdaGrad starts its accumulator at 0.1. Cost: 2 gradients per
        step, in sequence; two copies of the parameters in the state, in float32 or wider. Fidelity:
        as `lightsam_norm`.
    """
    scaled = _moments.adagrad(eps)
    return _lightsam("lightsam_adagrad", scaled, learning_rate, rho, perturb_dtype)


def lightsam_adam(
    learning_rate: ScalarOrSchedule,
    rho: Radius = 0.001,
    b1: float = 0.9,
    b2: float = 0.999,
    *,
    eps: float = 1e-8,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """LightSAM-III: Adam without bias correction for the ascent and for the descent.

        g   = ∇L(w)
        r   = b1 r + (1 − b1) g;    u = b2 u + (1 − b2) g²        (u = ε² at first)
        g_s = ∇L(w + ρ r / √u)
        m   = b1 m + (1 − b1) g_s;  v = b2 v + (1 − b2) g_s²      (v = ε² at first)
        w   = w − η m / √v

    Args:
        learning_rate: Learning rate η ≥ 0. Without bias correction the first step is
            (1 − b1) / √(1 − b2) times as long as Adam's (3.16).
        rho: Factor ρ ≥ 0 of each element; default 0.001. The first perturbation has the length
            3.16 ρ √P for P parameters.
        b1: Decay of the moving averages of gradients, in [0, 1]; default 0.9.
        b2: Decay of the moving averages of their squares, in [0, 1]; default 0.999.
        eps: Square root ε > 0 of the initial accumulators; default 1e-8.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        As `lightsam_norm`.

    Raises:
        ValueError: As `lightsam_norm`.
        TypeError: As `lightsam_norm`.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx, loss = samx.lightsam_adam(1.0, 0.1), lambda w: 0.5 * w @ w
        >>> w = jnp.array([3.0, 4.0])
        >>> updates, state = tx.update(w, tx.init(w), w, value_fn=loss)
        >>> [round(float(u), 3) for u in updates]  # (1 − b1) / √(1 − b2) everywhere
        [-3.162, -3.162]

    References:
        Cheng et al., 2025, https://arxiv.org/abs/2505.24399

    Notes:
        `rho=0` is Adam without bias correction. Cost: 2 gradients per step, in sequence; four
        copies of the parameters in the state, in float32 or wider. Fidelity: as `lightsam_norm`;
        that the average r is climbed, not g, is in that code alone.
    """
    scaled = _moments.adam(b1, b2, eps)
    return _lightsam("lightsam_adam", scaled, learning_rate, rho, perturb_dtype)


def _lightsam(
    name: str,
    scaled: optax.GradientTransformation,
    learning_rate: Any,
    rho: Any,
    perturb_dtype: Any,
) -> Transformation:
    """Use the same scaling for the ascent and for the descent, each with a separate state."""
    up = optax.chain(scaled, unnormalized_step(rho))
    sharp = sharpness_aware(up, perturb_dtype=perturb_dtype, name=name)
    return _moments.optimizer(name, sharp, scaled, learning_rate)
