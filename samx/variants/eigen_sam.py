"""Eigen-SAM: climb towards the top eigenvector of the Hessian too.

Luo, Truong, Pham, Harandi, Phung, Le. "Explicit Eigenvalue Regularization Improves Sharpness-Aware
Minimization", NeurIPS 2024. https://arxiv.org/abs/2501.12666
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from samx.core import tree
from samx.core.aliases import DType, Radius, ScalarOrSchedule, Transformation
from samx.core.hyperparams import at_step, check_choice, check_hyperparam
from samx.core.readings import UNKNOWN
from samx.core.sharp import sharp_gradient
from samx.core.transformation import closure_transformation
from samx.variants._eigenvector import Refresh, unit


def eigen_sam(
    rho: Radius = 0.05,
    alpha: ScalarOrSchedule = 0.2,
    *,
    every: int = 100,
    iterations: int = 5,
    before_refresh: Literal["sam", "usam"] = "sam",
    steps_per_epoch: int | None = None,
    key: int | jax.Array = 0,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Eigen-SAM: bend the ascent towards the eigenvector of the Hessian's largest eigenvalue.

        on the steps every, 2 every, ...:
            repeat iterations times:  v = H v / ‖H v‖          (H: the Hessian at w, of this batch)
        g   = ∇L(w)                                            (the incoming updates)
        u   = g / ‖g‖
        ε   = ρ (u + α sign⟨g, v⟩ (v − ⟨u, v⟩ u))
        return g_s = ∇L(w + ε)

    Args:
        rho: Radius ρ ≥ 0; default 0.05. The step is longer: ‖ε‖² = ρ² (1 + α² ‖v − ⟨u, v⟩ u‖²).
        alpha: Weight α ≥ 0 of the eigenvector; default 0.2. 0 is SAM.
        every: Steps from one refresh of v to the next; default 100.
        iterations: Power iterations of a refresh, which start at the last v; default 5.
        before_refresh: The ascent on the steps before the first refresh: "sam", the default, or
            "usam", as the published code does it, surely without intent: ε = ρ g.
        steps_per_epoch: Restarts the count of `every` with each epoch, whose first step never
            refreshes, as the authors' loop does. Default `None`: one count for the whole training.
        key: Seed or random key of the first vector; default 0.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`.

    Raises:
        ValueError: If a number is out of range, or `before_refresh` is unknown.
        TypeError: If a hyperparameter is neither a number nor a schedule, or a count is not a
            Python int; in `init`, if `key` is neither a seed nor a random key.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.eigen_sam(rho=0.1, every=1, iterations=20), optax.sgd(0.1))
        >>> w, loss = jnp.array([1.0, 1.0]), lambda w: 2 * w[0] ** 2 + 0.5 * w[1] ** 2
        >>> state = tx.init(w)
        >>> for _ in range(2):  # the first step is before the first refresh
        ...     updates, state = tx.update(jax.grad(loss)(w), state, w, value_fn=loss)
        >>> [round(abs(float(v)), 3) for v in optax.tree.get(state, "eigenvector")]
        [1.0, 0.0]

    References:
        Luo et al., NeurIPS 2024, https://arxiv.org/abs/2501.12666

    Notes:
        `alpha=0`, and a v along g, give SAM. v and −v give the same step. Power iteration finds the
        eigenvalue that is largest in magnitude; it may be negative. H is the Hessian of `value_fn`;
        the authors measure theirs in evaluation mode, without dropout and with stored statistics of
        BatchNorm. A refresh that is due on a step without a sharp gradient (`perturb_if`) is left
        out. Inside `data_parallel`, H is that of the whole batch; with `ascent="local"` each device
        bends its own gradient towards v. Cost: 2 gradients per step, one after the other; on steps
        that refresh, `iterations` Hessian products more, of about 2 gradients each. State: one copy
        of the parameters.
        Fidelity: matches RitianLuo/EigenSAM, its first vector given. `static_args`: `every`,
        `iterations`, `before_refresh`, `steps_per_epoch`.
    """
    check_hyperparam("rho", rho, 0)
    check_hyperparam("alpha", alpha, 0)
    check_choice("before_refresh", before_refresh, ("sam", "usam"))
    refresh = Refresh(every, iterations, steps_per_epoch, key)
    sharp = partial(sharp_gradient, perturb_dtype=perturb_dtype)

    def update_fn(g, state, params, *, value_fn, value=UNKNOWN):
        new, v = refresh.next_state(state, value_fn, params, g)
        g_a = value_fn.own_gradient(g)
        eps = _ascent(g_a, v, at_step(rho, state.step), at_step(alpha, state.step), before_refresh)
        g_s, readings = sharp(value_fn, params, eps, state.readings, loss=value, g=g_a, ball=new)
        return g_s, new._replace(readings=readings)

    return closure_transformation(refresh.first_state, update_fn, name="eigen_sam")


def _ascent(g: Any, v: Any, rho: Any, alpha: Any, before_refresh: str) -> Any:
    u = unit(g)
    cosine = tree.dot(u, v)
    bend = alpha * jnp.sign(cosine)
    eps = jax.tree.map(
        lambda u, v: rho * ((1 - bend * cosine) * u + bend * v) if tree.is_inexact(u) else u, u, v
    )
    if before_refresh == "sam":
        return eps
    is_known = tree.norm(v) > 0
    return jax.tree.map(lambda e, g: jnp.where(is_known, e, rho * tree.widen(g)), eps, g)
