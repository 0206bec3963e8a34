"""Build checked transformations: check the arguments of `update`, give loss closures one form."""

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from samx.core import merging, tree
from samx.core.aliases import Transformation
from samx.core.closures import (
    CLOSURES,
    as_weights,
    batch_size,
    in_two_parts,
    logits_closure,
    losses_closure,
    mean_loss,
    on_features,
    scalar_closure,
)
from samx.core.hyperparams import check_function, check_scalar, check_text
from samx.core.inspection import inside_update, inspect_update
from samx.core.readings import Readings, is_readings, without_requests

# The keywords of `update` that are samx's own. optax knows `value`, `grad` and `value_fn` too.
OWN_KEYWORDS = frozenset(
    {
        "apply_fn",
        "ascent_fn",
        "batch",
        "features_fn",
        "fisher_batch",
        "head_fn",
        "index",
        "labels",
        "loss_on_logits",
        "losses_fn",
        "merge_fn",
        "teacher_fn",
        "training_fn",
        "validation_fn",
        "weights",
    }
)
# Nodes in the parameters by which optax's wrappers are known.
_WRAPPED = ("MaskedNode", "SplitRealAndImaginaryArrays")
SCALAR_CLOSURES = ("value_fn", "ascent_fn", "training_fn", "validation_fn")
# Functions of the parameters and a batch, or of the parameters and features.
MODEL_CLOSURES = ("apply_fn", "features_fn", "head_fn", "teacher_fn")
CLOSURES_OF_PARAMS = (*SCALAR_CLOSURES, "losses_fn", *MODEL_CLOSURES)
_OWN_MESSAGE = re.compile(r"\w+: .*(`state`|state's)")  # of the check of a state
_IN_THREE_PARTS = (
    "features_fn=features, head_fn=head, loss_on_logits=losses, batch=batch), where "
    "features(params, batch) are what the output layer gets, and head(params, features) the logits"
)
_FIXES = {
    "value_fn": "value_fn=lambda p: loss(p, batch)) or, with per-example losses [B], "
    "tx.update(grads, state, params, losses_fn=losses, batch=batch)",
    "losses_fn": "losses_fn=losses, batch=batch), where losses(params, batch) are per example, [B]",
    "batch": "losses_fn=losses, batch=batch), a pytree of arrays [B, ...]",
    "labels": "losses_fn=losses, batch=batch, labels=labels), the class of each example, int[B]",
    "apply_fn": "apply_fn=apply, loss_on_logits=losses, batch=batch), where apply(params, batch) "
    "are the logits, and losses(logits, batch) are per example, [B]",
    "loss_on_logits": "apply_fn=apply, loss_on_logits=losses, batch=batch), where "
    "losses(logits, batch) are per example, [B]",
    "features_fn": _IN_THREE_PARTS,
    "head_fn": _IN_THREE_PARTS,
    "ascent_fn": "value_fn=..., ascent_fn=lambda p: other_loss(p, batch)), the loss to climb",
    "training_fn": "value_fn=..., validation_fn=..., training_fn=lambda p: loss(p, other_batch)), "
    "the loss on training examples that this step does not use, such as the next batch",
    "validation_fn": "value_fn=..., validation_fn=lambda p: loss(p, held_out)), the loss on "
    "examples that are not trained on",
}


