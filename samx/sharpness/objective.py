"""The loss that is measured: a closure of the contract, or the losses over a data set."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from samx.core.closures import (
    Closure,
    LogitsClosure,
    LossesClosure,
    as_weights,
    batch_size,
    in_two_parts,
    logits_closure,
    losses_closure,
    mean_loss,
    scalar_closure,
    unit_weights,
)
from samx.core.devices import Devices, as_axes, check_mapped
from samx.core.hyperparams import as_count, check_function


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("batch", "weights"),
    meta_fields=(
        *("value_fn", "losses_fn", "apply_fn", "loss_on_logits"),
        *("num_batches", "axis_names"),
    ),
)
@dataclass(frozen=True)
class Objective:
    """A loss to measure, made by `samx.sharpness.objective`; calling it gives the mean loss.

    It is a pytree of its examples and weights, so it may be an argument of a compiled function.

    Attributes:
        batch: Pytree of arrays with leading axis `B`, or `None`.
        weights: `float[B]`, or `None` for equal weights.
        value_fn: `params -> loss`, or `None`.
        losses_fn: `(params, batch) -> losses [B]`, or `None`.
        apply_fn: `(params, batch) -> logits`, or `None`.
        loss_on_logits: `(logits, batch) -> losses [B]`, or `None`.
        num_batches: Number of batches into which the examples are split.
        axis_names: The mapped axes over which the loss is a mean.

    Example:
        >>> import jax.numpy as jnp, samx
        >>> f = samx.sharpness.objective(losses_fn=lambda w, x: (x @ w) ** 2, batch=jnp.eye(2))
        >>> float(f(jnp.array([1.0, 2.0])))
        2.5
    """

    batch: Any = None
    weights: Any = None
    value_fn: Callable[..., Any] | None = None
    losses_fn: Callable[..., Any] | None = None
    apply_fn: Callable[..., Any] | None = None
    loss_on_logits: Callable[..., Any] | None = None
    num_batches: int = 1
    axis_names: tuple[str, ...] = ()

    def __call__(self, params: Any) -> jax.Array:
        """Return the mean loss."""
        return self.closure("objective")(params)

    def closure(self, name: str) -> Closure:
        """Return the closure of the mean loss, for a measure of this name."""
        if self.losses_fn is None and self.apply_fn is None:
            value_fn = scalar_closure(name, "value_fn", self._required(name, "value_fn"))
            return value_fn.on(self._devices(name), None) if self.axis_names else value_fn
        return self.mean(self.losses(name))

    def mean(self, losses_fn: LossesClosure) -> Closure:
        """Return the closure of the mean of these losses over the examples, and the devices."""
        batch, weights = padded(self.batch, self.weights, self.num_batches)
        return mean_loss(losses_fn, batch, weights)

    def losses(self, name: str) -> LossesClosure:
        """Return the closure of the losses of examples; a `ValueError` if there is none."""
        if self.losses_fn is not None:
            losses_fn = losses_closure(name, self._required(name, "losses_fn"))
        elif self.apply_fn is not None:
            losses_fn = in_two_parts(name, *self.two_parts(name))
        else:
            raise ValueError(
                f"{name}: needs the losses of examples, which `f` lacks. Measure "
                "samx.sharpness.objective(losses_fn=losses, batch=batch), where "
                "losses(params, batch) are per example, [B]"
            )
        changes = {}
        if self.axis_names:
            changes["devices"] = self._devices(name)
        if self.num_batches > 1:
            changes["num_microbatches"] = self.num_batches
        return losses_fn.evaluated(**changes)

    def two_parts(self, name: str) -> tuple[LogitsClosure, Callable[[Any, Any], Any]]:
        """Return the closure of the logits, and the losses on them; a `ValueError` without them."""
        if self.apply_fn is None:
            raise ValueError(
                f"{name}: needs the logits, which `f` lacks. Measure samx.sharpness.objective("
                "apply_fn=apply, loss_on_logits=losses, batch=batch), where apply(params, batch) "
                "are the logits, and losses(logits, batch) are per example, [B]"
            )
        return logits_closure(name, self.apply_fn), self._required(name, "loss_on_logits")

    def keywords(self, name: str) -> dict[str, Any]:
        """Return the closures as keywords of `update`, for a perturbation that reads them."""
        found: dict[str, Any] = {"value_fn": self.closure(name)}
        if self.value_fn is None:
            batch, weights = padded(self.batch, self.weights, self.num_batches)
            found |= {"losses_fn": self.losses(name), "batch": batch}
            found |= {} if weights is None else {"weights": weights}
        if self.apply_fn is not None:
            apply_fn, loss_on_logits = self.two_parts(name)
            found |= {"apply_fn": apply_fn, "loss_on_logits": loss_on_logits}
        return found

    def _devices(self, name: str) -> Devices:
        check_mapped(name, "axis_name", self.axis_names)
        return Devices(self.axis_names)

    def _required(self, name: str, keyword: str) -> Callable[..., Any]:
        found = getattr(self, keyword)
        if found is None:
            raise ValueError(f"{name}: `{keyword}` is missing in the objective")
        return found


def objective(
    *,
    value_fn: Callable[..., Any] | None = None,
    losses_fn: Callable[..., Any] | None = None,
    apply_fn: Callable[..., Any] | None = None,
    loss_on_logits: Callable[..., Any] | None = None,
    batch: Any = None,
    weights: Any = None,
    num_batches: int = 1,
    axis_name: str | Sequence[str] | None = None,
) -> Objective:
    """Make the loss to measure from the closures of the contract.

        L(w) = Σ_i weight_i ℓ_i(w) / Σ_i weight_i
        ℓ(w) = losses_fn(w, batch)  or  loss_on_logits(apply_fn(w, batch), batch)

    Every function of `samx.sharpness` takes a plain loss `params -> scalar` in its place. An
    objective adds what one number cannot give: losses of examples, logits, batches, devices.

    Args:
        value_fn: `params -> scalar`, the mean loss, if it is all there is.
        losses_fn: `(params, batch) -> [B]`, the losses of examples.
        apply_fn: `(params, batch) -> logits`, an array or a tree; its two-part form with
            `loss_on_logits` is what Gauss-Newton products need. An auxiliary output, as in
            `(logits, aux)`, is dropped.
        loss_on_logits: `(logits, batch) -> [B]`.
        batch: All examples that are measured: a pytree of arrays with leading axis `B`.
        weights: `float[B]`, at least 0; 0 marks padding, and if all are 0, so is the loss. Default:
            equal weights.
        num_batches: Into how many batches the examples are split, one after the other in a loop, so
            that the activations of one batch are in memory; default 1. It need not divide `B`. The
            batch itself is in memory; for more data let it be indices, and read inside the loss.
        axis_name: Inside `jax.shard_map` and `jax.pmap`, the mapped axis, or several axes, along
            which the examples are sharded. Leave it out under `jax.jit` with a sharded batch.

    Returns:
        An `Objective`. Dropout must be off, and normalization must use stored statistics:
        otherwise the loss is another function in each batch, and its Hessian is not symmetric.

    Raises:
        TypeError: If a closure is not a function of its arguments, or an argument has a wrong type.
        ValueError: If no closure is given or one half of the two parts; if `losses_fn` and
            `apply_fn` are both given; if `batch` is missing; if batch leaves differ in length,
            `weights` is not `[B]`, or `num_batches` is above `B`.

    Example:
        >>> import jax.numpy as jnp, samx
        >>> x, y = jnp.eye(3, 2), jnp.array([1.0, 2.0, 3.0])
        >>> f = samx.sharpness.objective(
        ...     apply_fn=lambda w, batch: batch["x"] @ w,
        ...     loss_on_logits=lambda z, batch: (z - batch["y"]) ** 2,
        ...     batch={"x": x, "y": y},
        ...     num_batches=2,
        ... )
        >>> w = jnp.zeros(2)
        >>> round(float(f(w)), 3), [round(float(x), 3) for x in samx.sharpness.ggn_vp(f, w)(w + 1)]
        (4.667, [0.667, 0.667])

    References:
        The keywords are those of `update`, see `samx.closure_transformation`.

    Notes:
        Batch j holds the examples j, j + K, j + 2K, ..., so that sharded examples stay on their
        devices. Cost: none; a loop over batches costs one more copy of the parameters. A loop over
        vectors or draws then repeats the gradient's own passes, which XLA otherwise computes once.
    """
    num_batches = as_count("num_batches", num_batches)
    given = {"losses_fn": losses_fn, "apply_fn": apply_fn, "loss_on_logits": loss_on_logits}
    for keyword, fn in given.items():
        if fn is not None:
            check_function(keyword, fn, 2)
    if value_fn is not None:
        check_function("value_fn", value_fn, 1)
    if (apply_fn is None) != (loss_on_logits is None):
        absent, present = "apply_fn", "loss_on_logits"
        if apply_fn is not None:
            absent, present = present, absent
        raise ValueError(f"objective: `{absent}` is missing; `{present}` needs it")
    if losses_fn is not None and apply_fn is not None:
        raise ValueError(
            "objective: give `losses_fn` or its two parts, not both, got `losses_fn`, `apply_fn` "
            "and `loss_on_logits`"
        )
    has_examples = losses_fn is not None or apply_fn is not None
    if not has_examples and value_fn is None:
        raise ValueError(
            "objective: a loss is missing: `value_fn`, or `losses_fn` and `batch`, or `apply_fn`, "
            "`loss_on_logits` and `batch`"
        )
    if has_examples and value_fn is not None:
        raise ValueError(
            "objective: give `value_fn` or the losses of examples, not both, got `value_fn` and "
            f"`{'apply_fn' if losses_fn is None else 'losses_fn'}`"
        )
    if has_examples != (batch is not None):
        fix = "is missing" if has_examples else "needs `losses_fn`, or its two parts"
        raise ValueError(f"objective: `batch` {fix}")
    if has_examples:
        size = batch_size("objective", batch)
        if num_batches > size:
            raise ValueError(f"`num_batches` must be at most {size} examples, got {num_batches}")
        if weights is not None:
            weights = as_weights("objective", weights)
            if weights.shape != (size,):
                raise ValueError(
                    f"objective: `weights` must have one number per example, shape ({size},), "
                    f"got {weights.shape}"
                )
    elif weights is not None or num_batches > 1:
        raise ValueError("objective: `weights` and `num_batches` need `losses_fn` and `batch`")
    return Objective(
        batch=batch,
        weights=weights,
        value_fn=value_fn,
        losses_fn=losses_fn,
        apply_fn=apply_fn,
        loss_on_logits=loss_on_logits,
        num_batches=num_batches,
        axis_names=() if axis_name is None else as_axes("objective", "axis_name", axis_name),
    )


def as_objective(name: str, f: Any) -> Objective:
    """Return `f` as an objective; a plain function is a `value_fn`."""
    if isinstance(f, Objective):
        return f
    if not isinstance(f, Closure):
        if not callable(f):
            raise TypeError(
                f"{name}: `f` must be a loss, params -> scalar, or samx.sharpness.objective(...), "
                f"got a {type(f).__name__}"
            )
        check_function("f", f, 1)
        f = Closure(f, name, "f")
    return Objective(value_fn=f)


def padded(batch: Any, weights: Any, multiple: int) -> tuple[Any, Any]:
    """Return examples whose number is a multiple, filled up with examples of weight 0."""
    size = batch_size("objective", batch)
    missing = -size % multiple
    if not missing:
        return batch, weights
    if weights is None:
        weights = unit_weights(batch, jnp.float32)
    batch = jax.tree.map(lambda x: jnp.concatenate([x, x[:missing]]), batch)
    return batch, jnp.concatenate([weights, jnp.zeros_like(weights[:missing])])
