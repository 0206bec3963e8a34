"""The main example: a run of every kind of variant, its defaults, and what it refuses."""

import re

import numpy as np
import pytest

from examples import digits
from examples.common import training
from examples.common.digits_task import LEARNING_RATES, STEPS_PER_EPOCH
from examples.common.registry import VARIANTS

TINY = ["--seeds", "2", "--epochs", "1", "--width", "4", "--noise", "0"]
SOME = ["base2x", "sam", "ae-sam", "lightsam-norm"]  # one of each kind


def test_a_tiny_run_of_every_kind_of_variant(in_empty_folder, capsys, read_report, monkeypatch):
    """Every stage has the same number of runs, which saves compilation."""
    for module in (digits, training):
        monkeypatch.setattr(module, "TUNING_SEEDS", range(1000, 1001))
    monkeypatch.setattr(training, "TIMED_STEPS", 5)
    timed, seconds = training.seconds_per_step, []  # one row is timed, which saves compilation

    def seconds_per_step(*args):
        seconds.append(seconds[0] if seconds else timed(*args))
        return seconds[-1]

    monkeypatch.setattr(training, "seconds_per_step", seconds_per_step)
    monkeypatch.setitem(LEARNING_RATES, "adamw", (1e-3, 1e-2))
    light = VARIANTS["lightsam-norm"]._replace(learning_rates=(1.0, 10.0))
    monkeypatch.setitem(VARIANTS, "lightsam-norm", light)
    tiny = [*TINY, "--base", "adamw"]
    results = digits.main([*tiny, "--variants", *SOME, "--rho", "0.1", "--out", "results"])
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
    assert (in_empty_folder / "results" / "digits.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    for text in ("device:", "standard error", "test acc", "loss increase", "results.json", "cpu"):
        assert text in printed
    for row in SOME:
        assert row in printed


def test_digits_by_default_leaves_out_what_cannot_have_the_base(in_empty_folder):
    for base, wanted in (("momentum", digits.DEFAULT), ("sgd", digits.DEFAULT[:-1])):
        args = digits.parse(["--base", base])
        digits.check_variants(args)
        assert args.variants == [*wanted]


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
        ("--rho nan", "--rho must be finite and at least 0"),
        ("--base adagrad", "adagrad.*momentum"),
        ("--base sgd --variants sam momentum-sam", "momentum_sam: `base` must have one momentum"),
        ("--variants sam sammy", "sammy.*choose from.*sampa"),
        ("--out taken", "taken.*not empty"),
    ],
)
def test_bad_arguments(arguments, message, refusal):
    assert re.search(message, refusal(digits.main, arguments))