def closure_transformation(
    init_fn: Callable[[Any], Any],
    update_fn: Callable[..., tuple[Any, Any]],
    *,
    name: str | None = None,
) -> Transformation:
    """Make a checked optax transformation from a variant's `init_fn` and `update_fn`.

        update_fn(g, state, params, *, value_fn, value=inf, ...) -> (updates, state)

    Every rule of the contract that does not depend on the variant is implemented here:

    - An `update_fn` whose first argument is called `_` does not read the gradient.
    - Keyword-only arguments of `update_fn` without a default must be passed by the caller.
      Keywords that `update_fn` does not declare are dropped, unless it has `**keywords`.
    - Closures arrive checked and in one form, whether or not the caller's closures return an aux:
      `value_fn(params)` is the scalar loss, `value_fn.with_aux(params)` is `(loss, aux)`;
      `losses_fn(params, batch)` and `losses_fn.with_aux(params, batch)` give the losses `[B]`.
      `apply_fn(params, batch)` and `apply_fn.with_aux(params, batch)` give the logits;
      `teacher_fn` too. `features_fn(params, batch)` and `head_fn(params, features)` are the two
      parts of a model.
    - `apply_fn` may be left out if `features_fn` and `head_fn` are given.
    - `losses_fn` may be left out if `apply_fn` and `loss_on_logits` are given. It is then
      `loss_on_logits(apply_fn(params, batch), batch)`.
    - `value_fn` may be left out if `losses_fn` (or its two parts) and `batch` are given. It is then
      the mean of the losses, weighted by `weights` if given.
    - With `merge_fn`, `params -> weights`, all closures take weights: the caller trains adapters,
      and writes the loss of the merged model. Here each closure still takes the parameters.
    - `value` is the loss at `params`, for the readings. If the caller does not pass it, the reading
      `loss` is infinite.
    - `g` is the gradient at `params`. At complex leaves it is the conjugate of `jax.grad`'s: as
      everywhere in optax, the caller conjugates, and what `update_fn` returns is conjugated too.
      Then `w + t g` climbs. `samx.value_and_grad_at` returns gradients in this form. Inside
      `data_parallel`, `g` and the loss and gradient of `value_fn` are means over the devices.
      `losses_fn` gives the losses of the device's own examples. If devices climb separately,
      `value_fn.ascent_grad` is the ascent gradient of this device. Use it only for the direction of
      the perturbation: states must stay equal on all devices.

    These rules hold for all variants and are not repeated in their docstrings:

    - There are three shapes. Most variants stand first in an `optax.chain`: clipping, weight decay
      and the base optimizer come after them. Some wrap the base optimizer, which they take as an
      argument; they forward to it the keywords that are not samx's own. Some are the optimizer.
    - A hyperparameter of type `Radius` or `ScalarOrSchedule` is a number, or a schedule over the
      optimizer's steps. One of type `float` is a number. Numbers are those of Python, NumPy and JAX
      (rank 0), and finite; of a traced number and of a schedule only rank and dtype are checked.
      Counts, which fix the compiled program, are integers of Python or NumPy.
    - `perturbation` replaces the default ball. The radius then belongs to the perturbation:
      `rho` must be left out, and giving both raises a `ValueError`.
    - Under `optax.inject_hyperparams` these are `static_args`: `perturbation` (and `rho` if
      `perturbation` is given), `perturb_dtype`, `name`, `key`, `aux_like`, `batch_like`, and the
      arguments that a docstring adds.

    Args:
        init_fn: `params -> state`.
        update_fn: As above.
        name: Name of the transformation in error messages; default: the name of the function that
            defines `update_fn`.

    Returns:
        A transformation. Integer parameters do not change: their incoming gradient is replaced by
        zeros of the parameter's dtype.

    Raises:
        ValueError: In `init` and `update`, if `params` is missing or holds `optax.MaskedNode`s; in
            `update`, if a required closure is missing, `value_fn` does not return a scalar,
            `losses_fn` does not return `[B]`, batch leaves differ in length, `weights` is not
            `[B]`, or `grads` or `state` are not of these parameters. The message names the
            transformation, the argument and the fix.
        TypeError: If `init_fn` or `update_fn` is not a function of its arguments. In `update`, if a
            closure is not one, its loss is not a real floating number, or `state` is of another
            transformation.

    Example:
        The gradient at a point drawn from a sphere, in seven lines:

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
        Cost: none; all checks run at trace time.
    """
    check_function("init_fn", init_fn, 1)
    check_function("update_fn", update_fn, 3)
    if name is not None:
        check_text("name", name)
    name = name or update_fn.__qualname__.split(".")[0]
    keywords = inspect.signature(update_fn).parameters.values()
    declared = {p.name for p in keywords if p.kind is p.KEYWORD_ONLY}
    required = [p.name for p in keywords if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in keywords)
    reads_gradient = next(iter(keywords)).name != "_"

    trees = _Trees(name, init_fn, _check_params)

    def checked_update(updates, state, params=None, **extra):
        _check_params(name, params)
        given, extra = extra, unify(name, extra)
        for keyword in required:
            if keyword not in extra:
                raise ValueError(missing(name, keyword, extra))
        updates, is_frozen = _filled(updates, params)
        trees.check(updates, state, params)
        if is_frozen is not None:
            extra = freeze_leaves(extra, is_frozen)
        updates = tree.keep_floating(updates, params)
        passed = {k: v for k, v in extra.items() if given.get(k) is not None}
        inspect_update(name, updates if reads_gradient else None, params, passed)
        if not takes_all:
            extra = {k: v for k, v in extra.items() if k in declared}
        try:
            with inside_update():
                updates, new_state = update_fn(updates, state, params, **extra)
        except Exception as error:
            trees.explain(state, params, error)
            raise
        if is_frozen is not None:
            updates = jax.tree.map(lambda u, held: None if held else u, updates, is_frozen)
        return updates, new_state

    return optax.GradientTransformationExtraArgs(trees.init, checked_update)


