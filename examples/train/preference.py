"""Preference tuning in miniature: DPO of a small language model with AdamW, SAM and logits-SAM.

    python examples/train/preference.py
    python examples/train/preference.py --seeds 2 --steps 100
    python examples/train/preference.py --resume runs/preference-001

A GPT is pre-trained on the sources of the standard library, byte by byte. Then it is tuned by
direct preference optimization (DPO) on pairs made from the same sources. A pair is a prompt, the
bytes that follow it in the file (chosen), and bytes from elsewhere in the same file (rejected):

    margin = beta ((log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected)))
    loss   = -log sigmoid(margin)

q is the pre-trained model. Its log-probabilities are computed once and stored in the batch. The
rows of the table:

    adamw, adamw2x    the base, and the base with twice the steps: the gradients of SAM
    sam               two gradients in each step
    functional-sam    two gradients in each step
    logits-sam        climbs the head alone: one gradient, and two thirds of the head's share

The head is the embedding: logits-SAM perturbs it in its use as head only. A pair counts as right if
its margin is positive. Training pairs come from the files that the model was pre-trained on,
validation and test pairs from two halves of the held-out files. Learning rate and rho are chosen by
the loss on the validation pairs, with seeds that are not reported, until the best candidate is in
the interior of what was tried. The axis of rho begins with 0, where a method is AdamW. All seeds
begin with one pre-trained model; a seed draws the pairs to train on, and their order.

The script prints a table, and writes results.json and preference.png to --out. If it was
interrupted, --resume FOLDER continues it: every training that has ended is kept in cells.json.
It takes about fifteen minutes on one CPU core.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from examples.common import arguments
from examples.common.resume import resumed, write_config

SCRIPT = "preference.py"
BETA = 0.1  # of DPO
# Published results for models with billions of parameters (arXiv:2603.18258), from a note on the
# paper, not from its text.
PUBLISHED = (
    "Published for billion-parameter models (arXiv 2603.18258, as quoted by a note on the paper): "
    "logits-SAM raises\nDPO's scores from 70.5 to 72.3 and from 84.2 to 89.6, in 72 instead of 70 "
    "minutes."
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    add = parser.add_argument
    add("--seeds", type=int, default=5)
    add("--steps", type=int, default=200, help="of DPO; adamw2x takes twice as many")
    add("--batch", type=int, default=16, help="pairs in a step; default: 16")
    add("--pairs", type=int, default=1600, help="pairs to train on; default: 1600")
    add("--pretrain", type=int, default=1500, metavar="STEPS", help="default: 1500")
    add("--width", type=int, default=64, help="features; default: 64")
    add("--prompt", type=int, default=24, help="bytes of a prompt; default: 24")
    add("--continuation", type=int, default=8, help="bytes of a continuation; default: 8")
    add("--rounds", type=int, default=7, help="in which the steps are timed; default: 7")
    arguments.add_out(parser, "preference")
    add("--resume", metavar="FOLDER", help="continue this run, with its settings")
    args = parser.parse_args(argv)
    if args.resume is not None:
        args, _ = resumed(parser, argv, SCRIPT, not_settings=("out", "resume"))
    sizes = ("seeds", "steps", "batch", "pretrain", "width", "prompt", "continuation", "rounds")
    arguments.check_range(parser, args, *sizes)
    arguments.check_range(parser, args, "pairs", low=args.batch)
    if args.width % 2 or (args.width > 64 and args.width % 64):
        parser.error(f"--width must be even, and above 64 a multiple of 64, got {args.width}")
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import samx
from examples.common import figures, files, measuring
from examples.common.gpt import Size
from examples.common.output import choose_folder
from examples.common.report import MARK, Report, aligned, marked, mean_and_error
from examples.common.tuning import SIXTHS, around, best_of, edges, from_zero, search
from examples.train import text
from examples.train.fine_tune import Cells
from examples.train.language_model import make_base
from examples.train.pretraining import pretrain

DEPTH, PRETRAIN_BATCH, PRETRAIN_RATE = 2, 32, 4e-3
HELD_OUT_PAIRS, PART = 2048, 128  # for validation, and for the test; pairs at a time
SEARCH_SEEDS = (1000, 1001)  # none of them is reported
NUMBERS = ("learning_rate", "rho")
RATE = 1e-3  # where the search begins
LEAST = 0.2  # seconds of one timing

Pairs = dict[str, jax.Array]  # "tokens", int[N, 2, T + 1]: chosen and rejected; "reference", [N, 2]


class Method(NamedTuple):
    """A row of the table: how its gradient is taken, where its radius begins, factor on steps."""

    make: Callable[[Any], optax.GradientTransformation]
    radius: float = 0.0
    times: int = 1


METHODS = {
    "adamw": Method(lambda rho: optax.identity()),
    "adamw2x": Method(lambda rho: optax.identity(), times=2),
    "sam": Method(lambda rho: samx.sam(rho), 0.02),
    "functional-sam": Method(lambda rho: samx.functional_sam(rho), 0.02),
    "logits-sam": Method(lambda rho: samx.logits_sam(rho), 0.05),
}


class Model(NamedTuple):
    """A pre-trained model.

    Attributes:
        apply_fn: `(params, x, method) -> result`.
        params: The pre-trained parameters.
        continuation: Bytes of a continuation.
    """

    apply_fn: Callable[..., jax.Array]
    params: Any
    continuation: int

    def features(self, params: Any, batch: Pairs) -> jax.Array:
        """Return what both continuations are predicted from, [B, 2, continuation, features]."""
        tokens = batch["tokens"][..., :-1]
        features = self.apply_fn(params, tokens.reshape(-1, tokens.shape[-1]), method="features")
        return features.reshape(*tokens.shape, -1)[:, :, -self.continuation :]

    def head(self, params: Any, features: jax.Array) -> jax.Array:
        """Return the logits of features."""
        return self.apply_fn(params, features, method="head")

    def logits(self, params: Any, batch: Pairs) -> jax.Array:
        """Return the logits of both continuations, [B, 2, continuation, vocabulary]."""
        return self.head(params, self.features(params, batch))


class Task(NamedTuple):
    """What every training of a run shares.

    Attributes:
        model: The model with which every training begins.
        train: The pairs that a seed trains on, `seed -> pairs`.
        validation: Pairs from one half of the held-out files.
        test: Pairs from the other half.
    """

    model: Model
    train: Callable[[int], Pairs]
    validation: Pairs
    test: Pairs


def draw_pairs(
    sources: Sequence[np.ndarray], count: int, prompt: int, continuation: int, seed: int
) -> np.ndarray:
    """Return pairs of sequences, int32[count, 2, prompt + continuation]: first the chosen one.

    A file is drawn in proportion to its length, then a place in it, and another place from which
    the rejected continuation is taken. Both continuations differ.
    """
    rng, length = np.random.default_rng(seed), prompt + continuation
    long_enough = [file for file in sources if len(file) > 2 * length]
    sizes = np.array([len(file) for file in long_enough])
    pairs = np.zeros((count, 2, length), np.int32)
    for pair, number in zip(
        pairs, rng.choice(len(sizes), count, p=sizes / sizes.sum()), strict=True
    ):
        file = long_enough[number]
        place = rng.integers(len(file) - length + 1)
        pair[:] = file[place : place + length]
        while (pair[0] == pair[1]).all():
            elsewhere = rng.integers(len(file) - continuation + 1)
            pair[1, prompt:] = file[elsewhere : elsewhere + continuation]
    return pairs


def log_probabilities(logits: jax.Array, batch: Pairs) -> jax.Array:
    """Return the log-probability of both continuations of each pair, [B, 2]."""
    targets = batch["tokens"][..., -logits.shape[-2] :]
    return -optax.softmax_cross_entropy_with_integer_labels(logits, targets).sum(axis=-1)


def margins(logits: jax.Array, batch: Pairs) -> jax.Array:
    """Return by how much each pair is right, [B]."""
    chosen, rejected = (log_probabilities(logits, batch) - batch["reference"]).T
    return BETA * (chosen - rejected)


def loss_on_logits(logits: jax.Array, batch: Pairs) -> jax.Array:
    """Return DPO's loss of each pair, [B]."""
    return -jax.nn.log_sigmoid(margins(logits, batch))


