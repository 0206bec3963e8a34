"""The LETS example: which images are seen, and whether the report matches the run."""

import argparse
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.claims import lets
from examples.common import digits_task
from examples.common.tuning import runs_of

SMALL = argparse.Namespace(width=8, epochs=1, noise=0.3, base="momentum", asam=False)


def test_every_image_has_one_part():
    data = lets.split(jnp.arange(6), 0.3)
    counts = [part["x"].shape[1] for part in data]
    assert counts == [900, 100, 297, 500]
    images, labels = digits_task.load_digits()
    images = [image.tobytes() for image in np.float32(images / 16)]
    label_of = dict(zip(images, labels, strict=True))
    for seed in range(2):
        own = [{name: np.asarray(leaf[seed]) for name, leaf in part.items()} for part in data]
        parts = [[image.tobytes() for image in part["x"]] for part in own]
        assert sorted(image for part in parts for image in part) == sorted(images)
        true = [np.array([label_of[image] for image in part]) for part in parts]
        wrong = [np.sum(labels != part["y"]) for labels, part in zip(true, own, strict=True)]
        assert wrong == [270, 30, 0, 0]


def test_batches_are_whole_epochs_and_fresh_draws():
    first, second = (jax.tree.map(np.asarray, lets.batches(0, epoch)) for epoch in (0, 1))
    assert first.batch.shape == (9, 100)
    assert first.held_out.shape == (9, 50)
    np.testing.assert_array_equal(np.sort(first.batch, axis=None), np.arange(900))
    np.testing.assert_array_equal(first.following[:-1], first.batch[1:])
    np.testing.assert_array_equal(first.following[-1], first.batch[0])
    assert (first.batch != second.batch).any()
    draws = {tuple(sorted(rows)) for rows in (*first.held_out, *second.held_out)}
    assert len(draws) == 18
    assert all(len(set(rows)) == 50 and max(rows) < 100 for rows in draws)


def run_epoch(method, *rates):
    """Train the first epoch of three seeds with each rate."""
    runs = lets.Runs(*runs_of(range(3, 6), [(0.3, 0.2, rate) for rate in rates]))
    trainer = lets.make_trainer(method, SMALL)
    data, params = lets.split(runs.seed, 0.3), digits_task.initialize(runs.seed, SMALL.width)
    state = trainer.init(runs, params)
    return data, *trainer.epoch(params, state, runs, data, 0)


@jax.jit
@jax.vmap
def at_the_end(params, data, rows, held_out_rows):
    """Return the gap on some rows, the gap on the whole parts, and the accuracies."""
    loss, accuracy = lets.make_losses(SMALL.width)
    held_out = digits_task.rows_of(data.held_out, held_out_rows)
    return (
        loss(params, held_out) - loss(params, digits_task.rows_of(data.train, rows)),
        loss(params, data.held_out) - loss(params, data.train),
        accuracy(params, data.validation),
        accuracy(params, data.test),
    )


@pytest.mark.slow
def test_an_epoch_of_lets():
    """Rate 0 is SAM. With other rates rho moves, and the gap is measured on the right batches."""
    _, sam_params, _, sam_seen = run_epoch("sam", 0.0, 0.0)
    epochs = [lets.batches(seed, 0) for seed in (3, 4, 5, 3, 4, 5)]
    last = jax.tree.map(lambda *rows: np.stack(rows)[:, -1], *epochs)
    for method, rate, training_rows in (
        ("diag_sq", 2e6, "batch"),
        ("exact-next", 3e3, "following"),
    ):
        data, params, state, seen = run_epoch(method, 0.0, rate)
        leaves, sam_leaves = map(jax.tree.leaves, ((params, seen), (sam_params, sam_seen)))
        for leaf, sam_leaf in zip(leaves, sam_leaves, strict=True):
            np.testing.assert_allclose(leaf[:3], sam_leaf[:3], rtol=1e-4, atol=1e-5)
        rho = np.asarray(seen.rho)
        np.testing.assert_array_equal(rho[:3], np.float32(0.2))
        assert (abs(rho[3:] / 0.2 - 1) > 0.02).all()
        told = at_the_end(params, data, getattr(last, training_rows), last.held_out)
        noted = (state.gap, seen.gap, seen.validation, seen.test)
        np.testing.assert_allclose(noted, told, rtol=1e-4, atol=1e-6)


