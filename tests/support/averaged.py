"""Averages of given iterates: independent loops in NumPy, and runs of samx's wrappers on them."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax

RECORDED = ("swa__sgdm_start4_freq1", "swad__sgdm_freq1_conv3_tol2_ratio0.2_v1")


def run(tx, iterates, read, first=None):
    """Return what `read(state, params)` gives after each step, and the last state.

    Every step goes from zeros to an iterate, so that it is exact. `tx` is around `optax.identity`.
    """
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x[0]), iterates)

    def step(state, iterate):
        updates, state = tx.update(iterate, state, zeros)
        return state, read(state, optax.apply_updates(zeros, updates))

    scan = jax.jit(lambda state, iterates: jax.lax.scan(step, state, iterates))
    state, found = scan(tx.init(zeros if first is None else first), iterates)
    return found, state


def ema(iterates, decay, every=1):
    """Yield after each step the weighted mean; `decay` is a function of the step."""
    seen, weights = [], np.zeros(0)
    for t, x in enumerate(iterates):
        if t % every == 0:
            seen, weights = [*seen, x], np.append(weights * decay(t), 1 - decay(t))
        yield np.tensordot(weights / weights.sum(), np.stack(seen), 1)


def swa(iterates, start, every=1):
    for t, x in enumerate(iterates):
        chosen = range(start, t + 1, every)
        yield np.mean([iterates[i] for i in chosen], 0) if chosen else x


def latest(iterates, count, every=1):
    for t, x in enumerate(iterates):
        chosen = [i for i in range(t + 1) if (i + 1) % every == 0][-count:]
        yield np.mean([iterates[i] for i in chosen], 0) if chosen else x


Segment = collections.namedtuple("Segment", ["index", "mean", "loss"])


def swad(means, losses, converge, tolerance, ratio):
    """Return the final model, the segments in it in order, and the state of the valley.

    The rule of the official LossValley, in its two phases, with two queues.
    """
    near, far = collections.deque(maxlen=converge), collections.deque(maxlen=tolerance)
    members, minimum, threshold, is_over = [], None, None, False

    def lowest():
        return min(s.loss for s in far)

    for index, (mean, loss) in enumerate(zip(means, losses, strict=True)):
        if is_over:
            break
        for queue in (near, far):
            queue.append(Segment(index, mean, loss))
        if minimum is None:
            values = [s.loss for s in near]
            if len(near) == converge and np.argmin(values) == 0:
                minimum, threshold = near[0], np.mean(values) * (1 + ratio)
                if tolerance < converge:
                    members = [*near][1 : 1 + converge - tolerance]
                if tolerance > converge:
                    past = [*far][: tolerance - converge + 1]
                    bad = [i for i, s in enumerate(past) if s.loss > threshold]
                    members = past[bad[-1] + 2 if bad else 1 :]
        elif far[0].index >= minimum.index:
            is_over = lowest() > threshold
            members += [] if is_over else [far[0]]
    if minimum is None:
        return near[-1].mean, [near[-1].index], (minimum, threshold, is_over)
    if not is_over:
        far.popleft()
        while far and lowest() <= threshold:
            members.append(far.popleft())
    chosen = members or [minimum]
    found = np.mean([s.mean for s in chosen], 0)
    return found, [s.index for s in members], (minimum.index, threshold, is_over)
