"""mSAM: a separate perturbation for every microbatch.

Behdin, Song, Gupta, Durfee, Acharya, Keerthi, Mazumder. "Improved Deep Neural Network
Generalization Using m-Sharpness-Aware Minimization", 2022. https://arxiv.org/abs/2212.04343
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import optax

from samx.core import tree
from samx.core.aliases import DType, Perturbation, Radius, Transformation
from samx.core.closures import (
    LossesClosure,
    as_update_keywords,
    local_value_and_grad,
    mean_loss,
)
from samx.core.hyperparams import Default, as_count, check_choice
from samx.core.microbatches import Parts, check_divides, sums_over
from samx.core.readings import (
    Readings,
    extra_gradients,
    no_readings,
    of_microbatches,
    take_readings,
)
from samx.core.sharp import ascend, perturbed, value_and_grad_at
from samx.core.state import first_aux, kept_aux
from samx.core.transformation import closure_transformation
from samx.variants._ball import ball_of


class MSAMState(NamedTuple):
    """State of `msam`.

    Attributes:
        perturbation: State of the perturbation.
        aux: The aux of the passes at the parameters, shaped like `aux_like`.
        readings: Readings of the last step; norms and cosine are means over the microbatches.
    """

    perturbation: optax.OptState
    aux: Any
    readings: Readings


def msam(
    rho: Radius = Default(0.05),
    num_microbatches: int = 4,
    *,
    how: Literal["scan", "vmap"] = "scan",
    aux_like: Any = None,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Micro-batch SAM (mSAM): perturb each microbatch separately, and average the sharp gradients.

        for each microbatch j:                         (each with a share of the examples)
            g_j  = ∇L_j(w)
            ε_j  = ρ g_j / ‖g_j‖
            h_j  = ∇L_j(w + ε_j)
        return Σ_j share_j h_j

    The "m" of m-sharpness is the number of examples that share a perturbation: B /
    num_microbatches. In the paper, a small m generalizes better than the whole batch.

    Args:
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters; default 0.05.
        num_microbatches: Number K ≥ 1 of microbatches, a divisor of `B`; default 4. Microbatch j
            holds the examples j, j + K, j + 2K, ..., so a batch that is sharded over devices stays
            where it is.
        how: "scan" runs one microbatch after the other, in constant memory. "vmap" runs all at
            once, with K perturbed copies of the parameters. Both give the same numbers.
        aux_like: Arrays or `jax.ShapeDtypeStruct`s shaped like the aux of `losses_fn`. The state
            then holds the aux of the passes at w (BatchNorm statistics, for example); read it with
            `optax.tree.get(state, "aux")`. Floating leaves are means over the microbatches, other
            leaves come from the last microbatch. Before the first step it holds these arrays, or
            zeros. Default: aux is dropped.
        perturbation: Replaces the ball and `rho`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `losses_fn` and `batch`, and
        respects `weights`. It ignores the incoming gradient, so XLA drops that computation.

    Raises:
        ValueError: If a number is out of range, `rho` is given together with `perturbation`, or
            `how` is unknown. In `update`, if `num_microbatches` does not divide the examples of a
            device, or aux differs from `aux_like` in shape.
        TypeError: If `rho` is neither a number nor a schedule, or `num_microbatches` is not a
            Python int.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.msam(rho=0.1, num_microbatches=2), optax.sgd(0.5))
        >>> w, batch = jnp.array([1.0, 2.0]), jnp.eye(4, 2)
        >>> losses_fn = lambda w, x: (x @ w) ** 2
        >>> updates, state = tx.update(w, tx.init(w), w, losses_fn=losses_fn, batch=batch)
        >>> [round(float(u), 3) for u in updates]
        [-0.275, -0.525]

    References:
        Behdin et al., 2022, https://arxiv.org/abs/2212.04343, and "mSAM: Micro-Batch-Averaged
        Sharpness-Aware Minimization", 2023, https://arxiv.org/abs/2302.09693; Foret et al., ICLR
        2021, https://arxiv.org/abs/2010.01412 (m-sharpness); Andriushchenko, Flammarion, ICML 2022,
        https://arxiv.org/abs/2206.06232

    Notes:
        `num_microbatches=1` is SAM. With `B` microbatches, each example has its own perturbation. A
        perturbation with a state starts on each microbatch from the same state, and then advances
        its state with the whole batch.
        Inside `data_parallel`, K counts within each device. With `ascent="local"`, D devices have
        D·K microbatches. The devices send K ascent gradients, and once the sum of their sharp
        gradients: K + 1 all-reduces of the parameters. With local ascent it is 1, and 2 if the
        perturbation has a state. `all_readings` adds K. Under `jax.jit` with a sharded batch, XLA
        averages each gradient separately: 2K.
        Cost: 2 gradients per step, in K pieces each. "scan" holds one sum of gradients and the
        activations of one microbatch; small microbatches use a device less well. "vmap" holds K
        copies of the perturbed parameters, K gradients, and the activations of the whole batch.
        Fidelity: the authors' code was not published. It matches davda54/sam, run microbatch by
        microbatch, which agrees with the loop of tml-epfl/understanding-sam. The microbatches of
        both are contiguous. `static_args`: `num_microbatches`, `how`.
    """
    num_microbatches = as_count("num_microbatches", num_microbatches)
    check_choice("how", how, ("scan", "vmap"))
    ball = ball_of("msam", rho, perturbation)
    step_on = partial(_step_on, ball, perturb_dtype)

    def init_fn(params):
        return MSAMState(ball.init(params), first_aux(aux_like), no_readings(params))

    def update_fn(_, state, params, *, losses_fn, batch, weights=None, **extra):
        check_divides("msam", num_microbatches, batch)
        devices = losses_fn.evaluation.devices
        step = partial(step_on, losses_fn, state, params, extra)
        zeros = optax.tree.zeros_like(jax.tree.map(tree.widen, params))
        parts = devices.pcast(zeros)
        both, readings, aux = sums_over(
            *(step, num_microbatches, how, devices, batch, weights),
            zeros=(parts, parts if devices.local_axes else zeros),
        )
        g_s, g = (tree.cast_like(gradient, params) for gradient in both)
        g_s, g = devices.sum(g_s), devices.sum(g) if devices.local_axes else g
        _, ball_state = ball.update(g, state.perturbation, params, **extra)
        spent = 2 + extra_gradients(ball_state)
        readings = of_microbatches(state.readings, readings, spent)
        aux = kept_aux("msam", aux, aux_like, state.aux, "losses_fn")
        return g_s, MSAMState(ball_state, aux, readings)

    return closure_transformation(init_fn, update_fn, name="msam")