def checked_transformation(
    name: str, init_fn: Callable[[Any], Any], update_fn: Callable[..., tuple[Any, Any]]
) -> Transformation:
    """Make a transformation that reads no closure itself: its trees are checked.

    It may stand inside `optax.masked`, and without `params` if `update_fn` does not need them.
    """
    trees = _Trees(name, init_fn, _check_leaves)

    def checked_update(updates, state, params=None, **extra):
        if params is not None:
            _check_leaves(name, params)
        trees.check(updates, state, params)
        try:
            return update_fn(updates, state, params, **extra)
        except Exception as error:
            trees.explain(state, params, error)
            raise

    return optax.GradientTransformationExtraArgs(trees.init, checked_update)


def unify(name: str, extra: dict[str, Any]) -> dict[str, Any]:
    """Check the keywords of `update`, and turn every loss function into a closure object."""
    extra = {k: v for k, v in extra.items() if v is not None}
    for keyword in (*CLOSURES_OF_PARAMS, "loss_on_logits", "merge_fn"):
        if keyword in extra and not callable(extra[keyword]):
            kind = type(extra[keyword]).__name__
            raise TypeError(f"{name}: `{keyword}` must be a function, got {kind}")
    # Closures from an outer wrapper see the parameters through `merge_fn` already.
    callers = [
        k for k in CLOSURES_OF_PARAMS if not isinstance(extra.get(k), (*CLOSURES, type(None)))
    ]
    if "merge_fn" in extra:
        extra |= {k: merging.taking_weights(extra[k]) for k in callers}
    for keyword in SCALAR_CLOSURES:
        if keyword in extra:
            extra[keyword] = scalar_closure(name, keyword, extra[keyword])
    if "losses_fn" in extra:
        extra["losses_fn"] = losses_closure(name, extra["losses_fn"])
    for keyword in MODEL_CLOSURES:
        if keyword in extra:
            extra[keyword] = logits_closure(name, extra[keyword], keyword)
    if "merge_fn" in extra:
        weights_of = merging.view(extra["merge_fn"])
        extra |= {k: extra[k].compose(weights_of) for k in callers}
    if {"features_fn", "head_fn"} <= extra.keys() and "apply_fn" not in extra:
        extra["apply_fn"] = on_features(name, extra["features_fn"], extra["head_fn"])
    if {"apply_fn", "loss_on_logits"} <= extra.keys() and "losses_fn" not in extra:
        extra["losses_fn"] = in_two_parts(name, extra["apply_fn"], extra["loss_on_logits"])
    if "value" in extra:
        check_scalar("value", extra["value"])
    if "batch" in extra:
        size = batch_size(name, extra["batch"])
        if "weights" in extra:
            extra["weights"] = as_weights(name, extra["weights"])
            if extra["weights"].shape != (size,):
                raise ValueError(
                    f"{name}: `weights` must have one number per example, shape ({size},), "
                    f"got {extra['weights'].shape}"
                )
        if "losses_fn" in extra and "value_fn" not in extra:
            extra["value_fn"] = mean_loss(extra["losses_fn"], extra["batch"], extra.get("weights"))
    return extra


