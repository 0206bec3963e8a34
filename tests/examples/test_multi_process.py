"""One run on several devices: every strategy, in one or several processes, takes the same steps."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from examples.devices import data_parallel, multi_process

pytestmark = pytest.mark.usefixtures("fast_compilation")
LONG = ["--epochs", "2000", "--strategy", "shard_map"]  # a run to be stopped early


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(arguments):
    """Train two epochs in float64, in this process."""
    return data_parallel.main([*arguments.split(), "--float64", "--epochs", "2"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "strategies"),
    [
        ("", ["jit", "pmap", "shard_map"]),
        ("--variant base --base adamw --devices 4", ["jit", "pmap", "shard_map"]),
        ("--variant asam --ascent local", ["pmap", "shard_map"]),
        ("--variant sampa --pair", ["jit", "shard_map"]),
        ("--variant sampa --pair --devices 2", ["jit", "pmap", "shard_map"]),
    ],
)
def test_strategies_give_the_same_curve(arguments, strategies, in_empty_folder, capsys):
    results = train(f"{arguments} --out out")
    assert [result["strategy"] for result in results] == strategies
    assert data_parallel.largest_difference(results) < 1e-12
    first = results[0]
    assert first["loss_by_epoch"][1] < first["loss_by_epoch"][0]
    for result in results:
        assert result["test_accuracy_by_epoch"] == first["test_accuracy_by_epoch"]
        assert result["steps_per_second"] > 0

    report = json.loads((in_empty_folder / "out" / "results.json").read_text())
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


def test_float32_curves_differ_by_rounding():
    results = data_parallel.main(["--epochs", "2"])
    assert data_parallel.largest_difference(results) < 1e-4


@pytest.mark.parametrize(
    ("first", "second", "differ"),
    [
        # It does not matter which device computes it.
        ("--variant sampa", "--variant sampa --pair", False),
        ("--devices 2", "--ascent local", True),
    ],
)
def test_what_changes_the_curve(first, second, differ):
    (one,), (other,) = (train(f"{args} --strategy shard_map") for args in (first, second))
    difference = np.abs(np.subtract(one["loss"], other["loss"])).max()
    assert difference > 1e-4 if differ else difference < 1e-12


BAD_ARGUMENTS = [
    ("--strategy jit xmap", "xmap.*choose from.*shard_map"),
    ("--variant sammy", "sammy.*choose from.*sampa"),
    ("--base adagrad", "adagrad.*momentum"),
    ("--epochs 0", "--epochs must be at least 1, got 0"),
    ("--batch 0", "--batch must be 1 to 1000, got 0"),
    ("--batch 2000", "--batch must be 1 to 1000, got 2000"),
    ("--batch 100", "--batch must be a multiple of 8, .* got 100"),
    ("--devices 0", "--devices must be at least 1, got 0"),
    ("--devices 1000", "--devices must be at most 8 in process 0, got 1000"),
    ("--seed -1", "--seed must be at least 0"),
    ("--rho nan", "--rho must be finite and at least 0, got nan"),
    ("--learning-rate 0", "--learning-rate must be finite and above 0, got 0"),
    ("--ascent local --strategy jit", "--ascent local needs .* shard_map, not jit"),
    ("--pair", "--pair is for --variant sampa.* not sam"),
    ("--variant sampa --pair --devices 3", "--pair needs an even number .* got 3"),
    ("--variant sampa --pair --strategy pmap", "--pair with --strategy pmap needs 2 .* got 8"),
    ("--variant momentum-sam --base sgd", "`base` must have one momentum"),
    ("--process-id 0", "--coordinator, --num-processes and --process-id go together"),
    ("--coordinator here --num-processes 2 --process-id 0", "must be HOST:PORT, got here"),
    ("--coordinator a:1 --num-processes 2 --process-id 2", "--process-id must be 0 to 1, got 2"),
    ("--out taken", "taken is not empty"),
]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [(data_parallel, *row) for row in BAD_ARGUMENTS]
    + [
        (multi_process, "--processes 0", "--processes must be at least 1, got 0"),
        (multi_process, "--devices -1", "--devices must be at least 1, got -1"),
        (multi_process, "--process-id 1", "--process-id is not for you to set"),
        (multi_process, "--coordinator=a:1", "--coordinator=a:1 is not for you to set"),
    ],
)
def test_bad_arguments(script, arguments, message, in_empty_folder, capsys):
    taken(in_empty_folder)
    with pytest.raises(SystemExit) as stop:
        script.main(arguments.split())
    assert stop.value.code == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert_untouched(in_empty_folder)


def taken(folder):
    (folder / "taken").mkdir()
    (folder / "taken" / "results.json").write_text("precious")


def assert_untouched(folder):
    assert (folder / "taken" / "results.json").read_text() == "precious"
    assert not (folder / "runs").exists()


class Launched:
    """The launcher in a separate process; its output and its workers' output go to two files."""

    def __init__(self, folder, arguments):
        self.out, self.err = folder / "stdout", folder / "stderr"
        with self.out.open("w") as out, self.err.open("w") as err:
            command = [sys.executable, multi_process.__file__, *arguments]
            environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as here
            self.process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)

    def wait_for(self, path, pattern):
        """Wait for a match in a file that is being written; return it."""
        deadline = time.monotonic() + 90
        while not (match := re.search(pattern, path.read_text())):
            said = f"{self.out.read_text()}\n{self.err.read_text()}"
            assert self.process.poll() is None, f"ended before {pattern!r}:\n{said}"
            assert time.monotonic() < deadline, f"no {pattern!r} in time:\n{said}"
            time.sleep(0.05)
        return match

    def pids(self):
        """Return the process ids of both workers."""
        match = self.wait_for(self.out, r"process 0: pid (\d+), process 1: pid (\d+)\n")
        return [int(pid) for pid in match.groups()]

    def wait_until_training(self):
        """Wait until both workers have taken some steps."""
        self.wait_for(self.err, r"shard_map: .*[1-9]\d*/16000 ")