def _step_on(
    ball: optax.GradientTransformationExtraArgs,
    perturb_dtype: DType,
    losses_fn: LossesClosure,
    state: MSAMState,
    params: Any,
    extra: dict[str, Any],
    batch: Any,
    weights: Any,
    draw: jax.Array,
) -> Parts:
    """Take both gradients of one microbatch. Only the ascent gradient is averaged over devices.

    The sharp gradient is this device's part. So is the gradient at w, if devices climb separately.
    """
    value_fn, devices = mean_loss(losses_fn, batch, weights), losses_fn.evaluation.devices
    (loss, aux), own_g = local_value_and_grad(value_fn, params)
    seen = as_update_keywords(value_fn, loss, own_g, params)
    g, keywords = seen["grad"], extra | seen | {"draw": draw}
    eps, g_a, _ = ascend(seen["value_fn"], ball, g, state.perturbation, params, **keywords)
    (sharp_loss, _), own_g_s = value_and_grad_at(
        value_fn.alone(), devices.pcast(params), eps, has_aux=True, perturb_dtype=perturb_dtype
    )
    part = devices.part_of_mean_grad(own_g_s, weights)
    if devices.local_axes:
        g = tree.keep_floating(devices.part_of_mean_grad(tree.conj(own_g), weights), params)
    point = partial(perturbed, params, eps, perturb_dtype)
    g_s = devices.sum(part)  # for readings on request; otherwise XLA drops it
    readings = take_readings(
        *(state.readings, loss, sharp_loss, g_a, g_s, params, point), gradients=2, ball=None
    )
    return Parts((part, g), readings, devices.mean(aux, devices.share(weights)))
