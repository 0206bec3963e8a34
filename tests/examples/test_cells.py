"""Results of compare.py: what is refused, differences by hand, and the rules of the next tiers."""

import json

import numpy as np
import pytest
from fake_cells import fake_cell, fake_tasks, write_cells

from examples.compare import cells
from samx.catalog.cards import FAMILIES


def tasks_of(*found):
    tasks = {}
    for cell in found:
        read = cells.as_cell(cell, cell["task"], cell["row"])
        tasks.setdefault(read.task, {})[read.row] = read
    return tasks


def test_cells_are_read(tmp_path):
    write_cells(tmp_path, [*fake_tasks(["late"], tier=2), *fake_tasks(["one", "two"])])
    (tmp_path / "digits.json").write_text("{}")  # other results are no cells
    tasks = cells.read_cells(tmp_path)
    assert [*tasks] == ["one", "two", "late"]
    cell = tasks["one"]["sam"]
    assert cell.scores.shape == (4,)
    assert cell.scores.tolist() == cell.measure("test_accuracy").tolist()
    assert (cell.steps, cell.gradients_per_step, cell.edges) == (400, 2.0, ())
    assert np.isnan(cell.measure("unknown")).all()
    assert tasks["one"]["base"].equal_time == {}
    assert [*cells.of_tiers(tasks, 2)] == ["late"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": "asam"}, "holds row 'asam' of task 'one'"),
        ({"main": "speed"}, "main must be accuracy or loss"),
        ({"seeds": 5}, "measures: test_accuracy must have 5 numbers"),
        ({"seeds": 0}, "seeds must be a count, got 0"),
        ({"seeds": 10**9}, "seeds must be at most 1000"),
        ({"steps": 400.0}, "steps must be a count"),
        ({"gradients": "many"}, "gradients must be a number, got 'many'"),
        ({"edges": "rho"}, "edges must be a list of names"),
        ({"measures": {"test_loss": [1.0] * 4}}, "measures has no test_accuracy"),
        ({"measures": [1.0]}, "measures must be an object"),
        ({"measures": {"test_accuracy": [1.0, 1.0, 1.0, True]}}, "test_accuracy must be a number"),
        ({"equal_time": 3}, "equal_time must be an object"),
        ({"equal_time": {"test_accuracy": [1.0]}}, "equal_time: test_accuracy must have 4"),
    ],
)
def test_a_wrong_cell_is_refused_by_name(change, message, tmp_path):
    write_cells(tmp_path, [fake_cell("one", "sam", [0.9] * 4)])
    path = tmp_path / "one" / "sam.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as error:
        cells.read_cells(tmp_path)
    assert str(path) in str(error.value)


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"no results of compare\.py"):
        cells.read_cells(tmp_path / "nowhere")
    path = write_cells(tmp_path, [fake_cell("one", "sam", [0.9])]) / "one" / "sam.json"
    path.write_text('{"task": "one"}')
    with pytest.raises(ValueError, match=r"sam\.json: no budget, bytes, edges"):
        cells.read_cells(tmp_path)
    write_cells(tmp_path, [fake_cell("one", "sam", [0.9]), fake_cell("one", "base", [0.9], 2)])
    with pytest.raises(ValueError, match="rows differ in their main result or tier"):
        cells.read_cells(tmp_path)


def test_differences_are_paired_and_better_is_higher():
    [found] = tasks_of(
        fake_cell("one", "base", [0.9, 0.8, 0.7]),
        fake_cell("one", "base2x", [0.8, 0.8, 0.7]),
        fake_cell("one", "sam", [0.95, 0.9], equal_time={"test_accuracy": [0.9, 0.9]}),
    ).values()
    assert cells.better_baseline(found) == "base"
    assert cells.difference(found["sam"], found["base"]) == pytest.approx([0.05, 0.1])
    assert cells.difference(found["sam"], found["base"], True) == pytest.approx([0, 0.1])
    assert len(cells.difference(found["base2x"], found["base"], True)) == 0
    [found] = tasks_of(
        fake_cell("one", "base", [0.5], main="loss"),
        fake_cell("one", "base2x", [0.4], main="loss"),
        fake_cell("one", "sam", [0.3], main="loss", time_of_base_step=1.8),
    ).values()
    assert cells.better_baseline(found) == "base2x"
    assert cells.difference(found["sam"], found["base2x"]) == pytest.approx([0.1])
    assert cells.relative_time(found["sam"], found) == pytest.approx(0.9)
    assert cells.better_baseline({}) == ""


def test_a_baseline_that_is_not_finite_loses():
    [found] = tasks_of(
        fake_cell("one", "base", [0.5, 0.5], main="loss"),
        fake_cell("one", "base2x", [0.4, 0.4], main="loss"),
    ).values()
    assert found["base2x"].scores.tolist() == [-0.4, -0.4]
    found["base2x"].measures["test_loss"][0] = np.nan
    assert cells.better_baseline(found) == "base"


def scored(rows, task="one", tier=1, seeds=2):
    """Return cells whose scores fall from row to row."""
    return [fake_cell(task, row, [1 - place / 100] * seeds, tier) for place, row in enumerate(rows)]


def test_the_ranking():
    tasks = tasks_of(
        *scored(["sam", "asam", "base"]), *scored(["asam", "sam", "base", "gsam"], "two")
    )
    found = cells.ranking(tasks)
    assert {row: place.value for row, place in found.items()} == {
        "sam": 1.5,
        "asam": 1.5,
        "base": 3,
    }
    assert [*cells.ranking(tasks, ["base", "asam"])] == ["asam", "base"]
    assert cells.ranking(tasks, []) == {}


def test_families_of_rows():
    assert cells.family_of("look-layer-sam") == "Fewer sharp gradients"
    assert cells.family_of("looksam-0.7") == "Fewer sharp gradients"
    assert cells.family_of("base") is None
    assert cells.family_of("imb-sam") is None


def test_the_second_tier_has_sam_and_the_best_row_of_each_family():
    """ASAM is better than SAM, of the same family; what one task lacks is not chosen."""
    order = ["lpf-sgd", "asam", "sam", "base", "rwp", "looksam-0.7", "looksam", "base2x"]
    tasks = tasks_of(*scored(order), *scored(["bisam", *order], "two"))
    assert cells.second_tier(tasks) == ["base", "base2x", "sam", "lpf-sgd", "asam", "looksam-0.7"]


def test_the_second_tier_is_not_too_large():
    every = [name.replace("_", "-") for names in FAMILIES.values() for name in reversed(names)]
    chosen = cells.second_tier(tasks_of(*scored(["base", "base2x", *every])))
    assert len(chosen) == 2 + cells.SECOND
    assert len({cells.family_of(row) for row in chosen[3:]}) == cells.SECOND - 1


def test_the_third_tier_has_the_best_rows_of_the_second():
    """GSAM is the best in the second tier's task alone: it is of no use, as it was not chosen."""
    first = ["lpf-sgd", "asam", "sam", "looksam", "ausam", "wsam", "saf", "base", "base2x", "gsam"]
    second = ["gsam", "saf", "lpf-sgd", "wsam", "asam", "base", "base2x", "looksam", "sam", "ausam"]
    tasks = tasks_of(*scored(first), *scored(second, "two", 2), *scored(first[::-1], "three", 3))
    assert "gsam" not in cells.second_tier(tasks)
    third = cells.third_tier(tasks)
    assert third == ["base", "base2x", "sam", "lpf-sgd", "asam", "saf", "looksam", "wsam"]
