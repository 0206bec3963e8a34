"""The largest ascent batch that the descent hides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import samx
from samx.asynchronous import calibrate_ascent_batch

pytestmark = pytest.mark.usefixtures("float64")


def calibrated(monkeypatch, seconds_of, size=36, **keywords):
    """Calibrate with a fake clock: 10 s for the descent, 1 s for the copies, `seconds_of(size)`."""
    one, other = jax.devices()[:2]
    seen = []

    def grad_fn(params, batch):
        if isinstance(params, jax.core.Tracer):  # its shapes are checked first
            return params
        seen.append((len(batch["y"]), {x.device for x in jax.tree.leaves((params, batch))}))
        return params

    def median_seconds(fn, repeats):
        assert repeats == 5
        seen.clear()
        fn()
        if not seen:
            return 1.0
        [(size_there, devices)] = seen
        if devices == {one}:
            assert size_there == size
            return 10.0
        assert devices == {other}
        return seconds_of(size_there)

    monkeypatch.setattr(jax, "jit", lambda fn: fn)
    monkeypatch.setattr(samx.asynchronous, "_median_seconds", median_seconds)
    batch = {"x": np.zeros((size, 2), np.float32), "y": np.zeros(size, np.int32)}
    return calibrate_ascent_batch(
        grad_fn, jnp.ones(3), batch, descent_device=one, ascent_device=other, **keywords
    )


@pytest.mark.parametrize(
    ("seconds", "size", "is_hidden"),
    [(0.1, 36, True), (0.3, 32, True), (0.4, 24, True), (1.2, 8, True), (1.3, 8, False)],
)
def test_the_largest_ascent_batch_that_is_hidden(seconds, size, is_hidden, monkeypatch):
    found = calibrated(monkeypatch, lambda examples: seconds * examples)
    assert found[:3] == (size, is_hidden, 10.0)
    assert found.copy_seconds == 1.0
    assert len(found.ascent_seconds) <= 3
    assert found.ascent_seconds == {k: seconds * k for k in found.ascent_seconds}
    assert size in found.ascent_seconds
    assert list(found.ascent_seconds) == sorted(found.ascent_seconds)


def test_few_sizes_are_tried(monkeypatch):
    found = calibrated(monkeypatch, lambda examples: examples / 50, size=2000, multiple=4)
    assert found.size == 500
    assert len(found.ascent_seconds) <= 9


def squares(params, batch):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


GRADIENT, ARGUMENT = jax.grad(squares), r"`grad_fn\(params, batch\)`"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"multiple": 0}, ValueError, "`multiple` must be at least 1, got 0"),
        ({"repeats": 0.5}, TypeError, "`repeats` must be a Python int, got 0.5"),
        ({"y": np.ones(3)}, ValueError, r"every leaf of `batch`.*\(4, 2\).*\(3,\)"),
        ({"y": np.ones(())}, ValueError, r"every leaf of `batch`.*same leading axis.*\(\)"),
        (
            {"y": jax.ShapeDtypeStruct((4,), float)},
            TypeError,
            r"`batch`\['y'\] must be an array, got a ShapeDtypeStruct",
        ),
        (
            {"x": np.ones((0, 2)), "y": np.ones(0)},
            ValueError,
            r"`batch` must hold at least one example.*\(0, 2\)",
        ),
        ({"w": np.ones(2, int)}, ValueError, "`params` must have a floating leaf.*int64"),
        (
            {"grad_fn": jax.value_and_grad(squares)},
            ValueError,
            f"{ARGUMENT} must have the structure of `params`",
        ),
        ({"grad_fn": squares}, ValueError, f"{ARGUMENT} must have the structure of `params`"),
        (
            {"grad_fn": jax.vmap(GRADIENT, (None, 0))},
            ValueError,
            rf"{ARGUMENT}\['w'\] must have the shape of `params`, \(2,\), got \(4, 2\)",
        ),
    ],
)
def test_calibration_refuses_what_it_cannot_measure(changes, error, message):
    device = jax.devices()[0]
    arguments = {"x": np.ones((4, 2)), "y": np.ones(4), "w": np.ones(2), "grad_fn": GRADIENT}
    arguments |= {"descent_device": device, "ascent_device": device} | changes
    batch, params = ({k: arguments.pop(k) for k in keys} for keys in ("xy", "w"))
    with pytest.raises(error, match=message):
        calibrate_ascent_batch(params=params, batch=batch, **arguments)
