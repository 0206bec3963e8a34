"""Every relative link leads to a file, every anchor to a heading of it; no address is invented."""

import functools
import re
from pathlib import Path
from urllib.parse import unquote

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"
TEXTS = [
    ROOT / "README.md",
    *sorted(NOTEBOOKS.glob("*.md")),
    *sorted(set(NOTEBOOKS.glob("*.py")) - {NOTEBOOKS / "conf.py"}),
    *sorted((ROOT / ".github").glob("*.md")),
    ROOT / "examples/README.md",
    ROOT / "tests/README.md",
]
FENCED = re.compile(r"^ *(`{3,}|~{3,}).*?^ *\1`*~* *$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
TARGETS = (
    re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+[\"'][^)]*)?\)"),  # [text](target), ![image](target)
    re.compile(r"^ *\[[^\]]+\]:\s+<?([^\s>]+)", re.MULTILINE),  # [name]: target
    re.compile(r"\b(?:src|href)=[\"']([^\"']+)"),
)
REPOSITORY = re.compile(r"[\w@:/.+-]*\b(?:github|gitlab|bitbucket|codeberg)\.(?:com|org)[/:]\S+")
HEADING = re.compile(r"^ {0,3}#{1,6} +(.+?) *#*$", re.MULTILINE)


def without_fences(text):
    return FENCED.sub("", text)


def links(text):
    """Return the targets of all links and images that are not in code."""
    prose = CODE.sub("", without_fences(text))
    return [target for pattern in TARGETS for target in pattern.findall(prose)]


def slug(heading):
    """Return the anchor that GitHub gives to a heading."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


@functools.cache
def anchors_of(text):
    """Return the anchors of a Markdown text; a second heading of the same name ends in `-1`."""
    found = {}
    for heading in HEADING.findall(without_fences(text)):
        name, count = slug(heading), 0
        while (anchor := f"{name}-{count}" if count else name) in found:
            count += 1
        found[anchor] = heading
    return {*found, *re.findall(r"\b(?:id|name)=[\"']([^\"']+)", without_fences(text))}


@functools.cache
def markdown_of(path):
    """Return the Markdown of a page, of a notebook, or of its text."""
    if path.suffix == ".md":
        return path.read_text()
    if path.suffix not in (".ipynb", ".py"):
        return ""
    read = jupytext.read if path.suffix == ".py" else functools.partial(nbformat.read, as_version=4)
    cells = read(path).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def problem_of(target, path, text):
    """Return what is wrong with a link in a text that stands at `path`, or None."""
    if re.match(r"(https?|mailto):", target):
        name = re.split(r"[/:]", target.rstrip("/").removesuffix(".git"))[-1]
        is_invented = REPOSITORY.match(target) and name == "samx"
        return "an address of samx, which has none yet" if is_invented else None
    if re.match(r"/|[\w+.-]+:|\S+@", target):
        return "neither a relative path nor a web address"
    name, _, anchor = unquote(target).partition("#")
    if not name:
        return None if anchor in anchors_of(text) else "no such heading"
    file = (path.parent / name).resolve()
    if not file.is_relative_to(ROOT):
        return "outside of the repository"
    if not file.exists():
        return "no such file"
    if anchor and anchor not in anchors_of(markdown_of(file)):
        return "no such heading"
    return None


def problems(text, path):
    """Return one line for each wrong link, and for each bare address of a repository."""
    found = [(target, problem_of(target, path, text)) for target in dict.fromkeys(links(text))]
    wrong = [f"{target}: {problem}" for target, problem in found if problem]
    bare = REPOSITORY.findall(re.sub(r"\]\([^)]*\)|\]: \S+", "]", text))
    return wrong + [f"{address}: a bare address of a repository" for address in bare]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert problems(markdown_of(path), path) == []


PAGE = """
# A page

See [below](#some-code-here), [again](#a-page-1), [code](../examples/digits.py),
[a notebook](sam_in_five_minutes.ipynb#2-the-closure), [a folder](../examples),
[a paper](https://arxiv.org/abs/2010.01412), [theirs](https://github.com/google-research/sam).
`[not](a-link.md)`

```python
# no heading
x = [f](nothing)
```

## Some `code`, here!

### A page
"""
WRONG = {
    "[x](nothing.md)": "nothing.md: no such file",
    "![x](nothing.png)": "nothing.png: no such file",
    '<img src="nothing.png">': "nothing.png: no such file",
    "[x]: nothing.md": "nothing.md: no such file",
    "[`x`](../examples/nothing.py)": "../examples/nothing.py: no such file",
    "[![x](nothing.png)](recipes.md)": "nothing.png: no such file",
    "[x](#no-heading)": "#no-heading: no such heading",
    "[x](recipes.md#no-heading)": "recipes.md#no-heading: no such heading",
    "[x](sam_in_five_minutes.ipynb#3)": "sam_in_five_minutes.ipynb#3: no such heading",
    "[x](../../elsewhere.md)": "../../elsewhere.md: outside of the repository",
    "[x](/README.md)": "/README.md: neither a relative path nor a web address",
    "[x](file:README.md)": "file:README.md: neither a relative path nor a web address",
    "[x](https://github.com/someone/samx)": (
        "https://github.com/someone/samx: an address of samx, which has none yet"
    ),
    "See github.com/some/one": "github.com/some/one: a bare address of a repository",
    "```console\ngit clone git@github.com:some/one\n```": (
        "git@github.com:some/one: a bare address of a repository"
    ),
}


def test_a_page_of_right_links():
    assert problems(PAGE, NOTEBOOKS / "page.md") == []


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_link_turns_red(text):
    assert problems(f"Text.\n\n{text}\n", NOTEBOOKS / "recipes.md") == [WRONG[text]]
