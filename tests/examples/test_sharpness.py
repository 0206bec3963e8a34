"""The example that measures checkpoints: what it reads and writes, and what it says of them."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.measure import sharpness, sharpness_checkpoints, sharpness_measures
from examples.measure.sharpness_measures import Row

SHAPES = {"first": (64, 4), "second": (4, 4), "head": (4, 10)}
FEW = ["--measures", "first-order", "m-sharpness", "slice", "barrier", "directional"]


def arrays(seed, width=4, dtype=np.float32):
    rng = np.random.default_rng(seed)
    found = {}
    for layer, shape in SHAPES.items():
        shape = tuple(width if n == 4 else n for n in shape)
        found[f"{layer}/kernel"] = rng.normal(0, 0.3, shape).astype(dtype)
        found[f"{layer}/bias"] = rng.normal(0, 0.3, shape[-1]).astype(dtype)
    return found


def loss_of(params, images):
    """The network and its mean loss once more, in NumPy."""
    x = np.asarray(images["x"], np.float64)
    for layer in ("first", "second"):
        x = np.maximum(x @ params[f"{layer}/kernel"] + params[f"{layer}/bias"], 0)
    logits = x @ params["head/kernel"] + params["head/bias"]
    right = np.take_along_axis(logits, np.asarray(images["y"])[:, None], 1)[:, 0]
    return float(np.mean(np.log(np.exp(logits).sum(axis=1)) - right)), logits.argmax(1)


def test_a_tiny_run(in_empty_folder, capsys, read_report, monkeypatch):
    """Two checkpoints from a file, another one trained."""
    monkeypatch.setattr(sharpness_measures, "SHARDS", (500, 1000))
    monkeypatch.setattr(sharpness_measures, "BATCH", 500)
    start = arrays(0, dtype=np.float64)
    second = {f"second/{name}": array for name, array in arrays(1).items()}
    np.savez("start.npz", **start, **second)
    many = ["--variants", "sam", "--params", "start.npz", "--epochs", "1", "--batches", "3"]
    radii = ["--l2", "0.2", "--adaptive", "1", "--linf", "0.01"]
    results = sharpness.main([*many, *FEW, *radii, "--out", "results"])
    report = read_report(in_empty_folder / "results")
    assert report["checkpoints"] == results["checkpoints"]
    assert (in_empty_folder / "results" / "sharpness.png").stat().st_size > 10_000
    one, _, other = results["checkpoints"]
    assert [one["name"], one["file"]] == ["start", "start.npz"]
    assert {"name": other["name"], "epochs": other["epochs"], "gradients": other["gradients"]} == {
        **{"name": "sam", "epochs": 1, "gradients": 20.0}
    }

    images, _, test = sharpness_measures.data_of(0, 0.3)
    measured, loss = one["measured"], loss_of(start, images)[0]
    assert measured["basics"]["train"] == pytest.approx(loss, rel=1e-5)
    accuracy = float(np.mean(loss_of(start, test)[1] == np.asarray(test["y"])))
    assert measured["basics"]["test_accuracy"] == pytest.approx(accuracy)
    wanted = (accuracy * (1 - accuracy) / 500) ** 0.5
    assert measured["basics"]["test_accuracy_error"] == pytest.approx(wanted, rel=1e-4)
    assert measured["slice"]["losses"][10] == pytest.approx(loss, rel=1e-5)
    whole = measured["first order, L2, ρ = 0.2"]["value"]
    assert 0 < 0.2 * measured["basics"]["grad_norm"] < whole  # along the gradient it is convex
    assert measured["m-sharpness, 1000"]["value"] == pytest.approx(whole, rel=1e-3)
    assert measured["m-sharpness, 500"]["value"] > whole
    assert measured["directional"]["value"] <= measured["basics"]["top"]

    names = [pair["names"] for pair in results["pairs"]]
    assert names == [["start", "second"], ["start", "sam"], ["second", "sam"]]
    losses = {c["name"]: c["measured"]["basics"]["train"] for c in results["checkpoints"]}
    for pair in results["pairs"]:
        ends = [losses[name] for name in pair["names"]]
        assert [pair["losses"][0], pair["losses"][-1]] == pytest.approx(ends, rel=1e-5)
        above = np.subtract(pair["losses"], np.linspace(*ends, sharpness_measures.POINTS))
        assert pair["value"] == pytest.approx(max(0, *above), abs=1e-4)

    printed = capsys.readouterr().out
    for text in ("device:", "one step of SAM on all images, L2, ρ = 0.2", "start and sam", "Plot:"):
        assert text in printed
    assert "eigenvalue, Hessian" not in printed  # it was not chosen

    again = sharpness_checkpoints.read([str(in_empty_folder / "results" / "params.npz")])
    assert [checkpoint.name for checkpoint in again] == ["start", "second", "sam"]
    np.testing.assert_array_equal(again[0].params["first"]["bias"], start["first/bias"].astype("f"))


def test_no_shard_has_the_wrong_labels_alone():
    problems = [
        sharpness_measures.problem_of(SimpleNamespace(seed=0, noise=noise, width=16, batches=5))
        for noise in (0.0, 0.3)
    ]
    right, given = (np.asarray(problem.train.batch["y"]) for problem in problems)
    shares = np.mean((right != given).reshape(10, 100), axis=1)
    assert 0.15 < shares.min() < shares.max() < 0.45


def test_every_row_is_measured(monkeypatch):
    """Trace all programs: each row's numbers are there, and each program is a row or a curve."""
    args = sharpness.parse(["--width", "4", "--measures", *sharpness.MEASURES])
    args.width = 4
    problem = sharpness_measures.problem_of(args)
    params = sharpness_checkpoints._checked(grouped(arrays(0)))
    programs = sharpness_measures.programs_of(args) | {"basics": sharpness_measures.basics}
    found = {name: jax.eval_shape(program, problem, params) for name, program in programs.items()}
    rows = sharpness_measures.rows_of(args)
    for row in rows:
        assert found[row.program][row.value].shape == (), row
        assert row.error in ("", "error") or row.error in found[row.program], row
    without_rows = {"density", "plane", f"m-sharpness, {sharpness_measures.shards_of(args)[-1]}"}
    assert found.keys() - {row.program for row in rows} == without_rows
    assert len({row.title for row in rows if row.is_flatness}) == sum(r.is_flatness for r in rows)


