"""The figure of the front page: it is drawn from committed results, and says what they say."""

import json
from pathlib import Path

import numpy as np
import pytest

from examples import digits
from examples.compare import front_figure

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def summary_of(**accuracies):
    rows = [
        {
            **{"row": row, "noise": 0.3, "gradients": 400.0, "test_accuracy": list(values)},
            **{"mean": 100 * float(np.mean(values)), "error": 0.5},
        }
        for row, values in accuracies.items()
    ]
    rows.append({**rows[0], "noise": 0.0, "mean": 99.0})
    return {"settings": {"noise": 0.3, "seeds": 3}, "rows": rows}


def test_a_tiny_run(in_empty_folder, capsys):
    """With the committed results."""
    front_figure.main([])
    assert capsys.readouterr().out == "Plot: front.png\n"
    assert 20_000 < (in_empty_folder / "front.png").stat().st_size < 200_000


def test_the_committed_results_are_those_of_every_row():
    text = front_figure.RESULTS.read_text()
    summary = json.loads(text)
    assert len(text) < 100_000
    for noise in (0.3, 0.0):
        assert {r["row"] for r in summary["rows"] if r["noise"] == noise} == {*digits.ROWS}
    for row in summary["rows"]:
        assert len(row["test_accuracy"]) == summary["settings"]["seeds"] == 20
        assert row["mean"] == pytest.approx(100 * np.mean(row["test_accuracy"]), abs=0.01)
        assert row["edges"] == []


def test_the_committed_picture_is_small():
    assert (NOTEBOOKS / "front.png").stat().st_size < 200_000


def test_what_is_stated():
    base, base2x, sam = [0.9, 0.8, 0.7], [0.7, 0.7, 0.7], [0.92, 0.81, 0.73]
    summary = summary_of(base=base, base2x=base2x, sam=sam, looksam=[0.9, 0.7, 0.8])
    rows = front_figure.rows_of(summary)
    assert [row["row"] for row in rows] == ["base", "base2x", "sam", "looksam"]
    text = front_figure.claim(rows)
    assert text == "1 of 2 methods beat the base: SAM by 2.0 ± 0.6 points"
    names = front_figure.named(rows)
    assert sorted(names) == ["base", "base2x", "looksam", "sam"]


def test_dots_of_equal_cost_stand_side_by_side():
    rows = [{"row": str(i), "gradients": 800.0 + i, "mean": -i} for i in range(4)]
    rows.append({"row": "cheap", "gradients": 400.0, "mean": 90.0})
    places = front_figure.side_by_side(rows)
    assert places.pop("cheap") == 400
    found = [round((places[str(i)] - 801.5) / (803 * front_figure.STEP)) for i in range(4)]
    assert found == [-1, 0, 1, -1]


def test_the_paths_end_where_the_title_says():
    plain, sam, eps, sharp = front_figure.paths()
    assert np.hypot(*(plain[-1] - sharp)) < 0.05
    assert np.hypot(*(sam[-1] - np.array(front_figure.FLAT))) < 0.5
    np.testing.assert_allclose(np.hypot(*eps.T), front_figure.RHO, rtol=1e-4)
    told = front_figure.ends(plain[-1], sam[-1], sharp)
    assert told == "Gradient descent ends in the sharp minimum, SAM in the flat one"
    told = front_figure.ends(sam[-1], plain[-1], sharp)
    assert told == "Gradient descent ends in the flat minimum, SAM in the sharp one"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "no summary of digits.py with base and base2x"),
        ('{"settings": {"noise": 0}, "rows": []}', "no summary of digits.py"),
        ("no JSON", "is not JSON"),
        (None, "No such file"),
    ],
)
def test_bad_results_are_refused(content, message, in_empty_folder, capsys):
    if content is not None:
        (in_empty_folder / "given.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        front_figure.main(["--results", "given.json"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (in_empty_folder / "front.png").exists()


def test_a_figure_that_cannot_be_written_is_one_line(in_empty_folder):
    with pytest.raises(SystemExit, match=r"cannot be written \(No such file"):
        front_figure.main(["--out", "missing/front.png"])
