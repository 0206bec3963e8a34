"""Bi-LoRA: a second low-rank pair beside the adapters climbs while they descend.

Liu, Li, Huang, Yang, Huang. "Bi-LoRA: Efficient Sharpness-Aware Minimization for Fine-Tuning
Large-Scale Models", ICLR 2026. https://arxiv.org/abs/2508.19564
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import draws, tree
from samx.core.aliases import DType, Radius, Transformation
from samx.core.hyperparams import RandomKey, as_count, at_step, check_hyperparam, next_step
from samx.core.readings import UNKNOWN, Readings, no_readings, with_loss
from samx.core.sharp import sharp_gradient
from samx.core.state import first_aux, kept_aux
from samx.core.transformation import as_transformation, closure_transformation
from samx.training.on_merged import on_merged


class Pair(NamedTuple):
    """Two factors of a perturbation: `a [..., in, rank]` and `b [..., rank, out]`."""

    a: jax.Array
    b: jax.Array


class BiLoRAState(NamedTuple):
    """State of `bi_lora`.

    Attributes:
        step: int32, optimizer steps so far; schedules count them.
        pairs: A `Pair` for each matrix of the weights, `None` for other leaves; float32 or wider.
        ascent: State of the optimizer of the pairs.
        aux: Aux of the last step; `None` without `aux_like`.
        readings: Readings of the last step.
    """

    step: jax.Array
    pairs: Any
    ascent: optax.OptState
    aux: Any
    readings: Readings


def bi_lora(
    rho: Radius = 0.05,
    rank: int = 8,
    *,
    ascent_optimizer: optax.GradientTransformation | None = None,
    key: int | jax.Array = 0,
    weights_like: Any = None,
    aux_like: Any = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Bi-LoRA: perturb the weights by a low-rank pair of its own, which climbs in the same pass.

        W = merge_fn(w)                                the merged weights, with the main pair
        A, B = A, B · √min(1, ρ / ‖A B‖)               (one norm, over the pairs of all matrices)
        G = ∇L(W + A B)
        A, B = A, B + ascent(∂L/∂A, ∂L/∂B)             ∂L/∂A = G Bᵀ,  ∂L/∂B = Aᵀ G
        return J(w)ᵀ G                                 (J: the derivative of merge_fn)

    The main pair and the climbing pair take their steps at the same point. The climbing pair is in
    the state: the parameters, which are deployed, do not hold it.

    Args:
        rho: Radius ρ ≥ 0 of the ball for all products A B together, in the Frobenius norm; default
            0.05, SAM's. With ρ = 0 in a step, the pairs do not perturb, and are not scaled.
        rank: Rank of the climbing pairs, at most that of the matrix; default 8.
        ascent_optimizer: Optimizer of the climbing pairs. It gets the negative gradient, so that
            they climb. Default `None`: `optax.adam(3e-4)`. The paper's equation is `optax.sgd`; its
            learning rate, 3e-4, is that of the main pair.
        key: Seed or random key of the first A, the same on all devices; default 0. The first B is
            zero.
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
        ValueError: If a number is out of range; in `update`, if no leaf is a matrix, or aux differs
            from `aux_like` in shape.
        TypeError: If `rho` is neither a number nor a schedule, `rank` is not a Python int, or
            `ascent_optimizer` is not a transformation.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> frozen = jnp.eye(2)
        >>> adapter = {"lora_a": jnp.ones((2, 1)), "lora_b": jnp.zeros((1, 2))}
        >>> merge_fn = lambda adapter: frozen + adapter["lora_a"] @ adapter["lora_b"]
        >>> value_fn = lambda weights: 0.5 * (weights**2).sum()
        >>> like, climber = jax.eval_shape(merge_fn, adapter), optax.sgd(1.0)
        >>> tx = samx.bi_lora(0.1, rank=1, ascent_optimizer=climber, weights_like=like)
        >>> state = tx.init(adapter)
        >>> for _ in range(2):
        ...     g, state = tx.update(adapter, state, adapter, value_fn=value_fn, merge_fn=merge_fn)
        ...     print(bool(state.readings.loss > value_fn(frozen)))  # it climbs from the second on
        False
        True

    References:
        Liu, Li, Huang, Yang, Huang, ICLR 2026, https://arxiv.org/abs/2508.19564

    Notes:
        `rho=0` is the base optimizer. In the paper the second pair has adapters' form, and here it
        belongs to the merged weights: the same products and gradients. Leaves with fewer than two
        axes are not perturbed. Leaves with more than two are stacks of matrices: layers under a
        scan. Let `merge_fn` return the adapted weights only. Without `merge_fn`, a whole model is
        trained against low-rank perturbations. All devices climb together. Readings: `loss` and
        `sharp_loss` are both of the moved weights; `sharpness` is not known. Cost: 1 gradient, that
        of the merged weights. State: the pairs, and what `ascent_optimizer` holds for them.
        Memory: one transient copy of the merged weights.
        Fidelity: reconstructed from a note on the paper, which has the equations and the clipping;
        the authors' code could not be had. The note does not say which optimizer climbs.
        `static_args`: `rank`, `ascent_optimizer`, `weights_like`.
    """
    check_hyperparam("rho", rho, 0)
    rank = as_count("rank", rank)
    chosen = optax.adam(3e-4) if ascent_optimizer is None else ascent_optimizer
    climber = as_transformation("bi_lora", "ascent_optimizer", chosen)
    keys = RandomKey(key)
    sharp = partial(sharp_gradient, gradients=1, perturb_dtype=perturb_dtype, has_aux=True)

    def init_fn(params):
        pairs = _first_pairs(keys.of(keys.data()), rank, params)
        step = jnp.zeros((), jnp.int32)
        return BiLoRAState(
            step, pairs, climber.init(pairs), first_aux(aux_like), no_readings(params)
        )

    def update_fn(_, state, params, *, value_fn):
        eps, pairs = _in_ball(state.pairs, at_step(rho, state.step), params)
        g, readings, aux = sharp(
            value_fn, params, eps, state.readings, loss=UNKNOWN, g=eps, ball=None
        )
        up = jax.tree.map(_gradient_of_pair, pairs, g, is_leaf=_is_pair)
        moves, moved = climber.update(tree.scaled(-1, up), state.ascent, pairs)
        climbed = optax.apply_updates(pairs, moves), moved
        pairs, moved = tree.if_finite(climbed, (pairs, state.ascent))
        readings = with_loss(readings._replace(grad_norm=tree.norm(g)), readings.sharp_loss)
        aux = kept_aux("bi_lora", aux, aux_like, state.aux)
        return g, BiLoRAState(next_step(state.step), pairs, moved, aux, readings)

    in_weights = closure_transformation(init_fn, update_fn, name="bi_lora")
    return on_merged(in_weights, weights_like)