def grouped(flat):
    found = {}
    for name, array in flat.items():
        layer, part = name.split("/")
        found.setdefault(layer, {})[part] = array
    return found


def checkpoints(values, accuracies, errors=None):
    """Checkpoints of which one measure is known."""
    errors = errors or [0.0] * len(values)
    return [
        {
            "name": name,
            "measured": {
                "basics": {"test_accuracy": accuracy, "test_accuracy_error": 0.01},
                "trace": {"value": value, "error": error},
            },
        }
        for name, value, accuracy, error in zip("abcd", values, accuracies, errors, strict=False)
    ]


TRACE = Row("trace", "trace")


@pytest.mark.parametrize(
    ("values", "accuracies", "errors", "wanted"),
    [
        ([3, 2, 1], [0.7, 0.8, 0.9], None, (3, 3)),  # the flatter, the better
        ([1, 2, 3], [0.7, 0.8, 0.9], None, (0, 3)),
        ([1, 2, 3], [0.8, 0.7, 0.9], None, (1, 3)),
        ([3, 2, 1], [0.7, 0.7, 0.9], None, (2, 2)),  # equal accuracies say nothing
        ([3, 2, 1], [0.7, 0.8, 0.9], [0.4, 0.4, 0.4], (1, 1)),  # neighbours are too close
        ([2, 2], [0.7, 0.8], None, (0, 0)),
    ],
)
def test_agreement_with_test_accuracy(values, accuracies, errors, wanted):
    assert sharpness.agreement(checkpoints(values, accuracies, errors), TRACE) == wanted


def test_what_it_says():
    found = checkpoints([3, 2, 1], [0.7, 0.8, 0.9])
    for checkpoint, value in zip(found, (1.0, 2.0, 3.0), strict=True):
        checkpoint["measured"]["other"] = {"value": value}
    rows = [TRACE, Row("other", "another"), Row("basics", "no measure", "test_accuracy", "", False)]
    text = "\n".join(sharpness.claims(found, rows))
    assert "Flattest of 3 checkpoints, by 2 measures: a by 1, c by 1." in text
    assert "always has the higher test accuracy by 1 of 2 measures" in text
    assert "less than half of the pairs by: another." in text
    assert "accuracies of 3 of 3 pairs" in text
    assert sharpness.title_of(found, rows).endswith("on the measure: a by 1 of 2, c by 1")
    assert sharpness.title_of(found, [TRACE]) == "c is the flattest by all measures (1)"
    assert sharpness.claims(found[:1], rows) == []
    assert sharpness.title_of(found[:1], rows) == "The loss around the checkpoints"


