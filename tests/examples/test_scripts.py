"""Every script of `examples/`, found by itself: it explains itself, and a test runs it."""

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
MAIN = 'if __name__ == "__main__":'
SCRIPTS = sorted(path for path in EXAMPLES.rglob("*.py") if MAIN in path.read_text())
NAMES = [path.relative_to(EXAMPLES).as_posix() for path in SCRIPTS]
every_script = pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)


def check_help(path, text):
    """The help has the docstring's first line, and every option that the script defines."""
    source = path.read_text()
    assert text.startswith(f"usage: {path.name}")
    first_line = re.search(r'"""(.*)', source)[1]
    words = " ".join(text.split())
    assert first_line in words
    for option in re.findall(r'add(?:_argument)?\(\s*"(--[\w-]+)"', source):
        assert re.search(rf"{option}\b", words), option


def test_there_are_scripts():
    assert "digits.py" in NAMES
    assert len(NAMES) >= 15


def test_the_list_has_every_script():
    text = (EXAMPLES / "README.md").read_text()
    commands = re.findall(r"^\|[^|]*\| `([\w/]+\.py)[ `]", text, re.MULTILINE)
    assert sorted(set(commands)) == NAMES


@every_script
def test_help(path, monkeypatch, capsys, in_empty_folder):
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    assert stop.value.code == 0
    check_help(path, capsys.readouterr().out)
    assert not [*in_empty_folder.iterdir()]


def test_a_script_starts_in_any_folder(in_empty_folder):
    """As users start it: in a process of its own, which finds the shared modules by itself."""
    path = EXAMPLES / "asynchronous" / "exchange_cost.py"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, path, "--help"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    check_help(path, done.stdout)


@pytest.mark.parametrize(
    "path", [path for path in SCRIPTS if "Report(" in path.read_text()], ids=lambda path: path.stem
)
def test_a_result_that_cannot_be_written_is_one_line(path):
    source = path.read_text()
    assert "@files.ends_in_one_line\ndef main(" in source or "except SaveError" in source


@every_script
def test_a_test_runs_it(path):
    """The test file of its name has a `test_a_tiny_run...` that is not slow."""
    tree = ast.parse((Path(__file__).parent / f"test_{path.stem}.py").read_text())
    [run] = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_a_tiny_run")
    ]
    assert "pytest.mark.slow" not in map(ast.unparse, run.decorator_list)
    marks = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign)]
    assert not any(mark.startswith("pytestmark") and "slow" in mark for mark in marks)
