"""Sharpness-aware training when some digits have few images: SAM, Focal-SAM and ImbSAM.

    python examples/claims/long_tail.py
    python examples/claims/long_tail.py --loss la --imbalance 50
    python examples/claims/long_tail.py --variants sam focal-sam --rho 0.1 0.2 0.5 --seeds 20

A small Flax network learns scikit-learn's digits (8x8 pixels) from a long-tailed training set: 100
images of the most frequent digit, fewer of each following digit, and 1 of the rarest. Which digits
are frequent and which are rare differs from seed to seed; label i is always the i-th most frequent
digit. Validation and test split have the same number of images of each digit, so accuracy is the
mean over the classes. It is also reported separately for classes with many, medium and few training
images. The limits between these groups, 20% and 4% of the largest class, are those of long-tailed
CIFAR-10.

Every method gets the same number of epochs. `base2x` is the base optimizer with twice as many
epochs, so that it computes as many gradients as SAM. The gradient that the base optimizer gets
(for SAM, the sharp gradient) is clipped to norm 1. Without clipping, some runs of any method would
fail at high learning rates.

Learning rate and rho of each method are chosen on the validation split, with tuning seeds that are
not reported. The test split is used once, with the chosen values. Every seed has its own order of
the digits, split, initialization and batches. All seeds and candidates train at once, vmapped.
`--loss la` adds the logarithms of the class frequencies to the logits
(https://arxiv.org/abs/2007.07314).

The script prints a table, the differences to SAM, paired by seed, and the claims. It writes
results.json, long_tail.json and long_tail.png to --out. It takes about two minutes on two cores.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from examples.common import arguments, choices

NAME = "long_tail"
NAMES = ("base", "base2x", "sam", "focal-sam", "imb-sam")  # of `METHODS`
LOSSES = {"ce": "cross-entropy", "la": "logit adjustment"}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    names = [*NAMES]
    arguments.add_names(parser, "--variants", names, "; default: all", nargs="+", default=names)
    parser.add_argument("--base", choices=choices.BASES, default="momentum")
    parser.add_argument(
        "--loss", choices=list(LOSSES), default="ce", help="ce: cross-entropy; la: adjusted logits"
    )
    parser.add_argument(
        "--imbalance", type=float, default=100.0, help="size of the largest class / the smallest"
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--rho", type=float, nargs="+", help="candidate radii for all methods")
    parser.add_argument("--width", type=int, default=128, help="units of each hidden layer")
    arguments.add_out(parser, NAME)
    args = parser.parse_args(argv)
    args.variants = list(dict.fromkeys(args.variants))
    arguments.check_range(parser, args, "seeds", "epochs", "width")
    if not 1 <= args.imbalance < float("inf"):
        parser.error(f"--imbalance must be finite and at least 1, got {args.imbalance}")
    arguments.check_finite(parser, args, "rho")
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.ticker import NullLocator
from tqdm import tqdm

import samx
from examples.claims.claim import Claim, found_of, print_claims, save
from examples.common import figures, files
from examples.common.digits_task import graph_of, initialize, load_digits
from examples.common.output import choose_folder
from examples.common.registry import BASES
from examples.common.report import MARK, Report, marked, mean_and_error
from examples.common.tuning import TUNING_SEEDS, Runs, edges, runs_of, scores_of

CLASSES, LARGEST, BATCH = 10, 100, 40
VALIDATION, TEST = 24, 50  # images of each class; digit 8 has 174 in all, enough for all splits
MANY, FEW = 0.2, 0.04  # fractions of the largest class: "many" is above, "few" is below
TAIL = 20  # ImbSAM's tail: classes with fewer training images than this, as in its paper
MAX_NORM = 1.0  # largest norm of the gradient that the base optimizer gets
GAMMA, SHARPNESS = 3.0, 0.8  # Focal-SAM's
LEARNING_RATES = {
    "sgd": (0.1, 0.3, 1.0, 3.0),
    "momentum": (0.01, 0.03, 0.1, 0.3, 1.0),
    "adamw": (1e-3, 3e-3, 1e-2, 3e-2),
}
RADII = (0.05, 0.1, 0.2, 0.5, 1.0)
# The claims, and what is compared for each of them: the row, its opponent, the group of classes.
PAIRS = {
    "imbalanced-few": ("imb-sam", "sam", "few"),
    "imbalanced-all": ("imb-sam", "sam", "all"),
    "focal-few": ("focal-sam", "sam", "few"),
    "focal-all": ("focal-sam", "sam", "all"),
    "focal-imbalanced": ("focal-sam", "imb-sam", "all"),
}
WORSE = "Focal-SAM's gamma and the weight of its sharpness are not tuned here"


def claim_of(name: str, system: str, text: str, source: str, why: str = "") -> Claim:
    """Return a claim about accuracy: a row is better than another one."""
    row, other, group = PAIRS[name]
    measured = f"accuracy of {row} minus {other}, points, classes: {group}; equal epochs, digits"
    return Claim((system,), text, source, measured, low=0.0, why=why)


TABLE = "CIFAR-100-LT, many/medium/few/all: SAM 79.7/49.3/12.4/48.9, ImbSAM 75.9/53.5/19.4/51.1"
IMBALANCED = "imbalanced_sam"
CLAIMS = {
    name: claim_of(name, *told)
    for name, told in {
        "imbalanced-few": (IMBALANCED, "Rare classes gain over SAM.", "authors' code"),
        "imbalanced-all": (IMBALANCED, "All classes together gain over SAM.", "authors' code"),
        "focal-few": ("focal_sam", "Rare classes gain over SAM.", "abstract"),
        "focal-all": ("focal_sam", "Better than SAM.", "abstract"),
        "focal-imbalanced": ("focal_sam", "Better than ImbSAM.", "abstract", WORSE),
    }.items()
}
CLAIMS |= {
    name: CLAIMS[name]._replace(published=TABLE) for name in ("imbalanced-few", "imbalanced-all")
}


class Method(NamedTuple):
    """A row of the tables."""

    make: Callable[[Any, list[int]], optax.GradientTransformation]  # rho, class counts -> tx
    radii: tuple[float, ...]
    gradients: float  # per step
    times: int = 1  # factor on the number of epochs


METHODS = {
    "base": Method(lambda rho, counts: optax.identity(), (0.0,), 1),
    "base2x": Method(lambda rho, counts: optax.identity(), (0.0,), 1, 2),
    "sam": Method(lambda rho, counts: samx.sam(rho), RADII, 2),
    "focal-sam": Method(
        lambda rho, counts: samx.focal_sam(counts, rho, GAMMA, SHARPNESS), RADII, 2 + 2 / 3
    ),
    "imb-sam": Method(
        lambda rho, counts: samx.imbalanced_sam(tail_classes(counts), rho), RADII, 2 + 2 / 3
    ),
}


class Part(NamedTuple):
    """Training, validation or test split; with several seeds, they are the leading axis."""

    x: jax.Array  # [images, 64], from 0 to 1
    y: jax.Array  # rank of the digit, 0 for the most frequent one
    image: jax.Array  # index of the image in scikit-learn's data


class Trainer(NamedTuple):
    """A method's compiled functions over a vector of runs, each a (seed, learning rate, rho)."""

    init: Callable[..., Any]  # runs, params -> state
    epoch: Callable[..., Any]  # params, state, runs, training split, epoch -> params, state
    accuracy: Callable[..., Any]  # params, split -> [runs, classes]


