"""Focal-SAM: SAM with a perturbation that weighs rare classes more.

Li, Xu, Yang, Wang, Zhang, Cao, Huang. "Focal-SAM: Focal Sharpness-Aware Minimization for
Long-Tailed Classification", ICML 2025. https://arxiv.org/abs/2505.01660
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from samx.core.aliases import DType, Perturbation, Radius, ScalarOrSchedule, Transformation
from samx.core.hyperparams import Default, as_list, at_step, check_hyperparam, check_static_number
from samx.variants._ball import ball_of
from samx.variants._split import of_class, split_sam


def focal_sam(
    class_counts: Sequence[int] | np.ndarray,
    rho: Radius = Default(0.1),
    gamma: ScalarOrSchedule = 2.0,
    sharpness: ScalarOrSchedule = 0.8,
    *,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Focal Sharpness-Aware Minimization: rare classes weigh more in the perturbed loss.

        c_k = λ (1 − π_k)^γ                            (π: shares of the classes)
        g   = ∇ mean((1 − c_y) ℓ)(w)
        q   = ∇ mean(c_y ℓ)(w)
        ε   = ρ q / ‖q‖
        return g + ∇ mean(c_y ℓ)(w + ε)

    This is a step on L + λ (max L^γ(w + ε) − L^γ(w)), where L^γ weighs rare classes more.

    Args:
        class_counts: Number of training examples of each class, all above 0.
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters; default 0.1. The authors use 0.2 to
            0.3 on long-tailed CIFAR.
        gamma: Exponent γ ≥ 0; default 2. 0 weighs all classes alike. The authors use 3 on
            long-tailed CIFAR.
        sharpness: Factor λ ≥ 0; default 0.8. Above 1 the step climbs the plain part of rare
            classes, as in the authors' code.
        perturbation: Replaces the ball and `rho`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `losses_fn`, `batch` and
        `labels`, `int[B]`; it respects `weights`. It does not use the incoming gradient, so XLA
        drops its computation.

    Raises:
        ValueError: If a number is out of range, or `class_counts` is empty or has one that is not
            above 0; in `update`, if `labels` is not `[B]`.
        TypeError: If a hyperparameter is neither a number nor a schedule, or `class_counts` is not
            a sequence of numbers; in `update`, if `labels` are not integers.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.focal_sam([90, 10], rho=0.1), optax.sgd(0.1))
        >>> w, batch = jnp.zeros((2, 2)), {"x": jnp.eye(2), "y": jnp.arange(2)}
        >>> losses_fn = lambda w, batch: optax.softmax_cross_entropy_with_integer_labels(
        ...     batch["x"] @ w, batch["y"])
        >>> updates, state = tx.update(
        ...     w, tx.init(w), w, losses_fn=losses_fn, batch=batch, labels=batch["y"])
        >>> bool(optax.tree.get(state, "sharp_loss") > optax.tree.get(state, "loss"))
        True

    References:
        Li, Xu, Yang, Wang, Zhang, Cao, Huang, ICML 2025, https://arxiv.org/abs/2505.01660

    Notes:
        With one factor c for all classes (`gamma=0`) it is `combinations.mix(sam(rho), c)`. Any
        per-example loss works: cross-entropy, logit adjustment, LDAM. A label outside the classes
        has c = 0. Cost: 2 forward and 3 backward passes (3 forward inside `accumulate`), and two
        transient copies of the parameters. Fidelity: matches scongl/Focal-SAM. `static_args`:
        `class_counts`.
    """
    counts = as_list("class_counts", class_counts, "numbers, one for each class")
    for count in counts:
        check_static_number("class_counts", count, 0, excluded=0)
    counts = np.asarray(counts)
    if counts.size == 0:
        raise ValueError(
            "focal_sam: `class_counts` must be one number above 0 for each class, got "
            f"{class_counts!r}"
        )
    check_hyperparam("gamma", gamma, 0)
    check_hyperparam("sharpness", sharpness, 0)
    ball = ball_of("focal_sam", rho, perturbation)
    shares = counts / counts.sum()

    def factors_of(labels, step):
        of_classes = at_step(sharpness, step) * (1 - jnp.asarray(shares)) ** at_step(gamma, step)
        c = of_class(labels, of_classes)
        return 1 - c, c

    return split_sam("focal_sam", factors_of, ball, perturb_dtype)
