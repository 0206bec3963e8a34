"""ARSAM: sample, reuse and mix the second-order part of SAM's gradient.

Deng, Pang. "Adaptively Sampling-Reusing-Mixing Decomposed Gradients to Speed Up Sharpness Aware
Minimization", 2025. https://arxiv.org/abs/2510.03763
"""

from samx.combinations import Mixing, decaying
from samx.core.aliases import DType, Perturbation, Radius, Transformation
from samx.core.hyperparams import Default
from samx.policies import Policy, quota
from samx.variants._ball import ball_of
from samx.variants.vsam import reuse_second_order


def arsam(
    rho: Radius = Default(0.05),
    *,
    policy: Policy | None = None,
    mixing: Mixing | None = None,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """ARSAM: vSAM's decomposition, with the sampling and the mixing in your hands.

        if policy(g):  g_s = ∇L(w + ρ g / ‖g‖)
                       h = g_s − g;  j = 0
        else:          j = j + 1
        return g + mixing(j, step) h

    Args:
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters, a number or a schedule over the
            optimizer's steps; default 0.05.
        policy: When to sample h; default `policies.quota()`, vSAM's.
        mixing: `(j, step) -> weight` of h, from the int32 steps since it was sampled (0 where it
            is) and since the beginning; default `combinations.decaying(0.7)`.
        perturbation: Another geometry in place of the ball; then leave `rho` out.
        perturb_dtype: Lowest precision of the perturbed point, see `sharpness_aware`.

    Returns:
        An `optax.GradientTransformationExtraArgs`, to stand first in a chain. `update` needs
        `value_fn` (or `losses_fn` and `batch`); `value` is read if given. Its state holds
        `part_ratio`, ‖h‖ / ‖g‖ of the last sample, and `sharp_fraction`. The abstract speaks of a
        growing role of h during training; that this ratio shows it is our reading.

    Raises:
        ValueError: If `rho` is a negative number, or given together with `perturbation`; in
            `update`, see `closure_transformation`.
        TypeError: If `rho` is neither number nor schedule, `policy` no `Policy`, or `mixing` no
            function.

    Example:
        Sample every third step, reuse at full weight in between:

        >>> import optax, samx
        >>> arsam = samx.arsam(0.05, policy=samx.policies.every(3), mixing=lambda age, step: 1.0)
        >>> tx = optax.chain(arsam, optax.sgd(0.1, momentum=0.9))

    References:
        Deng, Pang, "Adaptively Sampling-Reusing-Mixing Decomposed Gradients to Speed Up Sharpness
        Aware Minimization", 2025, https://arxiv.org/abs/2510.03763

    Notes:
        With `mixing=combinations.decaying(0.7, last=6)` it is `vsam`, exactly. The default never
        drops h: of the paper we know that a sample is reused for the next several iterations and
        that its part matters more and more, so it fades but does not end after six steps.
        Cost: as `vsam`. Fidelity: a reconstruction from the abstract and a figure's caption; the
        announced code could not be had, and beyond the decomposition and the three ideas of the
        title nothing is known to be the authors' rule. `static_args`: `policy`, `mixing`,
        `perturbation`, `perturb_dtype`; `rho` too where `perturbation` is given.
    """
    policy = quota() if policy is None else policy
    mixing = decaying() if mixing is None else mixing
    if not callable(mixing):
        raise TypeError(f"arsam: `mixing` must be a function (age, step) -> weight, got {mixing!r}")
    ball = ball_of("arsam", rho, perturbation)
    return reuse_second_order("arsam", policy, ball, mixing, perturb_dtype)
