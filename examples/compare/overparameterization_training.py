"""Networks of any width, depth and sparsity on the digits, and the programs that train them.

A network is a list of layers, each with a kernel and a bias. A mask has the same shape, 1 where a
weight is kept. It multiplies the weights at the start and inside the loss. So the weights that are
pruned stay 0: their gradients are 0, and the perturbation of SAM moves only weights that are kept.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import samx
from examples.common.digits_task import STEPS_PER_EPOCH, rows_of, shuffled
from examples.common.training import cosine_decay, data_of, loss_on_logits

DECAY = 5e-4  # of the weights, for all rows
PIXELS, CLASSES = 64, 10
PRUNINGS = ("random", "magnitude")

Layers = list[dict[str, Any]]


class Setting(NamedTuple):
    """One setting of the study: a network and the labels that it learns.

    Attributes:
        width: Units of each hidden layer.
        depth: Number of hidden layers.
        noise: Share of the training labels that are wrong.
        sparsity: Share of the kernels' weights that are pruned.
        pruning: How they are chosen, one of `PRUNINGS`; "" without pruning.
        learning_rate: The only learning rate to try; 0 if it is tuned.
    """

    width: int
    depth: int
    noise: float
    sparsity: float = 0.0
    pruning: str = ""
    learning_rate: float = 0.0

    @property
    def name(self) -> str:
        """Return the name of the setting's file."""
        parts = [f"width-{self.width}", f"depth-{self.depth}", f"noise-{self.noise:g}"]
        if self.pruning:
            parts.append(f"{self.pruning}-{self.sparsity:g}")
        if self.learning_rate:
            parts.append(f"rate-{self.learning_rate:g}")
        return "_".join(parts)

    @property
    def dense(self) -> "Setting":
        """Return the same setting without pruning."""
        return self._replace(sparsity=0.0, pruning="")

    @property
    def sizes(self) -> list[int]:
        """Return the numbers of units, from the pixels to the logits."""
        return [PIXELS, *[self.width] * self.depth, CLASSES]

    @property
    def parameters(self) -> int:
        """Return how many weights and biases are kept."""
        weights = sum(a * b for a, b in itertools.pairwise(self.sizes))
        return weights - pruned_of(self.sparsity, weights) + sum(self.sizes[1:])


def pruned_of(sparsity: float, weights: int) -> int:
    """Return how many of the weights are pruned."""
    return round(sparsity * weights)


class Programs(NamedTuple):
    """The compiled functions of one architecture; masks and numbers are their arguments."""

    start: Callable[..., Any]  # seed -> layers
    base: Callable[..., Any]  # layers, mask, seed, learning rate, rho, train, epochs -> layers
    sam: Callable[..., Any]  # the same
    accuracy: Callable[..., Any]  # layers, split -> share of correct predictions


def logits_of(layers: Layers, x: jax.Array) -> jax.Array:
    """Return the logits [images, classes]."""
    *hidden, head = layers
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
    return x @ head["kernel"] + head["bias"][None]


def losses_of(layers: Layers, batch: Any) -> jax.Array:
    """Return the cross-entropy of each image."""
    return loss_on_logits(logits_of(layers, batch["x"]), batch)


def masked(layers: Layers, mask: Layers) -> Layers:
    """Return the layers with 0 for the weights that are pruned."""
    return jax.tree.map(jnp.multiply, layers, mask)


def accuracy_of(layers: Layers, data: Any) -> jax.Array:
    """Return the share of images that are classified as their label says."""
    return jnp.mean(logits_of(layers, data["x"]).argmax(-1) == data["y"])


def optimizer(is_sam: bool, steps: Any, learning_rate: Any, rho: Any) -> Any:
    """Return SGD with momentum, weight decay and a cosine schedule, with SAM or without."""
    schedule = cosine_decay(learning_rate, steps)
    base = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(schedule, momentum=0.9))
    return optax.chain(samx.sam(rho), base) if is_sam else optax.with_extra_args_support(base)


def train(is_sam, layers, mask, seed, learning_rate, rho, data, epochs) -> Layers:
    """Train one network, and return its layers."""
    tx = optimizer(is_sam, epochs * STEPS_PER_EPOCH, learning_rate, rho)

    def step(carry, rows):
        layers, state = carry
        batch = rows_of(data, rows)

        def value_fn(layers):
            return losses_of(masked(layers, mask), batch).mean()

        value, g = jax.value_and_grad(value_fn)(layers)
        updates, state = tx.update(g, state, layers, value=value, value_fn=value_fn)
        return (optax.apply_updates(layers, updates), state), None

    def epoch(number, carry):
        return jax.lax.scan(step, carry, shuffled(seed, number))[0]

    layers = masked(layers, mask)
    return jax.lax.fori_loop(0, epochs, epoch, (layers, tx.init(layers)))[0]


@functools.lru_cache(maxsize=1)
def make_programs(width: int, depth: int) -> Programs:
    """Compile the functions of an architecture."""
    sizes = Setting(width, depth, 0.0).sizes

    def start(seed):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(2), seed), depth + 1)
        shapes = zip(keys, itertools.pairwise(sizes), strict=True)
        return [
            {"kernel": (2 / a) ** 0.5 * jax.random.normal(key, (a, b)), "bias": jnp.zeros(b)}
            for key, (a, b) in shapes
        ]

    programs = [functools.partial(train, is_sam) for is_sam in (False, True)]
    return Programs(*map(jax.jit, (start, *programs, accuracy_of)))


def mask_by(scores: Layers, sparsity: float) -> Layers:
    """Return the mask that prunes the weights of the lowest scores, over all kernels together."""
    ranks = np.argsort(np.concatenate([np.ravel(layer["kernel"]) for layer in scores]))
    keeps = np.ones(len(ranks), np.float32)
    keeps[ranks[: pruned_of(sparsity, len(ranks))]] = 0
    ends = np.cumsum([layer["kernel"].size for layer in scores])[:-1]
    return [
        {
            "kernel": part.reshape(layer["kernel"].shape),
            "bias": np.ones(layer["bias"].shape, np.float32),
        }
        for part, layer in zip(np.split(keeps, ends), scores, strict=True)
    ]


@functools.lru_cache(maxsize=256)
def start_of(width: int, depth: int, seed: int) -> Layers:
    """Return the initial layers of a run, without a mask."""
    return jax.device_get(make_programs(width, depth).start(seed))


@functools.lru_cache(maxsize=256)
def trained_dense(setting: Setting, learning_rate: float, epochs: int, seed: int) -> Layers:
    """Return a dense network that the base optimizer has trained: its large weights are kept."""
    programs = make_programs(setting.width, setting.depth)
    start, train = start_of(setting.width, setting.depth, seed), data_of(seed, setting.noise)[0]
    full = mask_by(start, 0.0)
    return jax.device_get(programs.base(start, full, seed, learning_rate, 0.0, train, epochs))


@functools.lru_cache(maxsize=64)
def mask_of(setting: Setting, learning_rate: float, epochs: int, seed: int) -> Layers:
    """Return the mask of a run.

    Args:
        setting: The setting.
        learning_rate: That of the dense training before a pruning by magnitude.
        epochs: Those of that training.
        seed: The seed of the run.
    """
    start = start_of(setting.width, setting.depth, seed)
    if setting.pruning == "magnitude":
        scores = trained_dense(setting.dense, learning_rate, epochs, seed)
        return mask_by(jax.tree.map(np.abs, scores), setting.sparsity)
    rng = np.random.default_rng((3, seed))
    scores = jax.tree.map(lambda x: rng.random(x.shape), start)
    return mask_by(scores, setting.sparsity)
