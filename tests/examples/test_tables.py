"""Tables and figures of the comparison: they come from cells alone, and say what the cells say."""

import numpy as np
import pytest
from fake_cells import fake_cell, fake_tasks, write_cells

from examples.compare import cells, comparison_figures, tables
from examples.compare.compare import TRIALS
from examples.compare.options import RESULTS
from examples.compare.rows import variants_of
from examples.compare.tasks import TASKS

FIGURES = ("draw_comparison", "draw_ranking")


@pytest.fixture
def drawn(monkeypatch):
    """Leave out the figures, which `test_figures.py` looks at; return which were asked for."""
    found = []
    for name in FIGURES:
        monkeypatch.setattr(comparison_figures, name, lambda *given, name=name: found.append(name))
    return found


def read(folder, found):
    return cells.read_cells(write_cells(folder, found))


def test_a_tiny_run(in_empty_folder, capsys, read_report, drawn):
    late = fake_tasks(["late"], rows=("base", "base2x", "sam"), main="loss", tier=2)
    write_cells(in_empty_folder / "cells", [*fake_tasks(), *late])
    summaries = tables.main(["--results", "cells", "--out", "results"])
    assert drawn == [*FIGURES]
    printed = capsys.readouterr().out
    for text in (
        "one (one), 4 seeds",
        "test accuracy, %",
        "test loss",
        "Average rank, tier 1, 2 tasks, 6 rows",
        "Average rank, tiers 1 to 2, 3 tasks, 3 rows",
        "second tier, chosen from 2 tasks: base, base2x, sam",
        "15 cells",
    ):
        assert text in printed
    report = read_report(in_empty_folder / "results")
    assert [*report["tasks"]] == [*summaries] == ["one", "two", "late"]
    sam = next(each for each in report["tasks"]["one"] if each["row"] == "sam")
    assert sam["gain"][1] < sam["gain"][0] < sam["gain"][2]
    assert [each["tiers"] for each in report["rankings"]] == [[1], [1, 2]]


def test_the_first_table_by_hand(tmp_path):
    """All seeds gain one point, and half of one at equal time: intervals of no width."""
    accuracy = [0.8, 0.9]
    equal = {"test_accuracy": [0.805, 0.905], "test_loss": [0.3, 0.3]}
    found = [
        fake_cell("one", "sam", [0.81, 0.91], equal_time=equal, edges=["rho"], bytes=2_340_000),
        fake_cell("one", "base2x", accuracy),
        fake_cell("one", "base", [0.7, 0.9], bytes=70),
    ]
    [task] = read(tmp_path, [found[0] | {"time_of_base_step": 1.93}, *found[1:]]).values()
    summaries = tables.summarize(task)
    lines = [" | ".join(line) for line in tables.result_grid(task, summaries)]
    times = {row: f"{cell.time_of_base_step:.2f}" for row, cell in task.items()}
    assert lines == [
        "method | test accuracy, % | gain over base2x | at equal time | gradients | step | state"
        " | lr | rho",
        f"base2x | 85.00 [80.00, 90.00] |  |  | 800 | {times['base2x']} | 123 kB | 0.1 | 0.2",
        "base | 80.00 [70.00, 90.00] | -5.00 [-10.00, +0.00] |  | 400 | "
        f"{times['base']} | 70 B | 0.1 | 0.2",
        "sam | 86.00 [81.00, 91.00] | +1.00 [+1.00, +1.00] | +0.50 [+0.50, +0.50] | 800 | 1.93"
        " | 2.34 MB | 0.1 | 0.2*",
    ]
    assert tables.verdict(task, summaries).startswith("1 of 1 methods are better than base2x, 0 ")
    assert "by chance about 0.1 of each" in tables.verdict(task, summaries)  # few seeds
    assert [each.time for each in summaries] == [1, 0.5, pytest.approx(0.965)]


def test_the_second_table_marks_what_differs(tmp_path):
    base, sam = fake_cell("one", "base", [0.8, 0.9]), fake_cell("one", "sam", [0.7, 0.6])
    base["measures"] |= {"train_loss": [1.0, 2.0], "calibration_error": [0.1, 0.1]}
    sam["measures"] |= {"train_loss": [0.9, 1.8], "calibration_error": [0.2, 0.05]}
    sam["measures"]["test_loss_3_bits"] = [None, 1.0]
    del base["measures"]["test_loss_4_bits"], sam["measures"]["test_loss_4_bits"]
    [task] = read(tmp_path, [base, sam]).values()
    head, first, second = tables.more_grid(task, tables.summarize(task))
    assert head == ["method", "test loss", "train loss", "calib., %", "input noise", "3 bits"]
    assert first[:4] == ["base", "0.35", "1.5", "10"]
    assert second == ["sam", "0.55 >", "1.35 <", "12.5", "1.1 >", "nan"]


