"""The images of `fine_tune.py`: a network with two heads learns the digits 0 to 4, then 5 to 9.

Both heads stand on one body. The pre-training trains the body and the old head. The fine-tuning
trains the new head and, except "head", the body; the old head stays as it is.
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
from examples.common import lora
from examples.common.digits_task import load_digits
from examples.common.fine_tuning import ADAPTATIONS, BITS, ROWS, Problem, Row
from examples.common.mnist import load_mnist
from examples.common.rounding import rounded
from examples.common.training import loss_on_logits, map_runs
from examples.common.tuning import TUNING_SEEDS

CLASSES = 5  # of each head
BATCH = 50
RANK, SCALE = 4, 2.0  # of the adapters: W + SCALE A B
PRETRAINING_RATE = 2e-3
DECAY = 0.5  # the share of the steps, the last ones, in which the learning rate falls
RADIUS = 0.2  # of the ball in which the rise of the loss is measured
RATES = {"whole": 2e-3, "lora": 5e-3, "head": 1e-2}
RADII = {"sl-sam": 0.1, "flat-lora": 0.1, "bi-lora": 0.1}
START = 0.1  # of the search of other radii

Batch = dict[str, jax.Array]


class Setting(NamedTuple):
    """What all rows share; part of the key under which programs are kept."""

    task: str
    steps: int
    pretraining: int
    width: int


class Images(NamedTuple):
    """Where a task has its images, and how many of them are for what."""

    load: Callable[[], tuple[np.ndarray, np.ndarray]]  # images [n, pixels] from 0 to 1, and digits
    old: int  # training images of the old task; the others are its test split
    new: tuple[int, int]  # training and validation images of the new task
    tuning_seeds: int


@cache
def load_small() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's digits."""
    x, y = load_digits()
    return x / 16, y


IMAGES = {
    "images": Images(load_small, 500, (100, 300), 16),
    "mnist": Images(load_mnist, 1500, (200, 800), 8),
}


class Data(NamedTuple):
    """The splits of one seed."""

    old_train: Batch
    old_test: Batch
    train: Batch
    validation: Batch
    test: Batch


@lru_cache(maxsize=64)
def data_of(task: str, seed: int) -> Data:
    """Return the splits of a seed."""
    images = IMAGES[task]
    x, y = images.load()
    order = np.random.default_rng(seed).permutation(len(x))
    old, new = order[y[order] < CLASSES], order[y[order] >= CLASSES]
    parts = *np.split(old, [images.old]), *np.split(new, np.cumsum(images.new))
    return Data(
        *(
            {
                "x": jnp.asarray(x[part], jnp.float32),
                "y": jnp.asarray(y[part] % CLASSES, jnp.int32),
            }
            for part in parts
        )
    )


def initialize(key: jax.Array, pixels: int, width: int) -> Any:
    """Return weights of a body with two layers, and of both heads."""
    shapes = {"first": (pixels, width), "second": (width, width)}
    shapes |= {"old": (width, CLASSES), "new": (width, CLASSES)}
    draw = jax.nn.initializers.lecun_normal()
    layers = {
        name: {"kernel": draw(key, shape), "bias": jnp.zeros(shape[1])}
        for key, (name, shape) in zip(
            jax.random.split(key, len(shapes)), shapes.items(), strict=True
        )
    }
    body = {name: layers[name] for name in ("first", "second")}
    return {"body": body, "old": layers["old"], "new": layers["new"]}


