"""Loss closures in one form, and the functions that evaluate them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from samx.core import tree
from samx.core.devices import ONE_DEVICE, Devices, PerExample
from samx.core.hyperparams import check_function
from samx.core.microbatches import accumulated, each


class Evaluation(NamedTuple):
    """Settings for the evaluation of the losses in a step; wrappers around a variant set them.

    Every closure holds one `Evaluation`. A variant therefore does not need to know where it runs.

    Attributes:
        devices: The devices over which means are taken.
        num_microbatches: The number of microbatches over which a gradient is accumulated.
        is_skipped_step: Whether a policy skips the sharp gradient in this step. The losses are then
            linear in the parameters, and the same for every example.
    """

    devices: Devices = ONE_DEVICE
    num_microbatches: int = 1
    is_skipped_step: bool = False


_PLAIN = Evaluation()


@dataclass(frozen=True, eq=False)
class Closure:
    """A scalar loss closure: calling it gives the loss, `with_aux` gives `(loss, aux)`.

    The loss, its gradient with respect to `params` and the aux are means over the devices.

    Attributes:
        fn: `params -> loss` or `params -> (loss, aux)`: the loss on this device.
        name: Name of the transformation in error messages.
        keyword: Name of the closure in error messages.
        evaluation: Settings for the evaluation of the loss.
        weights: `[B]`; a device is weighted by the sum of its weights. `None` weights all devices
            equally.
        ascent_grad: The ascent gradient of this device, if devices climb separately. Otherwise
            `None`: all devices climb the mean gradient.
        factor: The part of `Devices.weight` that gradients of `fn` have already.
    """

    fn: Callable[[Any], Any]
    name: str = "update"
    keyword: str = "value_fn"
    evaluation: Evaluation = _PLAIN
    weights: jax.Array | None = None
    ascent_grad: Any = None
    factor: Any = 1.0

    def __call__(self, params: Any) -> jax.Array:
        """Return the loss without its aux."""
        return self.with_aux(params)[0]

    def with_aux(
        self, params: Any, move: Callable[[Any], Any] = lambda params: params
    ) -> tuple[jax.Array, Any]:
        """Return `(loss, aux)` at `move(params)`, a point that may differ between devices."""
        devices = self.evaluation.devices
        with _flat_parameters_named(params):
            loss, aux = self._checked(self.fn(move(devices.spread(params, self.weights))))
        aux = devices.mean(aux, devices.share(self.weights))
        return devices.mean_loss(loss, self.weights, self.factor), aux

    def local(self, params: Any) -> tuple[jax.Array, Any]:
        """Return this device's `(loss, aux)`."""
        return self._checked(self.fn(params))

    def alone(self) -> "Closure":
        """Return the closure of this device: its loss, and `Devices.weight` times its gradient."""
        return self.on(self.evaluation.devices._replace(is_alone=True), self.weights)

    def on(self, devices: Devices, weights: jax.Array | None = None) -> "Closure":
        """Return the closure with means over these devices."""
        evaluation = self.evaluation._replace(devices=devices)
        return replace(self, evaluation=evaluation, weights=weights)

    def compose(self, fn: Callable[[Any], Any]) -> "Closure":
        """Return the closure that evaluates the loss at `fn(params)`."""
        return replace(self, fn=lambda params: self.fn(fn(params)), ascent_grad=None)

    @property
    def ascent(self) -> "Closure":
        """The closure of the loss to climb: a mean over the devices that climb together."""
        return self.on(self.evaluation.devices.ascent, self.weights)

    def own_gradient(self, g: Any) -> Any:
        """Return what this device climbs: its own gradient if devices climb separately, else g."""
        return g if self.ascent_grad is None else self.ascent_grad

    def mean_of_ascents(self, x: jax.Array) -> jax.Array:
        """Average a number that differs between devices only because they climb separately."""
        devices = self.evaluation.devices
        return devices.mean(x, devices.share(self.weights)) if devices.local_axes else x

    def of_ascents(self, fn: Callable[[Any], Any], g: Any) -> Any:
        """Return `fn(g)`; if devices climb separately, the mean of `fn` of their own gradients."""
        if self.ascent_grad is None:
            return fn(g)
        return jax.tree.map(self.mean_of_ascents, fn(self.ascent_grad))

    def pcast_ascent(self, x: Any) -> Any:
        """Cast a tree to varying along the axes on which devices climb separately."""
        return self.evaluation.devices.ascent.pcast_left_out(x)

    def _checked(self, result: Any) -> tuple[jax.Array, Any]:
        loss, aux = value_and_aux(result)
        _check_array(self.name, self.keyword, "a scalar or (scalar, aux)", loss)
        if jnp.shape(loss) != ():
            raise ValueError(
                f"{self.name}: `{self.keyword}` must return a scalar (or (scalar, aux)), got shape "
                f"{jnp.shape(loss)}; return the mean, and pass per-example losses as `losses_fn`"
            )
        _check_floating(self.name, self.keyword, loss)
        return jnp.asarray(loss), aux


