"""A driver that is stopped leaves no process and no file of Ray behind."""

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import problem
import psutil
from ray_runs import LONG, is_alive, wait_until

DRIVER = """
import os, sys, time
import numpy as np
import problem, ray_runs
from samx import elastic

if __name__ == "__main__":
    engine = elastic.Ray()

    def save(checkpoint):
        np.savez("saved.npz", W1=checkpoint.params["W1"], n=checkpoint.exchanges)

    def monitor(progress):
        print(progress.exchanges, engine._cluster.pid, progress.workers[0].place, flush=True)

    if sys.argv[1] == "waiting":
        engine._connect()
        import ray
        pid = ray.get(ray.remote(lambda: os.getpid()).remote())
        print(10, engine._cluster.pid, "no training, pid", pid, flush=True)
        time.sleep(1000)

    elastic.train(
        ray_runs.maker(0.01),
        problem.make(np.float32)[1],
        num_workers=1,
        num_exchanges=10**6,
        engine=engine,
        save=save,
        monitor=monitor,
        monitor_every=0.1,
    )
"""


class Driver:
    """A training run in a separate process, with its own cluster."""

    def __init__(self, folder):
        folder.mkdir()
        (folder / "driver.py").write_text(DRIVER)
        self.folder, self.processes = folder, []
        path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
        with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", "driver.py", folder.name],
                cwd=folder,
                stdout=out,
                stderr=err,
                env=os.environ | {"PYTHONPATH": path},
            )

    def said(self):
        return (self.folder / "out").read_text() + (self.folder / "err").read_text()

    def wait_for_some_exchanges(self):
        """Wait for ten or more exchanges; return the folder of the cluster."""
        line = re.compile(r"^[1-9]\d+ (\d+) .* pid (\d+)$", re.MULTILINE)
        wait_until(lambda: line.search(self.said()) or self.process.poll() is not None)
        assert self.process.poll() is None, self.said()
        helper, worker = map(int, line.search(self.said()).groups())
        self.processes = [psutil.Process(helper), *psutil.Process(helper).children(recursive=True)]
        assert worker in {process.pid for process in self.processes}
        words = itertools.chain.from_iterable(process.cmdline() for process in self.processes)
        folder = Path(re.search(r"(/\w+)+/samx-\w+", " ".join(words))[0])
        assert folder.exists()
        return folder

    def stop(self, number):
        """Send a signal, wait until all processes have ended, and return the exit code."""
        self.process.send_signal(number)
        code = self.process.wait(LONG)
        wait_until(lambda: not any(is_alive(process.pid) for process in self.processes))
        return code

    def clean_up(self):
        for process in [self.process, *self.processes]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(LONG)


def test_a_driver_that_is_stopped_leaves_nothing(tmp_path):
    """No process and no file of Ray is left, whatever stops it; Ctrl-C leaves a checkpoint."""
    drivers = [Driver(tmp_path / name) for name in ("training", "waiting")]
    try:
        folders = [driver.wait_for_some_exchanges() for driver in drivers]
        training, waiting = drivers
        assert waiting.stop(signal.SIGKILL) == -signal.SIGKILL
        assert training.stop(signal.SIGINT) == -signal.SIGINT, training.said()
        assert "KeyboardInterrupt" in training.said()
        wait_until(lambda: not any(folder.exists() for folder in folders))
        with np.load(training.folder / "saved.npz") as saved:
            assert saved["n"].sum() >= 10
            moved = np.abs(saved["W1"] - problem.make(np.float32)[1]["W1"])
            assert 0.001 < moved.max() < 10
        for driver in drivers:
            assert "fork" not in driver.said()
            assert "(raylet)" not in driver.said()
    finally:
        for driver in drivers:
            driver.clean_up()
