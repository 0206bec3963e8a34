"""ESAM: perturb random tensors, and descend on the examples whose losses rose the most.

Du, Yan, Feng, Zhou, Zhen, Goh, Tan. "Efficient Sharpness-aware Minimization for Improved Training
of Neural Networks", ICLR 2022. https://arxiv.org/abs/2110.03141
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import optax

from samx.core.aliases import DType, Perturbation, Radius, ScalarOrSchedule, Transformation
from samx.core.closures import Closure, LossesClosure, evaluate, mean_loss, mean_over_batch
from samx.core.hyperparams import (
    Default,
    as_count,
    check_choice,
    check_hyperparam,
    check_static_number,
)
from samx.core.readings import FORWARD, Readings, no_readings, with_losses
from samx.core.sharp import ascend, scores_at, sharp_gradient
from samx.core.transformation import closure_transformation
from samx.perturbations.leaves import random_leaves
from samx.selection.examples import above_the_smallest, largest, num_taken, take, weights_of
from samx.selection.sam_step import count_of, groups_here, selected_loss
from samx.variants._ball import ball_of


class ESAMState(NamedTuple):
    """State of `esam`.

    Attributes:
        perturbation: State of the perturbation, with the draws of the tensors.
        readings: Readings of the last step; both losses are means over the whole batch.
    """

    perturbation: optax.OptState
    readings: Readings


def esam(
    rho: Radius = Default(0.05),
    perturbed_fraction: ScalarOrSchedule = 0.6,
    selected_fraction: float = 0.5,
    *,
    select: Literal["exact", "strict"] = "exact",
    sharp_pass: Literal["subset", "whole"] = "subset",
    num_groups: int = 1,
    key: int | jax.Array = 0,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """ESAM: perturb random tensors, and descend on the examples whose losses rose the most.

        l_i = losses at w;  g = ∇ mean l(w)            (all examples)
        a   = each tensor with probability perturbed_fraction, all of them on the first step
        ε   = ρ a g / ‖a g‖ / perturbed_fraction
        d_i = losses at w + ε − l_i                    (all examples, no gradient)
        S   = the selected_fraction of the examples with the largest d_i
        return ∇ mean_S l(w + ε)                       (all tensors)

    Args:
        rho: Radius ρ ≥ 0 of the L2 ball over the drawn tensors; default 0.05.
        perturbed_fraction: Probability β in (0, 1] of each tensor; default 0.6, the authors' for
            ResNet-18 (0.5 for wider ones).
        selected_fraction: Fraction γ in (0, 1] to select, a Python number; default 0.5. Of a group
            of n examples ⌊γ n⌋ are selected, but at least one.
        select: Two forms of this one paper. "exact", the default: exactly that many examples.
            "strict": those with d_i above the smallest of them, as in the authors' code. That is
            one example fewer, or several fewer if losses are equal. If none would remain, all are
            kept; from γ = 0.99 on the whole batch is.
        sharp_pass: Two forms of ESAM's sharp pass. "subset", the default: another forward pass and
            the backward pass over S alone. "whole": the backward pass of the pass that measured
            d_i, with weight 0 for the other examples. Both give the same numbers, unless examples
            depend on each other (batch normalization). "whole" saves a forward pass, but its
            backward pass covers the whole batch: it is cheaper for γ above 2/3.
        num_groups: Number of contiguous groups of the batch, each with a separate selection;
            default 1. A multiple of the number of devices keeps every example on its device. See
            `ksam`.
        key: Seed or random key of the draws of tensors, the same on all devices; default 0.
        perturbation: Replaces the ball and `rho`. The authors' adaptive form is
            `metric_ball(rho, magnitude(0.0))` on all leaves.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `losses_fn` and `batch`, and
        respects `weights`. It does not use the incoming gradient, so XLA drops its computation.

    Raises:
        ValueError: If a number is out of range, or `select` or `sharp_pass` is unknown; in
            `update`, if `num_groups` does not divide the batch or, inside `data_parallel`, is not a
            multiple of the number of devices.
        TypeError: If a hyperparameter is neither a number nor a schedule, `selected_fraction` is
            not a Python number, or `num_groups` not a Python int.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.esam(0.1, 1.0, 0.5), optax.sgd(0.5))
        >>> w, x = jnp.array([1.0, 2.0]), jnp.array([[1.0, 0.0], [1.0, 2.0]])
        >>> losses_fn = lambda w, x: 0.5 * (x @ w) ** 2
        >>> updates, state = tx.update(w, tx.init(w), w, losses_fn=losses_fn, batch=x)
        >>> [round(float(u), 3) for u in updates]  # of the second example alone
        [-2.611, -5.223]

    References:
        Du, Yan, Feng, Zhou, Zhen, Goh, Tan, ICLR 2022, https://arxiv.org/abs/2110.03141

    Notes:
        With both fractions 1 it is SAM. Cost: one gradient, one forward pass, and γ gradients; with
        "whole", or where everything is selected, 2 gradients; one transient copy of the parameters.
        In PyTorch the tensors that were not drawn also leave the backward pass; here the draws are
        known at run time only, too late for the compiler to leave them out. The reading
        `gradients_spent` counts a forward pass as a third of a gradient. Inside `accumulate` both
        passes are taken microbatch by microbatch, and "whole" works as "subset". A step that draws
        no tensor perturbs all of them: the authors' code fails there. The groups divide the whole
        batch on any number of devices, see `ksam`.
        Fidelity: matches dydjw9/Efficient_SAM with `select="strict"` and
        `perturbation=metric_ball(rho, norm_eps=1e-7)`, its draws replayed. The paper was not read:
        secondary sources say that it selects a fraction of exactly γ, as "exact" does.
        `static_args`: `selected_fraction`, `select`, `sharp_pass`, `num_groups`.
    """
    check_hyperparam("perturbed_fraction", perturbed_fraction, 0, 1, excluded=0)
    check_static_number("selected_fraction", selected_fraction, 0, 1, excluded=0)
    num_groups = as_count("num_groups", num_groups)
    check_choice("select", select, ("exact", "strict"))
    check_choice("sharp_pass", sharp_pass, ("subset", "whole"))
    ball = random_leaves(ball_of("esam", rho, perturbation), perturbed_fraction, key=key)
    is_all = select == "strict" and selected_fraction >= 0.99
    choose_sharpest = partial(_choose_sharpest, selected_fraction, select)
    sharp = partial(sharp_gradient, perturb_dtype=perturb_dtype, has_aux=True)

    def init_fn(params):
        return ESAMState(ball.init(params), no_readings(params))

    def update_fn(_, state, params, *, losses_fn, batch, weights=None, **extra):
        groups, size = groups_here("esam", batch, num_groups, losses_fn)
        count = size if is_all else count_of(selected_fraction, size)
        value_fn = mean_loss(losses_fn, batch, weights, keeps_losses=True)
        seen, (_, before) = evaluate(value_fn, params)
        value_fn, g, keywords = seen["value_fn"], seen["grad"], extra | seen
        eps, g_a, ball_state = ascend(value_fn, ball, g, state.perturbation, params, **keywords)

        taken = num_taken(batch, groups, count)
        choose = partial(choose_sharpest, before.examples, weights, groups, count, taken)
        score = partial(scores_at, losses_fn, params, eps, batch, perturb_dtype)
        sharp_fn, after = value_fn, None
        if count < size:
            sharp_fn, after = _loss_of_sharpest(losses_fn, batch, choose, score, sharp_pass)
        cost = 2.0 if after is None else 1 + FORWARD + count / size
        g_s, readings, aux = sharp(
            *(sharp_fn, params, eps, state.readings),
            loss=seen["value"],
            g=g_a,
            ball=ball_state,
            gradients=cost,
        )
        after = aux[1].examples if after is None else after
        sharp_loss = mean_over_batch(losses_fn, after, weights)
        return g_s, ESAMState(ball_state, with_losses(readings, seen["value"], sharp_loss))

    return closure_transformation(init_fn, update_fn, name="esam")


def _choose_sharpest(
    fraction: float,
    select: str,
    before: jax.Array,
    weights: Any,
    num_groups: int,
    count: int,
    taken: int,
    after: jax.Array,
) -> tuple[jax.Array, Any]:
    """Return positions and weights of the examples whose losses the perturbation raises most."""
    increase = after - before
    position = largest(increase, num_groups * taken, num_groups=num_groups, weights=weights)
    chosen = weights_of(position, weights, fraction, count)
    if select == "strict":
        chosen = above_the_smallest(take(increase, position), chosen, num_groups)
    return position, chosen


def _loss_of_sharpest(
    losses_fn: LossesClosure, batch: Any, choose: Any, score: Any, sharp_pass: str
) -> tuple[Closure, Any]:
    """Return the loss of the sharp pass, and the losses at w + ε if it does not give them."""
    if sharp_pass == "whole" and not losses_fn.is_accumulated:
        return selected_loss(losses_fn, batch, choose), None
    after = score()
    position, weights = choose(after)
    return mean_loss(losses_fn, take(batch, position), weights), after
