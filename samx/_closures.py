"""Loss closures in one form, and the gradient of one at a perturbed point."""

from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx import _tree
from samx._devices import ONE_DEVICE, Devices
from samx._microbatches import accumulated

_IS_SHARP_PASS = ContextVar("is_sharp_pass", default=False)


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

    def __call__(self, params: Any, batch: Any) -> jax.Array:
        """The losses `[B]`, aux dropped."""
        return self.with_aux(params, batch)[0]


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


def value_and_grad_at(
    value_fn: Callable[[Any], Any],
    params: optax.Params,
    eps: optax.Updates,
    *,
    has_aux: bool = False,
    perturb_dtype: Any = jnp.float32,
) -> tuple[Any, optax.Updates]:
    """Loss and gradient at the perturbed point, `params` untouched.

        L(w + ε), ∇L(w + ε)

    The gradient has the dtypes of `params`. Half-precision leaves are handed to the closure as
    `perturb_dtype(w) + ε`: a step of radius 0.05 spread over many weights is below half a unit in
    the last place of bfloat16, and would round to nothing. Integer leaves are handed over as they
    are and get a zero gradient.

    Args:
        value_fn: `params -> scalar`, or `params -> (scalar, aux)` with `has_aux`.
        params: The parameters `w`.
        eps: The perturbation, shaped like `params`.
        has_aux: As in `jax.value_and_grad`; default False.
        perturb_dtype: Lowest precision of the point that the closure sees; `None` keeps the
            parameters' dtypes.

    Returns:
        `(loss, gradient)`, with `has_aux` `((loss, aux), gradient)`.

    Raises:
        TypeError: If the closure fails on the widened parameters; the message names
            `perturb_dtype`.

    Example:
        >>> import jax.numpy as jnp, samx
        >>> loss, g = samx.value_and_grad_at(lambda w: w @ w, jnp.ones(2), 0.5 * jnp.ones(2))
        >>> float(loss), g.tolist()
        (4.5, [3.0, 3.0])

    References:
        Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization",
        ICLR 2021, https://arxiv.org/abs/2010.01412 (line 4 of the algorithm).

    Notes:
        Cost: one forward and one backward pass, one transient copy of the parameters.
    """
    closure = scalar_closure("value_and_grad_at", "value_fn", value_fn)
    start = closure.devices.vary_left_out(
        jax.tree.map(lambda w: _widened(w, perturb_dtype), params)
    )
    is_widened = any(
        x.dtype != jnp.result_type(w)
        for x, w in zip(*map(jax.tree.leaves, (start, params)), strict=True)
    )

    def at_point(start):
        with _sharp_pass():
            return closure.with_aux(start, lambda w: perturbed(w, eps, None))

    try:
        value, grads = jax.value_and_grad(at_point, has_aux=True, allow_int=True)(start)
    except TypeError as error:
        if not is_widened:
            raise
        raise TypeError(
            "the loss closure failed at the perturbed point, where half-precision parameters "
            f"arrive in {jnp.dtype(perturb_dtype).name} so that the perturbation is not rounded "
            "away. Make the closure accept that dtype (float32 parameters with half-precision "
            "compute do), or opt out with perturb_dtype=None."
        ) from error
    grads = _tree.keep_floating(grads, params)  # float0 at the integers
    grads = jax.tree.map(lambda g, w: g.astype(jnp.result_type(w)), grads, params)
    return value if has_aux else value[0], grads


def is_sharp_pass() -> bool:
    """Whether a loss closure is being called at a perturbed point: for randomness of its own there.

        key = fold_in(key, 1)  if  is_sharp_pass()      fresh dropout masks in the sharp pass

    A closure that does not ask draws the same masks in every pass of a step, from the key that it
    closes over: then the perturbation alone tells the passes apart.

    Returns:
        A Python bool: True while `value_and_grad_at` calls the closure, otherwise False.

    Raises:
        Nothing.

    Example:
        >>> import jax, jax.numpy as jnp, samx
        >>> def loss(w):
        ...     print("sharp" if samx.is_sharp_pass() else "clean")
        ...     return w @ w
        >>> w, tx = jnp.ones(2), samx.sam(0.1)
        >>> g = jax.grad(loss)(w)
        clean
        >>> updates, state = tx.update(g, tx.init(w), w, value_fn=loss)
        sharp

    References:
        google-research/sam draws the same masks in both passes, davda54/sam fresh ones.

    Notes:
        An answer at trace time. A function that keeps its trace, such as one of your own under
        `jax.jit` or `jax.checkpoint`, would keep the answer too: ask outside of it, and pass it a
        key. SAMPa has no clean pass: both of its gradients are taken at perturbed points. Cost:
        none.
    """
    return _IS_SHARP_PASS.get()