@dataclass(frozen=True, eq=False)
class LossesClosure:
    """A closure of per-example losses: calling it gives the losses, `with_aux` `(losses, aux)`.

    On several devices, these are the losses of the device's own examples. `mean_loss` takes the
    mean over all devices.

    Attributes:
        fn: `(params, batch) -> losses` or `(params, batch) -> (losses, aux)`.
        name: Name of the transformation in error messages.
        keyword: Name of the function that returns the losses in error messages.
        evaluation: Settings for the evaluation of the losses.
        around: What wrappers did to `fn`. It is done to every function that replaces `fn` too.
    """

    fn: Callable[[Any, Any], Any]
    name: str = "update"
    keyword: str = "losses_fn"
    evaluation: Evaluation = _PLAIN
    around: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda fn: fn

    def __call__(self, params: Any, batch: Any) -> jax.Array:
        """Return the losses `[B]` without their aux."""
        return self.with_aux(params, batch)[0]

    def with_aux(self, params: Any, batch: Any) -> tuple[jax.Array, Any]:
        """Return `(losses, aux)`, checked."""
        with _flat_parameters_named(params):
            losses, aux = value_and_aux(self.fn(params, batch))
        self.check(losses, batch)
        return losses, aux

    def check(self, losses: Any, batch: Any) -> None:
        """Require real losses `[B]`."""
        or_pair = "" if self.keyword == "loss_on_logits" else " or (losses, aux)"
        _check_array(self.name, self.keyword, f"losses [B]{or_pair}", losses)
        size = batch_size(self.name, batch)
        if jnp.shape(losses) != (size,):
            raise ValueError(
                f"{self.name}: `{self.keyword}` must return one loss per example, shape ({size},), "
                f"got {jnp.shape(losses)}"
            )
        _check_floating(self.name, self.keyword, losses)

    def compose(self, fn: Callable[[Any], Any]) -> "LossesClosure":
        """Return the closure that evaluates the losses at `fn(params)`."""
        return replace(self, fn=lambda params, batch: self.fn(fn(params), batch))

    def scores(self, params: Any, batch: Any) -> jax.Array:
        """Return the losses `[B]` in float32 or wider, one microbatch at a time; no gradient."""
        if not self.is_accumulated:
            return tree.widen(self(params, batch))
        return tree.widen(each(partial(self, params), self.evaluation.num_microbatches, batch))

    @property
    def is_accumulated(self) -> bool:
        """Whether gradients are accumulated over microbatches, in several passes."""
        return self.evaluation.num_microbatches > 1

    def wrapped(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> "LossesClosure":
        """Return the closure of `wrap(fn)`, where `fn` returns `(losses, aux)`."""
        return replace(self, fn=wrap(self.with_aux), around=lambda fn: wrap(self.around(fn)))

    def with_fn(self, fn: Callable[[Any, Any], tuple[Any, Any]]) -> "LossesClosure":
        """Return the closure of other losses, evaluated as these are; `fn` returns an aux too."""
        return replace(self, fn=self.around(fn))

    def evaluated(self, **changes: Any) -> "LossesClosure":
        """Return the closure with these fields of `evaluation` changed."""
        return replace(self, evaluation=self.evaluation._replace(**changes))


@dataclass(frozen=True, eq=False)
class LogitsClosure:
    """A closure of a model's outputs: calling it gives the logits, `with_aux` `(logits, aux)`.

    It also holds a part of a model: its outputs are features then, or its batch is.

    Attributes:
        fn: `(params, batch) -> logits` or `(params, batch) -> (logits, aux)`.
        name: Name of the transformation in error messages.
        keyword: Name of the closure in error messages.
    """

    fn: Callable[[Any, Any], Any]
    name: str = "update"
    keyword: str = "apply_fn"

    def __call__(self, params: Any, batch: Any) -> Any:
        """Return the logits without their aux."""
        return self.with_aux(params, batch)[0]

    def with_aux(self, params: Any, batch: Any) -> tuple[Any, Any]:
        """Return `(logits, aux)`."""
        with _flat_parameters_named(params):
            logits, aux = value_and_aux(self.fn(params, batch))
        try:
            tree.check_arrays(f"{self.keyword}(params, batch)", logits)
        except TypeError as error:
            raise TypeError(f"{self.name}: {error}") from error
        return logits, aux

    def compose(self, fn: Callable[[Any], Any]) -> "LogitsClosure":
        """Return the closure that evaluates the model at `fn(params)`."""
        return replace(self, fn=lambda params, batch: self.fn(fn(params), batch))


CLOSURES = (Closure, LossesClosure, LogitsClosure)


@contextmanager
def _flat_parameters_named(params: Any) -> Iterator[None]:
    """Add to an error of the caller's loss that its parameters were one flat vector."""
    try:
        yield
    except Exception as error:
        leaves = jax.tree.leaves(params)
        if jax.tree.structure(params) == jax.tree.structure(0) and jnp.ndim(leaves[0]) == 1:
            error.add_note(
                "samx: the loss was called with one flat vector as its parameters. If "
                "optax.flatten wraps the sharpness-aware transformation, wrap the base alone: "
                "optax.chain(samx.sam(...), optax.flatten(base))."
            )
        raise


def value_and_aux(result: Any) -> tuple[Any, Any]:
    """Split the result of a caller's closure into `(value, aux)`; a missing aux is `None`."""
    return result if isinstance(result, tuple) and len(result) == 2 else (result, None)


def scalar_closure(name: str, keyword: str, fn: Callable[..., Any]) -> Closure:
    """Return a caller's function as a `Closure`; one from an outer wrapper is kept."""
    if isinstance(fn, Closure):
        return fn
    check_function(keyword, fn, 1)
    return Closure(fn, name, keyword)


def losses_closure(name: str, fn: Callable[..., Any]) -> LossesClosure:
    """Return a caller's function as a `LossesClosure`; one from an outer wrapper is kept."""
    if isinstance(fn, LossesClosure):
        return fn
    check_function("losses_fn", fn, 2)
    return LossesClosure(fn, name)


def logits_closure(name: str, fn: Callable[..., Any], keyword: str = "apply_fn") -> LogitsClosure:
    """Return a caller's function as a `LogitsClosure`; one from an outer wrapper is kept."""
    if isinstance(fn, LogitsClosure):
        return fn
    check_function(keyword, fn, 2)
    return LogitsClosure(fn, name, keyword)


def in_two_parts(
    name: str, apply_fn: LogitsClosure, loss_on_logits: Callable[[Any, Any], Any]
) -> LossesClosure:
    """Return the closure of the losses `loss_on_logits(apply_fn(params, batch), batch)`."""
    check_function("loss_on_logits", loss_on_logits, 2)

    def losses_and_aux(params, batch):
        logits, aux = apply_fn.with_aux(params, batch)
        return loss_on_logits(logits, batch), aux

    return LossesClosure(losses_and_aux, name, "loss_on_logits")


def checked_loss(
    name: str, loss_on_logits: Callable[[Any, Any], Any]
) -> Callable[[Any, Any], jax.Array]:
    """Return `loss_on_logits`, which must return real losses `[B]`."""
    check_function("loss_on_logits", loss_on_logits, 2)
    closure = LossesClosure(loss_on_logits, name, "loss_on_logits")

    def losses_of(logits, batch):
        losses = loss_on_logits(logits, batch)
        closure.check(losses, batch)
        return losses

    return losses_of


def on_features(name: str, features_fn: LogitsClosure, head_fn: LogitsClosure) -> LogitsClosure:
    """Return the closure of the logits `head_fn(params, features_fn(params, batch))`."""

    def logits_and_aux(params, batch):
        features, aux = features_fn.with_aux(params, batch)
        return head_fn(params, features), aux

    return LogitsClosure(logits_and_aux, name, "head_fn")


def _check_array(name: str, keyword: str, wanted: str, loss: Any) -> None:
    if not isinstance(loss, jax.Array | np.ndarray | np.generic | float | int):
        kind = f"a tuple of {len(loss)}" if isinstance(loss, tuple) else f"a {type(loss).__name__}"
        got = "nothing (None)" if loss is None else kind
        raise TypeError(f"{name}: `{keyword}` must return {wanted}, got {got}")


def _check_floating(name: str, keyword: str, loss: Any) -> None:
    dtype = jnp.result_type(loss)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name}: `{keyword}` must return real floating numbers, got {dtype}")


