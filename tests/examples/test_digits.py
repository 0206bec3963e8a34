"""The main example: a run of every kind of variant, its defaults, and what it refuses."""

import io
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tqdm import tqdm

import samx
from examples import digits
from examples.common import monitoring, training, tuning
from examples.common.digits_task import STEPS_PER_EPOCH
from examples.common.registry import VARIANTS

TINY = ["--seeds", "2", "--epochs", "1", "--width", "4", "--noise", "0"]
SOME = ["base", "base2x", "sam", "ae-sam", "lightsam-norm"]  # one of each kind
COMPILED = "/jax/core/compile/backend_compile_duration"  # an event of JAX, also if it is cached


def cheap_eigenvalue(f, params, iterations):
    """Stand in for products with the Hessian; `test_monitoring.py` has the real ones."""
    return SimpleNamespace(values=[f(params)], residuals=[f(params) / iterations])


def test_a_tiny_run_of_every_kind_of_variant(in_empty_folder, capsys, read_report, monkeypatch):
    """No stage has the same number of runs, and yet there are two programs for each method."""
    monkeypatch.setattr(training, "SEARCH_SEEDS", range(1000, 1003))
    monkeypatch.setattr(training, "around", lambda start, decade: tuning.fixed([start / 2, start]))
    monkeypatch.setattr(samx.sharpness, "extreme_eigenvalue", cheap_eigenvalue)
    bars, programs = [], []
    shown = {"disable": False, "file": io.StringIO()}
    monkeypatch.setattr(digits, "tqdm", lambda **to: bars.append(tqdm(**to | shown)) or bars[0])
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **about: programs.append(event) if event == COMPILED else None
    )
    tiny = [*TINY, "--base", "adamw", "--monitor", "5"]
    results = digits.main([*tiny, "--variants", *SOME, "--rho", "0.1", "--out", "results"])
    methods = len({digits.ROWS[row][0] for row in SOME})
    # The others: initial parameters, splits, batches, three accuracies, the loss increase, and the
    # measures of sharpness.
    assert 2 * methods <= len(programs) <= 2 * methods + 8
    assert bars[0].n == pytest.approx(bars[0].total)
    report = read_report(in_empty_folder / "results")
    assert [r["row"] for r in report["results"]] == [r["row"] for r in results]
    assert {(r["row"], r["noise"]) for r in results} == {(row, 0.0) for row in SOME}
    for result in results:
        variant, times = digits.ROWS[result["row"]]
        steps = times * STEPS_PER_EPOCH
        if variant == "ae-sam":  # its runs decide how many
            assert steps < result["gradients"] < 2 * steps
        else:
            assert result["gradients"] == steps * VARIANTS[variant].gradients
        assert result["gradients_by_epoch"][-1] == result["gradients"]
        assert len(result["gradients_by_epoch"]) == times
        assert len(result["test_accuracy"]) == 2
        assert len(result["test_accuracy_by_epoch"]) == times
        assert result["rho"] == (0.0 if variant == "base" else 0.1)
        assert result["seconds_per_step"] > 0
        monitored = result["monitored"]
        assert monitored["step"] == [*range(STEPS_PER_EPOCH, steps + 1, STEPS_PER_EPOCH)]
        for name in monitoring.NAMES:
            assert np.shape(monitored[name]) == (times, 2)
            assert np.all(np.asarray(monitored[name]) > 0)
        increase = np.array(result["loss_increase"])  # of batches, in which it is larger
        assert np.all((0.5 * increase < monitored["rise"][-1]) & (monitored["rise"][-1] < increase))
        assert len(result["candidates"]) == 2
        best = max(result["candidates"], key=lambda tried: tried["validation_accuracy"])
        assert result["learning_rate"] == best["learning_rate"]
        assert result["edges"] == ["learning_rate"]  # of two, each is at an edge; one rho has none
    assert (in_empty_folder / "results" / "digits.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    for text in ("device:", "standard error", "test acc", "loss incr.", "top eig.", "results.json"):
        assert text in printed
    for row in SOME:
        assert row in printed
    assert "*: at an edge" in printed
    assert "minus base2x" in printed

    text = (in_empty_folder / "results" / "summary.json").read_text()
    summary = json.loads(text)
    for result, row in zip(results, summary["rows"], strict=True):
        assert row["mean"] == pytest.approx(100 * np.mean(result["test_accuracy"]), abs=1e-3)
        assert row["test_accuracy"] == pytest.approx(result["test_accuracy"], abs=1e-4)
        assert (row["trials"], row["edges"]) == (2, ["learning_rate"])
        top = np.mean(result["monitored"]["top_eigenvalue"][-1])
        assert row["top_eigenvalue"] == pytest.approx(top, abs=1e-3)
    assert summary["settings"]["noise"] == 0
    assert not {"out", "folder"} & summary["settings"].keys()
    assert {"python", "samx", "jax"} <= summary["versions"].keys()
    assert text.count("\n") < 60


def test_every_seed_has_random_numbers_of_its_own():
    """So that a method's luck is not the same in all of them, nor in the tuning."""
    example = samx.rwp(0.1).init(jnp.zeros(3)), samx.sam(0.1).init(jnp.zeros(3))
    assert changed_names(*(training.with_own_draws(example, seed) for seed in (1, 2))) == {"key"}
    trainer = training.make_trainer(VARIANTS["rwp"], "momentum", 4, 1)
    vectors = tuning.Runs(*tuning.runs_of((1, 2), [(0.1, 0.1)]))
    runs, start = (training.row_of(vectors, i) for i in (0, 1)), training.start_of(0, 4)
    assert changed_names(*(trainer.init(run, start) for run in runs)) == {"key"}


def changed_names(one, other):
    """Return the names of the fields in which two states differ."""
    changed = jax.tree.map(lambda *leaves: not np.array_equal(*leaves), one, other)
    paths = jax.tree_util.tree_leaves_with_path(changed)
    return {path[-1].name for path, is_other in paths if is_other}


def result_of(row, accuracies, **changes):
    result = {"row": row, "noise": 0.0, "test_accuracy": accuracies, "edges": []}
    result |= {"train_accuracy": [1.0, 1.0, 1.0], "loss_increase": [0.1, 0.2, 0.3]}
    result |= {"learning_rate": 0.1, "rho": 0.2, "gradients": 12.0, "seconds_per_step": 1e-3}
    return result | changes


def test_the_lead_is_that_over_the_better_baseline(capsys):
    base, base2x = result_of("base", [0.9, 0.8, 0.7]), result_of("base2x", [0.7, 0.7, 0.7])
    sam = result_of("sam", [0.92, 0.81, 0.70], edges=["rho"])
    digits.compare([base, base2x, sam], 0.0)
    best, other = capsys.readouterr().out.splitlines()
    # The differences to the better one are 2, 1 and 0 points.
    wanted = "sam - base: +1.00 ± 0.58 points, +1.7 standard errors (base: the better baseline)"
    assert best == wanted
    assert other.startswith("sam - base2x: +11.00 ± ")
    digits.print_table([base2x, sam, base], 0.0, 3)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[2].startswith("method test acc. % minus base train acc. %")
    of_row = {line.split()[0]: line for line in lines[4:7]}
    assert of_row["sam"].startswith("sam 81.00 ± 6.35 +1.00 ± 0.58 100.00 0.2000 12 1.000 0.1 0.2*")
    assert of_row["base"].startswith("base 80.00 ± 5.77 100.00")
    assert of_row["base2x"].startswith("base2x 70.00 ± 0.00 -10.00 ± 5.77 100.00")
    assert any(line.startswith("*: at an edge") for line in lines)


def test_rows_without_a_baseline_are_printed_and_not_compared(capsys):
    sam = result_of("sam", [0.92, 0.81, 0.70])
    digits.print_table([sam], 0.0, 3)
    digits.compare([sam], 0.0)
    printed = capsys.readouterr().out
    assert "sam" in printed
    assert "minus" not in printed
    assert "*" not in printed
    assert digits.claim([sam], 0.0) == "clean labels"


def test_what_a_panel_states():
    base = result_of("base", [0.9, 0.8, 0.7])
    ahead, behind = result_of("sam", [0.95, 0.85, 0.76]), result_of("looksam", [0.9, 0.7, 0.8])
    text = digits.claim([base, ahead, behind], 0.3)
    wanted = "30% of the training labels wrong: 1 of 2 ahead of base, sam by +5.33 ± 0.33"
    assert text == wanted


def test_digits_by_default_leaves_out_what_cannot_have_the_base(in_empty_folder):
    def chosen(*argv):
        args = digits.parse([*argv])
        digits.check_variants(args)
        return args.variants

    assert chosen() == [*digits.DEFAULT]
    assert chosen("--base", "sgd") == [*digits.DEFAULT[:-1]]
    assert chosen("--variants", "all") == [*digits.ROWS]
    few = chosen("--base", "sgd", "--variants", "all")
    assert few == [row for row in digits.ROWS if row != "momentum-sam"]


@pytest.mark.slow
def test_digits_learns(in_empty_folder):
    (result,) = digits.main(
        ["--variants", "base", "--seeds", "2", "--epochs", "10", "--width", "32", "--noise", "0"]
    )
    assert np.mean(result["test_accuracy"]) > 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seeds 0", "--seeds must be at least 1, got 0"),
        ("--epochs -1", "--epochs must be at least 1, got -1"),
        ("--width 0", "--width must be at least 1, got 0"),
        ("--noise 1.5", r"--noise must be in \[0, 1\), got 1.5"),
        ("--noise nan", "--noise must be in"),
        ("--rho -0.1", "--rho must be finite and at least 0"),
        ("--monitor -1", "--monitor must be at least 0, got -1"),
        ("--rho nan", "--rho must be finite and at least 0"),
        ("--base adagrad", "adagrad.*momentum"),
        ("--base sgd --variants sam momentum-sam", "momentum_sam: `base` must have one momentum"),
        ("--variants sam sammy", "sammy.*choose from.*sampa"),
        ("--out taken", "taken.*not empty"),
    ],
)
def test_bad_arguments(arguments, message, refusal):
    assert re.search(message, refusal(digits.main, arguments))
