"""Flat-LoRA: low-rank adapters, trained under noise on the merged weights.

Li, He, Li, Wang, Shang, Huang. "Flat-LoRA: Low-Rank Adaptation over a Flat Loss Landscape",
ICML 2025. https://arxiv.org/abs/2409.14396
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.aliases import DType, ScalarOrSchedule, Transformation
from samx.core.hyperparams import as_count, at_step, check_hyperparam
from samx.core.readings import UNKNOWN, Readings, no_readings, with_loss
from samx.core.sharp import sharp_gradient
from samx.core.state import first_aux, kept_aux
from samx.core.transformation import closure_transformation
from samx.perturbations.noise import gaussian_noise
from samx.training.on_merged import on_merged


class FlatLoRAState(NamedTuple):
    """State of `flat_lora`.

    Attributes:
        noise: State of the noise; it counts the steps.
        aux: Aux of the last step; `None` without `aux_like`.
        readings: Readings of the last step.
    """

    noise: optax.OptState
    aux: Any
    readings: Readings


def flat_lora(
    rho: ScalarOrSchedule = 0.05,
    *,
    num_steps: int,
    key: int | jax.Array = 0,
    weights_like: Any = None,
    aux_like: Any = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Flat-LoRA: the gradient of the adapters, at merged weights that noise has moved.

        W   = merge_fn(w)                              the merged weights, [..., in, out]
        σ_j = ½ (1 − cos(π t / num_steps)) ρ ‖W_j‖ / √in        for each output j: a column of W
        ε_j ~ σ_j N(0, I)
        return J(w)ᵀ ∇L(W + ε)                         (J: the derivative of merge_fn)

    The noise grows from zero in step t = 0 to its full size in step `num_steps`, and stays there.

    Args:
        rho: Expected length ρ ≥ 0 of the noise of an output, relative to the length of its weights;
            default 0.05, of the authors' command.
        num_steps: Steps in which the noise grows: those of the whole training.
        key: Seed or random key of the draws, the same on all devices; default 0.
        weights_like: As in `on_merged`; default `None`: without `merge_fn`.
        aux_like: Arrays or `jax.ShapeDtypeStruct`s shaped like the aux of `value_fn`. The state
            then holds the last aux (BatchNorm statistics, for example); read it with
            `optax.tree.get(state, "aux")`. Default: aux is dropped.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`, and takes
        `merge_fn`, as `on_merged`. It does not use the incoming gradient, so XLA drops its
        computation.

    Raises:
        ValueError: If a number is out of range; in `update`, if aux differs from `aux_like` in
            shape.
        TypeError: If `rho` is neither a number nor a schedule, or `num_steps` is not a Python int.

    Example:
        >>> import jax, jax.numpy as jnp, samx
        >>> frozen = jnp.eye(2)
        >>> adapter = {"lora_a": jnp.ones((2, 1)), "lora_b": jnp.zeros((1, 2))}
        >>> merge_fn = lambda adapter: frozen + adapter["lora_a"] @ adapter["lora_b"]
        >>> value_fn = lambda weights: 0.5 * (weights**2).sum()
        >>> tx = samx.flat_lora(
        ...     0.1, num_steps=100, weights_like=jax.eval_shape(merge_fn, adapter))
        >>> state = tx.init(adapter)
        >>> for _ in range(2):
        ...     g, state = tx.update(adapter, state, adapter, value_fn=value_fn, merge_fn=merge_fn)
        ...     print(bool(jnp.all(g["lora_b"] == 1)))  # no noise in the first step
        True
        False

    References:
        Li, He, Li, Wang, Shang, Huang, ICML 2025, https://arxiv.org/abs/2409.14396

    Notes:
        `rho=0` is the base optimizer. Leaves with fewer than two axes are not perturbed. Leaves
        with more than two are stacks of matrices: layers under a scan. Let `merge_fn` return the
        adapted weights only. The noise is the same on all devices and in all microbatches of a
        step. Readings: `loss` and `sharp_loss` are both of the moved weights; `sharpness` is not
        known. Cost: 1 gradient; one draw and one transient copy of the merged weights.
        Fidelity: reconstructed from nblt/Flat-LoRA, logTrainer.py, which was read and not run.
        Its noise is never drawn for less than a step of gradient accumulation.
        `static_args`: `num_steps`, `weights_like`.
    """
    check_hyperparam("rho", rho, 0)
    num_steps = as_count("num_steps", num_steps)
    noise = gaussian_noise(partial(_ramped, rho, num_steps), _lengths_of_outputs, key=key)
    noisy = partial(sharp_gradient, gradients=1, perturb_dtype=perturb_dtype, has_aux=True)

    def init_fn(params):
        return FlatLoRAState(noise.init(params), first_aux(aux_like), no_readings(params))

    def update_fn(_, state, params, *, value_fn):
        eps, noise_state = noise.update(params, state.noise, params)
        g, readings, aux = noisy(
            value_fn, params, eps, state.readings, loss=UNKNOWN, g=eps, ball=None
        )
        readings = with_loss(readings._replace(grad_norm=tree.norm(g)), readings.sharp_loss)
        aux = kept_aux("flat_lora", aux, aux_like, state.aux)
        return g, FlatLoRAState(noise_state, aux, readings)

    in_weights = closure_transformation(init_fn, update_fn, name="flat_lora")
    return on_merged(in_weights, weights_like)


def _ramped(rho: ScalarOrSchedule, num_steps: int, step: Any) -> jax.Array:
    """Return ρ in this step, after its growth by half a cosine."""
    done = jnp.minimum(step / num_steps, 1)
    return at_step(rho, step) * (1 - jnp.cos(jnp.pi * done)) / 2


def _lengths_of_outputs(weights: Any) -> Any:
    """Return ‖W_j‖ / √in of the outputs of each matrix; 0 at leaves that are no matrices."""

    def of(w):
        if jnp.ndim(w) < 2 or not tree.is_inexact(w):
            return 0.0
        w = tree.widen(w)
        squares = jnp.sum(jnp.abs(w) ** 2, axis=-2, keepdims=True)
        return tree.sqrt(squares / w.shape[-2])

    return jax.tree.map(of, weights)
