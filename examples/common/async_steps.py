"""Steps of AsyncSAM on two devices, next to SGD and SAM on one: what is timed, and how."""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

import samx

RHO, LEARNING_RATE = 0.05, 1e-3
SHARES = {"b": 1.0, "b/2": 0.5, "b/4": 0.25}


def base() -> optax.GradientTransformationExtraArgs:
    return optax.with_extra_args_support(optax.sgd(LEARNING_RATE, momentum=0.9))


def on_one_device(tx: Any, loss: Any, params: Any, batch: Any, device: Any) -> Iterator[Any]:
    """Yield steps without end; each is dispatched asynchronously."""

    def step(params, state, batch):
        g = jax.grad(loss)(params, batch)
        updates, state = tx.update(g, state, params, value_fn=lambda p: loss(p, batch))
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    carry = jax.device_put((params, tx.init(params)), device, may_alias=False)
    while True:
        carry = step(*carry, jax.device_put(batch, device))
        yield carry


def async_sam(loss: Any, params: Any, batch: Any, size: int, one: Any, other: Any) -> Iterator[Any]:
    """Yield steps of AsyncSAM without end; the first `size` examples are the ascent batch."""
    tx = optax.chain(samx.async_sam(RHO), base())

    def descend(params, state, batch, ascent_grad):
        updates, state = tx.update(ascent_grad, state, params, value_fn=lambda p: loss(p, batch))
        return optax.apply_updates(params, updates), state, None

    return samx.asynchronous.pipelined(
        descend,
        jax.grad(loss),
        params,
        tx.init(params),
        itertools.repeat((batch, jax.tree.map(lambda x: x[:size], batch))),
        descent_device=one,
        ascent_device=other,
    )


def make_rows(
    loss: Any, params: Any, batch: Any, found: int, devices: tuple[Any, Any]
) -> dict[str, Iterator[Any]]:
    """Return the rows to time; `found` is the calibrated size of the ascent batch."""
    one, other = devices
    whole = len(jax.tree.leaves(batch)[0])
    sizes = {f"async-sam, {name}": round(share * whole) for name, share in SHARES.items()}
    if found not in sizes.values():
        sizes[f"async-sam, {found} examples"] = found
    rows = {
        "sgd": on_one_device(base(), loss, params, batch, one),
        "sam": on_one_device(optax.chain(samx.sam(RHO), base()), loss, params, batch, one),
    }
    for name, size in sizes.items():
        rows[name] = async_sam(loss, params, batch, size, one, other)
    rows["async-sam, b, on one device"] = async_sam(loss, params, batch, whole, one, one)
    return rows


def timed(steps: Iterator[Any], count: int) -> tuple[float, float]:
    """Return the seconds per step until its call returns, and until it is done."""
    start, handed_out = time.perf_counter(), []
    for _ in range(count):
        before = time.perf_counter()
        result = next(steps)
        handed_out.append(time.perf_counter() - before)
    jax.block_until_ready(result)
    return float(np.median(handed_out)), (time.perf_counter() - start) / count


def summarized(seconds: Mapping[str, Sequence[tuple[float, float]]]) -> list[dict]:
    """Return a result for each row, from what `timed` returned in each round.

    Each time is divided by that of SGD in the same round.
    """
    plain = np.array([done for _, done in seconds["sgd"]])
    results = []
    for name, pairs in seconds.items():
        handed_out, done = np.array(pairs).T
        results.append(
            {
                "row": name,
                "ms": 1e3 * float(np.median(done)),
                "handed_out_ms": 1e3 * float(np.median(handed_out)),
                "ratio": np.quantile(done / plain, [0.5, 0.25, 0.75]).tolist(),
                "seconds": done.tolist(),
            }
        )
    return results


def describe_ascent_batch(found: samx.asynchronous.AscentBatch) -> str:
    """Describe what `calibrate_ascent_batch` decided and measured."""
    times = ", ".join(f"{k}: {1e3 * s:.2f}" for k, s in found.ascent_seconds.items())
    hidden = "" if found.is_hidden else ", although its gradient takes longer than the descent's"
    return (
        f"ascent batch for these devices: {found.size} examples{hidden}\n"
        f"    descent {1e3 * found.descent_seconds:.2f} ms; ascent with copies, of so many "
        f"examples: {times} ms; copies {1e3 * found.copy_seconds:.2f} ms"
    )