@contextmanager
def _sharp_pass():
    token = _IS_SHARP_PASS.set(True)
    try:
        yield
    finally:
        _IS_SHARP_PASS.reset(token)


def own_value_and_grad(closure: Closure, params: optax.Params) -> tuple[Any, optax.Updates]:
    """The device's own `(loss, aux)` and gradient; integers have gradients of float0."""
    value_and_grad = jax.value_and_grad(closure.own, has_aux=True, allow_int=True)
    return value_and_grad(closure.devices.vary(params))


def taken_anew(closure: Closure, params: optax.Params) -> tuple[dict[str, Any], Any]:
    """What `update` is told of the loss at `params`, and its aux, taken from it in one pass."""
    devices, weights = closure.devices, closure.weights
    (value, aux), own_grad = own_value_and_grad(closure, params)
    value, aux, g = devices.mean((value, aux, own_grad), devices.share(weights))
    keywords = {"value": value, "grad": _tree.keep_floating(g, params), "value_fn": closure}
    if devices.own_axes:
        ascent_grad = devices.ascent.mean(own_grad, devices.ascent.share(weights))
        keywords["ascent_grad"] = _tree.keep_floating(ascent_grad, params)
    return keywords, aux


def first_aux(aux_like: Any) -> Any:
    """The aux that a state holds before its first pass: `aux_like` itself, zeros for a shape."""

    def first(x):
        is_shape = isinstance(x, jax.ShapeDtypeStruct)
        return jnp.zeros(x.shape, x.dtype) if is_shape else jnp.array(x, copy=True)

    return jax.tree.map(first, aux_like)


def check_like(name: str, keyword: str, value: Any, like: Any, fix: str) -> None:
    """Refuse what differs from the shapes and dtypes that a state holds."""

    def describe(tree):
        return jax.tree.map(lambda x: (jnp.shape(x), str(jnp.result_type(x))), tree)

    if describe(value) != describe(like):
        raise ValueError(
            f"{name}: `{keyword}` must have the shapes and dtypes of `{keyword}_like`, "
            f"{describe(like)}, got {describe(value)}; {fix}"
        )


def perturbed(params: optax.Params, eps: optax.Updates, perturb_dtype: Any) -> optax.Params:
    """The point `w + ε` as the closure sees it, in `perturb_dtype` or wider."""

    def move(w, e):
        w = _widened(w, perturb_dtype)
        if not _tree.is_inexact(w):
            return w
        return (w.astype(jnp.promote_types(w.dtype, jnp.result_type(e))) + e).astype(w.dtype)

    return jax.tree.map(move, params, eps)


def _widened(w: Any, dtype: Any) -> jax.Array:
    w = jnp.asarray(w)
    if dtype is None or not _tree.is_inexact(w):
        return w
    return w.astype(jnp.promote_types(w.dtype, dtype))


def mean_loss(losses_fn: LossesClosure, batch: Any, weights: jax.Array | None = None) -> Closure:
    """The mean of per-example losses as a closure of the parameters; `weights` 0 is padding."""

    def own(params):
        losses, aux = losses_fn.with_aux(params, batch)
        losses = _tree.widen(losses)
        if weights is None:
            return jnp.mean(losses), aux
        total = jnp.sum(weights)
        return jnp.sum(losses * weights) / jnp.where(total == 0, 1, total), aux

    if losses_fn.num_microbatches > 1:
        given = unit_weights(batch, jnp.float32) if weights is None else weights
        own = partial(accumulated, losses_fn.with_aux, losses_fn.num_microbatches, batch, given)
    return Closure(own, losses_fn.devices, weights)
