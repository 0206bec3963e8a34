"""BiSAM: climb another loss than the one that is descended.

Xie, Latorre, Antonakopoulos, Pethick, Cevher. "Improving SAM Requires Rethinking its Optimization
Formulation", ICML 2024. https://arxiv.org/abs/2407.12993
"""

from samx.core.aliases import DType, Perturbation, Radius, Transformation
from samx.core.closures import evaluate
from samx.core.hyperparams import Default
from samx.core.readings import UNKNOWN, no_readings
from samx.core.sharp import ascend, sharp_gradient
from samx.core.transformation import closure_transformation
from samx.variants._ball import ball_of
from samx.variants.sam import SharpnessAwareState


def bisam(
    rho: Radius = Default(0.05),
    *,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Bilevel SAM.

        q   = ∇Q(w)                    (Q is `ascent_fn`)
        ε   = ρ q / ‖q‖
        return g_s = ∇L(w + ε)

    Training minimizes an upper bound of the misclassification error, so SAM's maximization should
    climb a lower bound of it: `samx.losses.tanh_lower_bound` or `samx.losses.log_lower_bound`.

    Args:
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters, a number or a schedule over the
            optimizer's steps; default 0.05.
        perturbation: Another geometry in place of the ball; then leave `rho` out.
        perturb_dtype: Lowest precision of the perturbed point, see `sharpness_aware`.

    Returns:
        An `optax.GradientTransformationExtraArgs`, to stand first in a chain. `update` needs
        `ascent_fn`, `params -> scalar` on the same batch, and `value_fn` (or `losses_fn` and
        `batch`); `value` is read if given. It ignores the incoming gradient, so that the compiler
        removes its computation.

    Raises:
        ValueError: If `rho` is a negative number, or given together with `perturbation`; in
            `update`, see `closure_transformation`.
        TypeError: If `rho` is neither number nor schedule.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> x, y = jnp.eye(3), jnp.arange(3)
        >>> cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        >>> tx = optax.chain(samx.bisam(rho=0.05), optax.sgd(0.1))
        >>> w = jnp.zeros((3, 3))
        >>> updates, state = tx.update(
        ...     w, tx.init(w), w,
        ...     value_fn=lambda w: cross_entropy(x @ w, y).mean(),
        ...     ascent_fn=lambda w: samx.losses.log_lower_bound(x @ w, y).mean())
        >>> bool(optax.tree.get(state, "cosine") > 0)
        True

    References:
        Xie, Latorre, Antonakopoulos, Pethick, Cevher, "Improving SAM Requires Rethinking its
        Optimization Formulation", ICML 2024, https://arxiv.org/abs/2407.12993

    Notes:
        With the descended loss as `ascent_fn` it is SAM. Cost: 2 gradients per step, one after the
        other, and one transient copy of the parameters. Readings: `grad_norm` is ‖q‖, and `loss`
        the caller's. Inside `accumulate`, `ascent_fn` is taken over the whole batch.
        Fidelity: matches LIONS-EPFL/BiSAM, which trains with label smoothing of 0.1 in L: that is a
        matter of `value_fn`. `static_args`: `perturbation`, `perturb_dtype`; `rho` too where
        `perturbation` is given.
    """
    ball = ball_of("bisam", rho, perturbation)

    def init_fn(params):
        return SharpnessAwareState(ball.init(params), no_readings(params))

    def update_fn(_, state, params, *, value_fn, ascent_fn, value=UNKNOWN, **extra):
        seen, _ = evaluate(ascent_fn, params)
        ascent_fn, q = seen["value_fn"], seen["grad"]
        eps, q_a, ball_state = ascend(ascent_fn, ball, q, state.perturbation, params, **extra)
        g_s, readings = sharp_gradient(
            value_fn, params, eps, state.readings, loss=value, g=q_a, perturb_dtype=perturb_dtype
        )
        return g_s, SharpnessAwareState(ball_state, readings)

    return closure_transformation(init_fn, update_fn, name="bisam")
