"""The CIFAR example: every variant, every option, killed runs, and rejected input."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from examples.common import monitoring
from examples.common.files import SaveError
from examples.common.programs import peak_bytes
from examples.train import cifar, loop
from examples.train.cifar_data import load, write_digits

TINY = {"resnet18": "--width 8", "vit": "--width 8 --depth 2"}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture
def run(archive, tmp_path, monkeypatch):
    """Run the example in an empty folder, in this process, on one device."""
    monkeypatch.chdir(tmp_path)

    def run(arguments):
        return cifar.main(["--data", str(archive), "--devices", "1", *arguments.split()])

    return run


def read(folder, kind):
    rows = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == kind]


def tiny(model):
    return f"--model {model} {TINY[model]} --images 40 --batch 20 --epochs 2"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options"),
    [
        (
            "vit",
            "--precision bfloat16 --accumulate 2 --schedule step --label-smoothing 0.1"
            " --base momentum",
        ),
        # Their epochs with a teacher begin with the seventh.
        ("resnet18", "--variant saf --epochs 8"),
        ("resnet18", "--variant mesa --epochs 8 --accumulate 2"),
        (  # a variant without a base
            "vit",
            "--variant lightsam-norm --precision float16 --schedule constant --augment none",
        ),
    ],
)
def test_options(model, options, run):
    results = run(f"{tiny(model)} {options} --out run")
    assert np.isfinite(results["test"]["loss"])
    assert len(results["test"]["accuracy_by_class"]) == 10
    rates = [row["learning_rate"] for row in read("run", "step")]
    if "step" in options:
        np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.001], rtol=1e-6)


@pytest.mark.slow
def test_several_devices_are_one(run):
    losses = []
    for devices in (1, 2):
        run(f"{tiny('vit')} --learning-rate 1e-3 --devices {devices} --out {devices}")
        losses.append([row["loss"] for row in read(str(devices), "step")])
    one, two = np.asarray(losses)
    assert one[0] != one[1]
    np.testing.assert_allclose(two[:2], one[:2], rtol=1e-5)  # later, float32 rounding adds up


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("resnet18", "--width 8 --epochs 8 --learning-rate 0.05"),
    ],
)
def test_fits_128_images(model, options, run):
    results = run(
        f"--model {model} {options} --images 128 --batch 16 --augment none --out run"
        " --checkpoint-every 1000"  # only the last checkpoint; the default saves one per epoch
    )
    assert results["train"]["accuracy"] > 0.99
    assert read("run", "step")[-1]["sharp_loss"] > read("run", "step")[-1]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet18"])
def test_a_step_at_batch_64_fits_in_4_gb(model, archive):
    variant = "--variant sampa-separate"  # the variant that needs most memory
    args = cifar.parse(f"--data {archive} --model {model} {variant} --rho 0.1 --batch 64".split())
    data = cifar.load_data(args)
    mesh = jax.make_mesh(
        (1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:1]
    )
    batch = next(cifar.train_batches(data.train, 64, seed=0, augment="none"))
    batch = jax.device_put(batch, cifar.NamedSharding(mesh, cifar.P("data")))
    state, shardings = cifar.make_state(args, data, batch, loop.make_schedule(args, 10), mesh)
    wanted = {"resnet18": 11.17, "vit": 2.69}[model]
    assert cifar.describe(state.params) == f"{wanted} million parameters"
    if model == "resnet18":  # needs more memory than the ViT
        program = cifar.compile_step(args, state, shardings, batch, 10)
        assert 0.05 < peak_bytes(program) / 1e9 < 4


def assert_close(results, others):
    """Compare the numbers of an evaluation; speeds differ."""
    assert results.keys() == others.keys()
    for name, value in results.items():
        if name not in ("images_per_second", "kind"):
            np.testing.assert_allclose(others[name], value, rtol=1e-5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cheap_measure):
    """A run on digits of which some labels are wrong and some classes small, with defaults.

    It returns the folder where it was started, its results, and what it printed.
    """
    folder = tmp_path_factory.mktemp("finished")
    arguments = f"--digits {tiny('vit')} --depth 1 --devices 1 --variant sampa"
    arguments += " --images 200 --label-noise 0.2 --imbalance 100 --monitor 3"
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(monitoring, "measure", cheap_measure)
        results = cifar.main(arguments.split())
    return folder, results, out.getvalue(), err.getvalue()


def test_a_tiny_run(finished):
    folder, results, out, err = finished
    assert (folder / "runs" / "digits" / "cifar-10-python.tar.gz").exists()
    folder = folder / "runs" / "cifar-001"
    steps, epochs = read(folder, "step"), read(folder, "epoch")
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert [row["step"] for row in epochs] == [2, 4]
    assert all(np.isfinite(row["loss"]) for row in steps)
    assert results["gradients"] == 8
    assert steps[0]["grad_norm"] == 0  # SAMPa's g_y starts at 0
    assert any(row["grad_norm"] > 0 for row in steps)
    measured = [row for row in steps if "top_eigenvalue" in row]
    assert [row["step"] for row in measured] == [1, 4]
    assert results["monitored"] == {name: measured[-1][name] for name in results["monitored"]}
    assert 0 <= results["test"]["accuracy"] <= 1
    assert len(results["test"]["accuracy_by_class"]) == 10
    assert json.loads((folder / "results.json").read_text()) == results
    assert (folder / "curves.png").stat().st_size > 10_000
    (events,) = (folder / "tensorboard").iterdir()
    for text in (b"step/loss", b"step/top_eigenvalue", b"step/rise"):
        assert text in events.read_bytes()
    for text in (r"images/s  top eigenvalue [\d.]+$", r"^step 4: top eigenvalue .*error at most"):
        assert re.search(text, out, re.MULTILINE)
    for text in ("training images", "GB on each device", "test accuracy", "results.json"):
        assert text in out
    assert "images/s" not in err  # the progress line is for terminals


def test_label_noise_and_imbalance(archive):
    clean = load(archive).train
    args = cifar.parse(f"--data {archive} --label-noise 0.2 --imbalance 100".split())
    train = cifar.load_data(args).train
    counts = np.bincount(train.label, minlength=10)
    assert len(train.label) < len(clean.label) / 2
    assert counts.max() > 20 * counts.min()


def test_a_finished_run_stays_finished(finished, monkeypatch, cheap_measure):
    """The parameters are those of the checkpoint, to the last bit. Their loss is another matter.

    It is evaluated by a program that is compiled again, so it may differ by rounding.
    """
    folder, results, *_ = finished
    monkeypatch.chdir(folder)
    monkeypatch.setattr(cifar, "draw", lambda *args: None)  # drawn once is enough
    monkeypatch.setattr(monitoring, "measure", cheap_measure)
    again = cifar.main(["--resume", "runs/cifar-001", "--devices", "1"])
    assert again.keys() == results.keys()
    assert again["state_sha256"] == results["state_sha256"]
    for name in ("steps", "gradients", "skipped_steps", "images_per_second", "monitored"):
        assert again[name] == results[name]
    for part in ("train", "test"):
        assert_close(results[part], again[part])


@pytest.mark.slow
def test_a_disk_that_is_full_for_the_last_checkpoint(
    run, monkeypatch, file_size_limit, capfd, cheap_measure
):
    """Training goes on. The end says what is missing, and the run can be resumed."""
    save, told = loop.Checkpoints.save, []

    def full(checkpoints, step, *args):
        told.append(capfd.readouterr().err)  # the limit counts for the file of this text too
        with file_size_limit(1000) if step > 2 else contextlib.nullcontext():
            save(checkpoints, step, *args)
            checkpoints._wait()

    options = f"{tiny('vit')} --depth 1 --variant base --checkpoint-every 1 --monitor 2"
    monkeypatch.setattr(monitoring, "measure", cheap_measure)
    monkeypatch.setattr(cifar, "draw", lambda *args: None)
    with monkeypatch.context() as then:
        then.setattr(loop.Checkpoints, "save", full)
        with pytest.raises(SystemExit) as stop:
            run(f"{options} --out run")
    wanted = "step 4 could not be written.*(File too large); kept: the checkpoint of step 2"
    wanted = wanted.replace("(", r"\(").replace(")", r"\)")
    assert re.fullmatch(f"cifar.py: error: the checkpoint of {wanted}", stop.value.code)
    told = "".join([*told, capfd.readouterr().err])
    assert told.count("could not be written") == 1
    assert "Traceback" not in told
    results = json.loads(Path("run/results.json").read_text())
    assert results["steps"] == 4
    again = run("--resume run")
    assert "resumed at step 2" in capfd.readouterr().out
    assert again["state_sha256"] == results["state_sha256"]
    steps = read("run", "step")
    assert [row["step"] for row in steps if "rise" in row] == [1, 3]
    for row in steps[::2]:  # measured on the batch of the step, at the parameters before it
        assert row["top_eigenvalue"] == pytest.approx(row["loss"], rel=1e-6)
    assert steps[0]["rise"] != steps[2]["rise"]

    rows = Path("run/metrics.jsonl").read_text()
    Path("run/metrics.jsonl").write_text(rows[3:])
    with pytest.raises(SystemExit, match=r"cifar.py: error: .*metrics.jsonl: line 1 is not a row"):
        run("--resume run")


def test_a_checkpoint_has_the_rows_before_it(run, monkeypatch):
    """Without space for metrics.jsonl, no checkpoint is written that would lack its rows."""

    def fail(log):
        if log.of("step"):
            raise SaveError("run/metrics.jsonl cannot be written (No space left on device)")

    monkeypatch.setattr(loop.Log, "flush", fail)
    monkeypatch.setattr(cifar, "draw", lambda *args: None)
    with pytest.raises(SystemExit, match=r"step 4 .*\(run/metrics.jsonl .*kept: no checkpoint$"):
        run(f"{tiny('vit')} --depth 1 --variant base --out run")


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--data is missing.*cs.toronto.edu.*--digits"),
        ("--data a --digits", "exclude each other"),
        ("--data nowhere.tar.gz", r"nowhere\.tar\.gz.*cs\.toronto\.edu"),
        ("--data {run}/config.json", "config.json"),
        ("--data {archive} --out {run}", "not empty"),
        ("--data {archive} --out {run}/config.json/run", "config.json"),
        ("--data {archive} --batch 30 --accumulate 4", "--batch must be a multiple of 4"),
        ("--data {archive} --monitor -1", "--monitor must be at least 0, got -1"),
        ("--data {archive} --batch 0", "--batch must be at least 1, got 0"),
        ("--data {archive} --label-noise 1.5", "--label-noise must be 0 to 0.999, got 1.5"),
        ("--data {archive} --imbalance 0.5", "--imbalance must be 1 to 1e.06, got 0.5"),
        ("--data {archive} --images 5000", r"\[1, 1500\], got 5000"),
        (
            "--data {archive} --images 10 --batch 20",
            "--batch must be at most 10, the training images, got 20",
        ),
        ("--data {archive} --variant samm", "samm.*sampa"),
        ("--resume nowhere", "--resume nowhere: there is no run"),
        ("--resume {run} --variant sam", "--variant: the run in .* has sampa, got sam"),
        ("--resume {run} --out elsewhere", "exclude each other"),
    ],
)
def test_refusals(arguments, message, finished, archive, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = finished[0] / "runs" / "cifar-001"
    before = contents(folder)
    words = arguments.format(run=folder, archive=archive).split()
    with pytest.raises(SystemExit) as stop:
        cifar.main([*words, "--devices", "1"])
    assert stop.value.code not in (0, None)
    text = capsys.readouterr().err + str(stop.value)
    assert re.search(message, " ".join(text.split()))
    assert contents(folder) == before
    assert not list(tmp_path.iterdir())


def test_other_data_or_another_checkpoint_is_refused(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(finished[0])
    folder = tmp_path / "copy"
    shutil.copytree(finished[0] / "runs" / "cifar-001", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"data_sha256": "0"}))
    with pytest.raises(SystemExit, match=r"is not the data of the run in .*copy"):
        cifar.main(["--resume", str(folder), "--devices", "1"])
    config["settings"] |= {"variant": "base", "monitor": 0}  # a program that compiles fast
    (folder / "config.json").write_text(json.dumps(config))
    before = contents(folder)
    with pytest.raises(SystemExit, match="another model, variant"):
        cifar.main(["--resume", str(folder), "--devices", "1"])
    assert contents(folder) == before
