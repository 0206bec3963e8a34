"""Losses of examples, from logits: those that BiSAM climbs, and the one that SAF and MESA add."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from samx.core import tree
from samx.core.hyperparams import as_array, check_number

__all__ = ["log_lower_bound", "tanh_lower_bound", "trajectory_loss"]


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


def trajectory_loss(logits: Any, teacher: Any, temperature: Any = 5.0) -> jax.Array:
    """Return the trajectory loss of SAF and MESA: how far a model is from an earlier one.

        T² KL(softmax(teacher / T) ‖ softmax(logits / T)),   mean over the axes between

    Args:
        logits: `float[B, ..., classes]`.
        teacher: `float[B, ..., classes]`, the logits of the earlier model. They get no gradient.
        temperature: Temperature T > 0 of both softmaxes; default 5, as in the authors' code.

    Returns:
        `float[B]`, one number per example, in float32 or wider.

    Raises:
        ValueError: If `temperature` is not above 0, `logits` lack an axis of examples or of
            classes, or `teacher` has another shape.
        TypeError: If an argument does not hold real numbers.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.losses import trajectory_loss
        >>> logits, teacher = jnp.array([[3.0, 0.0], [0.0, 3.0]]), jnp.array([[3.0, 0.0]] * 2)
        >>> [round(float(q), 3) for q in trajectory_loss(logits, teacher, temperature=1.0)]
        [0.0, 2.715]

    References:
        Du, Zhou, Feng, Tan, Zhou, "Sharpness-Aware Training for Free", NeurIPS 2022,
        https://arxiv.org/abs/2205.14083 (AngusDujw/SAF)

    Notes:
        Its gradient with respect to one example's logits is T (softmax(logits / T) −
        softmax(teacher / T)). A class whose logit is −∞ in the teacher counts for nothing. With
        axes between, such as the tokens of a text, every position counts alike. Cost: that of two
        softmaxes.
    """
    check_number("temperature", temperature, 0, excluded=0)
    logits, teacher = (
        tree.widen(as_array(key, x, "real numbers"))
        for key, x in (("logits", logits), ("teacher", teacher))
    )
    if logits.ndim < 2 or not logits.shape[-1]:
        raise ValueError(
            "trajectory_loss: `logits` must have an axis of examples and an axis of classes, got "
            f"shape {logits.shape}"
        )
    if teacher.shape != logits.shape:
        raise ValueError(
            f"trajectory_loss: `teacher` must have the shape of `logits`, {logits.shape}, got "
            f"{teacher.shape}"
        )
    dtype = tree.common_dtype(logits.dtype, teacher.dtype)
    temperature = jnp.asarray(temperature, dtype)
    log_q = jax.nn.log_softmax(logits.astype(dtype) / temperature)
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(teacher).astype(dtype) / temperature)
    p = jnp.exp(log_p)
    apart = jnp.where(p > 0, log_p, 0) - jnp.where(p > 0, log_q, 0)  # 0 (∞ − ∞) would be NaN
    divergence = jnp.sum(p * apart, axis=-1)
    return temperature**2 * jnp.mean(divergence, axis=tuple(range(1, divergence.ndim)))


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