def dense(layer: Any, x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"][None]


def features(body: Any, x: jax.Array) -> jax.Array:
    return jax.nn.relu(dense(body["second"], jax.nn.relu(dense(body["first"], x))))


def losses(weights: Any, head: str, data: Batch) -> jax.Array:
    """Return the loss of each image."""
    return loss_on_logits(dense(weights[head], features(weights["body"], data["x"])), data)


def rate_of(rate: Any, start: int, steps: int) -> optax.Schedule:
    """Return a learning rate that is constant until `start`, and then falls along a cosine."""
    return lambda t: (
        rate * 0.5 * (1 + jnp.cos(jnp.pi * jnp.maximum(0, t - start) / (steps - start)))
    )


@partial(jax.jit, static_argnums=(0, 1))
def pretrained(steps: int, width: int, seed: jax.Array, train: Batch) -> Any:
    """Return the weights after the pre-training on the old digits."""
    first, batches = jax.random.split(jax.random.key(seed))
    weights = initialize(first, train["x"].shape[1], width)
    tx = optax.adamw(optax.cosine_decay_schedule(PRETRAINING_RATE, max(1, steps)))

    def step(carry, key):
        weights, state = carry
        g = jax.grad(lambda w: losses(w, "old", drawn(key, train)).mean())(weights)
        updates, state = tx.update(g, state, weights)
        return (optax.apply_updates(weights, updates), state), None

    carry = weights, tx.init(weights)
    found: Any = jax.lax.scan(step, carry, jax.random.split(batches, steps))
    return found[0][0] | {"new": weights["new"]}


def drawn(key: jax.Array, data: Batch) -> Batch:
    """Return a batch, drawn without replacement."""
    size = len(data["y"])
    rows = jax.random.choice(key, size, (min(BATCH, size),), replace=False)
    return {name: leaf[rows] for name, leaf in data.items()}


@lru_cache(maxsize=64)
def start_of(setting: Setting, seed: int) -> Any:
    """Return the pre-trained weights of a seed."""
    train = data_of(setting.task, seed).old_train
    return pretrained(setting.pretraining, setting.width, seed, train)


class Adaptation(NamedTuple):
    """How trained parameters become weights: `fill(merge(params))` are those of body and head.

    `merge` gives the weights that are not frozen: what `on_merged` perturbs.
    """

    params: Any
    merge: Callable[[Any], Any]
    fill: Callable[[Any], Any]


def adapted(adapt: str, weights: Any, key: jax.Array) -> Adaptation:
    """Return the trained parameters of an adaptation, and how they become weights."""
    body, new = weights["body"], weights["new"]
    if adapt == "whole":
        return Adaptation({"body": body, "new": new}, lambda p: p, lambda w: w)
    if adapt == "head":
        return Adaptation({"new": new}, lambda p: p, lambda w: {"body": body, **w})
    adapters = lora.init_adapters(key, body, RANK, lambda path, leaf: True)

    def merge(p):
        return {"matrices": lora.merged(body, p["adapters"], SCALE), "new": p["new"]}

    def fill(w):
        return {"body": lora.filled(body, w["matrices"]), "new": w["new"]}

    return Adaptation({"adapters": adapters, "new": new}, merge, fill)


MERGED = ("merged-sam", "flat-lora", "bi-lora")  # their closures take merged weights


def optimizer(row: Row, rho: Any, rate: Any, steps: int, weights_like: Any, seed: Any) -> Any:
    """Return the optimizer of a row, and AdamW alone for the baselines.

    A method with random numbers has those of the seed.
    """
    key = jax.random.fold_in(jax.random.key(seed), 2)
    start = round((1 - DECAY) * steps)
    base = optax.adamw(rate_of(rate, start, steps))
    if row.method == "sl-sam":
        return samx.sl_sam(base, rho, groups=3, key=key)
    late = optax.linear_schedule(0.0, rho, max(1, steps - start), start)
    in_front: dict[str, Callable[[], Any]] = {
        "sam": lambda: samx.sam(rho),
        "late-sam": lambda: samx.perturb_if(samx.policies.between(start), samx.sam(late)),
        "functional-sam": lambda: samx.functional_sam(rho),
        "logits-sam": lambda: samx.logits_sam(rho),
        "merged-sam": lambda: samx.on_merged(samx.sam(rho), weights_like),
        "flat-lora": lambda: samx.flat_lora(
            rho, num_steps=steps, weights_like=weights_like, key=key
        ),
        "bi-lora": lambda: samx.bi_lora(rho, RANK, weights_like=weights_like, key=key),
    }
    if row.method not in in_front:
        return optax.with_extra_args_support(base)
    return optax.chain(in_front[row.method](), base)


@cache
def trainer(row: Row, steps: int) -> Callable[..., Any]:
    """Compile the fine-tuning of a row: body and new head after it, and gradients spent."""
    steps *= row.times

    def train(rate, rho, seed, weights, data):
        first, batches = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1))
        start, merge, fill = adapted(row.adapt, weights, first)
        tx = optimizer(row, rho, rate, steps, jax.eval_shape(merge, start), seed)
        is_merged = row.method in MERGED

        def step(carry, key):
            params, state = carry
            batch = drawn(key, data)

            def whole(point):
                return fill(point if is_merged else merge(point))

            def losses_fn(point, batch):
                return losses(whole(point), "new", batch)

            def features_fn(point, batch):
                return features(whole(point)["body"], batch["x"])

            g = jax.grad(lambda p: losses(fill(merge(p)), "new", batch).mean())(params)
            updates, state = tx.update(
                g,
                state,
                params,
                losses_fn=losses_fn,
                value_fn=lambda point: losses_fn(point, batch).mean(),
                features_fn=features_fn,
                head_fn=lambda point, x: dense(point["new"], x),
                apply_fn=lambda point, batch: dense(point["new"], features_fn(point, batch)),
                loss_on_logits=loss_on_logits,
                batch=batch,
                **({"merge_fn": merge} if is_merged else {}),
            )
            return (optax.apply_updates(params, updates), state), None

        carry = start, tx.init(start)
        (params, state), _ = jax.lax.scan(step, carry, jax.random.split(batches, steps))
        spent = optax.tree.get(state, "gradients_spent")
        return fill(merge(params)), steps if spent is None else spent

    return jax.jit(train)


