"""Faults of workers, of saves and of the driver: each is named, and nothing hangs or is lost."""

import json

import pytest

from examples.asynchronous.faults import cases_of, main, measure

SAMPLE = {
    "NaN in one weight",
    "NaN once, then a restart",
    "weights of 1e+30",
    "a loss of NaN, finite parameters",
    "weights of shape [1]",
    "parameters in a list",
    "a worker with another structure of the same size",
    "SystemExit('0')",
    "StopIteration('')",
    "Unprintable('?')",
    "in make_worker",
    "two results",
    "a loss that is None",
    "until the end",
    "no space left, at first",
    "SIGTERM to driver",
}
WAITS = ("hangs", "in make_worker")  # for seconds; "until the end" hangs too


def is_slow(case):
    return case.name not in SAMPLE or (case.kind, case.name) == WAITS


CASES = [
    pytest.param(
        case, id=f"{case.kind} {case.name}", marks=[pytest.mark.slow] if is_slow(case) else []
    )
    for case in cases_of(["threads"])
]


def test_the_sample_exists():
    assert {case.name for case in cases_of(["threads"])} >= SAMPLE


@pytest.mark.parametrize("case", CASES)
def test_fault(case, tmp_path):
    assert measure(case, tmp_path, 60.0)["problems"] == []


@pytest.mark.slow
@pytest.mark.parametrize("target", ["_ray_cluster", "gcs_server", "raylet/raylet"])
def test_a_killed_server_of_ray(target, tmp_path):
    [case] = [c for c in cases_of(["ray"]) if c.name == f"SIGKILL to {target}"]
    assert measure(case, tmp_path, 90.0)["problems"] == []


def test_a_run_that_goes_wrong_is_seen(tmp_path):
    """The checks can fail: here nothing goes wrong in the worker, so nothing is named."""
    [case] = [c for c in cases_of(["threads"]) if c.name == "NaN in one weight"]
    fault = case.run.args[0]._replace(change=lambda worker: worker)
    [problem] = measure(
        case._replace(run=lambda folder: case.run.func(fault, "threads", folder)), tmp_path, 60.0
    )["problems"]
    assert problem == "named as 'no work is left'"


def test_a_tiny_run(tmp_path, capsys):
    out = tmp_path / "out"
    rows = main(
        ["--engine", "threads", "--only", "streams of one", "streams short", "--out", f"{out}"]
    )
    assert [row["name"] for row in rows] == ["of one batch", "short"]
    assert json.loads((out / "results.json").read_text())["rows"] == rows
    assert (out / "faults.png").stat().st_size > 5000
    assert "2 faults, 0 failed" in capsys.readouterr().out


def test_a_failure_is_told(tmp_path, capsys, monkeypatch):
    """The exit code says it too."""
    monkeypatch.setattr("examples.asynchronous.faults.problems_of", lambda *_: ["nothing learned"])
    with pytest.raises(SystemExit, match=r"faults.py: 1 of 1 faults failed"):
        main(["--engine", "threads", "--only", "streams short", "--out", f"{tmp_path / 'out'}"])
    assert "failed: nothing learned" in capsys.readouterr().out
