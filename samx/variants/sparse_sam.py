"""Sparse SAM: perturb only a part of the entries of the parameters.

Mi, Shen, Ren, Zhou, Sun, Ji, Tao. "Make Sharpness-Aware Minimization Stronger: A Sparsified
Perturbation Approach", NeurIPS 2022. https://arxiv.org/abs/2210.05177
"""

from typing import Any

import jax

from samx.core.aliases import DType, Perturbation, Radius, ScalarOrSchedule, Transformation
from samx.core.hyperparams import Default
from samx.perturbations.balls import metric_ball
from samx.perturbations.dynamic_mask import Score, dynamic_mask
from samx.perturbations.fisher_mask import fisher_mask
from samx.perturbations.patterns import Pattern
from samx.variants._ball import ball_of
from samx.variants.sam import sharpness_aware

NORM_EPS = 1e-7  # of the authors


def fisher_sparse_sam(
    rho: Radius = Default(0.05),
    sparsity: ScalarOrSchedule = Default(0.5),
    *,
    period: int,
    pattern: Pattern = "unstructured",
    num_microbatches: int | None = None,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Sparse SAM with a mask of the Fisher information (SSAM-F).

        g   = ∇L(w)                                    (the incoming updates)
        on the steps 1, 1 + period, 1 + 2 period, ...:
            M = 1 at the largest entries of Σ_j (∇ℓ_j(w))², else 0
        ε   = M · ρ g / ‖g‖                            (M = 0 on step 0; the norm is that of all g)
        return g_s = ∇L(w + ε)

    Args:
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters, a number or a schedule over the
            optimizer's steps; default 0.05, that of the authors' code. Their recipes: 0.1 for a
            ResNet-18 on CIFAR-10, 0.2 in the later paper's.
        sparsity: Share s in [0, 1] of the entries that are not perturbed, a number or a schedule;
            default 0.5, that of the authors' recipes; their code's is 0.2.
        period: Steps between two looks at the Fisher information; the authors': one epoch.
        pattern: Which entries are chosen together, see `perturbations.fisher_mask`: "unstructured",
            "structured" (whole leaves) or `(n, m)`, n of each m consecutive ones, which is then the
            sparsity.
        num_microbatches: Microbatches of which the gradients of single examples are taken
            together, see `perturbations.fisher_mask`; default one example after the other.
        perturbation: Another geometry in place of the ball; then leave `rho` out.
        perturb_dtype: Lowest precision of the perturbed point, see `sharpness_aware`.

    Returns:
        An `optax.GradientTransformationExtraArgs`, to stand first in a chain. `update` needs
        `losses_fn` and `batch`; the Fisher information is taken over `fisher_batch` if that is
        passed, over the current batch if not. `value` is read if given.

    Raises:
        ValueError: If `rho` is a negative number, or given together with `perturbation`, or
            `sparsity` with a pattern (n, m), and as `perturbations.fisher_mask` says; in `update`,
            see `closure_transformation`.
        TypeError: If `rho` or `sparsity` is neither number nor schedule, or `period` or
            `num_microbatches` no Python int.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.fisher_sparse_sam(rho=0.1, period=1), optax.sgd(0.5))
        >>> w, batch, state = jnp.array([1.0, 2.0]), jnp.eye(2), None
        >>> losses_fn = lambda w, x: (x @ w) ** 2
        >>> state = tx.init(w)
        >>> for _ in range(2):
        ...     g = jax.grad(lambda w: losses_fn(w, batch).mean())(w)
        ...     updates, state = tx.update(g, state, w, losses_fn=losses_fn, batch=batch)
        ...     print([round(float(u), 3) for u in updates])
        [-0.5, -1.0]
        [-0.5, -1.045]

    References:
        Mi, Shen, Ren, Zhou, Sun, Ji, Tao, "Make Sharpness-Aware Minimization Stronger: A Sparsified
        Perturbation Approach", NeurIPS 2022, https://arxiv.org/abs/2210.05177; Mi et al.,
        "Systematic Investigation of Sparse Perturbed Sharpness-Aware Minimization Optimizer", IEEE
        TPAMI 2025, https://arxiv.org/abs/2306.17504 (the patterns)

    Notes:
        `sparsity=0` is SAM from step 1 on. Cost: 2 gradients per step, one after the other, and one
        transient copy of the parameters: a mask makes no pass cheaper. On steps that look again
        also one gradient for each example, counted in `gradients_spent`. State: a mask of booleans.
        Fidelity: matches Mi-Peng/Sparse-Sharpness-Aware-Minimization with the Fisher information
        of the paper. The published code starts its sum with the gradients of the last step, and
        looks behind the update of a step, where this looks before the next one: the same
        parameters. (n, m) on kernels of convolutions: that code writes masks back in another
        order than it ranks. Its third pattern, a mask inside the backward pass, is left out.
        `static_args`: `period`, `pattern`, `num_microbatches`, `perturbation`, `perturb_dtype`;
        `rho` too where `perturbation` is given, and `sparsity` with a pattern (n, m).
    """
    ball = ball_of("fisher_sparse_sam", rho, perturbation, _ball)
    masked = fisher_mask(
        ball, sparsity, period=period, pattern=pattern, num_microbatches=num_microbatches
    )
    return sharpness_aware(masked, perturb_dtype=perturb_dtype, name="fisher_sparse_sam")


def dynamic_sparse_sam(
    rho: Radius = Default(0.05),
    sparsity: float = 0.5,
    drop_rate: ScalarOrSchedule = 0.5,
    *,
    period: int,
    drop: Score = "gradient",
    grow: Score = "random",
    key: int | jax.Array = 0,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Sparse SAM with a mask that is trained along, by dropping and growing entries (SSAM-D).

        g   = ∇L(w)                                    (the incoming updates)
        ε   = M · ρ g / ‖g‖                            (the norm is that of all g)
        on the steps 0, period, 2 period, ...:
            M = the largest of M, by |g| say, and new entries outside of it
        return g_s = ∇L(w + ε)

    Args:
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters, a number or a schedule over the
            optimizer's steps; default 0.05, that of the authors' code.
        sparsity: Share s in [0, 1] of the entries that are not perturbed; default 0.5. A number.
        drop_rate: Share d in [0, 1] of the perturbed entries that are exchanged, a number or a
            schedule; default 0.5. The authors' falls to 0:
            `optax.cosine_decay_schedule(0.5, total_steps)`.
        period: Steps between two exchanges; the authors': one epoch, or five.
        drop: By what the entries that stay are chosen, the largest: "gradient", the default,
            "weight" or "random".
        grow: By what new entries are chosen: "random", the default, "gradient" or "weight".
        key: Seed or `jax.random.key` of the draws.
        perturbation: Another geometry in place of the ball; then leave `rho` out.
        perturb_dtype: Lowest precision of the perturbed point, see `sharpness_aware`.

    Returns:
        An `optax.GradientTransformationExtraArgs`, to stand first in a chain. `update` needs
        `value_fn` (or `losses_fn` and `batch`); `value` is read if given.

    Raises:
        ValueError: If `rho` is a negative number, or given together with `perturbation`, and as
            `perturbations.dynamic_mask` says; in `update`, see `closure_transformation`.
        TypeError: If `rho` or `drop_rate` is neither number nor schedule, `sparsity` no number,
            `period` no Python int, or `key` no seed.

    Example:
        >>> import optax, samx
        >>> steps_per_epoch, total_steps = 390, 390 * 200
        >>> drop_rate = optax.cosine_decay_schedule(0.5, total_steps)
        >>> tx = optax.chain(
        ...     samx.dynamic_sparse_sam(0.1, 0.5, drop_rate, period=steps_per_epoch),
        ...     optax.sgd(0.05, momentum=0.9))

    References:
        Mi, Shen, Ren, Zhou, Sun, Ji, Tao, "Make Sharpness-Aware Minimization Stronger: A Sparsified
        Perturbation Approach", NeurIPS 2022, https://arxiv.org/abs/2210.05177

    Notes:
        `sparsity=0, drop_rate=0` is SAM. Cost: 2 gradients per step, one after the other, and one
        transient copy of the parameters: a mask makes no pass cheaper. State: a mask of booleans
        and a key. See `perturbations.dynamic_mask` for the counts and draws.
        Fidelity: matches Mi-Peng/Sparse-Sharpness-Aware-Minimization, with other random numbers.
        `static_args`: `period`, `drop`, `grow`, `key`, `perturbation`, `perturb_dtype`; `rho` too
        where `perturbation` is given.
    """
    ball = ball_of("dynamic_sparse_sam", rho, perturbation, _ball)
    masked = dynamic_mask(ball, sparsity, drop_rate, period=period, drop=drop, grow=grow, key=key)
    return sharpness_aware(masked, perturb_dtype=perturb_dtype, name="dynamic_sparse_sam")


def _ball(rho: Any) -> Transformation:
    return metric_ball(rho, norm_eps=NORM_EPS)
