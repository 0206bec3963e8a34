"""Compare sharpness-aware training with its base optimizer, on digits with wrong labels.

    python examples/digits.py
    python examples/digits.py --variants base sam --base adamw --seeds 5 --noise 0.5
    python examples/digits.py --variants sam looksam ae-sam vsam

A small Flax network learns scikit-learn's digits (1797 real images of 8x8 pixels) twice: once with
a share of the training labels flipped, and once with clean labels. Every method trains for the same
number of epochs. `base2x` is the base optimizer with twice as many epochs, so that it spends as
many gradients as SAM. The learning rate and rho of each method are chosen on a validation split,
with separate seeds. The test split is used once, with the chosen values. Every seed has its own
split, flipped labels, initialization and batches. All seeds and candidates train at the same time,
under `vmap`.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from tqdm import tqdm

import samx
from examples.common.output import free_folder
from examples.common.registry import BASES, VARIANTS, Setting, Variant, check_base

TRAIN, VALIDATION, BATCH = 1000, 297, 100  # of 1797 images; the other 500 are the test split
STEPS_PER_EPOCH = TRAIN // BATCH
TUNING_SEEDS = range(1000, 1004)  # none of them is a reported seed
SHARPNESS_RADIUS = 0.2  # for the reported loss increase; the same for every method
LEARNING_RATES = {
    "sgd": (0.1, 0.3, 1.0),
    "momentum": (0.01, 0.03, 0.1, 0.3),
    "adamw": (3e-4, 1e-3, 3e-3, 1e-2),
}
# Each row of the tables: the variant, and the factor on the number of epochs.
ROWS = {"base": ("base", 1), "base2x": ("base", 2)} | {
    name: (name, 1) for name in VARIANTS if name not in ("base", "sampa-separate")
}
DEFAULT = ("base", "base2x", "sam", "asam", "sampa", "momentum-sam")
TIMED_STEPS = 100


class Network(nnx.Module):
    """A network with two hidden layers, from 64 pixels to 10 logits."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(64, width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):  # noqa: D102
        return self.head(nnx.relu(self.second(nnx.relu(self.first(x)))))


class Trainer(NamedTuple):
    """A method's compiled functions. They act on vectors of runs (seed, learning rate, rho)."""

    init: Callable[..., Any]  # runs, params -> state
    epoch: Callable[..., Any]  # params, state, runs, data, epoch -> params, state, accuracies
    loss_increase: Callable[..., Any]  # params, data -> [runs]
    step: Callable[..., Any]  # one step of one run: params, state, run, batch -> params, state
    accuracy: Callable[..., Any]  # of one run: params, one split -> share of correct predictions


class Runs(NamedTuple):
    """Seed, learning rate and rho of the runs that train together: vectors of equal length."""

    seed: jax.Array
    learning_rate: jax.Array
    rho: jax.Array


@jax.jit
@partial(jax.vmap, in_axes=(0, None))
def split(seed: jax.Array, noise: jax.Array | float):
    """Return the seed's training, validation and test split.

    A share `noise` of the training labels is wrong.
    """
    x, y = load_digits(return_X_y=True)
    x, y = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y, jnp.int32)
    order, wrong = jax.random.split(jax.random.fold_in(jax.random.key(0), seed))
    order = jax.random.permutation(order, len(x))
    flipped = (y + jax.random.randint(wrong, y.shape, 1, 10)) % 10  # always another digit
    is_flipped = jnp.arange(TRAIN) < noise * TRAIN
    train, validation, test = jnp.split(order, [TRAIN, TRAIN + VALIDATION])
    return (
        {
            "x": x[train],
            "y": jnp.where(is_flipped, flipped[train], y[train]),
            "index": jnp.arange(TRAIN, dtype=jnp.int32),
        },
        {"x": x[validation], "y": y[validation]},
        {"x": x[test], "y": y[test]},
    )


@partial(jax.jit, static_argnums=1)
@partial(jax.vmap, in_axes=(0, None))
def initialize(seed: jax.Array, width: int):
    """Return the seed's initial parameters."""
    return nnx.state(Network(width, rngs=nnx.Rngs(jax.random.key(seed))), nnx.Param)


