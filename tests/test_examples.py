"""Every example runs, writes what it says, and refuses nonsense before it does anything."""

import json
import re

import digits
import numpy as np
import pytest
import step_cost
from output import free_folder
from registry import BASES, VARIANTS

TINY = ["--seeds", "2", "--epochs", "1", "--width", "4"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_digits_runs_every_variant(in_empty_folder, capsys):
    results = digits.main([*TINY, "--rho", "0.1", "--out", "results"])
    report = json.loads((in_empty_folder / "results" / "results.json").read_text())
    assert [r["row"] for r in report["results"]] == [r["row"] for r in results]
    assert {(r["row"], r["noise"]) for r in results} == {
        (row, noise) for row in digits.ROWS for noise in (0.3, 0.0)
    }
    for result in results:
        variant, times = digits.ROWS[result["row"]]
        steps = times * digits.STEPS_PER_EPOCH
        assert result["gradients"] == steps * VARIANTS[variant].gradients
        assert len(result["test_accuracy"]) == 2
        assert len(result["test_accuracy_by_epoch"]) == times
        assert result["rho"] == (0.0 if variant == "base" else 0.1)
        assert result["seconds_per_step"] > 0
    assert (in_empty_folder / "results" / "digits.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    for text in ("device:", "standard error", "test acc", "loss increase", "results.json", "cpu"):
        assert text in printed
    for row in digits.ROWS:
        assert row in printed


@pytest.mark.parametrize("base", BASES)
def test_digits_takes_every_base(base):
    (result,) = digits.main([*TINY, "--variants", "sam", "--base", base, "--noise", "0"])
    assert np.isfinite(result["loss_increase"]).all()


def test_digits_learns():
    (result,) = digits.main(
        ["--variants", "base", "--seeds", "2", "--epochs", "10", "--width", "32", "--noise", "0"]
    )
    assert np.mean(result["test_accuracy"]) > 0.9


def test_flipped_labels_are_wrong_and_only_in_training():
    seed = np.array([3])
    clean, noisy = (
        [{k: v[0] for k, v in part.items()} for part in digits.split(seed, noise)]
        for noise in (0.0, 0.3)
    )
    assert int((clean[0]["y"] != noisy[0]["y"]).sum()) == 0.3 * digits.TRAIN
    for part in (1, 2):
        np.testing.assert_array_equal(clean[part]["y"], noisy[part]["y"])
    assert [len(part["y"]) for part in clean] == [digits.TRAIN, digits.VALIDATION, 500]


BAD_ARGUMENTS = {
    digits: [
        ("--seeds 0", "--seeds must be at least 1, got 0"),
        ("--epochs -1", "--epochs must be at least 1, got -1"),
        ("--width 0", "--width must be at least 1, got 0"),
        ("--noise 1.5", r"--noise must be in \[0, 1\), got 1.5"),
        ("--noise nan", "--noise must be in"),
        ("--rho -0.1", "--rho must be finite and at least 0"),
        ("--rho nan", "--rho must be finite and at least 0"),
        ("--base adagrad", "adagrad.*momentum"),
    ],
    step_cost: [
        ("--repeats 0", "--repeats"),
        ("--batch 0", "--batch"),
        ("--models transformer", "transformer.*dense"),
    ],
}
for _rows in BAD_ARGUMENTS.values():
    _rows += [
        ("--variants sam sammy", "sammy.*choose from.*sampa"),
        ("--out taken", "taken.*not empty"),
    ]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [(script, *row) for script, rows in BAD_ARGUMENTS.items() for row in rows],
)
def test_bad_arguments(script, arguments, message, in_empty_folder, capsys):
    (in_empty_folder / "taken").mkdir()
    (in_empty_folder / "taken" / "results.json").write_text("precious")
    with pytest.raises(SystemExit) as stop:
        script.main(arguments.split())
    assert stop.value.code == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert (in_empty_folder / "taken" / "results.json").read_text() == "precious"
    assert not (in_empty_folder / "runs").exists()


def test_step_cost_measures_every_variant(in_empty_folder, capsys):
    step_cost.main(["--models", "dense", "--batch", "8", "--repeats", "1", "--out", "cost"])
    assert (in_empty_folder / "cost" / "step_cost.png").stat().st_size > 10_000
    report = json.loads((in_empty_folder / "cost" / "results.json").read_text())
    assert report
    printed = capsys.readouterr().out
    for row in ("plain", "sam by hand", "optax.contrib.sam", *set(VARIANTS) - {"base"}):
        assert row in printed


def test_free_folder_never_overwrites(in_empty_folder):
    first, second = free_folder(None, "digits"), free_folder(None, "digits")
    assert (first.name, second.name) == ("digits-001", "digits-002")
    assert free_folder("new/deep", "digits").is_dir()
    (in_empty_folder / "file").write_text("")
    with pytest.raises(ValueError, match="not a folder"):
        free_folder("file", "digits")
