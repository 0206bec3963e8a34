"""logits-SAM: SAM on the output layer alone, from features that are computed once.

Luo, Deng, Do, Harandi, Phung, Le. "Sharpness-Aware Minimization in Logit Space Efficiently Enhances
Direct Preference Optimization", ICLR 2026. https://arxiv.org/abs/2603.18258
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from samx.core.aliases import DType, Perturbation, Radius, Transformation
from samx.core.closures import (
    Closure,
    LogitsClosure,
    LossesClosure,
    checked_loss,
    evaluate,
    mean_loss,
)
from samx.core.features import Features, matrices_read
from samx.core.hyperparams import Default, check_function
from samx.core.readings import FORWARD, no_readings, take_readings
from samx.core.sharp import ascend, perturbed, sharp_pass, widened
from samx.core.transformation import closure_transformation
from samx.core.tree import is_inexact
from samx.perturbations.metrics import LeafPredicate
from samx.variants._ball import ball_of
from samx.variants._layer_groups import filled, only, seen_by_part, share_of
from samx.variants.sam import SharpnessAwareState


def logits_sam(
    rho: Radius = Default(0.05),
    *,
    is_perturbed: LeafPredicate | None = None,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """logits-SAM: perturb the output layer only, and compute the features before it once.

        h = features_fn(w, batch)                      (once)
        G = ∇_W L(head_fn(W, h))                       W: the weight matrix of the output layer
        ε = ρ G / ‖G‖
        return ∇L(head_fn(W + ε, h(w)))                with respect to all parameters

    Args:
        rho: Radius ρ ≥ 0 of the L2 ball over the perturbed matrices; default 0.05. The authors'
            command for preference tuning: 0.001.
        is_perturbed: `(path, leaf) -> bool` on the leaves of `params`; default `None`: the leaves
            with two axes or more that `head_fn` reads. Biases are not perturbed.
        perturbation: Replaces the ball and `rho`. It gets zeros at the other leaves.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `features_fn`,
        `(params, batch) -> features`, `head_fn`, `(params, features) -> logits`, `loss_on_logits`
        and `batch`, and respects `weights`. It does not use the incoming gradient, so XLA drops its
        computation.

    Raises:
        ValueError: If a number is out of range, or `rho` is given together with `perturbation`; in
            `update`, if no leaf is perturbed.
        TypeError: If `rho` is neither a number nor a schedule.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> params = {"body": jnp.eye(2), "head": jnp.array([[1.0], [1.0]])}
        >>> closures = {
        ...     "features_fn": lambda p, batch: batch["x"] @ p["body"],
        ...     "head_fn": lambda p, features: features @ p["head"],
        ...     "loss_on_logits": lambda logits, batch: (logits[:, 0] - batch["y"]) ** 2}
        >>> batch = {"x": jnp.array([[3.0, 4.0]]), "y": jnp.zeros(1)}
        >>> tx = samx.logits_sam(rho=0.1)
        >>> g_s, _ = tx.update(params, tx.init(params), params, batch=batch, **closures)
        >>> [round(float(x), 2) for x in g_s["head"][:, 0]]  # 2 · 7.5 · (3, 4): 7 has become 7.5
        [45.0, 60.0]

    References:
        Luo, Deng, Do, Harandi, Phung, Le, ICLR 2026, https://arxiv.org/abs/2603.18258

    Notes:
        It is SAM with `on_leaves` on the same matrices, at a lower cost. A matrix that embeds the
        input too is perturbed in its use as output layer only: the features are those at w. The
        gradient of the body flows through W + ε. If the output layer is frozen, nothing is climbed,
        and `grad_norm` of the readings is 0. The adaptive form climbs |W| G: `le_sam`'s ball.
        `loss_on_logits` may need several rows of features for one example, as preference losses do:
        give features and logits an axis for them after the axis [B]. Cost: 1 gradient, and two
        thirds of the output layer's share of one: it takes a second forward pass, and a gradient of
        its weight. `gradients_spent` of the readings counts the share by the number of parameters.
        Inside `accumulate`, no features are kept: one more forward pass. Memory: one copy of the
        perturbed matrices and of the logits.
        Fidelity: matches RitianLuo/logits-sam-dpo. `static_args`: `is_perturbed`.
    """
    ball = ball_of("logits_sam", rho, perturbation)
    if is_perturbed is not None:
        check_function("is_perturbed", is_perturbed, 2)

    def init_fn(params):
        return SharpnessAwareState(ball.init(params), no_readings(params))

    def update_fn(
        _, state, params, *, features_fn, head_fn, loss_on_logits, batch, losses_fn, **extra
    ):
        value_fn = extra["value_fn"]
        loss = checked_loss("logits_sam", loss_on_logits)
        model = _Model(head_fn, loss, losses_fn, batch, extra.get("weights"))
        features = Features(features_fn, losses_fn, params, batch)
        chosen = _chosen(is_perturbed, head_fn, params, features)
        matrices, climb = only(params, chosen), seen_by_part(ball, chosen, params, value_fn)
        clean = model.mean_loss(None, lambda part: filled(part, params), features.constant)
        seen, _ = evaluate(clean, matrices)
        extra |= {"batch": batch, "losses_fn": losses_fn, "value_fn": seen["value_fn"]}
        eps, g_a, ball_state = ascend(
            seen["value_fn"], climb, seen["grad"], state.perturbation, matrices, **extra
        )
        head_at = partial(_moved_on, eps, chosen, perturb_dtype)
        with sharp_pass():
            sharp = features.evaluate(partial(model.mean_loss, perturb_dtype), head_at)
        readings = take_readings(
            *(state.readings, seen["value"], sharp["value"], g_a, sharp["grad"], params),
            *(partial(head_at, params), _cost(losses_fn, share_of(matrices, params)), ball_state),
            value_fn.mean_of_ascents,
        )
        return sharp["grad"], SharpnessAwareState(ball_state, readings)

    return closure_transformation(init_fn, update_fn, name="logits_sam")


class _Model(NamedTuple):
    """The output layer, the loss of its logits, and the examples."""

    head_fn: LogitsClosure
    loss_on_logits: Callable[[Any, Any], Any]
    losses_fn: LossesClosure
    batch: Any
    weights: Any

    def mean_loss(
        self,
        dtype: DType,
        head_at: Callable[[Any], Any],
        features_of: Callable[[Any, Any], Any],
    ) -> Closure:
        """Return the mean loss of the head at `head_at(w)`, on `features_of(w, batch)`.

        Features of half precision become `dtype`, as the perturbed matrices do.
        """

        def losses_at(w, batch):
            logits = self.head_fn(head_at(w), widened(features_of(w, batch), dtype))
            return self.loss_on_logits(logits, batch), None

        return mean_loss(self.losses_fn.with_fn(losses_at), self.batch, self.weights)


def _moved_on(eps: Any, chosen: Any, perturb_dtype: Any, w: Any) -> Any:
    """Return the parameters, of which the chosen ones have moved by `eps`."""
    moved = perturbed(only(w, chosen), eps, perturb_dtype)
    return filled(moved, widened(w, perturb_dtype))


def _chosen(
    is_perturbed: LeafPredicate | None, head_fn: LogitsClosure, params: Any, features: Features
) -> Any:
    """Return a tree of booleans: which leaves are perturbed."""
    if is_perturbed is None:
        chosen = matrices_read(head_fn, params, features.shapes())
    else:
        chosen = jax.tree_util.tree_map_with_path(is_perturbed, params)
    chosen = jax.tree.map(lambda w, is_chosen: bool(is_chosen) and is_inexact(w), params, chosen)
    if not any(jax.tree.leaves(chosen)):
        by = "`is_perturbed` must choose a floating leaf"
        if is_perturbed is None:
            by = "`head_fn` must read a floating leaf with two axes or more, a matrix"
        shapes = [jnp.shape(w) for w in jax.tree.leaves(params)]
        raise ValueError(f"logits_sam: {by}, got `params` of shapes {shapes}")
    return chosen


def _cost(losses_fn: LossesClosure, share: float) -> float:
    """Return the gradients of a step; the output layer takes two thirds of its own more."""
    again = FORWARD if losses_fn.is_accumulated else 0  # the forward pass of the rest
    return 1 + 2 * FORWARD * share + again * (1 - share)