def test_a_tiny_run(in_empty_folder, monkeypatch, capsys, read_report):
    """Every stage has the same number of runs, which saves compilation."""
    monkeypatch.setattr(lets, "TUNING_SEEDS", range(1000, 1002))
    candidates = [(1e-3, 0.1), (0.3, 0.1), (0.3, 5.0)]  # only the second one learns
    monkeypatch.setattr(lets, "start_candidates", lambda args: candidates)
    arguments = (
        "--asam --methods exact --rate 0 300 1e7 --seeds 2 --epochs 2 --width 8 --out results"
    )
    measured = lets.main(arguments.split())
    report = read_report(in_empty_folder / "results")
    assert {name: report[name] for name in measured} == measured
    wanted = {"seeds": 2, "epochs": 2, "width": 8, "rate": [0, 300, 1e7], "methods": ["exact"]}
    assert wanted.items() <= report["settings"].items()
    assert (in_empty_folder / "results" / "lets.png").stat().st_size > 20_000

    assert (measured["start"]["learning_rate"], measured["start"]["rho"]) == (0.3, 0.1)
    assert measured["start"]["edges"] == ["learning_rate", "rho"]
    found = measured["hypergradient"]
    assert found["relative_error"] < 1e-5
    np.testing.assert_allclose(found["exact"], found["differences"], rtol=1e-5)
    assert 0 < abs(found["diag_sq"]) < abs(found["exact"])
    rates = measured["rates"]
    assert [rate["rate"] for rate in rates] == [0, 300, 1e7]
    np.testing.assert_allclose(rates[0]["rho"], 0.1)
    np.testing.assert_allclose(
        rates[0]["validation_accuracy"], measured["start"]["validation_accuracy"], atol=2e-3
    )
    validation = [rate["validation_accuracy"] for rate in rates]
    assert min(validation) < max(validation)
    [chosen] = [rate for rate in rates if rate["chosen"]]
    assert chosen["validation_accuracy"] == max(validation)
    assert chosen["edges"] == ["rate"] * (chosen["rate"] in (0, 1e7) and chosen["rate"] > 0)

    results = measured["results"]
    rows = [(result["row"], result["factor"]) for result in results]
    assert rows == [(name, factor) for name in ("sam", "exact") for factor in (0.1, 1, 10)]
    for result in results:
        np.testing.assert_allclose(result["start"], 0.1 * result["factor"])
        assert result["rate"] == (chosen["rate"] if result["row"] == "exact" else 0)
        for name in ("rho", "gap", "F", "validation_accuracy", "test_accuracy"):
            assert np.shape(result[name]) == (2, 3)  # [seeds, 1 + epochs]
        np.testing.assert_allclose(np.asarray(result["rho"])[:, 0], result["start"], rtol=1e-6)
        np.testing.assert_allclose(result["F"], np.square(result["gap"]) / 2, rtol=1e-5)
        if result["row"] == "sam":
            np.testing.assert_allclose(result["rho"], result["start"], rtol=1e-6)

    printed = capsys.readouterr().out
    for text in (
        "device:",
        "relative error",
        "\nASAM tuned: learning rate 0.3*, rho 0.1*",
        "*: at an edge",
        "lets.png",
    ):
        assert text in printed
    accuracy = 100 * np.asarray(lets.of_row(results, "exact", 1.0)["test_accuracy"])[:, -1].mean()
    [line] = [line for line in printed.splitlines() if line.split()[:2] == ["exact", "0.1"]]
    assert f"{accuracy:.2f} ±" in line


def row(name, factor, rho, gap, accuracy):
    """Make a result of two seeds, from their values at the start and at the end."""
    return {
        **{"row": name, "factor": factor, "start": 0.2 * factor, "rate": 1.0},
        **{"rho": [[0.2 * factor, end] for end in rho], "F": [[0, end] for end in gap]},
        "test_accuracy": [[0.1, end] for end in accuracy],
    }


def test_what_is_told_and_drawn(tmp_path):
    results = [row("sam", f, [0.2 * f] * 2, [0.2, 0.4], [0.9, 0.8]) for f in (0.1, 1.0, 10.0)]
    results += [row("exact", f, [0.1, 0.4], [0.1, 0.2], [0.95, 0.8]) for f in (0.1, 1.0)]
    results += [row("exact", 10.0, [0.4, 1.6], [math.nan, math.nan], [0.1, 0.1])]
    lines = lets.table(results).splitlines()
    tuned, first, last = (lines[2 + index].split() for index in (1, 3, 5))
    # Columns: geometric mean sqrt(0.1 0.4), error 0.2 log(4) / 2; mean F; accuracy; difference.
    wanted = "exact 0.02 1 0.2000 ± 0.1386 0.15000 ± 0.05000 87.50 ± 7.50 +2.50 ± 2.50"
    assert " ".join(first) == wanted
    assert " ".join(tuned) == "sam 0.2 fixed 0.2000 0.30000 ± 0.10000 85.00 ± 5.00"
    assert " ".join(last).startswith("exact 2 1 0.8000 ± 0.5545 nan ± nan 10.00 ± 0.00 -75.00")
    assert lets.verdict(results, "exact") == (
        "exact: the starts, a factor of 100 apart, ended a factor of 4 apart:\n"
        "    0.02 -> 0.2, 0.2 -> 0.2, 2 -> 0.8; final F / SAM's from the same start: "
        "0.50, 0.50, nan"
    )
    rates = [{"row": "exact", "rate": 0.0, "rho": [0.2, 0.2], "chosen": True}]
    measured = {"start": {"rho": 0.2}, "rates": rates, "results": results}
    lets.draw(measured, tmp_path / "plot.png", "title")
    assert (tmp_path / "plot.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seeds 0", "--seeds must be at least 1"),
        ("--epochs 0", "--epochs must be at least 1"),
        ("--width -1", "--width must be at least 1"),
        ("--noise 1", "--noise must be in [0, 1)"),
        ("--rate 1 -1", "--rate must be finite"),
        ("--rate nan", "--rate must be finite"),
        ("--methods sam", "argument --methods: invalid choice"),
        ("--base lamb", "argument --base: invalid choice"),
        ("--out taken", "--out: taken is not empty"),
    ],
)
def test_bad_arguments(arguments, message, refusal):
    assert message in refusal(lets.main, arguments)