def batch_size(name: str, batch: Any, keyword: str = "batch") -> int:
    """Return the common leading axis `B` of a batch; raise a `ValueError` that shows the shapes."""
    shapes = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
        where = jax.tree_util.keystr(path)
        if not tree.is_array(leaf):
            kind = type(leaf).__name__
            raise TypeError(f"{name}: `{keyword}`{where} must be an array, got a {kind}")
        shapes[where or keyword] = jnp.shape(leaf)
    if not shapes or () in shapes.values() or len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(
            f"{name}: every leaf of `{keyword}` must have the same leading axis [B], got {shapes}"
        )
    size = next(iter(shapes.values()))[0]
    if size == 0:
        raise ValueError(f"{name}: `{keyword}` must hold at least one example, got {shapes}")
    return size


def as_weights(name: str, weights: Any) -> jax.Array:
    """Return weights in float32 or wider; raise a `TypeError` if they are not real numbers."""
    try:
        found = tree.widen(weights)
    except (TypeError, ValueError, OverflowError):
        found = None
    if found is None or not jnp.issubdtype(found.dtype, jnp.floating):
        got = type(weights).__name__ if found is None else found.dtype
        raise TypeError(f"{name}: `weights` must be real numbers, got {got}")
    return found


def unit_weights(batch: Any, dtype: Any) -> jax.Array:
    """Return ones `[B]`, sharded like the examples of the batch."""
    leaf = jax.tree.leaves(batch)[0]
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return 1 + jnp.zeros_like(leaf, dtype).sum(axis=tuple(range(1, leaf.ndim)))


