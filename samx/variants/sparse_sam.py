"""Sparse SAM: perturb only some entries of the parameters.

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

NORM_EPS = 1e-7  # the authors' value


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
    """Sparse SAM: perturb the entries with the largest Fisher information (SSAM-F).

        g   = ∇L(w)                                    (the incoming updates)
        on the steps 1, 1 + period, 1 + 2 period, ...:
            M = 1 at the largest entries of Σ_j (∇ℓ_j(w))², else 0
        ε   = M · ρ g / ‖g‖                            (M = 0 on step 0; the norm is that of all g)
        return g_s = ∇L(w + ε)

    Args:
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters; default 0.05, as in the authors' code.
            Their recipes: 0.1 for a ResNet-18 on CIFAR-10, 0.2 in the later paper.
        sparsity: Share s in [0, 1] of the entries that are not perturbed; default 0.5, as in the
            authors' recipes. The default of their code is 0.2.
        period: Steps between two updates of the mask; the authors use one epoch.
        pattern: Which entries are chosen together, see `perturbations.fisher_mask`: "unstructured",
            "structured" (whole leaves) or `(n, m)`, n of each m consecutive entries. `(n, m)`
            replaces `sparsity`.
        num_microbatches: Number of microbatches. The per-example gradients of one microbatch are
            computed together, see `perturbations.fisher_mask`; default one example at a time.
        perturbation: Replaces the ball and `rho`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `losses_fn` and `batch`. The
        Fisher information is computed over `fisher_batch` if you pass it, else over `batch`.

    Raises:
        ValueError: If a number is out of range, `rho` is given together with `perturbation`, or
            `sparsity` with a pattern (n, m); also as `perturbations.fisher_mask` says.
        TypeError: If a hyperparameter is neither a number nor a schedule, or `period` or
            `num_microbatches` is not a Python int.

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
        Mi, Shen, Ren, Zhou, Sun, Ji, Tao, NeurIPS 2022, https://arxiv.org/abs/2210.05177; Mi et
        al., "Systematic Investigation of Sparse Perturbed Sharpness-Aware Minimization Optimizer",
        IEEE TPAMI 2025, https://arxiv.org/abs/2306.17504 (the patterns)

    Notes:
        `sparsity=0` is SAM from step 1 on. Cost: 2 gradients per step, one after the other, and one
        transient copy of the parameters; a mask makes no pass cheaper. Steps that update the mask
        also take one gradient for each example, counted in `gradients_spent`. State: a mask of
        booleans.
        As in the authors' code, 1e-7 is added to ‖g‖, which shortens the step of gradients below
        about 1e-5. `perturbation=metric_ball(rho)` adds nothing.
        Fidelity: matches Mi-Peng/Sparse-Sharpness-Aware-Minimization with the Fisher information
        of the paper. The published code starts its sum with the gradients of the last step. It
        updates the mask after a step, here it is updated before the next step: at the same
        parameters. For (n, m) on kernels of convolutions, that code writes masks back in another
        order than it ranks. Its third pattern, a mask inside the backward pass, is left out.
        `static_args`: `period`, `pattern`, `num_microbatches`; `sparsity` with a pattern (n, m).
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
    """Sparse SAM with a mask that drops and grows entries during training (SSAM-D).

        g   = ∇L(w)                                    (the incoming updates)
        ε   = M · ρ g / ‖g‖                            (the norm is that of all g)
        on the steps 0, period, 2 period, ...:
            M = the largest entries of M (by |g|, for example), and new entries outside of it
        return g_s = ∇L(w + ε)

    Args:
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters; default 0.05, as in the authors' code.
        sparsity: Share s in [0, 1] of the entries that are not perturbed; default 0.5. A number,
            not a schedule.
        drop_rate: Share d in [0, 1] of the perturbed entries that are exchanged; default 0.5. The
            authors' falls to 0: `optax.cosine_decay_schedule(0.5, total_steps)`.
        period: Steps between two exchanges; the authors use one epoch, or five.
        drop: Score by which the largest entries stay: "gradient", the default, "weight" or
            "random".
        grow: Score by which new entries are chosen: "random", the default, "gradient" or "weight".
        key: Seed or `jax.random.key` of the draws.
        perturbation: Replaces the ball and `rho`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`.

    Raises:
        ValueError: If a number is out of range, or `rho` is given together with `perturbation`;
            also as `perturbations.dynamic_mask` says.
        TypeError: If a hyperparameter is neither a number nor a schedule, `sparsity` is not a
            number, `period` is not a Python int, or `key` is neither a seed nor a random key.

    Example:
        >>> import optax, samx
        >>> steps_per_epoch, total_steps = 390, 390 * 200
        >>> drop_rate = optax.cosine_decay_schedule(0.5, total_steps)
        >>> tx = optax.chain(
        ...     samx.dynamic_sparse_sam(0.1, 0.5, drop_rate, period=steps_per_epoch),
        ...     optax.sgd(0.05, momentum=0.9))

    References:
        Mi, Shen, Ren, Zhou, Sun, Ji, Tao, NeurIPS 2022, https://arxiv.org/abs/2210.05177

    Notes:
        `sparsity=0, drop_rate=0` is SAM. Cost: 2 gradients per step, one after the other, and one
        transient copy of the parameters; a mask makes no pass cheaper. State: a mask of booleans
        and a key. See `perturbations.dynamic_mask` for the counts and draws.
        The 1e-7 in the norm is as in `fisher_sparse_sam`.
        Fidelity: matches Mi-Peng/Sparse-Sharpness-Aware-Minimization, with other random numbers.
        `static_args`: `period`, `drop`, `grow`.
    """
    ball = ball_of("dynamic_sparse_sam", rho, perturbation, _ball)
    masked = dynamic_mask(ball, sparsity, drop_rate, period=period, drop=drop, grow=grow, key=key)
    return sharpness_aware(masked, perturb_dtype=perturb_dtype, name="dynamic_sparse_sam")


def _ball(rho: Any) -> Transformation:
    return metric_ball(rho, norm_eps=NORM_EPS)
