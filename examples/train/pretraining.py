"""A small GPT that is pre-trained on text: where preference tuning and fine-tuning begin."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np
import optax

from examples.common.gpt import Size
from examples.common.language_task import Task, make_task, train_step
from examples.train import text
from examples.train.language_model import make_base

WARMUP = 0.05  # share of the steps
WEIGHT_DECAY = 0.1


def pretrain(
    size: Size, data: np.ndarray, *, steps: int, batch: int, learning_rate: float, seed: int
) -> tuple[Callable[..., jax.Array], Any]:
    """Train a model with AdamW on bytes, uint8[N].

    Returns:
        The function `apply_fn(params, x, method)` of the model, the same one for every seed, and
        the parameters.
    """
    task, train = _program(size, steps, learning_rate)
    batches = text.train_batches(data, size.length, batch, seed=seed, num_threads=0)
    stacked = jax.tree.map(lambda *x: np.stack(x), *(next(batches) for _ in range(steps)))
    return task.state.apply_fn, train(task.init(jax.random.key(seed)), stacked).params


@cache
def _program(size: Size, steps: int, learning_rate: float) -> tuple[Task, Any]:
    """Return the task, and the compiled function that trains over stacked batches."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, round(WARMUP * steps)), max(2, steps)
    )
    task = make_task(size, make_base(schedule, WEIGHT_DECAY), devices=jax.devices()[:1])
    return task, jax.jit(lambda state, batches: jax.lax.scan(train_step, state, batches)[0])