def shuffled(seed: jax.Array, epoch: jax.Array | int) -> jax.Array:
    """Return the seed's batches of one epoch, as indices of training images [steps, batch]."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), seed), epoch)
    return jax.random.permutation(key, TRAIN).reshape(STEPS_PER_EPOCH, BATCH)


def rows_of(data: dict[str, jax.Array], rows: jax.Array) -> dict[str, jax.Array]:
    """Return the images and labels at the indices `rows`."""
    return {name: leaf[rows] for name, leaf in data.items()}


def make_trainer(variant: Variant, base: str, width: int, epochs: int) -> Trainer:
    """Build the functions that train a vector of runs for one epoch; each compiles once."""
    graph = nnx.graphdef(Network(width, rngs=nnx.Rngs(0)))
    batch_like = {
        "x": jax.ShapeDtypeStruct((BATCH, 64), jnp.float32),
        "y": jax.ShapeDtypeStruct((BATCH,), jnp.int32),
        "index": jax.ShapeDtypeStruct((BATCH,), jnp.int32),
    }
    setting = Setting(batch_like, batch_size=BATCH, num_examples=TRAIN)

    def logits(params, x):
        return nnx.merge(graph, params)(x)

    def losses_fn(params, batch):
        return optax.softmax_cross_entropy_with_integer_labels(
            logits(params, batch["x"]), batch["y"]
        )

    def accuracy(params, data):
        return jnp.mean(logits(params, data["x"]).argmax(-1) == data["y"])

    def optimizer(run):
        schedule = optax.cosine_decay_schedule(run.learning_rate, epochs * STEPS_PER_EPOCH)
        here = setting._replace(learning_rate=schedule)
        tx = variant.make(run.rho, BASES[base](schedule), here)
        return optax.with_extra_args_support(tx)

    def init(run, params):
        return optimizer(run).init(params)

    def step(params, state, run, batch):
        def value_fn(params):
            return losses_fn(params, batch).mean()

        def ascent_fn(params):
            return samx.losses.log_lower_bound(logits(params, batch["x"]), batch["y"]).mean()

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
            index=batch["index"],
            ascent_fn=ascent_fn,
        )
        return optax.apply_updates(params, updates), state

    def epoch(params, state, run, data, epoch):
        def body(carry, rows):
            params, state = carry
            return step(params, state, run, rows_of(data[0], rows)), None

        (params, state), _ = jax.lax.scan(body, (params, state), shuffled(run.seed, epoch))
        return params, state, jnp.stack([accuracy(params, part) for part in data])

    def loss_increase(params, data):
        batches = jax.tree.map(lambda leaf: leaf.reshape(BATCH, -1, *leaf.shape[1:]), data[0])
        ball = samx.perturbations.metric_ball(SHARPNESS_RADIUS)

        def of_batch(batch):
            loss, g = jax.value_and_grad(lambda p: losses_fn(p, batch).mean())(params)
            eps, _ = ball.update(g, ball.init(params), params)
            return losses_fn(optax.apply_updates(params, eps), batch).mean() - loss

        return jax.vmap(of_batch, in_axes=1)(batches).mean()

    return Trainer(
        jax.jit(jax.vmap(init)),
        jax.jit(jax.vmap(epoch, in_axes=(0, 0, 0, 0, None)), donate_argnums=(0, 1)),
        jax.jit(jax.vmap(loss_increase)),
        jax.jit(step),
        jax.jit(accuracy),
    )


class Trained(NamedTuple):
    """The final parameters of all runs, and their accuracies and gradients after each epoch."""

    params: Any
    accuracies: np.ndarray  # [epochs, runs, 3 splits of the data]
    gradients: np.ndarray  # [epochs, runs], spent since the start


def train(
    trainer: Trainer, params, runs: Runs, data, epochs: int, advance: Callable[[], Any]
) -> Trained:
    """Train all runs."""
    state = trainer.init(runs, params)
    history, gradients = [], []
    for index in range(epochs):
        params, state, accuracies = trainer.epoch(params, state, runs, data, index)
        history.append(np.asarray(accuracies))
        spent = optax.tree.get(state, "gradients_spent")
        if spent is None:  # the base optimizer keeps no readings: one gradient per step
            spent = np.full(len(runs.seed), (index + 1) * STEPS_PER_EPOCH)
        gradients.append(np.asarray(spent))
        advance()
    return Trained(params, np.stack(history), np.stack(gradients))


def choose(trainer, candidates, noise, width, epochs, advance) -> tuple[float, float]:
    """Return the (learning rate, rho) with the best mean validation accuracy over tuning seeds."""
    runs = [(seed, *candidate) for candidate in candidates for seed in TUNING_SEEDS]
    runs = Runs(*map(jnp.asarray, zip(*runs, strict=True)))
    params, data = initialize(runs.seed, width), split(runs.seed, noise)
    trained = train(trainer, params, runs, data, epochs, advance)
    validation = (
        trained.accuracies[-1, :, 1].reshape(len(candidates), len(TUNING_SEEDS)).mean(axis=1)
    )
    return candidates[int(validation.argmax())]


def seconds_per_step(trainer: Trainer, params, runs: Runs, data, gradients: float) -> float:
    """Return the mean seconds per step of one run, without `vmap`.

    Sharp and plain steps are timed separately. The result is the mean of their two medians,
    weighted by how often each kind occurred in training. This weight follows from `gradients`, the
    mean number of gradients per step. One median over all steps would be the median of the more
    frequent kind.
    """
    state = trainer.init(runs, params)
    params, state, run, images = jax.tree.map(lambda x: x[0], (params, state, runs, data[0]))
    batches = [rows_of(images, rows) for rows in shuffled(run.seed, 0)]
    jax.block_until_ready(trainer.step(params, state, run, batches[0]))
    seconds: dict[bool, list[float]] = {}
    for index in range(TIMED_STEPS):
        start = time.perf_counter()
        params, state = trainer.step(params, state, run, batches[index % STEPS_PER_EPOCH])
        jax.block_until_ready((params, state))
        stop = time.perf_counter()
        is_sharp = bool(optax.tree.get(state, "is_sharp", default=False))
        seconds.setdefault(is_sharp, []).append(stop - start)
    medians = {kind: float(np.median(times)) for kind, times in seconds.items()}
    if len(medians) == 1:
        return next(iter(medians.values()))
    return (2 - gradients) * medians[False] + (gradients - 1) * medians[True]


def measure(row: str, args: argparse.Namespace, noises: list[float], bar: tqdm) -> list[dict]:
    """Choose the hyperparameters of one row, then train and measure it, for every table."""
    variant, times = ROWS[row]
    epochs = times * args.epochs
    trainer = make_trainer(VARIANTS[variant], args.base, args.width, epochs)
    candidates = candidates_of(row, args)
    results = []
    for noise in noises:
        bar.set_description(f"{row}, {describe(noise)}")
        tuning = len(candidates) * len(TUNING_SEEDS)
        learning_rate, rho = choose(
            trainer,
            candidates,
            noise,
            args.width,
            epochs,
            partial(bar.update, work_of(row, tuning)),
        )
        seeds = jnp.arange(args.seeds)
        runs = Runs(seeds, jnp.full(args.seeds, learning_rate), jnp.full(args.seeds, rho))
        data = split(seeds, noise)
        advance = partial(bar.update, work_of(row, args.seeds))
        trained = train(trainer, initialize(seeds, args.width), runs, data, epochs, advance)
        accuracies, gradients = trained.accuracies, trained.gradients.mean(axis=1)
        per_step = float(gradients[-1]) / (epochs * STEPS_PER_EPOCH)
        params = initialize(seeds, args.width)  # training donated the others
        results.append(
            {
                "row": row,
                "noise": noise,
                "learning_rate": learning_rate,
                "rho": rho,
                "train_accuracy": accuracies[-1, :, 0].tolist(),
                "test_accuracy": accuracies[-1, :, 2].tolist(),
                "test_accuracy_by_epoch": accuracies[:, :, 2].mean(axis=1).tolist(),
                "loss_increase": trainer.loss_increase(trained.params, data).tolist(),
                "gradients": float(gradients[-1]),
                "gradients_by_epoch": gradients.tolist(),
                "seconds_per_step": seconds_per_step(trainer, params, runs, data, per_step),
            }
        )
    return results


def candidates_of(row: str, args: argparse.Namespace) -> list[tuple[float, float]]:
    """Return the (learning rate, rho) pairs to choose from; the base optimizer has no rho."""
    variant, _ = ROWS[row]
    radii = VARIANTS[variant].radii
    if args.rho and variant != "base":
        radii = tuple(args.rho)
    rates = VARIANTS[variant].learning_rates or LEARNING_RATES[args.base]
    return [(rate, rho) for rate in rates for rho in radii]


def work_of(row: str, runs: int) -> int:
    """Return the gradients per epoch of `runs` runs; `vmap` computes both sides of a branch."""
    return STEPS_PER_EPOCH * runs * math.ceil(VARIANTS[ROWS[row][0]].gradients)


def describe(noise: float) -> str:
    """Describe the labels of a table."""
    return f"{noise:.0%} of the training labels wrong" if noise else "clean labels"


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error; the error of a single value is NaN."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(np.mean(values)), float(error)


def print_table(results: list[dict], noise: float, seeds: int) -> None:
    """Print one line per method."""
    print(f"\n{describe(noise)}, {seeds} seeds (mean ± standard error)")
    width = max(len("method"), *(len(result["row"]) for result in results))
    head = f"{'method':<{width}} {'test acc. %':>14} {'train acc. %':>13} {'loss increase':>14}"
    head += f" {'gradients':>10} {'ms/step':>8} {'lr':>7} {'rho':>6}"
    print(head + "\n" + "-" * len(head))
    for result in (r for r in results if r["noise"] == noise):
        test, error = mean_and_error([100 * a for a in result["test_accuracy"]])
        train_accuracy, _ = mean_and_error([100 * a for a in result["train_accuracy"]])
        increase, _ = mean_and_error(result["loss_increase"])
        print(
            f"{result['row']:<{width}} {test:>7.2f} ± {error:4.2f} {train_accuracy:>13.2f}"
            f" {increase:>14.4f} {result['gradients']:>10.0f}"
            f" {1e3 * result['seconds_per_step']:>8.3f} {result['learning_rate']:>7g}"
            f" {result['rho']:>6g}"
        )
    print(
        f"loss increase: L(w + eps) - L(w), |eps| = {SHARPNESS_RADIUS}, mean over training batches "
        f"of {BATCH}, with eps along the gradient of each batch"
    )
    if any(result["row"] == "base2x" for result in results):
        print("base2x: the base optimizer with twice as many epochs, so as many gradients as SAM")


def compare(results: list[dict], noise: float) -> None:
    """Print SAM's lead over the base optimizer with equally many gradients, in standard errors."""
    rows = {r["row"]: r for r in results if r["noise"] == noise}
    if len(rows.get("sam", {}).get("test_accuracy", ())) < 2 or "base2x" not in rows:
        return
    difference = np.subtract(rows["sam"]["test_accuracy"], rows["base2x"]["test_accuracy"])
    lead, error = mean_and_error(list(100 * difference))
    print(
        f"sam - base2x, the same gradients and seeds: {lead:+.2f} ± {error:.2f} points, "
        f"{lead / error:+.1f} standard errors"
    )