@contextlib.contextmanager
def launch(folder, *arguments):
    """Start a launcher; it and its workers are stopped in any case."""
    launched = Launched(folder, arguments)
    try:
        yield launched
    finally:
        launched.process.terminate()
        launched.process.wait(20)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_two_processes_end_where_one_does(in_empty_folder):
    with launch(in_empty_folder, "--float64", "--epochs", "2", "--out", "two") as launched:
        train("--devices 4 --out one")
        assert launched.process.wait(90) == 0, launched.err.read_text()
    printed = launched.out.read_text()
    assert printed.count("device: 4 simulated devices in 2 processes") == 1  # process 0 only
    assert "process 1:" not in launched.err.read_text()
    with np.load("one/params.npz") as one, np.load("two/params.npz") as two:
        assert set(one) == set(two)
        assert {name.split("/")[0] for name in one} == set(data_parallel.STRATEGIES)
        for name in one:
            np.testing.assert_allclose(two[name], one[name], rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0])
def test_a_killed_process_stops_the_others(victim, in_empty_folder):
    with launch(in_empty_folder, *LONG) as launched:
        pids = launched.pids()
        launched.wait_until_training()
        os.kill(pids[victim], signal.SIGKILL)
        assert launched.process.wait(20) == 1
    message = f"process {victim} was killed by SIGKILL; stopped the others"
    assert launched.err.read_text().splitlines()[-1] == message
    assert not any(map(is_alive, pids))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "when"),
    [(signal.SIGINT, 130, "training"), (signal.SIGTERM, 143, "starting")],
)
def test_stopped_by_a_signal(number, code, when, in_empty_folder):
    with launch(in_empty_folder, *LONG) as launched:
        pids = launched.pids()
        if when == "training":
            launched.wait_until_training()
        launched.process.send_signal(number)
        assert launched.process.wait(20) == code
    assert not any(map(is_alive, pids))
    assert launched.err.read_text().splitlines()[-1] == f"{number.name}: stopped all processes"
    assert "Traceback" not in launched.err.read_text()


def test_what_one_process_refuses_stops_all(in_empty_folder):
    """Only process 0 checks --out; the others do not wait for it."""
    taken(in_empty_folder)
    with launch(in_empty_folder, "--out", "taken") as launched:
        assert launched.process.wait(60) == 1
    said = launched.err.read_text()
    assert "taken is not empty" in said
    assert "ended with exit code 2; stopped the others" in said
    assert_untouched(in_empty_folder)
