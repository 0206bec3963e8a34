"""What is evaluated: the averaged parameters, and BatchNorm's statistics for them."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from samx.averages._iterates import at, wide
from samx.averages._running import EMAState, LatestState, SWAState
from samx.averages._swad import SWADState, of_kind
from samx.core import tree
from samx.core.hyperparams import as_iterator, check_function

KINDS = (EMAState, SWAState, LatestState, SWADState)
LARGE = 2.0**20  # so large that the statistics of a batch are lost beside it


def params(opt_state: optax.OptState, params: Any) -> Any:
    """Return the averaged parameters, for evaluation.

        return the average in `opt_state`, in the dtypes of `params`

    Args:
        opt_state: A state that holds one average: that of `ema`, `swa`, `latest` or `swad`, as it
            is or inside wrappers.
        params: The current parameters.

    Returns:
        A tree like `params`. Before the first iterate is averaged, these are `params`. For `swad`,
        this is before the first segment is closed.

    Raises:
        ValueError: If `opt_state` does not hold exactly one average, or `params` is not a tree like
            those that it was made for.
        TypeError: If a leaf of `params` is not an array.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = samx.averages.swa(optax.sgd(0.25), start=100)
        >>> w = jnp.ones(2)
        >>> samx.averages.params(tx.init(w), w).tolist()
        [1.0, 1.0]

    References:
        `optax.contrib.schedule_free_eval_params`, which does the same for its optimizer.

    Notes:
        Training goes on with `params`, not with the average. Statistics of BatchNorm belong to the
        parameters: see `batch_stats`. Integer leaves are those of `params`. An entry of which
        `latest` stores no finite value is that of `params`.
        Cost: one pass over the average: for `latest` over all its copies, for `swad` over its
        queue. Nothing is sent between devices.
    """
    state = of_kind("params", opt_state, KINDS, "samx.averages")
    tree.check_arrays("params", params)
    tree.check_like("params", params, "opt_state", jax.eval_shape(_one_copy, state))

    def of(w, m):
        return jnp.array(m if tree.is_inexact(w) else w, jnp.result_type(w), copy=True)

    return jax.tree.map(of, params, state.average(jax.tree.map(wide, params)))


def _one_copy(state: Any) -> Any:
    """Return a tree like the average."""
    if isinstance(state, LatestState):
        return at(state.iterates, 0)
    return state.final if isinstance(state, SWADState) else state.mean


def batch_stats(
    fn: Callable[[Any, Any, Any], Any], params: Any, batch_stats: Any, batches: Iterable[Any]
) -> Any:
    """Compute BatchNorm's statistics again, at other parameters, from some batches.

        s_b = the mean and the variance that BatchNorm finds in batch b at `params`
        return (s_1 + ... + s_B) / B

    BatchNorm's own moving average would forget all but the last batches. So its momentum m is
    measured here and taken out: a pass turns statistics s into m s + (1 − m) s_b.

    Args:
        fn: `(params, batch_stats, batch) -> batch_stats`: the statistics after one pass in training
            mode. In Flax linen `lambda p, stats, x: model.apply({"params": p, "batch_stats":
            stats}, x, mutable=["batch_stats"])[1]["batch_stats"]`.
        params: The parameters, usually those of `samx.averages.params`.
        batch_stats: The statistics of the training, a tree of arrays.
        batches: An iterable of batches, one or more.

    Returns:
        A tree like `batch_stats`. Integer leaves, and leaves that `fn` does not change, stay, in
        the passes too: a frozen layer evaluates with them.

    Raises:
        ValueError: If there is no batch, `fn` returns another structure, it changes nothing (it ran
            in evaluation mode), or it changes something that is no moving average, such as what
            spectral normalization keeps.
        TypeError: If `fn` is not a function of three arguments, or `batches` is not an iterable, or
            one array.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, samx
        >>> model = nn.BatchNorm(use_running_average=False, momentum=0.99)
        >>> batches = [jnp.arange(4.0)[:, None], 10 + jnp.arange(4.0)[:, None]]
        >>> variables = jax.jit(model.init)(jax.random.key(0), batches[0])
        >>> def fn(params, stats, x):
        ...     variables = {"params": params, "batch_stats": stats}
        ...     return model.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]
        >>> params, stats = variables["params"], variables["batch_stats"]
        >>> stats = samx.averages.batch_stats(fn, params, stats, batches)
        >>> round(float(stats["mean"][0]), 3), round(float(stats["var"][0]), 3)
        (6.5, 1.25)

    References:
        Izmailov et al., UAI 2018, https://arxiv.org/abs/1803.05407, section 3.2;
        `torch.optim.swa_utils.update_bn`

    Notes:
        As there, every batch counts equally, and the variance is the mean of the variances within
        batches. Rounding of m costs about 1e-7 / (1 − m) of the statistics in float32.
        With a sharded batch under `jax.jit`, the statistics are those of the whole batch. Inside
        `jax.shard_map`, let `fn` average over the devices: `samx.axis_mean`.
        Cost: one forward pass per batch, and three on the first. The pass is compiled once for each
        `fn`, so keep the function.
    """
    check_function("fn", fn, 3)
    tree.check_arrays("params", params)
    tree.check_arrays("batch_stats", batch_stats)
    if tree.is_array(batches):
        raise TypeError(
            "batch_stats: `batches` must be an iterable of batches, got one array; put it in a list"
        )
    batches = as_iterator("batches", batches, "batches")
    given = jax.tree.map(jnp.asarray, batch_stats)
    total, count, share, start = None, 0, None, None
    for batch in batches:
        tree.check_arrays("batches", batch)
        if start is None:
            usual = _pass(fn, params, _widened(given), batch)
            is_kept = jax.tree.map(lambda x, y: jnp.all(x == y), _widened(given), usual)
            start, large = (_filled(given, is_kept, value) for value in (0, LARGE))
        found = _pass(fn, params, start, batch)
        if share is None:
            share = jax.tree.map(_share, is_kept, found, _pass(fn, params, large, batch))
            _check_moving(given, share, found, usual)
        total, count = found if total is None else jax.tree.map(jnp.add, total, found), count + 1
    if share is None:
        raise ValueError("batch_stats: `batches` must hold one batch or more, got none")
    _check_training_mode(given, share)

    def of(s, total, share):
        if not tree.is_inexact(s):
            return jnp.array(s, copy=True)
        return jnp.where(share == 0, s, tree.ratio(total, count * share)).astype(s.dtype)

    return jax.tree.map(of, given, total, share)


def _widened(stats: Any) -> Any:
    return jax.tree.map(lambda s: tree.widen(s) if tree.is_inexact(s) else s, stats)


def _filled(stats: Any, is_kept: Any, value: float) -> Any:
    """Return the statistics, in float32 or wider, with this value where they are not kept."""

    def of(s, keeps):
        return jnp.where(keeps, tree.widen(s), value) if tree.is_inexact(s) else s

    return jax.tree.map(of, stats, is_kept)


@partial(jax.jit, static_argnums=0)
def _pass(fn: Callable[..., Any], params: Any, stats: Any, batch: Any) -> Any:
    """Return the statistics after a pass, in the containers and dtypes of those before it."""
    found = fn(params, stats, batch)
    tree.check_like("fn(params, batch_stats, batch)", found, "batch_stats", stats)
    leaves, structure = jax.tree.flatten(stats)
    pairs = zip(leaves, structure.flatten_up_to(found), strict=True)
    kept = [x.astype(s.dtype) if tree.is_inexact(s) else s for s, x in pairs]
    return jax.tree.unflatten(structure, kept)


def _share(is_kept: jax.Array, from_zero: jax.Array, from_large: jax.Array) -> jax.Array:
    """Return the share 1 − m of a batch in the statistics after it; 0 where they are kept."""
    return jnp.where(is_kept, 0, 1 - (from_large - from_zero) / LARGE)


def _check_moving(stats: Any, share: Any, from_zero: Any, usual: Any) -> None:
    """Require that a pass moves the statistics on a line, where this is known."""
    leaves = jax.tree_util.tree_leaves_with_path(_widened(stats))
    for (path, s), *rest in zip(
        leaves, *map(jax.tree.leaves, (share, from_zero, usual)), strict=True
    ):
        if not tree.is_inexact(s) or not _is_known(s, *rest):
            continue
        part, start, found = rest
        expected = jnp.where(part == 0, start, (1 - part) * s + start)
        error = jnp.abs(expected - found)
        if not jnp.all(error <= 1e-3 * (jnp.abs(s) + jnp.abs(found)) + 1e-6):
            raise ValueError(
                f"batch_stats: `batch_stats`{jax.tree_util.keystr(path)} must be a moving average, "
                "as in BatchNorm; let `fn` keep statistics of another kind as they are"
            )


def _is_known(*arrays: Any) -> bool:
    return not any(isinstance(x, Tracer) or not x.is_fully_addressable for x in arrays)


def _check_training_mode(stats: Any, share: Any) -> None:
    """Require that a batch has a share in some statistics, where this is known."""
    pairs = zip(jax.tree.leaves(stats), jax.tree.leaves(share), strict=True)
    shares = [x for s, x in pairs if tree.is_inexact(s)]
    if _is_known(*shares) and not any(jnp.any(x != 0) for x in shares):
        raise ValueError(
            "batch_stats: `fn` must return the statistics after a pass in training mode, "
            "got those that it was given"
        )
