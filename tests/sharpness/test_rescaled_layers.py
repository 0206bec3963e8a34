"""Rescaled layers of a ReLU network, the same function at other parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samx import sharpness
from samx.perturbations import magnitude, metric_ball

pytestmark = pytest.mark.usefixtures("float64")


def relu_net(w, batch):
    hidden = jax.nn.relu(batch["x"] @ w["W1"] + w["b1"][None])
    return jnp.squeeze(hidden @ w["W2"], 1)


def rescaled(w, c):
    return {"W1": c * w["W1"], "b1": c * w["b1"], "W2": w["W2"] / c}


def norm(w):
    return jnp.sqrt(sum(jnp.sum(x**2) for x in w.values()))


def problem_and_noise():
    rng = np.random.RandomState(0)
    batch = {"x": jnp.asarray(rng.randn(12, 3)), "y": jnp.asarray(rng.randn(12))}
    w = {"W1": rng.randn(3, 4), "b1": rng.randn(4), "W2": rng.randn(4, 1)}
    noise = {name: jnp.asarray(rng.randn(5, *x.shape)) for name, x in w.items()}
    f = sharpness.objective(
        apply_fn=relu_net, loss_on_logits=lambda z, batch: (z - batch["y"]) ** 2, batch=batch
    )
    return f, jax.tree.map(jnp.asarray, w), noise


def invariant(f, w, noise):
    metric = magnitude(0.0, is_scaled=lambda path, leaf: True)
    d = sharpness.filter_normalize({name: x[0] for name, x in noise.items()}, w)
    return {
        "first_order": sharpness.first_order(f, w, metric_ball(0.1, metric)),
        "m_sharpness": sharpness.m_sharpness(f, w, metric_ball(0.1, metric), shard_size=5),
        "average_case": sharpness.average_case(f, w, 0.1, metric=metric, draws=noise),
        "relative_flatness": sharpness.relative_flatness(
            f, w, lambda path, leaf: path[0].key == "W1"
        ),
        "fisher_rao": sharpness.directional(f, w, w, operator="ggn") * norm(w) ** 2,
        "slice": sharpness.slice_1d(f, w, d, [-0.5, 0.3]),
        "plane": sharpness.slice_2d(f, w, (d, w), [0.3], [0.1]),
    }


def plain(f, w, noise):
    d = {name: x[0] for name, x in noise.items()}
    return {
        "first_order": sharpness.first_order(f, w, metric_ball(0.1)),
        "m_sharpness": sharpness.m_sharpness(f, w, metric_ball(0.1), shard_size=5),
        "average_case": sharpness.average_case(f, w, 0.1, draws=noise).mean,
        "smoothed": sharpness.smoothed(f, w, 0.3, draws=noise).mean,
        "curvature": sharpness.directional(f, w, w),
        "slice": sharpness.slice_1d(f, w, d, [0.3])[0],
    }


def test_adaptive_measures_do_not_see_the_scale_of_layers_and_plain_ones_do():
    f, w, noise = problem_and_noise()
    both = jax.jit(lambda w: (invariant(f, w, noise), plain(f, w, noise)))
    (found, others), (same, changed) = both(w), both(rescaled(w, 3.0))
    for name, value in found.items():
        np.testing.assert_allclose(same[name], value, rtol=1e-8, err_msg=name)
    for name, value in others.items():
        assert abs(changed[name] / value - 1) > 0.1, name
