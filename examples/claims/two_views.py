"""Monge SAM: is it more robust to its radius, when two encoders learn to match two views?

    python examples/claims/two_views.py

The left and the right half of a digit are two views of it. Two small encoders map them to vectors
of length 1, and the symmetric contrastive loss pulls the two views of an image together, and apart
from the other images of the batch. There are no labels. 1000 images are for training. The score is
the share of 500 test images whose right half is the nearest one to their left half.

SGD with momentum, SAM, ASAM and Monge SAM train for the same number of epochs, on a whole grid of
learning rates and radii. The best pair is chosen on validation images; then the radius varies at
that learning rate. The band of a method is how far its radius may move, in powers of ten, before it
loses more than `LOSS` points of its own best score. SAM's band ends where it fails; at radius 0
every method is SGD.

The script prints a table and the claims, and writes results.json, two_views.json and two_views.png
to --out. It takes about three minutes on two CPU cores.
"""

import argparse

from examples.common import arguments

NAME = "two_views"
LEARNING_RATES = (0.02, 0.05, 0.1, 0.2)
RADII = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
LOSS = 2.0  # points


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=40)
    arguments.add_out(parser, NAME)
    args = parser.parse_args(argv)
    arguments.check_range(parser, args, "seeds", high=1000)
    arguments.check_range(parser, args, "epochs")
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import samx
from examples.claims.claim import Claim, found_of, print_claims, save
from examples.common import figures, files
from examples.common.choices import TRAIN
from examples.common.digits_task import BATCH
from examples.common.intervals import mean_interval
from examples.common.output import choose_folder
from examples.common.report import Report, aligned
from examples.common.training import cosine_decay, data_of, map_runs

SIDE, HIDDEN, SIZE = 8, 64, 16
TEMPERATURE = 0.1
METHODS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda rho: optax.identity(),
    "sam": samx.sam,
    "asam": samx.asam,
    "monge-sam": samx.monge_sam,
}
COLORS = dict(zip(METHODS, (figures.GREY, figures.RED, figures.GREEN, figures.BLUE), strict=True))
SETTING = "left and right halves of digits, test pairs that find each other"
CLAIMS = {
    "monge-band": Claim(
        ("monge_sam",),
        "More robust to its hyperparameters than SAM.",
        "abstract",
        f"band of good radii over SAM's, powers of ten; {SETTING}",
        low=0.0,
    ),
    "monge-sam": Claim(
        ("monge_sam",),
        "Better than SAM where two views are aligned.",
        "abstract",
        f"points over SAM, equal epochs; {SETTING}",
        low=0.0,
    ),
    "monge-sgd": Claim(
        ("monge_sam",),
        "Better than gradient descent where two views are aligned.",
        "abstract",
        f"points over SGD, equal epochs; {SETTING}",
        low=0.0,
    ),
    "sam-sgd": Claim(
        ("sam",),
        "Better than SGD.",
        "abstract",
        f"points over SGD, equal epochs; {SETTING}",
        low=0.0,
    ),
}


class Encoders(nnx.Module):
    """Two networks with a hidden layer, one for each view; outputs have length 1."""

    def __init__(self, rngs: nnx.Rngs):
        inputs = SIDE * SIDE // 2
        self.left = nnx.List([
            nnx.Linear(inputs, HIDDEN, rngs=rngs),
            nnx.Linear(HIDDEN, SIZE, rngs=rngs),
        ])  # fmt: skip
        self.right = nnx.List([
            nnx.Linear(inputs, HIDDEN, rngs=rngs),
            nnx.Linear(HIDDEN, SIZE, rngs=rngs),
        ])  # fmt: skip

    def __call__(self, x):  # noqa: D102
        def encode(layers, view):
            first, second = layers
            code = second(nnx.relu(first(view)))
            return code / (jnp.linalg.norm(code, axis=-1, keepdims=True) + 1e-6)

        return tuple(map(encode, (self.left, self.right), views_of(x)))


