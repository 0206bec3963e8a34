"""LSAM: workers that run SAM around a common center, here all at the same pace.

Teng, Zhang. "LSAM: Asynchronous Distributed Training with Landscape-Smoothed Sharpness-Aware
Minimization", 2025. https://arxiv.org/abs/2509.03110
"""

from typing import Literal

import optax

from samx.core.aliases import DType, Perturbation, Radius, ScalarOrSchedule, Transformation
from samx.core.hyperparams import Default
from samx.core.transformation import as_transformation
from samx.elastic._averaging import averaging
from samx.variants._ball import ball_of
from samx.variants.sam import sharpness_aware


def lsam(
    base: optax.GradientTransformation,
    rho: Radius = Default(0.05),
    *,
    beta: ScalarOrSchedule = 0.9,
    period: int = 4,
    worker_axis: str | None = None,
    exchange: Literal["before", "after"] = "before",
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Landscape-smoothed SAM, the synchronous form: each worker runs SAM, tied to a common center.

        α = beta / P
        on every `period`-th step, all P workers at once:
            d_i = α (w_i − z),   z += Σ_i d_i,   w_i −= d_i  (after the step)
        ε_i = ρ ∇L_i(w_i) / ‖∇L_i(w_i)‖
        w_i += base(∇L_i(w_i + ε_i))

    `samx.elastic.train` is the asynchronous form, without a barrier.

    Args:
        base: The optimizer that takes a worker's step, including weight decay and clipping.
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters; default 0.05.
        beta: Share in [0, 1] of the distance to the workers' mean that the center moves in an
            exchange; default 0.9.
        period: Steps τ ≥ 1 between exchanges; default 4.
        worker_axis: The mapped axis of `jax.shard_map`, `jax.pmap` or `jax.vmap` that holds the
            workers; default none, a single worker with a center.
        exchange: Two forms of one method, EASGD: "before", the default, is its paper's synchronous
            rule; "after" is what Leader SGD's code does. See `samx.elastic.averaging`.
        perturbation: Replaces the ball and `rho`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that wraps `base`. Call it inside the mapped function with the worker's own
        parameters, state and examples. `update` needs `value_fn`. The model to evaluate is
        `optax.tree.get(state, "center")`.

    Raises:
        ValueError: If a number is out of range, `rho` is given together with `perturbation`, or
            `exchange` is unknown.
        TypeError: If a hyperparameter is neither a number nor a schedule, `period` is not a Python
            int, `worker_axis` is not a name, or `base` is not a transformation.

    Example:
        Two workers on two devices, or on one device as here:

        >>> import functools, jax, jax.numpy as jnp, optax, samx
        >>> tx = samx.lsam(optax.sgd(0.1), rho=0.05, worker_axis="worker")
        >>> @jax.jit
        ... @functools.partial(jax.vmap, axis_name="worker")
        ... def step(w, state, x):
        ...     value_fn = lambda w: ((w - x) ** 2).sum()
        ...     updates, state = tx.update(jax.grad(value_fn)(w), state, w, value_fn=value_fn)
        ...     return optax.apply_updates(w, updates), state
        >>> w, x = jnp.zeros((2, 3)), jnp.array([[1.0, 2.0, 3.0], [1.0, 2.0, 5.0]])
        >>> state = jax.vmap(tx.init)(w)
        >>> for _ in range(100):
        ...     w, state = step(w, state, x)
        >>> [round(float(z), 1) for z in optax.tree.get(state, "center")[0]]
        [1.0, 2.0, 4.0]

    References:
        Teng, Zhang, 2025, https://arxiv.org/abs/2509.03110

    Notes:
        `rho=0` is EASGD. `beta=0` is SAM on each worker. Cost: 2 gradients per step, one more copy
        of the parameters, and one all-reduce of them on every `period`-th step only.
        One worker whose parameters are not finite makes the center so. To skip such steps, use
        `elastic.averaging(samx.skip_nonfinite(...))`.
        Smoothing: the Gaussian of the objective has the variance η τ / α for a learning rate η, if
        the noise is as strong as in Langevin dynamics. That of batches is far weaker: on the digits
        the workers' variance was about 10⁵ times smaller, and grew about as η² τ / α, as it does
        for noise of a fixed strength (`examples/claims/lsam.py`).
        Fidelity: **reconstructed**; there is no public code. The objective, a Gaussian-smoothed
        density of the SAM loss, is known second-hand. That its samples are moved by elastic
        averaging is our derivation, from the objective and the authors' earlier systems. `beta`,
        `period` and ρ are our derivation too. With `rho=0` it is the authors' EASGD, whose
        code it follows. `static_args`: `base`, `period`, `worker_axis`, `exchange`.
    """
    ball = ball_of("lsam", rho, perturbation)
    base = as_transformation("lsam", "base", base)
    sharp = sharpness_aware(ball, perturb_dtype=perturb_dtype, name="lsam")
    return averaging(
        optax.chain(sharp, base),
        worker_axis,
        beta=beta,
        period=period,
        exchange=exchange,
        name="lsam",
    )
