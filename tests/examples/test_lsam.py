"""The map of LSAM: its settings, the variance of the workers, and what is reported."""

import jax.numpy as jnp
import numpy as np
import pytest

from examples.claims import claim, lsam, lsam_digits
from examples.common.tuning import Runs, runs_of


def of_biases(params, images, deviation):
    """Stand in for the rises of the loss."""
    del images
    return np.square(params["head"]["bias"].get_value()).sum(), deviation


def test_a_tiny_run(in_empty_folder, monkeypatch, capsys, read_report):
    """One place, and one candidate for each row: nothing is tuned."""
    place = (2, 50, "short")
    for name, value in {
        **{"WORKERS": (2,), "BATCHES": (50,), "MANY": 2, "LARGE": 50, "PLACES": [place]},
        **{"RADII": (0.1,), "PERIODS": (2, 4), "RATES": (0.1, 0.2)},
    }.items():
        monkeypatch.setattr(lsam, name, value)
    monkeypatch.setattr(lsam_digits, "LEARNING_RATES", (0.3,))
    monkeypatch.setattr(lsam, "rises", lambda width: of_biases)  # the real ones compile for long
    arguments = "--seeds 2 --gradients 64 --width 8 --out results"
    found = lsam.main(arguments.split())
    assert {one.name for one in found} == set(lsam.CLAIMS)
    report = read_report(in_empty_folder / "results")
    values, rows = report["values"], {row["row"]: row for row in report["results"]}
    assert set(rows) == {"lsam", "dp-sam", "dp-sam, same time"}
    assert rows["lsam"]["gradients"] == rows["dp-sam"]["gradients"] == 64
    difference = np.subtract(rows["lsam"]["test_accuracy"], rows["dp-sam"]["test_accuracy"])
    np.testing.assert_allclose(values[f"gradients, {lsam.told(place)}"], 100 * difference)
    spread = report["spread"]
    assert {name: np.shape(each) for name, each in spread.items()} == {
        "rate": (2, 2),
        "period": (2, 2),
        "weight": (2, 2),
    }
    assert spread["rate"][0] == spread["period"][1] == spread["weight"][1]  # η .1, τ 4, β .9
    assert len(np.unique(np.concatenate([*spread.values()]))) == 2 * 4
    deviation = np.sqrt(spread["rate"][0])
    np.testing.assert_allclose(values["mean rise"], np.log10(deviation / deviation), atol=1e-6)
    assert np.isfinite(values["largest rise"]).all()
    assert (in_empty_folder / "results" / "lsam.json").exists()
    assert (in_empty_folder / "results" / "lsam.png").stat().st_size > 20_000
    printed = capsys.readouterr().out
    assert "of our reconstruction" in printed


def test_a_place_sets_the_clock():
    args = lsam.parse(["--gradients", "800", "--seeds", "3"])
    found = lsam.settings_of((4, 25, "long"), args, period=8, beta=0.3)
    assert (found.workers, found.batch, found.period, found.beta) == (4, 25, 8, 0.3)
    assert (found.slow, found.latency) == lsam.DELAYS["long"]
    assert (found.gradients, found.seeds, found.rho) == (768, 3, lsam.RADII)


def test_the_variance_is_that_of_a_coordinate():
    """Two runs; two workers; three coordinates in two leaves."""
    center = {"a": jnp.zeros((2, 2)), "b": jnp.ones((2, 1))}
    workers = [
        {"a": jnp.array([[1.0, 2.0], [0.0, 0.0]]), "b": jnp.array([[1.0], [4.0]])},
        {"a": jnp.array([[0.0, 0.0], [0.0, 3.0]]), "b": jnp.array([[2.0], [1.0]])},
    ]
    np.testing.assert_allclose(lsam.variance(center, workers), [(5 + 1) / 6, (9 + 9) / 6])


def test_powers_are_fitted_for_each_seed():
    def power(knob, exponents):
        return [[value**exponent for exponent in exponents] for value in knob]

    spread = {
        "rate": power(lsam.RATES, (2, 1)),
        "period": power(lsam.PERIODS, (1, 0)),
        "weight": power(lsam.BETAS, (-1, -2)),
    }
    values = lsam.powers_of(spread)
    np.testing.assert_allclose(values["variance over rate"], [2, 1])
    np.testing.assert_allclose(values["variance over period"], [1, 0], atol=1e-9)
    np.testing.assert_allclose(values["variance over weight"], [-1, -2])
    formula = 0.1 * 4 / (0.9 / 8)
    np.testing.assert_allclose(values["variance"], np.log10([0.01 / formula, 0.1 / formula]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seeds 0", "--seeds must be at least 1"),
        ("--gradients 100", "--gradients must be at least 128"),
        ("--out taken", "--out: taken is not empty"),
    ],
)
def test_bad_arguments(arguments, message, refusal):
    assert message in refusal(lsam.main, arguments)


@pytest.mark.slow
def test_rises_of_a_point():
    """At noise of deviation 0 nothing rises; a ball holds more than a mean over noise."""
    args = lsam.parse(["--seeds", "2", "--width", "8", "--gradients", "128"])
    settings = lsam.settings_of((2, 50, "short"), args)
    runs = Runs(*runs_of(range(2), [(0.1, 0.1)]))
    params = lsam_digits.load(runs, settings)[1]
    largest, mean = lsam.rises_of(params, runs, settings, np.array([0.0, 0.01]))
    assert mean[0] == pytest.approx(0, abs=1e-6)
    assert mean[1] != 0
    assert (largest > abs(mean)).all()


def test_committed_numbers_are_those_of_the_claims():
    assert set(claim.read(lsam.NAME)) == set(lsam.CLAIMS)
