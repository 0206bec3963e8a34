"""The bSAM example: what it writes, and its measures of probabilities by hand."""

import numpy as np
import pytest

from examples.claims import bsam


def test_a_tiny_run(in_empty_folder, capsys, read_report, monkeypatch):
    monkeypatch.setattr(bsam, "TRAININGS", ("sgd2x", "bsam"))
    monkeypatch.setattr(bsam, "axes_of", lambda name: [bsam.around(0.1)._replace(reach=0)] * 2)
    arguments = "--seeds 2 --epochs 1 --draws 2 --width 8 --out results"
    results = bsam.main(arguments.split())
    report = read_report(in_empty_folder / "results")
    assert report["results"] == results
    assert [r["row"] for r in results] == ["sgd2x", "bsam", "bsam draws"] * 2
    assert [r["noise"] for r in results] == [0.3] * 3 + [0.0] * 3
    assert {r["gradients"] for r in results} == {20}
    assert all(len(r[metric]) == 2 for r in results for metric in bsam.METRICS)
    mean, drawn = results[1:3]
    assert mean["nll"] != drawn["nll"]
    [first, *_] = [row for row in report["claims"] if row["name"].startswith("nll, bsam draws")]
    assert first["number"][0] == pytest.approx(np.mean(drawn["nll"]) - np.mean(mean["nll"]))
    assert report["claims"][0]["verdict"] == "not testable here"  # SAM was not trained
    assert (in_empty_folder / "results" / "bsam.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    for text in ("30% of the training labels wrong, 2 seeds", "bsam draws", "clean labels"):
        assert text in printed


def test_measures_by_hand():
    """Confidences .9, .8 and .6; the first and the last are right."""
    probabilities = np.array([[[0.1, 0.9], [0.8, 0.2], [0.4, 0.6]]])
    labels = np.array([[1, 1, 1]])
    assert bsam.accuracy(probabilities, labels) == pytest.approx([2 / 3])
    assert bsam.nll(probabilities, labels) == pytest.approx([-np.log(0.9 * 0.2 * 0.6) / 3])
    assert bsam.ece(probabilities, labels) == pytest.approx([(0.1 + 0.8 + 0.4) / 3])


def test_a_calibrated_bin_has_no_error():
    """Four predictions with confidence .75, of which three are right; 1.0 is in the last bin."""
    probabilities = np.array([[[0.75, 0.25]] * 4 + [[1.0, 0.0]]])
    labels = np.array([[0, 0, 0, 1, 0]])
    assert bsam.ece(probabilities, labels) == pytest.approx([0.0])
    counts, confidence, hits = bsam.bins_of(probabilities, labels)
    assert counts[-1] == 1
    assert confidence[-1] == hits[-1] == 1
