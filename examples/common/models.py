"""Three models whose steps are timed: a dense net, a conv net and a small transformer."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.common.choices import BATCHES

CLASSES = 10  # number of label classes


class Model(NamedTuple):
    """A model to train, the shape of one input, and the default batch size.

    `narrow` makes a model of the same layers that runs fast. It is used to count passes.
    """

    make: Callable[[nnx.Rngs], nnx.Module]
    shape: tuple[int, ...]
    batch: int
    narrow: Callable[[nnx.Rngs], nnx.Module] | None = None


def dense(rngs: nnx.Rngs, width: int = 1024) -> nnx.Module:
    layer = functools.partial(nnx.Linear, rngs=rngs)
    return nnx.Sequential(
        *(layer(784, width), nnx.relu, layer(width, width), nnx.relu, layer(width, 10))
    )


def conv(rngs: nnx.Rngs, width: int = 32) -> nnx.Module:
    layer = functools.partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
    return nnx.Sequential(
        *(layer(3, width), nnx.relu, layer(width, 2 * width, strides=2), nnx.relu),
        *(layer(2 * width, 4 * width, strides=2), nnx.relu),
        *(layer(4 * width, 4 * width, strides=2), nnx.relu),
        *(lambda x: x.mean(axis=(1, 2)), nnx.Linear(4 * width, 10, rngs=rngs)),
    )


class Residual(nnx.Module):
    """`x + branch(x)`, with layer normalization at the start of the branch."""

    def __init__(self, width: int, *layers: Callable, rngs: nnx.Rngs):
        self.branch = nnx.Sequential(nnx.LayerNorm(width, rngs=rngs), *layers)

    def __call__(self, x):  # noqa: D102
        return x + self.branch(x)


def transformer(rngs: nnx.Rngs, width: int = 128) -> nnx.Module:
    layer = functools.partial(nnx.Linear, rngs=rngs)

    def block() -> tuple[nnx.Module, nnx.Module]:
        attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        mlp = layer(width, 4 * width), nnx.gelu, layer(4 * width, width)
        return Residual(width, attention, rngs=rngs), Residual(width, *mlp, rngs=rngs)

    # Position embeddings are left out: they would cost almost nothing.
    return nnx.Sequential(
        *(layer(48, width), *block(), *block(), nnx.LayerNorm(width, rngs=rngs)),
        *(lambda x: x.mean(axis=1), layer(width, 10)),
    )


narrow = functools.partial(functools.partial, width=4)

MODELS = {
    "dense": Model(dense, (784,), BATCHES["dense"], narrow(dense)),
    "conv": Model(conv, (32, 32, 3), BATCHES["conv"], narrow(conv)),
    # 64 patches of 4 x 4 pixels
    "transformer": Model(transformer, (64, 48), BATCHES["transformer"], narrow(transformer)),
}


def problem(model: str, size: int) -> tuple[Callable, Any, dict[str, jax.Array]]:
    """Return the model as `losses_fn(params, batch) -> [B]`, its parameters, and a batch."""
    return as_problem(MODELS[model], size)


def as_problem(model: Model, size: int) -> tuple[Callable, Any, dict[str, jax.Array]]:
    """Return the same as `problem`, for a model without a name."""
    make, shape = model.make, model.shape
    graph, params = nnx.split(make(nnx.Rngs(0)))
    # Every call flattens its arguments, and an `nnx.State` flattens several times slower than a
    # dict. For a model of many arrays this would take a large part of a small step's time.
    params = nnx.to_pure_dict(params)
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.normal(size=(size, *shape)), jnp.float32),
        "label": jnp.asarray(rng.integers(CLASSES, size=size)),
    }

    def losses_fn(params, batch):
        logits = nnx.merge(graph, params)(batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])

    return losses_fn, params, batch
