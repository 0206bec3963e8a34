"""The README is short and its commands exist; public names are documented and listed."""

import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import samx
import samx.flax
from samx import (
    averages,
    combinations,
    elastic,
    losses,
    mup,
    perturbations,
    policies,
    posterior,
    schedules,
    selection,
    sharpness,
)

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
API = (ROOT / "notebooks" / "api.md").read_text()
WRITE = "api.md is out of date: python notebooks/_pages/write.py"
SECTIONS = ("Args", "Returns", "Raises", "Example", "References", "Notes")


MODULES = {
    "perturbations": perturbations,
    "policies": policies,
    "combinations": combinations,
    "selection": selection,
    "sharpness": sharpness,
    "schedules": schedules,
    "mup": mup,
    "posterior": posterior,
    "averages": averages,
    "losses": losses,
    "asynchronous": samx.asynchronous,
    "elastic": elastic,
    "flax": samx.flax,
}
PUBLIC = [
    *((name, getattr(samx, name)) for name in samx.__all__ if name not in MODULES),
    *(
        (f"{title}.{name}", getattr(module, name))
        for title, module in MODULES.items()
        for name in module.__all__
    ),
]


def is_error(value):
    return inspect.isclass(value) and issubclass(value, Exception)


@pytest.mark.parametrize(("name", "value"), PUBLIC)
def test_docstring_sections(name, value):
    doc = inspect.getdoc(value) or ""
    wanted = ("Attributes", "Example") if inspect.isclass(value) else SECTIONS
    if is_error(value):
        wanted = ("Example",)
    if not inspect.isclass(value) and not inspect.signature(value).parameters:
        wanted = tuple(section for section in wanted if section != "Args")
    positions = [doc.find(f"\n{section}:\n") for section in wanted]
    assert -1 not in positions, f"{name} lacks {wanted[positions.index(-1)]}"
    assert positions == sorted(positions), f"{name}: sections in the order {wanted}"
    assert doc.splitlines()[0].endswith("."), f"{name}: one line first"
    assert ">>> " in doc


@pytest.mark.parametrize(("name", "value"), PUBLIC)
def test_every_argument_is_documented(name, value):
    documented = inspect.getdoc(value)
    arguments = () if is_error(value) else inspect.signature(value).parameters
    for argument in arguments:
        assert re.search(rf"^ +{argument}: ", documented, re.MULTILINE), f"{name}: {argument}"


@pytest.mark.parametrize(("name", "value"), PUBLIC)
def test_api_entry(name, value):
    """A line in the list of names, and one directive: that of the name, or of its module."""
    module, _, _ = name.rpartition(".")
    assert API.count(f"- {{py:obj}}`samx.{name}`: ") == 1, f"{name}: {WRITE}"
    directive = (
        "automodule" if module else "autoclass" if inspect.isclass(value) else "autofunction"
    )
    target = f"samx.{module or name}"
    assert len(re.findall(rf"^.. {directive}:: {target}$", API, re.MULTILINE)) == 1, (
        f"{name}: {WRITE}"
    )


def test_no_public_name_takes_any_keyword():
    for name, value in PUBLIC:
        if not inspect.isclass(value):
            kinds = {p.kind for p in inspect.signature(value).parameters.values()}
            assert inspect.Parameter.VAR_KEYWORD not in kinds, name


def test_the_readme_is_short():
    assert len(README.split()) <= 1300
    assert len(README.splitlines()) <= 250


def test_the_first_screen_shows_the_figure():
    (image,) = re.findall(r"!\[.{40,}\]\((?!http)(.*?)\)", "\n".join(README.splitlines()[:40]))
    assert (ROOT / image).stat().st_size > 20_000


def test_readme_bash_blocks():
    """The first two commands are one line each: the main example, and these tests."""
    commands = [code.strip() for language, code in BLOCKS if language == "bash"]
    assert all("\n" not in command for command in commands[:2])
    assert "examples/digits.py" in commands[0]
    assert "-m pytest" in commands[1]
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)
        words = shlex.split(command, comments=True)
        for word in words:
            if word.startswith(("examples/", "notebooks/", "tests/")):
                assert (ROOT / word).exists(), word
            if match := re.search(r"\[(.*)\]$", word):
                project = (ROOT / "pyproject.toml").read_text()
                assert re.search(rf"^{match[1]} = \[", project, re.MULTILINE), word
    assert {language for language, _ in BLOCKS} <= {"python", "bash", "console", "diff", "bibtex"}


def test_the_core_needs_jax_and_optax_only():
    """`import samx` must not import Flax, chex or other packages that only the examples use."""
    code = (
        "import jax, optax, sys; before = set(sys.modules); import samx; "
        "print({m.split('.')[0] for m in set(sys.modules) - before})"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert output.stdout.decode().strip() in (
        "{'samx'}",
        "{'samx', 'typing_extensions'}",
        "{'typing_extensions', 'samx'}",
    )
