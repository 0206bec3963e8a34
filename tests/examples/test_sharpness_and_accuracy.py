"""Which sharpness predicts accuracy: correlations of made-up cells that are known by hand."""

import json

import numpy as np
import pytest
from fake_cells import fake_cell, fake_tasks, write_cells

from examples.compare import cells
from examples.compare import sharpness_and_accuracy as script
from examples.compare.options import RESULTS

COMMITTED = RESULTS.parent / f"{script.NAME}.json"
ROWS, SEEDS = 12, 6


@pytest.fixture
def without_figure(monkeypatch):
    """Leave out the figure, which `test_figures.py` looks at."""
    monkeypatch.setattr(script, "draw", lambda found, path: path.write_bytes(b""))
    monkeypatch.setattr(script, "DRAWS", 50)


def test_a_tiny_run(in_empty_folder, capsys, read_report, without_figure):
    write_cells(in_empty_folder / "cells", [*fake_tasks(), *fake_tasks(["late"], main="loss")])
    summary = script.main(["--results", "cells", "--out", "results"])
    printed = capsys.readouterr().out
    for text in (
        "methods, kendall",
        "networks, controlled",
        "adaptive worst case",
        "Over methods at equal training loss, ",
        "Reference over methods, (training loss): mean over tasks -",
        "of 3 tasks.",
    ):
        assert text in printed
    report = read_report(in_empty_folder / "results")
    assert len(report["over_tasks"]) == len(summary) == len(report["tasks"]["late"])
    read = script.summary_of(report)
    assert {key: str(found) for key, found in read.items()} == {
        key: str(found) for key, found in summary.items()
    }


def task_of(**measures):
    """Return the cells of a task whose score and measures [rows, seeds] are given."""
    measures = {f"test_{name}" if name == "accuracy" else name: v for name, v in measures.items()}
    found = {}
    for row, accuracy in enumerate(measures["test_accuracy"]):
        cell = fake_cell("one", f"row-{row}", accuracy)
        cell["measures"] |= {name: values[row].tolist() for name, values in measures.items()}
        found[f"row-{row}"] = cells.as_cell(cell, "one", f"row-{row}")
    return found


def of(found, measure, level, kind="raw"):
    return found[measure, level, kind]


def test_each_level_sees_its_own_differences():
    """The trace differs between methods only. What a seed does to all methods is taken away."""
    rows, seeds = np.arange(ROWS)[:, None] + np.zeros(SEEDS), np.arange(SEEDS) * 1.0
    own = np.random.default_rng(0).permuted(seeds + 0 * rows, axis=1)
    own -= own.mean(axis=0)
    accuracy = 100 * rows + seeds + own
    task = task_of(
        accuracy=accuracy, trace=-rows, top_eigenvalue=own - 2 * seeds, m_sharpness=seeds + 0 * rows
    )
    found = script.over_all({"one": task}, draws=20)["one"]
    assert of(found, "trace", "methods").value == pytest.approx(-1)
    assert of(found, "trace", "methods", "kendall").value == pytest.approx(-1)
    assert -1 < of(found, "trace", "networks").value < -0.95
    assert np.isnan(of(found, "trace", "seeds").value)
    assert np.isnan(of(found, "m_sharpness", "methods").value)
    assert np.isnan(of(found, "m_sharpness", "seeds").value)
    assert of(found, "top_eigenvalue", "seeds").value > 0.4
    assert of(found, "top_eigenvalue", "networks").value < 0


def test_the_training_loss_is_controlled_for():
    """The trace predicts accuracy as the training loss alone does, the eigenvalue also besides."""
    rng = np.random.default_rng(0)
    loss, other = rng.normal(size=(2, 40, 1)) + np.zeros((40, 4))
    noise = rng.normal(0, 0.2, (2, 40, 4))
    task = task_of(
        accuracy=-loss - other, train_loss=loss, trace=loss + noise[0], top_eigenvalue=other
    )
    found = script.over_all({"one": task}, levels=["methods"], draws=200)["one"]
    assert of(found, "trace", "methods").interval.is_below
    controlled = of(found, "trace", "methods", "controlled").interval
    assert controlled.low < 0 < controlled.high
    assert of(found, "top_eigenvalue", "methods", "controlled").value < -0.9
    assert ("train_loss", "methods", "controlled") not in found


