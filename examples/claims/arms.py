"""Train methods on the digits, each tuned in the same way: what scripts of claims share."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from examples.common.digits_task import STEPS_PER_EPOCH
from examples.common.registry import Variant
from examples.common.training import PLANNED, axes_of, measure, runs_to_try
from examples.common.tuning import Axis, fixed

AS_SAM = " as sam"  # ends the name of an arm that trains with SAM's learning rate and rho


def train_arms(
    arms: Mapping[str, Variant],
    args: argparse.Namespace,
    noises: Sequence[float],
    is_measured: bool = False,
    axes: Callable[[str, Variant], Sequence[Axis]] | None = None,
) -> list[dict[str, Any]]:
    """Tune and train each arm, for the same number of epochs; see `training.measure`.

    Args:
        arms: A variant for each name, such as one for each value of a method's own number.
        args: `base`, `width`, `epochs`, `seeds` and `rho`, as `arguments.add_settings` adds them;
            a function in place of `width` builds another network: `digits_task.network_of`.
        noises: Shares of wrong labels; each arm is tuned and trained for each of them.
        is_measured: Whether sharpness is measured on all training images at the end.
        axes: Returns the axes of learning rate and rho that are searched for an arm; default those
            of digits.py.

    Returns:
        The results of `training.measure`, in the order of the arms, then of the shares.
    """

    def work(variant: Variant, runs: int) -> float:
        return STEPS_PER_EPOCH * runs * variant.gradients

    total = sum(work(arm, runs_to_try(PLANNED) + args.seeds) for arm in arms.values())
    results = []
    with tqdm(
        total=total * args.epochs * len(noises),
        unit=" gradients",
        unit_scale=True,
        smoothing=0.1,
        disable=None,
    ) as bar:
        for name, arm in arms.items():
            results += measure(
                name,
                arm,
                axes(name, arm) if axes else axes_of(arm, args.base, args.rho),
                args,
                args.epochs,
                list(noises),
                bar,
                lambda runs, arm=arm: work(arm, runs),
                is_measured * STEPS_PER_EPOCH * args.epochs,
            )
    return results


def as_chosen(result: dict[str, Any], arm: Variant) -> list[Axis]:
    """Return axes of an arm that hold the numbers chosen for another one, and nothing else."""
    return [fixed([result["learning_rate"]]), fixed([result["rho"] if arm.start else 0.0])]


def points(results: Sequence[dict[str, Any]], row: str, noise: float) -> np.ndarray:
    """Return the test accuracies of an arm, one for each seed, in percent."""
    return np.round(100 * np.asarray(of(results, row, noise)["test_accuracy"]), 4)


def of(results: Sequence[dict[str, Any]], row: str, noise: float) -> dict[str, Any]:
    """Return the result of an arm."""
    [found] = [each for each in results if each["row"] == row and each["noise"] == noise]
    return found
