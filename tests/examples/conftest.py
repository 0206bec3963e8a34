"""What the tests of all examples share."""

import contextlib
import gc
import json
import resource
import sys

import pytest

from examples.common import figures


@pytest.fixture(scope="module", autouse=True)
def figures_without_layout(request):
    """Leave out the layout, most of what a figure costs; `test_figures.py` has it checked."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.module.__name__.endswith("test_figures"):
            patch.setitem(figures.STYLE, "figure.constrained_layout.use", False)
        yield


@pytest.fixture
def in_empty_folder(tmp_path, monkeypatch):
    """Work in an empty folder: a script without --out writes to `runs/` there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refusal(in_empty_folder, capsys):
    """Return a function that runs `main` with bad arguments and returns its message, in one line.

    The script must stop with exit code 2 before it writes anything. `--out taken` is a folder with
    a file in it, which must stay as it is.
    """

    def run(main, arguments):
        (in_empty_folder / "taken").mkdir()
        (in_empty_folder / "taken" / "results.json").write_text("precious")
        with pytest.raises(SystemExit) as stop:
            main(arguments.split())
        assert stop.value.code == 2
        assert [path.name for path in in_empty_folder.iterdir()] == ["taken"]
        assert [path.read_text() for path in (in_empty_folder / "taken").iterdir()] == ["precious"]
        return " ".join(capsys.readouterr().err.split())

    return run


@pytest.fixture(scope="session")
def cheap_measure():
    """Stand in for `monitoring.measure`, whose products with the Hessian take long to compile."""

    def measure(f, params):
        loss = f(params)
        return {"top_eigenvalue": loss, "top_eigenvalue_error": loss / 100, "rise": loss / 10}

    return measure


@pytest.fixture
def read_report():
    """Return a function that reads results.json of a folder; NaN and Infinity are not JSON."""

    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    def read(folder):
        return json.loads((folder / "results.json").read_text(), parse_constant=no_constant)

    return read


@pytest.fixture
def file_size_limit():
    """Return a context in which no file can grow beyond a size, as on a disk without space."""

    @contextlib.contextmanager
    def limited(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    yield limited
    # tensorstore leaves coroutines behind that it could not end. They complain when they are freed,
    # which must not be in another test.
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    gc.collect()
    sys.unraisablehook = hook
