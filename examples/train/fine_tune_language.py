"""The language of `fine_tune.py`: a small GPT learns English, then Python code.

Both texts come from the sources of the standard library (`prose.py`). "whole" trains the model as
it is: its embedding also gives the logits. "lora" trains adapters of the matrices of the layers
alone. "head" unties the model: a copy of the embedding becomes the head, and it alone is trained.
logits-sam needs a head that is trained, so "lora" does not have it.
"""

import time
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import samx
from examples.common import lora, monitoring
from examples.common.fine_tuning import BITS, ROWS, Problem, Row
from examples.common.gpt import Size, losses_of
from examples.common.rounding import rounded
from examples.train import prose, text
from examples.train.fine_tune_images import MERGED, Adaptation, as_floats, optimizer
from examples.train.pretraining import pretrain

DEPTH, LENGTH = 2, 64
BATCH, PRETRAINING_BATCH, PRETRAINING_RATE = 8, 16, 4e-3
TRAIN, HELD_OUT = 512, 256  # examples to fine-tune on; for validation, and for each test
MEASURED = 64  # training examples of the new task on which sharpness is measured
RADIUS = 0.2  # of the ball in which the rise of the loss is measured
RANK, SCALE = 8, 1.0  # of the adapters: W + SCALE A B
RATES = {"whole": 2e-3, "lora": 5e-3, "head": 1e-2}
RADII = {"flat-lora": 0.05, "bi-lora": 0.05}
START = 0.02  # of the search of other radii
SEEDS = range(1000, 1001)  # for the search: it is not reported; a training takes seconds

Model = Callable[..., jax.Array]  # (weights, x, method) -> result, as `apply_fn` of a training


class Setting(NamedTuple):
    """What all rows share; part of the key under which programs are kept."""

    steps: int
    pretraining: int
    width: int


class Data(NamedTuple):
    """Examples, int32[N, LENGTH + 1]."""

    train: jax.Array
    validation: jax.Array
    test: jax.Array
    old_test: jax.Array


@cache
def texts() -> tuple[text.Text, text.Text]:
    """Return English and code."""
    return prose.load()


@lru_cache(maxsize=16)
def data_of(seed: int) -> Data:
    """Return the examples of a seed: it chooses those to train on."""
    english, code = texts()
    first = np.random.default_rng(seed).choice(text.examples_in(code.train, LENGTH), TRAIN)
    half = len(code.held_out) // 2

    def spread(part):
        return text.windows(part, LENGTH, text.spread_starts(part, LENGTH, HELD_OUT))

    parts = (
        text.windows(code.train, LENGTH, first * LENGTH),
        *map(spread, (code.held_out[:half], code.held_out[half:], english.held_out)),
    )
    return Data(*map(jnp.asarray, parts))


@lru_cache(maxsize=16)
def start_of(setting: Setting, seed: int) -> tuple[Model, Any]:
    """Return the model, and its weights after the pre-training of a seed on English."""
    return pretrain(
        Size(setting.width, DEPTH, text.VOCABULARY, LENGTH),
        texts()[0].train,
        steps=setting.pretraining,
        batch=PRETRAINING_BATCH,
        learning_rate=PRETRAINING_RATE,
        seed=seed,
    )


def features(model: Model, weights: Any, tokens: jax.Array) -> jax.Array:
    """Return what the head gets; an untied head is not part of it."""
    return model({k: w for k, w in weights.items() if k != "head"}, tokens[:, :-1], "features")


def logits_of(model: Model, weights: Any, x: jax.Array) -> jax.Array:
    """Return the logits of features, by the head, or by the embedding."""
    body = {k: w for k, w in weights.items() if k != "head"}
    head = {"embedding": {"embedding": weights["head"].T}} if "head" in weights else {}
    return model(body | head, x, "head")


