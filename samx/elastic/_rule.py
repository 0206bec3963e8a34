"""The arithmetic of elastic averaging on trees of arrays, without workers or time."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from samx.core import tree
from samx.core.hyperparams import as_count, check_choice, check_static_number


@dataclass(frozen=True)
class Rule:
    """How workers and center move towards each other: Python numbers, fixed for a training run.

        α = beta / num_workers
        "elastic"    d = α (w − z),   z += d,   w −= d          every `period` local steps
        "gaussian"   z += α (w − x),  x = w = z + deviation · N(0, I)

    z is the center, w are a worker's parameters, and x is where the worker started after its last
    exchange.

    Attributes:
        beta: Share in [0, 1]: when each worker has exchanged once, the center has moved by this
            share of its distance to the mean of the workers; default 0.9, from the authors'
            launcher of EASGD.
        period: Local steps τ ≥ 1 between two exchanges of a worker; default 4.
        smoothing: Two readings of one paper, LSAM; both are reconstructions. "elastic", the
            default, is our derivation, and is EASGD's rule: the workers are samples around the
            center; for their variance see `samx.lsam`. "gaussian" is a less likely reading: workers
            start at samples of a Gaussian around the center, and what their steps have added goes
            to the center.
        deviation: Standard deviation ≥ 0 of that Gaussian; "gaussian" only, default 0.
        leader: Share in [0, 1): on an exchange each worker moves by this share of its distance to
            the leader, the worker with the smallest losses since its last exchange; "elastic"
            only, default 0.

    Example:
        >>> from samx import elastic
        >>> elastic.Rule(beta=0.9, period=16).weight(num_workers=4)
        0.225
    """

    beta: float = 0.9
    period: int = 4
    smoothing: Literal["elastic", "gaussian"] = "elastic"
    deviation: float = 0.0
    leader: float = 0.0

    def __post_init__(self):
        check_static_number("beta", self.beta, 0, 1)
        check_static_number("leader", self.leader, 0, 1, excluded=1)
        check_static_number("deviation", self.deviation, 0)
        object.__setattr__(self, "period", as_count("period", self.period))
        check_choice("smoothing", self.smoothing, ("elastic", "gaussian"))
        if self.smoothing == "elastic" and self.deviation:
            raise ValueError(
                f"Rule: `deviation` belongs to smoothing='gaussian', got {self.deviation}"
            )
        if self.smoothing == "gaussian" and self.leader:
            raise ValueError(f"Rule: `leader` belongs to smoothing='elastic', got {self.leader}")

    def weight(self, num_workers: int) -> float:
        """Return the share α of the distance by which one exchange moves the center."""
        return self.beta / num_workers


def exchange(center: Any, params: Any, weight: float) -> tuple[Any, Any]:
    """Move center and worker towards each other, both by the same amount.

        d = weight · (params − center)
        return center + d, d                      (the worker's part: params − d, see `apply_move`)

    Args:
        center: The center z, a pytree.
        params: The worker's parameters w, shaped like it.
        weight: The share α of the distance, a Python number; see `Rule.weight`.

    Returns:
        The new center, and the move d in the dtypes of `params`; integers do not change.

    Raises:
        ValueError: If the structures or the shapes of the trees differ.
        TypeError: If a leaf is not an array.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx import elastic
        >>> center, move = elastic.exchange(jnp.zeros(2), jnp.array([1.0, 2.0]), weight=0.5)
        >>> center.tolist(), elastic.apply_move(jnp.array([1.0, 2.0]), move).tolist()
        ([0.5, 1.0], [0.5, 1.0])

    References:
        Zhang, Choromanska, LeCun, "Deep Learning with Elastic Averaging SGD", NeurIPS 2015,
        https://arxiv.org/abs/1412.6651

    Notes:
        The sum of the center and all workers' parameters does not change. Cost: one pass over the
        parameters.
    """
    check_static_number("weight", weight, 0)
    tree.check_arrays("center", center)
    tree.check_like("params", params, "center", center)
    return _exchange(center, params, float(weight))


@partial(jax.jit, static_argnames="weight")
def _exchange(center: Any, params: Any, weight: float) -> tuple[Any, Any]:
    move = jax.tree.map(
        lambda w, z: (
            (weight * (tree.widen(w) - tree.widen(z))).astype(w.dtype)
            if tree.is_inexact(w)
            else jnp.zeros_like(w)
        ),
        params,
        center,
    )
    return jax.tree.map(lambda z, d: (z + d).astype(z.dtype), center, move), move


def apply_move(params: Any, move: Any) -> Any:
    """Apply the worker's part of an exchange, `params − move`.

        w = w − d

    A worker may take local steps between `exchange` and `apply_move`. Then the worker computes
    while the center answers.

    Args:
        params: The worker's parameters w.
        move: The move d of `exchange`.

    Returns:
        The parameters in their dtypes.

    Raises:
        ValueError: If the structures or the shapes of the trees differ.
        TypeError: If a leaf is not an array.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx import elastic
        >>> elastic.apply_move(jnp.array([1.0, 2.0]), jnp.array([0.5, 1.0])).tolist()
        [0.5, 1.0]

    References:
        Zhang, Choromanska, LeCun, NeurIPS 2015, https://arxiv.org/abs/1412.6651, whose code takes
        one local step in between.

    Notes:
        Cost: one pass over the parameters.
    """
    tree.check_arrays("params", params)
    tree.check_like("move", move, "params", params)
    return _apply_move(params, move)


@jax.jit
def _apply_move(params: Any, move: Any) -> Any:
    return jax.tree.map(lambda w, d: (w - d).astype(w.dtype), params, move)


@partial(jax.jit, static_argnames="deviation")
def scattered(params: Any, key: jax.Array, deviation: float) -> Any:
    """Draw a sample of the Gaussian around `params`; integers do not change."""
    if not deviation:
        return params
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))

    def draw(w, key):
        noise = deviation * jax.random.normal(key, w.shape, tree.common_dtype(w.dtype, jnp.float32))
        return (w + noise).astype(w.dtype)

    return jax.tree.unflatten(
        treedef,
        [draw(w, k) if tree.is_inexact(w) else w for w, k in zip(leaves, keys, strict=True)],
    )
