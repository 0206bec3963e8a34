"""The example in several processes: they end where one process does, or stop together."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import termios
import threading
import time

import numpy as np
import pytest

from examples.devices import data_parallel, multi_process

LONG = ["--epochs", "2000", "--strategy", "shard_map"]  # a run to be stopped early
# A worker that starts in no time: it does what its number is told to do.
WORKER = """
import sys, time
number = sys.argv[sys.argv.index("--process-id") + 1]
print("ready", number, file=sys.stderr, flush=True)
if number in sys.argv[1].split(","):
    sys.exit(2)
time.sleep(60)
"""
LAUNCHER = """
import pathlib, sys
from examples.devices import multi_process
multi_process.WORKER = pathlib.Path(sys.argv.pop(1))
sys.exit(multi_process.main())
"""


class Launched:
    """The launcher in a separate process; its output and its workers' output go to two files.

    With `on_terminal`, stderr is a terminal, and what arrives there goes to the file.
    """

    def __init__(self, folder, arguments, worker=None, on_terminal=False):
        self.out, self.err = folder / "stdout", folder / "stderr"
        command = [sys.executable, multi_process.__file__, *arguments]
        if worker is not None:
            (folder / "worker.py").write_text(worker)
            command = [sys.executable, "-c", LAUNCHER, folder / "worker.py", *arguments]
        self.err.touch()
        with self.out.open("w") as out, self.err.open("w") as err:
            if not on_terminal:
                self.process = subprocess.Popen(command, stdout=out, stderr=err)
                return
            screen, terminal = os.openpty()
            termios.tcsetwinsize(terminal, (24, 100))
            self.process = subprocess.Popen(command, stdout=out, stderr=terminal)
            os.close(terminal)
        threading.Thread(target=self.copy, args=(screen,), daemon=True).start()

    def copy(self, screen):
        """Copy what a terminal shows to the file, until nobody writes to it any more."""
        with (
            contextlib.suppress(OSError),  # the end of a terminal
            open(screen, "rb", buffering=0) as shown,
            self.err.open("wb", buffering=0) as err,
        ):
            while content := shown.read(4096):
                err.write(content)

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
def launch(folder, *arguments, **keywords):
    """Start a launcher; it and its workers are stopped in any case."""
    launched = Launched(folder, arguments, **keywords)
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


ALL = "jit pmap shard_map"


def check_stopped(launched, pids, message):
    """Check that no worker lives, and that the launcher has said why."""
    assert not any(map(is_alive, pids))
    said = launched.err.read_text().splitlines()
    assert said[-1] == message
    # A worker may have time to say that it has lost the other one.
    own = [line for line in said if not line.startswith("process 1: ")]
    assert not any("Traceback" in line for line in own)


@pytest.mark.parametrize("strategies", ["shard_map", pytest.param(ALL, marks=pytest.mark.slow)])
def test_a_tiny_run_ends_where_one_process_does(strategies, in_empty_folder, monkeypatch):
    few = ["--float64", "--epochs", "1", "--batch", "500"]  # two steps
    few += ["--strategy", *strategies.split()]
    monkeypatch.setattr(data_parallel, "draw", lambda *args: None)
    with launch(in_empty_folder, *few, "--devices", "1", "--out", "two") as launched:
        data_parallel.main([*few, "--devices", "2", "--out", "one"])
        assert launched.process.wait(90) == 0, launched.err.read_text()
    printed = launched.out.read_text()
    assert printed.count("device: 2 simulated devices in 2 processes") == 1  # process 0 only
    assert "process 1:" not in launched.err.read_text()
    with np.load("one/params.npz") as one, np.load("two/params.npz") as two:
        assert set(one) == set(two)
        assert {name.split("/")[0] for name in one} == set(strategies.split())
        for name in one:
            np.testing.assert_allclose(two[name], one[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_stops_all_workers(number, code, in_empty_folder):
    with launch(in_empty_folder, "none", worker=WORKER) as launched:
        pids = launched.pids()
        launched.wait_for(launched.err, "ready 0")
        launched.process.send_signal(number)
        assert launched.process.wait(20) == code
    check_stopped(launched, pids, f"{number.name}: stopped all processes")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_stops_the_others(victim, in_empty_folder):
    with launch(in_empty_folder, "none", worker=WORKER) as launched:
        pids = launched.pids()
        launched.wait_for(launched.err, "ready 0")
        os.kill(pids[victim], signal.SIGKILL)
        assert launched.process.wait(20) == 1
    check_stopped(launched, pids, f"process {victim} was killed by SIGKILL; stopped the others")


def test_a_worker_that_fails_stops_the_others(in_empty_folder):
    with launch(in_empty_folder, "1", worker=WORKER) as launched:
        pids = launched.pids()
        assert launched.process.wait(20) == 1
    check_stopped(launched, pids, "process 1 ended with exit code 2; stopped the others")
    assert "process 1: ready 1" in launched.err.read_text()


def test_workers_that_end_well(in_empty_folder):
    worker = "import sys; sys.exit(0)"
    with launch(in_empty_folder, "--processes", "3", worker=worker) as launched:
        assert launched.process.wait(20) == 0
    assert launched.err.read_text() == ""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0])
def test_a_killed_process_stops_the_others(victim, in_empty_folder):
    with launch(in_empty_folder, *LONG, on_terminal=True) as launched:
        pids = launched.pids()
        launched.wait_until_training()
        os.kill(pids[victim], signal.SIGKILL)
        assert launched.process.wait(20) == 1
    check_stopped(launched, pids, f"process {victim} was killed by SIGKILL; stopped the others")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "when"),
    [(signal.SIGINT, 130, "training"), (signal.SIGTERM, 143, "starting")],
)
def test_stopped_by_a_signal(number, code, when, in_empty_folder):
    with launch(in_empty_folder, *LONG, on_terminal=True) as launched:
        pids = launched.pids()
        if when == "training":
            launched.wait_until_training()
        launched.process.send_signal(number)
        assert launched.process.wait(20) == code
    check_stopped(launched, pids, f"{number.name}: stopped all processes")


@pytest.mark.parametrize("number", [0, 1])
def test_all_processes_refuse_what_process_0_refuses(number, monkeypatch, in_empty_folder, capsys):
    """Only process 0 looks at --out; it tells the others, which do not wait for it."""
    (in_empty_folder / "taken").mkdir()
    (in_empty_folder / "taken" / "file").touch()
    told = []
    monkeypatch.setattr(data_parallel.jax, "process_index", lambda: number)
    monkeypatch.setattr(
        data_parallel.multihost_utils,
        "broadcast_one_to_all",
        lambda value: told.append(bool(value)) or True,
    )
    args = data_parallel.parse(["--out", "taken"])
    with pytest.raises(SystemExit):
        data_parallel.create_folder(args)
    assert told == [number == 0]
    message = "--out: taken is not empty" if number == 0 else "process 0 refused --out"
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_what_one_process_refuses_stops_all(in_empty_folder):
    """Only process 0 checks --out; the others do not wait for it."""
    (in_empty_folder / "taken").mkdir()
    (in_empty_folder / "taken" / "results.json").write_text("precious")
    with launch(in_empty_folder, "--out", "taken") as launched:
        assert launched.process.wait(60) == 1
    said = launched.err.read_text()
    assert "taken is not empty" in said
    assert "ended with exit code 2; stopped the others" in said
    assert (in_empty_folder / "taken" / "results.json").read_text() == "precious"
    assert not (in_empty_folder / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--processes 0", "--processes must be at least 1, got 0"),
        ("--devices -1", "--devices must be at least 1, got -1"),
        ("--process-id 1", "--process-id is not for you to set"),
        ("--coordinator=a:1", "--coordinator=a:1 is not for you to set"),
    ],
)
def test_bad_arguments(arguments, message, refusal):
    assert re.search(message, refusal(multi_process.main, arguments))