def class_counts(imbalance: float) -> list[int]:
    """Return the number of training images of each class, from LARGEST to LARGEST / imbalance."""
    shares = (1 / imbalance) ** (np.arange(CLASSES) / (CLASSES - 1))
    return [max(1, int(LARGEST * share)) for share in shares]


def tail_classes(counts: list[int]) -> np.ndarray:
    """Return ImbSAM's tail; with a small imbalance it is empty, and ImbSAM is the base."""
    return np.flatnonzero(np.asarray(counts) < TAIL)


def groups_of(counts: list[int]) -> dict[str, list[int]]:
    """Return the classes with many, medium and few images, and all classes."""
    shares = np.asarray(counts) / LARGEST
    few, many = shares < FEW, shares > MANY
    masks = {"many": many, "medium": ~few & ~many, "few": few, "all": np.full(len(counts), True)}
    return {name: np.flatnonzero(mask).tolist() for name, mask in masks.items()}


def split(seed: int, counts: list[int]) -> tuple[Part, Part, Part]:
    """Return the seed's training, validation and test split; the seed also orders the digits."""
    x, digit = load_digits()
    rng = np.random.default_rng(seed)
    parts: tuple[list, list, list] = ([], [], [])
    for label, (of_rank, count) in enumerate(zip(rng.permutation(CLASSES), counts, strict=True)):
        images = rng.permutation(np.flatnonzero(digit == of_rank))
        ends = np.cumsum([VALIDATION, TEST, count])
        validation, test, train, _ = np.split(images, ends)
        for part, chosen in zip(parts, (train, validation, test), strict=True):
            part += [(image, label) for image in chosen]

    def stacked(part):
        image, y = np.asarray(part, np.int32).T
        return Part(jnp.asarray(x[image] / 16, jnp.float32), jnp.asarray(y), jnp.asarray(image))

    train, validation, test = map(stacked, parts)
    return train, validation, test


