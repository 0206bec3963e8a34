"""The one boundary of the contract: checks, closures in one form, optax's loose types hidden."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from samx import _tree

# The keywords of `update` that are samx's own. optax knows `value`, `grad` and `value_fn` too.
OWN_KEYWORDS = frozenset(
    {"losses_fn", "batch", "weights", "ascent_fn", "labels", "index", "validation_fn"}
)
_SCALAR_CLOSURES = ("value_fn", "ascent_fn", "validation_fn")
_FIXES = {
    "value_fn": "value_fn=lambda p: loss(p, batch)) or, with per-example losses [B], "
    "tx.update(grads, state, params, losses_fn=losses, batch=batch)",
    "losses_fn": "losses_fn=losses, batch=batch), where losses(params, batch) are per example, [B]",
    "batch": "losses_fn=losses, batch=batch), a pytree of arrays [B, ...]",
}


class Closure:
    """A loss closure: calling it gives the loss; `with_aux` gives `(loss, aux)`.

    The caller's closure may return either; an aux that is missing is `None`.
    """

    def __init__(self, with_aux: Callable[..., tuple[jax.Array, Any]]):
        self.with_aux = with_aux

    def __call__(self, *args: Any, **keywords: Any) -> jax.Array:
        """The loss, aux dropped."""
        return self.with_aux(*args, **keywords)[0]


def closure_transformation(
    init_fn: Callable[[Any], Any],
    update_fn: Callable[..., tuple[Any, Any]],
    *,
    name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Turn a variant's `init_fn` and `update_fn` into a checked optax transformation.

        update_fn(updates, state, params, *, value_fn, value=inf, ...)
            required closures are keyword-only arguments without a default;
            keywords that it does not declare are dropped (kept if it has **keywords)

    Every rule of the contract that does not depend on the variant lives here. Closures arrive in
    `update_fn` checked and in one form, whether or not the caller's return an aux:
    `value_fn(params)` is the scalar loss, `value_fn.with_aux(params)` is `(loss, aux)`, and
    `losses_fn(params, batch)` likewise the losses [B]. `value_fn` is derived as the (weighted) mean
    of `losses_fn` over `batch` when the caller gave none.

    Args:
        init_fn: `params -> state`.
        update_fn: As above; returns `(updates, state)`.
        name: What error messages call the transformation; default the name of the function that
            defines `update_fn`.

    Returns:
        An `optax.GradientTransformationExtraArgs`. Integer parameters are left alone: their
        incoming gradient is replaced by zeros of their own dtype, whatever it was.

    Raises:
        ValueError: In `init` and `update`, if `params` is missing or holds `optax.MaskedNode`s; in
            `update`, if a required closure is missing, `value_fn` does not return a scalar,
            `losses_fn` does not return `[B]`, batch leaves differ in length, or `weights` is not
            `[B]`. The message names the transformation, the argument and the fix.
        TypeError: If a closure is not callable or its loss is not a real floating number.

    Example:
        The gradient at a point drawn from a ball, in six lines:

        >>> import jax, jax.numpy as jnp, optax, samx
        >>> def noisy_gradient(radius):
        ...     def update_fn(g, key, params, *, value_fn):
        ...         key, draw = jax.random.split(key)
        ...         eps = optax.tree.random_like(draw, params)
        ...         eps = optax.tree.scale(radius / optax.tree.norm(eps), eps)
        ...         return jax.grad(value_fn)(optax.apply_updates(params, eps)), key
        ...     return samx.closure_transformation(lambda params: jax.random.key(0), update_fn)
        >>> tx = noisy_gradient(0.1)
        >>> params = {"w": jnp.ones(3)}
        >>> tx.update(params, tx.init(params), params)
        Traceback (most recent call last):
            ...
        ValueError: noisy_gradient: `value_fn` is missing. ...

    References:
        The keywords follow optax's line searches: `value`, `grad`, `value_fn`.

    Notes:
        Cost: none; all checks run while tracing. `static_args` under `optax.inject_hyperparams`
        are a matter of the factory that calls this.
    """
    name = name or update_fn.__qualname__.split(".")[0]
    keywords = inspect.signature(update_fn).parameters.values()
    declared = {p.name for p in keywords if p.kind is p.KEYWORD_ONLY}
    required = [p.name for p in keywords if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in keywords)

    def checked_init(params):
        _check_params(name, params)
        return init_fn(params)

    def checked_update(updates, state, params=None, **extra):
        _check_params(name, params)
        extra = unify(name, extra)
        for keyword in required:
            if keyword not in extra:
                raise ValueError(_missing(name, keyword, extra))
        if not takes_all:
            extra = {k: v for k, v in extra.items() if k in declared}
        return update_fn(_tree.keep_floating(updates, params), state, params, **extra)

    return optax.GradientTransformationExtraArgs(checked_init, checked_update)


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
    point = perturbed(params, eps, perturb_dtype)
    moved = zip(jax.tree.leaves(point), jax.tree.leaves(params), strict=True)
    is_widened = any(p.dtype != jnp.result_type(w) for p, w in moved)
    try:
        value, grads = jax.value_and_grad(value_fn, has_aux=has_aux, allow_int=True)(point)
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
    return value, jax.tree.map(lambda g, w: g.astype(jnp.result_type(w)), grads, params)