def freeze_leaves(extra: dict[str, Any], is_frozen: Any) -> dict[str, Any]:
    """Return the keywords with closures whose gradient is zero at the frozen leaves."""

    def frozen(params):
        if isinstance(params, merging.Merged):  # weights: nothing of them is a parameter
            return params
        return jax.tree.map(
            lambda w, held: jax.lax.stop_gradient(w) if held else w, params, is_frozen
        )

    return extra | {k: extra[k].compose(frozen) for k in CLOSURES_OF_PARAMS if k in extra}


def as_transformation(name: str, keyword: str, tx: Any) -> Transformation:
    """Return `tx` as a transformation that takes every keyword.

    An `update` with `**keywords` gets them, whatever the type of `tx` is: `optax.MultiSteps` is no
    `GradientTransformationExtraArgs`. Raises a `TypeError` if `tx` is not an optax transformation.
    """
    check_text("name", name)
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        kind = type(tx).__name__
        hint = f"; call {tx.__name__}(...)" if inspect.isfunction(tx) else ""
        raise TypeError(f"{name}: `{keyword}` must be an optax transformation, got {kind}{hint}")
    kinds = {parameter.kind for parameter in inspect.signature(tx.update).parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        tx = optax.GradientTransformationExtraArgs(tx.init, tx.update)
    tx = optax.with_extra_args_support(tx)
    is_perturbation = keyword == "perturbation"
    init_fn = partial(_init_perturbation, name, tx.init) if is_perturbation else tx.init
    return optax.GradientTransformationExtraArgs(init_fn, tx.update)


def check_in_front(name: str, state: Any) -> None:
    """Raise a `ValueError` if the state is that of a variant that wraps a base, or is one."""

    def is_step(node):
        return "base" in getattr(node, "_fields", ()) or getattr(node, "is_optimizer", False)

    for node in jax.tree.leaves(state, is_leaf=is_step):
        if is_step(node):
            raise ValueError(
                f"{name}: `inner` must stand in front of a base, but it wraps one or is one "
                f"({type(node).__name__}); its updates are optimizer steps, not gradients"
            )


def base_keywords(name: str, keywords: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords for a base optimizer: without samx's own, and `value_fn` as a scalar."""
    return {k: v for k, v in unify(name, keywords).items() if k not in OWN_KEYWORDS}


class _Trees:
    """Checks of the trees that `init` and `update` of one transformation get."""

    def __init__(self, name: str, init_fn: Any, check_params: Callable[[str, Any], None]):
        self.name, self.init_fn, self.check_params = name, init_fn, check_params
        self.kind: Any = object  # the class of the state, once `init` has made one

    def init(self, params: Any) -> Any:
        """Check `params`, and return the state."""
        self.check_params(self.name, params)
        state = self.init_fn(params)
        tree.check_arrays("state", state, has_shapes=True)
        self.kind = type(state) if hasattr(state, "_fields") else object
        return state

    def check(self, updates: Any, state: Any, params: Any) -> None:
        """Require gradients like the parameters, and a state of the right class."""
        if not isinstance(state, self.kind):
            raise TypeError(
                f"{self.name}: `state` must be a {self.kind.__name__}, which `init` returns, "
                f"got a {type(state).__name__}"
            )
        if params is None:
            return
        try:
            tree.check_like("grads", updates, "params", params)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.name}: {error}") from error

    def explain(self, state: Any, params: Any, error: Exception) -> None:
        """Raise a `ValueError` if `update` failed without the right state, or without `params`."""

        def shapes(state):
            state = jax.tree.map(without_requests, state, is_leaf=is_readings)
            leaves = jax.tree.leaves(state)
            return jax.tree.structure(state), [
                f"{jnp.result_type(x)}{list(jnp.shape(x))}" if tree.is_array(x) else type(x)
                for x in leaves
            ]

        if _OWN_MESSAGE.match(str(error)):
            return
        if params is None:
            raise ValueError(no_params(self.name)) from error
        try:
            wanted, found = shapes(jax.eval_shape(self.init_fn, params)), shapes(state)
        except Exception:
            return
        if wanted != found:
            raise ValueError(
                f"{self.name}: `state` must be what `init` returns for these parameters, "
                f"{wanted}, got {found}"
            ) from error


def _init_perturbation(name: str, init_fn: Callable[[Any], Any], params: Any) -> Any:
    state = init_fn(params)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Readings))
    if any(isinstance(node, Readings) for node in nodes):
        raise ValueError(
            f"{name}: `perturbation` must map a gradient to a step, such as "
            f"samx.perturbations.metric_ball(rho), got a transformation with the state "
            f"{type(state).__name__}, which takes gradients at a perturbed point itself"
        )
    return state