def draw(results: list[dict], noises: list[float], path: Path, title: str) -> None:
    """Draw one row of panels per table: final accuracies left, training curves right."""
    rows = list(dict.fromkeys(r["row"] for r in results))
    palette = plt.get_cmap("tab10" if len(rows) <= 10 else "tab20")
    colors = {row: palette(position) for position, row in enumerate(rows)}
    figure, axes = plt.subplots(
        len(noises), 2, figsize=(11, 1.2 + 3.2 * len(noises)), squeeze=False, layout="constrained"
    )
    for (left, right), noise in zip(axes, noises, strict=True):
        for position, result in enumerate(r for r in results if r["noise"] == noise):
            color = colors[result["row"]]
            mean, error = mean_and_error([100 * a for a in result["test_accuracy"]])
            left.errorbar(mean, position, xerr=error, fmt="o", color=color, capsize=4)
            left.annotate(
                f"{mean:.1f}", (mean, position), (0, 8), textcoords="offset points", ha="center"
            )
            curve = 100 * np.asarray(result["test_accuracy_by_epoch"])
            right.plot(result["gradients_by_epoch"], curve, color=color, label=result["row"])
        left.set_yticks(range(len(rows)), rows)
        left.set_ylim(len(rows) - 0.4, -0.7)
        left.set_title(describe(noise))
        left.set_xlabel("test accuracy, % (mean ± standard error)")
        left.grid(axis="x", alpha=0.3)
        right.set_title("during training, at equal gradients")
        right.set_xlabel("gradients spent")
        right.set_ylabel("test accuracy, %")
        best = max(max(r["test_accuracy_by_epoch"]) for r in results if r["noise"] == noise)
        right.set_ylim(100 * best - 15, 100 * best + 1)
        right.grid(alpha=0.3)
        right.legend(loc="lower right", ncols=1 + len(rows) // 9)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def can_have(variant: str, base: str) -> bool:
    """Return whether the variant accepts the base; Momentum-SAM needs momentum."""
    try:
        check_base(variant, base)
    except ValueError:
        return False
    return True


def add_settings(parser: argparse.ArgumentParser, seeds: int, name: str) -> None:
    """Add the arguments that all scripts on the digits share; `seeds` is the default number."""
    parser.add_argument("--base", choices=list(BASES), default="momentum")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--noise", type=float, default=0.3, help="share of flipped labels")
    parser.add_argument("--rho", type=float, nargs="+", help="candidate radii for every method")
    parser.add_argument("--width", type=int, default=64, help="units of each hidden layer")
    parser.add_argument("--out", help=f"new folder of the results; default runs/{name}-NNN")


def check_settings(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse numbers that are out of range."""
    for name in ("seeds", "epochs", "width"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not 0 <= args.noise < 1:
        parser.error(f"--noise must be in [0, 1), got {args.noise}")
    if args.rho and not all(0 <= rho < float("inf") for rho in args.rho):
        parser.error(f"--rho must be finite and at least 0, got {args.rho}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=list(ROWS),
        help=f"default: those of {', '.join(DEFAULT)} that accept the base",
    )
    add_settings(parser, seeds=20, name="digits")
    args = parser.parse_args(argv)
    default = (row for row in DEFAULT if can_have(ROWS[row][0], args.base))
    args.variants = list(dict.fromkeys(args.variants or default))
    check_settings(parser, args)
    try:
        for row in args.variants:
            check_base(ROWS[row][0], args.base)
        args.folder = free_folder(args.out, "digits")
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> list[dict]:
    args = parse(argv)
    device = f"{jax.devices()[0].device_kind} ({jax.default_backend()})"
    print(f"device: {device}, jax {jax.__version__}, samx {samx.__version__}")
    start = time.perf_counter()
    noises = list(dict.fromkeys([args.noise, 0.0]))
    total = sum(
        work_of(row, len(candidates_of(row, args)) * len(TUNING_SEEDS) + args.seeds)
        * ROWS[row][1]
        * args.epochs
        * len(noises)
        for row in args.variants
    )
    with tqdm(total=total, unit=" gradients", unit_scale=True, smoothing=0.1) as bar:
        results = [r for row in args.variants for r in measure(row, args, noises, bar)]

    for noise in noises:
        print_table(results, noise, args.seeds)
        compare(results, noise)

    settings = {k: v for k, v in vars(args).items() if k not in ("folder", "out")}
    report = {"device": device, "jax": jax.__version__, "samx": samx.__version__}
    report |= {"settings": settings, "results": results}
    (args.folder / "results.json").write_text(json.dumps(report, indent=1))
    title = f"Digits: {args.base} and its sharpness-aware versions, {args.seeds} seeds"
    draw(results, noises, args.folder / "digits.png", title)
    print(f"\n{time.perf_counter() - start:.0f} s in all. Results: {args.folder / 'results.json'}")
    print(f"Plot: {args.folder / 'digits.png'}")
    return results


if __name__ == "__main__":
    main()