def of_split(weights: Any, head: str, data: Batch) -> dict[str, jax.Array]:
    """Return accuracy and loss on one split."""
    logits = dense(weights[head], features(weights["body"], data["x"]))
    right = jnp.mean(logits.argmax(-1) == data["y"])
    return {f"{head}_accuracy": right, f"{head}_loss": loss_on_logits(logits, data).mean()}


@jax.jit
def measure(weights: Any, data: Data) -> dict[str, jax.Array]:
    """Return the measures of all weights: on both test splits, rounded too, and sharpness."""
    splits = {"new": data.test, "old": data.old_test}
    found = {}
    for bits in (None, *BITS):
        deployed = weights if bits is None else rounded(weights, bits)
        end = "" if bits is None else f"_{bits}_bits"
        for head, split in splits.items():
            found |= {n + end: x for n, x in of_split(deployed, head, split).items()}
    trained = {name: weights[name] for name in ("body", "new")}
    return found | sharpness(lambda w: losses(w, "new", data.train).mean(), trained)


def sharpness(value_fn: Callable[[Any], jax.Array], weights: Any) -> dict[str, jax.Array]:
    """Return the top eigenvalue of the Hessian, and the largest rise in a ball."""
    f = samx.sharpness.objective(value_fn=value_fn)
    ball = samx.perturbations.metric_ball(RADIUS)
    top = samx.sharpness.eigenvalues(f, weights, k=1)
    rise = samx.sharpness.worst_case(f, weights, ball, steps=50, restarts=4)
    return {"top_eigenvalue": top.values[0], "rise": rise.value}


@jax.jit
def loss(weights: Any, data: Batch) -> jax.Array:
    return of_split(weights, "new", data)["new_loss"]


def as_floats(found: Any) -> dict[str, float]:
    return {name: float(x) for name, x in jax.device_get(found).items()}


def before(setting: Setting, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Return the measures before the fine-tuning; the new head says nothing then."""
    every = [
        as_floats(measure(start_of(setting, seed), data_of(setting.task, seed))) for seed in seeds
    ]
    return [{n: x for n, x in one.items() if not n.startswith("new_")} for one in every]


def run(
    setting: Setting, row: Row, rate: float, rho: float, seeds: Sequence[int], split: str
) -> list[dict[str, Any]]:
    """Fine-tune and measure; see `Problem`. Candidates train together, reported seeds alone."""
    train = trainer(row, setting.steps)

    def trained(seed):
        data = data_of(setting.task, int(seed))
        start = start_of(setting, int(seed))
        new, spent = jax.block_until_ready(train(rate, rho, int(seed), start, data.train))
        return {**new, "old": start["old"]}, spent

    def validated(seed):
        return loss(trained(seed)[0], data_of(setting.task, int(seed)).validation)

    if split == "validation":
        found = map_runs(validated, np.asarray(seeds), advance=lambda count: None)
        return [{"new_loss": float(x)} for x in found]
    trained(seeds[0])  # compiles
    results = []
    for seed in seeds:
        begin = time.perf_counter()
        weights, spent = trained(seed)
        seconds = time.perf_counter() - begin
        measured = as_floats(measure(weights, data_of(setting.task, seed)))
        results.append({**measured, "gradients": float(spent), "seconds": seconds})
    return results


def make_problem(args: Any) -> Problem:
    """Return the problem of `--task images` or `--task mnist`.

    Raises:
        ImportError: If the package that has the images is not installed.
    """
    images = IMAGES[args.task]
    images.load()
    setting = Setting(args.task, args.steps, args.pretraining, args.width)
    what = {"images": "scikit-learn's digits", "mnist": "5,000 digits of MNIST"}[args.task]
    return Problem(
        title=f"{what}: 0 to 4, then 5 to 9",
        rows=ROWS,
        measure="accuracy",
        rates={adapt: RATES[adapt] for adapt in ADAPTATIONS},
        radii={name: RADII.get(row.method, START) for name, row in ROWS.items()},
        tuning_seeds=range(TUNING_SEEDS.start, TUNING_SEEDS.start + images.tuning_seeds),
        before=partial(before, setting),
        run=partial(run, setting),
    )
