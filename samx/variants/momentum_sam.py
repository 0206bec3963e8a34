"""Momentum-SAM: perturb along the momentum step, at the cost of the base optimizer.

Becker, Altrock, Risse. "Momentum-SAM: Sharpness Aware Minimization without Computational
Overhead", NeurIPS 2025. https://arxiv.org/abs/2401.12033
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core.aliases import DType, Perturbation, Radius, Transformation
from samx.core.hyperparams import Default, check_function
from samx.core.readings import UNKNOWN, Readings, no_readings
from samx.core.sharp import sharp_gradient
from samx.core.state import first_aux, is_field, kept_aux
from samx.core.transformation import as_transformation, base_keywords, closure_transformation
from samx.variants._ball import ball_of

MOMENTUM_NAMES = ("trace", "mu")  # in optax: SGD-like optimizers, Adam-like optimizers


class MomentumSAMState(NamedTuple):
    """State of `momentum_sam`.

    Attributes:
        base: State of the base optimizer, which holds the momentum.
        perturbation: State of the perturbation.
        aux: The aux of the step's only pass, shaped like `aux_like`.
        readings: Readings of the last step.
    """

    base: optax.OptState
    perturbation: optax.OptState
    aux: Any
    readings: Readings


def momentum_sam(
    base: optax.GradientTransformation,
    rho: Radius = Default(3.0),
    *,
    momentum: Callable[[Any], Any] | None = None,
    aux_like: Any = None,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Momentum-SAM: take the only gradient of a step ahead of w, along the momentum step.

        v  = momentum(base state)                      (0 at first)
        ε  = −ρ v / ‖v‖
        return base(∇L(w + ε))                         (moves w, not w + ε)

    Args:
        base: The optimizer that takes the step, including weight decay and clipping. It must have a
            momentum.
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters; default 3, the paper's value for
            ResNets on CIFAR-100 and ImageNet, about ten times SAM's. During the warm-up of a vision
            transformer the paper uses 0.
        momentum: `base state -> v`, a tree like the parameters. Default: for each parameter its one
            entry in the fields named `trace` or `mu`, optax's names. A parameter without an entry
            is not climbed: it is frozen, or its part of the base has no momentum.
        aux_like: Arrays or `jax.ShapeDtypeStruct`s shaped like the aux of `value_fn`. The state
            then holds the aux of the pass at `w + ε` (BatchNorm statistics, for example); read it
            with `optax.tree.get(state, "aux")`. Before the first step it holds these arrays, or
            zeros. Default: aux is dropped.
        perturbation: Replaces the ball and `rho`. Its input is −v.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that wraps `base`. `update` needs `value_fn`. It ignores the incoming
        gradient, so XLA drops that computation.

    Raises:
        ValueError: If a number is out of range, or `rho` is given together with `perturbation`. In
            `init`, if no parameter has a momentum, or one has several, or the momentum is not
            shaped like the parameters. In `update`, if aux differs from `aux_like` in shape.
        TypeError: If `rho` is neither a number nor a schedule, or `base` is not a transformation.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = samx.momentum_sam(optax.sgd(0.5, momentum=0.9), rho=0.1)
        >>> w, loss = jnp.array([3.0, 4.0]), lambda w: 0.5 * w @ w
        >>> state = tx.init(w)
        >>> for _ in range(2):
        ...     updates, state = tx.update(w, state, w, value_fn=loss)
        ...     print([round(float(u), 2) for u in updates])
        ...     w = optax.apply_updates(w, updates)
        [-1.5, -2.0]
        [-2.07, -2.76]

    References:
        Becker, Altrock, Risse, NeurIPS 2025, https://arxiv.org/abs/2401.12033

    Notes:
        `rho=0` is the base optimizer. Cost: 1 gradient per step, and one transient copy of the
        parameters; the state is the base's. The parameters are always the clean ones. The authors'
        code keeps w + ε in the model and shifts it back to evaluate.
        Readings: `loss` and `sharp_loss` are both the loss at w + ε, the only one there is, and
        `grad_norm` is ‖v‖. aux is that of w + ε too; the authors collect BatchNorm statistics again
        at w when training is done.
        The base may have several parts (`optax.partition`, `optax.contrib.muon`): v is made of
        their momenta as their states hold them. A `trace` is about 1 / (1 − decay) times as long
        as a `mu`, which is an average.
        Fidelity: matches MarlonBecker/MSAM with SGD and AdamW. Its SGD decays w + ε: put that decay
        inside the loss to reproduce it. Its AdamW decays after the step, optax before it.
        `static_args`: `base`, `momentum`.
    """
    ball = ball_of("momentum_sam", rho, perturbation)
    base = as_transformation("momentum_sam", "base", base)
    if momentum is not None:
        check_function("momentum", momentum, 1)

    def momentum_of(state, params):
        return find_momentum(state, params) if momentum is None else momentum(state)

    sharp = partial(sharp_gradient, gradients=1, perturb_dtype=perturb_dtype, has_aux=True)

    def init_fn(params):
        state = base.init(params)
        _check_momentum(momentum_of(state, params), params)
        return MomentumSAMState(state, ball.init(params), first_aux(aux_like), no_readings(params))

    def update_fn(_, state, params, *, value_fn, **keywords):
        climbed = optax.tree.scale(-1, momentum_of(state.base, params))
        eps, ball_state = ball.update(climbed, state.perturbation, params)
        g_s, readings, aux = sharp(
            value_fn, params, eps, state.readings, loss=UNKNOWN, g=climbed, ball=ball_state
        )
        readings = readings._replace(loss=readings.sharp_loss)
        aux = kept_aux("momentum_sam", aux, aux_like, state.aux)
        keywords = base_keywords("momentum_sam", {"value_fn": value_fn, **keywords})
        updates, base_state = base.update(g_s, state.base, params, **keywords)
        return updates, MomentumSAMState(base_state, ball_state, aux, readings)

    return closure_transformation(init_fn, update_fn, name="momentum_sam")


def find_momentum(state: optax.OptState, params: Any) -> Any:
    """Return the momentum of each parameter: its one entry in the fields `trace` and `mu`.

    A base that is made of parts has several such fields, each for some parameters. A parameter
    without a momentum gets zeros.
    """
    leaves, keystr = jax.tree_util.tree_leaves_with_path, jax.tree_util.keystr
    paths, found = {path for path, _ in leaves(params)}, {}
    for name in MOMENTUM_NAMES:
        for where, field in optax.tree.get_all_with_path(state, name, filtering=is_field):
            for path, leaf in leaves(field):
                found.setdefault(path, []).append((keystr(where), leaf))
    wrong = [path for path, momenta in found.items() if len(momenta) > 1 or path not in paths]
    if wrong or (paths and not found):
        names = [where + keystr(wrong[0]) for where, _ in found[wrong[0]]] if wrong else ["none"]
        raise ValueError(
            "momentum_sam: `base` must have one momentum for each parameter, in a field named "
            f"`trace` or `mu` of its state, found {', '.join(names)}. Give it one, for example "
            "optax.sgd(..., momentum=0.9), or pass `momentum=`, a function from the state of the "
            "base to the momentum"
        )
    return jax.tree.map_with_path(
        lambda path, w: found[path][0][1] if path in found else jnp.zeros_like(w), params
    )


def _check_momentum(v: Any, params: Any) -> None:
    def shapes(tree):
        return jax.tree.structure(tree), [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]

    if shapes(v) != shapes(params):
        raise ValueError(
            "momentum_sam: `momentum` must be shaped like the parameters, got "
            f"{jax.tree.map(jnp.shape, v)} for {jax.tree.map(jnp.shape, params)}"
        )
