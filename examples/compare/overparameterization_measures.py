"""What is measured at the end of a run of the overparameterization study.

The Hessian is that of the mean loss over all training images, with respect to the weights that are
kept. s_2, the non-uniformity of the paper's Hessian moments, needs the Hessian H_i of each image i:

    s_2 = sqrt(largest eigenvalue of mean_i H_i² − H²),    H = mean_i H_i

It is 0 if all images have the same Hessian. It is measured on a sample of the training images.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.compare.overparameterization_training import (
    Layers,
    accuracy_of,
    logits_of,
    losses_of,
    masked,
)
from samx import sharpness

LANCZOS, DRAWS = 12, 16  # products with the Hessian for the top eigenvalue, and for traces
SAMPLE, CHUNK, POWERS = 100, 20, 12  # images of s_2, how many at a time, and its iterations


def measure(
    layers: Layers, mask: Layers, start: Layers, train: Any, test: Any
) -> dict[str, jax.Array]:
    """Measure a trained network.

    Args:
        layers: The trained layers.
        mask: Their mask.
        start: The layers before the training, with the mask.
        train: The training split.
        test: The test split.

    Returns:
        "train_accuracy", "test_accuracy", "train_loss" and "test_loss"; "top_eigenvalue", "trace",
        and for each layer "layer_trace" and "layer_square", see `of_layers`; "linearization" and
        "distance", see `of_path`.
    """
    f = sharpness.objective(
        losses_fn=lambda layers, batch: losses_of(masked(layers, mask), batch), batch=train
    )
    top = sharpness.extreme_eigenvalue(f, layers, iterations=LANCZOS).values[0]
    return {
        "train_accuracy": accuracy_of(layers, train),
        "test_accuracy": accuracy_of(layers, test),
        "train_loss": losses_of(layers, train).mean(),
        "test_loss": losses_of(layers, test).mean(),
        "top_eigenvalue": top,
        **of_layers(f, layers, mask),
        **of_path(layers, start, test),
    }


def of_layers(f: sharpness.Objective, layers: Layers, mask: Layers) -> dict[str, jax.Array]:
    """Estimate two moments of the Hessian for each layer, per weight that is kept, and its trace.

    The first moment is the mean of H_pp over the weights p of the layer. The second one is the mean
    of (H²)_pp = Σ_q H_pq², where q goes over the weights of all layers.
    """
    product = sharpness.hvp(f, layers)
    leaves, structure = jax.tree.flatten(layers)
    counts = jnp.stack([sum(jnp.sum(x) for x in layer.values()) for layer in mask])

    def of_draw(key):
        keys = jax.random.split(key, len(leaves))
        signs = [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves)]  # noqa: B905
        z = structure.unflatten(signs)
        h = product(z)
        pairs = [(h_l, z_l) for h_l, z_l in zip(h, z, strict=True)]
        first = [sum(jnp.vdot(h_l[n], z_l[n]) for n in h_l) for h_l, z_l in pairs]
        second = [sum(jnp.vdot(x, x) for x in h_l.values()) for h_l in h]
        return jnp.stack(first), jnp.stack(second)

    first, second = jax.lax.map(of_draw, jax.random.split(jax.random.key(0), DRAWS))
    first, second = first.mean(axis=0), second.mean(axis=0)
    return {
        "trace": first.sum(),
        "layer_trace": first / counts,
        "layer_square": second / counts,
    }


def of_path(layers: Layers, start: Layers, test: Any) -> dict[str, jax.Array]:
    """Measure how far the training went, and how far from its linearization at the start w0.

    "linearization" is ‖f(w) − f_lin(w)‖ / ‖f(w) − f(w0)‖, where f are the logits of all test images
    and f_lin(w) = f(w0) + J(w0) (w − w0). "distance" is ‖w − w0‖ / ‖w0‖.
    """
    move = jax.tree.map(jnp.subtract, layers, start)
    before, slope = jax.jvp(lambda w: logits_of(w, test["x"]), (start,), (move,))
    change = logits_of(layers, test["x"]) - before
    return {
        "linearization": jnp.linalg.norm(change - slope) / jnp.linalg.norm(change),
        "distance": norm(move) / norm(start),
    }


def norm(tree: Any) -> jax.Array:
    """Return the length of a tree of arrays."""
    return jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(tree)))


def sample_of(train: Any) -> Any:
    """Return some training images, evenly spread: the wrong labels are those of the first ones."""
    rows = np.linspace(0, len(train["y"]) - 1, SAMPLE).astype(int)
    return {name: leaf[rows] for name, leaf in train.items()}


def non_uniformity(layers: Layers, mask: Layers, images: Any) -> jax.Array:
    """Return s_2 by power iteration: its matrix has no negative eigenvalue, and is never formed.

    Args:
        layers: The trained layers.
        mask: Their mask.
        images: A split whose size is a multiple of `CHUNK`.
    """
    count = len(images["y"])
    chunks = jax.tree.map(lambda leaf: leaf.reshape(-1, 1, CHUNK, *leaf.shape[1:]), images)
    chunks = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 1, 2), chunks)  # [chunks, CHUNK, 1, ...]

    def gradient(image):
        return jax.grad(lambda layers: losses_of(masked(layers, mask), image).mean())

    def times_each(image, v):
        return jax.jvp(gradient(image), (layers,), (v,))[1]

    def mean_over_images(product):
        """Return the mean over the images of `image -> tree`."""

        def add(total, chunk):
            found = jax.vmap(product)(chunk)
            return jax.tree.map(lambda x, y: x + y.sum(axis=0) / count, total, found), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, layers), chunks)[0]

    def times(v):
        squares = mean_over_images(lambda image: times_each(image, times_each(image, v)))
        once = jax.jvp(jax.grad(mean_loss), (layers,), (v,))[1]
        twice = jax.jvp(jax.grad(mean_loss), (layers,), (once,))[1]
        return jax.tree.map(jnp.subtract, squares, twice)

    def mean_loss(layers):
        return losses_of(masked(layers, mask), images).mean()

    def iterate(_, carry):
        v, _ = carry
        w = times(v)
        value = norm(w)
        return jax.tree.map(lambda x: x / jnp.maximum(value, 1e-30), w), value

    keys = jax.tree.unflatten(
        jax.tree.structure(layers), list(jax.random.split(jax.random.key(1), 2 * len(layers)))
    )
    v = jax.tree.map(lambda key, x: jax.random.normal(key, x.shape), keys, layers)
    v = jax.tree.map(lambda x: x / norm(v), v)
    _, value = jax.lax.fori_loop(0, POWERS, iterate, (v, jnp.zeros(())))
    return jnp.sqrt(value)
