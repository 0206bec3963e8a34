"""A language model: a small GPT learns Python's own manual by heart, byte by byte.

The manual is part of every Python, and differs a little from one version of Python to the next.
Each of its paragraphs counts once, because it repeats many. The text is cut into windows of 64
bytes. Every seed has its own training windows. They are few, so that the model overfits.

AdamW at a learning rate of 0.002 has a training loss of 1.56 and a test loss of 2.21 after 640
steps, 40 epochs. A gradient takes 10 ms on one core.
"""

import ast
import sysconfig
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from flax import nnx

from examples.common.gpt import GPT, Size
from examples.compare.task import Splits, Task, equal_weights

TRAIN, VALIDATION, TEST = 128, 256, 1024  # windows
SIZE = Size(width=64, depth=2, vocabulary=256, length=64)


@cache
def load() -> tuple[np.ndarray, np.ndarray]:
    """Return all windows: bytes, and the bytes that follow them, int32[windows, 64] each."""
    from examples.train import prose, text  # they import grain, which takes a second

    source = Path(sysconfig.get_path("stdlib"), prose.MANUAL).read_text("utf-8")
    topics = "\n\n".join(prose.manual(ast.parse(source)))
    english = "\n\n".join(unique(topics.split("\n\n"))).encode("ascii", "ignore")
    found = np.frombuffer(english, np.uint8)
    count = text.examples_in(found, SIZE.length)
    tokens = text.windows(found, SIZE.length, np.arange(count) * SIZE.length)
    _, first = np.unique(tokens[:, :-1], axis=0, return_index=True)  # a few are the same
    return tokens[first, :-1], tokens[first, 1:]


def unique(paragraphs: list[str]) -> list[str]:
    """Return each paragraph once, whatever its line breaks and its indentation."""
    return list({" ".join(paragraph.split()): paragraph for paragraph in paragraphs}.values())


@lru_cache(maxsize=64)
def data(seed: int) -> Splits:
    """Return the splits of a seed; no two windows overlap."""
    x, y = load()
    order = np.random.default_rng(seed).permutation(len(x))
    ends = np.cumsum([TRAIN, VALIDATION, TEST])
    train, *others = ({"x": x[rows], "y": y[rows]} for rows in np.split(order, ends)[:3])
    train["index"] = np.arange(TRAIN, dtype=np.int32)
    return Splits(train, *(part | {"weight": equal_weights(len(part["y"]))} for part in others))


def network(rngs: nnx.Rngs) -> nnx.Module:
    return GPT(SIZE, rngs=rngs)


TASKS = {
    "language": Task(
        title="language model, bytes",
        tier=3,
        data=data,
        network=network,
        num_train=TRAIN,
        has_normalization=True,
        batch=8,
        budget=640,
        learning_rate=2e-3,
        input_noise=0.0,
        seeds=5,
        tuning_seeds=2,
        measured=32,
        base="adamw",
        main="loss",
    ),
}
