"""SAM with wrong labels: what the script writes, and its gains."""

import numpy as np
import pytest

from examples.claims import arms, wrong_labels
from examples.common import tuning


def test_a_tiny_run(in_empty_folder, monkeypatch, capsys, read_report):
    monkeypatch.setattr(wrong_labels, "NOISES", (0.2, 0.4))
    monkeypatch.setattr(wrong_labels, "ASCENT_STEPS", (2,))
    monkeypatch.setattr(arms, "axes_of", lambda *of: [tuning.fixed([0.1]), tuning.fixed([0.1])])
    results = wrong_labels.main(
        ["--seeds", "2", "--epochs", "1", "--width", "8", "--out", "results"]
    )
    rows = [(result["row"], result["noise"]) for result in results]
    assert rows == [("sgd", 0.2), ("sgd", 0.4), ("sam", 0.2), ("sam", 0.4), ("2 steps", 0.4)]
    assert [result["gradients"] for result in results[::2]] == [10, 20, 30]
    report = read_report(in_empty_folder / "results")
    gain = np.subtract(results[3]["test_accuracy"], results[1]["test_accuracy"])
    np.testing.assert_allclose(report["values"]["gain-40%"], 100 * gain, atol=1e-3)
    assert (in_empty_folder / "results" / "wrong_labels.png").stat().st_size > 10_000
    assert "40% 2 steps" in capsys.readouterr().out


def test_the_slope_is_in_points_for_each_tenth_of_wrong_labels(monkeypatch):
    monkeypatch.setattr(wrong_labels, "ASCENT_STEPS", ())
    gains = {0.2: [0.02, 0.0], 0.4: [0.06, 0.0], 0.6: [0.10, 0.01], 0.8: [0.5, 0.5]}
    results = [
        {"row": row, "noise": noise, "test_accuracy": 0.5 + np.array(gain) * (row == "sam")}
        for noise, gain in gains.items()
        for row in ("sgd", "sam")
    ]
    found = wrong_labels.values_of(results)
    assert found["gain-60%"] == pytest.approx([10.0, 1.0])
    assert found["gain-grows"] == pytest.approx([2.0, 0.25])
