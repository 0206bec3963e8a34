"""AsyncSAM on the tiny problem, with a descent batch and an ascent batch."""

import jax
import optax
import problem

STEPS = 6  # the first climbs nothing, or a fresh gradient
BASES = {"momentum": optax.sgd(0.1, momentum=0.9), "adamw": optax.adamw(0.01)}


def loss(params, batch):
    return problem.losses_fn(params, batch).mean()


gradient = jax.jit(jax.grad(loss))


def batches(ascent_size, steps=STEPS):
    data, _ = problem.make()
    whole = [problem.batch_at(data, t) for t in range(steps)]
    return [(batch, jax.tree.map(lambda x: x[:ascent_size], batch)) for batch in whole]


def make_step(tx):
    """Make one step that computes both gradients; the incoming gradient is not read."""

    def step(params, state, batch, ascent_batch):
        updates, state = tx.update(
            optax.tree.zeros_like(params),  # nothing reads it
            state,
            params,
            value_fn=lambda p: loss(p, batch),
            ascent_fn=lambda p: loss(p, ascent_batch),
        )
        return optax.apply_updates(params, updates), state

    return step
