"""BiSAM: ascend one loss, and descend another.

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
    """Bilevel SAM: the perturbation ascends a separate loss.

        q   = ∇Q(w)                    (Q is `ascent_fn`)
        ε   = ρ q / ‖q‖
        return g_s = ∇L(w + ε)

    Training minimizes an upper bound of the misclassification error, so the ascent should maximize
    a lower bound of it: `samx.losses.tanh_lower_bound` or `samx.losses.log_lower_bound`.

    Args:
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters; default 0.05.
        perturbation: Replaces the ball and `rho`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn` and `ascent_fn`,
        `params -> scalar` on the same batch. It does not use the incoming gradient, so XLA drops
        its computation.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If a hyperparameter is neither a number nor a schedule.

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
        >>> bool(optax.tree.get(state, "sharp_loss") > 0)
        True

    References:
        Xie, Latorre, Antonakopoulos, Pethick, Cevher, ICML 2024, https://arxiv.org/abs/2407.12993

    Notes:
        With the descended loss as `ascent_fn` it is SAM. Cost: 2 gradients per step, in sequence,
        and one transient copy of the parameters. Readings: `grad_norm` is ‖q‖, and `loss` the
        caller's. Inside `accumulate`, `ascent_fn` is evaluated over the whole batch.
        Fidelity: matches LIONS-EPFL/BiSAM, which trains with label smoothing of 0.1 in L: put that
        into `value_fn`.
    """
    ball = ball_of("bisam", rho, perturbation)

    def init_fn(params):
        return SharpnessAwareState(ball.init(params), no_readings(params))

    def update_fn(_, state, params, *, value_fn, ascent_fn, value=UNKNOWN, **extra):
        seen, _ = evaluate(ascent_fn, params)
        ascent_fn, q = seen["value_fn"], seen["grad"]
        eps, q_a, ball_state = ascend(ascent_fn, ball, q, state.perturbation, params, **extra)
        g_s, readings = sharp_gradient(
            *(value_fn, params, eps, state.readings),
            loss=value,
            g=q_a,
            ball=ball_state,
            perturb_dtype=perturb_dtype,
        )
        return g_s, SharpnessAwareState(ball_state, readings)

    return closure_transformation(init_fn, update_fn, name="bisam")
