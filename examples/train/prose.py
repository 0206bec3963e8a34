"""English and code, both from the sources of the standard library, without a download.

The English is Python's own manual (`pydoc_data/topics.py`), and the docstrings and comments of the
modules. The code is what is left of the modules, as `ast.unparse` writes it. So a text of one kind
has next to nothing of the other. Held out are the files that `text.py` holds out; the manual is cut
instead.
"""

import ast
import io
import sysconfig
import tokenize
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from examples.train.text import Text, is_held_out, names_of

TAKEN = 3  # one of so many files: parsing takes long, and a small model needs little
MANUAL = "pydoc_data/topics.py"
SHORTEST = 40  # characters of a docstring, or of comments without code between them
MANUAL_HELD_OUT = 10  # one of so many topics


def load(folder: str | Path | None = None) -> tuple[Text, Text]:
    """Return English and code.

    Args:
        folder: By default the standard library of this Python.

    Raises:
        ValueError: If the folder has too few files.
    """
    root = Path(folder or sysconfig.get_path("stdlib"))
    parts: dict[tuple[str, bool], list[str]] = {}
    for name in names_of(root):
        if not is_taken(name):
            continue
        source = (root / name).read_text("utf-8", "replace")
        for kind, held_out, found in of_file(name, source):
            parts.setdefault((kind, held_out), []).append(found)
    if len(parts) < 4:
        raise ValueError(f"{root} has too few Python sources for English and code")

    def part(*key):
        return np.frombuffer("\n\n".join(parts[key]).encode("ascii", "ignore"), np.uint8)

    english, code = (Text(part(kind, False), part(kind, True)) for kind in ("english", "code"))
    return english, code


def is_taken(name: str) -> bool:
    """Tell whether a file is read."""
    return name == MANUAL or zlib.crc32(name.encode()) % TAKEN == 0


def of_file(name: str, source: str) -> Iterator[tuple[str, bool, str]]:
    """Yield the kind of each text in a file, whether it is held out, and the text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old sources have invalid escapes
        tree = ast.parse(source)
    if name == MANUAL:
        for number, topic in enumerate(manual(tree)):
            yield "english", number % MANUAL_HELD_OUT == 0, topic
        return
    for found in [*comments(source), *docstrings(tree)]:
        yield "english", is_held_out(name), found
    yield "code", is_held_out(name), ast.unparse(without_docstrings(tree))


def manual(tree: ast.Module) -> list[str]:
    """Return the topics of Python's manual, from the text of the module that holds them."""
    found = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [text for text in found if isinstance(text, str) and len(text) > 200]


def comments(source: str) -> list[str]:
    """Return the comments of a module; those without code between them are one text."""
    found: list[list[str]] = [[]]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found[-1].append(token.string.lstrip("#!: "))
        elif token.type not in (tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            found.append([])
    return [text for lines in found if len(text := "\n".join(lines)) >= SHORTEST]


def docstrings(tree: ast.Module) -> list[str]:
    """Return the docstrings of a module, its classes and its functions."""
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
    return [text for text in found if text and len(text) >= SHORTEST]


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def without_docstrings(tree: ast.Module) -> ast.Module:
    """Return a module without docstrings; what is left of an empty body is `pass`."""
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree
