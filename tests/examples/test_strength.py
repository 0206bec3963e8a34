"""The script on a method's own number: slopes, the chosen value, SAM's numbers, what it writes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samx
from examples.claims import claim, strength
from examples.common import training

SEEDS = 4


def result_of(arm, accuracy=0.9, top=10.0, rise=0.1, validation=0.9):
    spread = np.linspace(0.0, 0.01, SEEDS)
    return {
        **{"row": arm, "noise": 0.3, "edges": [], "learning_rate": 0.1, "rho": 0.2},
        "gradients": 800.0,
        "test_accuracy": (accuracy + spread).tolist(),
        "train_accuracy": [0.7] * SEEDS,
        "loss_increase": [rise] * SEEDS,
        "candidates": [{"validation_accuracy": validation}, {"validation_accuracy": 0.1}],
        "monitored": {"top_eigenvalue": [[3.0] * SEEDS, [top] * SEEDS]},  # at two steps
    }


def results_of(**changed):
    """Return results of all arms; those whose names are given differ."""
    return [result_of(arm, **changed.get(arm, {})) for arm in strength.arms_of()]


def test_a_tiny_run(in_empty_folder, capsys, read_report, monkeypatch):
    """SAM and its base are trained; other arms get the results of SAM."""

    def train_some(arms, args, noises, **others):
        chosen = {name: arm for name, arm in arms.items() if name in strength.BASELINES}
        trained = train(chosen, args, noises, **others)
        return trained + [trained[0] | {"row": name} for name in arms if name not in chosen]

    def cheap(f, params, radius):
        loss = f(params)
        return {"top_eigenvalue": loss, "top_eigenvalue_error": loss, "rise": loss}

    train = strength.train_arms
    monkeypatch.setattr(strength, "train_arms", train_some)
    monkeypatch.setattr(training, "SEARCH_SEEDS", range(1000, 1001))
    monkeypatch.setattr(training.monitoring, "measure", cheap)
    training.make_functions.cache_clear()
    arguments = "--seeds 2 --epochs 1 --width 8 --rho 0.1 --out results"
    found = strength.main(arguments.split())
    training.make_functions.cache_clear()
    folder = in_empty_folder / "results"
    report = read_report(folder)
    assert [one.name for one in found] == [*strength.CLAIMS] == [*report["values"]]
    rows = {row["row"]: row for row in report["rows"]}
    assert [*rows] == [*strength.arms_of()]
    assert rows["base"]["gradients"] == 10
    assert rows["sam"]["gradients"] == 20
    assert len(set(report["values"]["gnp-flatter"])) == 2  # one number for each seed
    assert (folder / "strength.png").stat().st_size > 10_000
    monkeypatch.setattr(claim, "RESULTS", folder)
    read = claim.found_of(strength.CLAIMS, claim.read("strength"))
    assert [one.verdict for one in read] == [one.verdict for one in found]
    assert "top eig. over SAM's" in capsys.readouterr().out


def test_slopes_are_fitted_for_each_seed():
    x = np.array([0.0, 0.5, 2.0])
    lines = 1.0 + np.outer(x, [3.0, -2.0])
    np.testing.assert_allclose(strength.slopes(x, lines), [3.0, -2.0])
    bent = np.array([[0.0], [0.0], [1.0]])
    assert strength.slopes(x, bent)[0] == pytest.approx(np.polyfit(x, bent[:, 0], 1)[0])


def test_the_best_value_is_chosen_by_validation_not_by_test():
    changed = {"gsam 0.2": {"validation": 0.95}, "gsam 0.4": {"accuracy": 0.99}}
    arms = strength.Arms(results_of(**changed), 0.3)
    assert arms.best("gsam") == "gsam 0.2"
    assert strength.values_of(arms)["gsam-better"] == pytest.approx([0.0] * SEEDS)


def test_wsam_is_compared_with_its_own_sam():
    changed = {"wsam 0.5": {"accuracy": 0.8, "validation": 0.99}, "wsam 0.9": {"accuracy": 0.93}}
    changed["wsam 0.9"]["validation"] = 0.95
    values = strength.values_of(strength.Arms(results_of(**changed), 0.3))
    assert values["wsam-gamma"] == pytest.approx([13.0] * SEEDS)
    assert values["wsam-better"] == pytest.approx([3.0] * SEEDS)


def test_claims_on_flatness_read_the_last_eigenvalue_of_the_right_arms():
    changed = {
        "gsam 0.4 as sam": {"top": 1.0, "rise": 0.01},
        "cr-sam": {"top": 100.0},
        "x-sam along v": {"top": 1000.0},
        "base as sam": {"top": 100.0},
        "msam 20 as sam": {"top": 1.0},
        "msam 2": {"accuracy": 0.95},
    }
    values = strength.values_of(strength.Arms(results_of(**changed), 0.3))
    assert values["gsam-flatter"] == pytest.approx([-1.0] * SEEDS)
    assert values["gsam-gap"][0] < 0
    assert values["cr-sam-flatter"] == pytest.approx([1.0] * SEEDS)
    assert values["cr-sam-flatter-same"] == pytest.approx([0.0] * SEEDS)
    assert values["x-sam-sign"] == pytest.approx([-2.0] * SEEDS)
    assert values["gnp-flatter"][0] < 0 < values["msam-flatter"][0]
    assert values["msam-slope"][0] > 0  # SAM with groups of 50 is the best


def test_an_arm_as_sam_follows_its_own_search_and_gets_sams_numbers():
    arms = strength.arms_of()
    assert next(iter(arms)) == "sam"
    names = [*arms]
    assert names[names.index("gsam 0.4") + 1] == "gsam 0.4 as sam"
    assert arms["gsam 0.4"] is arms["gsam 0.4 as sam"]  # its program is compiled once

    def axes(name):
        sam = {"learning_rate": 0.3, "rho": 0.7}
        return strength.like_sam(sam, "momentum", None, name, arms[name])

    assert [axis.values for axis in axes("gsam 0.4 as sam")] == [(0.3,), (0.7,)]
    assert [axis.values for axis in axes("base as sam")] == [(0.3,), (0.0,)]
    assert all(len(axis.values) > 3 for axis in axes("gsam 0.4"))


def update_of(make, loss, w, **extra):
    tx = make(0.1, optax.identity(), None)
    value, g = jax.value_and_grad(loss)(w)
    return tx.update(g, tx.init(w), w, value_fn=loss, value=value, **extra)[0]


def test_the_part_along_the_eigenvector_is_turned(monkeypatch):
    """A quadratic with its largest eigenvalue along the first axis."""

    def step(make):
        tx = make(0.1, optax.identity(), None)
        w, state = jnp.array([0.3, -2.0]), None
        state = tx.init(w)

        def loss(w):
            return 5 * w[0] ** 2 + w[1] ** 2 / 2

        update = jax.jit(lambda state: tx.update(jax.grad(loss)(w), state, w, value_fn=loss))
        for _ in range(2):
            u, state = update(state)
        return np.asarray(u)

    x_sam = samx.x_sam
    monkeypatch.setattr(samx, "x_sam", lambda rho, alpha: x_sam(rho, alpha, every=1, iterations=9))
    straight, less = step(strength.turned_x_sam(0.0)), step(strength.turned_x_sam(0.2))
    assert np.linalg.norm(straight) == pytest.approx(1)
    np.testing.assert_allclose(less, straight * [0.8, 1.0], rtol=1e-5)


def test_bisam_climbs_the_chosen_bound_and_descends_with_smoothed_labels():
    x, y = jnp.eye(3), jnp.arange(3)
    batch, w = {"x": x, "y": y}, jnp.diag(jnp.arange(3.0)) + 0.1
    parts = {"batch": batch, "features_fn": lambda w, batch: batch["x"]}
    parts |= {"head_fn": lambda w, x: x @ w, "ascent_fn": None}

    def loss(w, smoothing=0.0):
        labels = optax.smooth_labels(jax.nn.one_hot(y, 3), smoothing)
        return optax.softmax_cross_entropy(x @ w, labels).mean()

    def expected(climbed, descended):
        q = jax.grad(climbed)(w)
        return jax.grad(descended)(w + 0.1 * q / jnp.linalg.norm(q))

    def bound(w):
        return samx.losses.tanh_lower_bound(x @ w, y).mean()

    def smoothed(w):
        return loss(w, 0.1)

    tanh = strength.with_losses(samx.bisam, samx.losses.tanh_lower_bound)
    np.testing.assert_allclose(update_of(tanh, loss, w, **parts), expected(bound, loss), rtol=1e-4)
    sam = strength.with_losses(samx.sam, smoothing=0.1)
    found = update_of(sam, loss, w, **parts)
    np.testing.assert_allclose(found, expected(smoothed, smoothed), rtol=1e-4)