def loss_on_logits(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    return losses_of(logits, tokens[:, 1:])


def losses(model: Model, weights: Any, tokens: jax.Array) -> jax.Array:
    """Return the loss of each example."""
    return loss_on_logits(logits_of(model, weights, features(model, weights, tokens)), tokens)


def adapted(adapt: str, weights: Any, key: jax.Array) -> Adaptation:
    """Return the trained parameters of an adaptation, and how they become weights."""
    if adapt == "whole":
        return Adaptation(weights, lambda p: p, lambda w: w)
    if adapt == "head":
        head = {"head": weights["embedding"]["embedding"].T}
        return Adaptation(head, lambda p: p, lambda w: weights | w)

    def is_adapted(path, leaf):
        del leaf
        return path.endswith("kernel")

    adapters = lora.init_adapters(key, weights, RANK, is_adapted)
    return Adaptation(
        adapters,
        lambda p: lora.merged(weights, p, SCALE),
        lambda matrices: lora.filled(weights, matrices),
    )


@cache
def trainer(model: Model, row: Row, steps: int) -> Callable[..., Any]:
    """Compile the fine-tuning of a row: weights after it, and gradients spent."""
    steps *= row.times

    def train(rate, rho, seed, weights, data):
        first, batches = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1))
        start, merge, fill = adapted(row.adapt, weights, first)
        tx = optimizer(row, rho, rate, steps, jax.eval_shape(merge, start), seed)
        is_merged = row.method in MERGED

        def step(carry, number):
            params, state = carry
            batch = batch_at(batches, number, data)

            def whole(point):
                return fill(point if is_merged else merge(point))

            def losses_fn(point, batch):
                return losses(model, whole(point), batch)

            def features_fn(point, batch):
                return features(model, whole(point), batch)

            def head_fn(point, x):
                return logits_of(model, whole(point), x)

            g = jax.grad(lambda p: losses(model, fill(merge(p)), batch).mean())(params)
            updates, state = tx.update(
                g,
                state,
                params,
                losses_fn=losses_fn,
                value_fn=lambda point: losses_fn(point, batch).mean(),
                features_fn=features_fn,
                head_fn=head_fn,
                apply_fn=lambda point, batch: head_fn(point, features_fn(point, batch)),
                loss_on_logits=loss_on_logits,
                batch=batch,
                **({"merge_fn": merge} if is_merged else {}),
            )
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (start, tx.init(start)), jnp.arange(steps))
        spent = optax.tree.get(state, "gradients_spent")
        return fill(merge(params)), steps if spent is None else spent

    return jax.jit(train)


def batch_at(key: jax.Array, number: jax.Array, data: jax.Array) -> jax.Array:
    """Return the batch of a step; every epoch has a new order."""
    per_epoch = len(data) // BATCH
    order = jax.random.permutation(jax.random.fold_in(key, number // per_epoch), len(data))
    return data[jax.lax.dynamic_slice(order, [number % per_epoch * BATCH], [BATCH])]


def deployed(weights: Any, bits: int) -> Any:
    """Round the matrices; the rows of the embedding are the outputs, the scales of norms stay."""

    def of_leaf(path, w):
        name = lora.path_of(path)
        if name.endswith("embedding"):
            return rounded(w.T, bits).T
        return rounded(w, bits) if name.endswith(("kernel", "head")) else w

    return jax.tree_util.tree_map_with_path(of_leaf, weights)


@partial(jax.jit, static_argnums=0)
def mean_loss(model: Model, weights: Any, tokens: jax.Array) -> jax.Array:
    return losses(model, weights, tokens).mean()


@partial(jax.jit, static_argnums=0)
def sharpness(model: Model, weights: Any, tokens: jax.Array) -> dict[str, jax.Array]:
    """Return the top eigenvalue and the rise of the loss, of all weights."""
    f = samx.sharpness.objective(value_fn=lambda w: losses(model, w, tokens).mean())
    found = monitoring.measure(f, weights, RADIUS)
    return {name: found[name] for name in ("top_eigenvalue", "rise")}


def measure(model: Model, weights: Any, data: Data) -> dict[str, float]:
    """Return the measures of all weights: on both test splits, rounded too, and sharpness."""
    found = {}
    for bits in (None, *BITS):
        rounded_weights = weights if bits is None else deployed(weights, bits)
        end = "" if bits is None else f"_{bits}_bits"
        for task, split in (("new", data.test), ("old", data.old_test)):
            found[f"{task}_loss{end}"] = mean_loss(model, rounded_weights, split)
    return as_floats(found | sharpness(model, weights, data.train[:MEASURED]))


def before(setting: Setting, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Return the measures before the fine-tuning; the loss on code says something here too."""
    return [measure(*start_of(setting, seed), data_of(seed)) for seed in seeds]


def run(
    setting: Setting, row: Row, rate: float, rho: float, seeds: Sequence[int], split: str
) -> list[dict[str, Any]]:
    """Fine-tune and measure; see `Problem`."""
    results = []
    for seed in seeds:
        data, (model, start) = data_of(seed), start_of(setting, seed)
        train = trainer(model, row, setting.steps)
        arguments = rate, rho, seed, start, data.train
        if split == "validation":
            weights, _ = train(*arguments)
            results.append({"new_loss": float(mean_loss(model, weights, data.validation))})
            continue
        if not results:
            jax.block_until_ready(train(*arguments))  # compiles
        begin = time.perf_counter()
        weights, spent = jax.block_until_ready(train(*arguments))
        seconds = time.perf_counter() - begin
        measured = measure(model, weights, data)
        results.append({**measured, "gradients": float(spent), "seconds": seconds})
    return results


def make_problem(args: Any) -> Problem:
    """Return the problem of `--task language`."""
    setting = Setting(args.steps, args.pretraining, args.width)
    rows = {name: row for name, row in ROWS.items() if name != "lora logits-sam"}
    return Problem(
        title="a GPT on bytes: English, then Python code",
        rows=rows,
        measure="loss",
        rates=RATES,
        radii={name: RADII.get(row.method, START) for name, row in rows.items()},
        tuning_seeds=SEEDS,
        before=partial(before, setting),
        run=partial(run, setting),
        decades=0,
    )