def test_what_is_not_finite_leaves_the_other_ranks_alone():
    numbers = np.array([[1.0, np.nan, 5.0, 3.0], [3.0, 9.0, 2.0, 1.0]])
    found = script.beside_other_methods(numbers)
    assert found == pytest.approx(
        np.array([[-0.75, np.nan, 0.75, 0.75], [0.75, 0, -0.75, -0.75]]), nan_ok=True
    )


def test_a_draw_has_the_same_methods_in_all_tasks():
    """Also where a task lacks one: the correlations of two equal tasks stay equal."""
    rng = np.random.default_rng(1)
    task = task_of(**{name: rng.normal(size=(ROWS, 1)) for name in ("accuracy", "trace")})
    first = {"other": task["row-0"], **task}
    found = script.over_all({"first": first, "second": task}, levels=["methods"], draws=9)
    key = "trace", "methods", "raw"
    one, other = (found[name][key].drawn for name in ("first", "second"))
    assert np.corrcoef(one, other)[0, 1] > 0.9


def test_a_loss_counts_with_its_sign():
    task = {cell["row"]: cell for cell in fake_tasks(["one"], main="loss")}
    task = {row: cells.as_cell(cell, "one", row) for row, cell in task.items()}
    found = script.over_all({"one": task}, levels=["methods"], draws=10)["one"]
    assert of(found, "test_loss_input_noise", "methods").value == pytest.approx(-1)


def test_tasks_are_averaged_and_signs_counted():
    drawn = [np.array([-0.6, -0.5, -0.4]), np.array([0.3, 0.2, 0.1]), np.full(3, np.nan)]
    found = [script.Found(*each) for each in zip((-0.5, 0.2, np.nan), drawn, strict=True)]
    summary = script.over_tasks(found)
    assert (summary.expected, summary.tasks) == (1, 2)
    assert summary.mean.value == pytest.approx(-0.15)
    assert summary.mean.low == pytest.approx(-0.15) == pytest.approx(summary.mean.high)
    assert str(summary) == "-0.15 [-0.15, -0.15], 1/2"
    assert str(script.over_tasks(found[2:])) == ""


def test_what_is_said():
    def of_mean(value):
        return script.over_tasks([script.Found(value, np.full(9, value))])

    summary = {
        ("trace", "methods", "raw"): of_mean(-0.3),
        ("top_eigenvalue", "methods", "raw"): of_mean(-0.5),
        ("worst_case", "methods", "raw"): of_mean(np.nan),
        ("trace", "methods", "controlled"): of_mean(0.1),
        ("top_eigenvalue", "methods", "controlled"): of_mean(0.2),
        ("train_loss", "methods", "raw"): of_mean(-0.9),
    }
    told = script.sentences_of(summary)
    assert [line.partition(":")[0] for line in told] == [
        "Over methods, top eigenvalue has the lowest correlation with the score",
        "Over methods at equal training loss, trace has the lowest correlation with the score",
        "Reference over methods, (training loss)",
    ]
    assert "+0.10 [+0.10, +0.10], sign as expected in 0 of 1 task." in told[1]
    assert script.claim(summary).startswith("Lowest correlation: top eigenvalue, mean -0.50, at")
    [head, *rows] = script.grid_of(summary, script.columns_of("methods"))
    assert head == ["measure", "methods, raw", "methods, kendall", "methods, controlled"]
    assert rows[1] == ["trace", "-0.30 [-0.30, -0.30], 1/1", "", "+0.10 [+0.10, +0.10], 0/1"]


def test_the_committed_correlations_are_those_of_the_committed_cells():
    """The correlations themselves, over methods; their intervals take a minute."""
    found = script.over_all(cells.read_cells(RESULTS), levels=["methods"], draws=2)
    committed = script.summary_of(json.loads(COMMITTED.read_text()))
    for key, summary in script.summarize(found).items():
        assert summary.mean.value == pytest.approx(committed[key].mean.value, abs=1e-6, nan_ok=True)
        assert (summary.expected, summary.tasks) == committed[key][1:]


def test_bad_results_are_refused(refusal, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    assert "no results of compare.py" in refusal(script.main, f"--results {folder}")
