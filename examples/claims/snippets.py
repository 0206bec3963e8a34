"""AdaSAM: is it better than SGD, SAM and Adam in a language task?

    python examples/claims/snippets.py

A network reads 64 bytes of Python, and tells from which of eight modules of the standard library
they come. It is a bag of trigrams: the embeddings of three neighbouring bytes are averaged, and go
through a hidden layer. 1600 snippets are for training. Validation and test snippets come from other
parts of the same files. So nothing is downloaded, and the text differs a little between versions of
Python.

All rows take as many steps. Each has its own learning rate and rho, chosen on the validation
snippets, with seeds that are not reported.

    sgd, sam            SGD with momentum, alone and with SAM
    adamw, adamw-sam    AdamW, alone and with SAM; the paper's AMSGrad is close to it
    adasam              AdaSAM

The script prints a table and the claims, and writes results.json, snippets.json and snippets.png to
--out. It takes about three minutes on two CPU cores.
"""

import argparse

from examples.common import arguments

NAME = "snippets"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=480, help="of 50 snippets each")
    arguments.add_out(parser, NAME)
    args = parser.parse_args(argv)
    arguments.check_range(parser, args, "seeds", high=1000)
    arguments.check_range(parser, args, "steps")
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import sysconfig
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from examples.claims.claim import Claim, found_of, print_claims, save
from examples.claims.task_rows import train_rows
from examples.common import figures, files
from examples.common.intervals import mean_interval
from examples.common.output import choose_folder
from examples.common.report import MARK, Report, aligned, marked
from examples.compare.task import Splits, Task, equal_weights

MODULES = (
    *("argparse", "tarfile", "typing", "inspect", "doctest", "pickletools", "turtle"),
    "subprocess",
)
LENGTH, SIZE, WIDTH = 64, 32, 64
TRIGRAMS = 1021  # embeddings; a prime, so that all three bytes count
TRAIN, OTHERS, BATCH = 1600, 800, 50
PARTS = ((0.0, 0.6), (0.6, 0.8), (0.8, 1.0))  # of each file: training, validation, test
# The rows: the base optimizer, and the row of the comparison.
ROWS = {
    "sgd": ("momentum", "base"),
    "sam": ("momentum", "sam"),
    "adamw": ("adamw", "base"),
    "adamw-sam": ("adamw", "sam"),
    "adasam": ("adamw", "adasam"),
}
OTHER = {"sgd": "SGD with momentum", "sam": "SAM with SGD", "adamw": "AMSGrad (here AdamW)"}
CLAIMS = {
    f"over-{row}": Claim(
        ("adasam",),
        f"Better than {name} in language tasks.",
        "abstract",
        f"test accuracy of AdaSAM minus {row}, points; which module a snippet is from, equal steps",
        low=0.0,
    )
    for row, name in OTHER.items()
} | {
    "over-adamw-sam": Claim(
        ("adasam",),
        "Its own form is better than SAM in front of Adam.",
        "not claimed; for comparison",
        "test accuracy of AdaSAM minus SAM with AdamW, points; the same snippets",
        low=0.0,
    )
}


@cache
def sources() -> list[np.ndarray]:
    """Return the bytes of each module."""
    folder = Path(sysconfig.get_path("stdlib"))
    return [np.frombuffer(files.read(folder / f"{name}.py"), np.uint8) for name in MODULES]


def trigrams(snippets: np.ndarray) -> np.ndarray:
    """Return the number of each three neighbouring bytes, below `TRIGRAMS`."""
    one, two, three = (snippets[:, i : LENGTH - 2 + i].astype(np.int64) for i in range(3))
    return ((256 * one + two) * 256 + three) % TRIGRAMS


def snippets_of(rng: np.random.Generator, part: int, count: int) -> dict[str, np.ndarray]:
    """Return random snippets from a part of each module, as many from each."""
    labels = np.arange(count, dtype=np.int32) % len(MODULES)
    low, high = PARTS[part]
    found = np.empty((count, LENGTH), np.uint8)
    for place, label in enumerate(labels):
        source = sources()[label]
        start = rng.integers(int(low * len(source)), int(high * len(source)) - LENGTH)
        found[place] = source[start : start + LENGTH]
    return {"x": trigrams(found).astype(np.int32), "y": labels}