def perturbed(params: optax.Params, eps: optax.Updates, perturb_dtype: Any) -> optax.Params:
    """The point `w + ε` as the closure sees it, in `perturb_dtype` or wider."""

    def move(w, e):
        w = jnp.asarray(w)
        if not _tree.is_inexact(w):
            return w
        dtype = w.dtype if perturb_dtype is None else jnp.promote_types(w.dtype, perturb_dtype)
        return (w.astype(jnp.promote_types(dtype, jnp.result_type(e))) + e).astype(dtype)

    return jax.tree.map(move, params, eps)


def mean_loss(losses_fn: Closure, batch: Any, weights: jax.Array | None = None) -> Closure:
    """The mean of per-example losses as a closure of the parameters; `weights` 0 is padding."""

    def mean_with_aux(params):
        losses, aux = losses_fn.with_aux(params, batch)
        losses = _tree.widen(losses)
        if weights is None:
            return jnp.mean(losses), aux
        total = jnp.sum(weights)
        return jnp.sum(losses * weights) / jnp.where(total == 0, 1, total), aux

    return Closure(mean_with_aux)


def check_closures(
    params: optax.Params,
    *,
    value_fn: Callable[[Any], Any],
    losses_fn: Callable[[Any, Any], Any],
    batch: Any,
    weights: Any = None,
    rtol: float = 1e-3,
) -> None:
    """Check, once and outside jit, that `value_fn` and `losses_fn` are the same objective.

        | value_fn(w) − Σ weights·losses_fn(w, batch) / Σ weights |  ≤  rtol · |value_fn(w)|

    A step function that passes both lets you swap any variant for any other: some read one, some
    the other. If the two differ, say by a regularizer or by label smoothing, changing the variant
    silently changes the loss.

    Args:
        params: The parameters `w` at which both are evaluated.
        value_fn: `params -> scalar` or `(scalar, aux)`.
        losses_fn: `(params, batch) -> [B]` or `([B], aux)`.
        batch: Pytree of arrays with leading axis `B`.
        weights: `float[B]`, optional; 0 marks padding.
        rtol: Relative tolerance, default 1e-3.

    Returns:
        Nothing.

    Raises:
        ValueError: If they differ, with both numbers; or for arguments that `update` would refuse.

    Example:
        >>> import jax.numpy as jnp, samx
        >>> losses = lambda w, x: (x @ w) ** 2
        >>> x = jnp.eye(2)
        >>> samx.check_closures(
        ...     jnp.ones(2), value_fn=lambda w: losses(w, x).mean(), losses_fn=losses, batch=x)

    References:
        Rule 1 of samx's contract (README, "The contract").

    Notes:
        Cost: two forward passes. Dropout must draw the same masks in both (keys in `batch`).
    """
    given = dict(value_fn=value_fn, losses_fn=losses_fn, batch=batch, weights=weights)
    checked = unify("check_closures", given)
    value = checked["value_fn"](params)
    mean = mean_loss(checked["losses_fn"], batch, checked.get("weights"))(params)
    if not jnp.allclose(value, mean, rtol=rtol, atol=1e-6):
        raise ValueError(
            f"check_closures: value_fn(params) = {float(value):.8g}, but the mean of "
            f"losses_fn(params, batch) = {float(mean):.8g}; they must be the same objective"
        )


def unify(name: str, extra: dict[str, Any]) -> dict[str, Any]:
    """Check the contract's keywords, and make every loss a `Closure`."""
    extra = {k: v for k, v in extra.items() if v is not None}
    for keyword in (*_SCALAR_CLOSURES, "losses_fn"):
        if keyword in extra and not callable(extra[keyword]):
            kind = type(extra[keyword]).__name__
            raise TypeError(f"{name}: `{keyword}` must be a function, got {kind}")
    for keyword in _SCALAR_CLOSURES:
        if keyword in extra:
            extra[keyword] = _scalar_closure(name, keyword, extra[keyword])
    if "losses_fn" in extra:
        extra["losses_fn"] = _losses_closure(name, extra["losses_fn"])
    if "batch" in extra:
        size = batch_size(name, extra["batch"])
        if "weights" in extra:
            extra["weights"] = _tree.widen(extra["weights"])
            if extra["weights"].shape != (size,):
                raise ValueError(
                    f"{name}: `weights` must have one number per example, shape ({size},), "
                    f"got {extra['weights'].shape}"
                )
        if "losses_fn" in extra and "value_fn" not in extra:
            extra["value_fn"] = mean_loss(extra["losses_fn"], extra["batch"], extra.get("weights"))
    return extra


