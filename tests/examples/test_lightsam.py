"""The LightSAM example: what it writes, and which methods reduce the gradient norm."""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samx
from examples.claims import lightsam

LIGHT = ("lightsam_norm", "lightsam_adagrad", "lightsam_adam")


def settings(**changes):
    return argparse.Namespace(**{"steps": 4, "points": 2, "batch_size": None, "l2": 1e-3} | changes)


def test_a_tiny_run(in_empty_folder, capsys, read_report):
    arguments = "--steps 12 --points 3 --batch-size 50 --out results"
    results = lightsam.main(arguments.split())
    report = read_report(in_empty_folder / "results")
    assert report["results"] == results
    assert report["settings"] == {"steps": 12, "points": 3, "batch_size": 50, "l2": 1e-3}
    assert (in_empty_folder / "results" / "lightsam.png").stat().st_size > 10_000
    assert [result["method"] for result in results] == [*LIGHT, "sam + sgd"]

    values = [0.01, 1, 100]
    printed = capsys.readouterr().out
    for result in results:
        points = result["points"]
        found = [(point["learning_rate"], point["rho"]) for point in points]
        np.testing.assert_allclose(found, [(lr, rho) for lr in values for rho in values])
        assert result["fell"] + result["not_fell"] == len(points) == 9
        assert result["fell"] == sum(point["fell"] for point in points)
        assert result["diverged"] == sum(point["diverged"] for point in points)
        ratios = [point["norm_last_tenth"] / point["norm_at_start"] for point in points]
        np.testing.assert_allclose(result["largest_last_to_start"], max(ratios))
        for point in points:  # over all images, so the same for all batch sizes
            np.testing.assert_allclose(point["loss_at_start"], np.log(10), rtol=1e-5)
            np.testing.assert_allclose(point["norm_at_start"], 0.4444, rtol=1e-3)
        line = next(line for line in printed.splitlines() if line.startswith(result["method"]))
        counts = line.removeprefix(result["method"]).split()[:3]
        assert counts == [str(result[key]) for key in ("fell", "not_fell", "diverged")]
    for text in ("device:", "12 steps with 50 random images", "fell: the", "diverged: not", ".png"):
        assert text in printed


@pytest.mark.slow
def test_light_norm_falls_at_all_corners_of_the_grid_and_sam_does_not():
    """With a learning rate of 100, SAM's steps never get shorter."""
    curves = {
        name: lightsam.train(name, settings(steps=1000), lambda steps: None)
        for name in ("lightsam_norm", "sam + sgd")
    }
    judged = {name: lightsam.judge(curve) for name, curve in curves.items()}
    light, sam = judged["lightsam_norm"], judged["sam + sgd"]
    np.testing.assert_array_equal(light["fell"], [True] * 4)
    np.testing.assert_array_equal(light["diverged"], [False] * 4)
    np.testing.assert_array_equal(sam["fell"], [True, True, False, False])
    np.testing.assert_array_equal(sam["diverged"], [False, False, True, True])
    assert (sam["norm_last_tenth"] > 2 * sam["norm_at_start"])[2:].all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "make", "batch_size"),
    [
        ("lightsam_norm", samx.lightsam_norm, None),
        ("sam + sgd", lambda eta, rho: optax.chain(samx.sam(rho), optax.sgd(eta)), 20),
    ],
)
def test_each_grid_point_is_the_plain_loop(name, make, batch_size, monkeypatch):
    """Rho and learning rate are not swapped, and the norms of all steps are over all images."""
    monkeypatch.setattr(lightsam, "CHUNK", 2)  # the last chunk is shorter
    monkeypatch.setattr(lightsam, "LOW", -1)
    monkeypatch.setattr(lightsam, "HIGH", 0)
    taken = []
    args = settings(batch_size=batch_size)
    curves = lightsam.train(name, args, taken.append)
    assert sum(taken) == args.steps
    assert curves.norm.shape == curves.loss.shape == (4, args.steps + 1)
    data = lightsam.load()
    learning_rates, rhos = lightsam.grid(2)
    np.testing.assert_allclose(learning_rates, [0.1, 0.1, 1, 1])
    np.testing.assert_allclose(rhos, [0.1, 1, 0.1, 1])
    point = 2

    def whole(w):
        return lightsam.loss_of(w, data, args.l2)

    tx = make(learning_rates[point], rhos[point])

    @jax.jit
    def step(w, state, batch):
        def value_fn(w):
            return lightsam.loss_of(w, batch, args.l2)

        updates, state = tx.update(jax.grad(value_fn)(w), state, w, value_fn=value_fn)
        return optax.apply_updates(w, updates), state

    w = jnp.zeros((64, 10))
    state = tx.init(w)
    for index in range(args.steps + 1):
        norm = jnp.linalg.norm(jax.grad(whole)(w))
        np.testing.assert_allclose(curves.norm[point, index], norm, rtol=2e-3)
        np.testing.assert_allclose(curves.loss[point, index], whole(w), rtol=2e-3)
        batch = data
        if batch_size is not None:
            key = jax.random.fold_in(jax.random.key(0), index)
            rows = jax.random.randint(key, (batch_size,), 0, len(data.x))
            batch = lightsam.Data(data.x[rows], data.y[rows])
        w, state = step(w, state, batch)


