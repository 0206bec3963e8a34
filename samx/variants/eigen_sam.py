"""Eigen-SAM: climb towards the top eigenvector of the Hessian too.

Luo, Truong, Pham, Harandi, Phung, Le. "Explicit Eigenvalue Regularization Improves Sharpness-Aware
Minimization", NeurIPS 2024. https://arxiv.org/abs/2501.12666
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import draws, tree
from samx.core.aliases import DType, Radius, ScalarOrSchedule, Transformation
from samx.core.closures import Closure
from samx.core.convolutions import fast_convolutions
from samx.core.hyperparams import (
    RandomKey,
    as_count,
    at_step,
    check_choice,
    check_hyperparam,
    next_step,
)
from samx.core.readings import UNKNOWN, Readings, no_readings
from samx.core.sharp import sharp_gradient
from samx.core.transformation import closure_transformation
from samx.perturbations.balls import along
from samx.perturbations.metrics import identity
from samx.sharpness import hvp

HESSIAN_PRODUCT = 2.0  # gradients


class EigenSAMState(NamedTuple):
    """State of `eigen_sam`.

    Attributes:
        step: int32, optimizer steps so far.
        key: uint32, the data of the random key of the first vector (`jax.random.key_data`).
        eigenvector: The vector v of length 1, float32 or wider; zeros before the first refresh.
        extra_gradients: float32, the cost of the last step's refresh, in gradients over one batch.
        readings: Readings of the last step.
    """

    step: jax.Array
    key: jax.Array
    eigenvector: Any
    extra_gradients: jax.Array
    readings: Readings


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
    every, iterations = as_count("every", every), as_count("iterations", iterations)
    check_choice("before_refresh", before_refresh, ("sam", "usam"))
    if steps_per_epoch is not None:
        steps_per_epoch = as_count("steps_per_epoch", steps_per_epoch)
    keys = RandomKey(key)
    sharp = partial(sharp_gradient, perturb_dtype=perturb_dtype)

    def init_fn(params):
        return EigenSAMState(
            step=jnp.zeros((), jnp.int32),
            key=keys.data(),
            eigenvector=optax.tree.zeros_like(jax.tree.map(tree.widen, params)),
            extra_gradients=jnp.zeros((), jnp.float32),
            readings=no_readings(params),
        )

    def update_fn(g, state, params, *, value_fn, value=UNKNOWN):
        count = state.step % steps_per_epoch if steps_per_epoch else state.step
        is_due = (count > 0) & (count % every == 0) & (not value_fn.evaluation.is_skipped_step)
        v = fast_convolutions(jax.lax.cond)(
            is_due,
            lambda: _power_iteration(value_fn, params, state, keys, iterations),
            lambda: state.eigenvector,
        )
        g_a = g if value_fn.ascent_grad is None else value_fn.ascent_grad
        eps = _ascent(g_a, v, at_step(rho, state.step), at_step(alpha, state.step), before_refresh)
        spent = jnp.where(is_due, iterations * HESSIAN_PRODUCT, 0).astype(jnp.float32)
        new = state._replace(step=next_step(state.step), eigenvector=v, extra_gradients=spent)
        g_s, readings = sharp(value_fn, params, eps, state.readings, loss=value, g=g_a, ball=new)
        return g_s, new._replace(readings=readings)

    return closure_transformation(init_fn, update_fn, name="eigen_sam")


def _power_iteration(
    value_fn: Closure, params: Any, state: EigenSAMState, keys: RandomKey, iterations: int
) -> Any:
    """Return the vector after some products with the Hessian; the first one starts at a draw."""
    drawn = draws.normal_like(keys.of(state.key), 0, state.eigenvector)
    is_first = tree.norm(state.eigenvector) == 0
    start = tree.where(is_first, drawn, state.eigenvector)
    times = hvp(value_fn, params)

    def improve(_, v):
        product = times(v)
        return along(product, identity()(product), 1.0)

    v = fast_convolutions(jax.lax.fori_loop)(0, iterations, improve, start)
    return tree.if_finite(v, state.eigenvector)


def _ascent(g: Any, v: Any, rho: Any, alpha: Any, before_refresh: str) -> Any:
    u = along(g, identity()(g), 1.0)
    cosine = tree.dot(u, v)
    bend = alpha * jnp.sign(cosine)
    eps = jax.tree.map(
        lambda u, v: rho * ((1 - bend * cosine) * u + bend * v) if tree.is_inexact(u) else u, u, v
    )
    if before_refresh == "sam":
        return eps
    is_known = tree.norm(v) > 0
    return jax.tree.map(lambda e, g: jnp.where(is_known, e, rho * tree.widen(g)), eps, g)
