"""SAM that climbs another gradient than its own: who chooses the batch and the point of the ascent.

Every arm is SAM: it goes ρ along a direction, and descends the gradient of the step's batch there.
The arms differ in the direction. Each is built from `samx.sam`, which climbs whatever gradient it
is given.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import samx
from examples.common.registry import RADIUS, VARIANTS, Setting, Variant

STRIDE = 37  # between the shifts of two steps, see `another_batch`


class Before(NamedTuple):
    """What an arm knows of the steps before this one.

    Attributes:
        step: int32, steps so far.
        sam: State of SAM.
        batch: Batch of the last step.
        params: Parameters at which the last step began.
        sharp: Gradient that the last step descended.
        table: The training examples that were seen so far, each at its index.
        is_seen: Which ones were.
    """

    step: jax.Array
    sam: Any
    batch: Any
    params: Any
    sharp: Any
    table: Any
    is_seen: jax.Array


class Now(NamedTuple):
    """What an arm knows of this step.

    Attributes:
        g: Gradient of the batch at the parameters.
        batch: The batch.
        params: The parameters.
        gradient: `(params, batch) -> gradient` of the mean loss; a third argument weights examples.
    """

    g: Any
    batch: Any
    params: Any
    gradient: Callable[..., Any]


Direction = Callable[[Now, Before], Any]


def own(now: Now, before: Before) -> Any:
    """Return SAM's direction."""
    del before
    return now.g


def previous_batch(now: Now, before: Before) -> Any:
    """Return the gradient of the last step's batch, at the parameters."""
    return now.gradient(now.params, before.batch)


def older_point(now: Now, before: Before) -> Any:
    """Return the gradient of the batch where the last step began."""
    return now.gradient(before.params, now.batch)


def both(now: Now, before: Before) -> Any:
    """Return AsyncSAM's direction: the last step's batch, where that step began."""
    return now.gradient(before.params, before.batch)


def another_batch(now: Now, before: Before) -> Any:
    """Return the gradient of examples that have nothing to do with this step or the last one."""
    count = len(before.is_seen)
    rows = (now.batch["index"] + 1 + (STRIDE * before.step) % (count - 1)) % count
    batch = {name: leaf[rows] for name, leaf in before.table.items()}
    return now.gradient(now.params, batch, before.is_seen[rows])


def recycled(now: Now, before: Before) -> Any:
    """Return the gradient that the last step descended: no second gradient is taken."""
    del now
    return before.sharp


def full(now: Now, before: Before) -> Any:
    """Return the gradient of all training examples; in the first epoch, of those seen so far."""
    return now.gradient(now.params, before.table, before.is_seen)


def without_full(now: Now, before: Before) -> Any:
    """Return what is special to the batch: its gradient minus that of all training examples."""
    return optax.tree.sub(now.g, full(now, before))


def climb(direction: Direction, rho: Any, setting: Setting) -> optax.GradientTransformation:
    """Build SAM that climbs a direction; where it is 0, as in some first steps, it goes nowhere."""
    sam = samx.sam(rho)

    def init_fn(params):
        table = {
            name: jnp.zeros((setting.num_examples, *leaf.shape[1:]), leaf.dtype)
            for name, leaf in setting.batch.items()
        }
        return Before(
            step=jnp.zeros((), jnp.int32),
            sam=sam.init(params),
            batch=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), setting.batch),
            params=params,
            sharp=optax.tree.zeros_like(params),
            table=table,
            is_seen=jnp.zeros(setting.num_examples, bool),
        )

    def update_fn(g, state, params, *, losses_fn, batch, **keywords):
        def gradient(params, batch, weights=1.0):
            def loss(params):
                losses = losses_fn(params, batch)
                shares = jnp.broadcast_to(weights, losses.shape)
                return losses @ (shares / jnp.maximum(shares.sum(), 1.0))

            return jax.grad(loss)(params)

        rows = batch["index"]
        table = {name: leaf.at[rows].set(batch[name]) for name, leaf in state.table.items()}
        state = state._replace(table=table, is_seen=state.is_seen.at[rows].set(True))
        climbed = direction(Now(g, batch, params, gradient), state)
        is_known = (state.step > 0) | (direction in AT_ONCE)
        climbed = jax.tree.map(lambda x: jnp.where(is_known, x, 0), climbed)
        keywords |= {"losses_fn": losses_fn, "batch": batch}
        g_s, of_sam = sam.update(climbed, state.sam, params, **keywords)
        return g_s, state._replace(
            step=state.step + 1, sam=of_sam, batch=batch, params=params, sharp=g_s
        )

    return samx.closure_transformation(init_fn, update_fn, name="climb")


AT_ONCE = (own, full)  # directions that are known in the first step


def arm(direction: Direction, gradients: float) -> Variant:
    """Return the variant that climbs a direction, for so many gradients per step."""

    def make(rho, base, setting):
        return optax.chain(climb(direction, rho, setting), base)

    return Variant(make, RADIUS, gradients, 0.05)


def against_momentum(rho: Any, base: Any, setting: Setting) -> optax.GradientTransformation:
    """Build Momentum-SAM with the other sign: it goes back, along the average of gradients."""
    del setting
    return samx.momentum_sam(
        base, rho, momentum=lambda state: optax.tree.scale(-1, optax.tree.get(state, "trace"))
    )


ALL = 4  # what a gradient of all 1000 examples costs, in gradients of a batch
ARMS = {
    "base": VARIANTS["base"],
    "sam": VARIANTS["sam"],
    "previous batch": arm(previous_batch, 2),
    "older point": arm(older_point, 2),
    "async-sam": VARIANTS["async-sam"],
    "another batch": arm(another_batch, 2),
    "last descent": arm(recycled, 1),
    "all examples": arm(full, 1 + ALL),
    "batch - all": arm(without_full, 2 + ALL),
    "friendly-sam": VARIANTS["friendly-sam"],
    "momentum-sam": VARIANTS["momentum-sam"],
    "against momentum": VARIANTS["momentum-sam"]._replace(make=against_momentum),
}