def test_what_fell_and_what_diverged():
    time = np.linspace(0, 1, 100)
    curves = {
        "down": 1 - 0.5 * time,
        "up": 1 + time,
        "level": np.ones(100),
        "a summit": np.where(time == 0, 1, 3 - 1.5 * time),  # below the first tenth only
        "a valley": np.where(time < 0.1, 0.1, 0.2) + 0.5 * (time == 0),  # below the start only
        "not a number": np.where(time == 0.0, 1, np.nan),
        "one infinite": np.where(time == time[50], np.inf, 1 - 0.5 * time),
    }
    norm = np.stack(list(curves.values()))
    judged = lightsam.judge(lightsam.Curves(norm, norm))
    fell = dict(zip(curves, judged["fell"], strict=True))
    assert [name for name, value in fell.items() if value] == ["down"]
    diverged = dict(zip(curves, judged["diverged"], strict=True))
    wanted = ["up", "a summit", "not a number", "one infinite"]
    assert [name for name, value in diverged.items() if value] == wanted
    np.testing.assert_allclose(judged["norm_first_tenth"][0], 1 - 0.5 * time[:10].mean())
    np.testing.assert_allclose(judged["norm_middle_tenth"][0], 0.75)
    np.testing.assert_allclose(judged["norm_last_tenth"][0], 1 - 0.5 * time[-10:].mean())


def test_the_numbers_of_the_claims():
    """Shares of the pairs; of those that have not fallen, the worst ratio to the middle tenth."""
    time = np.linspace(0, 1, 100)
    down, up, hill = 2 - time, 1 + time, np.where(time == 0, 1, 3 - time)
    curves = [down, down, up, hill], [down, down, hill, hill], [down, up, up, up], [up] * 4
    results = [
        lightsam.summarize(name, lightsam.Curves(np.stack(norm), np.stack(norm)), 2)
        for name, norm in zip(lightsam.METHODS, curves, strict=True)
    ]
    values = lightsam.values_of(results)
    assert values.keys() == lightsam.CLAIMS.keys()
    shares = "norm-converges", "adagrad-converges", "adam-converges", "sam-needs-tuning"
    assert [values[name] for name in shares] == [[0.5], [0.5], [0.25], [0.0]]
    [falls] = values["adagrad-still-falls"]
    assert falls == pytest.approx((3 - 0.955) / 2.5, rel=0.01)
    assert all(len(values[f"norm-level, {labels}"]) == 20 for labels in lightsam.LABELS.values())


def test_what_is_not_finite_is_told_and_drawn(tmp_path):
    norm = np.array([[1, 0.5, 0.1], [1, np.nan, np.nan], [1, np.inf, 1], [1, 0.1, 0.0]])
    result = lightsam.summarize("method", lightsam.Curves(norm, norm), 2)
    json.dumps(result, allow_nan=False)
    assert (result["fell"], result["not_fell"], result["diverged"]) == (2, 2, 2)
    assert result["largest_last_to_start"] is None
    verdict = lightsam.verdict(result)
    assert "did not fall at learning rate 0.01 (rho 100); learning rate 100 (rho 0.01)." in verdict
    lightsam.draw([result, result], 2, tmp_path / "plot.png", "title")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    calm = lightsam.summarize("method", lightsam.Curves(norm[[0] * 4], norm[[0] * 4]), 2)
    assert lightsam.verdict(calm) == "method: the gradient norm fell at all 4 grid points."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps 0", "--steps must be at least 1"),
        ("--points 1", "--points must be at least 2"),
        ("--batch-size 0", "--batch-size must be at least 1"),
        ("--l2 nan", "--l2 must be finite"),
        ("--l2 -1", "--l2 must be finite"),
        ("--out taken", "is not empty"),
    ],
)
def test_bad_arguments(arguments, message, refusal):
    assert message in refusal(lightsam.main, arguments)
