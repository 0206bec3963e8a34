"""AsyncSAM on two devices: one computes descent gradients, the other one ascent gradients.

One Python thread drives both devices. Calls of compiled functions return before their results are
computed, and a device waits for the other one only where it needs a result. The result is that of
`async_sam` on one device.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from samx.core import tree
from samx.core.closures import batch_size
from samx.core.hyperparams import as_count, as_iterator, check_function
from samx.variants.async_sam import AsyncSAMState

__all__ = ["AscentBatch", "PipelinedStep", "calibrate_ascent_batch", "pipelined"]


class PipelinedStep(NamedTuple):
    """Result of a step of `pipelined`: arrays that may not be computed yet.

    Attributes:
        params: The parameters. The next step takes their memory and that of `opt_state`: copy what
            you want to keep for longer.
        opt_state: The same optimizer state as after this step on one device, ready for a
            checkpoint.
        out: The third result of `descend`.

    Example:
        >>> import jax.numpy as jnp, samx
        >>> samx.asynchronous.PipelinedStep(jnp.ones(2), (), out=jnp.ones(())).out.shape
        ()
    """

    params: Any
    opt_state: Any
    out: Any


def pipelined(
    descend: Callable[[Any, Any, Any, Any], tuple[Any, Any, Any]],
    ascend: Callable[[Any, Any], Any],
    params: Any,
    opt_state: Any,
    batches: Iterable[tuple[Any, Any]],
    *,
    descent_device: Any,
    ascent_device: Any,
) -> Iterator[PipelinedStep]:
    """Train with `async_sam` on two devices, for example a GPU and the CPU of its host.

        for batch, ascent_batch in batches:
            a = ascend(params, ascent_batch)                               on `ascent_device`
            params, opt_state, out = descend(params, opt_state, batch, ·)  on `descent_device`
            a goes into opt_state; the next step climbs it

    The results are those of `async_sam` on one device with the same ascent gradients.

    Args:
        descend: `(params, opt_state, batch, ascent_grad) -> (params, opt_state, out)`: your step.
            It passes `ascent_grad` to `tx.update` as the incoming gradient, and passes no
            `ascent_fn`. `tx` contains an `async_sam`. `pipelined` compiles `descend`.
        ascend: `(params, ascent_batch) -> gradient`, `jax.grad` of your mean loss; conjugate it if
            parameters are complex. `pipelined` compiles `ascend`.
        params: The parameters; they are copied.
        opt_state: `tx.init(params)`, or a state from a checkpoint; it is copied.
        batches: Pairs of a batch and its ascent batch, pytrees of host or device arrays. A pair is
            fetched after the step before it was handed out, usually while that step is computed.
        descent_device: The faster device.
        ascent_device: The other device.

    Returns:
        An iterator of `PipelinedStep`s, one for each pair. If `batches` raises an error, holds
        something else than a pair, or holds a batch that your functions cannot take, the last step
        stays usable: save it, or continue from it with a new call. The same holds if you stop
        early.

    Raises:
        ValueError: If `opt_state` holds no state of `async_sam` or several, or if `async_sam` is
            inside another transformation of samx, which would read the incoming gradient too.
        TypeError: If a function does not take its arguments, a device is not one, or `batches` does
            not hold pairs.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> loss = lambda w, x: ((x @ w) ** 2).mean()
        >>> tx = optax.chain(samx.async_sam(rho=0.1), optax.sgd(0.1))
        >>> def descend(w, state, x, ascent_grad):
        ...     updates, state = tx.update(ascent_grad, state, w, value_fn=lambda w: loss(w, x))
        ...     return optax.apply_updates(w, updates), state, optax.tree.get(state, "sharp_loss")
        >>> fast, slow = jax.devices()[0], jax.devices("cpu")[-1]
        >>> w, x = jnp.ones(2), jnp.eye(4, 2)
        >>> steps = samx.asynchronous.pipelined(
        ...     descend, jax.grad(loss), w, tx.init(w), [(x, x[:2])] * 3,
        ...     descent_device=fast, ascent_device=slow)
        >>> [round(float(step.out), 3) for step in steps]
        [0.5, 0.521, 0.47]

    References:
        Jo, Lim, Lee, "Asynchronous Sharpness-Aware Minimization For Fast and Accurate Deep
        Learning", 2025, https://arxiv.org/abs/2503.11147

    Notes:
        Cost per step: one gradient on each device, and two copies of the parameters between them.
        A step takes the time of the slower device, see `calibrate_ascent_batch`. Reading a result
        of a step (`float(step.out)`) waits for that step. If you read one in every step, both
        devices idle while the next pair is fetched: let your data loader prefetch, or read every
        few steps. Reading between the two halves of a step, or host callbacks inside them, would
        end the overlap. On one device the two halves run one after the other. With a GPU, jax sees
        the CPU if JAX_PLATFORMS is `cuda,cpu` or not set.
    """
    check_function("descend", descend, 4)
    check_function("ascend", ascend, 2)
    tree.check_arrays("params", params)
    tree.check_arrays("opt_state", opt_state)
    batches = as_iterator("batches", batches, "pairs (batch, ascent_batch)")
    _check_devices(descent_device, ascent_device)
    descend = jax.jit(_with_held_ascent(descend), donate_argnums=(0, 1))
    ascend = jax.jit(ascend)
    # A step donates these arrays; the caller must not lose its own.
    params, opt_state = jax.device_put((params, opt_state), descent_device, may_alias=False)
    is_first = int(_held(opt_state).step) == 0

    def steps(params, opt_state, is_first):
        for pair in batches:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                got = type(pair).__name__
                raise TypeError(
                    f"pipelined: `batches` must hold pairs (batch, ascent_batch), got a {got}"
                )
            tree.check_arrays("batches", pair)
            batch = jax.device_put(pair[0], descent_device)
            ascent_batch = jax.device_put(pair[1], ascent_device)
            a = ascend(jax.device_put(params, ascent_device), ascent_batch)
            a = jax.device_put(a, descent_device)
            if is_first:  # only the first step may climb its own, and only it waits
                opt_state, is_first = _hold(opt_state, jax.tree.map(_copy, a)), False
            params, opt_state, out = descend(params, opt_state, batch)
            opt_state = _hold(opt_state, a)
            # Before the next pair is fetched, which may fail: the step must not be lost with it.
            yield PipelinedStep(params, opt_state, out)

    return steps(params, opt_state, is_first)


class AscentBatch(NamedTuple):
    """Result of `calibrate_ascent_batch`: its decision and its measurements.

    Attributes:
        size: The ascent batch size b′ to use.
        is_hidden: Whether an ascent gradient of that size takes no longer than a descent gradient.
            False only if even the smallest size takes longer.
        descent_seconds: Median seconds of a descent gradient of the whole batch.
        ascent_seconds: For each size that was tried, median seconds of the ascent gradient with
            both copies.
        copy_seconds: Median seconds of the two copies alone.

    Example:
        >>> from samx.asynchronous import AscentBatch
        >>> AscentBatch(8, True, 0.010, {8: 0.009, 16: 0.017}, copy_seconds=0.002).size
        8
    """

    size: int
    is_hidden: bool
    descent_seconds: float
    ascent_seconds: dict[int, float]
    copy_seconds: float


def calibrate_ascent_batch(
    grad_fn: Callable[[Any, Any], Any],
    params: Any,
    batch: Any,
    *,
    descent_device: Any,
    ascent_device: Any,
    multiple: int = 8,
    repeats: int = 5,
) -> AscentBatch:
    """Find the largest ascent batch whose gradient takes no longer than the descent gradient.

        b′ = max { k = multiple, 2·multiple, ..., b :  t_copy + t_ascent(k) ≤ t_descent(b) }

    Times are measured once, on each device separately, after compilation. A compiled step has fixed
    shapes, so call this before training, not during it.

    Args:
        grad_fn: `(params, batch) -> gradient`, `jax.grad` of your mean loss.
        params: The parameters.
        batch: A batch of the size b of a descent step, any pytree with leading axis b.
        descent_device: The faster device.
        ascent_device: The other device.
        multiple: The sizes to try are multiples of this number, and b itself; default 8.
        repeats: Measurements of each size; their median counts; default 5.

    Returns:
        An `AscentBatch`, with the decision and the measurements.

    Raises:
        ValueError: If `batch` is empty, or its leaves have no leading axis or differ in length; if
            `params` has no floating leaf; if the gradient is not shaped like `params`; or if a
            count is below 1.
        TypeError: If `multiple` or `repeats` is not a Python int, `grad_fn` not a function of two
            arguments that returns arrays, a leaf not an array, or a device is not one.

    Example:
        >>> import jax, jax.numpy as jnp, samx
        >>> grad_fn = jax.grad(lambda w, x: ((x @ w) ** 2).mean())
        >>> device = jax.devices()[0]
        >>> found = samx.asynchronous.calibrate_ascent_batch(
        ...     grad_fn, jnp.ones(4), jnp.ones((24, 4)), descent_device=device,
        ...     ascent_device=device)
        >>> found.size in (8, 16, 24)
        True

    References:
        Jo, Lim, Lee, 2025, https://arxiv.org/abs/2503.11147, whose ascent batch is "system-aware";
        the procedure is ours.

    Notes:
        The size is found by bisection: about log₂(b / multiple) sizes are compiled, and each runs
        `repeats` times. If a device slows down while the other one works, this is not measured.
    """
    check_function("grad_fn", grad_fn, 2)
    tree.check_arrays("params", params)
    tree.check_arrays("batch", batch)
    _check_devices(descent_device, ascent_device)
    multiple = as_count("multiple", multiple)
    repeats = as_count("repeats", repeats)
    whole = batch_size("calibrate_ascent_batch", batch)
    if not any(map(tree.is_inexact, jax.tree.leaves(params))):
        raise ValueError(
            "calibrate_ascent_batch: `params` must have a floating leaf, got "
            f"{jax.tree.map(jnp.result_type, params)}"
        )
    found = jax.eval_shape(grad_fn, params, batch)
    tree.check_like("grad_fn(params, batch)", found, "params", params)
    sizes = [*range(multiple, whole, multiple), whole]
    gradient = jax.jit(grad_fn)
    on_descent = jax.device_put(params, descent_device)

    def there_and_back(fn):
        there = jax.device_put(on_descent, ascent_device)
        return jax.device_put(fn(there), descent_device)

    def ascent(size):
        part = jax.device_put(jax.tree.map(lambda x: x[:size], batch), ascent_device)
        return _median_seconds(lambda: there_and_back(lambda p: gradient(p, part)), repeats)

    batch_there = jax.device_put(batch, descent_device)
    descent_seconds = _median_seconds(lambda: gradient(on_descent, batch_there), repeats)
    copy_seconds = _median_seconds(lambda: there_and_back(lambda p: p), repeats)
    ascent_seconds = {}
    low, high = 0, len(sizes)  # sizes below `low` are hidden, those from `high` on are not
    while low < high:
        middle = (low + high) // 2
        seconds = ascent_seconds[sizes[middle]] = ascent(sizes[middle])
        low, high = (middle + 1, high) if seconds <= descent_seconds else (low, middle)
    chosen = sizes[max(low - 1, 0)]
    return AscentBatch(
        chosen, low > 0, descent_seconds, dict(sorted(ascent_seconds.items())), copy_seconds
    )


def _check_devices(descent_device, ascent_device):
    devices = {"descent_device": descent_device, "ascent_device": ascent_device}
    for keyword, device in devices.items():
        if not isinstance(device, jax.Device | jax.sharding.Sharding):
            kind = type(device).__name__
            raise TypeError(f"`{keyword}` must be a device or a sharding of JAX, got {kind}")


def _median_seconds(fn, repeats):
    jax.block_until_ready(fn())  # compiles
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(fn())
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def _copy(x):
    return x + 0


def _with_held_ascent(descend):
    """Return the step with the ascent gradient in the state as the incoming gradient.

    `async_sam` climbs the incoming gradient at most in its first step; there the state holds the
    ascent gradient of the same step. In all other steps the incoming gradient would only go into
    the state, where `pipelined` replaces it.
    """

    def step(params, opt_state, batch):
        return descend(params, opt_state, batch, _held(opt_state).ascent_grad)

    return step


def _is_held(node):
    return isinstance(node, AsyncSAMState)


def _held(opt_state: Any) -> AsyncSAMState:
    """Return the only state of `async_sam` inside an optimizer state."""
    nodes = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=_is_held)[0]
    found = [(path, node) for path, node in nodes if _is_held(node)]
    if len(found) != 1:
        raise ValueError(
            f"pipelined: `opt_state` must hold one state of async_sam, found {len(found)}; build "
            "the optimizer as optax.chain(samx.async_sam(...), base)"
        )
    path, node = found[0]
    outer = opt_state
    for key in path:
        if type(outer).__module__.startswith("samx."):
            raise ValueError(
                f"pipelined: async_sam is inside another transformation of samx "
                f"({type(outer).__name__}), which would read a gradient that is one step old"
            )
        outer = _child(outer, key)
    return node


def _child(node, key):
    if isinstance(key, jax.tree_util.GetAttrKey):
        return getattr(node, key.name)
    return node[getattr(key, "key", getattr(key, "idx", None))]


def _hold(opt_state: Any, a: Any) -> Any:
    """Return the optimizer state with `a` as the ascent gradient of `async_sam`."""
    return jax.tree.map(
        lambda node: node._replace(ascent_grad=a) if _is_held(node) else node,
        opt_state,
        is_leaf=_is_held,
    )
