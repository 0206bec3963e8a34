"""Choose examples of a batch, take them, put values back. Public as `samx.selection.<name>`."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from samx.core.closures import batch_size
from samx.core.hyperparams import REAL, as_array, as_count


def largest(
    scores: Any, num_selected: int, *, num_groups: int = 1, weights: Any = None
) -> jax.Array:
    """Return the positions of the largest scores of each group.

        position_j = the num_selected / num_groups largest scores of group j, in falling order

    `scores=losses` selects the largest losses (K-SAM). `scores=sharp_losses - losses` selects the
    sharpest examples (ESAM).

    Args:
        scores: `float[B]`, one number per example.
        num_selected: Number of selected examples in total; a multiple of `num_groups`, at most `B`.
        num_groups: Number G of contiguous groups of equal size; a divisor of `B`, default 1.
        weights: `float[B]`, optional; 0 marks padding, which is chosen last.

    Returns:
        `int32[G, num_selected / G]`, positions within each group, for `take`.

    Raises:
        TypeError: If a count is not a Python int.
        ValueError: If a count is below 1, `num_groups` does not divide `num_selected` or `B`,
            `num_selected` is larger than `B`, or `weights` is not `[B]`.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.selection import largest
        >>> losses = jnp.array([0.1, 3.0, 2.0, 0.5, 0.2, 0.3])
        >>> largest(losses, 2).tolist(), largest(losses, 2, num_groups=2).tolist()
        ([[1, 2]], [[1], [0]])

    References:
        Ni et al., "K-SAM: Sharpness-Aware Minimization at the Speed of SGD", 2022,
        https://arxiv.org/abs/2210.12864

    Notes:
        Ties go to the lower index. NaN sorts first, so that it surfaces. Cost: one sort of the
        scores; no communication if every group lies on one device.
    """
    scores = as_array("scores", scores, "real numbers [B]")
    if scores.ndim != 1:
        raise ValueError(f"largest: `scores` must be of shape [B], got {scores.shape}")
    if weights is not None:
        weights = as_array("weights", weights, "real numbers [B]", (*REAL, bool))
    num_selected = as_count("num_selected", num_selected)
    size = group_size("largest", scores, num_groups, "scores")
    count = _count("largest", num_selected, num_groups, size)
    if weights is not None and jnp.shape(weights) != scores.shape:
        raise ValueError(
            f"largest: `weights` must have one number per score, shape {scores.shape}, "
            f"got {jnp.shape(weights)}"
        )

    def choose(scores, weights):
        if weights is not None:
            least = jnp.finfo(scores.dtype).min
            scores = jnp.where(weights == 0, least, jnp.maximum(scores, least / 2))
        order = jnp.argsort(scores.reshape(num_groups, size), axis=1, descending=True, stable=True)
        return order[:, :count].astype(jnp.int32)

    return _on_auto_axes(choose, num_groups, scores, weights)


def sampled(
    probabilities: Any,
    noise: Any,
    num_selected: int,
    *,
    num_groups: int = 1,
    weights: Any = None,
) -> jax.Array:
    """Draw examples from each group without replacement.

        position_j = the largest of  log p_i + noise_i  in group j

    With standard Gumbel noise, the result is distributed like successive draws with probabilities
    p from the remaining examples (Gumbel top-k).

    Args:
        probabilities: `float[B]`, p ≥ 0. They need not be normalized: each group may have its own
            factor. Examples with p = 0 are drawn only if no others are left.
        noise: `float[B]`, `jax.random.gumbel(key, [B])`. Inside a mapped function, the device's
            slice of the noise for the whole batch.
        num_selected: As for `largest`.
        num_groups: As for `largest`.
        weights: As for `largest`.

    Returns:
        `int32[G, num_selected / G]`, positions within each group, in the order of the draws.

    Raises:
        TypeError: As `largest`.
        ValueError: As `largest`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from samx.selection import sampled
        >>> noise = jax.random.gumbel(jax.random.key(0), (4,))
        >>> sampled(jnp.array([0.5, 0.0, 0.5, 0.0]), noise, 2).tolist()
        [[0, 2]]

    References:
        Kool, van Hoof, Welling, "Stochastic Beams and Where to Find Them", ICML 2019,
        https://arxiv.org/abs/1903.06059 (the distribution); Deng et al., "Asymptotic Unbiased
        Sample Sampling to Speed Up Sharpness-Aware Minimization", AAAI 2025,
        https://arxiv.org/abs/2406.08001 (its use).

    Notes:
        Cost: as `largest`.
    """
    probabilities = as_array("probabilities", probabilities, "real numbers [B]")
    noise = as_array("noise", noise, "real numbers [B]")
    if probabilities.ndim != 1 or noise.shape != probabilities.shape:
        raise ValueError(
            "sampled: `probabilities` and `noise` must be of one shape [B], "
            f"got {probabilities.shape} and {noise.shape}"
        )
    scores = jnp.log(probabilities) + noise
    return largest(scores, num_selected, num_groups=num_groups, weights=weights)


def take(tree: Any, position: Any) -> Any:
    """Return the chosen examples of a batch.

        rows j n, ..., j n + n − 1  =  rows position[j] of group j

    Args:
        tree: Pytree of arrays with leading axis `B`, of any dtype, including random keys; `None`
            leaves are kept.
        position: `int32[G, n]`, positions within G contiguous groups of equal size.

    Returns:
        The tree with leading axes of `G n` examples. On an Explicit mesh these axes are sharded
        like those of the batch if the number of shards divides `G n`; otherwise they are not
        sharded.

    Raises:
        ValueError: If the leaves differ in length, or `G` does not divide the length.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.selection import largest, take
        >>> batch = {"x": jnp.arange(6.0), "y": jnp.arange(6)}
        >>> take(batch, largest(batch["x"], 2, num_groups=2))
        {'x': Array([2., 5.], dtype=float32), 'y': Array([2, 5], dtype=int32)}

    References:
        `jnp.take_along_axis`, for one array and one group.

    Notes:
        Under `jax.jit` with a sharded batch, no example moves between devices if `G` is a multiple
        of the number of devices. Otherwise one all-reduce sends the chosen examples, and they are
        sharded like the batch. On Auto axes this also works if the shards do not divide `G n`.
        Cost: one copy of the chosen examples.
    """
    position = _as_position(position)
    num_groups, count = position.shape
    group_size("take", tree, num_groups, "tree")

    def rows(leaf, position):
        groups = leaf.reshape(num_groups, -1, *leaf.shape[1:])
        position = _spread_like(groups, position)
        chosen = jax.vmap(lambda group, index: group[index])(groups, position)
        return chosen.reshape(num_groups * count, *leaf.shape[1:])

    return jax.tree.map(
        lambda leaf: _on_auto_axes(rows, num_groups * count, jnp.asarray(leaf), position), tree
    )


def put(values: Any, position: Any, size: int) -> jax.Array:
    """Put numbers of the chosen examples back at their positions in the batch.

        row position[j, i] of group j  =  values[j n + i],   the others 0

    Args:
        values: `[G n]`, one number per chosen example, in the order of `take`.
        position: `int32[G, n]`, positions within G contiguous groups of equal size.
        size: `B`, the number of examples in the batch.

    Returns:
        `[B]`, in the dtype of `values`.

    Raises:
        TypeError: If `size` is not a Python int.
        ValueError: If `values` is not `[G n]`, or `G` does not divide `size`.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.selection import largest, put, take
        >>> scores = jnp.array([3.0, 1.0, 2.0])
        >>> position = largest(scores, 2)
        >>> put(take(scores, position), position, 3).tolist()
        [3.0, 0.0, 2.0]

    References:
        The inverse of `take`.

    Notes:
        Cost: one array of `B` numbers.
    """
    position = _as_position(position)
    num_groups, count = position.shape
    size = as_count("size", size)
    values = as_array("values", values, "numbers", (*REAL, jnp.complexfloating, bool))
    if values.shape != (num_groups * count,) or size % num_groups:
        raise ValueError(
            f"put: {num_groups} groups of {count} positions need `values` of shape "
            f"({num_groups * count},) and a `size` that is a multiple of {num_groups}, "
            f"got {values.shape} and {size}"
        )

    def scatter(values, position):
        groups = jnp.zeros((num_groups, size // num_groups), values.dtype)
        values = values.reshape(num_groups, count)
        return jax.vmap(lambda group, index, x: group.at[index].set(x))(
            groups, position, values
        ).reshape(size)

    return _on_auto_axes(scatter, size, values, position)


def num_taken(batch: Any, num_groups: int, count: int) -> int:
    """Return how many examples to take from each group, so that `count` of them can be used.

    On an Explicit mesh, all shards of an array are equal. So there it is the next number that the
    shards of the batch divide; `weights_of` gives the others weight 0. Otherwise every device would
    compute all of them.
    """
    _, _, num_shards = _shards_of(batch)
    return count + -count % (num_shards // math.gcd(num_shards, num_groups))


def weights_of(
    position: jax.Array, weights: Any, fraction: float = 1.0, count: int | None = None
) -> Any:
    """Return the weights `[G n]` of the chosen examples, or `None` if all of them have weight 1.

    Of the n examples of each group, only the first `count` keep their weights; the others get 0.
    Padding counts in the size of a group, so this can be more than `fraction` of the valid
    examples. In each group, only the first `fraction` of the valid examples (at least one) keep
    their weights.
    """
    num_groups, num_positions = position.shape
    count = num_positions if count is None else count
    if weights is None:
        is_used = jnp.tile(jnp.arange(num_positions) < count, num_groups)
        return None if count == num_positions else is_used.astype(jnp.float32)

    def choose(weights, position):
        groups = weights.reshape(num_groups, -1)
        num_valid = jnp.sum(groups != 0, axis=1, keepdims=True)
        num_kept = jnp.clip(jnp.floor(fraction * num_valid + 1e-6), 1, count)
        chosen = jnp.take_along_axis(groups, position, axis=1)
        return jnp.where(jnp.arange(num_positions)[None] < num_kept, chosen, 0).reshape(-1)

    return _on_auto_axes(choose, num_groups * num_positions, weights, position)


def above_the_smallest(scores: jax.Array, weights: Any, num_groups: int) -> jax.Array:
    """Return weights `[G n]` that are 0 unless the score is above the smallest of its group.

    If all scores of a group are equal, its examples keep their weights. Padding (weight 0) is
    ignored.
    """
    weights = jnp.ones_like(scores) if weights is None else weights

    def choose(scores, weights):
        scores, weights = (x.reshape(num_groups, -1) for x in (scores, weights))
        counts = weights != 0
        smallest = jnp.min(scores, axis=1, keepdims=True, where=counts, initial=jnp.inf)
        above = counts & (scores > smallest)
        above |= ~jnp.any(above, axis=1, keepdims=True)
        return jnp.where(above, weights, 0).reshape(-1)

    return _on_auto_axes(choose, scores.size, scores, weights)


def group_size(name: str, batch: Any, num_groups: int, keyword: str = "batch") -> int:
    """Return the number of examples in each group; require that the groups are equal."""
    num_groups = as_count("num_groups", num_groups)
    size = batch_size(name, batch, keyword)
    if size % num_groups:
        raise ValueError(
            f"{name}: `num_groups` must divide the {size} examples of the batch, got {num_groups}"
        )
    return size // num_groups


def _as_position(position: Any) -> jax.Array:
    position = as_array("position", position, "integers", (jnp.integer,))
    if position.ndim != 2 or not position.size:
        raise ValueError(f"`position` must be of shape [groups, count], got {position.shape}")
    return position


def _count(name: str, num_selected: int, num_groups: int, size: int) -> int:
    if num_selected % num_groups:
        raise ValueError(
            f"{name}: `num_selected` must be a multiple of `num_groups`, {num_groups}, "
            f"got {num_selected}"
        )
    if num_selected > num_groups * size:
        raise ValueError(
            f"{name}: `num_selected` must be at most the {num_groups * size} examples of the "
            f"batch, got {num_selected}"
        )
    return num_selected // num_groups


def _spread_like(groups: jax.Array, position: jax.Array) -> jax.Array:
    """Return positions `[G, n]` that the compiler spreads over the devices like the groups.

    Under `jax.jit` on Auto axes, nothing shows while tracing how a batch is sharded. XLA would
    replicate the positions, and so the examples that are taken with them, and all later work on
    them. But XLA shards the result of an elementwise operation like its operands. The condition
    here is never true, and XLA cannot know that.
    """
    if jnp.issubdtype(groups.dtype, jax.dtypes.prng_key):
        groups = jax.random.key_data(groups)
    if not groups.size:
        return position
    edge = groups[(..., *[0] * (groups.ndim - 2))].real[:, : position.shape[1]]
    return jnp.where(edge < jax.lax.optimization_barrier(edge), 0, position)


def _on_auto_axes(fn: Callable[..., Any], length: int, *args: Any) -> Any:
    """Return `fn(*args)`; on an Explicit mesh, the compiler chooses the shardings inside `fn`.

    On an Explicit mesh, JAX cannot infer the sharding of a gather across shards. The result has
    `length` rows. It is sharded like the first sharded argument if the shards divide `length`.
    """
    mesh, axes, num_shards = _shards_of(args)
    if mesh is None:
        return fn(*args)
    spec = PartitionSpec(axes if length % num_shards == 0 else None)
    sharding = NamedSharding(mesh, spec)  # names the mesh where `jax.set_mesh` does not
    return jax.sharding.auto_axes(fn, out_sharding=sharding)(*args)


def _shards_of(arrays: Any) -> tuple[Any, Any, int]:
    """Return mesh, axes and number of shards of the rows, by the type of the first sharded array.

    The types show them on Explicit axes only; otherwise the mesh is `None`, and the number 1.
    """
    shardings = (jax.typeof(x).sharding for x in jax.tree.leaves(arrays))
    sharding = next((sharding for sharding in shardings if any(sharding.spec)), None)
    if sharding is None:
        return None, None, 1
    axes = sharding.spec[0]
    names = axes if isinstance(axes, tuple) else (axes,)
    return sharding.mesh, axes, math.prod(sharding.mesh.shape[name] for name in names if name)
