"""What a step costs: its passes, counted while it runs, and its flops, read from the program."""

import functools

import jax
import jax.numpy as jnp
import optax
import problem
from cases import VARIANTS

WIDTH, BATCH_SIZE = 256, 256


class Counter:
    """Count the forward and backward passes through a loss. Vectorized passes count one by one.

    A pass over some of the examples counts as that share of a pass.
    """

    def __init__(self):
        self.passes = {"forward": 0.0, "backward": 0.0}

    def _add(self, direction, share, _):
        self.passes[direction] += share

    def watch(self, losses):
        """Return the mean of the losses, with a callback in each direction."""
        share = len(losses) / problem.BATCH_SIZE

        @jax.custom_vjp
        def watched(loss):
            jax.debug.callback(functools.partial(self._add, "forward", share), loss)
            return loss

        def forward(loss):
            return watched(loss), loss

        def backward(loss, cotangent):
            add = functools.partial(self._add, "backward", share)
            # `0 * loss` makes `vmap` call back once for each loss of a vector.
            jax.debug.callback(add, cotangent + 0 * loss)
            return (cotangent,)

        watched.defvjp(forward, backward)
        return watched(losses.mean())


def count_passes(tx, steps):
    """Count the passes inside each `update`; also return the state after it."""
    data, params = problem.make("float32")
    counter = Counter()

    def losses_fn(params, batch):
        losses = problem.losses_fn(params, batch)
        return losses + 0.0 * counter.watch(losses)

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(lambda p: problem.losses_fn(p, batch).mean())(params)
        closures = {"losses_fn": losses_fn, "batch": batch, **problem.further(batch, losses_fn)}
        updates, state = tx.update(grads, state, params, **closures)
        return optax.apply_updates(params, updates), state

    state, history = tx.init(params), []
    for t in range(steps):
        params, state = step(params, state, problem.batch_at(data, t))
        jax.block_until_ready(params)
        jax.effects_barrier()
        history.append((dict(counter.passes), state))
        counter.passes |= dict.fromkeys(counter.passes, 0)
    return history


def wide_problem():
    """A dense network in which matrix products dominate the cost."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "W1": jax.random.normal(keys[0], (WIDTH, WIDTH)) / 16,
        "W2": jax.random.normal(keys[1], (WIDTH, WIDTH)) / 16,
        "W3": jax.random.normal(keys[2], (WIDTH, 10)) / 16,
    }
    batch = {"x": jnp.ones((BATCH_SIZE, WIDTH)), "y": jnp.zeros(BATCH_SIZE, jnp.int32)}
    return params, batch


def wide_losses(params, batch):
    hidden = jax.nn.relu(jax.nn.relu(batch["x"] @ params["W1"]) @ params["W2"])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["W3"], batch["y"])


def build(name, base, batch):
    """Build a row for this problem; K-SAM selects half of its batch, like similar rows."""
    changes = {
        "ksam": {"num_selected": len(batch["y"]) // 2},
        "mup_sam": {"scales": {"W1": 4.0, "W2": 1.0, "W3": 0.25}},
    }
    return VARIANTS[name].build(base, batch_like=batch, **changes.get(name, {}))


@functools.cache
def compiled(name, donate=False):
    """Compile the step of a variant or its base ("plain"), or one pass ("gradient", "forward")."""
    params, batch = wide_problem()

    def gradient(params, batch):
        return jax.value_and_grad(lambda p: wide_losses(p, batch).mean())(params)

    if name == "gradient":
        return jax.jit(gradient).lower(params, batch).compile()
    if name == "forward":
        return jax.jit(wide_losses).lower(params, batch).compile()
    base = optax.sgd(0.1, momentum=0.9)
    tx = base if name == "plain" else build(name, base, batch)
    tx = optax.with_extra_args_support(tx)

    def step(params, state, batch):
        value, grads = gradient(params, batch)
        further = problem.further(batch, wide_losses)
        closures = {"losses_fn": wide_losses, "batch": batch, **further}
        updates, state = tx.update(grads, state, params, value=value, **closures)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1) if donate else ())
    return jitted.lower(params, tx.init(params), batch).compile()


def flops(program):
    return program.cost_analysis()["flops"]


# XLA counts a loop's body once, however often it runs, and of a branch the more expensive side.
STRAIGHT = [name for name, case in VARIANTS.items() if case.counts_once]
