"""Loss closures in one form."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.devices import ONE_DEVICE, Devices, Own
from samx.core.microbatches import accumulated, each


class Closure:
    """A scalar loss closure: calling it gives the loss, `with_aux` gives `(loss, aux)`.

    The caller's closure may return either; an aux that is missing is `None`. Over several devices
    the loss, its gradient with respect to `params` and the aux are means over them by their
    `weights`; `own` is the device's own.
    """

    def __init__(
        self,
        own: Callable[[Any], tuple[jax.Array, Any]],
        devices: Devices = ONE_DEVICE,
        weights: jax.Array | None = None,
    ):
        self.own, self.devices, self.weights = own, devices, weights

    def __call__(self, params: Any) -> jax.Array:
        """The loss, aux dropped."""
        return self.with_aux(params)[0]

    def with_aux(
        self, params: Any, move: Callable[[Any], Any] = lambda params: params
    ) -> tuple[jax.Array, Any]:
        """`(loss, aux)` at `move(params)`, a point that each device may have of its own."""
        share = self.devices.share(self.weights)
        loss, aux = self.own(move(self.devices.spread(params, share)))
        return self.devices.gather(loss, share), self.devices.mean(aux, share)

    @property
    def ascent(self) -> "Closure":
        """The same, as a loss to climb: a mean over the devices that climb together."""
        return Closure(self.own, self.devices.ascent, self.weights)

    def mean_of_ascents(self, x: jax.Array) -> jax.Array:
        """The mean of a number that differs between devices only because their ascents do."""
        if not self.devices.own_axes:
            return x
        return self.devices.mean(x, self.devices.share(self.weights))


class LossesClosure(NamedTuple):
    """Per-example losses: calling it gives them, `with_aux` gives `(losses, aux)`.

    Over several devices these are the device's own, on its own examples; `mean_loss` of them is the
    mean over all.
    """

    with_aux: Callable[[Any, Any], tuple[jax.Array, Any]]
    devices: Devices = ONE_DEVICE
    num_microbatches: int = 1  # that `mean_loss` takes its gradient over
    is_linear: bool = False  # that of a step without a sharp gradient: the same for every example

    def __call__(self, params: Any, batch: Any) -> jax.Array:
        """The losses `[B]`, aux dropped."""
        return self.with_aux(params, batch)[0]

    def scores(self, params: Any, batch: Any) -> jax.Array:
        """The losses `[B]` in float32 or wider, without a gradient and a microbatch at a time."""
        if self.num_microbatches == 1:
            return tree.widen(self(params, batch))
        return tree.widen(each(partial(self, params), self.num_microbatches, batch))


def loss_and_aux(result: Any) -> tuple[Any, Any]:
    """What a caller's closure returned, with an aux of `None` where there is none."""
    return result if isinstance(result, tuple) and len(result) == 2 else (result, None)


def scalar_closure(name: str, keyword: str, fn: Callable[..., Any]) -> Closure:
    """`params -> scalar`, checked whenever it is called."""
    if isinstance(fn, Closure):  # an outer wrapper's
        return fn

    def own(params):
        loss, aux = loss_and_aux(fn(params))
        if jnp.shape(loss) != ():
            raise ValueError(
                f"{name}: `{keyword}` must return a scalar (or (scalar, aux)), got shape "
                f"{jnp.shape(loss)}; return the mean, and pass per-example losses as `losses_fn`"
            )
        _check_floating(name, keyword, loss)
        return loss, aux

    return Closure(own)


def losses_closure(name: str, fn: Callable[..., Any]) -> LossesClosure:
    """`(params, batch) -> [B]`, checked whenever it is called."""
    if isinstance(fn, LossesClosure):
        return fn

    def with_aux(params, batch):
        losses, aux = loss_and_aux(fn(params, batch))
        size = batch_size(name, batch)
        if jnp.shape(losses) != (size,):
            raise ValueError(
                f"{name}: `losses_fn` must return one loss per example, shape ({size},), "
                f"got {jnp.shape(losses)}"
            )
        _check_floating(name, "losses_fn", losses)
        return losses, aux

    return LossesClosure(with_aux)


