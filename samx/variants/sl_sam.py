"""SL-SAM: SAM on a few layers per step, which a bandit chooses by their gradients.

Cheng, Yang, Wang, Huang, Ma, Yu, Cao, Shen. Sparse-layer SAM, 2026. https://arxiv.org/abs/2602.09395
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.aliases import DType, Perturbation, Radius, ScalarOrSchedule, Transformation
from samx.core.closures import Closure, evaluate
from samx.core.hyperparams import Default, as_key, at_step, check_number, next_step
from samx.core.readings import FORWARD, Readings, no_readings
from samx.core.sharp import ascend, sharp_gradient
from samx.core.state import first_aux, kept_aux
from samx.core.transformation import as_transformation, base_keywords, closure_transformation
from samx.variants._ball import ball_of
from samx.variants._layer_groups import LayerGroups, check_groups, filled, groups_of, only


class SLSAMState(NamedTuple):
    """State of `sl_sam`.

    Attributes:
        step: int32, optimizer steps so far.
        key: The random key of all draws.
        log_weights: `float32[groups]`, the bandit's; the largest is 0.
        largest_norm: The longest gradient of a group so far.
        group: int32, the group that the last step trained; −1 before the first.
        base: State of the base optimizer, of all layers.
        perturbation: State of the perturbation.
        aux: The aux of the pass at w, shaped like `aux_like`.
        readings: What the last step saw; norms are those of the active group.
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
    """SL-SAM: SAM on one group of layers per step, which a bandit chooses by their gradients.

        p   = (1 − exploration) softmax(s) + exploration / num_groups
        A   ~ p                                        one group of layers
        g_A = ∇_A L(w)
        ε   = ρ g_A / ‖g_A‖ on A, 0 elsewhere
        w_A, base state of A = base(∇_A L(w + ε))      nothing else moves
        s_A = s_A + rate · (‖g_A‖ / the largest so far) / p_A

    The step is a `jax.lax.switch` over the groups, each with a program of its own, which
    differentiates the layers of the group and no others.

    Args:
        base: The optimizer that takes the step: weight decay and clipping included.
        rho: Radius ρ ≥ 0 of the L2 ball over the active parameters, a number or a schedule over the
            optimizer's steps; default 0.05.
        groups: How many groups of consecutive layers with about as many parameters each, at most
            as many as there are layers (the leaves of one module, or single leaves of a flat tree);
            default 4. Or `(path, leaf) -> label`, any hashable: leaves with the same label make a
            group. Every group is a program to be compiled.
        rate: Learning rate η ≥ 0 of the bandit, a number or a schedule; default 0.01. 0: every
            group is as likely as the others, for good.
        exploration: ζ in [0, 1], the share of the draws that ignore the weights, a number or a
            schedule; default 0.2.
        key: Seed or random key of the draws, the same on all devices; default 0.
        aux_like: Arrays or `jax.ShapeDtypeStruct`s shaped like the aux of `value_fn`. The state
            then holds the aux of the pass at w (BatchNorm statistics, say), to be read with
            `optax.tree.get(state, "aux")`, and before the first step these arrays, or zeros;
            default none, aux is dropped.
        perturbation: Another geometry in place of the ball, which gets zeros outside of the active
            group; then leave `rho` out.
        perturb_dtype: Lowest precision of the perturbed point, see `sharpness_aware`.

    Returns:
        An `optax.GradientTransformationExtraArgs` that wraps `base`. `update` needs `value_fn` (or
        `losses_fn` and `batch`) and ignores the incoming gradient, so that the compiler removes its
        computation. Keywords that are not samx's own go on to `base`.

    Raises:
        ValueError: If a number is out of its range, or `rho` is given together with
            `perturbation`; in `update`, if aux differs in shape from `aux_like`, and as
            `closure_transformation` says.
        TypeError: If a number is none, `groups` neither count nor function, or `base` no
            transformation.

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
        `groups=1` is SAM. Cost: two forward passes and two partial backward passes: of the
        gradients of the weights the group's own only, of those of the activations what lies behind
        its first layer. `gradients_spent` of the readings counts, for a group with a share s of the
        parameters, (4 + 2 s) / 3 gradients, the most that it can be. Memory: the gradients of one
        group. `optax.adamw` and the like correct their bias by the steps of all groups, so that
        with f of the steps for a group its first thousand ones are up to 1/√f times as long as they
        would be: the same as in other sparse forms of Adam.
        Under `jax.vmap` over seeds whose state crosses the boundary of the mapped function the
        groups differ from seed to seed, and all branches are computed.
        Fidelity: **reconstructed** from the abstract: layers for ascent and descent are chosen per
        step by a bandit whose probabilities follow gradient norms. An update of EXP3 is what a
        secondary source says; its rate, floor and reward, and that the arms are groups, are ours.
        The paper reports 21% to 47% of active parameters. `static_args`: `base`, `groups`, `key`,
        `aux_like`, `perturbation`, `perturb_dtype`; `rho` too where `perturbation` is given.
    """
    check_number("bandit_learning_rate", bandit_learning_rate, 0)
    check_number("exploration", exploration, 0, 1)
    ball = ball_of("sl_sam", rho, perturbation)
    base = as_transformation("sl_sam", "base", base)
    check_groups("sl_sam", groups)

    def init_fn(params):
        readings = no_readings(params)
        return SLSAMState(
            step=jnp.zeros((), jnp.int32),
            key=as_key("sl_sam", key),
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
        on_part = _seen_by_part(ball, active, params, value_fn)
        eps, g_a, ball_state = ascend(part_fn, on_part, g, state.perturbation, part, **extra)
        cost = 2 * (2 * FORWARD + FORWARD * _share(part, params))
        g_s, readings = sharp_gradient(
            *(part_fn, part, eps, state.readings),
            loss=seen["value"],
            g=g_a,
            gradients=cost,
            perturb_dtype=perturb_dtype,
        )
        keywords = base_keywords("sl_sam", {"value_fn": value_fn, **extra})
        updates, base_state = base.update(filled(g_s, zeros), state.base, params, **keywords)
        base_state = _restored(base_state, state.base, active)
        aux = kept_aux("sl_sam", aux, aux_like, state.aux)
        return tree.keep(updates, active), (base_state, ball_state, aux, readings), tree.norm(g)

    def update_fn(_, state, params, *, value_fn, **extra):
        p = _probabilities(state.log_weights, at_step(exploration, state.step))
        key = jax.random.fold_in(state.key, state.step)
        group = jax.random.categorical(key, jnp.log(p)).astype(jnp.int32)
        train = partial(train_group, value_fn, state, params, extra)
        branches = [partial(train, active) for active in groups_of(groups, params)]
        updates, kept, g_norm = jax.lax.switch(group, branches)
        rate = at_step(bandit_learning_rate, state.step)
        largest = jnp.maximum(state.largest_norm, g_norm)
        gain = rate * g_norm / jnp.where(largest == 0, 1, largest) / p[group]
        log_weights = state.log_weights.at[group].add(gain.astype(jnp.float32))
        log_weights -= jnp.max(log_weights)
        step = next_step(state.step)
        return updates, SLSAMState(step, state.key, log_weights, largest, group, *kept)

    return closure_transformation(init_fn, update_fn, name="sl_sam")


def _probabilities(log_weights: jax.Array, exploration: Any) -> jax.Array:
    """Mix the bandit's distribution with the uniform one."""
    return (1 - exploration) * jax.nn.softmax(log_weights) + exploration / len(log_weights)


def _seen_by_part(
    ball: optax.GradientTransformationExtraArgs, active: Any, whole: Any, value_fn: Closure
) -> Transformation:
    """Let the active leaves see a perturbation of all parameters; other gradients are zero."""
    zeros = optax.tree.zeros_like(whole)

    def update_fn(updates, state, params=None, **keywords):
        del params
        keywords |= {"value_fn": value_fn}
        eps, state = ball.update(filled(updates, zeros), state, whole, **keywords)
        return only(eps, active), state

    return optax.GradientTransformationExtraArgs(ball.init, update_fn)


def _share(part: Any, params: Any) -> float:
    """The share of the parameters in a part."""
    active, whole = (sum(jnp.size(x) for x in jax.tree.leaves(tree)) for tree in (part, params))
    return active / whole


def _restored(new: Any, old: Any, active: Any) -> Any:
    """The new state of a base, but the old one where it belongs to leaves that are not active.

    What belongs to a parameter has a path that ends with the parameter's own.
    """
    is_active = dict(jax.tree_util.tree_leaves_with_path(active))

    def choose(path, new, old):
        tails = (path[start:] for start in range(len(path)))
        return new if next((is_active[t] for t in tails if t in is_active), True) else old

    return jax.tree_util.tree_map_with_path(choose, new, old)
