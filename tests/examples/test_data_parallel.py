"""The example on several devices: every strategy takes the same steps."""

import re

import numpy as np
import pytest

from examples.devices import data_parallel

pytestmark = pytest.mark.usefixtures("in_empty_folder")


def train(arguments):
    """Train two epochs in float64, in this process."""
    return data_parallel.main(["--float64", "--epochs", "2", *arguments.split()])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "strategies"),
    [
        ("", "jit pmap shard_map"),
        ("--variant base --base adamw --devices 4", "jit pmap shard_map"),
        ("--variant asam --ascent local", "pmap shard_map"),
        ("--variant sampa --pair", "jit shard_map"),
        ("--variant sampa --pair --devices 2", "jit pmap shard_map"),
    ],
)
def test_strategies_give_the_same_curve(
    arguments, strategies, in_empty_folder, capsys, read_report
):
    strategies = strategies.split()
    results = train(f"{arguments} --out out")
    assert [result["strategy"] for result in results] == strategies
    assert data_parallel.largest_difference(results) < 1e-12
    first = results[0]
    assert first["loss_by_epoch"][1] < first["loss_by_epoch"][0]
    for result in results:
        # One of the 500 images may lie so close to a border that rounding decides.
        wanted = pytest.approx(first["test_accuracy_by_epoch"], abs=1 / 500)
        assert result["test_accuracy_by_epoch"] == wanted
        assert result["steps_per_second"] > 0

    report = read_report(in_empty_folder / "out")
    assert report["results"] == results
    assert (in_empty_folder / "out" / "data_parallel.png").stat().st_size > 10_000
    with np.load("out/params.npz") as params:
        for name in params:
            assert params[name].dtype == np.float64
            other = params[f"{strategies[0]}/{name.split('/', 1)[1]}"]
            np.testing.assert_allclose(params[name], other, rtol=0, atol=1e-12)
    printed = capsys.readouterr().out
    for text in (*strategies, "training loss", "largest difference", "results.json", "simulated"):
        assert text in printed


def test_a_tiny_run_whose_curves_differ_by_rounding(in_empty_folder, capsys, read_report):
    arguments = "--epochs 1 --batch 500 --devices 2 --strategy jit shard_map --out out"
    results = data_parallel.main(arguments.split())
    assert [result["strategy"] for result in results] == ["jit", "shard_map"]
    assert data_parallel.largest_difference(results) < 1e-4
    assert read_report(in_empty_folder / "out")["results"] == results
    assert (in_empty_folder / "out" / "data_parallel.png").stat().st_size > 10_000
    assert "largest difference between the loss curves" in capsys.readouterr().out


def test_without_pmap_the_others_run(capsys, monkeypatch):
    """A later JAX may drop it."""
    monkeypatch.delattr(data_parallel.jax, "pmap", raising=False)
    monkeypatch.setattr(data_parallel, "draw", lambda *args: None)
    arguments = "--epochs 1 --batch 500 --devices 2 --out out"
    results = data_parallel.main(arguments.split())
    assert [result["strategy"] for result in results] == ["jit", "shard_map"]
    assert re.search("pmap is left out: jax .* has no jax.pmap", capsys.readouterr().out)


def test_without_pmap_it_is_refused(monkeypatch, refusal):
    monkeypatch.delattr(data_parallel.jax, "pmap", raising=False)
    message = refusal(data_parallel.main, "--strategy jit pmap")
    assert re.search("--strategy pmap: jax .* has no jax.pmap", message)


@pytest.mark.parametrize(
    ("first", "second", "differ"),
    [
        # It does not matter which device computes it.
        ("--variant sampa", "--variant sampa --pair", False),
        ("", "--ascent local", True),
    ],
)
def test_what_changes_the_curve(first, second, differ, monkeypatch):
    monkeypatch.setattr(data_parallel, "draw", lambda *args: None)
    (one,), (other,) = (
        train(f"--epochs 1 --devices 2 {args} --strategy shard_map") for args in (first, second)
    )
    difference = np.abs(np.subtract(one["loss"], other["loss"])).max()
    assert difference > 1e-4 if differ else difference < 1e-12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--strategy jit xmap", "xmap.*choose from.*shard_map"),
        ("--variant sammy", "sammy.*choose from.*sampa"),
        ("--base adagrad", "adagrad.*momentum"),
        ("--epochs 0", "--epochs must be at least 1, got 0"),
        ("--batch 0", "--batch must be 1 to 1000, got 0"),
        ("--batch 2000", "--batch must be 1 to 1000, got 2000"),
        ("--batch 100", "--batch must be a multiple of 8, .* got 100"),
        ("--devices 0", "--devices must be at least 1, got 0"),
        ("--devices 1000", "--devices must be at most 8 in process 0, got 1000"),
        ("--seed -1", "--seed must be 0 to 2147483647, got -1"),
        ("--rho nan", "--rho must be finite and at least 0, got nan"),
        ("--learning-rate 0", "--learning-rate must be finite and above 0, got 0"),
        ("--ascent local --strategy jit", "--ascent local needs .* shard_map, not jit"),
        ("--pair", "--pair is for --variant sampa.* not sam"),
        ("--variant sampa --pair --devices 3", "--pair needs an even number .* got 3"),
        ("--variant sampa --pair --strategy pmap", "--pair with --strategy pmap needs 2 .* got 8"),
        ("--variant momentum-sam --base sgd", "`base` must have one momentum"),
        ("--process-id 0", "--coordinator, --num-processes and --process-id go together"),
        ("--coordinator here --num-processes 2 --process-id 0", "must be HOST:PORT, got here"),
        (
            "--coordinator a:1 --num-processes 2 --process-id 2",
            "--process-id must be 0 to 1, got 2",
        ),
        ("--out taken", "taken is not empty"),
    ],
)
def test_bad_arguments(arguments, message, refusal):
    assert re.search(message, refusal(data_parallel.main, arguments))