def test_rankings_grow_by_tiers(tmp_path):
    rows = ("base", "base2x", "sam", "asam")
    tasks = read(
        tmp_path,
        [*fake_tasks(["one", "two"], rows), *fake_tasks(["three"], rows[:3], tier=3)],
    )
    first, second = tables.rankings_of(tasks)
    assert (first.tiers, first.title) == ((1,), "tier 1, 2 tasks, 4 rows")
    assert (second.tiers, second.title) == ((1, 2, 3), "tiers 1 to 3, 3 tasks, 3 rows")
    lines = tables.ranking_grid(first)
    assert lines[0] == ["method", "average rank", "one", "two"]
    means = [np.mean([float(place) for place in line[2:]]) for line in lines[1:]]
    assert means == sorted(means)
    assert lines[1][1].startswith(f"{means[0]:.1f} [")


def test_what_is_missing_and_wrong_is_said(tmp_path):
    found = [*fake_tasks(["one"]), *fake_tasks(["two"], rows=("base", "sam"))]
    found[0]["edges"] = ["learning_rate"]
    found[1]["measures"]["test_accuracy"][0] = None
    found.append(fake_cell("two", "gsam", [0.9]))
    text = "\n".join(tables.notes_of(read(tmp_path, found)))
    for wanted in (
        "9 cells (tasks times rows) took 0.0 hours",
        "1 with a number at an edge of what was tried: base on one",
        "1 with a number that is not finite: base2x on one",
        "1 with a number of seeds that is not the largest of its task: gsam on two",
        "one lacks gsam",
        "two lacks asam, base2x, looksam, lpf-sgd",
    ):
        assert wanted in text


def test_what_does_not_fit_a_task_is_not_missing(tmp_path):
    found = fake_tasks(["digits-clean", "tabular"], rows=("base", "sam"))
    found = [*found, fake_cell("tabular", "focal-sam", [0.9]), fake_cell("tabular", "asam", [0.9])]
    lines = tables.missing_of(read(tmp_path, found))
    assert lines[0] == "digits-clean lacks asam"
    assert "mnist1d has no cells" in lines[1:]
    assert len(lines) == 1 + len(tables.TASKS) - 2


def test_a_row_that_is_not_finite_comes_last(tmp_path):
    bad = fake_cell("one", "asam", [0.9, 0.9])
    bad["measures"]["test_accuracy"][0] = None
    good = [fake_cell("one", row, [0.5, 0.6]) for row in ("base", "sam")]
    [task] = read(tmp_path, [bad, *good]).values()
    summaries = tables.summarize(task)
    assert [each.row for each in summaries] == ["base", "sam", "asam"]
    assert tables.result_grid(task, summaries)[-1][1:3] == ["", ""]


def test_the_committed_cells_are_whole():
    """They are those of the tasks, and every row that a task reports has all its seeds."""
    tasks = cells.read_cells(RESULTS)
    for name, found in tasks.items():
        task = TASKS[name]
        assert {*found} <= {*variants_of(task)}
        for cell in found.values():
            assert (cell.tier, cell.seeds, cell.main) == (task.tier, task.seeds, task.main)
            assert cell.budget == task.budget
            assert cell.trials >= TRIALS


@pytest.mark.slow
def test_the_committed_cells_give_tables_and_figures(in_empty_folder):
    """Without training; `test_figures.py` looks at figures of made-up cells."""
    tables.main(["--out", "results"])
    for name in ("results.json", "comparison.png", "ranking.png"):
        assert (in_empty_folder / "results" / name).stat().st_size > 10_000


def test_what_the_figures_say(tmp_path):
    found = [fake_cell("one", row, [0.9, 0.8]) for row in ("base", "base2x")]
    found += [fake_cell("one", "sam", [0.91, 0.82]), fake_cell("one", "bad", [0.2, 0.1])]
    found += [fake_cell("one", f"x{k}", [0.91 + k / 1000, 0.8]) for k in range(6)]
    [task] = read(tmp_path, found).values()
    summaries = tables.summarize(task)
    text = comparison_figures.claim("digits-noisy", summaries, "base")
    assert text == "digits, 30% of the labels wrong: 1 of 8 methods better than base, 1 worse"
    names = comparison_figures.named(summaries)
    assert names == ["base", "base2x", "sam", "x5", "x4", "x3"]
    assert -10 < comparison_figures.lowest(summaries) < 0


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no results of compare.py"), ("{}", "no budget, bytes")]
)
def test_bad_results_are_refused(content, message, refusal, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    if content is not None:
        (folder / "one").mkdir()
        (folder / "one" / "sam.json").write_text(content)
    assert message in refusal(tables.main, f"--results {folder}")
