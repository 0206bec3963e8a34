"""Sparse SAM's mask by dynamic sparse training. Public in `samx.perturbations`."""

from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.aliases import ScalarOrSchedule, Transformation
from samx.core.draws import drawn_like
from samx.core.hyperparams import (
    RandomKey,
    as_count,
    at_step,
    check_choice,
    check_hyperparam,
    check_number,
    next_step,
)
from samx.core.transformation import as_transformation, checked_transformation
from samx.perturbations.top_entries import check_mask, num_entries, rounded_down, top_entries

Score: TypeAlias = Literal["gradient", "weight", "random"]
SCORES = ("gradient", "weight", "random")


class DynamicMaskState(NamedTuple):
    """State of `dynamic_mask`.

    Attributes:
        step: int32, optimizer steps so far; the period, draws and schedules count them.
        key: uint32, the data of the random key of the draws (`jax.random.key_data`).
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
    """Perturb some entries, and exchange a part every `period` steps: dynamic sparse training.

        ε = M · perturbation(g)                        (M: initially drawn at random)
        on the steps 0, period, 2 period, ...:         (for the next step)
            A = P (1 − s)
            kept  = the int(A (1 − d)) largest of M by the score of `drop`
            grown = the int(min(A d, P s)) largest outside of M by the score of `grow`
            M = kept + grown

    The scores are |g|, |w + ε| or random numbers. `perturbation` sees the whole gradient, so norms
    include the masked entries, and the masked step of a ball is shorter than ρ.

    Args:
        perturbation: Computes the step, for example `metric_ball(0.05)`.
        sparsity: Fraction s in [0, 1] of the entries that are not perturbed; default 0.5. It cannot
            be a schedule, because the first mask is drawn with it.
        drop_rate: Fraction d in [0, 1] of the perturbed entries that are exchanged, a number or a
            schedule; default 0.5. The authors let it fall to 0:
            `optax.cosine_decay_schedule(0.5, total_steps)`.
        period: Steps T ≥ 1 between two exchanges; the authors use one epoch, or five.
        drop: The score by which entries stay; those with small scores are dropped. "gradient", the
            default (drops the flattest entries), "weight" or "random".
        grow: The score by which new entries are chosen, largest first: "random", the default,
            "gradient" or "weight".
        key: Seed or random key of the draws; default 0.

    Returns:
        An optax transformation `g -> ε`.

    Raises:
        ValueError: If `sparsity` or `drop_rate` is outside [0, 1], `period` is below 1, or `drop`
            or `grow` is unknown; in `init`, if there are more than 2³¹ − 1 parameters; in `update`,
            if the state's mask does not have the shapes of the parameters.
        TypeError: If `sparsity` is not a number, `drop_rate` is neither a number nor a schedule,
            `period` is not a Python int, or `perturbation` is not a transformation; in `init`, if
            `key` is neither a seed nor a random key.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from samx.perturbations import dynamic_mask, metric_ball
        >>> ball = dynamic_mask(metric_ball(1.0), 0.5, 0.5, period=1, grow="gradient", key=3)
        >>> w, g = jnp.ones(4), jnp.array([1.0, 3.0, 1.0, 5.0])
        >>> state, update = ball.init(w), jax.jit(ball.update)
        >>> for _ in range(3):
        ...     print(state.mask.astype(int).tolist())
        ...     eps, state = update(g, state, w)
        [1, 0, 0, 1]
        [0, 1, 0, 1]
        [1, 0, 0, 1]

    References:
        Mi, Shen, Ren, Zhou, Sun, Ji, Tao, "Make Sharpness-Aware Minimization Stronger: A Sparsified
        Perturbation Approach", NeurIPS 2022, https://arxiv.org/abs/2210.05177 (SSAM-D)

    Notes:
        If fewer entries are perturbed than should be kept, all of them are kept. Because of the
        rounding and the minimum, slightly fewer than A entries are perturbed, and clearly fewer at
        low sparsity. The draws of a step depend only on the key and the step, so that a resumed
        training run draws the same. Cost: about 4 × 32 comparisons of all parameters on steps that
        exchange entries, elementwise work on the others. State: one mask of booleans.
        `static_args`: `period`, `drop`, `grow`.
    """
    name = "dynamic_mask"
    check_number("sparsity", sparsity, 0, 1)
    check_hyperparam("drop_rate", drop_rate, 0, 1)
    period = as_count("period", period)
    check_choice("drop", drop, SCORES)
    check_choice("grow", grow, SCORES)
    keys = RandomKey(key)
    perturbation = as_transformation(name, "perturbation", perturbation)

    def init_fn(params):
        data = keys.data()
        size = num_entries(name, params)
        drawn = _draws(jax.random.split(keys.of(data))[0], 0, params)
        num_left_out = rounded_down(-(-size * sparsity // 1))  # rounded up
        mask = top_entries(drawn, size - num_left_out)
        return DynamicMaskState(jnp.zeros((), jnp.int32), data, mask, perturbation.init(params))

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
            return _draws(jax.random.split(keys.of(state.key), 3)[purpose], state.step, params)

        def exchange():
            others = jax.tree.map(jnp.logical_not, state.mask)
            num_grown = rounded_down(jnp.minimum(wanted * rate, size * sparsity))
            kept = top_entries(score(drop, 1), rounded_down(wanted * (1 - rate)), among=state.mask)
            grown = top_entries(score(grow, 2), num_grown, among=others)
            return jax.tree.map(jnp.logical_or, kept, grown)

        mask = jax.lax.cond(state.step % period == 0, exchange, lambda: state.mask)
        return eps, DynamicMaskState(next_step(state.step), state.key, mask, inner)

    return checked_transformation(name, init_fn, update_fn)


def _draws(key: jax.Array, step: Any, like: Any) -> Any:
    """Draw from [0, 1), once per entry, with the shapes and shardings of the tree."""
    return drawn_like(lambda key, leaf: jax.random.uniform(key, leaf.shape), key, step, like)