def _is_pair(x: Any) -> bool:
    return x is None or isinstance(x, Pair)


def _first_pairs(key: jax.Array, rank: int, weights: Any) -> Any:
    """Return a pair for each matrix: A of variance 1 / in, and B of zeros."""

    def zeros(w):
        if jnp.ndim(w) < 2 or not tree.is_inexact(w):
            return None
        *stack, rows, columns = jnp.shape(w)
        used, dtype = min(rank, rows, columns), tree.wide_dtype(jnp.result_type(w))
        return Pair(
            jnp.zeros((*stack, rows, used), dtype), jnp.zeros((*stack, used, columns), dtype)
        )

    def first(pair, noise):
        return pair and Pair(noise.a / max(pair.a.shape[-2], 1) ** 0.5, pair.b)

    pairs = jax.tree.map(zeros, weights)
    if not jax.tree.leaves(pairs):
        return jnp.zeros(())  # optax.tree.map_params calls `init` without parameters
    return jax.tree.map(first, pairs, draws.normal_like(key, 0, pairs), is_leaf=_is_pair)


def _in_ball(pairs: Any, rho: Any, weights: Any) -> tuple[Any, Any]:
    """Return the perturbation A B inside the ball, and the pairs, scaled as it is."""

    def product(pair, w):
        return jnp.zeros_like(w) if pair is None else pair.a @ pair.b

    if tree.is_array(pairs):
        shapes = [jnp.shape(w) for w in jax.tree.leaves(weights)]
        raise ValueError(f"bi_lora: the weights must hold a matrix [..., in, out], got {shapes}")
    eps = jax.tree.map(product, pairs, weights, is_leaf=_is_pair)
    length = tree.norm(eps)
    factor = jnp.where(length > rho, tree.ratio(rho, length), 1)
    root = jnp.where(factor > 0, jnp.sqrt(factor), 1)  # a pair of zeros would never climb again
    return tree.scaled(factor, eps), tree.scaled(root, pairs)


def _gradient_of_pair(pair: Pair | None, g: jax.Array) -> Pair | None:
    """Return ∂L/∂A = G Bᵀ and ∂L/∂B = Aᵀ G."""
    if pair is None:
        return None
    g = tree.widen(g)
    return Pair(g @ _transposed(pair.b), _transposed(pair.a) @ g)


def _transposed(x: jax.Array) -> jax.Array:
    return jnp.conj(jnp.swapaxes(x, -1, -2))
