"""Flax training loops: a linen `TrainState`, and loss closures of an nnx model.

    linen    state.apply_gradients(grads=grads, value_fn=value_fn, batch_stats=batch_stats)
    nnx      optimizer.update(model, grads, value_fn=samx.flax.closure(model, loss))

The state of a model changes once per step: BatchNorm statistics and dropout counters come from your
own forward pass, or from the pass whose aux the optimizer keeps (`aux_like`). All passes of a step
draw the same dropout masks. With `masks="fresh"` the passes at perturbed points draw other masks.

Import it separately, `import samx.flax`: the rest of samx does not need Flax.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any, Literal
from zlib import crc32

import jax
import jax.numpy as jnp
import optax
from flax import core, nnx, struct
from flax.errors import TraceContextError
from flax.training import train_state

from samx.core.captured import captured, replace_captured
from samx.core.closures import value_and_aux
from samx.core.hyperparams import check_choice, check_function, is_typed_key
from samx.core.readings import Readings
from samx.core.sharp import is_sharp_pass
from samx.core.transformation import OWN_KEYWORDS, as_transformation
from samx.training.accumulate import AccumulateState

__all__ = ["TrainState", "closure", "keep_aux", "statistics"]

Masks = Literal["same", "fresh"]
_UPDATE_KEYWORDS = OWN_KEYWORDS - {"ascent_grad"} | {"value", "grad", "value_fn"}
_NNX_OBJECTS = (nnx.Pytree, nnx.Variable)
_NOT_FOUND = (
    "closure: `fn` changes an nnx object (nnx.Rngs, a module, a metric or a variable) that "
    "samx.flax.closure did not find, so a pass would change it outside. Let `fn` capture it "
    "directly: lambda model: loss(model, batch, rngs), or functools.partial(loss, rngs=rngs), not "
    "through an attribute (self.rngs), another module's global, or a function under nnx.jit."
)
_SHARP = crc32(b"sharp pass")  # folded into keys; no counter and no split index reaches it


class TrainState(train_state.TrainState):
    """Flax's `TrainState`, with an `apply_gradients` that passes loss closures to the optimizer.

        params, opt_state = tx(grads; closures)
        step              = step + 1

    `create(apply_fn=..., params=..., tx=..., batch_stats=..., key=...)` makes a state. The last two
    arguments may be left out.

    Attributes:
        step: int32, optimizer steps so far.
        apply_fn: Usually `model.apply`.
        params: The parameters.
        tx: The whole optimizer, sharpness-aware transformation and base together.
        opt_state: The state of `tx`.
        batch_stats: The collection "batch_stats", BatchNorm's running statistics; default none.
        key: The random key of the training run; `rngs` derives the keys of each step from it;
            default none. `create` takes a key from `jax.random.key` or a raw key. The state holds
            its data (`jax.random.key_data`, uint32), so that `flax.serialization.to_bytes`, pickle
            and every other checkpointer keep the state, and the draws go on where they stopped.
        key_impl: The implementation of the key, fixed by `create`; `None` for a raw key. The typed
            key is `jax.random.wrap_key_data(state.key, impl=state.key_impl)`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, samx.flax
        >>> class Model(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         x = nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x))
        ...         return nn.Dense(1)(nn.Dropout(0.1, deterministic=False)(x))
        >>> model, x = Model(), jnp.eye(4)
        >>> keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        >>> state = samx.flax.TrainState.create(
        ...     apply_fn=model.apply,
        ...     **model.init(keys, x),
        ...     key=jax.random.key(2),
        ...     tx=optax.chain(samx.sam(0.05), optax.sgd(0.1)),
        ... )
        >>> @jax.jit
        ... def train_step(state, x):
        ...     def value_fn(params):
        ...         variables = {"params": params, "batch_stats": state.batch_stats}
        ...         y, moved = state.apply_fn(
        ...             variables, x, rngs=state.rngs("dropout"), mutable=["batch_stats"])
        ...         return jnp.mean(y**2), moved["batch_stats"]
        ...     (value, stats), grads = jax.value_and_grad(value_fn, has_aux=True)(state.params)
        ...     return state.apply_gradients(
        ...         grads=grads, value=value, value_fn=value_fn, batch_stats=stats)
        >>> state = train_step(state, x)
        >>> int(state.step), bool(state.batch_stats["BatchNorm_0"]["mean"].any())
        (1, True)
    """

    batch_stats: Any = None
    key: Any = None
    key_impl: Any = struct.field(pytree_node=False, default=None)

    @classmethod
    def create(cls, *, apply_fn, params, tx, **kwargs):
        """Return a new state at step 0, with `tx` initialized; `kwargs` are the other fields."""
        if is_typed_key(key := kwargs.get("key")):
            kwargs |= {"key": jax.random.key_data(key), "key_impl": jax.random.key_impl(key)}
        state = super().create(apply_fn=apply_fn, params=params, tx=tx, **kwargs)
        return state.replace(step=jnp.zeros((), jnp.int32))  # a Python int compiles twice

    def apply_gradients(self, *, grads, extra_args: Mapping[str, Any] | None = None, **kwargs):
        """Take one optimizer step.

        Args:
            grads: Gradient at `params`.
            extra_args: Keywords that only the base optimizer knows.
            **kwargs: The keywords of the contract (`value_fn`, `losses_fn`, `batch`, `weights`,
                `value`, ...), which go to the optimizer. And fields of this state, which replace
                the old ones, for example the `batch_stats` of your own forward pass. A name that
                is both does both, except `apply_fn`: that of the contract goes to the optimizer
                only.

        Returns:
            The state after the step. If the optimizer keeps the aux of a pass (`aux_like`), this
            aux is the new `batch_stats`, whatever you passed. `batch_stats` keep their containers,
            dict or FrozenDict.

        Raises:
            TypeError: If a keyword is neither of the two, or is in `extra_args` too.
            ValueError: If `tx` raises it, or if the aux that the optimizer keeps does not have the
                structure of `batch_stats`.
        """
        names = {f.name for f in fields(self)} - {"apply_fn"}  # this one is for the optimizer
        changes = {name: kwargs[name] for name in names if name in kwargs}
        if "batch_stats" in changes:
            changes["batch_stats"] = _as_frozen(changes["batch_stats"], self.batch_stats)
        keywords = {key: value for key, value in kwargs.items() if key in _UPDATE_KEYWORDS}
        unknown = kwargs.keys() - changes.keys() - keywords.keys()
        if unknown:
            raise TypeError(
                f"apply_gradients: {sorted(unknown)} are neither fields of {type(self).__name__} "
                f"nor keywords of the contract ({', '.join(sorted(_UPDATE_KEYWORDS))}); pass what "
                "only the base optimizer knows as extra_args={...}"
            )
        twice = sorted(keywords.keys() & (extra_args or {}).keys())
        if twice:
            raise TypeError(f"apply_gradients: {twice} are keywords and in `extra_args` too")
        update = as_transformation("TrainState", "tx", self.tx).update
        told = partial(update, **keywords, **(extra_args or {}))
        state = self.replace(tx=optax.GradientTransformation(self.tx.init, told))
        state = super(TrainState, state).apply_gradients(grads=grads, **changes)
        aux = _kept_aux(state.opt_state, self.batch_stats)
        return state.replace(tx=self.tx, **({} if aux is None else {"batch_stats": aux}))

    def rngs(self, *names: str, masks: Masks = "same") -> dict[str, jax.Array]:
        """Return the random keys of this step, for `apply_fn(..., rngs=...)`.

        Args:
            *names: Names of the keys in the model, for example "dropout".
            masks: "same", the default, gives every pass of the step the same keys. "fresh" gives
                other keys to the passes at perturbed points; then call `rngs` inside the loss
                closure.

        Returns:
            One key per name. The keys of two steps differ.

        Raises:
            ValueError: If the state has no `key`, or `masks` is neither "same" nor "fresh".

        Notes:
            The keys are the same on all devices of `jax.shard_map` and `jax.pmap`, unless `key`
            differs between them. They are the same for all microbatches of `accumulate`.
        """
        check_choice("masks", masks, ("same", "fresh"))
        if self.key is None:
            raise ValueError("TrainState.rngs: the state has no `key`; pass create(..., key=...)")
        key = self.key
        if self.key_impl is not None and not is_typed_key(key):
            key = jax.random.wrap_key_data(key, impl=self.key_impl)
        key = jax.random.fold_in(key, self.step)
        if masks == "fresh" and is_sharp_pass():
            key = jax.random.fold_in(key, _SHARP)
        return {name: jax.random.fold_in(key, crc32(name.encode())) for name in names}


def closure(
    model: nnx.Module,
    fn: Callable[..., Any],
    *,
    wrt: nnx.filterlib.Filter = nnx.Param,
    masks: Masks = "same",
) -> Callable[..., tuple[Any, Any]]:
    """Return a loss of an nnx model as a pure function of its parameters, for `Optimizer.update`.

        graph, params, rest = split(copy of model)      (now)
        closure(w, ...)     = fn(copy of merge(graph, w, rest), ...)

    Make the closure before your own forward pass changes the model's statistics and dropout
    counters. Then all passes of the step start from the same values and draw the same masks, and
    no pass changes the model.

    The same holds for nnx objects that `fn` captures: `nnx.Rngs`, other modules, metrics and
    variables. `lambda model: loss(model, batch, rngs)` is fine: every pass uses its own copy of
    `rngs`, as `rngs` was when you made the closure.

    Args:
        model: The model.
        fn: `(model, ...) -> loss` or `(loss, aux)`: a scalar for `value_fn`, `ascent_fn`,
            `training_fn` and `validation_fn`, `[B]` for `losses_fn`, where `...` is the batch.
        wrt: Which variables are the parameters, as in `nnx.Optimizer`; default `nnx.Param`.
        masks: "same", the default, or "fresh": other dropout masks for the passes at perturbed
            points.

    Returns:
        `(params, ...) -> (loss, statistics)`, where `statistics` are those of the model after the
        pass, as the function `statistics` returns them. The aux of `fn` is dropped.

    Raises:
        ValueError: If `masks` is neither "same" nor "fresh"; when called, if `wrt` does not choose
            the parameters that arrive, or if `fn` changes an nnx object that is not found (below).

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx.flax
        >>> from flax import nnx
        >>> model = nnx.Sequential(
        ...     nnx.Linear(2, 8, rngs=nnx.Rngs(0)), nnx.BatchNorm(8, rngs=nnx.Rngs(0)))
        >>> tx = optax.chain(samx.sam(0.05), optax.sgd(0.1))
        >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        >>> @nnx.jit
        ... def train_step(model, optimizer, x):
        ...     loss = lambda model: jnp.mean((model(x) - 1) ** 2)
        ...     value_fn = samx.flax.closure(model, loss)  # before the clean pass
        ...     value, grads = nnx.value_and_grad(loss)(model)
        ...     optimizer.update(model, grads, value=value, value_fn=value_fn)
        ...     return value
        >>> first, second = (train_step(model, optimizer, jnp.eye(2)) for _ in range(2))
        >>> bool(second < first)
        True

    References:
        https://github.com/google/flax/issues/4545, which asks for this.

    Notes:
        Captured objects are found in the closure cells, defaults and bound arguments of `fn`, in
        the globals that it names, in tuples, lists and dicts there, and in the functions among
        these (global ones of the same module only). They are not found in attributes of other
        objects or inside `nnx.jit(fn)`. A captured module that shares parameters with `model` keeps
        its own parameters in all passes, like a constant.
        Cost: none. Only references are copied; without a copy, `nnx.split` would see your own
        forward pass change them. In `jax.shard_map` and `jax.pmap` the closure is that of the
        device; masks are then the same on all devices, unless the model's keys differ. Masks are
        the same for all microbatches of `accumulate`.
    """
    check_choice("masks", masks, ("same", "fresh"))
    _check_module("closure", model)
    check_function("fn", fn)
    _check_filter("wrt", wrt)
    if wrt is True or wrt is ...:
        raise TypeError(f"closure: `wrt` must leave random keys out, such as nnx.Param, got {wrt}")
    own, num_own = _variables(model, wrt), len(jax.tree.leaves(nnx.state(model, wrt)))
    outside = captured(fn, _NNX_OBJECTS)
    tied = [x for x in outside if own & _variables(x)]  # apart: `params` do not move them
    free = [x for x in outside if not own & _variables(x)]
    parts = [nnx.split(nnx.clone(part), nnx.RngKey, ...) for part in ([model, *free], tied)]

    def pure(params, *args):
        num_params = len(jax.tree.leaves(params))
        if num_params != num_own:
            raise ValueError(
                f"closure: `wrt` chooses {num_own} arrays of the model, but {num_params} arrived "
                "as parameters; give closure and nnx.Optimizer the same `wrt`"
            )
        check_function("fn", fn, 1 + len(args))
        fold = _fold if masks == "fresh" and is_sharp_pass() else lambda key: key
        (copy, *copies), constants = (
            nnx.merge(graph, jax.tree.map(fold, keys), rest, copy=True)
            for graph, keys, rest in parts
        )
        nnx.update(copy, params)
        copy_of = dict(zip(map(id, [*free, *tied]), [*copies, *constants], strict=True))
        on_copies = replace_captured(fn, _NNX_OBJECTS, lambda x: copy_of.get(id(x), x))
        try:
            loss, _ = value_and_aux(on_copies(copy, *args))
        except TraceContextError as error:
            raise ValueError(_NOT_FOUND) from error
        return loss, statistics(copy, wrt=wrt)

    return pure


def statistics(model: nnx.Module, *, wrt: nnx.filterlib.Filter = nnx.Param) -> Any:
    """Return what a pass changes in an nnx model: BatchNorm statistics and dropout counters.

        statistics = variables − parameters (trained or not) − random keys − intermediates

    Args:
        model: The model.
        wrt: Which variables are trained, as in `nnx.Optimizer`; default `nnx.Param`.

    Returns:
        A dict of arrays. Pass it as `aux_like` to variants that ignore your own forward pass, or to
        `nnx.update`.

    Raises:
        Nothing.

    Example:
        >>> import samx.flax
        >>> from flax import nnx
        >>> samx.flax.statistics(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
        {'mean': Array([0., 0.], dtype=float32), 'var': Array([1., 1.], dtype=float32)}

    References:
        The filters of `nnx.state`.

    Notes:
        Cost: none.
    """
    _check_module("statistics", model)
    _check_filter("wrt", wrt)
    others = nnx.Not(nnx.Any(wrt, nnx.Param, nnx.RngKey, nnx.Intermediate))
    return nnx.to_pure_dict(nnx.as_pure(nnx.state(model, others)))


def keep_aux(model: nnx.Module, optimizer: nnx.Optimizer) -> None:
    """Update an nnx model with the statistics that the optimizer kept from a pass, if any.

        statistics(model) = aux                         (variants with `aux_like`)

    Call it after `optimizer.update(...)`. Then the same training step serves every variant: those
    that use your own forward pass, which has already changed the statistics, and those that do not.

    Args:
        model: The model; its statistics are replaced.
        optimizer: The optimizer of the model; its state is searched for an `aux`.

    Returns:
        Nothing.

    Raises:
        ValueError: If the aux does not have the structure of `statistics(model)`.

    Example:
        >>> import jax.numpy as jnp, optax, samx.flax
        >>> from flax import nnx
        >>> model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
        >>> x, losses = jnp.eye(2), lambda model, x: jnp.sum(model(x) ** 2, axis=1)
        >>> tx = samx.sampa(
        ...     optax.sgd(0.1), batch_like=x, aux_like=samx.flax.statistics(model))
        >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        >>> losses_fn = samx.flax.closure(model, losses)
        >>> zeros = nnx.state(model, nnx.Param)  # SAMPa ignores the gradient
        >>> _ = optimizer.update(model, zeros, losses_fn=losses_fn, batch=x)
        >>> samx.flax.keep_aux(model, optimizer)
        >>> [round(float(x), 4) for x in model.mean[...]]
        [0.005, 0.005]

    References:
        README, "The contract", rule 3.

    Notes:
        If the optimizer keeps an aux, XLA drops your own forward pass, unless you return something
        else from it. Cost: none.
    """
    _check_module("keep_aux", model)
    if not isinstance(optimizer, nnx.Optimizer):
        kind = type(optimizer).__name__
        raise TypeError(f"keep_aux: `optimizer` must be an nnx.Optimizer, got {kind}")
    aux = _kept_aux(nnx.as_pure(optimizer.opt_state), statistics(model, wrt=optimizer.wrt))
    if aux is not None:
        nnx.update(model, aux)


def _variables(x: Any, chosen: nnx.filterlib.Filter = ...) -> set[int]:
    """Return the identities of the variables in an nnx object."""
    state = nnx.state(x if isinstance(x, nnx.Pytree) else [x], chosen)
    leaves = jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return {id(leaf) for leaf in leaves}


def _check_module(name: str, model: Any) -> None:
    if not isinstance(model, nnx.Module):
        raise TypeError(f"{name}: `model` must be an nnx.Module, got {type(model).__name__}")


def _check_filter(name: str, wrt: Any) -> None:
    try:
        nnx.filterlib.to_predicate(wrt)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`{name}` must be a filter of nnx, such as nnx.Param, got {wrt!r}"
        ) from error


def _fold(key: jax.Array) -> jax.Array:
    """Return another key for each key of an array (`nnx.split_rngs` makes arrays of keys)."""
    folded = jax.vmap(lambda k: jax.random.fold_in(k, _SHARP))(key.reshape(-1))
    return folded.reshape(key.shape)


def _kept_aux(opt_state: Any, statistics: Any) -> Any:
    """Return the aux of a samx state, if any; a parameter called "aux" is not meant."""

    def keeps(node):
        has_readings = isinstance(getattr(node, "readings", None), Readings)
        return isinstance(node, AccumulateState) or (has_readings and hasattr(node, "aux"))

    auxes = [node.aux for node in jax.tree.leaves(opt_state, is_leaf=keeps) if keeps(node)]
    auxes = [core.unfreeze(aux) for aux in auxes if aux is not None]
    if not auxes:
        return None
    aux, expected = auxes[0], core.unfreeze(statistics)
    if len(auxes) > 1 or jax.tree.structure(aux) != jax.tree.structure(expected):
        raise ValueError(
            "the aux that the optimizer keeps must be the model's statistics: give it their "
            f"structure as `aux_like`, {jax.tree.structure(expected)}, and let the closures "
            f"return them as aux; got {', '.join(str(jax.tree.structure(aux)) for aux in auxes)}"
        )
    aux = jax.tree.map(jnp.copy, aux)  # it stands twice in a state that may be donated
    return _as_frozen(aux, statistics)


def _as_frozen(tree: Any, like: Any) -> Any:
    """Return a tree of dicts with the containers of `like`, if they differ in FrozenDicts only."""
    leaves, structure = jax.tree.flatten(core.unfreeze(tree))
    if structure != jax.tree.structure(core.unfreeze(like)):
        return tree
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
