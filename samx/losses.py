"""Per-example losses to climb: BiSAM climbs one of these, and descends the usual loss."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from samx.core import tree
from samx.core.hyperparams import as_array, check_number

__all__ = ["log_lower_bound", "tanh_lower_bound"]


def tanh_lower_bound(logits: Any, labels: Any, mu: Any = 10.0, alpha: Any = 0.1) -> jax.Array:
    """Return BiSAM's lower bound of the misclassification error, built from tanh.

        F_j = logits_j − logits_label                     (0 for the label itself)
        Q   = (1/μ) log Σ_j exp(μ φ(F_j)),   φ(x) = tanh(α x)

    Args:
        logits: `float[..., classes]`.
        labels: `int[...]`, the correct classes.
        mu: Sharpness μ > 0 of the maximum over the classes; default 10, as in the function in the
            authors' code. The authors' script passes 1.
        alpha: Slope α > 0 of tanh; default 0.1, as in the authors' code.

    Returns:
        `float[...]`, one number per example, in float32 or wider.

    Raises:
        ValueError: If `mu` or `alpha` is negative, or the shape of `labels` is not that of `logits`
            without the last axis.
        TypeError: If `labels` are not integers.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.losses import tanh_lower_bound
        >>> logits = jnp.array([[3.0, 0.0], [0.0, 3.0]])
        >>> right_and_wrong = tanh_lower_bound(logits, jnp.array([0, 0]))
        >>> [round(float(q), 3) for q in right_and_wrong]
        [0.005, 0.297]

    References:
        Xie, Latorre, Antonakopoulos, Pethick, Cevher, "Improving SAM Requires Rethinking its
        Optimization Formulation", ICML 2024, https://arxiv.org/abs/2407.12993 (LIONS-EPFL/BiSAM)

    Notes:
        The authors' code leaves out the factor 1/μ, which does not change the perturbation of a
        ball. Cost: that of a softmax.
    """
    check_number("mu", mu, 0, excluded=0)
    check_number("alpha", alpha, 0)
    return _smooth_maximum(jnp.tanh(alpha * _margins("tanh_lower_bound", logits, labels)), mu)


def log_lower_bound(logits: Any, labels: Any, mu: Any = 1.0) -> jax.Array:
    """Return BiSAM's lower bound of the misclassification error, built from a logarithm.

        F_j = logits_j − logits_label                     (0 for the label itself)
        Q   = (1/μ) log Σ_j exp(μ φ(F_j)),   φ(x) = 1 − log(1 + exp(γ − x)),  γ = log(e − 1)

    Args:
        logits: `float[..., classes]`.
        labels: `int[...]`, the correct classes.
        mu: Sharpness μ > 0 of the maximum over the classes; default 1, as in the authors' code.

    Returns:
        `float[...]`, one number per example, in float32 or wider.

    Raises:
        ValueError: If `mu` is not above 0, or the shape of `labels` is not that of `logits` without
            the last axis.
        TypeError: If `labels` are not integers.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.losses import log_lower_bound
        >>> logits = jnp.array([[3.0, 0.0], [0.0, 3.0]])
        >>> right_and_wrong = log_lower_bound(logits, jnp.array([0, 0]))
        >>> [round(float(q), 3) for q in right_and_wrong]
        [0.074, 1.254]

    References:
        Xie et al., ICML 2024, https://arxiv.org/abs/2407.12993 (LIONS-EPFL/BiSAM)

    Notes:
        φ(0) = 0. The authors' code leaves out the factor 1/μ, which does not change the
        perturbation of a ball. Cost: that of a softmax.
    """
    check_number("mu", mu, 0, excluded=0)
    margins = _margins("log_lower_bound", logits, labels)
    return _smooth_maximum(1 - jnp.logaddexp(0.0, math.log(math.e - 1) - margins), mu)


def _margins(name: str, logits: Any, labels: Any) -> jax.Array:
    logits = tree.widen(as_array("logits", logits, "real numbers"))
    labels = as_array("labels", labels, "integers")
    if not logits.ndim or not logits.shape[-1]:
        raise ValueError(f"{name}: `logits` must have an axis of classes, got shape {logits.shape}")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"{name}: `labels` must have the shape of `logits` without its last axis, "
            f"{logits.shape[:-1]}, got {labels.shape}"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"{name}: `labels` must be integers, got {labels.dtype}")
    return logits - jnp.take_along_axis(logits, labels[..., None], axis=-1)


def _smooth_maximum(x: jax.Array, mu: Any) -> jax.Array:
    return jax.nn.logsumexp(mu * x, axis=-1) / mu
