"""What the catalog takes from the docstrings of the factories."""

import inspect
import re
from collections.abc import Callable
from typing import Any


def formula(factory: Callable[..., Any]) -> str:
    """Return the update rule: the first indented block after the first line."""
    description = _lines(factory)[1:]
    start = next(i for i, line in enumerate(description) if line.startswith("    "))
    block = []
    for line in description[start:]:
        if line and not line.startswith("    "):
            break
        block.append(line.removeprefix("    "))
    return "\n".join(block).rstrip()


def doubts(factory: Callable[..., Any]) -> str:
    """Return what the notes on fidelity say after their first sentence; empty if nothing.

    The first sentence is that of the catalog's row, and so is every other one on what it matches.
    """
    notes = "\n".join(_lines(factory)).partition("\nNotes:\n")[2]
    _, found, text = " ".join(notes.split()).partition("Fidelity: ")
    sentences = re.split(r"(?<=[.)]) (?=[A-Z`µ“\"])", text)
    known = ("Matches ", "It matches ", "`static_args`")
    rest = [sentence for sentence in sentences[1:] if not sentence.startswith(known)]
    return " ".join(rest) if found else ""


def plain(text: str) -> str:
    """Return Markdown without bold letters and the addresses of links."""
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text.replace("**", ""))


def _lines(factory: Callable[..., Any]) -> list[str]:
    return (inspect.getdoc(factory) or "").splitlines()
