"""The steps whose cost is measured: plain, SAM without samx, and any variant of the registry.

All of them take `losses_fn(params, batch) -> [B]` and train with SGD and momentum.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from examples.common.registry import BASES, VARIANTS, Setting

# The same for every row: they do not change the cost. With so small a rate a model stays finite,
# however many steps are timed.
LEARNING_RATE, MOMENTUM, RHO = 1e-3, 0.9, 0.05
CHEAP = 1.2  # "about one gradient": time of a step relative to the plain step


class Row(NamedTuple):
    """A step to measure: `step(params, state, batch) -> (params, state, loss)`.

    `init` makes the first state from the parameters. `gradients` is the number of gradients per
    step, for states that do not count gradients. `outside` is the number of passes that `update`
    does not see. `cycle` and `settling` are those of the variant.
    """

    step: Callable[[Any, Any, Any], tuple[Any, Any, jax.Array]]
    init: Callable[[Any], Any]
    gradients: float
    outside: int = 0
    cycle: int = 1
    settling: int = 0


def unchanged(x: Any) -> Any:
    return x


def first_matrix(params: Any) -> jax.Array:
    return next(leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1)


def reference_rows(losses_fn: Callable) -> dict[str, Row]:
    """Return the rows for the gradient, the plain step, and SAM without samx."""
    base = BASES["momentum"](LEARNING_RATE)
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    contrib = optax.contrib.sam(base, adversary, opaque_mode=True)

    def mean_loss(params, batch):
        return losses_fn(params, batch).mean()

    def gradient(params, state, batch):
        del state
        value, g = jax.value_and_grad(mean_loss)(params, batch)
        return params, g, value

    def plain(params, state, batch):
        value, g = jax.value_and_grad(mean_loss)(params, batch)
        updates, state = base.update(g, state, params)
        return optax.apply_updates(params, updates), state, value

    def by_hand(params, velocity, batch):
        value, g = jax.value_and_grad(mean_loss)(params, batch)
        norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(g)))
        scale = RHO / (norm + 1e-12)
        point = jax.tree.map(lambda w, d: w + scale * d, params, g)
        g_s = jax.grad(mean_loss)(point, batch)
        velocity = jax.tree.map(lambda v, d: MOMENTUM * v + d, velocity, g_s)
        params = jax.tree.map(lambda w, v: w - LEARNING_RATE * v, params, velocity)
        return params, velocity, value

    def optax_contrib(params, state, batch):
        value, g = jax.value_and_grad(mean_loss)(params, batch)
        grad_fn = jax.grad(lambda p, _: mean_loss(p, batch))
        updates, state = contrib.update(g, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state, value

    return {
        "gradient": Row(gradient, optax.tree.zeros_like, 1),
        "plain": Row(plain, base.init, 1),
        "sam by hand": Row(by_hand, optax.tree.zeros_like, 2),
        "optax.contrib.sam": Row(optax_contrib, contrib.init, 2),
    }


def samx_row(
    name: str,
    losses_fn: Callable,
    batch: dict[str, Any],
    watch: Callable[[Callable], Callable] = unchanged,
    wrap: Callable[[Any], Any] = unchanged,
) -> Row:
    """Return the row of a variant.

    Args:
        name: Its name in the registry.
        losses_fn: The losses of the examples.
        batch: A batch, without "index": the positions of its examples in a data set. The batches
            of the row's steps have them.
        watch: Wraps the losses that `update` sees.
        wrap: Wraps the optimizer.
    """
    known, size = VARIANTS[name], len(jax.tree.leaves(batch)[0])
    logits = jax.ShapeDtypeStruct((1,), jnp.float32)
    setting = Setting(batch, size, size, logits=logits, learning_rate=LEARNING_RATE)
    tx = wrap(known.make(RHO, BASES["momentum"](LEARNING_RATE), setting))

    def step(params, state, data):
        data = dict(data)
        index = data.pop("index")
        value, g = jax.value_and_grad(lambda p: losses_fn(p, data).mean())(params)
        watched = watch(losses_fn)
        closures = dict(losses_fn=watched, batch=data, index=index)
        # What is taken for the logits does not change the number of passes.
        closures |= dict(
            apply_fn=lambda params, data: watched(params, data)[:, None],
            loss_on_logits=lambda logits, data: logits[:, 0],
            features_fn=lambda params, data: watched(params, data)[:, None],
            head_fn=lambda params, features: features + 0 * first_matrix(params).mean(),
        )
        # Climbing another loss costs as much as climbing the same one.
        closures |= dict(ascent_fn=lambda params: watched(params, data).mean())
        updates, new = tx.update(g, state, params, value=value, **closures)
        # Do not use `value`: if a variant ignores it, it would keep a forward pass in the program.
        loss = optax.tree.get(new, "loss")
        return optax.apply_updates(params, updates), new, loss

    outside = int(known.uses_gradient)
    return Row(step, tx.init, known.gradients, outside, known.cycle, known.settling)
