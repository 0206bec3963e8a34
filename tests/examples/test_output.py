"""Folders of runs: no two processes share one, and a killed process keeps nobody out."""

import contextlib
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from examples.common.output import choose_folder, free_folder, lock

HOLD = """
import sys
from pathlib import Path
from examples.common.output import free_folder, lock
if sys.argv[1] == "lock":
    lock(Path(sys.argv[2]))
else:
    free_folder(sys.argv[2], "test")
print("held", flush=True)
sys.stdin.read()
"""
CHOOSE = """
import sys
from examples.common.output import free_folder
sys.stdin.read(1)  # all processes begin at once
for _ in range(40):
    print(free_folder(None, "test"), flush=True)
"""


@contextlib.contextmanager
def processes(count, code, *arguments):
    """Start processes that wait for their standard input; kill them at the end."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(count)
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


@pytest.mark.parametrize("how", ["lock", "free_folder"])
def test_a_folder_is_of_one_process_until_it_is_killed(how, in_empty_folder, capsys):
    folder = Path("run")
    folder.mkdir()
    with processes(1, HOLD, how, folder) as [holder]:
        assert holder.stdout.readline() == "held\n"
        for refused in (lambda: lock(folder), lambda: free_folder("run", "test")):
            with pytest.raises(ValueError, match="run is used by another run"):
                refused()
        args = Namespace(out=None, resume="run")
        with pytest.raises(SystemExit, match="2"):
            choose_folder(args, "test")
        assert "error: --resume: run is used by another run" in capsys.readouterr().err
    lock(folder)  # the holder was killed
    lock(folder)  # a process can resume its own run
    assert free_folder("run", "test") == folder  # it is empty but for the lock


def test_processes_that_choose_at_once_get_different_folders(in_empty_folder):
    with processes(3, CHOOSE) as started:
        for process in started:
            process.stdin.write("x")
            process.stdin.flush()
        chosen = [line for process in started for line in process.communicate()[0].split()]
    assert sorted(chosen) == [f"runs/test-{number:03d}" for number in range(1, 121)]


def test_a_folder_with_something_in_it_stays_as_it_is(in_empty_folder):
    (in_empty_folder / "full").mkdir()
    (in_empty_folder / "full" / "file").touch()
    with pytest.raises(ValueError, match="full is not empty"):
        free_folder("full", "test")
    assert [path.name for path in (in_empty_folder / "full").iterdir()] == ["file"]
