"""A small GPT that is pre-trained on text: where preference tuning and fine-tuning begin."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.common.gpt import Size, losses_of
from examples.common.language_task import make_task, train_step
from examples.train import text
from examples.train.language_model import make_base

WARMUP = 0.05  # share of the steps
WEIGHT_DECAY = 0.1
EVALUATED = 64  # examples at a time


def pretrain(
    size: Size, data: np.ndarray, *, steps: int, batch: int, learning_rate: float, seed: int
) -> tuple[Callable[..., jax.Array], Any]:
    """Train a model with AdamW on bytes, uint8[N].

    Returns:
        The function `apply_fn(params, x, method)` of the model, and the parameters.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, round(WARMUP * steps)), steps
    )
    task = make_task(size, make_base(schedule, WEIGHT_DECAY), devices=jax.devices()[:1])
    batches = text.train_batches(data, size.length, batch, seed=seed, num_threads=0)
    stacked = jax.tree.map(lambda *x: np.stack(x), *(next(batches) for _ in range(steps)))

    @jax.jit
    def train(state, stacked):
        return jax.lax.scan(train_step, state, stacked)[0]

    return task.state.apply_fn, train(task.init(jax.random.key(seed)), stacked).params


@partial(jax.jit, static_argnums=0)
def mean_loss(apply_fn: Callable[..., jax.Array], params: Any, tokens: jax.Array) -> jax.Array:
    """Return the mean loss, in nats per byte, on int[N, length + 1]; N is a multiple of 64."""

    def part_loss(part):
        return losses_of(apply_fn(params, part[:, :-1]), part[:, 1:]).mean()

    return jax.lax.map(part_loss, tokens.reshape(-1, EVALUATED, tokens.shape[-1])).mean()


def held_out_windows(data: np.ndarray, length: int, count: int) -> jax.Array:
    """Return `count` windows all over a text, int[count, length + 1]."""
    return jnp.asarray(text.windows(data, length, text.spread_starts(data, length, count)))
