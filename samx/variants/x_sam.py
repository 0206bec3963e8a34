"""X-SAM: take a part of the top eigenvector of the Hessian out of the sharp gradient.

Duan, Chen, Guan. "X-SAM: Boosting Sharpness-Aware Minimization with Dominant-Eigenvector Gradient
Correction", 2026. https://arxiv.org/abs/2601.10251
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from samx.core import tree
from samx.core.aliases import DType, Perturbation, Radius, ScalarOrSchedule, Transformation
from samx.core.hyperparams import Default, at_step, check_hyperparam
from samx.core.order import after
from samx.core.readings import UNKNOWN
from samx.core.sharp import ascend, sharp_gradient
from samx.core.transformation import closure_transformation
from samx.variants._ball import ball_of
from samx.variants._eigenvector import Refresh, unit


def x_sam(
    rho: Radius = Default(0.05),
    alpha: ScalarOrSchedule = 0.2,
    *,
    every: int = 5,
    iterations: int = 5,
    steps_per_epoch: int | None = None,
    key: int | jax.Array = 0,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """X-SAM: correct the sharp gradient along the eigenvector of the Hessian's largest eigenvalue.

        on the steps every, 2 every, ...:
            repeat iterations times:  v = H v / ‖H v‖          (H: the Hessian at w, of this batch)
        g   = ∇L(w)                                            (the incoming updates)
        g_s = ∇L(w + ρ g / ‖g‖)
        u   = g_s / ‖g_s‖
        return u − α |⟨u, v⟩| v                                (g_s before the first refresh)

    XSAM, without a hyphen, is another method: `xsam`.

    Args:
        rho: Radius ρ ≥ 0; default 0.05.
        alpha: Strength α ≥ 0 of the correction; default 0.2, of the authors' script. Their paper
            allows up to 2. 0 is SAM in length 1.
        every: Steps from one refresh of v to the next; default 5 (the authors' README: 3).
        iterations: Power iterations of a refresh, which start at the last v; default 5.
        steps_per_epoch: Restarts the count of `every` with each epoch, whose first step never
            refreshes, as the authors' loop does. Default `None`: one count for the whole training.
        key: Seed or random key of the first vector; default 0.
        perturbation: Replaces the ball and `rho`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`.

    Raises:
        ValueError: If a number is out of range, or `rho` is given together with `perturbation`.
        TypeError: If a hyperparameter is neither a number nor a schedule, or a count is not a
            Python int; in `init`, if `key` is neither a seed nor a random key.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> tx = samx.x_sam(rho=0.1, alpha=0.0, every=1, iterations=20)
        >>> w, loss = jnp.array([3.0, 4.0]), lambda w: 0.5 * w @ w
        >>> state = tx.init(w)
        >>> for _ in range(2):  # the first step is before the first refresh
        ...     g, state = tx.update(w, state, w, value_fn=loss)
        ...     print([round(float(x), 2) for x in g])
        [3.06, 4.08]
        [0.6, 0.8]

    References:
        Duan, Chen, Guan, 2026, https://arxiv.org/abs/2601.10251

    Notes:
        Its steps have about length 1 from the first refresh on: the learning rate needs a value of
        its own. The correction always points to −v, so v and −v give different steps; which of both
        power iteration finds depends on its start. The paper speaks of the angle between gradient
        and eigenvector, and names no sign for v. `alpha=0` is SAM's direction. H is that of
        `value_fn`; the authors measure theirs in evaluation mode. A refresh that is due on a step
        without a sharp gradient (`perturb_if`) is left out. Inside `data_parallel`, H is that of
        the whole batch. Cost: 2 gradients per step, one after the other; on steps that refresh,
        `iterations` Hessian products more, of about 2 gradients each. State: one copy of the
        parameters.
        Fidelity: **reconstructed**. The rule is that of huang5467/X-SAM, the authors' repository,
        as we read it; the code was not run. A third party's equation corrects the same gradient,
        but does not divide the product ⟨g_s, v⟩ by ‖g_s‖. `static_args`: `every`, `iterations`,
        `steps_per_epoch`.
    """
    check_hyperparam("alpha", alpha, 0)
    refresh = Refresh(every, iterations, steps_per_epoch, key)
    ball = ball_of("x_sam", rho, perturbation)
    sharp = partial(sharp_gradient, perturb_dtype=perturb_dtype)

    def init_fn(params):
        return refresh.first_state(params, ball.init(params))

    def update_fn(g, state, params, *, value_fn, value=UNKNOWN, **extra):
        new, v = refresh.next_state(state, value_fn, params, g)
        length = tree.norm(v)
        eps, g_a, ball_state = ascend(value_fn, ball, g, state.perturbation, params, **extra)
        eps, new = after(eps, length), new._replace(perturbation=ball_state)
        g_s, readings = sharp(value_fn, params, eps, state.readings, loss=value, g=g_a, ball=new)
        corrected = _corrected(unit(g_s), v, at_step(alpha, state.step))
        updates = tree.where(length > 0, tree.cast_like(corrected, params), g_s)
        return updates, new._replace(readings=readings)

    return closure_transformation(init_fn, update_fn, name="x_sam")


def _corrected(u: Any, v: Any, alpha: Any) -> Any:
    return tree.add_scaled(u, -alpha * jnp.abs(tree.dot(u, v)), v)
