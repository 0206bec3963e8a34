"""The LSAM example: what the clock allows, what is saved, and whether the report is right."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from examples.claims import lsam_digits as example
from examples.common.checkpoints import CheckpointError, Checkpoints
from examples.common.digits_task import TRAIN
from examples.common.tuning import Runs, runs_of
from samx import elastic


def test_streams_are_whole_epochs_of_each_worker_and_go_on_anywhere():
    args = example.make_parser().parse_args(["--batch", "250"])
    runs = Runs(*runs_of([3, 4], [(0.1, 0.2)]))
    position = np.arange(TRAIN, dtype=np.float32)
    images = {"x": np.stack([position, position + 5000])[..., None], "y": np.zeros((2, 1000))}

    def numbers(worker, step, count):
        batches = itertools.islice(example.stream(images, runs, args, worker, step), count)
        return np.stack([np.asarray(batch["x"])[..., 0] for batch in batches])

    first = numbers(0, 0, 8)
    assert first.shape == (8, 2, 250)
    for epoch in (first[:4], first[4:]):
        for seed in (0, 1):
            np.testing.assert_array_equal(
                np.sort(epoch[:, seed], axis=None), images["x"][seed, :, 0]
            )
    np.testing.assert_array_equal(numbers(0, 3, 4), first[3:7])
    for other in (first[4:], numbers(1, 0, 4), first[:4, ::-1] + [[[5000], [-5000]]]):
        assert (other != first[:4]).mean() > 0.9
    together = np.asarray(next(example.batches_together(images, runs, args, 2))["x"])[..., 0]
    np.testing.assert_array_equal(together[:, 0::2], first[0])  # mSAM's microbatches
    np.testing.assert_array_equal(together[:, 1::2], numbers(1, 0, 1)[0])


def test_a_tiny_run(in_empty_folder, monkeypatch, capsys, read_report):
    """Every stage has two runs, which saves compilation. The expected times are counted by hand."""
    monkeypatch.setattr(example, "TUNING_SEEDS", range(1000, 1001))
    arguments = "--workers 2 --slow 4 --latency 0 --period 2 --batch 50 --gradients 65 --width 32"
    arguments += " --seeds 2 --learning-rate 1e-4 0.3 --rho 0.02 --out results"
    results = example.main(arguments.split())
    report = read_report(in_empty_folder / "results")
    assert [row["row"] for row in report["results"]] == list(example.ROWS)
    assert report["settings"]["gradients"] == 64
    rows = {row["row"]: row for row in results}
    spent = {name: (row["gradients"], row["time"]) for name, row in rows.items()}
    assert spent == {
        "dp-sam": (64, 128),
        "dp-sam, same time": (24, 48),
        "dp-sam, own ascent": (64, 128),
        "lsam": (64, 52),
        "easgd": (64, 52),
        "sam, one worker": (64, 64),
    }
    lsam = rows["lsam"]
    assert (lsam["exchanges"], lsam["steps"]) == (17, [26, 6])
    np.testing.assert_allclose(lsam["mean_staleness"], [3 / 13, 3])
    assert lsam["largest_staleness"] == 4
    assert lsam["share_of_speed"] == pytest.approx(64 / 52 / 1.25)
    assert lsam["share_of_speed"] >= 0.9
    assert rows["dp-sam"]["share_of_speed"] == pytest.approx(0.4)
    for name, row in rows.items():
        curve = row["curve"]
        assert row["learning_rate"] == 0.3  # the other rate learns nothing
        assert row["rho"] == (0 if name == "easgd" else 0.02)
        assert np.shape(curve["test_accuracy"]) == (len(curve["time"]), 2)
        steps = {"dp-sam": 16, "dp-sam, own ascent": 16, "dp-sam, same time": 6}
        assert len(curve["time"]) == min(example.EVALUATIONS, steps.get(name, 99))
        assert curve["test_accuracy"][-1] == row["test_accuracy"]
        assert min(row["test_accuracy"]) > (0.15 if name == "dp-sam, same time" else 0.35)
        assert np.max(curve["test_accuracy"][0]) < np.min(row["test_accuracy"])
    accuracies = np.subtract(lsam["test_accuracy"], rows["easgd"]["test_accuracy"])
    [difference] = [found for found in report["differences"] if found["row"] == "easgd"]
    assert difference["difference"] == pytest.approx(100 * accuracies.mean())
    assert (in_empty_folder / "results" / "lsam_digits.png").stat().st_size > 20_000
    printed = capsys.readouterr().out
    for text in ("lsam: 17 exchanges", "equal gradients", "equal time", "98%", "40%", "Plot:"):
        assert text in printed


@pytest.mark.slow
def test_threads_stop_and_go_on(in_empty_folder, monkeypatch, capsys, read_report):
    monkeypatch.setattr(example, "EVALUATE_EVERY", 0.05)
    show, seen = example.Bars.show, []

    def interrupt(bars, progress, accuracy):
        show(bars, progress, accuracy)
        seen.append(progress.exchanges)
        if progress.exchanges >= 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(example.Bars, "show", interrupt)
    arguments = "--engine threads --workers 2 --slow 2 --period 2 --batch 50 --gradients 400"
    arguments += " --width 16 --learning-rate 0.1 --rho 0.1 --out run"
    with pytest.raises(SystemExit, match="130"):
        example.main(arguments.split())
    assert "interrupted; continue with --resume run" in capsys.readouterr().err
    [checkpoint] = (in_empty_folder / "run" / "checkpoints").iterdir()
    assert seen[-1] <= int(checkpoint.name) < 100
    assert not (in_empty_folder / "run" / "results.json").exists()

    monkeypatch.setattr(example.Bars, "show", show)
    monkeypatch.setattr(example, "draw", lambda *args: None)
    monkeypatch.setattr(example, "EVALUATE_EVERY", 0.5)
    make_worker = example.make_worker

    def make_mortal(functions, runs, args, seconds, index):
        worker = make_worker(functions, runs, args, seconds, index)

        def batches(step):
            if step and index == 1:
                raise RuntimeError("no batch for worker 1")
            return worker.batches(step)

        return worker._replace(batches=batches)

    monkeypatch.setattr(example, "make_worker", make_mortal)
    with pytest.warns(RuntimeWarning, match="worker 1 .*no batch"):
        results = example.main(["--resume", "run", "--step-seconds", "0.001"])
    rows = {row["row"]: row for row in results}
    assert list(rows) == ["lsam", "dp-sam", "dp-sam, same time"]
    lsam = rows["lsam"]
    assert (lsam["exchanges"], lsam["gradients"], sum(lsam["steps"])) == (100, 400, 200)
    assert lsam["curve"]["gradients"][0] >= 4 * int(checkpoint.name)
    assert list(lsam["died"]) == [1]
    assert rows["dp-sam"]["gradients"] == 400
    assert rows["dp-sam, same time"]["gradients"] % 4 == 0
    for row in results:
        assert 0 < row["share_of_speed"] < 1.5
        assert row["time"] == row["curve"]["time"][-1] > 0
    for row in (lsam, rows["dp-sam"]):
        assert row["test_accuracy"][0] > 0.4
    report = read_report(in_empty_folder / "run")
    assert report["settings"]["step_seconds"] == 0.001
    printed = capsys.readouterr().out
    for text in (
        f"continues after exchange {checkpoint.name} of 100",
        "worker 1 died: RuntimeError: no batch",
    ):
        assert text in printed

    with monkeypatch.context() as killed:  # after the last exchange, before the results
        (in_empty_folder / "run" / "results.json").rename("kept.json")
        killed.setattr(example, "run_engine", interrupted)
        with pytest.raises(SystemExit, match="130"):
            example.main(["--resume", "run"])
        Path("kept.json").rename(in_empty_folder / "run" / "results.json")

    for arguments, message in (
        ("", "--resume run: the run is finished"),
        ("--batch 20", "--batch: the run in run has 50, got 20"),
        ("--engine simulate", "--resume is for --engine threads and ray"),
        ("--out other", "--out and --resume exclude each other"),
    ):
        with pytest.raises(SystemExit, match="2"):
            example.main(["--resume", "run", *arguments.split()])
        assert message in capsys.readouterr().err


def interrupted(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("params", "exchanges", "message"),
    [
        ([1.0, np.nan], [3, 4], r"center that has diverged: params\['w'\] holds 1 numbers"),
        ([1.0, np.inf], [3, 4], "center that has diverged"),
        ([1.0, 2.0], [3, 5], r"must hold 7 exchanges, got \[3, 5\]"),
        ([1.0, 2.0], [-1, 8], r"must hold 7 exchanges, got \[-1, 8\]"),
        ([1.0, 2.0], [3, 4, 0], "another model"),
        ([1.0, 2.0], [3, 4], None),
    ],
)
def test_a_center_that_cannot_be_used_is_refused(params, exchanges, message, tmp_path):
    like = {"w": np.zeros(2, np.float32)}
    state = {"params": {"w": np.float32(params)}, "exchanges": np.array(exchanges)}
    with Checkpoints(tmp_path, "lsam_digits.py") as checkpoints:
        assert example.restored(checkpoints, like, 2) == (None, 0.0)
        checkpoints.save(7, state | {"seconds": np.float64(5)})
        if message is None:
            checkpoint, seconds = example.restored(checkpoints, like, 2)
            assert (checkpoint.exchanges.tolist(), seconds) == (exchanges, 5)
        else:
            with pytest.raises(CheckpointError, match=rf"/7 .*{message}"):
                example.restored(checkpoints, like, 2)


def test_a_save_that_fails_says_what_is_kept(in_empty_folder, monkeypatch):
    def fail(args, devices, checkpoints):
        checkpoints.save(7, {"w": np.ones(2)})
        checkpoints.fail(8, OSError(28, "No space left on device"))
        return []

    monkeypatch.setattr(example, "run_engine", fail)
    monkeypatch.setattr(example, "conclude", lambda args, report, results: results)
    message = r"step 8 could not be written.*\(No space left on device\); kept: .* step 7$"
    with pytest.raises(SystemExit, match=message):
        example.main(["--engine", "threads", "--out", "run"])


def test_a_lost_center_is_told(in_empty_folder, monkeypatch):
    def lose(*args):
        raise elastic.CenterLost("the center is gone")

    monkeypatch.setattr(example, "run_engine", lose)
    with pytest.raises(SystemExit, match="the center is gone\ncontinue with --resume run"):
        example.main(["--engine", "threads", "--out", "run"])


def row(name, accuracies, **facts):
    curve = {"time": [1.0, 2.0], "gradients": [32, 64], "test_accuracy": [accuracies, accuracies]}
    numbers = {"learning_rate": 0.1, "rho": 0.2, "gradients": 64, "time": 16.0, "edges": []}
    numbers |= {"share_of_speed": 0.5, "test_accuracy": accuracies, "curve": curve}
    return {"row": name, **numbers, **facts}


def test_what_is_told_and_drawn(tmp_path):
    facts = {"exchanges": 8, "mean_staleness": [0.5, 1.5, 6.0], "largest_staleness": 7}
    args = example.make_parser().parse_args([])
    results = [row("lsam", [0.9, 0.8], **facts), row("dp-sam", [0.85, 0.73])]
    told = example.verdict(results, args).splitlines()
    assert told[0].endswith(
        "between two of a worker 1.0 of others, of the last worker 6.0, at most 7"
    )
    assert told[1:] == [
        "lsam - dp-sam, equal gradients: +6.00 ± 1.00 points (+6.0 standard errors)"
    ]
    wanted = ["lsam", "85.00", "±", "5.00", "64", "16.0", "4.00", "50%", "0.1", "0.2"]
    assert example.table(results, "g").splitlines()[2].split() == wanted
    results[0]["edges"] = ["rho"]
    lines = example.table(results, "g").splitlines()
    assert lines[2].split() == [*wanted[:-1], "0.2*"]
    assert lines[-1].startswith("*: at an edge")

    args.engine = "threads"
    facts["died"] = {1: "RuntimeError: no power\n\nTraceback"}
    facts["shortfall"] = "3 of 4 exchanges were made; all lights went out"
    results = [row("lsam", [0.9], **facts), row("dp-sam, same time", [0.85])]
    told = example.verdict(results, args).splitlines()[1:]
    assert told[:3] == [
        "lsam - dp-sam, same time, equal time: +5.00 points",
        "worker 1 died: RuntimeError: no power",
        "lsam did not train to its end: 3 of 4 exchanges were made; all lights went out",
    ]
    example.draw(results, tmp_path / "plot.png", "title", "seconds", True)
    assert (tmp_path / "plot.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--engine processes", "argument --engine: invalid choice"),
        ("--workers 1", "--workers must be at least 2"),
        ("--slow 0.5", "--slow must be 1 to"),
        ("--batch 1001", "--batch must be 1 to 1000, got 1001"),
        ("--period 0", "--period must be at least 1"),
        ("--beta 1.1", "--beta must be 0 to 1, got 1.1"),
        ("--latency nan", "--latency must be 0 to"),
        ("--noise 1", "--noise must be in [0, 1), got 1.0"),
        ("--seeds 0", "--seeds must be at least 1"),
        ("--gradients 63", "--gradients must be at least 64 (2 x workers x period), got 63"),
        ("--rho -1", "--rho must be finite"),
        ("--engine threads --rho 0.1 0.2", "--rho must be one number for --engine threads"),
        ("--step-seconds -1", "--step-seconds must be 0 to"),
        ("--resume full", "--resume full: there is no run to continue"),
        ("--resume begun", "--resume begun: config.json names no script"),
        ("--out full", "--out: full is not empty"),
    ],
)
def test_nonsense_is_refused_before_anything_is_done(arguments, message, in_empty_folder, capsys):
    for name in ("full/file", "begun/config.json"):
        (in_empty_folder / name).parent.mkdir()
        (in_empty_folder / name).write_text("{}")
    with pytest.raises(SystemExit):
        example.main(arguments.split())
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in in_empty_folder.iterdir()) == ["begun", "full"]


def test_ray_that_is_not_there(in_empty_folder, monkeypatch, capsys):
    def not_there():
        raise ImportError("samx.elastic.Ray needs Ray: pip install 'samx[ray]'")

    monkeypatch.setattr(elastic, "Ray", not_there)
    with pytest.raises(SystemExit):
        example.main(["--engine", "ray"])
    assert "--engine ray: samx.elastic.Ray needs Ray: pip install" in capsys.readouterr().err
