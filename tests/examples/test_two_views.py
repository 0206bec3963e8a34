"""Monge SAM's two views: halves of images, the loss, bands, and what the script writes."""

import jax.numpy as jnp
import numpy as np
import pytest

from examples.claims import two_views


def test_a_tiny_run(in_empty_folder, monkeypatch, capsys, read_report):
    methods = {name: two_views.METHODS[name] for name in ("sgd", "sam", "monge-sam")}
    monkeypatch.setattr(two_views, "METHODS", methods)
    monkeypatch.setattr(two_views, "RADII", (0.1, 1.0))
    monkeypatch.setattr(two_views, "LEARNING_RATES", (0.05,))
    results = two_views.main(["--seeds", "2", "--epochs", "1", "--out", "results"])
    assert [result["method"] for result in results] == [*methods]
    sgd, sam, monge = results
    at_zero = [result["over_rho"][0] for result in results]
    np.testing.assert_allclose(at_zero, [sgd["score"]] * 3, atol=0.5)  # radius 0 is SGD
    assert sam["over_rho"][2] != monge["over_rho"][2]
    report = read_report(in_empty_folder / "results")
    assert report["values"]["monge-sam"] == np.subtract(monge["score"], sam["score"]).tolist()
    assert (in_empty_folder / "results" / "two_views.png").stat().st_size > 10_000
    assert "pairs found, %" in capsys.readouterr().out


def test_values_are_differences_of_methods_and_bands(monkeypatch):
    """Scores are [validation and test, rates, radii, seeds]; SGD has the radius 0 only."""
    monkeypatch.setattr(two_views, "RADII", (0.1, 1.0))
    sgd, sam, monge = (
        np.tile(np.array(curve)[None, None, :, None], (2, 1, 1, 3))
        for curve in ([7.0], [7.0, 9.0, 1.0], [7.0, 9.5, 9.0])
    )
    found = two_views.values_of({"sgd": sgd, "sam": sam, "monge-sam": monge})
    assert found["monge-sam"] == pytest.approx([0.5] * 3)
    assert found["monge-sgd"] == pytest.approx([2.5] * 3)
    assert found["sam-sgd"] == pytest.approx([2.0] * 3)
    assert found["monge-band"] == pytest.approx([1.0] * 3)


def test_views_are_the_left_and_the_right_half():
    image = np.zeros((1, 8, 8))
    image[0, 3, 2], image[0, 5, 7] = 1.0, 2.0
    left, right = two_views.views_of(jnp.asarray(image.reshape(1, 64)))
    assert left.reshape(8, 4)[3, 2] == 1
    assert left.sum() == 1
    assert right.reshape(8, 4)[5, 3] == 2
    assert right.sum() == 2


def test_the_loss_is_that_of_both_directions():
    cosines = jnp.array([[0.9, 0.1], [0.3, 0.2]])
    rows, columns = (
        -np.mean([np.log(np.exp(10 * m[i, i]) / np.exp(10 * m[i]).sum()) for i in range(2)])
        for m in (np.asarray(cosines), np.asarray(cosines).T)
    )
    assert two_views.contrastive(cosines) == pytest.approx((rows + columns) / 2, rel=1e-5)
    assert two_views.found_share(cosines) == 0.5


@pytest.mark.parametrize(
    ("curve", "low", "high"),
    [
        ([9, 9.5, 8.5, 1, 9], 0, 2),  # what comes after a failure does not count
        ([1, 9, 9, 9, 9], 1, 4),
        ([1, 2, 9, 2, 1], 2, 2),
    ],
)
def test_a_band_ends_at_the_first_failure(monkeypatch, curve, low, high):
    radii = (0.01, 0.1, 1.0, 2.0, 5.0)
    monkeypatch.setattr(two_views, "RADII", radii)
    [width] = two_views.band(np.array([[0.0], *([score] for score in curve)]))
    assert width == pytest.approx(np.log10(radii[high] / radii[low]))
