"""AUSAM: take both gradients of SAM on examples that are drawn by their past loss increases.

Deng, Pang, Zhang, Guo. "Asymptotic Unbiased Sample Sampling to Speed Up Sharpness-Aware
Minimization", AAAI 2025. https://arxiv.org/abs/2406.08001
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core.aliases import DType, Perturbation, Radius, ScalarOrSchedule, Transformation
from samx.core.closures import LossesClosure
from samx.core.convolutions import fast_convolutions
from samx.core.hyperparams import (
    Default,
    RandomKey,
    as_bound,
    as_count,
    check_hyperparam,
    check_static_number,
    next_step,
)
from samx.core.readings import Readings, no_readings
from samx.core.state import first_aux, kept_aux
from samx.core.transformation import closure_transformation
from samx.selection.examples import num_taken, put, sampled, take, weights_of
from samx.selection.sam_step import count_of, groups_here, sam_step
from samx.selection.score_table import (
    nan_if_outside,
    odds,
    places_of,
    recorded,
    steps_per_epoch,
    weight_range,
)
from samx.variants._ball import ball_of

RAMP_EPOCHS = 30  # as in the authors' code


class AUSAMState(NamedTuple):
    """State of `ausam`.

    Attributes:
        step: int32, optimizer steps so far.
        key: uint32, the data of the random key of all draws (`jax.random.key_data`).
        total: `float32[num_examples]`, sum of each example's loss increases; 1 at first.
        count: `float32[num_examples]`, the divisor of `total`: the score is `total / count`.
        perturbation: State of the perturbation.
        aux: Aux of the pass at w, shaped like `aux_like`.
        readings: Readings of the last step, on the examples that it used.
    """

    step: jax.Array
    key: jax.Array
    total: jax.Array
    count: jax.Array
    perturbation: optax.OptState
    aux: Any
    readings: Readings


def ausam(
    rho: Radius = Default(0.1),
    fraction: float = 0.5,
    num_examples: int = 50_000,
    *,
    warmup_steps: int | None = None,
    ramp_steps: int | None = None,
    low: ScalarOrSchedule = 0.1,
    high: ScalarOrSchedule = 0.5,
    num_groups: int = 1,
    key: int | jax.Array = 0,
    aux_like: Any = None,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """AUSAM: take both gradients of SAM on examples that are drawn by their past loss increases.

        step < warmup_steps:  S = the whole batch
        otherwise:            q_i = total_i / count_i, scaled to [low, top] within the batch
                              S   = a fraction of the batch, drawn without replacement by q_i
        g   = ∇ mean_S l(w)
        ε   = ρ g / ‖g‖
        return ∇ mean_S l(w + ε)                       (the same S)
        r_i = |l_i(w + ε) − l_i(w)| for i in S
        total_i, count_i = r_i, 1                      in the warm-up
                           total_i + r_i, count_i + 1  after it
        top = low + (high − low) min(step / ramp_steps, 1)

    Args:
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters; default 0.1.
        fraction: Fraction α in (0, 1] to draw, a Python number; default 0.5. Of a group of n
            examples ⌊α n⌋ are drawn, but at least one.
        num_examples: Number N of examples in the data set, the length of the score table.
        warmup_steps: Steps on whole batches; default one epoch, ⌈N / B⌉.
        ramp_steps: Steps in which the draws go from uniform to their final spread; default 30
            epochs. 0: no ramp.
        low: Weight ≥ 0 of the lowest score of a batch; default 0.1.
        high: Weight ≥ 0 of the highest score of a batch after the ramp; default 0.5.
        num_groups: Number of contiguous groups of the batch, each with separate draws; default 1. A
            multiple of the number of devices keeps every example on its device. See `ksam`.
        key: Seed or random key of the draws, the same on all devices; default 0.
        aux_like: Arrays or `jax.ShapeDtypeStruct`s shaped like the aux of `losses_fn`. The state
            then holds the aux of the pass at w over the drawn examples (for example BatchNorm
            statistics) and, before the first step, these arrays, or zeros for shapes. Read it with
            `optax.tree.get(state, "aux")`. Default: aux is dropped.
        perturbation: Replaces the ball and `rho`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `losses_fn`, `batch` and
        `index`, `int[B]`, the positions of the examples in the data set. It respects `weights`:
        padding is drawn last, counts for nothing, and leaves the table unchanged, whatever its
        index. It does not use the incoming gradient, so XLA drops its computation.

    Raises:
        ValueError: If a number is out of range; in `update`, if `index` is not `[B]` or lies
            outside the table, `num_groups` does not divide the batch or, inside `data_parallel`, is
            not a multiple of the number of devices, or aux differs in shape from `aux_like`.
        TypeError: If a hyperparameter is neither a number nor a schedule, `fraction` is not a
            Python number, a count is not a Python int, or `index` is not of integers.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.ausam(0.1, 0.5, num_examples=2), optax.sgd(0.5))
        >>> w, x = jnp.array([1.0, 2.0]), jnp.array([[1.0, 0.0], [1.0, 2.0]])
        >>> losses_fn = lambda w, x: 0.5 * (x @ w) ** 2
        >>> closures = {"losses_fn": losses_fn, "batch": x, "index": jnp.arange(2)}
        >>> update = jax.jit(lambda *args: tx.update(*args, **closures))
        >>> state = tx.init(w)
        >>> for _ in range(2):  # the warm-up takes the whole batch, then one example is drawn
        ...     updates, state = update(w, state, w)
        ...     print([round(float(u), 2) for u in updates])
        [-1.57, -2.61]
        [-2.61, -5.22]

    References:
        Deng, Pang, Zhang, Guo, AAAI 2025, https://arxiv.org/abs/2406.08001

    Notes:
        `fraction=1` is SAM. Cost: 2 α gradients per step after the warm-up and 2 during it, in a
        real branch (`jax.lax.cond`); 2 N numbers in the state; a transient copy of the parameters
        and of the drawn examples. Several devices exchange three numbers per example.
        Under `jax.jit` an index outside the table cannot raise an error. It makes the updates NaN
        instead, so that the mistake shows. Both means are plain means: high scores are drawn up to
        high/low times as often, and nothing corrects for it. If all scores of a batch are equal,
        draws are uniform; the authors' code gives NaN there. A rise that is not finite is not
        recorded. The reading `loss` is that of the drawn examples. After the warm-up nothing
        evaluates the whole batch, so do not return a loss of your own. The groups divide the whole
        batch on any number of devices, see `ksam`.
        Fidelity: matches ajiaaa/AUSAM, score table and probabilities included, its draws replayed.
        The paper was not read. The code's ramp rises once per epoch; for that pass `high` as a
        schedule and `ramp_steps=0`. `static_args`: `fraction`, `num_examples`, `warmup_steps`,
        `ramp_steps`, `num_groups`.
    """
    check_static_number("fraction", fraction, 0, 1, excluded=0)
    num_examples = as_count("num_examples", num_examples)
    num_groups = as_count("num_groups", num_groups)
    if warmup_steps is not None:
        warmup_steps = as_count("warmup_steps", warmup_steps, 0)
    if ramp_steps is not None:
        ramp_steps = as_count("ramp_steps", ramp_steps, 0)
    keys = RandomKey(key)
    check_hyperparam("low", low, 0)
    check_hyperparam("high", high, as_bound(low, 0))
    ball = ball_of("ausam", rho, perturbation)
    sam_on = partial(sam_step, perturbation=ball, perturb_dtype=perturb_dtype)

    def init_fn(params):
        return AUSAMState(
            step=jnp.zeros((), jnp.int32),
            key=keys.data(),
            total=jnp.ones(num_examples),
            count=jnp.ones(num_examples),
            perturbation=ball.init(params),
            aux=first_aux(aux_like),
            readings=no_readings(params),
        )

    def train_on(state, params, losses_fn, extra, size, batch, weights, cost, position=None) -> Any:
        step = sam_on(losses_fn, batch, weights, params, state, extra, gradients=cost)
        aux = kept_aux("ausam", step.aux, aux_like, state.aux, "losses_fn")
        rise = jnp.abs(step.sharp_losses - step.losses).astype(state.total.dtype)
        is_drawn = jnp.ones_like(rise)
        if position is not None:
            is_drawn = is_drawn if weights is None else weights.astype(rise.dtype)
            rise, is_drawn = put(rise, position, size), put(is_drawn, position, size)
        return step.updates, step.perturbation, aux, step.readings, rise, is_drawn

    def update_fn(_, state, params, *, losses_fn, batch, index, weights=None, **extra):
        groups, group_size = groups_here("ausam", batch, num_groups, losses_fn)
        count, size = count_of(fraction, group_size), groups * group_size
        epoch = steps_per_epoch(losses_fn, num_examples, size)
        is_warmup = state.step < (epoch if warmup_steps is None else warmup_steps)
        ramp = RAMP_EPOCHS * epoch if ramp_steps is None else ramp_steps
        span = weight_range(low, high, state.step, ramp)
        place = places_of("ausam", losses_fn, index, size, num_examples, weights)
        train = partial(train_on, state, params, losses_fn, extra, size)

        def on_everything():
            return train(batch, weights, 2)

        def on_a_draw():
            key, taken = keys.of(state.key), groups * num_taken(batch, groups, count)
            position = _draw(losses_fn, state, key, place, groups, taken, span, weights)
            drawn = weights_of(position, weights, fraction, count)
            return train(take(batch, position), drawn, 2 * count / group_size, position)

        is_all, choose = count == group_size, fast_convolutions(jax.lax.cond)
        step = on_everything() if is_all else choose(is_warmup, on_everything, on_a_draw)
        updates, *kept, rise, is_drawn = step
        table = recorded(losses_fn, state, place, rise, is_drawn, is_warmup)
        updates = nan_if_outside(updates, place, num_examples)
        return updates, AUSAMState(next_step(state.step), state.key, *table, *kept)

    return closure_transformation(init_fn, update_fn, name="ausam")


def _draw(
    losses_fn: LossesClosure,
    state: AUSAMState,
    key: jax.Array,
    place: jax.Array,
    num_groups: int,
    num_drawn: int,
    span: tuple[Any, Any],
    weights: Any,
) -> jax.Array:
    """Draw examples of each group without replacement; a higher score is drawn more often."""
    p, noise = odds(losses_fn, state, key, place, num_groups, *span)
    return sampled(p, noise, num_drawn, num_groups=num_groups, weights=weights)
