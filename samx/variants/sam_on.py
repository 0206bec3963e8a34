"""SAM-ON: perturb the normalization layers only.

Müller, Vlaar, Rolnick, Hein. "Normalization Layers Are All That Sharpness-Aware Minimization
Needs", NeurIPS 2023. https://arxiv.org/abs/2306.04226
"""

from samx.core.aliases import DType, Perturbation, Radius, Transformation
from samx.core.hyperparams import Default
from samx.perturbations.leaves import on_leaves
from samx.perturbations.metrics import LeafPredicate, is_normalization
from samx.variants._ball import ball_of
from samx.variants.sam import sharpness_aware


def sam_on(
    rho: Radius = Default(0.5),
    *,
    is_perturbed: LeafPredicate = is_normalization,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """SAM on the normalization layers only (SAM-ON).

        g   = ∇L(w)                    (the incoming updates)
        ε   = ρ g / ‖g‖                on the normalization layers (norm over these); 0 elsewhere
        return g_s = ∇L(w + ε)         of all parameters

    Args:
        rho: Radius ρ ≥ 0 of the L2 ball over the perturbed parameters; default 0.5, our choice. The
            authors' best values are two to ten times those for all parameters: 1 instead of 0.2 for
            a WRN-28-10 on CIFAR-100.
        is_perturbed: `(path, leaf) -> bool`; default `perturbations.is_normalization`, by names.
        perturbation: Replaces the ball and `rho`; any metric.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`.

    Raises:
        ValueError: If a number is out of range, or `rho` is given together with `perturbation`; in
            `update`, if no leaf is perturbed.
        TypeError: If `rho` is neither a number nor a schedule.

    Example:
        Elementwise ASAM-ON, with the biases of the normalization scaled too:

        >>> import jax, jax.numpy as jnp, optax, samx
        >>> from samx.perturbations import magnitude, metric_ball
        >>> ball = metric_ball(1.0, magnitude(0.01, is_scaled=lambda path, leaf: True))
        >>> tx = samx.all_readings(samx.sam_on(perturbation=ball))
        >>> w = {"dense": {"kernel": jnp.ones(2)}, "norm": {"scale": jnp.ones(2)}}
        >>> loss = lambda w: jnp.sum((w["dense"]["kernel"] * w["norm"]["scale"]) ** 2)
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> round(float(optax.tree.get(state, "perturbation_norm")), 3)  # ρ T
        1.01

    References:
        Müller, Vlaar, Rolnick, Hein, NeurIPS 2023, https://arxiv.org/abs/2306.04226

    Notes:
        This is `sharpness_aware(on_leaves(metric_ball(rho), is_normalization))` with a name. For
        the paper's control experiment, all layers except the normalization, negate `is_perturbed`.
        Cost: 2 gradients per step, one after the other: both passes need all layers.
        Fidelity: matches mueller-mp/SAM-ON, for every metric. `static_args`: `is_perturbed`.
    """
    ball = on_leaves(ball_of("sam_on", rho, perturbation), is_perturbed)
    return sharpness_aware(ball, perturb_dtype=perturb_dtype, name="sam_on")
