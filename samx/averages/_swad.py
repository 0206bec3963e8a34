"""SWAD: an average that begins and ends where a validation loss says so."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.averages._iterates import (
    append,
    at,
    check_params,
    empty_stack,
    first_mean,
    iterate_after,
    mean_of,
    moved,
    size_of,
)
from samx.core import tree
from samx.core.aliases import Transformation
from samx.core.hyperparams import as_count, check_scalar, check_static_number, next_step
from samx.core.transformation import as_transformation, checked_transformation


class SWADState(NamedTuple):
    """State of `swad`. The lengths of the two vectors of losses are the two counts of the factory.

    Attributes:
        num_iterates: int32, iterates in the open segment.
        segment: Their mean, in float32 or wider.
        segments: int32, closed segments.
        queue: The means of the latest closed segments on a leading axis, the newest last.
        converge_losses: Validation losses of the latest `num_converge` segments, the newest last.
        smooth_losses: Those of the latest `num_tolerance` segments.
        ratio: The tolerance.
        has_converged: bool, whether the average has begun.
        is_over: bool, whether the average has ended: training may stop.
        minimum: int32, the segment with the minimum, counted from 0; 0 before it is found.
        threshold: The loss at which the average ends; 0 before it begins.
        num_averaged: int32, segments in `final`, with those that count twice.
        final: The mean of segments that belongs to the average for good.
        base: State of the wrapped optimizer.
    """

    num_iterates: jax.Array
    segment: Any
    segments: jax.Array
    queue: Any
    converge_losses: jax.Array
    smooth_losses: jax.Array
    ratio: jax.Array
    has_converged: jax.Array
    is_over: jax.Array
    minimum: jax.Array
    threshold: jax.Array
    num_averaged: jax.Array
    final: Any
    base: optax.OptState

    def average(self, params: Any) -> Any:
        """Return the average; `params` before there is one."""
        place = _places(self.segments, self.smooth_losses)
        losses = jnp.where(place < 0, _largest(self.smooth_losses), self.smooth_losses)
        is_good = jax.lax.cummin(losses, reverse=True) <= self.threshold
        is_in = is_good & (place >= 1) & ~self.is_over
        mean, _ = _added(self.final, self.num_averaged, self.queue, is_in)
        mean = tree.where(self.has_converged, mean, at(self.queue, -1))
        return tree.where(self.segments > 0, mean, params)


def swad(
    tx: optax.GradientTransformation,
    num_converge: int = 3,
    num_tolerance: int = 6,
    ratio: float = 0.3,
) -> Transformation:
    """SWAD: average the iterates densely, from the minimum of a validation loss until it has risen.

        w = w + tx(∇L(w)),   and w enters the mean of the open segment
        samx.averages.end_segment(state, loss) closes the segment, at every checkpoint:
            the average begins    if the first of the last `num_converge` losses is their minimum;
                                  threshold = (1 + ratio) · their mean
            then the segment      `num_tolerance` − 1 segments back enters the mean of segments,
            or the average ends   if all of the last `num_tolerance` losses are above the threshold

    Args:
        tx: The whole optimizer. With SAM in it, SAM's iterates are averaged.
        num_converge: Number ≥ 1 of losses that find the minimum, the paper's N_s; default 3.
        num_tolerance: Number ≥ 1 of losses that find the end, the paper's N_e; default 6.
        ratio: Tolerance r ≥ 0, a number; default 0.3. The authors use 0.2 on one data set.

    Returns:
        A transformation that passes every keyword on to `tx`, and returns its updates. Its state
        has the flags `has_converged` and `is_over`: `optax.tree.get(state, "is_over")`.

    Raises:
        ValueError: If a number is out of range; in `update`, if `params` is missing.
        TypeError: If `tx` is not a transformation, a count is not a Python int, or `ratio` is not a
            number.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = samx.averages.swad(optax.sgd(1.0), num_converge=2, num_tolerance=1)
        >>> w = jnp.zeros(())
        >>> state = tx.init(w)
        >>> for validation_loss in (3.0, 1.0, 1.1, 1.2, 2.0):  # iterates 1, 2, 3, 4, 5
        ...     updates, state = tx.update(-jnp.ones(()), state, w)
        ...     w = optax.apply_updates(w, updates)
        ...     state = samx.averages.end_segment(state, validation_loss)
        >>> bool(state.is_over), float(samx.averages.params(state, w))
        (True, 3.5)

    References:
        Cha et al., "SWAD: Domain Generalization by Seeking Flat Minima", NeurIPS 2021,
        https://arxiv.org/abs/2102.08604

    Notes:
        The losses should be positive, and the same on all devices. The authors close a segment
        every 50 to 500 steps.
        The official code is followed, in what it does beyond its paper too. The segment of the
        minimum does not count for `num_tolerance` ≤ `num_converge`. Otherwise, as with the
        defaults, it counts twice: when the average begins, and again when it leaves the queue. If
        the average begins before the queue is full, its first segment enters in every call until
        the queue is full. Looking back from the minimum for the begin skips one segment more than
        the comment there says. Segments count equally, however long they are. If the average has
        not ended, `params` adds the segments in the queue up to the last loss that is good enough.
        If it has not begun, `params` is the mean of the last closed segment.
        A loss that is not finite counts as the largest number, and no average begins with one.
        Cost: no gradient; in the state 2 copies of the parameters and max(`num_converge`,
        `num_tolerance`) in the queue, in float32 or wider; a step reads and writes one of them.
        Fidelity: matches recorded runs of khanrc/swad's `LossValley` to 1e-15.
        `static_args`: all arguments.
    """
    num_converge = as_count("num_converge", num_converge)
    num_tolerance = as_count("num_tolerance", num_tolerance)
    check_static_number("ratio", ratio, 0)
    inner = as_transformation("swad", "tx", tx)

    def init_fn(params):
        check_params("swad", params)
        dtype = tree.real_dtype(*jax.tree.leaves(params))
        return SWADState(
            num_iterates=jnp.zeros((), jnp.int32),
            segment=first_mean(params),
            segments=jnp.zeros((), jnp.int32),
            queue=empty_stack(params, max(num_converge, num_tolerance)),
            converge_losses=jnp.zeros(num_converge, dtype),
            smooth_losses=jnp.zeros(num_tolerance, dtype),
            ratio=jnp.array(ratio, dtype),
            has_converged=jnp.zeros((), bool),
            is_over=jnp.zeros((), bool),
            minimum=jnp.zeros((), jnp.int32),
            threshold=jnp.zeros((), dtype),
            num_averaged=jnp.zeros((), jnp.int32),
            final=first_mean(params),
            base=inner.init(params),
        )

    def update_fn(updates, state, params=None, **extra):
        updates, base = inner.update(updates, state.base, params, **extra)
        count = next_step(state.num_iterates)
        iterate = iterate_after("swad", params, updates)
        segment = moved(state.segment, iterate, 1 / count.astype(float))
        return updates, state._replace(num_iterates=count, segment=segment, base=base)

    return checked_transformation("swad", init_fn, update_fn)


def end_segment(opt_state: optax.OptState, validation_loss: Any) -> optax.OptState:
    """Close the open segment of `swad`, with the validation loss at this checkpoint.

        segment i = mean of the iterates since the last call,   loss i = validation_loss
        the average begins, takes a segment, or ends: see `swad`

    Args:
        opt_state: A state that holds that of `samx.averages.swad`, as it is or inside wrappers.
        validation_loss: The loss of the current parameters on held-out data, a scalar.

    Returns:
        The state, with the same structure.

    Raises:
        ValueError: If `opt_state` does not hold exactly one state of `swad`, or the loss is not a
            scalar.
        TypeError: If the loss is not a number.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = samx.averages.swad(optax.sgd(0.1))
        >>> w = jnp.ones(2)
        >>> _, state = tx.update(w, tx.init(w), w)
        >>> state = samx.averages.end_segment(state, 0.5)
        >>> int(state.segments), bool(state.has_converged)
        (1, False)

    References:
        Cha et al., NeurIPS 2021, https://arxiv.org/abs/2102.08604

    Notes:
        A pure function of the state: it may be compiled, also together with the step. Without a
        step since the last call, and after the end of the average, nothing changes. Cost: one pass
        over the copies of the parameters in the state.
    """
    check_scalar("validation_loss", validation_loss)
    of_kind("end_segment", opt_state, (SWADState,), "samx.averages.swad")

    def closed(node):
        if not isinstance(node, SWADState):
            return node
        is_open = (node.num_iterates > 0) & ~node.is_over
        new = _closed(node._replace(base=()), validation_loss)
        return tree.where(is_open, new, node._replace(base=()))._replace(base=node.base)

    return jax.tree.map(closed, opt_state, is_leaf=lambda node: isinstance(node, SWADState))


def of_kind(name: str, opt_state: Any, kinds: tuple[type, ...], what: str) -> Any:
    """Return the one state of these kinds, wherever it is."""

    def found(node):
        nodes = jax.tree.leaves(node, is_leaf=lambda node: isinstance(node, kinds))
        mine = [node for node in nodes if isinstance(node, kinds)]
        return mine + [inside for node in mine for inside in found(node.base)]

    states = found(opt_state)
    if len(states) != 1:
        hint = "; pass the part of the state that holds one" if states else ""
        raise ValueError(
            f"{name}: `opt_state` must hold one state of {what}, found {len(states)} in a "
            f"{type(opt_state).__name__}{hint}"
        )
    return states[0]


def _closed(state: SWADState, loss: Any) -> SWADState:
    """Return the state after the segment has been closed."""
    largest = _largest(state.threshold)
    loss = jnp.asarray(loss, state.threshold.dtype)
    loss = jnp.where(jnp.isfinite(loss), loss, largest)
    queue, segments = append(state.queue, state.segment), state.segments + 1
    recent = jnp.append(state.converge_losses[1:], loss)
    smooth = jnp.append(state.smooth_losses[1:], loss)
    place, size = _places(segments, smooth), max(len(recent), len(smooth))

    is_known = recent < largest
    begins = ~state.has_converged & (segments >= len(recent)) & jnp.all(is_known)
    begins &= jnp.all(recent[0] <= recent)
    # XLA turns a division by a constant into a product, which may round to another number.
    length = jnp.minimum(segments, len(recent)).astype(recent.dtype)
    level = jnp.sum(jnp.where(is_known, recent, 0)) / length * (1 + state.ratio)
    threshold = jnp.where(begins, level, state.threshold)
    is_first = (
        jnp.arange(size, dtype=jnp.int32) < len(recent) - len(smooth) + 1
    )  # of those after the minimum
    if len(smooth) > len(recent):
        looked_at = (place >= 0) & (place <= len(smooth) - len(recent))
        last_bad = jnp.max(jnp.where(looked_at & (smooth > threshold), place, -1))
        is_first = looked_at & (place > last_bad + 1)
    else:
        is_first &= jnp.arange(size, dtype=jnp.int32) > 0

    head = segments - jnp.minimum(segments, len(smooth))  # the oldest segment in the queue
    goes_on = state.has_converged & (head >= state.minimum)
    is_over = goes_on & jnp.all((smooth > threshold) | (place < 0))
    is_head = jnp.pad(place == 0, (size - len(smooth), 0)) & goes_on & ~is_over
    final = tree.where(begins, at(queue, -len(recent)), state.final)
    final, num_averaged = _added(
        final, jnp.where(begins, 0, state.num_averaged), queue, jnp.where(begins, is_first, is_head)
    )
    return state._replace(
        num_iterates=jnp.zeros_like(state.num_iterates),
        segments=segments,
        queue=queue,
        converge_losses=recent,
        smooth_losses=smooth,
        has_converged=state.has_converged | begins,
        is_over=is_over,
        minimum=jnp.where(begins, segments - len(recent), state.minimum),
        threshold=threshold,
        num_averaged=num_averaged,
        final=final,
    )


def _places(segments: jax.Array, losses: jax.Array) -> jax.Array:
    """Return the places of these losses in the queue; they are negative where it is empty."""
    places = jnp.arange(len(losses), dtype=jnp.int32)
    return places - (len(losses) - jnp.minimum(segments, len(losses)))


def _added(mean: Any, count: jax.Array, queue: Any, is_in: jax.Array) -> tuple[Any, jax.Array]:
    """Return the mean of `count` segments and those of the queue, and how many these are."""
    is_in = jnp.pad(is_in, (max(size_of(queue) - len(is_in), 0), 0))
    added = jnp.sum(is_in, dtype=jnp.int32)
    share = tree.ratio(added.astype(float), (count + added).astype(float))
    return moved(mean, mean_of(queue, is_in, mean), share), count + added


def _largest(like: jax.Array) -> Any:
    return jnp.finfo(like.dtype).max