def splits(seeds: list[int], counts: list[int]) -> tuple[Part, Part, Part]:
    """Return the splits of several seeds, stacked."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(split(seed, counts) for seed in seeds))


def shuffled(seed: jax.Array, epoch: jax.Array | int, size: int) -> jax.Array:
    """Return the seed's batches of an epoch as indices [steps, batch].

    Images that do not fill a batch are left out; other images in every epoch.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), seed), epoch)
    steps = size // BATCH
    return jax.random.permutation(key, size)[: steps * BATCH].reshape(steps, BATCH)


def make_trainer(
    method: Method, base: str, loss: str, width: int, epochs: int, counts: list[int]
) -> Trainer:
    """Return functions that train a vector of runs for one epoch; each is compiled once."""
    graph = graph_of(width)
    size = sum(counts)
    adjustment = jnp.log(jnp.asarray(counts) / size) if loss == "la" else jnp.zeros(CLASSES)

    def logits(params, x):
        return nnx.merge(graph, params)(x)

    def losses_fn(params, batch):
        return optax.softmax_cross_entropy_with_integer_labels(
            logits(params, batch.x) + adjustment[None], batch.y
        )

    def optimizer(run):
        schedule = optax.cosine_decay_schedule(run.learning_rate, epochs * (size // BATCH))
        clip = optax.clip_by_global_norm(MAX_NORM)
        tx = optax.chain(method.make(run.rho, counts), clip, BASES[base](schedule))
        return optax.with_extra_args_support(tx)

    def init(run, params):
        return optimizer(run).init(params)

    def step(params, state, run, batch):
        def value_fn(params):
            return losses_fn(params, batch).mean()

        value, grads = jax.value_and_grad(value_fn)(params)
        updates, state = optimizer(run).update(
            grads,
            state,
            params,
            value=value,
            grad=grads,
            value_fn=value_fn,
            losses_fn=losses_fn,
            batch=batch,
            labels=batch.y,
        )
        return optax.apply_updates(params, updates), state

    def epoch(params, state, run, train, index):
        def body(carry, rows):
            params, state = carry
            batch = jax.tree.map(lambda leaf: leaf[rows], train)
            return step(params, state, run, batch), None

        carry, _ = jax.lax.scan(body, (params, state), shuffled(run.seed, index, size))
        return carry

    def accuracy(params, part):
        is_right = logits(params, part.x).argmax(-1) == part.y
        is_class = part.y[:, None] == jnp.arange(CLASSES)[None]
        return (is_right[:, None] & is_class).sum(0) / is_class.sum(0)

    return Trainer(
        jax.jit(jax.vmap(init)),
        jax.jit(jax.vmap(epoch, in_axes=(0, 0, 0, 0, None)), donate_argnums=(0, 1)),
        jax.jit(jax.vmap(accuracy)),
    )


def train(
    trainer: Trainer, params, runs: Runs, part: Part, epochs: int, advance: Callable[[], Any]
) -> tuple[Any, Any]:
    """Train all runs on their training splits; return their parameters and optimizer states."""
    state = trainer.init(runs, params)
    for index in range(epochs):
        params, state = jax.block_until_ready(trainer.epoch(params, state, runs, part, index))
        advance()
    return params, state


def candidates_of(row: str, args: argparse.Namespace) -> list[tuple[float, float]]:
    """Return the candidates (learning rate, rho); the base optimizer has no rho."""
    radii = METHODS[row].radii
    if args.rho and radii != (0.0,):
        radii = tuple(args.rho)
    return [(rate, rho) for rate in LEARNING_RATES[args.base] for rho in radii]


def work_of(row: str, args: argparse.Namespace) -> tuple[float, float]:
    """Return the gradients of one epoch: of the tuning runs, and of the reported runs."""
    per_run = METHODS[row].gradients * (sum(args.counts) // BATCH)
    return per_run * len(candidates_of(row, args)) * len(TUNING_SEEDS), per_run * args.seeds


def measure(row: str, args: argparse.Namespace, bar: tqdm) -> dict[str, Any]:
    """Tune, train and measure one method."""
    method, counts = METHODS[row], args.counts
    epochs = method.times * args.epochs
    trainer = make_trainer(method, args.base, args.loss, args.width, epochs, counts)
    candidates = candidates_of(row, args)
    tuning_work, work = work_of(row, args)

    bar.set_description(f"{row}, tuning")
    runs = Runs(*runs_of(TUNING_SEEDS, candidates))
    train_part, validation, _ = jax.tree.map(
        lambda leaf: jnp.tile(leaf, (len(candidates),) + (1,) * (leaf.ndim - 1)),
        splits(list(TUNING_SEEDS), counts),
    )
    params = initialize(runs.seed, args.width)
    params, _ = train(trainer, params, runs, train_part, epochs, partial(bar.update, tuning_work))
    accuracy = np.asarray(trainer.accuracy(params, validation))
    scores = scores_of(accuracy, candidates)  # means over seeds and classes
    learning_rate, rho = candidates[int(scores.argmax())]

    bar.set_description(row)
    runs = Runs(*runs_of(range(args.seeds), [(learning_rate, rho)]))
    train_part, _, test = splits(list(range(args.seeds)), counts)
    params = initialize(runs.seed, args.width)
    params, state = train(trainer, params, runs, train_part, epochs, partial(bar.update, work))
    test_accuracy = np.asarray(trainer.accuracy(params, test), float)
    spent = optax.tree.get(state, "gradients_spent")
    if spent is None:  # the base optimizer has no readings: one gradient per step
        spent = np.array(epochs * (sum(counts) // BATCH))
    return {
        "row": row,
        "learning_rate": learning_rate,
        "rho": rho,
        "edges": edges((learning_rate, rho), candidates),
        "candidates": [
            {"learning_rate": rate, "rho": radius, "validation_accuracy": float(score)}
            for (rate, radius), score in zip(candidates, scores, strict=True)
        ],
        "gradients": float(np.mean(spent)),
        "train_accuracy": np.asarray(trainer.accuracy(params, train_part), float).tolist(),
        "test_accuracy": test_accuracy.tolist(),  # [seeds, classes]
        "test_accuracy_by_group": {
            name: test_accuracy[:, classes].mean(axis=1).tolist()
            for name, classes in groups_of(counts).items()
            if classes
        },
    }


def percent(values: Any) -> tuple[float, float]:
    """Return mean and standard error in percent."""
    return mean_and_error([100 * value for value in values])


def cell(values: Any, sign: str = "") -> str:
    """Format mean and standard error in percent."""
    mean, error = percent(values)
    return f"{mean:{sign}.2f} ± {error:.2f}"


def table(results: list[dict]) -> str:
    """Format one line per method."""
    groups = list(results[0]["test_accuracy_by_group"])
    width = max(len("method"), *(len(result["row"]) for result in results))
    head = f"{'method':<{width}} " + "".join(f"{group:>15}" for group in groups)
    head += f" {'gradients':>10} {'lr':>6} {'rho':>5}"
    lines = [head, "-" * len(head)]
    for result in results:
        cells = "".join(f"{cell(v):>15}" for v in result["test_accuracy_by_group"].values())
        lines.append(
            f"{result['row']:<{width}} {cells} {result['gradients']:>10.0f}"
            f" {marked(result, 'learning_rate'):>6} {marked(result, 'rho'):>5}"
        )
    if any(result["edges"] for result in results):
        lines.append(MARK)
    return "\n".join(lines)


def comparison(results: list[dict]) -> str:
    """Format each method's difference to SAM, paired by seed; empty without SAM."""
    rows = {result["row"]: result["test_accuracy_by_group"] for result in results}
    if "sam" not in rows or len(rows) == 1:
        return ""
    width = max(len("method - sam"), *map(len, rows))
    head = f"{'method - sam':<{width}} " + "".join(f"{group:>15}" for group in rows["sam"])
    lines = [head, "-" * len(head)]
    for row, accuracies in rows.items():
        if row != "sam":
            differences = [np.subtract(accuracies[name], rows["sam"][name]) for name in accuracies]
            cells = (f"{cell(values, '+'):>15}" for values in differences)
            lines.append(f"{row:<{width}} " + "".join(cells))
    return "\n".join(lines)


def values_of(results: list[dict]) -> dict[str, list[float]]:
    """Return the differences that the claims are about, by seed, for the rows that are there."""
    rows = {each["row"]: each["test_accuracy_by_group"] for each in results}
    return {
        name: (100 * np.subtract(rows[row][group], rows[other][group])).tolist()
        for name, (row, other, group) in PAIRS.items()
        if row in rows and group in rows.get(other, {})
    }


def draw(results: list[dict], counts: list[int], path: Path, title: str) -> None:
    """Plot accuracy by group (left) and by the number of training images of a class (right)."""
    groups = groups_of(counts)
    names = list(results[0]["test_accuracy_by_group"])
    figure = figures.make_figure(2, [figures.height_of(len(names) * (len(results) + 1))])
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    sizes = sorted(set(counts))
    places, labels = [], []
    for group, name in enumerate(names):
        for position, result in enumerate(results):
            place = group * (len(results) + 1) + position
            mean, error = percent(result["test_accuracy_by_group"][name])
            color = figures.COLORS[position]
            left.errorbar(mean, place, xerr=error, fmt="o", ms=5, capsize=2, color=color)
            shift = {"xytext": (8 if np.isnan(error) else 0, 0), "textcoords": "offset points"}
            end = (mean + np.nan_to_num(error), place)
            left.annotate(f"  {mean:.1f}", end, va="center", color=color, **shift)
            places.append(place)
            labels.append(result["row"])
        middle = group * (len(results) + 1) - 1
        left.annotate(
            labelled(name, groups[name], counts),
            (0, middle),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontweight="bold",
        )
    left.set_yticks(places, labels)
    left.set_ylim(max(places) + 0.7, -1.7)
    for position, result in enumerate(results):
        style = {"color": figures.COLORS[position]}
        accuracy = np.asarray(result["test_accuracy"])
        of_sizes = [accuracy[:, np.asarray(counts) == size].mean(axis=1) for size in sizes]
        means, errors = zip(*(percent(values) for values in of_sizes), strict=True)
        shifted = np.asarray(sizes) * 1.03 ** (position - (len(results) - 1) / 2)
        right.errorbar(shifted, means, yerr=errors, fmt="o", ms=4, capsize=2, lw=1, **style)
        right.plot(shifted, means, linewidth=1.2, label=result["row"], **style)
    left.set(title=claim(results), xlabel="test accuracy, % (mean ± standard error)")
    right.set_xscale("log")
    right.set_xticks(shown_sizes(sizes), map(str, shown_sizes(sizes)))
    right.xaxis.set_minor_locator(NullLocator())
    right.set(title="by class, mean over classes of equal size")
    right.set(xlabel="training images of the class", ylabel="test accuracy, %")
    left.grid(alpha=0.3, axis="x")
    left.margins(x=0.16)
    right.grid(alpha=0.3, axis="y")
    figures.label_ends(right)
    figures.save(figure, path, title)


def shown_sizes(sizes: list[int]) -> list[int]:
    """Return those of the ascending class sizes whose ticks have room on a logarithmic axis."""
    shown = sizes[-1:]
    for size in reversed(sizes):
        if shown[-1] / size > (sizes[-1] / sizes[0]) ** 0.09:
            shown.append(size)
    return shown[::-1]


def claim(results: list[dict]) -> str:
    """State who is best on the classes with the fewest images."""
    group = next(name for name in reversed(results[0]["test_accuracy_by_group"]) if name != "all")
    best = max(results, key=lambda result: np.mean(result["test_accuracy_by_group"][group]))
    told = cell(best["test_accuracy_by_group"][group])
    return f"{group} images: {best['row']} is best, {told} %"


def labelled(name: str, classes: list[int], counts: list[int]) -> str:
    """Format a group's name and the number of training images of its classes."""
    sizes = [counts[label] for label in classes]
    low, high = min(sizes), max(sizes)
    return f"{name}: {low if low == high else f'{low} to {high}'} images"


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[dict]:
    args = parse(argv)
    if args.seeds > TUNING_SEEDS.start:
        arguments.refuse(f"--seeds must be at most {TUNING_SEEDS.start}, got {args.seeds}")
    args.counts = class_counts(args.imbalance)
    choose_folder(args, NAME)
    report = Report(args, left_out=["counts"])
    total = sum(sum(work_of(row, args)) * METHODS[row].times * args.epochs for row in args.variants)
    with tqdm(total=total, unit=" gradients", unit_scale=True, smoothing=0.1, disable=None) as bar:
        results = [measure(row, args, bar) for row in args.variants]

    groups = groups_of(args.counts)
    print(f"\nTraining images of the classes: {', '.join(map(str, args.counts))}")
    print(f"Test accuracy in %, {args.seeds} seeds (mean ± standard error)\n{table(results)}")
    if text := comparison(results):
        print(f"\nThe same, difference to SAM, seed by seed\n{text}")

    values = values_of(results)
    found = found_of(CLAIMS, values)
    print_claims(found)
    save(report, NAME, found, values, class_counts=args.counts, groups=groups, results=results)
    title = f"Long-tailed digits, imbalance {args.imbalance:g}, {LOSSES[args.loss]}"
    title += f", {args.seeds} seeds"
    draw(results, args.counts, args.folder / "long_tail.png", title)
    report.end("long_tail.png")
    return results


if __name__ == "__main__":
    main()