def base_keywords(name: str, keywords: dict[str, Any]) -> dict[str, Any]:
    """What a base optimizer gets to see: nothing of samx's own, and `value_fn` as a scalar."""
    return {k: v for k, v in unify(name, keywords).items() if k not in OWN_KEYWORDS}


def next_step(step: jax.Array) -> jax.Array:
    """The step count after this step; it stays at its largest value instead of overflowing."""
    return jnp.asarray(optax.safe_increment(step))


def at_step(value: optax.ScalarOrSchedule, step: jax.Array) -> Any:
    """A hyperparameter at the optimizer's step: the number itself, or its schedule there.

    In 64-bit mode the schedule gets an int64: a division of int32 would round it to float32.
    """
    return value(step.astype(int)) if callable(value) else value


def check_number(name: str, value: Any, low: float, high: float = float("inf")) -> None:
    """Refuse a Python number outside `[low, high]`; schedules and arrays pass unread."""
    if isinstance(value, str) or value is None:
        raise TypeError(f"`{name}` must be a number or a schedule, got {value!r}")
    if isinstance(value, int | float) and not low <= value <= high:
        wanted = f"at least {low:g}" if high == float("inf") else f"in [{low:g}, {high:g}]"
        raise ValueError(f"`{name}` must be {wanted}, got {value!r}")


def check_count(name: str, value: Any, low: int = 1) -> None:
    """Refuse anything but a Python integer of at least `low`: a count that fixes the program."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"`{name}` must be a Python int, got {type(value).__name__}; under "
            f"optax.inject_hyperparams pass static_args=({name!r},)"
        )
    if value < low:
        raise ValueError(f"`{name}` must be at least {low}, got {value}")


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


def _check_params(name: str, params: Any) -> None:
    if params is None:
        raise ValueError(
            f"{name}: `params` is missing. Call tx.update(grads, state, params, value_fn=...)."
        )
    nodes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    if any(isinstance(node, optax.MaskedNode) for node in nodes):
        raise ValueError(
            f"{name}: `params` holds optax.MaskedNode leaves, so optax.masked or optax.partition "
            "stands around it, and the loss closure cannot run on a part of the parameters. "
            "Choose leaves inside the perturbation instead: "
            "samx.perturbations.on_leaves(perturbation, is_perturbed)."
        )


def _missing(name: str, keyword: str, given: dict[str, Any]) -> str:
    return (
        f"{name}: `{keyword}` is missing. "
        f"Call tx.update(grads, state, params, {_FIXES.get(keyword, f'{keyword}=...)')}. "
        f"Keywords that arrived: {', '.join(sorted(given)) or 'none'}. If you did pass it: "
        "optax.lookahead and optax.MultiSteps(...).gradient_transformation() drop keywords."
    )


def _loss_and_aux(result: Any) -> tuple[Any, Any]:
    return result if isinstance(result, tuple) and len(result) == 2 else (result, None)


def _scalar_closure(name: str, keyword: str, fn: Callable[..., Any]) -> Closure:
    if isinstance(fn, Closure):  # checked by an outer wrapper
        return fn

    def with_aux(*args, **kwargs):
        loss, aux = _loss_and_aux(fn(*args, **kwargs))
        if jnp.shape(loss) != ():
            raise ValueError(
                f"{name}: `{keyword}` must return a scalar (or (scalar, aux)), got shape "
                f"{jnp.shape(loss)}; return the mean, and pass per-example losses as `losses_fn`"
            )
        _check_floating(name, keyword, loss)
        return loss, aux

    return Closure(with_aux)


def _losses_closure(name: str, fn: Callable[..., Any]) -> Closure:
    if isinstance(fn, Closure):
        return fn

    def with_aux(params, batch):
        losses, aux = _loss_and_aux(fn(params, batch))
        size = batch_size(name, batch)
        if jnp.shape(losses) != (size,):
            raise ValueError(
                f"{name}: `losses_fn` must return one loss per example, shape ({size},), "
                f"got {jnp.shape(losses)}"
            )
        _check_floating(name, "losses_fn", losses)
        return losses, aux

    return Closure(with_aux)


def _check_floating(name: str, keyword: str, loss: Any) -> None:
    dtype = jnp.result_type(loss)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name}: `{keyword}` must return real floating numbers, got {dtype}")
