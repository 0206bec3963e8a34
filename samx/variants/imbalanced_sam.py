"""ImbSAM: perturb for the losses of the rare classes only.

Zhou, Qu, Xu, Shen. "ImbSAM: A Closer Look at Sharpness-Aware Minimization in Class-Imbalanced
Recognition", ICCV 2023. https://arxiv.org/abs/2308.07815
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from samx.core.aliases import DType, Perturbation, Radius, ScalarOrSchedule, Transformation
from samx.core.hyperparams import Default, as_count, as_list, at_step, check_hyperparam
from samx.variants._ball import ball_of
from samx.variants._split import split_sam


def imbalanced_sam(
    tail_classes: Sequence[int] | np.ndarray,
    rho: Radius = Default(0.05),
    tail_weight: ScalarOrSchedule = 1.0,
    *,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Imbalanced SAM (ImbSAM): SAM on the rare classes only.

        g   = ∇ mean(ℓ over the other classes)(w)
        q   = ∇ mean(τ ℓ over the tail)(w)             (means over all examples)
        ε   = ρ q / ‖q‖
        return g + ∇ mean(τ ℓ over the tail)(w + ε)

    Args:
        tail_classes: The classes of the tail, for example those with fewer than 20 training
            examples.
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters; default 0.05, the authors'.
        tail_weight: Weight τ ≥ 0 of the tail's losses; default 1. The authors' code has 2; their
            text does not mention it.
        perturbation: Replaces the ball and `rho`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `losses_fn`, `batch` and
        `labels`, `int[B]`; it respects `weights`. It does not use the incoming gradient, so XLA
        drops its computation.

    Raises:
        ValueError: If a number is out of range, or a class below 0; in `update`, if `labels` is not
            `[B]`.
        TypeError: If a hyperparameter is neither a number nor a schedule, or `tail_classes` is not
            a sequence of integers; in `update`, if `labels` are not integers.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.imbalanced_sam([1], rho=0.1), optax.sgd(0.1))
        >>> w, batch = jnp.zeros((2, 2)), {"x": jnp.eye(2), "y": jnp.arange(2)}
        >>> losses_fn = lambda w, batch: optax.softmax_cross_entropy_with_integer_labels(
        ...     batch["x"] @ w, batch["y"])
        >>> updates, state = tx.update(
        ...     w, tx.init(w), w, losses_fn=losses_fn, batch=batch, labels=batch["y"])
        >>> bool(optax.tree.get(state, "sharp_loss") > optax.tree.get(state, "loss"))
        True

    References:
        Zhou, Qu, Xu, Shen, ICCV 2023, https://arxiv.org/abs/2308.07815

    Notes:
        With every class in the tail and a weight of 1 it is SAM; a batch without tail takes the
        base optimizer's step. It is `focal_sam` with the factors 0 and 1. Cost: 2 forward and 3
        backward passes (3 forward inside `accumulate`), and two transient copies of the parameters.
        Fidelity: matches cool-xuan/Imbalanced_SAM with `tail_weight=2`. `static_args`:
        `tail_classes`.
    """
    tail = as_list("tail_classes", tail_classes, "classes, integers from 0")
    tail = np.asarray([as_count("tail_classes", label, 0) for label in tail], int)
    check_hyperparam("tail_weight", tail_weight, 0)
    ball = ball_of("imbalanced_sam", rho, perturbation)

    def factors_of(labels, step):
        is_tail = jnp.any(labels[:, None] == jnp.asarray(tail)[None], axis=1)
        return jnp.where(is_tail, 0.0, 1.0), jnp.where(is_tail, at_step(tail_weight, step), 0.0)

    return split_sam("imbalanced_sam", factors_of, ball, perturb_dtype)
