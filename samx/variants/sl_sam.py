"""SL-SAM: SAM on a few layers per step, which a bandit chooses by their gradient norms.

Cheng, Yang, Wang, Huang, Ma, Yu, Cao, Shen. "Sparse Layer Sharpness-Aware
Minimization for Efficient Fine-Tuning", 2026. https://arxiv.org/abs/2602.09395
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.aliases import DType, Perturbation, Radius, ScalarOrSchedule, Transformation
from samx.core.closures import evaluate
from samx.core.convolutions import fast_convolutions
from samx.core.hyperparams import Default, RandomKey, at_step, check_hyperparam, next_step
from samx.core.readings import FORWARD, Readings, no_readings
from samx.core.sharp import ascend, sharp_gradient
from samx.core.state import first_aux, kept_aux
from samx.core.transformation import as_transformation, base_keywords, closure_transformation
from samx.policies.norms import LARGEST_RISE
from samx.variants._ball import ball_of
from samx.variants._layer_groups import (
    LayerGroups,
    as_groups,
    filled,
    groups_of,
    only,
    seen_by_part,
    share_of,
)

SETTLED = 100  # steps after which no norm rises by LARGEST_RISE in ordinary training


class SLSAMState(NamedTuple):
    """State of `sl_sam`.

    Attributes:
        step: int32, optimizer steps so far.
        key: uint32, the data of the random key of all draws (`jax.random.key_data`).
        log_weights: `float32[groups]`, log weights of the bandit; the largest is 0.
        largest_norm: The largest gradient norm of a group so far.
        group: int32, the group that the last step trained; −1 before the first.
        base: State of the base optimizer, for all layers.
        perturbation: State of the perturbation.
        aux: The aux of the pass at w, shaped like `aux_like`.
        readings: Readings of the last step; norms are those of the active group.
    """

    step: jax.Array
    key: jax.Array
    log_weights: jax.Array
    largest_norm: jax.Array
    group: jax.Array
    base: optax.OptState
    perturbation: optax.OptState
    aux: Any
    readings: Readings


def sl_sam(
    base: optax.GradientTransformation,
    rho: Radius = Default(0.05),
    groups: LayerGroups = 4,
    *,
    bandit_learning_rate: ScalarOrSchedule = 0.01,
    exploration: ScalarOrSchedule = 0.2,
    key: int | jax.Array = 0,
    aux_like: Any = None,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """SL-SAM: SAM on one group of layers per step, which a bandit chooses by gradient norms.

        p   = (1 − exploration) softmax(s) + exploration / num_groups
        A   ~ p                                        one group of layers
        g_A = ∇_A L(w)
        ε   = ρ g_A / ‖g_A‖ on A, 0 elsewhere
        w_A, base state of A = base(∇_A L(w + ε))      nothing else moves
        s_A = s_A + η · (‖g_A‖ / the largest so far) / p_A

    The step is a `jax.lax.switch` over the groups. Each group has a separate program, which
    differentiates only the layers of that group.

    Args:
        base: The optimizer that takes the step, including weight decay and clipping.
        rho: Radius ρ ≥ 0 of the L2 ball over the active parameters; default 0.05.
        groups: Number of groups of consecutive layers with about as many parameters each, at most
            the number of layers; default 4. A layer is the leaves of one module, or a single leaf
            of a flat tree. Or `(path, leaf) -> label`, any hashable: leaves with the same label
            make a group. Every group is a program to be compiled.
        bandit_learning_rate: Learning rate η ≥ 0 of the bandit's log weights s; default 0.01. With
            0, all groups stay equally likely.
        exploration: Share ζ in [0, 1] of the draws that ignore the log weights; default 0.2.
        key: Seed or random key of the draws, the same on all devices; default 0.
        aux_like: Arrays or `jax.ShapeDtypeStruct`s shaped like the aux of `value_fn`. The state
            then holds the aux of the pass at w (BatchNorm statistics, for example); read it with
            `optax.tree.get(state, "aux")`. Before the first step it holds these arrays, or zeros.
            Default: aux is dropped.
        perturbation: Replaces the ball and `rho`; it gets zeros outside the active group.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that wraps `base`. `update` needs `value_fn`. It ignores the incoming
        gradient, so XLA drops that computation.

    Raises:
        ValueError: If a number is out of range, or `rho` is given together with `perturbation`; in
            `update`, if aux differs from `aux_like` in shape.
        TypeError: If a hyperparameter is neither a number nor a schedule, `groups` is neither a
            count nor a function, or `base` is not a transformation.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = samx.sl_sam(optax.sgd(0.5), rho=0.1, groups=2)
        >>> w = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
        >>> loss = lambda w: 0.5 * (w["a"] @ w["a"] + w["b"] @ w["b"])
        >>> state = tx.init(w)
        >>> for _ in range(3):
        ...     updates, state = tx.update(w, state, w, value_fn=loss)
        ...     print(int(state.group), [round(float(x), 2) for u in updates.values() for x in u])
        0 [-1.55, 0.0]
        1 [0.0, -2.05]
        1 [0.0, -2.05]

    References:
        Cheng, Yang, Wang, Huang, Ma, Yu, Cao, Shen, 2026, https://arxiv.org/abs/2602.09395

    Notes:
        `groups=1` is SAM. Cost: two forward passes and two partial backward passes. A partial pass
        computes the weight gradients of the group only, and the activation gradients of the layers
        after the group's first layer. For a group with a share s of the parameters,
        `gradients_spent` of the readings counts (4 + 2 s) / 3 gradients, the most that it can be.
        Memory: the gradients of one group. `optax.adamw` and similar optimizers correct their bias
        by the steps of all groups. If a group gets a share f of the steps, its first thousand steps
        are therefore up to 1/√f times as long as otherwise, as in other sparse forms of Adam.
        Under `jax.vmap` over seeds, if the state crosses the boundary of the mapped function, the
        groups differ from seed to seed and all branches are computed.
        Fidelity: **reconstructed** from the abstract: layers for ascent and descent are chosen per
        step by a bandit whose probabilities follow gradient norms. A secondary source names an
        update of EXP3. Its rate, floor and reward are our choices, and so are groups as the arms.
        After 100 steps, a norm that is more than 100 times the largest so far counts as the
        largest, but does not become it: one spike would end the learning. The abstract reports
        47%, 22% and 21% of active parameters in its three settings. `static_args`: `base`,
        `groups`.
    """
    check_hyperparam("bandit_learning_rate", bandit_learning_rate, 0)
    check_hyperparam("exploration", exploration, 0, 1)
    ball = ball_of("sl_sam", rho, perturbation)
    base = as_transformation("sl_sam", "base", base)
    groups = as_groups(groups)
    keys = RandomKey(key)

    def init_fn(params):
        readings = no_readings(params)
        return SLSAMState(
            step=jnp.zeros((), jnp.int32),
            key=keys.data(),
            log_weights=jnp.zeros(len(groups_of(groups, params)), jnp.float32),
            largest_norm=jnp.zeros_like(readings.grad_norm),
            group=jnp.full((), -1, jnp.int32),
            base=base.init(params),
            perturbation=ball.init(params),
            aux=first_aux(aux_like),
            readings=readings,
        )

    def train_group(value_fn, state, params, extra, active):
        part, zeros = only(params, active), optax.tree.zeros_like(params)
        seen, aux = evaluate(value_fn.compose(lambda part: filled(part, params)), part)
        part_fn, g = seen["value_fn"], seen["grad"]
        on_part = seen_by_part(ball, active, params, value_fn)
        eps, g_a, ball_state = ascend(part_fn, on_part, g, state.perturbation, part, **extra)
        cost = 2 * (2 * FORWARD + FORWARD * share_of(part, params))
        g_s, readings = sharp_gradient(
            *(part_fn, part, eps, state.readings),
            loss=seen["value"],
            g=g_a,
            ball=ball_state,
            gradients=cost,
            perturb_dtype=perturb_dtype,
        )
        keywords = base_keywords("sl_sam", {"value_fn": value_fn, **extra})
        updates, base_state = base.update(filled(g_s, zeros), state.base, params, **keywords)
        base_state = _restored(base_state, state.base, active)
        aux = kept_aux("sl_sam", aux, aux_like, state.aux)
        norm = tree.norm(g).astype(state.largest_norm.dtype)  # of all groups
        return tree.keep(updates, active), (base_state, ball_state, aux, readings), norm

    def update_fn(_, state, params, *, value_fn, **extra):
        p = _probabilities(state.log_weights, at_step(exploration, state.step))
        key = jax.random.fold_in(keys.of(state.key), state.step)
        group = jax.random.categorical(key, jnp.log(p)).astype(jnp.int32)
        train = partial(train_group, value_fn, state, params, extra)
        branches = [partial(train, active) for active in groups_of(groups, params)]
        updates, kept, g_norm = fast_convolutions(jax.lax.switch)(group, branches)
        rate = at_step(bandit_learning_rate, state.step)
        bandit = _reward(state, group, p[group], g_norm, rate)
        return updates, SLSAMState(next_step(state.step), state.key, *bandit, group, *kept)

    return closure_transformation(init_fn, update_fn, name="sl_sam")


def _probabilities(log_weights: jax.Array, exploration: Any) -> jax.Array:
    """Mix the bandit's distribution with the uniform one."""
    return (1 - exploration) * jax.nn.softmax(log_weights) + exploration / len(log_weights)


