"""The task of the digits scripts: images with wrong labels, a small network, and its batches."""

from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.common import files
from examples.common.choices import TRAIN

VALIDATION, BATCH = 297, 100  # of 1797 images; the other 500 are the test split
STEPS_PER_EPOCH = TRAIN // BATCH
# Where a search for it begins; with momentum, most searches ended here or next to it.
LEARNING_RATE = {"sgd": 0.5, "momentum": 0.1, "adamw": 2e-3}


class Network(nnx.Module):
    """A network with two hidden layers, by default from 64 pixels to 10 logits."""

    def __init__(self, width: int, *, inputs: int = 64, classes: int = 10, rngs: nnx.Rngs):
        self.first = nnx.Linear(inputs, width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def features(self, x: jax.Array) -> jax.Array:
        """Return what the output layer gets."""
        return nnx.relu(self.second(nnx.relu(self.first(x))))

    def __call__(self, x):  # noqa: D102
        return self.head(self.features(x))


Width = int | Callable[[nnx.Rngs], nnx.Module]  # of `Network`, or what builds another network


def network_of(width: Width, rngs: nnx.Rngs) -> nnx.Module:
    """Return a new network; one of another kind has `features` and `head` too."""
    return width(rngs) if callable(width) else Network(width, rngs=rngs)


@cache
def graph_of(width: Width) -> nnx.GraphDef:
    """Return what `nnx.merge` needs beside the parameters; nothing is computed."""
    return nnx.graphdef(nnx.eval_shape(lambda: network_of(width, nnx.Rngs(0))))


@cache
def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return the images [1797, 64], of 0 to 16, and the digits, from scikit-learn's own file.

    They are those of `sklearn.datasets.load_digits`, whose import takes a second.
    """
    path = files.in_package("sklearn", "datasets/data/digits.csv.gz")
    rows = np.loadtxt(path, delimiter=",")
    return rows[:, :-1], rows[:, -1].astype(int)


@jax.jit
def split(seeds: jax.Array | np.ndarray, noise: jax.Array | float):
    """Return the training, validation and test split of each seed.

    A share `noise` of the training labels is wrong.
    """
    return jax.lax.map(partial(split_of, noise), seeds)  # compiles in half the time of `vmap`


def split_of(noise: jax.Array | float, seed: jax.Array):
    """Return the training, validation and test split of one seed."""
    x, y = load_digits()
    x, y = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y, jnp.int32)
    order, wrong = jax.random.split(jax.random.fold_in(jax.random.key(0), seed))
    order = jax.random.permutation(order, len(x))
    flipped = (y + jax.random.randint(wrong, y.shape, 1, 10)) % 10  # always another digit
    is_flipped = jnp.arange(TRAIN) < noise * TRAIN
    train, validation, test = jnp.split(order, [TRAIN, TRAIN + VALIDATION])
    return (
        {
            "x": x[train],
            "y": jnp.where(is_flipped, flipped[train], y[train]),
            "index": jnp.arange(TRAIN, dtype=jnp.int32),
        },
        {"x": x[validation], "y": y[validation]},
        {"x": x[test], "y": y[test]},
    )


@partial(jax.jit, static_argnums=1)
def initialize(seeds: jax.Array | np.ndarray, width: Width):
    """Return the initial parameters of each seed."""

    def of_seed(seed):
        return nnx.state(network_of(width, nnx.Rngs(jax.random.key(seed))), nnx.Param)

    return jax.lax.map(of_seed, seeds)


def shuffled(seed: jax.Array, epoch: jax.Array | int) -> jax.Array:
    """Return the seed's batches of one epoch, as indices of training images [steps, batch]."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), seed), epoch)
    return jax.random.permutation(key, TRAIN).reshape(STEPS_PER_EPOCH, BATCH)


def rows_of(data: dict[str, jax.Array], rows: jax.Array) -> dict[str, jax.Array]:
    """Return the images and labels at the indices `rows`."""
    return {name: leaf[rows] for name, leaf in data.items()}


def describe(noise: float) -> str:
    """Describe the labels of a table."""
    return f"{noise:.0%} of the training labels wrong" if noise else "clean labels"
