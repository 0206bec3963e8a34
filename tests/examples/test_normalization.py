"""The claims on normalization layers: which leaves are perturbed, and the numbers of a claim."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.claims import arms, normalization
from examples.common import digits_task, training
from examples.common.registry import Setting
from examples.common.tuning import fixed
from samx.perturbations import is_normalization


def test_a_tiny_run(in_empty_folder, monkeypatch, capsys, read_report):
    """SAM-ON is trained; the other arms get its results."""

    def train_one(arms, args, noises, **others):
        if not kept:
            kept.extend(train({"sam-on": arms["sam-on"]}, args, noises, **others))
        return [kept[0] | {"row": name} for name in arms]

    def cheap(f, params, radius):
        loss = f(params)
        return {"top_eigenvalue": loss, "top_eigenvalue_error": loss, "rise": loss}

    def grid_of_one(args, arm, learning_rate):
        assert learning_rate == np.float32(0.1)
        return on_grid(args, "sam-on", learning_rate)

    kept = []
    train, on_grid = normalization.train_arms, normalization.train_on_grid
    monkeypatch.setattr(normalization, "train_arms", train_one)
    monkeypatch.setattr(normalization, "train_on_grid", grid_of_one)
    monkeypatch.setattr(normalization, "RADII", (0.5, 5.0))
    monkeypatch.setattr(arms, "axes_of", lambda *of: [fixed([0.1]), fixed([0.5])])
    monkeypatch.setattr(training, "SEARCH_SEEDS", range(1000, 1001))
    monkeypatch.setattr(training.monitoring, "measure", cheap)
    arguments = ["--seeds", "2", "--epochs", "2", "--width", "8", "--out", "results"]
    found = normalization.main(arguments)
    assert [one.name for one in found] == [*normalization.CLAIMS]
    report = read_report(in_empty_folder / "results")
    assert [row["row"] for row in report["rows"]] == [*normalization.ARMS, *normalization.PLAIN]
    assert report["rows"][0]["gradients"] == 40
    assert report["values"]["on-sam"] == [0, 0]
    assert len(report["values"]["sassha-without"]) == 20
    grid = np.array(report["grid"]["sam-on"])
    np.testing.assert_allclose(grid[0], 100 * np.array(report["rows"][0]["test_accuracy"]))
    assert (grid[0] != grid[1]).any()
    assert (in_empty_folder / "results" / "normalization.png").stat().st_size > 10_000
    assert "sam + adamw" in capsys.readouterr().out


def test_the_network_has_the_normalization_that_is_told():
    params = jax.eval_shape(
        lambda: digits_task.initialize(np.array([0]), normalization.network(64))
    )
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sizes = [(is_normalization(path, leaf), leaf.size) for path, leaf in leaves]
    assert sum(size for _, size in sizes) == 9226
    assert sum(size for is_in, size in sizes if is_in) == 256


PARAMS = {
    "first": {"kernel": jnp.array([3.0, -1.0]), "bias": jnp.array([2.0])},
    "first_norm": {"scale": jnp.array([4.0, 1.0]), "bias": jnp.array([-2.0])},
}


@pytest.mark.parametrize(
    ("arm", "layer", "is_adaptive"),
    [
        ("sam-on", "first_norm", False),
        ("sam-off", "first", False),
        ("asam-on", "first_norm", True),
        ("asam-off", "first", True),
    ],
)
def test_the_perturbed_leaves(arm, layer, is_adaptive):
    """The loss is |w|² / 2, so that its gradient shows where it was taken."""

    def step(rho):
        setting = Setting(batch=None, batch_size=1, num_examples=1)
        tx = normalization.ARMS[arm].make(rho, optax.identity(), setting)
        state = tx.init(PARAMS)
        g_s, _ = tx.update(PARAMS, state, PARAMS, value_fn=lambda p: optax.tree.norm(p) ** 2 / 2)
        return optax.tree.sub(g_s, PARAMS)

    found = jax.jit(step)(0.5)
    w = np.concatenate([np.ravel(x) for x in jax.tree.leaves(PARAMS[layer])])
    moved = np.concatenate([np.ravel(x) for x in jax.tree.leaves(found[layer])])
    scale = abs(w) + 0.01 if is_adaptive else np.ones_like(w)
    np.testing.assert_allclose(moved, 0.5 * scale**2 * w / np.linalg.norm(scale * w), rtol=1e-5)
    [other] = found.keys() - {layer}
    assert all((x == 0).all() for x in jax.tree.leaves(found[other]))


def test_the_best_radius_of_each_seed(monkeypatch):
    monkeypatch.setattr(normalization, "RADII", (0.1, 1.0, 10.0))
    found = normalization.best_radius(np.array([[90.0, 90.0], [91.0, 91.0], [90.0, 91.0]]))
    np.testing.assert_allclose(found, [0, 0.5])


def test_the_numbers_are_paired_differences():
    results = [
        {
            **{"row": arm, "noise": 0.3, "test_accuracy": [0.9 + i / 100, 0.9]},
            "monitored": {"top_eigenvalue": [[5.0, 5.0], [10.0**i, 1.0]]},  # [measured, seeds]
        }
        for i, arm in enumerate([*normalization.ARMS, *normalization.PLAIN])
    ]
    flat = np.tile([[1.0], [0.0]], (4, 2))
    values = normalization.values_of(results, {"sam": flat, "sam-on": flat[::-1]})
    np.testing.assert_allclose(values["on-sam"], [1, 0], atol=1e-9)
    np.testing.assert_allclose(values["on-base"], [2, 0], atol=1e-9)
    np.testing.assert_allclose(values["on-sharper"], [1, 0], atol=1e-9)
    assert values["on-radius"][0] == pytest.approx(values["on-radius"][1])
    assert values["on-radius"][0] != 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seeds 0", "--seeds must be at least 1"),
        ("--out taken", "--out: taken is not empty"),
    ],
)
def test_bad_arguments(arguments, message, refusal):
    assert message in refusal(normalization.main, arguments)