def with_reference(model: Model, tokens: np.ndarray) -> Pairs:
    """Return pairs with the log-probabilities of the pre-trained model."""

    @jax.jit
    def reference(part):
        batch = {"tokens": part}
        return log_probabilities(model.logits(model.params, batch), batch)

    parts = [np.asarray(reference(tokens[i : i + PART])) for i in range(0, len(tokens), PART)]
    return {"tokens": jnp.asarray(tokens), "reference": jnp.asarray(np.concatenate(parts))}


def make_task(args: argparse.Namespace) -> Task:
    """Pre-train the model, and draw the pairs of both held-out splits."""
    train, held_out = text.load_files()
    size = Size(args.width, DEPTH, text.VOCABULARY, args.prompt + args.continuation)
    apply_fn, params = pretrain(
        size,
        np.concatenate(train),
        steps=args.pretrain,
        batch=PRETRAIN_BATCH,
        learning_rate=PRETRAIN_RATE,
        seed=0,
    )
    model = Model(apply_fn, params, args.continuation)

    def pairs(sources, count, seed):
        tokens = draw_pairs(sources, count, args.prompt, args.continuation, seed)
        return with_reference(model, tokens)

    return Task(
        model,
        lambda seed: pairs(train, args.pairs, seed),
        pairs(held_out[::2], HELD_OUT_PAIRS, seed=1),
        pairs(held_out[1::2], HELD_OUT_PAIRS, seed=2),
    )