def _check_params(name: str, params: Any) -> None:
    if params is None:
        raise ValueError(no_params(name))
    nodes = jax.tree.leaves(params, is_leaf=lambda x: type(x).__name__ in _WRAPPED)
    if any(isinstance(node, optax.MaskedNode) for node in nodes):
        raise ValueError(
            f"{name}: `params` holds optax.MaskedNode leaves, so optax.masked or optax.partition "
            "wraps this transformation. The loss closure cannot run on a part of the parameters. "
            "Choose leaves inside the perturbation instead: "
            "samx.perturbations.on_leaves(perturbation, is_perturbed), or freeze them: "
            "samx.freeze(tx, mask)."
        )
    if any(type(node).__name__ == "SplitRealAndImaginaryArrays" for node in nodes):
        raise ValueError(
            f"{name}: `params` are split into real and imaginary parts, so "
            "optax.contrib.split_real_and_imaginary wraps this transformation. The loss closure "
            "needs complex parameters. Wrap the base alone: optax.chain(samx.sam(...), "
            "optax.contrib.split_real_and_imaginary(base))."
        )
    tree.check_no_keys(name, params)
    _check_leaves(name, params)


def _filled(updates: Any, params: Any) -> tuple[Any, Any]:
    """Return the gradient with zeros where it is `None`, and where that is; `None` if nowhere."""

    def is_none(x):
        return x is None

    (given, a), (wanted, b) = (jax.tree.flatten(x, is_leaf=is_none) for x in (updates, params))
    pairs = [(g, w) for g, w in zip(given, wanted, strict=False) if w is not None]
    if a != b or not 0 < sum(g is None for g, _ in pairs) < len(pairs):
        return updates, None
    filled = [jnp.zeros_like(w) if g is None else g for g, w in pairs]
    is_frozen = [g is None for g, _ in pairs]
    structure = jax.tree.structure(params)
    return tuple(jax.tree.unflatten(structure, leaves) for leaves in (filled, is_frozen))


def no_params(name: str) -> str:
    """Return the message for an `update` without parameters."""
    return f"{name}: `params` is missing. Call tx.update(grads, state, params, value_fn=...)."


def _check_leaves(name: str, params: Any) -> None:
    try:
        tree.check_arrays("params", params, has_shapes=True)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None


def missing(name: str, keyword: str, given: dict[str, Any]) -> str:
    """Return the message for a keyword that `update` did not get."""
    return (
        f"{name}: `{keyword}` is missing. "
        f"Call tx.update(grads, state, params, {_FIXES.get(keyword, f'{keyword}=...)')}. "
        f"Keywords that arrived: {', '.join(sorted(given)) or 'none'}. If you did pass it: "
        "flax.training.train_state.TrainState never passes keywords to the optimizer (use "
        "samx.flax.TrainState), and optax.MultiSteps(...).gradient_transformation() drops them."
    )
