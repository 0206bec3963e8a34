"""The second-order example: what it writes, and how it computes its numbers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samx
from examples.claims import second_order
from examples.common.registry import Setting
from samx import policies


def test_a_tiny_run(in_empty_folder, capsys, read_report):
    arguments = "--variants looksam arsam --seeds 2 --epochs 6 --width 4 --out results"
    results = second_order.main(arguments.split())
    assert read_report(in_empty_folder / "results")["results"] == results
    assert (in_empty_folder / "results" / "second_order.png").stat().st_size > 10_000
    rows = {result["row"]: result for result in results}
    assert list(rows) == ["base", "sam", "looksam", "arsam"]

    # Of 60 steps, arsam takes the 50 of its warm-up, and none in the window that starts there.
    sharp = {
        "base": [0.0] * 6,
        "sam": [1.0] * 6,
        "looksam": [1 / 5] * 6,
        "arsam": [1.0] * 5 + [0.0],
    }
    for name, row in rows.items():
        np.testing.assert_allclose(row["sharp_fraction_by_epoch"], sharp[name])
        np.testing.assert_allclose(row["gradients_per_step"], 1 + np.mean(sharp[name]), rtol=1e-6)
        assert len(row["test_accuracy"]) == len(row["seconds"]) == 2
        assert all(0 < ratio < np.inf for ratio in row["time_to_plain"] + row["time_to_sam"])
        has_ratio = [share > 0 and name != "base" for share in sharp[name]]
        assert [ratio is not None for ratio in row["ratio_by_epoch"]] == has_ratio
        assert all(0 < ratio < 10 for ratio in row["ratio_by_epoch"] if ratio is not None)
    assert rows["base"]["time_to_plain"] == rows["sam"]["time_to_sam"] == [1, 1, 1]
    np.testing.assert_allclose(  # equal while both take all steps
        rows["arsam"]["ratio_by_epoch"][:5], rows["sam"]["ratio_by_epoch"][:5], rtol=1e-3
    )
    printed = capsys.readouterr().out
    for text in ("device:", "speed-up", "claims about 40%", "In this run", "results.json", *rows):
        assert text in printed


@pytest.mark.parametrize("name", ["sam", "looksam", "rst", "ae-sam"])
def test_the_ratio_is_that_of_the_second_order_part(name):
    """It follows from the readings of any variant that climbs the gradient; arsam measures it."""
    w = jnp.array([1.0, -2.0, 0.5])

    def loss(w):
        return jnp.sum(jnp.cosh(w * jnp.array([1.0, 0.3, 3.0])))

    def after_one_step(tx):
        return tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)[1]

    variant = second_order.with_all_readings(name)
    state = after_one_step(variant.make(0.3, optax.sgd(0.1), Setting(w, 1, 1)))
    arsam = after_one_step(samx.arsam(0.3, policy=policies.every(1)))
    ratio, is_sharp = second_order.seen(state)
    if is_sharp:
        np.testing.assert_allclose(ratio, arsam.part_ratio, rtol=1e-4)
    assert bool(is_sharp) or name == "rst"


@pytest.mark.parametrize(
    ("growth", "word"),
    [
        ((0.1, 0.2, 0.15), "grew"),
        ((-0.1, -0.2, -0.15), "fell"),
        ((-0.2, 0.2, 0.01), "did not clearly change"),
        ((0.2,), "did not clearly change"),
    ],
)
def test_the_verdict_says_what_was_seen(growth, word):
    epochs = np.linspace(0, 1, 10)
    ratio = 0.5 + np.asarray(growth)[:, None] * (epochs > 0.5)
    assert f"gradient {word}: from 0.500" in second_order.verdict(ratio)


def test_fifths_pass_over_epochs_without_sharp_steps():
    nan = np.nan
    ratio = np.array([[1, nan, 5, 5, 2, 4, 5, 5, nan, nan], [3, 5, 5, 5, 2, 2, 5, 5, 6, nan]])
    fifths = second_order.fifths(ratio)
    np.testing.assert_allclose(fifths, [[1, 3, nan], [4, 2, 6]])
    assert second_order.mean_over_seeds(fifths) == [2.5, 2.5, 6]
    assert second_order.mean_over_seeds(np.full((2, 1), nan)) == [None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seeds 0", "--seeds must be at least 1, got 0"),
        ("--epochs -1", "--epochs must be at least 1, got -1"),
        ("--width 0", "--width must be at least 1, got 0"),
        ("--noise 1", r"--noise must be in \[0, 1\), got 1.0"),
        ("--rho nan", "--rho must be finite and at least 0, got nan"),
        ("--learning-rate 0", "--learning-rate must be finite and above 0, got 0.0"),
        ("--variants sam sammy", "sammy.*choose from.*sampa"),
        ("--out taken", "taken.*not empty"),
    ],
)
def test_bad_arguments(arguments, message, refusal):
    assert re.search(message, refusal(second_order.main, arguments))
