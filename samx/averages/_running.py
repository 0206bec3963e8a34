"""Running averages of the iterates: exponential, since a start, and of the latest ones."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.averages._iterates import (
    check_params,
    empty_stack,
    first_mean,
    iterate_after,
    mean_of,
    moved,
    put,
    size_of,
)
from samx.core import tree
from samx.core.aliases import ScalarOrSchedule, Transformation
from samx.core.hyperparams import as_count, at_step, check_hyperparam, next_step
from samx.core.transformation import as_transformation, checked_transformation


class EMAState(NamedTuple):
    """State of `ema`.

    Attributes:
        step: int32, the optimizer's steps so far.
        weight: Sum of the weights of the iterates, in [0, 1]; 0 before the first one.
        mean: The average, corrected for its start, in float32 or wider.
        base: State of the wrapped optimizer.
    """

    step: jax.Array
    weight: jax.Array
    mean: Any
    base: optax.OptState

    def average(self, params: Any) -> Any:
        """Return the average; `params` before there is one."""
        return tree.where(self.weight > 0, self.mean, params)


class SWAState(NamedTuple):
    """State of `swa`.

    Attributes:
        step: int32, the optimizer's steps so far.
        num_averaged: int32, averaged iterates.
        mean: Their mean, in float32 or wider.
        base: State of the wrapped optimizer.
    """

    step: jax.Array
    num_averaged: jax.Array
    mean: Any
    base: optax.OptState

    def average(self, params: Any) -> Any:
        """Return the average; `params` before there is one."""
        return tree.where(self.num_averaged > 0, self.mean, params)


class LatestState(NamedTuple):
    """State of `latest`.

    Attributes:
        step: int32, the optimizer's steps so far.
        num_stored: int32, iterates that were stored, those that were replaced too.
        iterates: The latest ones, on a leading axis, in float32 or wider.
        base: State of the wrapped optimizer.
    """

    step: jax.Array
    num_stored: jax.Array
    iterates: Any
    base: optax.OptState

    def average(self, params: Any) -> Any:
        """Return the average; `params` before there is one."""
        is_stored = jnp.arange(size_of(self.iterates), dtype=jnp.int32) < self.num_stored
        return mean_of(self.iterates, is_stored, params)


def ema(
    tx: optax.GradientTransformation, decay: ScalarOrSchedule = 0.999, *, every: int = 1
) -> Transformation:
    """Average the iterates with weights that decay exponentially; the training does not change.

        w = w + tx(∇L(w))
        on every `every`-th step:
            m = decay m + (1 − decay) w,   c = decay c + (1 − decay)      (m = c = 0 at first)
        samx.averages.params(...) = m / c

    The division by the sum c of the weights is the bias correction: the initial weights do not
    count. The average after the first iterate is this iterate.

    Args:
        tx: The whole optimizer: sharpness-aware transformation and base together.
        decay: Share in [0, 1) of the old average that is kept; default 0.999, so about the last
            1000 averaged iterates count. Schedules run over the optimizer's steps.
        every: Average one of so many iterates, ≥ 1; default all.

    Returns:
        A transformation that passes every keyword on to `tx`, and returns its updates.

    Raises:
        ValueError: If a number is out of range; in `update`, if `params` is missing.
        TypeError: If `tx` is not a transformation, `decay` is neither a number nor a schedule, or
            `every` is not a Python int.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> tx = samx.averages.ema(optax.chain(samx.sam(0.05), optax.sgd(0.1)), decay=0.5)
        >>> loss, w = lambda w: (w**2).sum(), jnp.ones(2)
        >>> state = tx.init(w)
        >>> for _ in range(3):
        ...     updates, state = tx.update(jax.grad(loss)(w), state, w, value_fn=loss)
        ...     w = optax.apply_updates(w, updates)
        >>> mean = samx.averages.params(state, w)
        >>> round(float(w[0]), 3), round(float(mean[0]), 3)
        (0.495, 0.575)

    References:
        Polyak, Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM J. Control
        Optim. 1992; the bias correction is that of Adam, https://arxiv.org/abs/1412.6980

    Notes:
        A warm-up, as in TensorFlow's `ExponentialMovingAverage`, is a schedule:
        `decay=lambda step: jnp.minimum(0.9999, (1 + step) / (10 + step))`. With the bias
        correction it is rarely needed: as long as few iterates were averaged, all of them count
        about equally.
        Cost: no gradient; one copy of the parameters in the state, in float32 or wider; a step
        reads and writes it once. `static_args`: `tx`, `every`.
    """
    check_hyperparam("decay", decay, 0, 1, excluded=1)
    every = as_count("every", every)
    inner = as_transformation("ema", "tx", tx)

    def init_fn(params):
        check_params("ema", params)
        weight = jnp.zeros((), tree.real_dtype(*jax.tree.leaves(params)))
        zero = jnp.zeros((), jnp.int32)
        return EMAState(zero, weight, first_mean(params), inner.init(params))

    def update_fn(updates, state, params=None, **extra):
        updates, base = inner.update(updates, state.base, params, **extra)
        kept = jnp.asarray(at_step(decay, state.step), state.weight.dtype)
        is_due = state.step % every == 0
        weight = jnp.where(is_due, kept * state.weight + (1 - kept), state.weight)
        share = jnp.where(is_due, tree.ratio(1 - kept, weight), 0)
        mean = moved(state.mean, iterate_after("ema", params, updates), share)
        return updates, EMAState(next_step(state.step), weight, mean, base)

    return checked_transformation("ema", init_fn, update_fn)


def swa(tx: optax.GradientTransformation, start: int, every: int = 1) -> Transformation:
    """Stochastic Weight Averaging (SWA): average all iterates from a step on, with equal weights.

        w = w + tx(∇L(w))
        on the steps start, start + every, ...:     m = m + (w − m) / n      (the n-th such step)
        samx.averages.params(...) = m

    Args:
        tx: The whole optimizer. With SAM in it, this is WASAM.
        start: Number ≥ 0 of the first step whose iterate is averaged, counted from 0. So `start`
            steps come first. The paper starts at 75% of the training.
        every: Average one of so many iterates, ≥ 1; default all. With a cyclic learning rate, the
            length of the cycle, with a `start` at the end of one.

    Returns:
        A transformation that passes every keyword on to `tx`, and returns its updates.

    Raises:
        ValueError: If a number is out of range; in `update`, if `params` is missing.
        TypeError: If `tx` is not a transformation, or a number is not a Python int.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> tx = samx.averages.swa(optax.chain(samx.sam(0.05), optax.sgd(0.1)), start=1)
        >>> loss, w = lambda w: (w**2).sum(), jnp.ones(2)
        >>> state, iterates = tx.init(w), []
        >>> for _ in range(3):
        ...     updates, state = tx.update(jax.grad(loss)(w), state, w, value_fn=loss)
        ...     w = optax.apply_updates(w, updates)
        ...     iterates.append(w)
        >>> mean = samx.averages.params(state, w)
        >>> bool(jnp.allclose(mean, (iterates[1] + iterates[2]) / 2))
        True

    References:
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization",
        UAI 2018, https://arxiv.org/abs/1803.05407; with SAM: Kaddour et al., "When Do Flat Minima
        Optimizers Work?", NeurIPS 2022, https://arxiv.org/abs/2202.00661

    Notes:
        SWA profits from a learning rate that stays high while it averages: a cosine that ends at 0
        leaves little to average. BatchNorm needs statistics at the average: `batch_stats`.
        An entry that was left out since it was not finite counts as the mean before it.
        Cost: no gradient; one copy of the parameters in the state, in float32 or wider; a step
        reads and writes it once. Fidelity: matches recorded runs of `AveragedModel` in
        khanrc/swad, PyTorch's class, to 1e-15, around SGD and SAM.
        `static_args`: all arguments.
    """
    start, every = as_count("start", start, 0), as_count("every", every)
    inner = as_transformation("swa", "tx", tx)

    def init_fn(params):
        check_params("swa", params)
        step, count = (jnp.zeros((), jnp.int32) for _ in range(2))
        return SWAState(step, count, first_mean(params), inner.init(params))

    def update_fn(updates, state, params=None, **extra):
        updates, base = inner.update(updates, state.base, params, **extra)
        is_due = is_due_at(state.step, start, every)
        count = state.num_averaged + is_due.astype(jnp.int32)
        share = jnp.where(is_due, 1 / jnp.maximum(count, 1).astype(float), 0)
        mean = moved(state.mean, iterate_after("swa", params, updates), share)
        return updates, SWAState(next_step(state.step), count, mean, base)

    return checked_transformation("swa", init_fn, update_fn)


def latest(tx: optax.GradientTransformation, num_iterates: int, every: int = 1) -> Transformation:
    """Average the latest iterates with equal weights; earlier ones are forgotten.

        w = w + tx(∇L(w))
        on every `every`-th step:     w takes the place of the oldest stored iterate
        samx.averages.params(...) = the mean of the stored iterates

    Args:
        tx: The whole optimizer.
        num_iterates: Number ≥ 1 of stored iterates.
        every: Store one of so many iterates, ≥ 1; default all. One per epoch is common: then
            `every` is the number of steps of an epoch, and the last step of each epoch is stored.

    Returns:
        A transformation that passes every keyword on to `tx`, and returns its updates.

    Raises:
        ValueError: If a number is out of range; in `update`, if `params` is missing.
        TypeError: If `tx` is not a transformation, or a number is not a Python int.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> tx = samx.averages.latest(optax.sgd(0.25), num_iterates=2)
        >>> w = jnp.ones(2)
        >>> state = tx.init(w)
        >>> for _ in range(3):  # 0.5, 0.25, 0.125
        ...     updates, state = tx.update(2 * w, state, w)
        ...     w = optax.apply_updates(w, updates)
        >>> samx.averages.params(state, w).tolist()
        [0.1875, 0.1875]

    References:
        Kaddour, "Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight
        Averaging", 2022, https://arxiv.org/abs/2209.14981 (LAWA)

    Notes:
        Before all places are filled, the mean is over those that are. Nothing is rounded away: the
        mean is taken from the copies when it is asked for.
        Cost: no gradient; `num_iterates` copies of the parameters in the state, in float32 or
        wider, on a leading axis; a step reads and writes one of them. `static_args`: all arguments.
    """
    size, every = as_count("num_iterates", num_iterates), as_count("every", every)
    inner = as_transformation("latest", "tx", tx)

    def init_fn(params):
        check_params("latest", params)
        step, count = (jnp.zeros((), jnp.int32) for _ in range(2))
        return LatestState(step, count, empty_stack(params, size), inner.init(params))

    def update_fn(updates, state, params=None, **extra):
        updates, base = inner.update(updates, state.base, params, **extra)
        is_due = is_due_at(state.step, every - 1, every)
        iterate = iterate_after("latest", params, updates)
        iterates = put(state.iterates, iterate, state.num_stored % size, is_due)
        count = state.num_stored + is_due.astype(jnp.int32)
        return updates, LatestState(next_step(state.step), count, iterates, base)

    return checked_transformation("latest", init_fn, update_fn)


def is_due_at(step: jax.Array, start: int, every: int) -> jax.Array:
    """Return whether the step is one of start, start + every, ..."""
    return (step >= start) & ((step - start) % every == 0)