@pytest.mark.parametrize(
    ("value", "error", "wanted"),
    [
        (83.916, 2.7345, "83.9 ± 2.7"),
        (371.6, 20.6, "372 ± 21"),
        (0.016917, 0.00031932, "0.01692 ± 0.00032"),
        (8.96227, 1e-8, "8.962"),
        (8.96227, 0.0, "8.962"),
        (2.0, float("nan"), "2"),
        (float("nan"), 0.1, "-"),
    ],
)
def test_numbers_have_the_digits_that_their_error_allows(value, error, wanted):
    assert sharpness.with_error(value, error) == wanted


def test_many_checkpoints_are_printed_in_several_tables(capsys):
    found = [
        {"name": f"checkpoint{i}", **checkpoints([i + 1.0], [0.5 + i / 20])[0], "number": i}
        for i in range(7)
    ]
    for i, checkpoint in enumerate(found):
        checkpoint["name"] = f"checkpoint{i}"
    sharpness.print_table(found, [TRACE], 8)
    heads = [line for line in capsys.readouterr().out.splitlines() if "checkpoint" in line]
    assert [len(re.findall(r"checkpoint\d", line)) for line in heads[:2]] == [5, 2]
    assert "pairs" not in heads[0]
    assert heads[1].endswith("pairs")


def test_tuned_numbers_are_those_of_the_committed_results():
    assert sharpness_checkpoints.tuned("base", 0.3) == (0.02, 0.0)  # at SAM's cost
    assert sharpness_checkpoints.tuned("sam", 0.25) == (0.1, 0.2)
    assert sharpness_checkpoints.tuned("sam", 0.0) == (0.2, 0.2)
    assert sharpness_checkpoints.tuned("sampa-separate", 0.3) == (0.1, 0.2)


def test_checkpoints_of_several_files_get_different_names(in_empty_folder):
    np.savez("one.npz", **{f"jit/{name}/value": array for name, array in arrays(0).items()})
    several = {f"{run}/{name}": x for run in ("jit", "pmap") for name, x in arrays(1).items()}
    np.savez("two.npz", **several)
    found = sharpness_checkpoints.read(["one.npz", "two.npz", "one.npz"])
    assert [c.name for c in found] == ["jit", "jit (2)", "pmap", "jit (3)"]
    assert [c.about["file"] for c in found] == ["one.npz", "two.npz", "two.npz", "one.npz"]
    assert sharpness_checkpoints.width_of(found[0]) == 4


def test_the_grid_of_the_density_has_all_eigenvalues():
    grid = sharpness_measures.grid_of([0.5, 8.0])
    assert jnp.min(grid) < 0
    assert 8 < jnp.max(grid) < 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--params: wrong.npz: No such file"),
        ("text", "--params: wrong.npz: it is not a .npz file"),
        ({"w": np.ones(3)}, r"must hold the kernel and bias of the layers.*got /w \[3\]"),
        (arrays(0) | {"head/kernel": np.ones((5, 10))}, r"must hold.*head/kernel \[5, 10\]"),
        ({"run/x": np.array({}, object)}, "--params: wrong.npz: Object arrays cannot be loaded"),
    ],
)
def test_wrong_files(content, message, in_empty_folder, capsys):
    if isinstance(content, str):
        (in_empty_folder / "wrong.npz").write_text(content)
    elif content is not None:
        np.savez("wrong.npz", **content)
    with pytest.raises(SystemExit) as stop:
        sharpness.main(["--params", "wrong.npz"])
    assert stop.value.code == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert not (in_empty_folder / "runs").exists()


def test_checkpoints_of_different_widths(in_empty_folder, capsys):
    np.savez("one.npz", **arrays(0))
    np.savez("two.npz", **arrays(0, width=5))
    with pytest.raises(SystemExit):
        sharpness.main(["--params", "one.npz", "two.npz"])
    assert "all checkpoints must have the same width, got [4, 5]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--variants sammy", "sammy.*choose from.*sampa"),
        ("--measures hessian", "hessian.*choose from.*eigenvalues"),
        ("--epochs 0", "--epochs must be at least 1, got 0"),
        ("--draws 1", "--draws must be at least 2, got 1"),
        ("--batches 1001", "--batches must be 1 to 1000, got 1001"),
        ("--l2 0.1 0", "--l2 must be finite and above 0, got 0.0"),
        ("--sigma nan", "--sigma must be finite and above 0, got nan"),
        ("--noise 1", r"--noise must be in \[0, 1\), got 1.0"),
        ("--out taken", "taken.*not empty"),
    ],
)
def test_bad_arguments(arguments, message, refusal):
    assert re.search(message, refusal(sharpness.main, arguments))
