"""Perturb only some of the leaves. Public in `samx.perturbations`."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.aliases import ScalarOrSchedule, Transformation
from samx.core.hyperparams import (
    RandomKey,
    at_step,
    check_choice,
    check_function,
    check_hyperparam,
    next_step,
)
from samx.core.transformation import as_transformation, checked_transformation
from samx.perturbations.metrics import LeafPredicate


def on_leaves(
    perturbation: optax.GradientTransformation,
    is_perturbed: LeafPredicate,
    *,
    norm: Literal["selected", "all"] = "selected",
) -> Transformation:
    """Perturb the selected leaves only; the others do not move.

        norm = "selected":  ε = perturbation(mask · g)      selected leaves get the whole radius
        norm = "all":       ε = mask · perturbation(g)      selected leaves move as without a mask

    Choose leaves here. `optax.masked` or `optax.partition` around a sharpness-aware transformation
    would pass only a part of the parameters to the loss.

    Args:
        perturbation: Computes the step, for example `metric_ball(0.05)`.
        is_perturbed: `(path, leaf) -> bool` on the leaves of `params`; `path` is the key path of
            `jax.tree_util.tree_map_with_path`.
        norm: The leaves over which norms are taken, "selected" or "all"; default "selected".

    Returns:
        An optax transformation `g -> ε`.

    Raises:
        ValueError: If `norm` is neither "selected" nor "all"; in `update`, if no leaf is selected.
        TypeError: If `perturbation` is not a transformation.

    Example:
        SAM on the normalization layers only:

        >>> import jax, jax.numpy as jnp, samx
        >>> from samx.perturbations import metric_ball, on_leaves
        >>> def is_norm(path, leaf):
        ...     return "norm" in jax.tree_util.keystr(path)
        >>> ball = on_leaves(metric_ball(0.05), is_norm)
        >>> tx = samx.sharpness_aware(ball)
        >>> g = {"dense": jnp.ones(2), "norm": jnp.ones(())}
        >>> eps, _ = ball.update(g, ball.init(g), g)
        >>> [round(float(x), 3) for x in (*eps["dense"], eps["norm"])]
        [0.0, 0.0, 0.05]

    References:
        Müller et al., "Normalization Layers Are All That Sharpness-Aware Minimization Needs",
        NeurIPS 2023, https://arxiv.org/abs/2306.04226

    Notes:
        The sharp gradient still covers all parameters. Cost: none beyond `perturbation`.
        `static_args`: `is_perturbed`, `norm`.
    """
    check_function("is_perturbed", is_perturbed, 2)
    check_choice("norm", norm, ("selected", "all"))
    perturbation = as_transformation("on_leaves", "perturbation", perturbation)

    def update_fn(updates, state, params=None, **extra):
        chosen = jax.tree_util.tree_map_with_path(is_perturbed, params)
        if not any(jax.tree.leaves(chosen)):
            paths = jax.tree_util.tree_leaves_with_path(params)
            names = [jax.tree_util.keystr(path) for path, _ in paths]
            raise ValueError(f"on_leaves: `is_perturbed` selects none of the leaves {names}")
        if norm == "selected":
            return perturbation.update(tree.keep(updates, chosen), state, params, **extra)
        eps, state = perturbation.update(updates, state, params, **extra)
        return tree.keep(eps, chosen), state

    return checked_transformation("on_leaves", perturbation.init, update_fn)


class RandomLeavesState(NamedTuple):
    """State of `random_leaves`.

    Attributes:
        step: int32, optimizer steps so far.
        key: uint32, the data of the random key of all draws (`jax.random.key_data`).
        perturbation: State of the wrapped perturbation.
    """

    step: jax.Array
    key: jax.Array
    perturbation: Any


def random_leaves(
    perturbation: optax.GradientTransformation,
    fraction: ScalarOrSchedule,
    *,
    key: int | jax.Array = 0,
) -> Transformation:
    """Perturb leaves that are drawn at random on every step: ESAM's stochastic weight perturbation.

        a_l ~ Bernoulli(fraction) for each leaf l      (all of them on the first step)
        ε   = perturbation(a · g) / fraction           norms over the drawn leaves

    Args:
        perturbation: Computes the step, for example `metric_ball(0.05)`.
        fraction: Probability β in (0, 1] of each leaf, a number or a schedule; 1 gives
            `perturbation` itself.
        key: Seed or random key of the draws, the same on all devices; default 0.

    Returns:
        An optax transformation `g -> ε`.

    Raises:
        ValueError: If `fraction` is a number outside (0, 1].
        TypeError: If `fraction` is neither a number nor a schedule, or `perturbation` is not a
            transformation; in `init`, if `key` is neither a seed nor a random key.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.perturbations import metric_ball, random_leaves
        >>> ball = random_leaves(metric_ball(0.1), 0.5, key=1)
        >>> g = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([1.0])}
        >>> state = ball.init(g)
        >>> for _ in range(3):
        ...     eps, state = ball.update(g, state, g)
        ...     print([round(float(x), 2) for x in (*eps["a"], *eps["b"])])
        [0.12, 0.16, 0.04]
        [0.12, 0.16, 0.0]
        [0.0, 0.0, 0.2]

    References:
        Du et al., "Efficient Sharpness-aware Minimization for Improved Training of Neural
        Networks", ICLR 2022, https://arxiv.org/abs/2110.03141 (dydjw9/Efficient_SAM).

    Notes:
        The draws of a step depend only on the key and the step, so that a resumed training run
        draws the same. If no leaf is drawn, all leaves are perturbed; the authors' code fails in
        this case. The whole step is 1/fraction times as long as the radius. Cost: none beyond
        `perturbation`. It saves no gradients: the drawn leaves are known at run time only, so XLA
        cannot leave out the gradients of the others.
    """
    check_hyperparam("fraction", fraction, 0, 1, excluded=0)
    keys = RandomKey(key)
    perturbation = as_transformation("random_leaves", "perturbation", perturbation)

    def init_fn(params):
        step = jnp.zeros((), jnp.int32)
        return RandomLeavesState(step, keys.data(), perturbation.init(params))

    def update_fn(updates, state, params=None, **extra):
        beta = at_step(fraction, state.step)
        leaves, structure = jax.tree.flatten(updates)
        is_drawn = _draws(keys.of(state.key), state.step, len(leaves)) < beta
        is_drawn |= (state.step == 0) | ~jnp.any(is_drawn)
        left = [jnp.where(drawn, leaf, 0) for drawn, leaf in zip(is_drawn, leaves, strict=True)]
        g = jax.tree.unflatten(structure, left)
        eps, inner = perturbation.update(g, state.perturbation, params, **extra)
        eps = jax.tree.map(lambda e: (e / beta).astype(e.dtype) if tree.is_inexact(e) else e, eps)
        return eps, RandomLeavesState(next_step(state.step), state.key, inner)

    return checked_transformation("random_leaves", init_fn, update_fn)


def _draws(key: jax.Array, step: jax.Array, count: int) -> jax.Array:
    """Return the `[count]` draws of a step from [0, 1)."""
    return jax.random.uniform(jax.random.fold_in(key, step), (count,))