def local_value_and_grad(closure: Closure, params: optax.Params) -> tuple[Any, optax.Updates]:
    """Return this device's `(loss, aux)`, and `Devices.weight` times its gradient.

    Gradients of integers are float0.
    """
    value_and_grad = jax.value_and_grad(closure.alone().with_aux, has_aux=True, allow_int=True)
    return value_and_grad(closure.evaluation.devices.pcast(params))


def local_loss_and_grad(closure: Closure, params: optax.Params) -> tuple[jax.Array, optax.Updates]:
    """Return this device's loss, and `Devices.weight` times its gradient, as `update` takes it."""
    (loss, _), grads = local_value_and_grad(closure, params)
    return loss, tree.conj(tree.keep_floating(grads, params))


def evaluate(closure: Closure, params: optax.Params) -> tuple[dict[str, Any], Any]:
    """Evaluate the loss and its gradient at `params` once.

    Returns the keywords `value`, `grad` and `value_fn` for `update`, and the aux. The gradient of
    complex leaves is conjugated, as optax's callers do.
    """
    (local_value, local_aux), local_grad = local_value_and_grad(closure, params)
    devices = closure.evaluation.devices
    aux = devices.mean(local_aux, devices.share(closure.weights))
    return as_update_keywords(closure, local_value, local_grad, params), aux


