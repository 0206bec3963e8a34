"""AdaSAM: SAM, and Adam's step without bias correction.

Sun, Shen, Zhong, Ding, Chen, Sun, Li, Sun, Tao. "AdaSAM: Boosting Sharpness-Aware Minimization with
Adaptive Learning Rate and Momentum for Training Deep Neural Networks", Neural Networks 169, 2024.
https://arxiv.org/abs/2303.00565
"""

from samx.core.aliases import DType, Perturbation, Radius, ScalarOrSchedule, Transformation
from samx.core.hyperparams import Default
from samx.variants import _moments
from samx.variants._ball import ball_of
from samx.variants.sam import sharpness_aware


def adasam(
    learning_rate: ScalarOrSchedule,
    rho: Radius = Default(0.05),
    b1: float = 0.9,
    b2: float = 0.999,
    *,
    eps: float = 1e-8,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """AdaSAM: SAM whose base is AMSGrad without bias correction.

        g   = ∇L(w)
        ε   = ρ g / ‖g‖
        g_s = ∇L(w + ε)
        m   = b1 m + (1 − b1) g_s
        v   = b2 v + (1 − b2) g_s²     (v = v̂ = eps² at first)
        v̂   = max(v̂, v)
        w   = w − η m / √v̂

    Args:
        learning_rate: Learning rate η ≥ 0. Without bias correction the first step is
            (1 − b1) / √(1 − b2) times as long as Adam's (3.16): choose η smaller, or warm up.
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters; default 0.05.
        b1: Decay of the moving average of gradients, in [0, 1]; default 0.9.
        b2: Decay of the moving average of their squares, in [0, 1]; default 0.999.
        eps: Square root of the initial accumulators, > 0; default 1e-8.
        perturbation: Replaces the ball and `rho`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        An optimizer. Put nothing after it that divides by gradients again. `update` needs
        `value_fn`.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If a hyperparameter is neither a number nor a schedule.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx, loss = samx.adasam(learning_rate=0.01, rho=0.1), lambda w: 0.5 * w @ w
        >>> w = jnp.array([3.0, 4.0])
        >>> updates, state = tx.update(w, tx.init(w), w, value_fn=loss)
        >>> [round(float(u), 4) for u in updates]
        [-0.0316, -0.0316]

    References:
        Sun et al., Neural Networks 169, 2024, https://arxiv.org/abs/2303.00565

    Notes:
        Use `samx.sam` for another `optax` base; `optax.amsgrad` corrects the bias, starts at 0 and
        adds its eps elsewhere. For decoupled weight decay put `optax.add_decayed_weights(-η λ)`
        after the optimizer; the paper does not mention weight decay. Cost: 2 gradients per step, in
        sequence; three copies of the parameters in the state, in float32 or wider.
        Fidelity: the authors published no code; matches third-party code (dimitris-oik/sam_sps),
        and a second transcription agrees with it.
    """
    ball = ball_of("adasam", rho, perturbation)
    sharp = sharpness_aware(ball, perturb_dtype=perturb_dtype, name="adasam")
    return _moments.optimizer("adasam", sharp, _moments.amsgrad(b1, b2, eps), learning_rate)
