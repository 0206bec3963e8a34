"""bSAM: are probabilities better when they are averaged over its posterior?

    python examples/claims/bsam.py
    python examples/claims/bsam.py --seeds 3 --epochs 20

The task is that of digits.py: a small network learns 1000 of scikit-learn's digits, once with a
share of the training labels wrong, and once with clean labels. The test split has 500 images.

    sgd          SGD with momentum, as many epochs as the others
    sgd2x        twice as many epochs, so as many gradients as the others
    sam          SAM before the same SGD
    bsam         bSAM, whose parameters are the mean of its posterior
    bsam draws   the same, its probabilities averaged over 32 draws of the posterior

Each method's learning rate falls along a cosine. All have the same weight decay, which for bSAM is
the precision of the prior. The learning rate, and rho, are chosen by the negative log-likelihood on
a validation split, with seeds that are not reported, until the best candidate is in the interior of
what was tried. "bsam" and "bsam draws" are one training, chosen by the draws.

Reported on the test split: accuracy, the negative log-likelihood, and the expected calibration
error: the mean distance between confidence and accuracy over 15 bins of equal width, weighted by
the images in them. Lower is better for the last two.

The script prints a table and the claims, and writes results.json, bsam.json and bsam.png to --out.
It takes about four minutes on two CPU cores.
"""

import argparse
from pathlib import Path
from typing import Any

from examples.common import arguments

NAME = "bsam"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--noise", type=float, default=0.3, help="share of wrong labels")
    parser.add_argument("--draws", type=int, default=32, help="of the posterior, to predict")
    parser.add_argument("--width", type=int, default=64, help="units of each hidden layer")
    arguments.add_out(parser, NAME)
    args = parser.parse_args(argv)
    arguments.check_range(parser, args, "seeds", "epochs", "draws", "width")
    arguments.check_share(parser, args, "noise")
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import samx
from examples.claims.claim import Claim, found_of, print_claims, save
from examples.common import figures, files
from examples.common.digits_task import (
    STEPS_PER_EPOCH,
    TRAIN,
    describe,
    initialize,
    rows_of,
    shuffled,
    split,
)
from examples.common.output import choose_folder
from examples.common.report import MARK, Report, aligned, marked, mean_and_error
from examples.common.training import make_functions
from examples.common.tuning import (
    SIXTHS,
    TOGETHER,
    TUNING_SEEDS,
    around,
    best_of,
    edges,
    from_zero,
    runs_of,
    scores_of,
    search,
)

DECAY = 5e-4
BINS = 15
TRAININGS = ("sgd", "sgd2x", "sam", "bsam")
ROWS = {"sgd": "sgd", "sgd2x": "sgd2x", "sam": "sam", "bsam": "bsam", "bsam draws": "bsam"}
COLORS = dict(
    zip(ROWS, (figures.RED, figures.ORANGE, figures.BLUE, figures.GREEN, figures.PINK), strict=True)
)
METRICS = {
    "accuracy": "test accuracy, %",
    "nll": "negative log-likelihood",
    "ece": "calibration error, %",
}
LABELS = ("wrong labels", "clean labels")
BETTER = "Its estimates of uncertainty are better than SAM's."
PAIRS = (  # what is compared: the metric, lower is better, of two rows
    ("nll", "bsam", "sam", BETTER),
    ("ece", "bsam", "sam", BETTER),
    ("nll", "bsam draws", "bsam", "Averages over its posterior predict better than its mean."),
)
CLAIMS = {
    f"{metric}, {one}, {labels}": Claim(
        ("bsam",),
        text,
        "abstract",
        f"{METRICS[metric]}: {one} minus {other}; digits, {labels}, equal epochs",
        high=0.0,
    )
    for labels in LABELS
    for metric, one, other, text in PAIRS
}


def optimizer(name: str, learning_rate: Any, rho: Any, steps: int, key: Any) -> Any:
    """Build the optimizer of a training, with a learning rate that falls to 0."""
    rate = optax.cosine_decay_schedule(learning_rate, steps)
    if name == "bsam":
        return samx.bsam(
            rate, TRAIN, rho, prior_precision=DECAY * TRAIN, num_microbatches=4, key=key
        )
    base = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(rate, momentum=0.9))
    return optax.chain(samx.sam(rho), base) if name == "sam" else base


def axes_of(name: str) -> list[Any]:
    """Return what is tuned, and where the search begins."""
    if name.startswith("sgd"):
        return [around(0.1, SIXTHS)]
    return [around(0.1), from_zero(around(0.1 if name == "sam" else 0.02))]