def _check_floating(name: str, keyword: str, loss: Any) -> None:
    dtype = jnp.result_type(loss)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name}: `{keyword}` must return real floating numbers, got {dtype}")


def batch_size(name: str, batch: Any) -> int:
    """The common leading axis `B` of a batch's leaves, or a `ValueError` that shows the shapes."""
    shapes = {
        jax.tree_util.keystr(path) or "batch": jnp.shape(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]
    }
    if not shapes or () in shapes.values() or len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(
            f"{name}: every leaf of `batch` must have the same leading axis [B], got {shapes}"
        )
    return next(iter(shapes.values()))[0]


def unit_weights(batch: Any, dtype: Any) -> jax.Array:
    """Ones `[B]`, laid out over the devices like the examples of the batch."""
    leaf = jax.tree.leaves(batch)[0]
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return 1 + jnp.zeros_like(leaf, dtype).sum(axis=tuple(range(1, leaf.ndim)))


def own_value_and_grad(closure: Closure, params: optax.Params) -> tuple[Any, optax.Updates]:
    """The device's own `(loss, aux)` and gradient; integers have gradients of float0."""
    value_and_grad = jax.value_and_grad(closure.own, has_aux=True, allow_int=True)
    return value_and_grad(closure.devices.vary(params))


def own_loss_and_grad(closure: Closure, params: optax.Params) -> tuple[jax.Array, optax.Updates]:
    """The device's own loss and gradient; integers have gradients of zero."""
    (loss, _), grads = own_value_and_grad(closure, params)
    return loss, tree.keep_floating(grads, params)


def taken_anew(closure: Closure, params: optax.Params) -> tuple[dict[str, Any], Any]:
    """What `update` is told of the loss at `params`, and its aux, taken from it in one pass."""
    (own_value, own_aux), own_grad = own_value_and_grad(closure, params)
    aux = closure.devices.mean(own_aux, closure.devices.share(closure.weights))
    return over_devices(closure, own_value, own_grad, params), aux


def over_devices(
    closure: Closure, own_value: jax.Array, own_grad: optax.Updates, params: optax.Params
) -> dict[str, Any]:
    """What `update` is told of the loss at `params`, of each device's own value and gradient."""
    devices, weights = closure.devices, closure.weights
    value, g = devices.mean((own_value, own_grad), devices.share(weights))
    keywords = {"value": value, "grad": tree.keep_floating(g, params), "value_fn": closure}
    if devices.own_axes:
        ascent_grad = devices.ascent.mean(own_grad, devices.ascent.share(weights))
        keywords["ascent_grad"] = tree.keep_floating(ascent_grad, params)
    return keywords


def weighted_mean(losses: jax.Array, weights: jax.Array | None) -> jax.Array:
    """The mean of losses; `weights` 0 is padding, and nothing but padding has the mean 0."""
    if weights is None:
        return jnp.mean(losses)
    total = jnp.sum(weights)
    return jnp.sum(losses * weights) / jnp.where(total == 0, 1, total)


def mean_loss(
    losses_fn: LossesClosure,
    batch: Any,
    weights: jax.Array | None = None,
    *,
    keeps_losses: bool = False,
) -> Closure:
    """The mean of per-example losses as a closure of the parameters; `weights` 0 is padding.

    With `keeps_losses` its aux is `(aux, Own(losses))`.
    """

    def losses_and_aux(params, batch):
        losses, aux = losses_fn.with_aux(params, batch)
        losses = tree.widen(losses)
        return losses, (aux, Own(losses)) if keeps_losses else aux

    def own(params):
        losses, aux = losses_and_aux(params, batch)
        return weighted_mean(losses, weights), aux

    if losses_fn.num_microbatches > 1:
        given = unit_weights(batch, jnp.float32) if weights is None else weights
        own = partial(accumulated, losses_and_aux, losses_fn.num_microbatches, batch, given)
    return Closure(own, losses_fn.devices, weights)
