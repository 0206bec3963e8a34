"""Perturb some of the leaves. Public in `samx.perturbations`."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.aliases import ScalarOrSchedule, Transformation
from samx.core.hyperparams import as_key, at_step, check_share, next_step
from samx.core.transformation import as_transformation
from samx.perturbations.metrics import LeafPredicate


def on_leaves(
    perturbation: optax.GradientTransformation,
    is_perturbed: LeafPredicate,
    *,
    norm: Literal["selected", "all"] = "selected",
) -> Transformation:
    """Perturb some of the leaves; the others stay exactly where they are.

        norm = "selected":  ε = perturbation(mask · g)      the whole radius goes to the selected
        norm = "all":       ε = mask · perturbation(g)      each keeps the step it would have had

    This is the place to choose leaves. `optax.masked` or `optax.partition` around a sharpness-aware
    transformation would hand a part of the parameters to the loss.

    Args:
        perturbation: What computes the step, for example `metric_ball(0.05)`.
        is_perturbed: `(path, leaf) -> bool` on the leaves of `params`; `path` is the key path of
            `jax.tree_util.tree_map_with_path`.
        norm: Over which leaves norms are taken; default "selected".

    Returns:
        An optax transformation `g -> ε`.

    Raises:
        ValueError: If `norm` is neither "selected" nor "all"; when used, if no leaf is selected.

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
        The sharp gradient is still that of all parameters. Cost: none beyond `perturbation`.
        `static_args`: `is_perturbed`, `norm`.
    """
    if norm not in ("selected", "all"):
        raise ValueError(f"on_leaves: `norm` must be 'selected' or 'all', got {norm!r}")
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

    return optax.GradientTransformationExtraArgs(perturbation.init, update_fn)


class RandomLeavesState(NamedTuple):
    """State of `random_leaves`.

    Attributes:
        step: int32, optimizer steps so far.
        key: The random key of all draws.
        perturbation: State of the perturbation inside.
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
    """Perturb other leaves on every step, drawn at random: ESAM's stochastic weight perturbation.

        a_l ~ Bernoulli(fraction) for each leaf l      (all of them on the first step)
        ε   = perturbation(a · g) / fraction           norms over the leaves that were drawn

    Args:
        perturbation: What computes the step, for example `metric_ball(0.05)`.
        fraction: Probability β in (0, 1] of each leaf, a number or a schedule over the optimizer's
            steps; 1 is `perturbation` itself.
        key: Seed or random key of the draws, the same on all devices; default 0.

    Returns:
        An optax transformation `g -> ε`.

    Raises:
        ValueError: If `fraction` is a number outside (0, 1].
        TypeError: If `fraction` is neither number nor schedule, `key` no key, or `perturbation` no
            transformation.

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
        The draws of a step are made of the key and the step alone, so that a resumed training draws
        the same. A step that draws no leaf at all, which the authors' code does not survive,
        perturbs every one. The length of the whole step is 1/fraction times the radius. Cost: none
        beyond `perturbation`: which leaves were drawn is known when the program runs, too late for
        the compiler to leave out the gradients of the others. `static_args`: `perturbation`, `key`.
    """
    check_share("fraction", fraction)
    perturbation = as_transformation("random_leaves", "perturbation", perturbation)

    def init_fn(params):
        key_of_draws = as_key("random_leaves", key)
        return RandomLeavesState(jnp.zeros((), jnp.int32), key_of_draws, perturbation.init(params))

    def update_fn(updates, state, params=None, **extra):
        beta = at_step(fraction, state.step)
        leaves, structure = jax.tree.flatten(updates)
        is_drawn = _draws(state.key, state.step, len(leaves)) < beta
        is_drawn |= (state.step == 0) | ~jnp.any(is_drawn)
        left = [jnp.where(drawn, leaf, 0) for drawn, leaf in zip(is_drawn, leaves, strict=True)]
        g = jax.tree.unflatten(structure, left)
        eps, inner = perturbation.update(g, state.perturbation, params, **extra)
        eps = jax.tree.map(lambda e: (e / beta).astype(e.dtype) if tree.is_inexact(e) else e, eps)
        return eps, RandomLeavesState(next_step(state.step), state.key, inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _draws(key: jax.Array, step: jax.Array, count: int) -> jax.Array:
    """`[count]` draws of a step from [0, 1)."""
    return jax.random.uniform(jax.random.fold_in(key, step), (count,))