@functools.cache
def trainer(name: str, width: int, epochs: int, draws: int) -> Any:
    """Return the compiled function that trains runs, and predicts on the images of one split."""
    logits, losses_fn, *_ = make_functions(width)
    epochs *= 1 + (name == "sgd2x")

    def of_run(seed, learning_rate, rho, params, train, images):
        key = jax.random.fold_in(jax.random.key(2), seed)
        tx = optimizer(name, learning_rate, rho, epochs * STEPS_PER_EPOCH, key)

        def step(carry, rows):
            params, state = carry
            batch = rows_of(train, rows)
            loss, g = jax.value_and_grad(lambda p: losses_fn(p, batch).mean())(params)
            closures = {} if name.startswith("sgd") else {"losses_fn": losses_fn, "batch": batch}
            updates, state = tx.update(g, state, params, **closures)
            return (optax.apply_updates(params, updates), state), loss

        def epoch(carry, index):
            return jax.lax.scan(step, carry, shuffled(seed, index))

        (params, state), _ = jax.lax.scan(epoch, (params, tx.init(params)), jnp.arange(epochs))

        def predict(params):
            return jax.nn.softmax(logits(params, images))

        found = {name: predict(params)}
        if name == "bsam":
            drawn = samx.posterior.average(
                predict, state, params, jax.random.fold_in(key, 1), draws
            )
            found["bsam draws"] = drawn
        return found

    return jax.jit(jax.vmap(of_run))


def predictions(name: str, args: Any, noise: float, runs: list[np.ndarray], part: int) -> Any:
    """Train the runs; return the probabilities `[runs, images, 10]` of a split, and its labels.

    The runs are padded to one size, and both splits are predicted, so that a method is compiled
    once.
    """
    count, size = len(runs[0]), max(args.seeds, TOGETHER * len(TUNING_SEEDS))
    seed, *numbers = (np.resize(column, size) for column in runs)
    numbers = numbers if len(numbers) == 2 else [*numbers, np.zeros_like(numbers[0])]
    train, *others = split(seed, noise)
    images = jnp.concatenate([data["x"] for data in others], axis=1)
    run = trainer(name, args.width, args.epochs, args.draws)
    found = run(seed, *numbers, initialize(seed, args.width), train, images)
    first = others[0]["x"].shape[1]
    chosen = slice(first) if part == 1 else slice(first, None)
    labels = np.asarray(others[part - 1]["y"])[:count]
    return jax.tree.map(lambda p: np.asarray(p)[:count, chosen], found), labels


