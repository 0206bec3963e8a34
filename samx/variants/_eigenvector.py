"""The top eigenvector of the Hessian, kept over steps; for `eigen_sam` and `x_sam`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import draws, tree
from samx.core.closures import Closure
from samx.core.convolutions import fast_convolutions
from samx.core.hyperparams import RandomKey, as_count, next_step
from samx.core.order import never_after
from samx.core.readings import Readings, no_readings
from samx.perturbations.balls import along
from samx.perturbations.metrics import identity
from samx.sharpness import hvp

HESSIAN_PRODUCT = 2.0  # gradients


class EigenvectorState(NamedTuple):
    """State of `eigen_sam` and `x_sam`.

    Attributes:
        step: int32, optimizer steps so far.
        key: uint32, the data of the random key of the first vector (`jax.random.key_data`).
        eigenvector: The vector v of length 1, float32 or wider; zeros before the first refresh.
        extra_gradients: float32, the cost of the last step's refresh, in gradients over one batch.
        perturbation: State of the perturbation; `None` in `eigen_sam`.
        readings: Readings of the last step.
    """

    step: jax.Array
    key: jax.Array
    eigenvector: Any
    extra_gradients: jax.Array
    perturbation: optax.OptState
    readings: Readings


class Refresh:
    """When the vector is refreshed, and how: some power iterations on the Hessian of a batch."""

    def __init__(self, every: Any, iterations: Any, steps_per_epoch: Any, key: Any):
        self.every, self.iterations = as_count("every", every), as_count("iterations", iterations)
        self.steps_per_epoch = steps_per_epoch
        if steps_per_epoch is not None:
            self.steps_per_epoch = as_count("steps_per_epoch", steps_per_epoch)
        self.keys = RandomKey(key)

    def first_state(self, params: Any, perturbation: Any = None) -> EigenvectorState:
        """Return the state before the first step."""
        return EigenvectorState(
            step=jnp.zeros((), jnp.int32),
            key=self.keys.data(),
            eigenvector=jax.tree.map(_zeros, params),
            extra_gradients=jnp.zeros((), jnp.float32),
            perturbation=perturbation,
            readings=no_readings(params),
        )

    def next_state(
        self, state: EigenvectorState, value_fn: Closure, params: Any, g: Any
    ) -> tuple[EigenvectorState, Any]:
        """Return the state of the next step, and the vector of this one; g is known before."""
        count = state.step % self.steps_per_epoch if self.steps_per_epoch else state.step
        is_due = (count > 0) & (count % self.every == 0)
        is_due &= ~never_after(tree.norm(g)) & (not value_fn.evaluation.is_skipped_step)
        v = fast_convolutions(jax.lax.cond)(
            is_due,
            lambda: self._power_iteration(value_fn, params, state),
            lambda: state.eigenvector,
        )
        spent = jnp.where(is_due, self.iterations * HESSIAN_PRODUCT, 0).astype(jnp.float32)
        new = state._replace(step=next_step(state.step), eigenvector=v, extra_gradients=spent)
        return new, v

    def _power_iteration(self, value_fn: Closure, params: Any, state: EigenvectorState) -> Any:
        """Return the vector after some products with the Hessian; the first starts at a draw."""
        drawn = draws.normal_like(self.keys.of(state.key), 0, state.eigenvector)
        is_first = tree.norm(state.eigenvector) == 0
        start = tree.where(is_first, drawn, state.eigenvector)
        times = hvp(value_fn, params)

        def improve(_, v):
            return unit(times(v))

        v = fast_convolutions(jax.lax.fori_loop)(0, self.iterations, improve, start)
        return tree.if_finite(v, state.eigenvector)


def _zeros(w: Any) -> jax.Array:
    return jnp.zeros_like(tree.widen(w) if tree.is_inexact(w) else w)


def unit(g: Any) -> Any:
    """Return a tree in length 1; zeros stay zeros."""
    return along(g, identity()(g), 1.0)
