"""What a task of the comparison is: data, a network, a budget; and its three splits.

A task is one entry of `tasks.TASKS`. Everything else of the comparison is the same for all tasks.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from flax import nnx

Split = dict[str, np.ndarray]


class Splits(NamedTuple):
    """The three splits of a seed: dicts of NumPy arrays whose first axis is the examples.

    Attributes:
        train: "x", the inputs; "y", int32, the labels; "index", int32, the examples' numbers from
            0.
        validation: "x", "y" and "weight", float32: the weights of the examples in accuracy and
            loss, of mean 1. They are 1 where all examples count the same. Where classes are
            imbalanced, they give every class the same weight, and the accuracy is the balanced
            one.
        test: The same.
    """

    train: Split
    validation: Split
    test: Split


class Task(NamedTuple):
    """A task. All shapes are the same for every seed.

    Attributes:
        title: What is learned, for tables and figures.
        tier: 1, 2 or 3.
        data: `seed -> Splits`; every seed has its own split, wrong labels and so on. It is called
            once for each run, so it should be fast, or cached.
        network: `rngs -> module`. The module has `features(x)`, what the output layer gets, and
            `head(features)`, the logits [..., classes]. BatchNorm must have `momentum=0.0` and
            `use_running_average=False`: in training it uses the statistics of the batch, and
            then those of all training examples at the final parameters.
        num_train: Number of training examples.
        batch: Examples of a step. A step never mixes two epochs: what is left of one is dropped.
        budget: Gradients that every method spends, each over one batch. `base` spends half of it.
        learning_rate: Where the search for the learning rate begins, 1, 2 or 5 times a power of
            ten. A variant that is itself the optimizer has its own in the registry.
        input_noise: Standard deviation of the noise on the inputs under which the test loss is
            measured; 0 where inputs are integers.
        seeds: Reported seeds are 0, 1, ..., seeds − 1.
        tuning_seeds: How many seeds, from 1000 on, choose the hyperparameters.
        measured: Number of training examples on which sharpness is measured: drawn
            at random.
        base: The base optimizer, one of `registry.BASES`.
        main: The main result, "accuracy" or "loss", on the test split; tuning maximizes the
            validation accuracy, or minimizes the validation loss.
        start: `seed -> parameters`, with which the training starts, as a dict of dicts; by default
            those of `network`.
        has_normalization: Whether the network has normalization layers, so that SAM-ON is compared.
        counts: Number of training examples of each class where classes are imbalanced; variants
            for rare classes (Focal-SAM, ImbSAM) are compared only there.
    """

    title: str
    tier: int
    data: Callable[[int], Splits]
    network: Callable[[nnx.Rngs], nnx.Module]
    num_train: int
    batch: int
    budget: int
    learning_rate: float
    input_noise: float
    seeds: int
    tuning_seeds: int
    measured: int
    base: str = "momentum"
    main: Literal["accuracy", "loss"] = "accuracy"
    start: Callable[[int], Any] | None = None
    has_normalization: bool = False
    counts: tuple[int, ...] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of whole batches in the training split."""
        return self.num_train // self.batch


def equal_weights(count: int) -> np.ndarray:
    """Return weights of examples that all count the same."""
    return np.ones(count, np.float32)


def balanced_weights(y: np.ndarray) -> np.ndarray:
    """Return weights of mean 1 that give every class the same weight in all."""
    classes, place, counts = np.unique(y, return_inverse=True, return_counts=True)
    return (len(y) / (len(classes) * counts[place])).astype(np.float32)
