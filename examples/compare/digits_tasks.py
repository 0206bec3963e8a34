"""Three tasks on scikit-learn's digits: with wrong labels, with clean ones, and with a long tail.

The first two have the data and the network of digits.py. In the long tail, the classes have from 80
training images to 2, and which digit is how frequent differs from seed to seed.
"""

from functools import lru_cache, partial

import jax
import numpy as np
from flax import nnx

from examples.common.choices import TRAIN
from examples.common.digits_task import BATCH, Network, load_digits, split
from examples.compare.task import Splits, Task, balanced_weights, equal_weights

WIDTH = 64
CLASSES, LARGEST, SMALLEST = 10, 80, 2  # classes of the long tail, and their training images
VALIDATION = 24  # images of each class; the test split has all others, at least 70 of each class
COUNTS = tuple(round(LARGEST * (SMALLEST / LARGEST) ** (k / (CLASSES - 1))) for k in range(CLASSES))


def network(rngs: nnx.Rngs) -> nnx.Module:
    return Network(WIDTH, rngs=rngs)


@lru_cache(maxsize=64)
def with_noise(noise: float, seed: int) -> Splits:
    """Return the splits of digits.py, of which a share `noise` of the training labels is wrong."""
    found = jax.tree.map(lambda x: x[0], jax.device_get(split(np.array([seed]), noise)))
    train, *others = found
    return Splits(train, *(part | {"weight": equal_weights(len(part["y"]))} for part in others))


@lru_cache(maxsize=64)
def long_tail(seed: int) -> Splits:
    """Return a training split with few images of most classes, and two balanced splits.

    Label k is the digit with the k-th most training images.
    """
    x, digits = load_digits()
    x = (x / 16).astype(np.float32)
    rng = np.random.default_rng(seed)
    rows: tuple[list, list, list] = [], [], []
    for digit, count in zip(rng.permutation(CLASSES), COUNTS, strict=True):
        mine = rng.permutation(np.flatnonzero(digits == digit))
        parts = np.split(mine, [count, count + VALIDATION])
        for found, part in zip(rows, parts, strict=True):
            found.append(part)
    splits = []
    for found in rows:
        y = np.repeat(np.arange(CLASSES, dtype=np.int32), [len(part) for part in found])
        order = rng.permutation(len(y))
        splits.append({"x": x[np.concatenate(found)][order], "y": y[order]})
    train, validation, test = splits
    train["index"] = np.arange(len(train["y"]), dtype=np.int32)
    for part in (validation, test):
        part["weight"] = balanced_weights(part["y"])
    return Splits(train, validation, test)


def digits(title: str, noise: float) -> Task:
    return Task(
        title=title,
        tier=1,
        data=partial(with_noise, noise),
        network=network,
        num_train=TRAIN,
        batch=BATCH,
        budget=800,
        learning_rate=0.1,
        input_noise=0.2,
        seeds=20,
        tuning_seeds=8,
        measured=TRAIN,
    )


TASKS = {
    "digits-noisy": digits("digits, 30% of the labels wrong", 0.3),
    "digits-clean": digits("digits, clean labels", 0.0),
    "digits-long-tail": digits("digits, long tail", 0.0)._replace(
        data=long_tail, num_train=sum(COUNTS), batch=40, measured=sum(COUNTS), counts=COUNTS
    ),
}