def nll(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the mean negative log-likelihood of each run."""
    right = np.take_along_axis(probabilities, labels[..., None], axis=-1)[..., 0]
    return -np.log(np.maximum(right, 1e-30)).mean(axis=-1)


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the share of right predictions of each run."""
    return (probabilities.argmax(-1) == labels).mean(axis=-1)


def bins_of(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return for each bin of confidence: its images, their mean confidence, and accuracy."""
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    index = np.minimum((confidence * BINS).astype(int), BINS - 1)
    counts, sums, hits = (
        np.bincount(index.ravel(), np.ravel(w), BINS)
        for w in (np.ones_like(confidence), confidence, right)
    )
    filled = np.maximum(counts, 1)
    return counts, sums / filled, hits / filled


def ece(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the expected calibration error of each run."""

    def of_run(probabilities, labels):
        counts, confidence, hits = bins_of(probabilities, labels)
        return np.sum(counts * np.abs(confidence - hits)) / counts.sum()

    return np.array([of_run(*run) for run in zip(probabilities, labels, strict=True)])


def choose(name: str, args: Any, noise: float, bar: tqdm) -> tuple[tuple[float, ...], list[str]]:
    """Choose the numbers of a training by the likelihood of the validation split."""

    def evaluate(candidates):
        runs = runs_of(TUNING_SEEDS, candidates)
        found, labels = predictions(name, args, noise, runs, 1)
        bar.update(len(runs[0]))
        scores = -nll(list(found.values())[-1], labels)
        return scores_of(np.nan_to_num(scores, nan=-np.inf), candidates).tolist()

    tried = search(axes_of(name), evaluate)
    best = best_of(tried)
    return best, edges(best, tried, ("learning_rate", "rho")[: len(best)])


def measure(name: str, args: Any, noise: float, bar: tqdm) -> list[dict[str, Any]]:
    """Tune a training, repeat it with the reported seeds, and measure what it predicts."""
    best, at_edge = choose(name, args, noise, bar)
    runs = runs_of(range(args.seeds), [best])
    found, labels = predictions(name, args, noise, runs, 2)
    bar.update(args.seeds)
    numbers = dict(zip(("learning_rate", "rho"), (*best, 0.0), strict=False))
    gradients = args.epochs * STEPS_PER_EPOCH * (1 if name == "sgd" else 2)
    return [
        {
            **{"row": row, "noise": noise, "edges": at_edge, "gradients": gradients},
            **numbers,
            "accuracy": (100 * accuracy(p, labels)).tolist(),
            "nll": nll(p, labels).tolist(),
            "ece": (100 * ece(p, labels)).tolist(),
            "bins": [x.tolist() for x in bins_of(p, labels)],
        }
        for row, p in found.items()
    ]


def print_table(results: list[dict[str, Any]], noise: float, seeds: int) -> None:
    """Print one line per row."""
    print(f"\n{describe(noise)}, {seeds} seeds (mean ± standard error)")
    grid = [["method", "accuracy, %", "nll", "ece, %", "gradients", "lr", "rho"]]
    for result in results:
        texts = []
        for metric, digits in (("accuracy", 2), ("nll", 4), ("ece", 2)):
            mean, error = mean_and_error(result[metric])
            texts.append(f"{mean:.{digits}f} ± {error:.{digits}f}")
        ends = [str(result["gradients"]), marked(result, "learning_rate"), marked(result, "rho")]
        grid.append([result["row"], *texts, *ends])
    print("\n".join(aligned(grid)))
    if any(result["edges"] for result in results):
        print(MARK)


def values_of(results: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the differences that the claims are about, by seed, for the rows that are there."""
    rows = {(LABELS[not each["noise"]], each["row"]): each for each in results}
    return {
        f"{metric}, {one}, {labels}": np.subtract(
            rows[labels, one][metric], rows[labels, other][metric]
        ).tolist()
        for labels in LABELS
        for metric, one, other, _ in PAIRS
        if {(labels, one), (labels, other)} <= rows.keys()
    }


def draw(results: list[dict[str, Any]], noises: list[float], path: Path, title: str) -> None:
    """Draw the three metrics of each row, and how often confident predictions are right."""
    columns = len(METRICS) + 1
    figure = figures.make_figure(columns, [figures.height_of(6)] * len(noises))
    panels = figure.subplots(len(noises), columns, squeeze=False)
    for (*metrics, curves), noise in zip(panels, noises, strict=True):
        mine = [result for result in results if result["noise"] == noise]
        for axes, (metric, label) in zip(metrics, METRICS.items(), strict=True):
            for position, result in enumerate(reversed(mine)):
                mean, error = mean_and_error(result[metric])
                color = COLORS[result["row"]]
                axes.errorbar(mean, position, xerr=error, fmt="o", color=color, capsize=2)
            axes.set_yticks(range(len(mine)), [result["row"] for result in reversed(mine)])
            axes.set_ylim(-0.7, len(mine) - 0.3)
            axes.set_xlabel(label)
            axes.grid(axis="x", alpha=0.3)
        for axes in metrics[1:]:
            axes.tick_params(labelleft=False)
        metrics[0].set_title(describe(noise))
        draw_bins(curves, mine)
    figures.save(figure, path, title)


def draw_bins(axes: Any, results: list[dict[str, Any]]) -> None:
    """Draw accuracy over confidence, in bins with images; on the diagonal both are equal."""
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for result in results:
        counts, confidence, hits = map(np.asarray, result["bins"])
        is_filled = counts >= 0.005 * counts.sum()
        color = COLORS[result["row"]]
        axes.plot(confidence[is_filled], hits[is_filled], "o-", ms=3, color=color, lw=1.4)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.grid(alpha=0.3)


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(argv)
    choose_folder(args, NAME)
    report = Report(args)
    noises, results = list(dict.fromkeys([args.noise, 0.0])), []
    planned = len(noises) * len(TRAININGS) * (15 * len(TUNING_SEEDS) + args.seeds)
    with tqdm(total=planned, unit=" runs", smoothing=0.1, disable=None) as bar:
        for noise in noises:
            for name in TRAININGS:
                bar.set_description(name)
                results += measure(name, args, noise, bar)
    for noise in noises:
        print_table([r for r in results if r["noise"] == noise], noise, args.seeds)
    values = values_of(results)
    found = found_of(CLAIMS, values)
    print_claims(found)
    save(report, NAME, found, values, results=results)
    title = f"Digits: bSAM and its posterior beside SGD and SAM, {args.seeds} seeds"
    draw(results, noises, args.folder / "bsam.png", title)
    report.end("bsam.png")
    return results


if __name__ == "__main__":
    main()
