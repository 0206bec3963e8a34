"""The figure of the front page: it is drawn from committed results, and says what they say."""

import json
from pathlib import Path

import numpy as np
import pytest
from fake_cells import fake_cell, fake_tasks, write_cells

from examples import digits
from examples.compare import front_figure, tables
from examples.compare.cells import as_cell
from examples.compare.options import RESULTS

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
DIGITS = RESULTS.parent / "digits.json"  # of the page of digits.py


def task_of(**accuracies):
    """Return the cells of a task by row, and their summaries."""
    found = [fake_cell("one", row.replace("_", "-"), values) for row, values in accuracies.items()]
    task = {cell["row"]: as_cell(cell, "one", cell["row"]) for cell in found}
    return task, tables.summarize(task)


def test_a_tiny_run(in_empty_folder, capsys):
    """With made-up results."""
    write_cells(in_empty_folder / "cells", fake_tasks(["digits-noisy"]))
    front_figure.main(["--results", "cells"])
    assert capsys.readouterr().out == "Plot: front.png\n"
    assert 20_000 < (in_empty_folder / "front.png").stat().st_size < 200_000


def test_the_committed_results_are_those_of_every_row():
    text = DIGITS.read_text()
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
    _, rows = task_of(base=base, base2x=base2x, sam=sam, looksam=[0.9, 0.7, 0.8])
    text = front_figure.claim(rows)
    assert text == "At equal gradients 1 of 2 methods beat the base: SAM by 2.0 points"
    assert sorted(front_figure.named(rows)) == ["base", "base2x", "looksam", "sam"]
    _, rows = task_of(base=base, gsam=[0.93, 0.83, 0.74], sam=sam)
    assert front_figure.claim(rows).endswith("SAM by 2.0 points, gsam by 3.3 points")


def test_dots_of_equal_cost_stand_side_by_side():
    costs = {str(i): 2.0 + i / 400 for i in (3, 2, 0, 1)} | {"cheap": 1.0}
    places = front_figure.side_by_side(costs)
    assert places.pop("cheap") == 1
    middle = 2 + 1.5 / 400
    found = {row: round((x / middle - 1) / front_figure.STEP) for row, x in places.items()}
    assert found == {"3": -1, "2": 0, "0": 1, "1": -1}


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
    ("found", "message"),
    [
        ([], "no results of compare.py"),
        ([fake_cell("digits-noisy", "sam", [0.9])], "no results of base and base2x"),
        ([fake_cell("other", "base", [0.9])], "--task digits-noisy: no results of base and base2x"),
        (
            [fake_cell("digits-noisy", row, [0.3], main="loss") for row in digits.BASELINES],
            "its main result is no accuracy",
        ),
    ],
)
def test_bad_results_are_refused(found, message, in_empty_folder, capsys):
    write_cells(in_empty_folder / "cells", found)
    with pytest.raises(SystemExit) as stop:
        front_figure.main(["--results", "cells"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (in_empty_folder / "front.png").exists()


def test_a_figure_that_cannot_be_written_is_one_line(in_empty_folder):
    write_cells(in_empty_folder / "cells", fake_tasks(["digits-noisy"], seeds=1))
    with pytest.raises(SystemExit, match=r"cannot be written \(No such file"):
        front_figure.main(["--results", "cells", "--out", "missing/front.png"])