def optimizer(name: str, learning_rate: Any, rho: Any, steps: int) -> optax.GradientTransformation:
    """Build a method's optimizer; the learning rate falls along a cosine to 0."""
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    return optax.chain(METHODS[name].make(rho), make_base(schedule, 0.0))


def take_step(model: Model, tx: Any, params: Any, state: Any, batch: Pairs) -> tuple[Any, Any]:
    """Take one step of any method."""

    def loss(params):
        return loss_on_logits(model.logits(params, batch), batch).mean()

    updates, state = tx.update(
        jax.grad(loss)(params),
        state,
        params,
        value_fn=loss,
        apply_fn=model.logits,
        features_fn=model.features,
        head_fn=model.head,
        loss_on_logits=loss_on_logits,
        batch=batch,
    )
    return optax.apply_updates(params, updates), state


def make_trainer(model: Model, name: str, steps: int, batch: int) -> Callable[..., Any]:
    """Return the compiled function that trains a run and measures it on a split."""
    steps *= METHODS[name].times

    @jax.jit
    def train(seed, learning_rate, rho, pairs, split):
        tx = optimizer(name, learning_rate, rho, steps)
        count = len(pairs["tokens"])
        per_epoch = count // batch

        def step(carry, number):
            key = jax.random.fold_in(jax.random.key(seed), number // per_epoch)
            order = jax.random.permutation(key, count)
            rows = jax.lax.dynamic_slice(order, [number % per_epoch * batch], [batch])
            found = jax.tree.map(lambda x: x[rows], pairs)
            params, state = carry
            return take_step(model, tx, params, state, found), None

        start = model.params, tx.init(model.params)
        (params, state), _ = jax.lax.scan(step, start, jnp.arange(steps))
        spent = optax.tree.get(state, "gradients_spent", steps)

        parts = jax.tree.map(lambda x: x.reshape(-1, PART, *x.shape[1:]), split)
        found = jax.lax.map(lambda part: margins(model.logits(params, part), part), parts)
        return (found > 0).mean(), -jax.nn.log_sigmoid(found).mean(), spent

    return train


class Trainings:
    """All trainings of a run; a setting whose trainings have ended is kept in cells.json."""

    def __init__(self, args: argparse.Namespace, bar: tqdm):
        self.args, self.bar = args, bar
        self.cells = Cells(args.folder / "cells.json")
        self.task = make_task(args)
        self.trainer = cache(partial(make_trainer, self.task.model))
        self.pairs = cache(self.task.train)

    def measure(self, name: str, rate: float, rho: float, split: str) -> list[dict[str, float]]:
        """Train with all seeds of a split, and measure on it: one dict for each seed."""

        def of(seed):
            train = self.trainer(name, self.args.steps, self.args.batch)
            held_out = self.task.validation if split == "validation" else self.task.test
            found = train(seed, rate, rho, self.pairs(seed), held_out)
            accuracy, loss, spent = map(float, found)
            return {"accuracy": 100 * accuracy, "loss": loss, "gradients": spent}

        seeds = SEARCH_SEEDS if split == "validation" else range(self.args.seeds)
        found = self.cells.get(f"{name}, {rate:g}, {rho:g}, {split}", lambda: [*map(of, seeds)])
        self.bar.update(len(seeds))
        return found

    def row(self, name: str) -> dict[str, Any]:
        """Choose the numbers of a row, repeat it with the reported seeds, and measure it."""
        radius = METHODS[name].radius
        axes = [around(RATE, SIXTHS)]
        if radius:
            axes = [axes[0]._replace(reach=1), from_zero(around(radius, decades=0))]

        def score(candidate):
            found = self.measure(name, *numbers_of(candidate), "validation")
            return -float(np.mean([seed["loss"] for seed in found]))

        tried = search(axes, lambda candidates: [score(candidate) for candidate in candidates])
        best = best_of(tried)
        found = self.measure(name, *numbers_of(best), "test")
        return {
            "method": name,
            **dict(zip(NUMBERS, numbers_of(best), strict=True)),
            "edges": edges(best, tried, NUMBERS[: len(best)]),
            "candidates": [[*numbers_of(c), -score] for c, score in tried.items()],
            **{measure: [seed[measure] for seed in found] for measure in found[0]},
        }


def numbers_of(candidate: tuple[float, ...]) -> tuple[float, float]:
    """Return learning rate and rho of a candidate."""
    return candidate[0], candidate[1] if len(candidate) > 1 else 0.0


def time_steps(task: Task, results: list[dict[str, Any]], batch: int, rounds: int) -> None:
    """Add to each row the milliseconds of a step, and their ratio to AdamW's, in rounds."""
    part = jax.tree.map(lambda x: x[:batch], task.test)

    def runner(result):
        tx = optimizer(result["method"], result["learning_rate"], result["rho"], 1000)
        step = jax.jit(partial(take_step, task.model, tx))
        held = [task.model.params, tx.init(task.model.params)]

        def advance():
            held[:] = step(*held, part)
            return held

        return measuring.Runner(advance, LEAST)

    runners = {result["method"]: runner(result) for result in results}
    seconds, _ = measuring.in_rounds({k: r.seconds for k, r in runners.items()}, rounds)
    for result in results:
        times = measuring.time_of(seconds[result["method"]], seconds["adamw"])
        result |= {"ms": times["ms"], "time_ratio": times["ratio"]}


def better_base(results: list[dict[str, Any]], measure: str) -> dict[str, Any]:
    """Return the better of AdamW and AdamW with twice the steps."""
    sign = -1 if measure == "loss" else 1
    rows = [result for result in results if result["method"].startswith("adamw")]
    return max(rows, key=lambda row: sign * np.mean(row[measure]))


def lead_of(result: dict[str, Any], other: dict[str, Any], measure: str) -> str:
    """Return the difference from another row, paired by seed."""
    if result is other:
        return ""
    mean, error = mean_and_error(np.subtract(result[measure], other[measure]).tolist())
    return f"{mean:+.{DIGITS[measure]}f} ± {error:.{DIGITS[measure]}f}"


DIGITS = {"accuracy": 2, "loss": 4}


def table(results: list[dict[str, Any]]) -> list[list[str]]:
    """Return a head, and one line per method."""
    head = ["method", "gradients", "time/adamw"]
    for measure in ("accuracy, %", "loss"):
        head += [measure, "over base", "over adamw"]
    grid = [[*head, "lr", "rho"]]
    for result in results:
        line = [
            result["method"],
            f"{np.mean(result['gradients']):.1f}",
            f"{result['time_ratio'][1]:.2f}",
        ]
        for measure, digits in DIGITS.items():
            mean, error = mean_and_error(result[measure])
            base = better_base(results, measure)
            leads = (lead_of(result, other, measure) for other in (base, results[0]))
            line += [f"{mean:.{digits}f} ± {error:.{digits}f}", *leads]
        grid.append([*line, *(marked(result, number) for number in NUMBERS)])
    return grid


def claim(results: list[dict[str, Any]]) -> str:
    """State the lead of logits-SAM over AdamW with as many steps."""
    (row,) = (result for result in results if result["method"] == "logits-sam")
    return f"logits-SAM minus AdamW: {lead_of(row, results[0], 'accuracy')} points"


def draw(results: list[dict[str, Any]], path: Path, title: str) -> None:
    """Plot the accuracy of each method over the time of all its steps."""
    figure = figures.make_figure(1.5)
    axes = figure.subplots()
    points = []
    for result, color in zip(results, figures.COLORS, strict=False):
        mean, error = mean_and_error(result["accuracy"])
        x = result["time_ratio"][1] * METHODS[result["method"]].times
        axes.errorbar(x, mean, yerr=error, fmt="o", color=color, capsize=2)
        points.append((x, mean, result["method"], color))
    axes.margins(0.2)
    axes.set(
        xlabel="time of all steps, relative to AdamW", ylabel="held-out preference accuracy, %"
    )
    axes.set_title(claim(results))
    axes.grid(alpha=0.3)
    figures.label_points(axes, points)
    figures.save(figure, path, title)


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(argv)
    choose_folder(args, "preference")
    left_out = ("folder", "out", "resume")
    if args.resume is None:
        settings = {name: value for name, value in vars(args).items() if name not in left_out}
        write_config(args.folder, SCRIPT, settings)
    report = Report(args, left_out=("resume",))
    planned = len(METHODS) * args.seeds + len(SEARCH_SEEDS) * (2 * 5 + 3 * 14)
    with tqdm(total=planned, unit=" runs", smoothing=0.1, disable=None) as bar:
        try:
            trainings, results = Trainings(args, bar), []
        except (OSError, ValueError) as error:
            arguments.refuse(f"--resume {args.resume}: {error}")
        for name in METHODS:
            bar.set_description(name)
            results.append(trainings.row(name))
    time_steps(trainings.task, results, args.batch, args.rounds)
    print(
        f"\n{args.steps} steps of {args.batch} pairs, {args.seeds} seeds (mean ± standard error); "
        "over base: than the better of adamw and adamw2x; over adamw: than adamw alone"
    )
    print("\n".join(aligned(table(results))))
    if any(result["edges"] for result in results):
        print(MARK)
    print(f"\n{PUBLISHED}")
    report.save(results=results)
    title = f"DPO of a language model with width {args.width}, {args.seeds} seeds"
    draw(results, args.folder / "preference.png", title)
    report.end("preference.png")
    return results


if __name__ == "__main__":
    main()