def _reward(
    state: SLSAMState, group: jax.Array, p: jax.Array, g_norm: jax.Array, rate: Any
) -> tuple[jax.Array, jax.Array]:
    """Reward a group that was drawn with probability p: new log weights, and the largest norm."""
    is_spike = (state.step >= SETTLED) & (g_norm > LARGEST_RISE * state.largest_norm)
    largest = jnp.maximum(state.largest_norm, jnp.where(is_spike, 0, g_norm))
    share = jnp.where(is_spike, 1, g_norm / jnp.where(largest == 0, 1, largest))
    gain = rate * share / p
    log_weights = state.log_weights.at[group].add(gain.astype(jnp.float32))
    learned = log_weights - jnp.max(log_weights), largest
    return tree.if_finite(learned, (state.log_weights, state.largest_norm))


def _restored(new: Any, old: Any, active: Any) -> Any:
    """Return the new state of a base, with the old state for leaves that are not active.

    The path of what belongs to a parameter ends with the path of that parameter.
    """
    is_active = dict(jax.tree_util.tree_leaves_with_path(active))

    def choose(path, new, old):
        tails = (path[start:] for start in range(len(path)))
        return new if next((is_active[t] for t in tails if t in is_active), True) else old

    return jax.tree_util.tree_map_with_path(choose, new, old)
