"""Tabular data: benign and malignant tumors of the breast, from scikit-learn.

Each of the 569 tumors is described by 30 numbers, measured on images of its cells. 200 benign and
20 malignant ones are for training. The other two splits give both classes the same weight. So a
network that calls everything benign has an accuracy of one half.

SGD with momentum at a learning rate of 0.05 has a training accuracy of 1 and a test accuracy of
0.90, after 440 steps and after 880. A gradient takes 0.02 ms on one core.
"""

from functools import cache, lru_cache

import numpy as np
from flax import nnx

from examples.common import files
from examples.common.digits_task import Network
from examples.compare.task import Splits, Task, balanced_weights

WIDTH = 64
COUNTS = (200, 20)  # training examples of each class: 0 is benign, 1 malignant
VALIDATION = 50  # examples of each class; the test split has all others


@cache
def load() -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers [569, 30], and which tumors are malignant, from scikit-learn's own file.

    They are those of `sklearn.datasets.load_breast_cancer`, which has the classes the other way
    round, and whose import takes a second.
    """
    path = files.in_package("sklearn", "datasets/data/breast_cancer.csv")
    rows = np.loadtxt(path, delimiter=",", skiprows=1)
    return rows[:, :-1], 1 - rows[:, -1].astype(np.int32)


@lru_cache(maxsize=64)
def data(seed: int) -> Splits:
    """Return the splits of a seed, standardized by the training split."""
    x, y = load()
    rng = np.random.default_rng(seed)
    parts = [
        np.split(rng.permutation(np.flatnonzero(y == k)), [count, count + VALIDATION])
        for k, count in enumerate(COUNTS)
    ]
    rows = [np.concatenate(part) for part in zip(*parts, strict=True)]
    mean, deviation = x[rows[0]].mean(axis=0), x[rows[0]].std(axis=0)
    x = ((x - mean) / deviation).astype(np.float32)
    train, *others = ({"x": x[part], "y": y[part]} for part in rows)
    train["index"] = np.arange(sum(COUNTS), dtype=np.int32)
    return Splits(train, *(part | {"weight": balanced_weights(part["y"])} for part in others))


def network(rngs: nnx.Rngs) -> nnx.Module:
    return Network(WIDTH, inputs=30, classes=2, rngs=rngs)


TASKS = {
    "tabular": Task(
        title="tabular data, 10 to 1",
        tier=1,
        data=data,
        network=network,
        num_train=sum(COUNTS),
        batch=20,
        budget=880,
        learning_rate=0.1,
        input_noise=0.2,
        seeds=20,
        tuning_seeds=8,
        measured=sum(COUNTS),
        counts=COUNTS,
    ),
}
