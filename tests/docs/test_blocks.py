"""Every Python block of the pages runs alone, in a fresh namespace; recipes are short and checked.

A page for which this is not so needs a reason here.
"""

import ast
import re
import tempfile
from pathlib import Path

import jax
import pytest
from processor import can_run

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"
RECIPES = NOTEBOOKS / "recipes.md"
README = ROOT / "README.md"
CARDS = NOTEBOOKS / "methods.md"  # one line for each variant, about a `base` of yours
PAGES = [README, *sorted({*NOTEBOOKS.glob("*.md")} - {CARDS})]
SHORT = (README, RECIPES)  # pages whose blocks have at most MOST_LINES
MOST_LINES, LONGEST_LINE = 15, 100
# A block that measures runs in a smaller form: the text on the left becomes that on the right.
SMALLER = {"(8, 64, 16, 16)": "(1, 4, 8, 8)", "(64, 64, 3, 3)": "(4, 4, 3, 3)"}


def python_blocks(text):
    """Return the line number and the code of each fenced Python block."""
    found = re.finditer(r"^```python *\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start(1)) + 1, block[1]) for block in found]


def parameters(pages):
    blocks = [(page, *block) for page in pages for block in python_blocks(page.read_text())]
    return [pytest.param(*block, id=f"{block[0].name}:{block[1]}") for block in blocks]


def reason_to_skip(code):
    """Return why a block cannot run here, or None."""
    if not can_run(code):
        return "XLA has no float16 for this processor"
    if "jax.pmap" in code and not hasattr(jax, "pmap"):
        return "this JAX has no pmap"
    return None


def run(page, line, code):
    """Run a block as a script of its own; tracebacks show its lines in the page."""
    program = compile("\n" * (line - 1) + code, page, "exec")
    with jax.numpy_rank_promotion("allow"):
        exec(program, {"__name__": "__main__"})


@pytest.mark.parametrize(("page", "line", "code"), parameters(PAGES))
def test_a_block_runs_alone(page, line, code, tmp_path, monkeypatch):
    if reason := reason_to_skip(code):
        pytest.skip(reason)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for old, new in SMALLER.items():
        code = code.replace(old, new)
    run(page, line, code)


def test_every_text_that_is_made_smaller_is_there():
    blocks = [code for page in PAGES for _, code in python_blocks(page.read_text())]
    for old in SMALLER:
        assert any(old in code for code in blocks), old


@pytest.mark.parametrize("page", SHORT, ids=lambda p: p.name)
def test_blocks_are_short(page):
    long = [
        f"line {line}"
        for line, code in python_blocks(page.read_text())
        if code.count("\n") > MOST_LINES or max(map(len, code.splitlines())) > LONGEST_LINE
    ]
    assert long == []


def last_statement(code):
    """Return the last statement; of a loop or a `with`, the last one inside."""
    statement = ast.parse(code).body[-1]
    while isinstance(statement, ast.For | ast.With):
        statement = statement.body[-1]
    return statement


def is_a_check(statement):
    if isinstance(statement, ast.Assert):
        return True
    call = getattr(statement, "value", None)
    return isinstance(call, ast.Call) and getattr(call.func, "id", "") == "print"


def test_every_recipe_is_one_block_that_ends_with_a_check():
    _, *recipes = re.split(r"^### ", RECIPES.read_text(), flags=re.MULTILINE)
    assert len(recipes) > 25
    wrong = {}
    for recipe in recipes:
        title, blocks = recipe.partition("\n")[0], python_blocks(recipe)
        if len(blocks) != 1 or recipe.count("\n```") != 2:
            wrong[title] = f"{len(blocks)} Python blocks, {recipe.count('```')} fences"
        elif not is_a_check(last_statement(blocks[0][1])):
            wrong[title] = "does not end with an assert or a print"
    assert wrong == {}


@pytest.mark.parametrize(
    "code", ["assert sorted([2, 1]) == [1]", "print(defined_in_another_block)", "import no_such"]
)
def test_a_failing_block_turns_red(code):
    with pytest.raises((AssertionError, NameError, ImportError)) as caught:
        run(RECIPES, 7, code)
    assert caught.traceback[-1].lineno + 1 == 7  # counted from 0
