"""ASAM: SAM in a geometry that is invariant to a rescaling of the weights.

Kwon, Kim, Park, Choi. "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning
of Deep Neural Networks", ICML 2021. https://arxiv.org/abs/2102.11600
"""

from samx.core.aliases import DType, Radius, Transformation
from samx.perturbations import metric_ball
from samx.perturbations.metrics import LeafPredicate, is_not_bias, magnitude
from samx.variants.sam import sharpness_aware


def asam(
    rho: Radius = 0.5,
    eta: float = 0.01,
    *,
    is_scaled: LeafPredicate = is_not_bias,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Adaptive SAM: large weights may move further than small ones.

        g   = ∇L(w)                    (the incoming updates)
        T   = |w| + η                  (1 on the leaves that are not scaled)
        ε   = ρ T² g / ‖T g‖
        return g_s = ∇L(w + ε)

    Args:
        rho: Radius ρ ≥ 0, relative to the weights; default 0.5. About ten times SAM's.
        eta: η ≥ 0, in units of the weights; default 0.01.
        is_scaled: `(path, leaf) -> bool`, the leaves with `T = |w| + η`; default every leaf except
            biases, as in the authors' code.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If `rho` is neither a number nor a schedule.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.asam(rho=0.5, eta=0.0), optax.sgd(0.5))
        >>> w, loss = jnp.array([2.0, 1.0]), lambda w: w.sum()
        >>> _, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value=loss(w), value_fn=loss)
        >>> readings = optax.tree.get(state, "readings")
        >>> round(float(readings.sharp_loss - readings.loss), 3)  # ρ ‖T g‖
        1.118

    References:
        Kwon, Kim, Park, Choi, ICML 2021, https://arxiv.org/abs/2102.11600

    Notes:
        `rho=0` is the base optimizer. Cost: 2 gradients per step, in sequence, and one transient
        copy of the parameters. The most used PyTorch code means another geometry: `adaptive=True,
        rho=2.0` of davda54/sam scales biases too, and adds no η. Here it is
        `samx.asam(2.0, eta=0.0, is_scaled=lambda path, leaf: True)`. With `samx.asam(2.0)` biases
        move much further than there. No code of the paper's filter-wise form was found. As we
        remember it, T is the norm of the filter in kernels of convolutions, |w| elsewhere, and η is
        added. `sharpness_aware(metric_ball(rho, filterwise()))` comes close: it takes the kernels
        of dense layers by filters too, a vector as one filter, and adds no η.
        Fidelity: matches SamsungLabs/ASAM.
        `static_args`: `is_scaled`.
    """
    ball = metric_ball(rho, magnitude(eta, is_scaled=is_scaled))
    return sharpness_aware(ball, perturb_dtype=perturb_dtype, name="asam")
