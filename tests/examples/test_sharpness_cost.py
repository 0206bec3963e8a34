"""The example that counts what measures cost: its counts, its table, and what it refuses."""

import re

import jax
import pytest

from examples.common.shapes import OPTIONS
from examples.measure import sharpness_cost

SMALL = "--layers 2 --width 32 --small-layers 1 --small-width 8 --examples 16 --rounds 2"


def test_a_tiny_run(in_empty_folder, capsys, read_report, monkeypatch):
    monkeypatch.setattr(sharpness_cost, "LEAST", 1e-4)
    arguments = [*SMALL.split(), "--rows", "first_order", "slice_1d", "--out", "results"]
    results = sharpness_cost.main(arguments)
    assert read_report(in_empty_folder / "results")["results"] == results
    assert (in_empty_folder / "results" / "sharpness_cost.png").stat().st_size > 10_000
    of = {result["row"]: result for result in results}
    assert [*of] == ["loss", "gradient", "hvp", "ggn_vp", "first_order", "slice_1d"]

    # Products of the net 8 -> 8 -> 10. Those with the inputs need no derivative of the inputs.
    hidden, head = 2 * 16 * 8 * 8, 2 * 16 * 8 * 10
    assert of["loss"]["flops"] == hidden + head
    gradient = 2 * hidden + 3 * head
    assert of["gradient"]["flops"] == gradient
    assert of["hvp"]["gradients"] == pytest.approx((3 * hidden + 8 * head) / gradient, rel=0.25)
    assert of["first_order"]["said"] == pytest.approx(of["first_order"]["gradients"])
    assert of["slice_1d"]["flops"] == 11 * of["loss"]["flops"]
    for result in results:
        assert result["ratio"] == sorted(result["ratio"])
        assert 1 <= result["peak"] < 6
    assert of["gradient"]["results"] == pytest.approx(1, abs=0.01)
    printed = capsys.readouterr().out
    for text in ("device:", "first_order", "G + F", "11F", "copies of the parameters", "Plot:"):
        assert text in printed


def test_every_row_can_be_measured():
    net = sharpness_cost.net(1, 8, 16, has_values=False)
    rows = sharpness_cost.rows_of(16)
    assert tuple(rows) == sharpness_cost.ROWS
    for row in rows.values():
        jax.eval_shape(row.measure, *net.arguments)


def test_rounds_of_an_ascent_are_counted():
    """Its loop ends by itself: every restart counts with all of its steps."""
    net = sharpness_cost.net(1, 8, 16, has_values=False)
    (gradient, worst), _ = sharpness_cost.count(["gradient", "worst_case"], net, net)
    steps = sharpness_cost.STEPS * sharpness_cost.RESTARTS
    assert worst["flops"] / gradient["flops"] == pytest.approx(steps + 1, rel=0.05)


def test_the_memory_of_eigenvalues():
    """A basis of 20 vectors or a few: in copies of the parameters of a wide net."""
    net = sharpness_cost.net(2, 256, 4, has_values=False)
    rows = sharpness_cost.rows_of(4)
    many, few = (
        sharpness_cost.peak_bytes(
            sharpness_cost.lower(rows[name], net, compiler_options=OPTIONS).compile()
        )
        / net.copy
        for name in ("eigenvalues-alone", "extreme-alone")
    )
    assert 21 < many < 27
    assert few < 9


def test_a_row_that_fails_is_said():
    results = [
        {"row": "loss", "title": "loss", "passes": {"F": 1}, "flops": 10.0},
        {"row": "gradient", "title": "gradient", "passes": {"G": 1}, "flops": 20.0},
        {"row": "hvp", "title": "hvp", "passes": {"H": 1}, "failed": "too large"},
        {"row": "ggn_vp", "title": "ggn_vp", "passes": {"N": 1}, "flops": 30.0},
        {"row": "trace", "title": "trace", "passes": {"H": 10}, "flops": 500.0},
        {"row": "smoothed", "title": "smoothed", "passes": {"F": 3, "G": 1}, "flops": 50.0},
    ]
    sharpness_cost.relate(results)
    assert [result["gradients"] for result in results] == [0.5, 1, None, 1.5, 25, 2.5]
    assert [result["said"] for result in results] == [0.5, 1, None, 1.5, None, 2.5]
    lines = sharpness_cost.table(results).splitlines()
    assert lines[-1] == "hvp: too large"
    assert lines[-2].split() == ["smoothed", "2.50", "3F", "+", "G", "2.50"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rows hessian", "hessian.*choose from.*eigenvalues"),
        ("--layers 0", "--layers must be at least 1, got 0"),
        ("--examples 3", "--examples must be at least 4, got 3"),
        ("--rounds 0", "--rounds must be at least 1, got 0"),
        ("--out taken", "taken.*not empty"),
    ],
)
def test_bad_arguments(arguments, message, refusal):
    assert re.search(message, refusal(sharpness_cost.main, arguments))
