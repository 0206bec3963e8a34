"""The mask of Sparse SAM that is trained along. Public in `samx.perturbations`."""

from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.aliases import ScalarOrSchedule, Transformation
from samx.core.hyperparams import as_key, at_step, check_count, check_number, next_step
from samx.core.transformation import as_transformation
from samx.perturbations.top_entries import check_mask, num_entries, rounded_down, top_entries

Score: TypeAlias = Literal["gradient", "weight", "random"]
SCORES = ("gradient", "weight", "random")


class DynamicMaskState(NamedTuple):
    """State of `dynamic_mask`.

    Attributes:
        step: int32, optimizer steps so far; the period, draws and schedules run on it.
        key: The random key of the draws.
        mask: Booleans shaped like the parameters: which entries are perturbed.
        perturbation: State of the perturbation.
    """

    step: jax.Array
    key: jax.Array
    mask: Any
    perturbation: optax.OptState


def dynamic_mask(
    perturbation: optax.GradientTransformation,
    sparsity: float = 0.5,
    drop_rate: ScalarOrSchedule = 0.5,
    *,
    period: int,
    drop: Score = "gradient",
    grow: Score = "random",
    key: int | jax.Array = 0,
) -> Transformation:
    """Perturb some entries, and exchange a part of them from time to time: dynamic sparse training.

        ε = M · perturbation(g)                        (M: at first drawn)
        on the steps 0, period, 2 period, ...:         (for the next step)
            A = P (1 − s)
            kept  = the int(A (1 − d)) largest of M by the score of `drop`
            grown = the int(min(A d, P s)) largest outside of M by the score of `grow`
            M = kept + grown

    with the scores |g|, |w + ε| or random numbers. Norms are those of the whole gradient: what is
    left of a ball's step is shorter than ρ.

    Args:
        perturbation: What computes the step, for example `metric_ball(0.05)`.
        sparsity: Share s in [0, 1] of the entries that are not perturbed; default 0.5. A number,
            for the first mask is drawn with it.
        drop_rate: Share d in [0, 1] of the perturbed entries that are exchanged, a number or a
            schedule over the optimizer's steps; default 0.5. The authors' falls to 0:
            `optax.cosine_decay_schedule(0.5, total_steps)`.
        period: Steps T ≥ 1 between two exchanges; the authors': one epoch, or five.
        drop: By what the entries that stay are chosen, the largest: "gradient", the default (the
            flattest are dropped), "weight" or "random".
        grow: By what new entries are chosen, the largest: "random", the default, "gradient" or
            "weight".
        key: Seed or `jax.random.key` of the draws.

    Returns:
        An optax transformation `g -> ε`.

    Raises:
        ValueError: If `sparsity` or `drop_rate` is a number outside [0, 1], `period` below 1, or
            `drop` or `grow` unknown; in `init`, for more than 2³¹ − 1 parameters; in `update`, if
            the state's mask is not shaped like them.
        TypeError: If `drop_rate` is neither number nor schedule, `period` no Python int, or `key`
            no seed.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.perturbations import dynamic_mask, metric_ball
        >>> ball = dynamic_mask(metric_ball(1.0), 0.5, 0.5, period=1, grow="gradient", key=3)
        >>> w, g = jnp.ones(4), jnp.array([1.0, 3.0, 1.0, 5.0])
        >>> state = ball.init(w)
        >>> for _ in range(3):
        ...     print(state.mask.astype(int).tolist())
        ...     eps, state = ball.update(g, state, w)
        [1, 0, 0, 1]
        [0, 1, 0, 1]
        [1, 0, 0, 1]

    References:
        Mi, Shen, Ren, Zhou, Sun, Ji, Tao, "Make Sharpness-Aware Minimization Stronger: A Sparsified
        Perturbation Approach", NeurIPS 2022, https://arxiv.org/abs/2210.05177 (SSAM-D)

    Notes:
        Where fewer entries are perturbed than are to be kept, all of them are. Rounding and the
        minimum make the perturbed entries a few less than A, and visibly less at low sparsity.
        The draws of a step are made of the key and the step alone, so that a resumed training draws
        the same. Cost: on steps that exchange about 4 × 32 comparisons of all parameters, on the
        others elementwise work. State: one mask of booleans. `static_args`: `perturbation`,
        `period`, `drop`, `grow`, `key`.
    """
    name = "dynamic_mask"
    check_number("sparsity", sparsity, 0, 1)
    if callable(sparsity):
        raise TypeError(f"{name}: `sparsity` must be a number, got a schedule")
    check_number("drop_rate", drop_rate, 0, 1)
    check_count("period", period)
    for keyword, score in (("drop", drop), ("grow", grow)):
        if score not in SCORES:
            raise ValueError(f"{name}: `{keyword}` must be one of {SCORES}, got {score!r}")
    perturbation = as_transformation(name, "perturbation", perturbation)

    def init_fn(params):
        first = as_key(name, key)
        size = num_entries(name, params)
        drawn = _draws(jax.random.split(first)[0], 0, params)
        num_left_out = rounded_down(-(-size * sparsity // 1))  # which is rounded up
        mask = top_entries(drawn, size - num_left_out)
        return DynamicMaskState(jnp.zeros((), jnp.int32), first, mask, perturbation.init(params))

    def update_fn(updates, state, params=None, **extra):
        check_mask(name, state.mask, params)
        eps, inner = perturbation.update(updates, state.perturbation, params, **extra)
        eps = tree.masked(eps, state.mask)
        size, rate = num_entries(name, params), at_step(drop_rate, state.step)
        wanted = size * (1 - sparsity)

        def score(kind, purpose):
            if kind == "gradient":
                return updates
            if kind == "weight":
                return jax.tree.map(lambda w, e: tree.widen(w) + e, params, eps)
            return _draws(jax.random.split(state.key, 3)[purpose], state.step, params)

        def exchange():
            others = jax.tree.map(jnp.logical_not, state.mask)
            num_grown = rounded_down(jnp.minimum(wanted * rate, size * sparsity))
            kept = top_entries(score(drop, 1), rounded_down(wanted * (1 - rate)), among=state.mask)
            grown = top_entries(score(grow, 2), num_grown, among=others)
            return jax.tree.map(jnp.logical_or, kept, grown)

        mask = jax.lax.cond(state.step % period == 0, exchange, lambda: state.mask)
        return eps, DynamicMaskState(next_step(state.step), state.key, mask, inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _draws(key: jax.Array, step: Any, like: Any) -> Any:
    """Numbers from [0, 1), one for each entry, laid out like the tree."""
    leaves, structure = jax.tree.flatten(like)
    key = jax.random.fold_in(key, step)
    draws = [
        jax.random.uniform(jax.random.fold_in(key, i), leaf.shape)
        + jnp.zeros_like(leaf, jnp.float32)
        if tree.is_inexact(leaf)
        else jnp.zeros_like(leaf)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, draws)
