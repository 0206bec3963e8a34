"""MNIST-1D: ten classes of short signals, and a small residual network.

A signal is one of ten templates: padded, stretched, scaled, moved, sheared and noisy. It has 40
numbers. `make_pool` makes the published data set of 5,000 signals (Greydanus and Kobak, 2024), from
the published seed. Every seed of the comparison has its own split of them. 640 training signals are
few: the network learns them all, and still makes mistakes on new ones. So the task shows what a
flat minimum is worth when all labels are right.

SGD with momentum at a learning rate of 0.2 has a training accuracy of 1 and a test accuracy of 0.70
after 750 steps, 0.75 after 1,500. A gradient takes 0.4 ms on one core.

A first run had 1,000 training signals, batches of 50 and 1,000 gradients. After 15 methods it was
stopped and the numbers were changed: in 500 steps neither SGD nor SAM had learned the training
signals (95% and 90%), their best learning rates were at the limit of stability, and single seeds
failed. SAM was 9 points below `base2x` there.
"""

from functools import cache, lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.compare.task import Splits, Task, equal_weights

POOL, CLASSES, PUBLISHED_SEED = 5000, 10, 42
TRAIN, VALIDATION, TEST = 640, 500, 1500
WIDTH = 16  # channels

# The templates, one row for each class. They are standardized, and moved to begin at 0.
TEMPLATES = np.array(
    [
        [5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5],
        [5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5],
        [5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5],
        [5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5],
        [5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5],
        [5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5],
        [5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5],
        [5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5],
        [5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5],
        [5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5],
    ]
)
PADDING = (36, 60)  # fewest and most zeros after a template
LONG, SHORT = 72, 40  # numbers of a signal before and after the last interpolation
SCALE, SHEAR = 0.4, 0.75  # ranges of the factor and of the slope, each centred
MOVES = 48  # a signal moves by less than this
CORRELATED, INDEPENDENT = 0.25, 0.02  # standard deviations of the noise
SMOOTH = 2.0  # the correlated noise is smoothed by a Gaussian of this width, cut at four widths


@cache
def make_pool() -> tuple[np.ndarray, np.ndarray]:
    """Return the published data set: signals [5000, 40], and classes.

    The random numbers are drawn in the published order, so that the signals are the published ones.
    """
    rng = np.random.RandomState(PUBLISHED_SEED)
    x = standardized(TEMPLATES, axis=1)
    templates = (x - x[:, :1]) / 6
    y = np.repeat(np.arange(CLASSES), POOL // CLASSES)
    smooth, shorten = smoothing(LONG), interpolation(LONG, SHORT)
    signals = np.stack([make_signal(templates[k], rng, smooth) for k in y]) @ shorten
    order = rng.permutation(POOL)
    return standardized(signals[order]).astype(np.float32), y[order].astype(np.int32)


def standardized(x: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Return numbers of mean 0 and standard deviation 1."""
    x = x - x.mean(axis, keepdims=True)
    return x / x.std(axis, keepdims=True)


def make_signal(template: np.ndarray, rng: np.random.RandomState, smooth: np.ndarray) -> np.ndarray:
    """Return one signal of a class, before it is shortened. `smooth` smooths the noise."""
    few, many = PADDING
    padded = np.zeros(len(template) + few + int(rng.rand() * (many - few + 1)))
    padded[: len(template)] = template + 1e-8
    x = np.interp(np.linspace(0, 1, LONG), np.linspace(0, 1, len(padded)), padded)
    x *= 1 + SCALE * (rng.rand() - 0.5)
    x = np.roll(x, rng.randint(MOVES))
    noise = CORRELATED * rng.randn(LONG) @ smooth
    x = np.where(x != 0, x, noise) + INDEPENDENT * rng.randn(LONG)
    slope = SHEAR * (rng.rand() - 0.5)
    return x - slope * np.linspace(-0.5, 0.5, LONG)


def smoothing(length: int) -> np.ndarray:
    """Return the matrix that smooths a signal, which continues as its mirror image at both ends."""
    reach = int(4 * SMOOTH)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / SMOOTH) ** 2)
    padded = np.pad(np.eye(length), ((0, 0), (reach, reach)), "symmetric")
    return np.stack([np.convolve(row, kernel / kernel.sum(), "valid") for row in padded])


def interpolation(length: int, new: int) -> np.ndarray:
    """Return the matrix that interpolates a signal of one length at another length."""
    before, after = np.linspace(0, 1, length), np.linspace(0, 1, new)
    return np.stack([np.interp(after, before, row) for row in np.eye(length)])


@lru_cache(maxsize=64)
def data(seed: int) -> Splits:
    """Return the splits of a seed."""
    x, y = make_pool()
    order = np.random.default_rng(seed).permutation(POOL)
    ends = np.cumsum([TRAIN, VALIDATION, TEST])
    train, *others = ({"x": x[rows], "y": y[rows]} for rows in np.split(order, ends)[:3])
    train["index"] = np.arange(TRAIN, dtype=np.int32)
    return Splits(train, *(part | {"weight": equal_weights(len(part["y"]))} for part in others))


class Convolution(nnx.Module):
    """A convolution over three neighbours, as one matrix product.

    XLA's own convolutions of so few numbers take several times as long.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(3 * width, width, rngs=rngs)

    def __call__(self, x):  # noqa: D102
        padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
        return self.linear(jnp.concatenate([padded[:, :-2], x, padded[:, 2:]], axis=-1))


class Block(nnx.Module):
    """A residual branch of two convolutions, with LayerNorm at its start."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.first = Convolution(width, rngs=rngs)
        self.second = Convolution(width, rngs=rngs)

    def __call__(self, x):  # noqa: D102
        return x + self.second(nnx.relu(self.first(self.norm(x))))


class Network(nnx.Module):
    """A stem, two residual blocks, and the mean over all positions.

    The stem takes eight numbers for each position, four of them shared with the next one.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.stem = nnx.Linear(8, width, rngs=rngs)
        self.first, self.second = (Block(width, rngs=rngs) for _ in range(2))
        self.head = nnx.Linear(width, CLASSES, rngs=rngs)

    def features(self, x: jax.Array) -> jax.Array:
        """Return what the output layer gets."""
        x = jnp.pad(x, ((0, 0), (2, 2))).reshape(len(x), -1, 4)
        x = self.stem(jnp.concatenate([x[:, :-1], x[:, 1:]], axis=-1))
        return nnx.relu(self.second(self.first(x))).mean(axis=1)


def network(rngs: nnx.Rngs) -> nnx.Module:
    return Network(WIDTH, rngs=rngs)


TASKS = {
    "mnist1d": Task(
        title="MNIST-1D",
        tier=1,
        data=data,
        network=network,
        num_train=TRAIN,
        has_normalization=True,
        batch=32,
        budget=1500,
        learning_rate=0.2,
        input_noise=0.2,
        seeds=20,
        tuning_seeds=4,
        measured=TRAIN,
    ),
}
