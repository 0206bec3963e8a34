"""LookSAM: SAM every few steps; in between, reuse a component of the last sharp gradient.

Liu, Mai, Chen, Hsieh, You. "Towards Efficient and Scalable Sharpness-Aware Minimization",
CVPR 2022. https://arxiv.org/abs/2203.02714
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.aliases import DType, Perturbation, Radius, ScalarOrSchedule, Transformation
from samx.core.hyperparams import Default, at_step, check_hyperparam
from samx.core.readings import UNKNOWN
from samx.core.sharp import ascend, sharp_gradient
from samx.core.transformation import closure_transformation
from samx.perturbations.layer_steps import LayerScaling, layer_steps, trust_ratio
from samx.policies import every
from samx.policies.policy import Policy, check_policy
from samx.variants._ball import ball_of
from samx.variants._reuse import init_reuse, look_or_skip, reuse_part, take_part


def looksam(
    rho: Radius = Default(0.05),
    period: int = 5,
    alpha: ScalarOrSchedule = 0.1,
    *,
    first: int = 0,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """LookSAM: SAM every `period` steps; in between, reuse a component of the sharp gradient.

        every period steps:
            ε   = ρ g / ‖g‖
            g_s = ∇L(w + ε)
            g_v = g_s − (⟨g, g_s⟩ / ‖g‖²) g            (component orthogonal to g, kept)
            return g_s
        on the other steps:
            return g + α (‖g‖ / ‖g_v‖) g_v

    Args:
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters; default 0.05.
        period: Steps k ≥ 1 from one sharp gradient to the next; default 5.
        alpha: Length α ≥ 0 of the reused component, relative to the gradient; default 0.1. Others
            report 0.7 as the paper's value for vision transformers. For convolutional nets on
            CIFAR-100, the authors of Momentum-SAM found 0.1 best and values above 0.3 of no use. In
            our comparison of small networks 0.7 is below 0.1 on most tasks, and on some of them
            below its own base optimizer.
        first: The first sharp step, counted from 0; default 0. Earlier steps are plain. In some
            ports it is k − 1.
        perturbation: Replaces the ball and `rho`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`. The state holds
        `part_ratio`, which is ‖g_v‖ / ‖g‖ of the last sharp step, and `sharp_fraction`.

    Raises:
        ValueError: If a number is out of range, or `rho` is given together with `perturbation`.
        TypeError: If a hyperparameter is neither a number nor a schedule, or `period` or `first` is
            not a Python int.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.looksam(rho=0.1, period=2), optax.sgd(0.5))
        >>> w, loss = jnp.array([1.0, 1.0]), lambda w: 0.5 * w[0] ** 2 + 2 * w[1] ** 2
        >>> update = jax.jit(lambda *args: tx.update(*args, value_fn=loss))
        >>> state = tx.init(w)
        >>> for _ in range(4):
        ...     updates, state = update(jax.grad(loss)(w), state, w)
        ...     print(bool(optax.tree.get(state, "is_sharp")), end=" ")
        True False True False
        >>> float(optax.tree.get(state, "gradients_spent"))
        6.0

    References:
        Liu, Mai, Chen, Hsieh, You, CVPR 2022, https://arxiv.org/abs/2203.02714

    Notes:
        `period=1` is SAM. `alpha=0` is periodic SAM, `perturb_if(every(period), sam(rho))`. All
        norms and the inner product are over all parameters. Some ports take them tensor by tensor,
        which is another algorithm. If g_s is parallel to g up to rounding, nothing is reused.
        Otherwise reuse multiplies the rounding error in g_v by α ‖g‖ / ‖g_v‖ (about ten), which
        matters in half precision.
        Cost: 1 + 1/period gradients per step, one copy of the parameters in the state, and two
        transient copies.
        Fidelity: no code of the authors exists, and the paper's own text was not at hand. The rule
        is the one on which secondary sources and four implementations agree. It matches the
        LookSAM in the code of the authors of Momentum-SAM, MarlonBecker/MSAM. `static_args`:
        `period`, `first`.
    """
    ball = ball_of("looksam", rho, perturbation)
    return reuse_orthogonal("looksam", every(period, first), ball, alpha, perturb_dtype)


def look_layer_sam(
    rho: Radius = 0.05,
    period: int = 5,
    alpha: ScalarOrSchedule = 0.1,
    *,
    first: int = 0,
    scaling: LayerScaling = trust_ratio,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Look-LayerSAM: LookSAM with a perturbation that is scaled layer by layer.

        ε_l = ρ · scaling(‖w_l‖, ‖g_l‖, ‖g‖) · g_l     for each tensor l

    Everything else is as in `looksam`, over all parameters.

    Args:
        rho: Radius ρ ≥ 0, in units that depend on `scaling`; default 0.05.
        period: See `looksam`; default 5.
        alpha: See `looksam`; default 0.1.
        first: See `looksam`; default 0.
        scaling: `(‖w_l‖, ‖g_l‖, ‖g‖) -> factor`, see `perturbations.layer_steps`; default
            `perturbations.trust_ratio`, ‖w_l‖ / (‖g_l‖ ‖g‖).
        perturb_dtype: See `sharpness_aware`.

    Returns:
        As `looksam`.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If a hyperparameter is neither a number nor a schedule, `period` or `first` is
            not a Python int, or `scaling` is not a function.

    Example:
        Every tensor moves by ρ times its own norm, as with the trust ratio of LARS and LAMB:

        >>> import optax, samx
        >>> relative = lambda w, g, total: w / g
        >>> tx = optax.chain(samx.look_layer_sam(0.05, scaling=relative), optax.lamb(1e-3))

    References:
        Liu, Mai, Chen, Hsieh, You, CVPR 2022, https://arxiv.org/abs/2203.02714

    Notes:
        Cost: that of `looksam`. Fidelity: a reconstruction. There is no code of the authors, their
        scaling rule could not be read, and the public ports disagree on it. The default is the
        rule as we recall it: a trust ratio inside the SAM step. `static_args`: `period`, `first`,
        `scaling`.
    """
    steps = layer_steps(rho, scaling)
    return reuse_orthogonal("look_layer_sam", every(period, first), steps, alpha, perturb_dtype)


def reuse_orthogonal(
    name: str,
    policy: Policy,
    perturbation: optax.GradientTransformationExtraArgs,
    alpha: ScalarOrSchedule,
    perturb_dtype: Any,
) -> Transformation:
    """LookSAM with any policy: reuse the component of the sharp gradient orthogonal to `g`."""
    check_policy(name, policy)
    check_hyperparam("alpha", alpha, 0)
    sharp = partial(sharp_gradient, perturb_dtype=perturb_dtype)

    def update_fn(g, state, params, *, value_fn, value=UNKNOWN, **extra):
        climb = partial(ascend, value_fn, perturbation, g, state.perturbation, params, **extra)
        *_, ball_state = climb()  # only its state is used here; the compiler drops the rest
        g_length = tree.length(g)

        def look():
            eps, g_a, ball = climb()
            g_s, readings = sharp(
                value_fn, params, eps, state.readings, loss=value, g=g_a, ball=ball
            )
            g_s = tree.stored(g_s)
            g_v, length = _orthogonal(g_s, g, g_length)
            return g_s, (g_s, take_part(state, g_v, length, g_length, readings))

        def skip():
            ratio = tree.ratio(g_length.norm, state.part_norm) / g_length.scale
            updates = tree.add_scaled(g, at_step(alpha, state.step) * ratio, state.part)
            return tree.cast_like(updates, params), reuse_part(state, value, g)

        return look_or_skip(policy, g, state, ball_state, look, skip)

    return closure_transformation(partial(init_reuse, policy, perturbation), update_fn, name=name)


def _orthogonal(g_s: Any, g: Any, length: tree.Length) -> tuple[Any, tree.Length]:
    """Return the component of `g_s` orthogonal to `g`; zero where it is only rounding error.

    Its norm comes from another sum of the two gradients: the compiler would store a common one.
    """
    weight = -tree.ratio(tree.along(g_s, g, length) * length.scale, length.norm)
    scaled = tree.combine(length.scale, g_s, length.scale * weight, g)
    norm = tree.plain_norm(scaled)
    rounding = max(tree.coarsest_eps(g_s), 4 * jnp.finfo(norm.dtype).eps)  # of leaves, of sums
    is_rounding = norm <= rounding * jnp.abs(weight) * length.norm
    g_v = tree.add_scaled(g_s, weight, g)
    g_v = jax.tree.map(lambda x: jnp.where(is_rounding, 0, x), g_v)
    return g_v, length._replace(norm=jnp.where(is_rounding, 0, norm))