def views_of(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the left and the right half of images [n, 64], each [n, 32]."""
    halves = jnp.split(x.reshape(-1, SIDE, SIDE), 2, axis=2)
    one, other = (half.reshape(len(half), -1) for half in halves)
    return one, other


def similarities(graph: Any, params: Any, x: jax.Array) -> jax.Array:
    """Return the cosines of each left half with each right half [n, n]."""
    left, right = nnx.merge(graph, params)(x)
    return left @ right.T


def contrastive(cosines: jax.Array) -> jax.Array:
    """Return the symmetric contrastive loss: each half must find its own other half."""
    labels = jnp.arange(len(cosines))
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    one, other = (cross_entropy(logits / TEMPERATURE, labels) for logits in (cosines, cosines.T))
    return (one.mean() + other.mean()) / 2


def found_share(cosines: jax.Array) -> jax.Array:
    """Return the share of left halves whose own right half is the nearest one."""
    return jnp.mean(cosines.argmax(axis=1) == jnp.arange(len(cosines)))


@jax.jit
def start_of(seed: Any) -> Any:
    """Return the initial parameters of a seed."""
    return nnx.to_pure_dict(nnx.state(Encoders(nnx.Rngs(jax.random.key(seed))), nnx.Param))


@lru_cache(maxsize=100)
def batches_of(seed: int, epochs: int) -> np.ndarray:
    """Return the batches of a training, as numbers of images [steps, batch]."""
    rng = np.random.default_rng((1, seed))
    return np.concatenate([rng.permutation(TRAIN) for _ in range(epochs)]).reshape(-1, BATCH)


@cache
def trainer(method: str) -> Callable[..., Any]:
    """Return the compiled training of a method; it gives validation and test scores."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: Encoders(nnx.Rngs(0))))

    def run(params, parts, batches, learning_rate, rho):
        train, *others = parts
        schedule = cosine_decay(learning_rate, len(batches))
        tx = optax.with_extra_args_support(
            optax.chain(METHODS[method](rho), optax.sgd(schedule, momentum=0.9))
        )

        def step(carry, rows):
            params, state = carry

            def value_fn(params):
                return contrastive(similarities(graph, params, train["x"][rows]))

            g = jax.grad(value_fn)(params)
            updates, state = tx.update(g, state, params, value_fn=value_fn)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
        return [found_share(similarities(graph, params, data["x"])) for data in others]

    return jax.jit(run)


def scores_of(method: str, args: argparse.Namespace, bar: tqdm) -> np.ndarray:
    """Return validation and test scores in percent [2, rates, radii, seeds]; a failure is 0."""
    radii = (0.0,) if method == "sgd" else (0.0, *RADII)
    shape = len(LEARNING_RATES), len(radii), args.seeds
    grid = np.meshgrid(LEARNING_RATES, radii, np.arange(args.seeds), indexing="ij")
    rates, rhos, seeds = (axis.ravel() for axis in grid)

    def run(seed, rate, rho):
        parts, batches = data_of(int(seed), 0.0), batches_of(int(seed), args.epochs)
        return trainer(method)(start_of(seed), parts, batches, rate, rho)

    found = map_runs(run, seeds, rates, rhos, advance=bar.update)
    return 100 * np.nan_to_num(np.reshape(found, (2, *shape)))


def chosen(scores: np.ndarray) -> tuple[int, int]:
    """Return the places of the learning rate and radius with the best mean validation score."""
    rate, radius = np.unravel_index(scores[0].mean(axis=2).argmax(), scores.shape[1:3])
    return int(rate), int(radius)


def band(curves: np.ndarray) -> np.ndarray:
    """Return how far the radius may move before more than `LOSS` points are lost, by seed.

    Args:
        curves: Scores [radii, seeds], the first at radius 0.

    Returns:
        The width in powers of ten of all good radii between the best one and the first failures.
    """
    widths = []
    for curve in curves[1:].T:
        best = int(curve.argmax())
        is_good = curve >= curve[best] - LOSS
        low = best - int(np.argmin([*is_good[best::-1], False])) + 1
        high = best + int(np.argmin([*is_good[best:], False])) - 1
        widths.append(np.log10(RADII[high] / RADII[low]))
    return np.array(widths)


def values_of(scores: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """Return the numbers of each claim, one for each seed."""
    best, bands = {}, {}
    for method, found in scores.items():
        rate, radius = chosen(found)
        best[method] = found[1, rate, radius]
        if method != "sgd":
            bands[method] = band(found[1, rate])
    return {
        "monge-band": (bands["monge-sam"] - bands["sam"]).tolist(),
        "monge-sam": (best["monge-sam"] - best["sam"]).tolist(),
        "monge-sgd": (best["monge-sam"] - best["sgd"]).tolist(),
        "sam-sgd": (best["sam"] - best["sgd"]).tolist(),
    }


def summarize(scores: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Return the chosen pair of each method, its scores, and the curve over the radius."""
    found = []
    for method, each in scores.items():
        rate, radius = chosen(each)
        found.append(
            {
                "method": method,
                "learning_rate": LEARNING_RATES[rate],
                "rho": (0.0, *RADII)[radius],
                "score": each[1, rate, radius].tolist(),
                "band": [] if method == "sgd" else band(each[1, rate]).tolist(),
                "over_rho": each[1, rate].tolist(),
            }
        )
    return found


def print_table(results: Sequence[Mapping[str, Any]]) -> None:
    """Print one line per method."""
    grid = [["method", "pairs found, %", "band, powers of ten", "lr", "rho"]]
    for each in results:
        mean, low, high = mean_interval(each["score"])
        wide = f"{np.mean(each['band']):.2f}" if each["band"] else ""
        ends = [f"{each['learning_rate']:g}", f"{each['rho']:g}"]
        grid.append([each["method"], f"{mean:.2f} [{low:.2f}, {high:.2f}]", wide, *ends])
    print("\n".join(aligned(grid)))


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the score of each method over its radius, at its learning rate."""
    figure = figures.make_figure(1.4)
    axes = figure.subplots()
    for each in results:
        curve = np.mean(each["over_rho"], axis=1)
        style = {"color": COLORS[each["method"]], "label": each["method"]}
        if len(curve) == 1:
            axes.plot([RADII[0], RADII[-1]], [curve[0], curve[0]], "--", **style)
        else:
            axes.plot(RADII[: len(curve) - 1], curve[1:], "o-", **style)
    axes.set_xscale("log")
    axes.set_xlabel("radius")
    axes.set_ylabel("pairs found, %")
    axes.grid(alpha=0.3)
    figures.label_ends(axes)
    figures.save(figure, path, "Two views of digits: which radius works?")


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(argv)
    choose_folder(args, NAME)
    report = Report(args)
    total = len(LEARNING_RATES) * args.seeds * (1 + (len(METHODS) - 1) * (1 + len(RADII)))
    with tqdm(total=total, unit=" runs", smoothing=0.1, disable=None) as bar:
        scores = {method: scores_of(method, args, bar) for method in METHODS}
    results = summarize(scores)
    print_table(results)
    values = values_of(scores)
    found = found_of(CLAIMS, values)
    print_claims(found)
    save(report, NAME, found, values, results=results)
    draw(results, args.folder / "two_views.png")
    report.end("two_views.png")
    return results


if __name__ == "__main__":
    main()
