"""Every script of `examples/`, found by itself: it explains itself, and a test runs it."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
MAIN = 'if __name__ == "__main__":'
SCRIPTS = sorted(path for path in EXAMPLES.rglob("*.py") if MAIN in path.read_text())
NAMES = [path.relative_to(EXAMPLES).as_posix() for path in SCRIPTS]
HEAVY = ("flax", "grain", "jax", "matplotlib", "numpy", "optax", "orbax", "ray", "samx", "sklearn")
# Show the help of the scripts; return each text, and the heavy modules that were imported for it.
SHOW = """
import contextlib, io, json, runpy, sys
heavy, found = sys.argv[1].split(), {}
for path in sys.argv[2:]:
    sys.argv, before = [path, "--help"], {*sys.modules}
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        runpy.run_path(path, run_name="__main__")
        raise RuntimeError("--help did not end " + path)
    found[path] = [text.getvalue(), [name for name in heavy if name in {*sys.modules} - before]]
print(json.dumps(found))
"""
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


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """For each script its help, and the heavy modules that were imported before it was shown."""
    folder = tmp_path_factory.mktemp("empty")
    done = subprocess.run(
        [sys.executable, "-c", SHOW, " ".join(HEAVY), *map(str, SCRIPTS)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not [*folder.iterdir()]
    return json.loads(done.stdout)


@every_script
def test_help(path, shown):
    text, imported = shown[str(path)]
    check_help(path, text)
    assert not imported, "imports take seconds: parse the arguments before"


def test_help_lists_the_variants_once(shown):
    lists = {Path(path).name: text.count("coupled-wsam") for path, (text, _) in shown.items()}
    takers = ("cifar.py", "data_parallel.py", "digits.py", "language_model.py")
    takers += ("sharpness.py", "step_cost.py")
    assert {name: count for name, count in lists.items() if count} == dict.fromkeys(takers, 1)


def test_progress_is_shown_on_terminals_only():
    """A log would get a line for each frame."""
    for path in EXAMPLES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tqdm":
                assert "disable" in [keyword.arg for keyword in node.keywords], (path, node.lineno)


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
