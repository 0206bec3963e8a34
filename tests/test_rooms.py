"""The structure of the package: imports run downwards, variants are short, names are standard.

`python tests/test_rooms.py` prints the figures.
"""

import ast
import inspect
import re
import statistics
import sys
import traceback
from pathlib import Path

import jax.numpy as jnp
import optax
import pytest

import samx

PACKAGE = Path(samx.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
VARIANTS = sorted((PACKAGE / "variants").glob("*.py"))

IDEAS = (
    *("perturbations", "selection", "parallel", "training"),
    *("combinations", "losses", "schedules", "mup", "elastic", "sharpness", "averages"),
)
FLOORS = [
    ("core",),
    IDEAS,
    ("policies",),
    ("variants",),
    ("asynchronous", "flax", "posterior"),
    ("catalog",),
    ("__init__",),
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
BETWEEN_IDEAS = {("mup", "perturbations"), ("sharpness", "perturbations")}


def room_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(path):
    """Yield the rooms of samx that a file imports, anywhere in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module == "samx":
                names = [f"samx.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "samx":
                yield ([*name.split("."), "__init__"])[1]


def update_fns():
    """Yield the length in lines of every `update_fn` of the variants, with its file."""
    for path in VARIANTS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == "update_fn":
                yield path.name, node.end_lineno - node.lineno + 1


def test_every_room_has_a_floor():
    assert {room_of(path) for path in FILES} == set(FLOOR)


def test_no_import_runs_up():
    for path in FILES:
        room = room_of(path)
        for other in imported_rooms(path):
            where = f"{path.relative_to(PACKAGE)} imports samx.{other}"
            if other == room or (room, other) in BETWEEN_IDEAS:
                continue
            assert FLOOR[other] < FLOOR[room], where


def test_variants_import_no_flax_and_no_engine():
    """A policy, a perturbation or a variant needs only jax and optax."""
    allowed = {"jax", "optax", "numpy", "samx"}
    for path in [*VARIANTS, *(PACKAGE / "core").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            for module in modules:
                root = module.split(".")[0]
                standard = root in sys.stdlib_module_names
                assert root in allowed or standard or path.name == "aliases.py", (path, module)


def test_nothing_calls_pmap():
    """A later JAX may drop it. Words may mention it; neither code nor examples may call it."""
    assert [path for path in FILES if "jax.pmap(" in path.read_text()] == []


def file_lengths():
    """Length in lines of the file of each paper."""
    papers = [path for path in VARIANTS if not path.name.startswith("_")]
    return [(path.name, len(path.read_text().splitlines())) for path in papers]


def test_update_fns_are_short():
    lengths = list(update_fns())
    assert statistics.median(length for _, length in lengths) <= 12, sorted(lengths)
    assert max(length for _, length in lengths) <= 25, sorted(lengths)


def test_variant_files_are_short():
    assert statistics.median(length for _, length in file_lengths()) <= 120, file_lengths()


# Only SAMPa's pair, AsyncSAM's roles, the microbatches of mSAM, LPF-SGD, bSAM and Sparse SAM, the
# refresh of an eigenvector and XSAM's search need these.
WHERE_IT_RUNS = r"\.devices|evaluation|num_microbatches|is_skipped_step|ascent_grad\b|local_axes"
EXCEPTIONS = {
    *("sampa.py", "async_sam.py", "msam.py", "sparse_sam.py"),
    *("lpf_sgd.py", "bsam.py", "_eigenvector.py", "xsam.py"),
}


@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: path.name)
def test_a_variant_does_not_know_where_it_runs(path):
    code = ast.unparse(ast.parse(path.read_text()))
    code = re.sub(r'"""(.|\n)*?"""', "", code)
    if path.name not in EXCEPTIONS:
        assert not re.findall(WHERE_IT_RUNS, code)


class Stop(Exception):
    """Raised by the loss, to see who called it."""


def frames_to_the_loss(update):
    with pytest.raises(Stop) as caught:
        update()
    frames = traceback.extract_tb(caught.value.__traceback__)
    return sum(frame.filename.startswith(str(PACKAGE)) for frame in frames)


def test_few_frames_stand_between_update_and_the_loss():
    def stop(*_):
        raise Stop

    w, batch = jnp.ones(2), jnp.eye(2)
    sam, sampa = samx.sam(), samx.sampa(optax.sgd(0.1), batch_like=batch)
    assert frames_to_the_loss(lambda: sam.update(w, sam.init(w), w, value_fn=stop)) <= 5
    keywords = {"losses_fn": stop, "batch": batch}
    assert frames_to_the_loss(lambda: sampa.update(w, sampa.init(w), w, **keywords)) <= 9


@pytest.mark.parametrize("name", ["sam", "asam", "usam", "monge_sam", "momentum_sam", "looksam"])
def test_help_prints_words_for_types(name):
    """A radius is shown as `Radius`, not as the union of types behind it."""
    signature = str(inspect.signature(getattr(samx, name)))
    assert "rho: Radius" in signature
    assert "Union[" not in signature
    assert "Schedule]" not in signature


def test_the_signature_of_sam_fits_a_line():
    assert len(f"sam{inspect.signature(samx.sam)}") <= 120


RENAMED = (
    *("gathered", "taken_anew", "over_devices", "own_axes", "is_linear", "look_ahead", "pulled"),
    *("deviation(", "gradient_step", "made_of", "class Own", ".vary(", ".gather("),
    *("samx.precision", "samx.skipping", "samx.wrappers", "samx._"),
)


@pytest.mark.parametrize("old", RENAMED)
def test_old_names_are_gone(old):
    pattern = re.compile(rf"(?<![\w.]){re.escape(old)}" if old[0].isalpha() else re.escape(old))
    found = [path.name for path in FILES if pattern.search(path.read_text())]
    assert not found


if __name__ == "__main__":
    for what, lengths in (("update_fn", list(update_fns())), ("file", file_lengths())):
        median = statistics.median(length for _, length in lengths)
        longest = max(lengths, key=lambda row: row[1])
        print(
            f"{what}: {len(lengths)}, median {median:g} lines, longest {longest[1]} ({longest[0]})"
        )
