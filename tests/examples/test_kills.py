"""The kill script: a run is really killed and resumed, and every kind of loss is found."""

import json

import pytest

from examples.train import kills


def test_a_tiny_run(in_empty_folder, read_report, capsys):
    """One kill, while a checkpoint is being written; the script itself compares to the last bit."""
    [row] = kills.main(["--targets", "async", "--kills", "1", "--out", "run"])
    assert row["lost"] == []
    [killed] = row["kills"]
    assert killed["kind"] == "saving"
    assert killed["step"] >= kills.SAVED_EVERY
    assert read_report(in_empty_folder / "run")["results"] == [row]
    log = (in_empty_folder / "run" / "async-killed.log").read_text()
    assert f"resumed at step {killed['step']}" in log
    assert "async" in capsys.readouterr().out
    # A change in the folder of the killed run is a loss.
    folders = [in_empty_folder / "run" / f"async-{name}" for name in ("undisturbed", "killed")]
    results = json.loads((folders[1] / "results.json").read_text())
    assert len(results["losses"]) == kills.STEPS_PER_KILL
    results["losses"][7] += 1e-7
    (folders[1] / "results.json").write_text(json.dumps(results))
    assert kills.compare_async(*folders)[1] == ["losses differ"]


@pytest.mark.slow
def test_every_target(in_empty_folder):
    rows = kills.main(["--kills", "3", "--out", "run"])
    assert [row["target"] for row in rows] == list(kills.TARGETS)
    assert all(len(row["kills"]) == 3 for row in rows)


def write(folder, **contents):
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(contents))
    return folder


def test_a_changed_state_or_row_is_a_loss(tmp_path):
    folders = [write(tmp_path / name, state_sha256="12") for name in ("one", "other")]
    row = {"kind": "epoch", "step": 1, "loss": 0.5}
    for folder, speed in zip(folders, (3, 4), strict=True):
        text = json.dumps(row | {"images_per_second": speed})
        (folder / "metrics.jsonl").write_text(f"{text}\n")
    assert kills.compare_cifar(*folders) == ("sha256 12, 1 equal rows", [])
    (folders[1] / "metrics.jsonl").write_text(json.dumps(row | {"loss": 0.6}) + "\n")
    (folders[1] / "results.json").write_text('{"state_sha256": "13"}')
    lost = ["the final states differ", "metrics.jsonl differs"]
    assert kills.compare_cifar(*folders)[1] == lost


@pytest.mark.parametrize(
    ("exchanges", "accuracy", "lost"),
    [
        (100, 0.75, []),
        (99, 0.8, ["99 of 100 exchanges were made"]),
        (100, 0.6, ["the accuracies 0.800 and 0.600 differ"]),
    ],
)
def test_a_missing_exchange_or_accuracy_is_a_loss(exchanges, accuracy, lost, tmp_path):
    one, other = (
        write(
            tmp_path / name,
            results=[{"row": "lsam", "exchanges": count, "test_accuracy": [of]}],
        )
        for name, count, of in (("one", 100, 0.8), ("other", exchanges, accuracy))
    )
    assert kills.compare_lsam(one, other)[1] == lost


class Stopped:
    """A process that has ended, and the checkpoints that it found."""

    def __init__(self, before, has_saved):
        self.before, self.has_saved = before, lambda: has_saved


@pytest.mark.parametrize(
    ("said", "before", "has_saved", "is_whole", "is_lost"),
    [
        ("resumed at step 30", 30, True, False, False),
        ("continues after exchange 30 of 99", 30, False, True, False),
        ("resumed at step 25", 30, False, False, True),
        ("", 30, False, False, False),  # killed before it said so
        ("", 30, True, False, True),
        ("", 30, False, True, True),
        ("", None, True, True, False),
    ],
)
def test_a_run_that_starts_over_is_a_loss(said, before, has_saved, is_whole, is_lost):
    process = Stopped(before, has_saved)
    assert bool(kills.lost_by(process, said, is_whole)) == is_lost


def test_a_loss_fails_the_script(in_empty_folder, monkeypatch, capsys):
    def measure(name, args, bar):
        kill = kills.Killed("start", 1.0, 5, False)
        lost = ["the final states differ"]
        row = {"target": name, "kills": [kill._asdict()], "seconds": 3.0}
        return row | {"result": "equal", "lost": lost}

    monkeypatch.setattr(kills, "measure", measure)
    with pytest.raises(SystemExit, match=r"kills.py: 1 losses"):
        kills.main(["--targets", "cifar"])
    assert "LOST: the final states differ" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", ["--kills 0", "--targets digits", "--seed -1"])
def test_nonsense_is_refused(arguments, refusal):
    refusal(kills.main, f"{arguments} --out new")


def test_a_process_that_is_left_is_found(monkeypatch):
    monkeypatch.setattr(kills, "RAY_PATIENCE", 0)
    with kills.surroundings() as (environment, left_behind):
        process = kills.subprocess.Popen(["sleep", "60"], env=environment)
        try:
            assert left_behind() == [f"process {process.pid} is left: sleep"]
        finally:
            process.kill()
            process.wait()
        assert left_behind() == []