@lru_cache(maxsize=64)
def data(seed: int) -> Splits:
    """Return the splits of a seed."""
    rng = np.random.default_rng((3, seed))
    train = snippets_of(rng, 0, TRAIN)
    train["index"] = np.arange(TRAIN, dtype=np.int32)
    validation, test = (
        snippets_of(rng, part, OTHERS) | {"weight": equal_weights(OTHERS)} for part in (1, 2)
    )
    return Splits(train, validation, test)


class Bag(nnx.Module):
    """The mean of the trigrams' embeddings, a hidden layer, and the output layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(TRIGRAMS, SIZE, rngs=rngs)
        self.hidden = nnx.Linear(SIZE, WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, len(MODULES), rngs=rngs)

    def features(self, x: jax.Array) -> jax.Array:
        """Return what the output layer gets; the sum over √length is as large as one embedding."""
        bag = self.embed(x).sum(axis=1) / np.sqrt(LENGTH)
        return jax.nn.relu(self.hidden(bag))

    def head(self, features: jax.Array) -> jax.Array:
        """Return the logits."""
        return self.out(features)


def task_of(base: str, seeds: int, steps: int) -> Task:
    """Return the task with a base optimizer."""
    return Task(
        title="snippets of Python",
        tier=1,
        data=data,
        network=lambda rngs: Bag(rngs),
        num_train=TRAIN,
        batch=BATCH,
        budget=2 * steps,
        learning_rate=0.1 if base == "momentum" else 0.005,
        input_noise=0.0,
        seeds=seeds,
        tuning_seeds=6,
        measured=TRAIN,
        base=base,
    )


def values_of(accuracies: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """Return how far AdaSAM is ahead of each other row, in points, by seed."""
    return {
        f"over-{row}": (100 * (accuracies["adasam"] - accuracies[row])).tolist()
        for row in accuracies
        if row != "adasam"
    }


def print_table(results: Mapping[str, dict[str, Any]]) -> None:
    """Print one line per row."""
    grid = [["method", "test accuracy, %", "gradients", "lr", "rho"]]
    for row, result in results.items():
        mean, low, high = mean_interval(result["measures"]["test_accuracy"]).scaled(100)
        numbers = [f"{result['gradients']:.0f}", *(marked(result, name) for name in NUMBERS)]
        grid.append([row, f"{mean:.2f} [{low:.2f}, {high:.2f}]", *numbers])
    print("\n".join(aligned(grid)))
    if any(result["edges"] for result in results.values()):
        print(MARK)


NUMBERS = ("learning_rate", "rho")


def draw(results: Mapping[str, dict[str, Any]], path: Path) -> None:
    """Draw the accuracy of each row with its interval."""
    figure = figures.make_figure(1.4, [figures.height_of(len(results))])
    axes = figure.subplots()
    rows = list(results)[::-1]
    for position, row in enumerate(rows):
        number = mean_interval(results[row]["measures"]["test_accuracy"]).scaled(100)
        axes.plot(number[1:], [position, position], color=figures.BLUE)
        axes.plot(number.value, position, "o", color=figures.BLUE)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(-0.7, len(results) - 0.3)
    axes.set_xlabel("test accuracy, %, with 95% intervals")
    axes.grid(axis="x", alpha=0.3)
    figures.save(figure, path, "Which module is a snippet of Python from? Equal steps")


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    args = parse(argv)
    choose_folder(args, NAME)
    report = Report(args)
    tasks = {base: task_of(base, args.seeds, args.steps) for base, _ in ROWS.values()}
    trained = train_rows(tasks, list(ROWS.values()), args.steps)
    results = {row: trained[where] for row, where in ROWS.items()}
    print_table(results)
    accuracies = {
        row: np.asarray(result["measures"]["test_accuracy"]) for row, result in results.items()
    }
    values = values_of(accuracies)
    found = found_of(CLAIMS, values)
    print_claims(found)
    save(report, NAME, found, values, results=results)
    draw(results, args.folder / "snippets.png")
    report.end("snippets.png")
    return results


if __name__ == "__main__":
    main()