def as_update_keywords(
    closure: Closure, local_value: jax.Array, local_grad: optax.Updates, params: optax.Params
) -> dict[str, Any]:
    """Return the keywords for `update`, given the results of `local_value_and_grad`."""
    devices, weights = closure.evaluation.devices, closure.weights
    value = devices.mean(local_value, devices.share(weights))
    local_grad = tree.conj(local_grad)
    g = devices.mean_grad(local_grad, weights)
    if devices.local_axes:
        ascent_grad = devices.mean_ascent_grad(local_grad, weights)
        closure = replace(closure, ascent_grad=tree.keep_floating(ascent_grad, params))
    return {"value": value, "grad": tree.keep_floating(g, params), "value_fn": closure}


def weighted_mean(losses: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Return the mean of losses; weight 0 marks padding, and a batch of only padding has mean 0."""
    if weights is None:
        return jnp.mean(losses)
    dtype = tree.common_dtype(losses.dtype, weights.dtype)
    total = jnp.sum(weights).astype(dtype)
    return jnp.sum(losses.astype(dtype) * weights.astype(dtype)) / jnp.where(total == 0, 1, total)


def mean_over_batch(
    losses_fn: LossesClosure, losses: jax.Array, weights: jax.Array | None
) -> jax.Array:
    """Return the mean loss over the examples of all devices."""
    devices = losses_fn.evaluation.devices
    return devices.mean(weighted_mean(losses, weights), devices.share(weights))


def mean_loss(
    losses_fn: LossesClosure,
    batch: Any,
    weights: jax.Array | None = None,
    *,
    keeps_losses: bool = False,
) -> Closure:
    """Return the closure of the mean of per-example losses; weight 0 marks padding.

    With `keeps_losses`, the aux of the closure is `(aux, PerExample(losses))`.
    """

    def kept(losses, aux):
        losses = tree.widen(losses)
        return losses, (aux, PerExample(losses)) if keeps_losses else aux

    def whole(params):
        losses, aux = kept(*losses_fn.with_aux(params, batch))
        return weighted_mean(losses, weights), aux

    def piece(params, batch):
        return kept(*losses_fn.with_aux(params, batch))

    name, evaluation = losses_fn.name, losses_fn.evaluation
    closure = Closure(whole, name, "losses_fn", evaluation, weights)
    if evaluation.num_microbatches == 1:
        return closure
    given = unit_weights(batch, jnp.float32) if weights is None else weights
    factor = evaluation.devices.weight(weights)
    fn = partial(accumulated, piece, evaluation.num_microbatches, batch, given, factor)
    return replace(closure, fn=fn, factor=factor)


def evaluate_factors(
    losses_fn: LossesClosure, batch: Any, factors: Sequence[jax.Array], weights: Any, params: Any
) -> list[dict[str, Any]]:
    """Evaluate the mean of `factor * losses` for each factor `[B]`, as `evaluate` does.

    All factors share one forward pass, and each takes its own backward pass. Where gradients are
    accumulated over microbatches, each factor takes both passes.
    """

    def scaled(params, data):
        return data["factor"] * losses_fn(params, data["batch"])

    scaled_fn = replace(losses_fn, fn=scaled)
    fns = [mean_loss(scaled_fn, {"batch": batch, "factor": f}, weights) for f in factors]
    if losses_fn.is_accumulated:
        return [evaluate(fn, params)[0] for fn in fns]

    def local(params):
        losses = tree.widen(losses_fn(params, batch))
        return [weighted_mean(factor * losses, weights) for factor in factors]

    devices = losses_fn.evaluation.devices
    values, pull = jax.vjp(local, devices.pcast(params))
    zeros = jax.tree.map(jnp.zeros_like, values)
    seen = []
    for i, fn in enumerate(fns):
        ones = jnp.ones_like(values[i]) * devices.weight(weights)
        cotangents = [*zeros[:i], ones, *zeros[i + 1 :]]
        (local_grad,) = pull(cotangents)
        seen.append(as_update_keywords(fn, values[i], local_grad, params))
    return seen
